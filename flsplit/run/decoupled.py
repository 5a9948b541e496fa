"""The decoupled schedule: clients train with auxiliary models and upload only now and then."""

import itertools
import math
from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flsplit.auxiliary import FIRST_STAGE, GIVEN, LINEAR, BuildAuxiliary, build_auxiliary, cosine
from flsplit.cut.cut_errors import listed
from flsplit.cut.flops import forward_flops
from flsplit.errors import OF_A_BATCH, ConfigError, FlsplitError, located
from flsplit.log import logger
from flsplit.losses import ModelLoss, is_plain_cross_entropy, logits_of
from flsplit.message.local_steps import AuxiliaryPlan, LocalReply, LocalRequest
from flsplit.message.shape import ShapeReply, ShapeRequest
from flsplit.message.steps import FinishReply
from flsplit.nested import shapes_of
from flsplit.run.ahead import FurtherParts
from flsplit.run.arguments import one_of, whole
from flsplit.run.held_memory import HeldMemory
from flsplit.run.options import of_kind
from flsplit.run.round import Round
from flsplit.run.step import Step
from flsplit.run.strategy import SplitStrategy
from flsplit.seeds import derive_seed, seeded
from flsplit.server.client_batch import ClientBatch
from flsplit.storage import State
from flsplit.untrained import copied
from flsplit.wireless.phases import BITS, Phase, Stage, Where, Work, server_passes

BATCHES, CLIENTS = "batches", "clients"


class AuxiliarySent(NamedTuple):
    """The auxiliary model that a client is to work with: its version and weights."""

    version: int
    tensors: dict[str, Tensor]


