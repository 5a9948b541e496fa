"""One client: what is built of it, what it remembers, and the round that it is in."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from flwr.app import Context, RecordDict
from torch import Tensor, nn

from flsplit.client.auxiliary_model import Auxiliary
from flsplit.client.data import ClientData
from flsplit.client.first_layers import FirstLayers
from flsplit.client.order import Order, begun_anew, steps_per_round
from flsplit.client.spec import ClientSpec, client_name, pick_device
from flsplit.client.state import NO_SEGMENT, NO_STEP, ClientState, own_tensors, put_tensors
from flsplit.client.tail import Tail
from flsplit.client_parts.chain import PartChain
from flsplit.client_parts.compression import Packed
from flsplit.cut import Crossing, ExampleError, Split, Trace, split
from flsplit.cut.partial_forward import places_of
from flsplit.cut.smashed import Smashed
from flsplit.errors import ProtocolError, SegmentMismatchError, StateLostError
from flsplit.message.arrays import check_like
from flsplit.message.crossings import MOST_TRACES
from flsplit.message.optimizer_state import OptimizerState, get_state, set_state
from flsplit.message.packing import unpacked
from flsplit.message.request import Batch, SegmentArrays
from flsplit.message.round_plan import RoundPlan
from flsplit.nested import to_device
from flsplit.optimizers import NOMINAL_LR, UserOptimizer
from flsplit.seeds import derive_seed, seeded
from flsplit.untrained import load_state, names_of_buffers, names_of_frozen, put_all


@dataclass
class Pending:
    """A forward pass whose gradient is awaited."""

    step: int
    smashed: Smashed
    learning: list[Tensor]  # what of it needs a gradient
    leaving: Batch  # the same without graph, and the labels that go with it
    inputs: Any
    labels: Any
    buffers: list[Tensor]  # as they were before the forward pass
    drawn: int  # examples drawn when the step is done
    loss: Tensor | None = None  # what client parts add
    packed: dict[str, Packed] = field(default_factory=dict)  # what leaves in fewer bytes
    rows: Tensor | None = None  # which examples these are, where parts may want to know
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
        self.first = FirstLayers(self.segment, self.cut, self.name, self.device, spec.autocast)
        self.tail: Tail | None = None
        """The last layers of a U-shaped split, if that is one."""
        if places_of(self.cut)[1]:
            self.tail = Tail(self.segment, spec, self.device)
        named = [(name, p) for name, p in self.segment.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
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
        self.steps_before = 0
        """Steps that the client had done in the run when its round began."""
        self.order = self._order_of(0)
        self.parts = PartChain("", (), self.name)
        self.memory = ClientState({})
        """What is remembered between two messages; `state` brings segment and optimizer into it."""
        self.pending: Pending | None = None
        self.last_test: tuple[int, int, Smashed, Any, Any] | None = None
        """Test batch, batch size, smashed data, inputs and labels, where last layers are here."""
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
        self.memory.segment = own_tensors(self.segment)
        if self.pending and self.pending.buffers:
            names = [name for name, _ in self.segment.named_buffers()]
            self.memory.segment |= zip(names, self.pending.buffers, strict=True)
        self.memory.optimizer = get_state(self.optimizer)
        self.memory.auxiliary = self.auxiliary.state() if self.auxiliary else None
        return self.memory

    def load(self, state: ClientState) -> None:
        """Go on from ``state``."""
        put_tensors(self.segment, state.segment, what="the stored client segment")
        set_state(self.optimizer, state.optimizer)
        state.round_start = to_device(state.round_start, self.device)  # where parts expect it
        self.memory, self.pending = state, None
        if state.plan and state.num_examples:  # else the round could not begin
            self._count_examples(state.num_examples)
            self._follow(state.plan)
            self.parts.load(state.parts)
        if state.auxiliary:
            self.auxiliary = Auxiliary(
                state.auxiliary.plan, self.spec, self.device, self.split_anew
            )
            self.auxiliary.load(state.auxiliary)

    # --- a round -------------------------------------------------------------------------

    def begin(
        self, plan: RoundPlan, segment: SegmentArrays | None, optimizer: OptimizerState | None
    ) -> None:
        """Begin a round; a step still pending from an earlier one never happened."""
        self.check_cut(plan.cut)
        parts = self.parts
        if parts.described != plan.client_parts:  # before anything changes: it may be refused
            parts = PartChain(plan.client_parts, self.spec.client_parts, self.name)
            parts.follow(self.parts)
        num_examples = len(self.data.train)
        self._discard_pending()
        if self.memory.plan and self.memory.steps_done < self.num_steps:
            parts.forget()  # what the server knows of the round before, nobody can say
        before = self.memory.plan
        other_run = before is not None and before.experiment != plan.experiment
        if other_run or self.memory.is_ahead_of(plan.server_round, plan.experiment):
            # Another run must not go on with this one's state, nor an earlier round.
            set_state(self.optimizer, {})
            self.auxiliary = None  # its optimizer remembers, too
            self.memory.version, self.memory.drawn, self.memory.trained = NO_SEGMENT, 0, 0
            parts = PartChain(plan.client_parts, self.spec.client_parts, self.name)
        if segment:
            self.replace_segment(segment)
        self.check_version(plan.segment_version)
        if self.spec.privacy_mods and self.optimizer and not self.memory.given:
            raise StateLostError(
                f"client {self.name!r} doesn't know what the server gave it last, where privacy "
                "mods start: its state was kept without them"
            )
        if optimizer is not None:
            set_state(self.optimizer, optimizer)
        if num_examples:
            drawn = begun_anew(self.memory.drawn, self.memory.num_examples, num_examples)
            self.memory.drawn, self.memory.num_examples = drawn, num_examples
        self._count_examples(num_examples)
        self.data.warn(plan)
        self.memory.plan, self.memory.steps_done, self.memory.told = plan, 0, ()
        self.parts, self.memory.parts = parts, parts.state()
        self._follow(plan)
        self.memory.round_start = {}
        if parts.needs_round_start:
            named = self.segment.named_parameters()
            start = {name: p.detach().clone() for name, p in named if p.requires_grad}
            self.memory.round_start = start

    def _follow(self, plan: RoundPlan) -> None:
        """Set what a plan says, but for the state that goes on from round to round."""
        if self.optimizer:
            self.optimizer.set_lr(plan.lr)
            self.optimizer.warn(plan.experiment)
        self.first.trains = False
        self.segment.expect(plan.inputs)
        self.num_steps = steps_per_round(self.num_examples, plan, self.name)
        self.steps_before = self.memory.trained - self.memory.steps_done
        if self.order.seed != plan.seed:
            self.order = self._order_of(plan.seed)
        if self.parts.described != plan.client_parts:
            self.parts = PartChain(plan.client_parts, self.spec.client_parts, self.name)

    def _order_of(self, seed: int) -> Order:
        return Order(self.num_examples, seed, self.name, self.data.train.sampler)

    def _count_examples(self, now: int) -> None:
        if now != self.num_examples:
            self.num_examples = now
            self.order = self._order_of(self.order.seed)

    def check_cut(self, cut: str) -> None:
        """Raise SegmentMismatchError if the server cuts the model elsewhere."""
        if cut != self.cut:
            raise SegmentMismatchError(
                f"the server cuts the model at {cut!r}, client {self.name!r} at {self.cut!r}"
            )

    def replace_segment(self, segment: SegmentArrays) -> None:
        """Take the server's segment instead of the own one; the optimizer's state stays."""
        self._discard_pending()
        own = self.segment.state_dict()
        missing = self.frozen - segment.tensors.keys()
        if missing and self.memory.version == NO_SEGMENT:
            raise StateLostError(f"client {self.name!r} holds no segment to which this one adds")
        expected = {name: one for name, one in own.items() if name not in missing}
        what, free = "the client segment from the server", names_of_buffers(self.segment)
        given = check_like(segment.tensors, expected, what=what, free=free)
        load_state(self.segment, given, strict=not missing)
        self.memory.version = segment.version
        if self.spec.privacy_mods:
            named = self.segment.named_parameters(remove_duplicate=False)
            self.memory.given = {name: given[name] for name, p in named if p.requires_grad}

    def handed_over(self) -> dict[str, Tensor]:
        """Return the client segment as it is handed over: without what never changes."""
        state = self.segment.state_dict()
        return {name: one for name, one in state.items() if name not in self.frozen}

    def check_version(self, expected: int) -> None:
        """Raise StateLostError if another of the server's segments is expected than is here."""
        if self.memory.version != expected:
            held = "none" if self.memory.version == NO_SEGMENT else self.memory.version
            raise StateLostError(
                f"client {self.name!r} holds segment {held}, the server expects {expected}: it is "
                "new, or its state was lost"
            )

    @property
    def plan(self) -> RoundPlan:
        """The plan of the round the client is in."""
        if self.memory.plan is None:
            raise StateLostError(
                f"client {self.name!r} is in no round: it is new, or lost its state"
            )
        return self.memory.plan

    def check_round(self, server_round: int) -> None:
        """Raise ProtocolError if a request is of another round than the client is in.

        StateLostError if the client is in no round.
        """
        if self.memory.plan is None or server_round != self.memory.plan.server_round:
            raise ProtocolError(
                f"server-round is {server_round}, client {self.name!r} is in round "
                f"{self.plan.server_round}"
            )

    def untold(self, smashed: Iterable[Smashed]) -> dict[str, Trace] | None:
        """Return the traces, if any, of what crosses that were not sent in this round yet."""
        told, found = list(self.memory.told), {}
        for one in smashed:
            if isinstance(one, Crossing) and one.trace.digest not in told:
                found[one.trace.digest] = one.trace
                told.append(one.trace.digest)
        self.memory.told = tuple(told[-MOST_TRACES:])
        return found or None

    def unpacked(self, content: RecordDict, record: str) -> RecordDict:
        """Return what the server sent, with what it packed in a record unpacked."""
        return unpacked(content, record, partial(self.parts.unpack, record))

    def _discard_pending(self) -> None:
        self.undo_forward()
        self.memory.pending, self.memory.tail = NO_STEP, {}

    def undo_forward(self) -> None:
        """Be as before the pending forward pass, which is computed again if its gradient comes."""
        if self.pending:
            if self.pending.buffers:
                put_all(self.first.buffers, self.pending.buffers)
            self.parts.load(self.memory.parts)
        self.pending = None
