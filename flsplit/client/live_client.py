"""One client at work: its segment, its optimizer, and the forward pass awaiting a gradient."""

import cmath
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from flwr.app import Context, RecordDict
from torch import Tensor, nn

from flsplit.client.auxiliary_model import Auxiliary
from flsplit.client.batches import refused_keywords
from flsplit.client.data import ClientData
from flsplit.client.order import Order, begun_anew, steps_per_round
from flsplit.client.spec import ClientSpec, client_name, pick_device
from flsplit.client.state import NO_SEGMENT, NO_STEP, ClientState
from flsplit.client.tail import Tail
from flsplit.client_parts.chain import ClientStep, PartChain
from flsplit.client_parts.compression import Packed
from flsplit.cut import Crossing, CutError, ExampleError, Split, Trace, split
from flsplit.cut.smashed import (
    CutGradient,
    Smashed,
    detached,
    fitting,
    gradients_in,
    learning_in,
    values_of,
)
from flsplit.cut.watch import places_of
from flsplit.errors import (
    DataError,
    NonFiniteError,
    ProtocolError,
    SegmentMismatchError,
    StateLostError,
    at,
    located,
)
from flsplit.finite import all_finite, clip_gradients
from flsplit.message.arrays import check_like
from flsplit.message.crossings import MOST_TRACES
from flsplit.message.fields import WHOLE
from flsplit.message.optimizer_state import OptimizerState, get_state, set_state
from flsplit.message.packing import unpacked
from flsplit.message.request import Backward, SegmentArrays
from flsplit.message.round_plan import RoundPlan
from flsplit.nested import as_arguments, num_rows, shapes_of, tensors_of, to_device
from flsplit.optimizers import NOMINAL_LR, UserOptimizer
from flsplit.seeds import derive_seed, seeded
from flsplit.untrained import (
    buffers_of,
    keeping_buffers,
    load_state,
    names_of_buffers,
    names_of_frozen,
    owners_of_buffers,
    put,
    put_all,
)


@dataclass
class _Pending:
    """A forward pass whose gradient is awaited."""

    step: int
    smashed: Smashed
    inputs: Any
    labels: Any
    buffers: list[Tensor]  # as they were before the forward pass
    drawn: int  # examples drawn when the step is done
    loss: Tensor | None = None  # what client parts add
    packed: dict[str, Packed] = field(default_factory=dict)  # what leaves in fewer bytes
    passed_tail: bool = False  # whether the last layers have computed, too