class DecoupledStrategy(SplitStrategy):
    """Base class of methods whose clients don't wait for the server.

    In a round a client takes all its local steps by itself, with the gradient that its auxiliary
    model emulates, and uploads smashed data and labels of every q-th batch. The server steps once
    per upload, in an order that doesn't depend on what came first. No cut-layer
    gradient goes down. Client segments are aggregated every round.

    Parameters
    ----------
    upload_every : int
        q: smashed data of every q-th batch of a client's round goes up, that of the first always.
    auxiliary : {'linear', 'first-stage'} or callable
        The auxiliary model: a linear classifier of the flattened smashed data; a copy of the
        server segment's first stage with new weights, pooling and a linear head; or a function of
        (shape of one row, number of classes), which ``client_app`` must be given, too.
    order : {'batches', 'clients'}
        The order in which the server takes a round's uploads: batch by batch, and by client within
        a batch; or all of a client's before the next one's.
    overlap : bool
        Over a session, let uploads come up while clients go on with their local steps, and work
        on them meanwhile. The numbers are the same. Only in the order of batches.
    **options
        See :class:`~flsplit.run.options.SplitOptions`.
    """

    aggregates = True
    pools = False
    needs_labels = "its server trains by itself on what clients have sent it"
    one_cut = "its auxiliary model is one for all and begins at the cut"

    trains_auxiliary = False
    """Whether clients train their auxiliary models."""
    uploads_auxiliary = False
    """Whether clients hand them over at the end of a round."""

    def __init__(
        self,
        *,
        upload_every: int = 5,
        auxiliary: str | BuildAuxiliary = LINEAR,
        order: str = BATCHES,
        overlap: bool = True,
        **options: Any,
    ) -> None:
        self.upload_every = whole("upload_every", upload_every, 1)
        self.order = one_of("order", order, (BATCHES, CLIENTS))
        of_kind("overlap", overlap, bool)
        self.overlap = overlap
        self.auxiliary = auxiliary
        self._given = None if isinstance(auxiliary, str) else auxiliary
        if self._given is None:
            self._kind = one_of("auxiliary", auxiliary, (LINEAR, FIRST_STAGE))
        elif callable(self._given):
            self._kind = GIVEN
        else:
            raise ConfigError(
                f"auxiliary is {auxiliary!r}, expected 'linear', 'first-stage' or a function of "
                "the shape of a row and the number of classes"
            )
        super().__init__(**options)
        if isinstance(self.options.loss, ModelLoss):
            raise ConfigError(
                f"{type(self).__name__} needs a loss of logits and labels for its auxiliary "
                "models, which ModelLoss keeps in the model"
            )
        if len(crossing := self.parts.crossing) > 1:
            raise ConfigError(
                f"{type(self).__name__}'s auxiliary models take smashed data that is one tensor, "
                f"but {len(crossing)} values cross at {self.options.default_cut!r} "
                f"({listed(list(crossing), limit=3)}): expected a cut where one crosses, or a "
                "method without auxiliary models"
            )

    # --- what the planner and a fleet's clock ask ----------------------------------------

    @classmethod
    def phases(cls, work: Work, **arguments: Any) -> tuple[Phase, ...]:
        """Return what a round sends and computes: local steps, then aggregation."""
        return (*cls.local_phases(work, **arguments), *cls.aggregation_phases(work, **arguments))

    @classmethod
    def local_phases(
        cls, work: Work, *, upload_every: int = 5, **arguments: Any
    ) -> tuple[Phase, ...]:
        r"""Return what the local steps, and the server's on what comes of them, send and compute.

        The auxiliary model is taken to be linear, with :math:`F_a, B_a` FLOPs per sample.

        - A device does ``steps`` times client forward :math:`b F_c`, auxiliary
          :math:`b (F_a + B_a)` and client backward :math:`b B_c` (FLOPs), and uploads
          :math:`u = \lceil steps / q \rceil` batches of :math:`b \Gamma` (bits);
        - the server trains on them, :math:`n u b F_s` and :math:`n u b B_s` (FLOPs).

        The server's work is counted after the devices', though some of it could overlap.
        """
        place, steps = work.place, work.training.steps
        rows = work.training.batch_size
        uploads = math.ceil(steps / upload_every)
        local = (
            Stage("client forward", Where.DEVICE, steps * rows * place.client_flops_forward),
            Stage("auxiliary", Where.DEVICE, steps * rows * work.auxiliary_flops),
            Stage("client backward", Where.DEVICE, steps * rows * place.client_flops_backward),
            Stage("uplink", Where.UPLINK, uploads * rows * work.activation_bits),
        )
        uploaded = uploads * work.rows
        return (
            Phase(local),
            *server_passes(work, forward_rows=uploaded, backward_rows=uploaded),
        )

    @classmethod
    def plan_note(cls, *, auxiliary: str | BuildAuxiliary = LINEAR, **arguments: Any) -> str:
        """Say that the auxiliary model is counted as another than it is."""
        return "" if auxiliary == LINEAR else "auxiliary models are counted as linear ones"

    @classmethod
    def device_memory_bytes(cls, work: Work, **arguments: Any) -> int:
        """Return the auxiliary model's bytes: parameters, and its input, the smashed data.

        ``(|w_a| + b Γ) / 8``, and where devices train it ``|w_a| / 8`` for its gradients and for
        each of the optimizer's slots.
        """
        copies = 2 + work.training.optimizer_slots if cls.trains_auxiliary else 1
        smashed_bytes = work.training.batch_size * work.place.activation_bytes
        return copies * work.auxiliary_bits // BITS + smashed_bytes

    # --- what a subclass says ------------------------------------------------------------

    @abstractmethod
    def auxiliary_of(self, client: str) -> AuxiliarySent:
        """Return the auxiliary model that a client is to work with now."""

    def auxiliary_lr_in(self, round_: Round) -> float:
        """Return the learning rate with which clients train their auxiliary models."""
        return 0.0

    def before_local_steps(self, round_: Round, names: list[str]) -> None:
        """Do what comes before the clients' local steps."""

    def wants_peek(self, round_: Round) -> bool:
        """Tell whether the server needs the first upload before the clients take a step."""
        return False

    def after_peek(self, round_: Round, names: list[str]) -> None:
        """Do what comes after the first uploads of such a round."""

    def emulated(self, client: str, smashed: Tensor, labels: Tensor) -> Tensor | None:
        """Return ĝ of an upload, None where the server doesn't know the client's model."""
        return None

    def uploaded(self, client: str, smashed: Tensor, labels: Tensor) -> None:
        """Take note of an upload, after the server's step."""

    def exchanges_per_round(self, steps: int, participants: int) -> int:
        """Count one exchange: only a session takes a round in parts."""
        return 1

    # --- a run ---------------------------------------------------------------------------

    def begin_run(self) -> None:
        """Forget an earlier run's auxiliary models."""
        self._row: tuple[int, ...] = ()
        self._classes = 0
        self._held: dict[str, int] = {}
        self.ended: dict[str, LocalReply] = {}
        self.initial: dict[str, Tensor] = {}

    def new_auxiliary(self) -> nn.Module:
        """Return an auxiliary model on the server's device, with the initial weights."""
        with seeded(derive_seed(self.options.seed, "auxiliary"), self.device):
            module = build_auxiliary(
                self._kind,
                self._row,
                self._classes,
                given=self._given,
                parts=lambda: self.split(copied(self.options.model)),
            )
        return module.to(self.device)

    def auxiliary_flops(self) -> int:
        """Return the FLOPs of a row's forward pass through an auxiliary model."""
        return forward_flops(self.new_auxiliary(), torch.empty(self._row, device="meta"))

    def _make_auxiliary(self, round_: Round) -> None:
        """Learn of a client what its smashed data looks like, once in a run; build the model."""
        if self._row:
            return
        misfits: dict[str, FlsplitError] = {}
        for name in round_.participants:
            request = ShapeRequest(round_.plan.server_round, round_.plan.cut, self.inputs)
            reply = round_.clients.exchange({name: request}, round_.entry).get(name)
            if isinstance(reply, ShapeReply):
                try:
                    self._classes = self._num_classes(reply.shape)
                except OF_A_BATCH as error:  # the next may say better
                    misfits[name] = error
                    continue
                for misfit, problem in misfits.items():
                    round_.leave_out(misfit, 0, problem)
                self._row = reply.shape
                state = self.new_auxiliary().state_dict()
                self.initial = {key: tensor.cpu().clone() for key, tensor in state.items()}
                return
        if misfits:  # and nobody's fits: then it's the model's fault
            raise next(iter(misfits.values()))

    @torch.no_grad()
    def _num_classes(self, row: tuple[int, ...]) -> int:
        segment = self.server
        segment.module.eval()
        logits = logits_of(segment.forward(segment.receive(torch.zeros(1, *row))))
        most = 3 if self._kind == GIVEN else 2  # of a sequence only a model of the user's knows
        if not isinstance(logits, Tensor) or not 2 <= logits.ndim <= most:
            raise ConfigError(
                f"{type(self).__name__} needs a model that gives logits (b, classes), or (b, T, "
                "classes) with an auxiliary model of your own, but the server segment turns "
                f"smashed data of shape {(1, *row)} into {shapes_of(logits)}"
            )
        return int(logits.shape[-1])

    # --- a round -------------------------------------------------------------------------

    def train_round(self, round_: Round) -> dict[str, FinishReply]:
        """Let the clients take their local steps, and step on what they upload."""
        self.ended, self._memory = {}, HeldMemory(self.server)
        self._make_auxiliary(round_)
        lost = {one.client for one in round_.entry.left_out}
        names = [name for name in round_.participants if name not in lost]
        if not self._row:
            round_.exchange_local({})  # says that too few clients are left
            return {}
        self.before_local_steps(round_, names)
        if self.wants_peek(round_):
            requests = {name: self._first_request(round_, name, peek=True) for name in names}
            replies = self._exchange(round_, requests)
            names = list(replies)
            # In turn, a client's model depends on what the server learned from those before it.
            turns = [[name] for name in names] if self.order == CLIENTS else [names]
            for turn in turns:
                self._step_on(round_, {name: replies[name] for name in turn})
                self.after_peek(round_, turn)
                self._train_locally(round_, turn, upload_from=1)
        else:
            self._train_locally(round_, names, upload_from=0)
        # Who ended first depends on the carrier; the order of a sum must not.
        self.ended = {n: self.ended[n] for n in round_.participants if n in self.ended}
        round_.record_metrics(self._memory.metrics(self.ended))
        if round_.plan.server_round == 1:
            self._warn_if_it_never_fires(self.ended)
        left = round_.others_than(())
        return {name: _finished(reply) for name, reply in self.ended.items() if name in left}

    def _train_locally(self, round_: Round, names: list[str], upload_from: int) -> None:
        """Take the uploads as they come; the server works while clients go on."""
        requests = {
            name: self._first_request(round_, name, upload_from=upload_from) for name in names
        }
        first = self._exchange(round_, requests)
        further = FurtherParts(round_, first, partial(self._next_request, round_, upload_from))
        for replies in itertools.chain([first], further):
            self.ended |= {n: r for n, r in replies.items() if r.steps_done == r.num_steps}
            self._step_on(round_, replies)

    def _exchange(
        self, round_: Round, requests: Mapping[str, LocalRequest]
    ) -> dict[str, LocalReply]:
        replies = round_.exchange_local(requests)
        for name in replies:
            if plan := requests[name].auxiliary_plan:
                self._held[name] = plan.version
        return replies

    def _first_request(
        self, round_: Round, name: str, *, peek: bool = False, upload_from: int = 0
    ) -> LocalRequest:
        sent, plan = self.auxiliary_of(name), round_.plan_of(name)
        return LocalRequest(
            **self._common(round_, 0, upload_from),
            num_steps=plan.num_steps,
            peek=peek,
            plan=plan,
            planned=plan,
            segment=round_.segment,
            auxiliary=sent.tensors,
            auxiliary_held=self._held.get(name) == sent.version,
            auxiliary_plan=AuxiliaryPlan(
                kind=self._kind,
                shape=self._row,
                num_classes=self._classes,
                version=sent.version,
                train=self.trains_auxiliary,
                lr=self.auxiliary_lr_in(round_),
                given_loss=not is_plain_cross_entropy(self.options.loss),
            ),
        )

    def _next_request(
        self, round_: Round, upload_from: int, step: int, first: LocalReply
    ) -> LocalRequest:
        return LocalRequest(
            **self._common(round_, step, upload_from),
            num_steps=first.num_steps,
            num_examples=first.num_examples,
        )

    def _common(self, round_: Round, step: int, upload_from: int) -> dict[str, Any]:
        overlaps = self._overlaps(round_)
        return {
            "server_round": round_.plan.server_round,
            "step": step,
            "stop": self._next_upload(max(step, upload_from)) + 1 if overlaps else 0,
            "upload_every": self.upload_every,
            "upload_from": upload_from,
            "upload_segment": round_.upload_segment,
            "upload_auxiliary": self.uploads_auxiliary,
            "like": round_.segment,
            "auxiliary_like": self.initial,
        }

    def _overlaps(self, round_: Round) -> bool:
        ahead = round_.clients.carrier.works_ahead
        return self.overlap and ahead and self.order == BATCHES

    def _next_upload(self, step: int) -> int:
        return -(-step // self.upload_every) * self.upload_every

    def _step_on(self, round_: Round, replies: Mapping[str, LocalReply]) -> None:
        """Do a server step for every upload: batch by batch, then by client, or client first."""
        self._memory.take(replies)
        uploads = [(step, reply) for reply in replies.values() for step in reply.uploads]
        if self.order == BATCHES:
            uploads.sort(key=itemgetter(0))
        for step, reply in uploads:
            batch = ClientBatch(reply.client, *reply.uploads[step], reply.num_examples)
            self.take_step(round_, step, reply.num_steps, [batch], replies_expected=False)

    def step(self, step: Step) -> None:
        """Step on one upload, and compare its true gradient with the one that the client had."""
        (batch,) = step.batches
        with self._memory.measuring(batch):
            found = step.gradients()
        step.update(found)
        # Seeded as when the client computed ĝ of this batch.
        seed = derive_seed(self.options.seed, "auxiliary", batch.client, step.round, step.index)
        with located(f"client {batch.client!r}"), seeded(seed, self.device):
            emulated = self.emulated(batch.client, batch.tensor, batch.labels)
        true = found.cut_gradients[batch.client]
        if emulated is not None and isinstance(true, Tensor):
            step.record({"auxiliary-cosine": cosine(emulated, true)})
        self.uploaded(batch.client, batch.tensor, batch.labels)

    def _warn_if_it_never_fires(self, replies: Mapping[str, LocalReply]) -> None:
        rarely = [name for name, one in replies.items() if 1 < one.num_steps <= self.upload_every]
        if rarely:
            logger.warning(
                "upload_every is %d, but %d clients take no more steps in a round (client %r takes "
                "%d): of their smashed data only the first batch's goes up",
                self.upload_every, len(rarely), rarely[0], replies[rarely[0]].num_steps,
            )  # fmt: skip

    # --- checkpoints ---------------------------------------------------------------------

    def state_dict(self) -> State:
        """Return all that a checkpoint needs, with how auxiliary models are built."""
        return super().state_dict() | {
            "auxiliary": {
                "shape": list(self._row),
                "num-classes": self._classes,
                "held": self._held,
                "initial": self.initial,
            }
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from a :meth:`state_dict`."""
        super().load_state_dict(state)
        auxiliary = state["auxiliary"]
        self._row, self._classes = tuple(auxiliary["shape"]), auxiliary["num-classes"]
        self._held, self.initial = auxiliary["held"], auxiliary["initial"]


def _finished(reply: LocalReply) -> FinishReply:
    return FinishReply(
        client=reply.client,
        server_round=reply.server_round,
        num_examples=reply.num_examples,
        seconds=reply.seconds,
        segment=reply.segment,
        clipped=reply.clipped,
    )