class Client:
    """The live objects of one client.

    Built anew from a :class:`ClientState` for every message over Flower's own carrier, kept
    in a cache by carriers that keep the process; both give the same numbers.
    """

    def __init__(self, spec: ClientSpec, context: Context) -> None:
        self.spec = spec
        self.context = context
        self.name = client_name(context)
        self.cut = spec.cut_for(context)
        self.device = pick_device(spec.device)
        # Seeded: a client that is built anew for a message must get the same data again, also
        # from a data function that splits at random.
        with seeded(derive_seed(0, "build", self.name), self.device):
            model = spec.build_model(context)
            self.data = ClientData.load(spec, context)
            self.segment = self._split(model).client.to(self.device)
        self.tail: Tail | None = None
        """The last layers of a U-shaped split, if that is one."""
        if places_of(self.cut)[1]:
            self.tail = Tail(self.segment, spec, self.device)
        named = [(name, p) for name, p in self.segment.named_parameters() if p.requires_grad]
        self._parameters = [p for _, p in named]
        self._owners = owners_of_buffers(self.segment)
        self.frozen = names_of_frozen(self.segment)
        """Names of parameters that never change; they travel once, and not back."""
        self.optimizer: UserOptimizer | None = None
        """What trains the segment, where something in it can be trained."""
        if named:
            self.optimizer = UserOptimizer("optimizer", spec.optimizer, named, NOMINAL_LR)
        self.auxiliary: Auxiliary | None = None
        """The auxiliary model, where the method has one."""
        self.num_examples = len(self.data.train)
        """Size of the training data, as of the beginning of the round."""
        self.num_steps = 0
        """Steps of this round, those that the client sits out included."""
        self._order = self._order_of(0)
        self._parts = PartChain("", (), self.name)
        self._state = ClientState({})
        self._pending: _Pending | None = None
        self._last_test: tuple[int, int, Smashed, Any, Any] | None = None
        self._trains = False  # whether the segment is known to be in training mode
        self.packed: dict[str, Packed] = {}
        """What leaves in fewer bytes with the next answer, by its place there."""

    def split_anew(self) -> Split:
        """Return a new model, cut in two."""
        return self._split(self.spec.build_model(self.context))

    def _split(self, model: nn.Module) -> Split:
        spec = self.spec
        try:
            return split(model, self.cut, share=spec.share)
        except ExampleError:  # no input could be made up: the first batch is one
            if not len(self.data.train):
                raise
        inputs, _ = self.data.train.batch(self.data.train.in_order("")[:2])
        return split(model, self.cut, inputs, share=spec.share)

    # --- state ---------------------------------------------------------------------------

    def state(self) -> ClientState:
        """Return a view of the client between two messages."""
        self._state.segment = {k: v.detach() for k, v in self._tensors()}
        if self._pending and self._pending.buffers:
            names = [name for name, _ in self.segment.named_buffers()]
            self._state.segment |= zip(names, self._pending.buffers, strict=True)
        self._state.optimizer = get_state(self.optimizer)
        self._state.auxiliary = self.auxiliary.state() if self.auxiliary else None
        return self._state

    def load(self, state: ClientState) -> None:
        """Go on from ``state``."""
        self._load_tensors(state.segment, what="the stored client segment")
        set_state(self.optimizer, state.optimizer)
        self._state, self._pending = state, None
        if state.plan and state.num_examples:  # else the round could not begin
            self._count_examples(state.num_examples)
            self._follow(state.plan)
            self._parts.load(state.parts)
        if state.auxiliary:
            self.auxiliary = Auxiliary(
                state.auxiliary.plan, self.spec, self.device, self.split_anew
            )
            self.auxiliary.load(state.auxiliary)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.segment.named_parameters()
        yield from self.segment.named_buffers()

    @torch.no_grad()
    def _load_tensors(self, tensors: dict[str, Tensor], what: str) -> None:
        own = dict(self._tensors())
        free = names_of_buffers(self.segment)
        for name, tensor in check_like(tensors, own, what=what, free=free).items():
            put(own[name], tensor)

    # --- a round -------------------------------------------------------------------------

    def begin(
        self, plan: RoundPlan, segment: SegmentArrays | None, optimizer: OptimizerState | None
    ) -> None:
        """Begin a round; a step still pending from an earlier one never happened."""
        self._check_cut(plan.cut)
        parts = self._parts
        if parts.described != plan.client_parts:  # before anything changes: it may be refused
            parts = PartChain(plan.client_parts, self.spec.client_parts, self.name)
            parts.follow(self._parts)
        num_examples = len(self.data.train)
        self._discard_pending()
        if self._state.plan and self._state.steps_done < self.num_steps:
            parts.forget()  # what the server knows of the round before, nobody can say
        before = self._state.plan
        other_run = before is not None and before.experiment != plan.experiment
        if other_run or self._state.is_ahead_of(plan.server_round, plan.experiment):
            # Another run must not go on with this one's state, nor an earlier round.
            set_state(self.optimizer, {})
            self.auxiliary = None  # its optimizer remembers, too
            self._state.version, self._state.drawn, self._state.trained = NO_SEGMENT, 0, 0
            parts = PartChain(plan.client_parts, self.spec.client_parts, self.name)
        if segment:
            self.replace_segment(segment)
        self.check_version(plan.segment_version)
        if self.spec.privacy_mods and self.optimizer and not self._state.given:
            raise StateLostError(
                f"client {self.name!r} doesn't know what the server gave it last, where privacy "
                "mods start: its state was kept without them"
            )
        if optimizer is not None:
            set_state(self.optimizer, optimizer)
        if num_examples:
            drawn = begun_anew(self._state.drawn, self._state.num_examples, num_examples)
            self._state.drawn, self._state.num_examples = drawn, num_examples
        self._count_examples(num_examples)
        self.data.warn(plan)
        self._state.plan, self._state.steps_done, self._state.told = plan, 0, ()
        self._parts, self._state.parts = parts, parts.state()
        self._follow(plan)
        self._state.round_start = {}
        if parts.needs_round_start:
            named = self.segment.named_parameters()
            start = {name: p.detach().clone() for name, p in named if p.requires_grad}
            self._state.round_start = start

    def _follow(self, plan: RoundPlan) -> None:
        """Set what a plan says, but for the state that goes on from round to round."""
        if self.optimizer:
            self.optimizer.set_lr(plan.lr)
            self.optimizer.warn(plan.experiment)
        self._trains = False
        self.num_steps = steps_per_round(self.num_examples, plan, self.name)
        if self._order.seed != plan.seed:
            self._order = self._order_of(plan.seed)
        if self._parts.described != plan.client_parts:
            self._parts = PartChain(plan.client_parts, self.spec.client_parts, self.name)

    def _order_of(self, seed: int) -> Order:
        return Order(self.num_examples, seed, self.name, self.data.train.sampler)

    def _count_examples(self, now: int) -> None:
        if now != self.num_examples:
            self.num_examples = now
            self._order = self._order_of(self._order.seed)

    def _check_cut(self, cut: str) -> None:
        if cut != self.cut:
            raise SegmentMismatchError(
                f"the server cuts the model at {cut!r}, client {self.name!r} at {self.cut!r}"
            )

    def replace_segment(self, segment: SegmentArrays) -> None:
        """Take the server's segment instead of the own one; the optimizer's state stays."""
        self._discard_pending()
        own = self.segment.state_dict()
        missing = self.frozen - segment.tensors.keys()
        if missing and self._state.version == NO_SEGMENT:
            raise StateLostError(f"client {self.name!r} holds no segment to which this one adds")
        expected = {name: one for name, one in own.items() if name not in missing}
        what, free = "the client segment from the server", names_of_buffers(self.segment)
        given = check_like(segment.tensors, expected, what=what, free=free)
        load_state(self.segment, given, strict=not missing)
        self._state.version = segment.version
        if self.spec.privacy_mods:
            named = self.segment.named_parameters(remove_duplicate=False)
            self._state.given = {name: given[name] for name, p in named if p.requires_grad}

    @property
    def given(self) -> dict[str, Tensor]:
        """Trainable parameters as the server gave them last; kept for privacy mods alone."""
        return self._state.given

    def handed_over(self) -> dict[str, Tensor]:
        """Return the client segment as it is handed over: without what never changes."""
        state = self.segment.state_dict()
        return {name: one for name, one in state.items() if name not in self.frozen}

    def check_version(self, expected: int) -> None:
        """Raise StateLostError if another of the server's segments is expected than is here."""
        if self._state.version != expected:
            held = "none" if self._state.version == NO_SEGMENT else self._state.version
            raise StateLostError(
                f"client {self.name!r} holds segment {held}, the server expects {expected}: it is "
                "new, or its state was lost"
            )

    @property
    def plan(self) -> RoundPlan:
        """The plan of the round the client is in."""
        if self._state.plan is None:
            raise StateLostError(
                f"client {self.name!r} is in no round: it is new, or lost its state"
            )
        return self._state.plan

    @property
    def steps_before(self) -> int:
        """Steps that the client had done in the run when its round began."""
        return self._state.trained - self._state.steps_done

    def check_round(self, server_round: int) -> None:
        """Raise ProtocolError if a request is of another round than the client is in.

        Raises
        ------
        StateLostError
            If the client is in no round.
        """
        if self._state.plan is None or server_round != self._state.plan.server_round:
            raise ProtocolError(
                f"server-round is {server_round}, client {self.name!r} is in round "
                f"{self.plan.server_round}"
            )

    def forward(self, step: int, place: str | None = WHOLE) -> tuple[Smashed, Any]:
        """Return the smashed data ``(b, ...)`` and labels ``(b, ...)`` of ``step``.

        Both are empty in a step that the client sits out. The smashed data is detached, but says
        whether it needs a gradient. ``place`` is its place in the answer, None if it stays here.

        Raises
        ------
        ProtocolError
            If ``step`` is not the next one.
        DataError, SegmentMismatchError, NonFiniteError
            If the batch can't be computed.
        """
        plan = self.plan
        if not step == self._state.steps_done < self.num_steps:
            raise ProtocolError(
                f"step is {step}, expected {self._state.steps_done} of {self.num_steps} "
                f"(client {self.name!r}, round {plan.server_round})"
            )
        if self._pending:  # asked twice for a step: the buffers move once
            self._undo_forward()
        self._pending = self._compute(plan, step, sent=place is not None)
        self._state.pending, self._state.tail = step, {}
        for name, packed in self._pending.packed.items():
            self.packed[f"{place}:{name}" if name else str(place)] = packed
        return detached(self._pending.smashed), self._leaving(self._pending.labels)

    def _leaving(self, labels: Any) -> Any:
        """Return the labels that are sent: none ``(b, 0)`` if the last layers are here."""
        return torch.empty(num_rows(labels), 0) if self.tail else labels

    def tail_gradient(self, step: int, outputs: Tensor) -> Tensor:
        """Return the gradient of the pending step's loss by what the server segment gave for it.

        Raises
        ------
        ProtocolError
            If no such step is pending, or the model isn't cut twice.
        DataError, SegmentMismatchError, NonFiniteError
            If the last layers or the loss can't take the batch.
        """
        if self.tail is None or step != self._state.pending:
            raise ProtocolError(
                f"outputs of step {step} came, client {self.name!r} "
                + ("has no layers after them" if self.tail is None else self._awaits())
            )
        if self._pending and self._pending.passed_tail:  # asked twice for a step
            self._undo_forward()
        self._pending = pending = self._pending or self._compute(self.plan, step)
        pending.passed_tail = True
        seed = derive_seed(self.plan.seed, "tail", self.name, self.plan.server_round, step)
        try:
            with seeded(seed, self.device), located(f"client {self.name!r}, step {step}"):
                gradient, stays = self.tail.gradients(
                    outputs, pending.smashed, pending.inputs, pending.labels
                )
            if self._parts.parts:
                at = self._part_step(step)
                gradient, packed, memory = self._parts.output_gradient(at, gradient, pending.labels)
                stays |= memory
                if packed:
                    self.packed[WHOLE] = packed
            self._state.tail = stays
        except Exception:
            self._undo_forward()
            raise
        return gradient

    def _awaits(self) -> str:
        return f"awaits {'none' if self._state.pending == NO_STEP else self._state.pending}"

    def untold(self, smashed: Iterable[Smashed]) -> dict[str, Trace] | None:
        """Return the traces, if any, of what crosses that were not sent in this round yet."""
        told, found = list(self._state.told), {}
        for one in smashed:
            if isinstance(one, Crossing) and one.trace.digest not in told:
                found[one.trace.digest] = one.trace
                told.append(one.trace.digest)
        self._state.told = tuple(told[-MOST_TRACES:])
        return found or None

    def unpacked(self, content: RecordDict, record: str) -> RecordDict:
        """Return what the server sent, with what it packed in a record unpacked."""
        return unpacked(content, record, partial(self._parts.unpack, record))

    def backward(self, request: Backward) -> None:
        """Back-propagate the cut-layer gradient of the pending step and let the optimizer step.

        Raises
        ------
        ProtocolError
            If the gradient is of another step or another shape.
        NonFiniteError
            If it is NaN or infinite; the weights stay as they were.
        """
        if request.step != self._state.pending:
            raise ProtocolError(
                f"gradient of step {request.step} came, client {self.name!r} {self._awaits()}"
            )
        # Without a cache the forward pass is gone: compute it again, with the same batch, the
        # same random numbers and the buffers of before.
        if self._pending is None:
            self._pending = self._compute(self.plan, request.step)
        if request.gradient is not None:
            self._update(self._pending, request.gradient)
        if self.tail:  # now: the backward pass may need what the first layers' pass left in them
            self.tail.put_buffers(self._state.tail)
            self._parts.remember(self._state.tail)
        self._state.drawn = self._pending.drawn
        self._state.steps_done += 1
        self._state.trained += 1
        self._pending, self._state.pending, self._state.tail = None, NO_STEP, {}
        if self._parts.parts:
            self._parts.check_state()
            self._state.parts = self._parts.state()

    def _compute(self, plan: RoundPlan, step: int, *, sent: bool = True) -> _Pending:
        indices, drawn = self._order.batch(plan, step, self._state.drawn)
        if not indices:
            return _Pending(
                step, torch.empty(0), None, torch.empty(0, dtype=torch.int64), [], drawn
            )
        seed = derive_seed(plan.seed, "client", self.name, plan.server_round, step)
        buffers = list(map(torch.clone, buffers_of(self._owners)))
        if not self._trains:  # it walks over all modules
            self.segment.train()
            self._trains = True
        loss, packed = None, dict[str, Packed]()
        try:
            with seeded(seed, self.device):
                inputs, labels = self.data.train.batch(indices)
                smashed = self._run_segment(inputs)
                if self._parts.parts:
                    at = self._part_step(step)
                    smashed = self._parts.smashed(at, smashed)
                    leaving = smashed.values if isinstance(smashed, Crossing) else smashed
                    loss = self._parts.loss(at, to_device(inputs, self.device), leaving, labels)
                    smashed, inputs, labels, rows = self._parts.shuffled(
                        at, smashed, inputs, labels, indices
                    )
            self._check_smashed(smashed, step)
            if self._parts.parts and sent:
                packed = self._parts.pack(smashed, rows)
        except Exception:
            put_all(buffers_of(self._owners), buffers)
            # A part may have remembered something of a step that never happened.
            self._parts.load(self._state.parts)
            raise
        kept = inputs if self.tail else None  # their shapes tell the way that forward takes
        return _Pending(step, smashed, kept, labels, buffers, drawn, loss, packed)

    def _part_step(self, step: int) -> ClientStep:
        plan, start = self.plan, self._state.round_start
        return ClientStep(plan.seed, self.name, plan.server_round, step, self.segment, start)

    def _update(self, pending: _Pending, gradient: CutGradient) -> None:
        tensors = fitting(gradient, pending.smashed)
        if tensors is None:
            raise ProtocolError(
                f"cut-gradient has shape {shapes_of(gradient)}, the smashed data of step "
                f"{pending.step} {shapes_of(_gradients_wanted(pending.smashed))} (client "
                f"{self.name!r})"
            )
        for one in tensors:
            if not all_finite(one):
                raise self._not_finite(f"cut-layer gradient of step {pending.step}")
        wanted = learning_in(pending.smashed)
        if self.optimizer is None or not (wanted or self.tail):
            return
        if self.tail and not self._state.tail:
            raise ProtocolError(
                f"the cut-layer gradient of step {pending.step} came before the outputs (client "
                f"{self.name!r})"
            )
        if not wanted:  # the first layers have nothing to learn
            gradient = {}
        elif isinstance(gradient, Tensor):
            gradient = gradient.to(wanted[0])
        else:
            gradient = {
                name: gradient[name].to(value) for name, value in zip(gradient, wanted, strict=True)
            }
        if self._parts.parts:
            gradient = self._parts.cut_gradient(self._part_step(pending.step), gradient)
        self.optimizer.zero_grad()
        outputs: list[Tensor] = list(wanted)
        gradients: list[Tensor | None] = list(gradients_in(gradient))
        if pending.loss is not None:
            outputs, gradients = [*outputs, pending.loss], [*gradients, None]
        if self.tail:
            self.tail.put_gradients(self._state.tail)
            for kept, own in self.tail.of_kept(pending.smashed, self._state.tail):
                outputs, gradients = [*outputs, kept], [*gradients, own]
        if outputs:
            torch.autograd.backward(outputs, gradients)
        if self._parts.parts:
            self._parts.gradients(self._part_step(pending.step), self._parameters)
        # One number for all: it is finite only if they are. Only what isn't is looked at closer.
        total: float | Tensor = 0.0
        for parameter in self._parameters:
            if parameter.grad is not None:
                total = total + parameter.grad.sum()
        if not (isinstance(total, float) or cmath.isfinite(total.item())):
            for parameter in self._parameters:
                if parameter.grad is not None and not all_finite(parameter.grad):
                    what = f"gradient of the client segment in step {pending.step}"
                    raise self._not_finite(what)
        if self.spec.max_grad_norm is not None:
            clip_gradients(self._parameters, self.spec.max_grad_norm)
        self.optimizer.step()

    def _discard_pending(self) -> None:
        self._undo_forward()
        self._state.pending, self._state.tail = NO_STEP, {}

    def _undo_forward(self) -> None:
        """Be as before the pending forward pass, which is computed again if its gradient comes."""
        if self._pending:
            if self._pending.buffers:
                put_all(buffers_of(self._owners), self._pending.buffers)
            self._parts.load(self._state.parts)
        self._pending = None

    # --- evaluation ----------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, batch: int, batch_size: int) -> tuple[Smashed, Any, int]:
        """Return smashed data and labels of a test batch, and how many batches there are.

        Without test data there are 0 batches, and both tensors are empty.
        """
        if self.data.test is None:
            return torch.empty(0), torch.empty(0, dtype=torch.int64), 0
        run = self._state.plan.experiment if self._state.plan else ""
        order = self.data.test.in_order(run)
        if batch == 0 or not self._state.num_tests:  # data grow or shrink between evaluations
            self._state.num_tests = len(order)
        num_batches = -(-self._state.num_tests // batch_size)
        if not num_batches:
            return torch.empty(0), torch.empty(0, dtype=torch.int64), 0
        if batch >= num_batches:
            raise ProtocolError(
                f"test batch {batch} asked for, client {self.name!r} has {num_batches}"
            )
        if len(order) < self._state.num_tests:
            raise DataError(
                f"client {self.name!r} began an evaluation with {self._state.num_tests} test "
                f"examples, now there are {len(order)}"
            )
        if batch == 0:
            self._state.told, self._state.tested = (), {}
        self._undo_forward()
        rows = order[batch * batch_size : min((batch + 1) * batch_size, self._state.num_tests)]
        # Seeded as a training step is: a transform that draws gives the same scores again.
        with seeded(derive_seed(0, "test", self.name, batch), self.device):
            inputs, labels = self.data.test.batch(rows)
        smashed = self._tested(inputs)
        if self.tail:
            self._last_test = batch, batch_size, smashed, inputs, labels
        return smashed, self._leaving(labels), num_batches

    @torch.no_grad()
    def evaluate_tail(self, batch: int, batch_size: int, outputs: Tensor) -> dict[str, float]:
        """Count a test batch, of which the server segment gave ``outputs``; return the sums.

        They are called as the fields of `EvaluateTailReply`.
        """
        if self.tail is None:
            raise ProtocolError(f"outputs came, client {self.name!r} has no layers after them")
        last = self._last_test
        if last is None or last[:2] != (batch, batch_size):
            before = self._state.tested
            self.evaluate(batch, batch_size)
            self._state.tested = before
            last = self._last_test
        assert last is not None
        self.segment.eval()
        self._trains = False
        seed = derive_seed(0, "test tail", self.name, batch)
        with keeping_buffers(self.segment), seeded(seed, self.device):
            loss, count, _ = self.tail.loss(outputs, *last[2:])
        counted = loss * count.weight if count.weight else 0.0  # else there is no mean
        rows = num_rows(last[-1])
        now = (counted, count.weight, count.correct, count.classified, rows)
        names = ("loss", "weight", "correct", "classified", "num_examples")
        before = self._state.tested
        for name, number in zip(names, now, strict=True):
            own = torch.as_tensor(number, dtype=torch.float64).cpu()
            before[name] = before[name] + own if name in before else own
        return {name: float(one) for name, one in before.items()}

    @torch.no_grad()
    def one_row(self, cut: str) -> tuple[Any, Tensor]:
        """Return inputs and smashed data of one example, if the model is cut at ``cut``.

        Raises
        ------
        SegmentMismatchError
            If several values cross.
        """
        self._check_cut(cut)
        examples = self.data.train
        if len(examples) == 0:
            raise DataError(f"client {self.name!r} has no training examples")
        self._undo_forward()
        with seeded(derive_seed(0, "shape", self.name), self.device):
            inputs, _ = examples.batch([examples.in_order("")[0]])
        smashed = self._tested(inputs)
        if not isinstance(smashed, Tensor):
            raise SegmentMismatchError(
                f"client {self.name!r}: the method needs smashed data that is one tensor, here "
                f"{len(values_of(smashed))} values cross"
            )
        return inputs, smashed

    def _tested(self, inputs: Any) -> Smashed:
        """Run inputs through the segment, of which nothing changes, whatever forward does."""
        self.segment.eval()
        self._trains = False
        with keeping_buffers(self.segment):
            return self._run_segment(inputs)

    # --- computing -----------------------------------------------------------------------

    def _run_segment(self, inputs: Any) -> Smashed:
        dtype = self.spec.autocast
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        if isinstance(inputs, Tensor):
            args = (inputs.to(self.device),)
        else:
            args, kwargs = as_arguments(to_device(inputs, self.device))
        try:
            with torch.autocast(self.device.type, dtype=dtype) if dtype else nullcontext():
                smashed: Smashed = self.segment(*args, **kwargs)
        except CutError as error:
            at(f"client {self.name!r}", error)
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise self._explain(error, inputs) from error
        if isinstance(smashed, Tensor) and not (
            smashed.is_floating_point() or smashed.is_complex()
        ):
            raise SegmentMismatchError(
                f"the smashed data at {self.cut!r} is {smashed.dtype}, expected floating point"
            )
        return smashed

    def _explain(self, error: Exception, inputs: Any) -> Exception:
        kinds = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors_of(inputs)]
        shapes = ", ".join(f"shape {shape} and dtype {dtype}" for shape, dtype in kinds)
        if "more than 1 value per channel" in str(error):
            return DataError(
                f"client {self.name!r}: BatchNorm can't train on a batch of one (inputs of "
                f"{shapes}); use another batch-size, or drop-last to leave out the ragged last one"
            )
        if isinstance(inputs, Mapping) and "keyword argument" in str(error):
            return refused_keywords(inputs, self.name, error)
        return SegmentMismatchError(
            f"client {self.name!r}: the client segment can't take inputs of {shapes}: {error}"
        )

    def _check_smashed(self, smashed: Smashed, step: int) -> None:
        # A mask that crosses may be -inf on purpose.
        computed = [smashed] if isinstance(smashed, Tensor) else learning_in(smashed)
        if not all(map(all_finite, computed)):
            raise self._not_finite(f"smashed data of step {step}")

    def _not_finite(self, what: str) -> NonFiniteError:
        return NonFiniteError(
            f"{what} is NaN or infinite (client {self.name!r}, round {self.plan.server_round})"
        )


def _gradients_wanted(smashed: Smashed) -> Any:
    if isinstance(smashed, Tensor):
        return smashed
    return {name: smashed.values[name] for name in smashed.learning}
