"""FSL-SAGE."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flsplit.auxiliary import cosine, emulated_gradient
from flsplit.errors import ConfigError, MethodError, SegmentMismatchError
from flsplit.log import logger
from flsplit.losses import Criterion
from flsplit.nested import shapes_of
from flsplit.optimizers import UserOptimizer
from flsplit.run import DecoupledStrategy, Round
from flsplit.run.arguments import one_of, whole
from flsplit.run.decoupled import CLIENTS, AuxiliarySent
from flsplit.run.options import LearningRate, at_round, check_callable, check_rate, of_kind
from flsplit.seeds import derive_seed, seeded
from flsplit.server.segment import ServerSegment
from flsplit.storage import State
from flsplit.untrained import keeping_buffers
from flsplit.wireless.phases import Phase, Stage, Where, Work, server_phase

BEFORE_ROUND, IN_ROUND = "before_round", "in_round"


class FSLSAGE(DecoupledStrategy):
    """FSL-SAGE: an auxiliary model per client, aligned with the server's gradients.

    The server keeps each client's latest uploads. Every ``align_every`` rounds it computes their
    true cut-layer gradients with its segment as it is then, fits the client's auxiliary model's
    gradients to them, and sends the model down. Nothing else changes auxiliary models, and they
    are never averaged. Its authors' code is ``FSLSAGE(order="clients", align_guard=False)``.

    Parameters
    ----------
    align_every : int
        l: rounds between two alignments; 0 for none at all.
    align_epochs : int
        A: how often an alignment goes through the buffer.
    align_batch_size : int
        Samples per optimizer step of an alignment, mixed anew in each of its epochs; 0 for the
        whole buffer.
    align_guard : bool
        Throw an alignment away that diverges or ends with a larger error than it began with.
    buffer_size : int
        Samples that a client's buffer holds.
    align : {'in_round', 'before_round'}
        Whether alignment stands in a round, after its first uploads, as in the authors' code,
        which takes a second exchange; or before it, on the uploads of earlier rounds.
    auxiliary_optimizer : callable
        Called as ``auxiliary_optimizer(parameters, lr=…)``; lives as long as the run.
    auxiliary_lr : float or callable
        Its learning rate, or a function of the round (from 1).
    upload_every, auxiliary, order, overlap
        See :class:`~flsplit.run.DecoupledStrategy`.
    **options
        See :class:`~flsplit.run.SplitOptions`.

    References
    ----------
    .. [1] Nair et al., FSL-SAGE: Accelerating Federated Split Learning via Smashed Activation
       Gradient Estimation, ICML 2025, PMLR 267
    """

    def __init__(
        self,
        *,
        align_every: int = 10,
        align_epochs: int = 100,
        align_batch_size: int = 0,
        align_guard: bool = True,
        buffer_size: int = 1000,
        align: str = IN_ROUND,
        auxiliary_optimizer: Callable[..., Optimizer] = torch.optim.Adam,
        auxiliary_lr: LearningRate = 1e-3,
        **options: Any,
    ) -> None:
        self.align_every = whole("align_every", align_every, 0)
        self.align_epochs = whole("align_epochs", align_epochs, 1)
        self.align_batch_size = whole("align_batch_size", align_batch_size, 0)
        of_kind("align_guard", align_guard, bool)
        self.align_guard = align_guard
        self.buffer_size = whole("buffer_size", buffer_size, 1)
        self.align = one_of("align", align, (BEFORE_ROUND, IN_ROUND))
        check_rate("auxiliary_lr", auxiliary_lr)
        self.auxiliary_lr = auxiliary_lr
        check_callable("auxiliary_optimizer", auxiliary_optimizer)
        self.auxiliary_optimizer = auxiliary_optimizer
        super().__init__(**options)
        self._check_buffer(self.options.batch_size)

    @classmethod
    def phases(cls, work: Work, **arguments: Any) -> tuple[Phase, ...]:
        r"""Return what a round sends and computes: local steps, alignment, aggregation.

        Every l-th round, so a share 1/l of it in each, the server aligns: N buffered samples of
        each of n devices go through the server segment and A times through the auxiliary model,
        with second derivatives, :math:`n N (F_s + B_s + 2 A (F_a + B_a))` (FLOPs), and each device
        receives its auxiliary model, :math:`|w_a|` (bits).
        """
        interval = arguments["align_every"]
        share = 1.0 / interval if interval else 0.0
        place = work.place
        per_row = float(place.server_flops_forward + place.server_flops_backward)
        per_row += 2 * arguments["align_epochs"] * work.auxiliary_flops
        flops = share * work.num_devices * arguments["buffer_size"] * per_row
        return (
            *cls.local_phases(work, **arguments),
            server_phase("alignment", flops),
            Phase((Stage("auxiliary down", Where.DOWNLINK, share * work.auxiliary_bits),)),
            *cls.aggregation_phases(work, **arguments),
        )

    @classmethod
    def plan_note(cls, **arguments: Any) -> str:
        """Say what of a round with an alignment inside is not counted."""
        inside = arguments["align"] == IN_ROUND and arguments["align_every"]
        what = "the first batch's forward pass before an alignment"
        if inside and arguments["order"] == CLIENTS:
            what += " and that clients take turns there"
        notes = [super().plan_note(**arguments), f"{what} is not counted" if inside else ""]
        return "; ".join(filter(None, notes))

    def begin_run(self) -> None:
        """Forget an earlier run's auxiliary models and buffers."""
        super().begin_run()
        self.aligned: dict[str, AlignedAuxiliary] = {}

    # --- a round -------------------------------------------------------------------------

    def before_local_steps(self, round_: Round, names: list[str]) -> None:
        """Make new clients' models; align, unless that comes later."""
        self._check_buffer(round_.plan.batch_size)
        for name in names:
            if name not in self.aligned:
                self.aligned[name] = self._new()
        plan = round_.plan
        if plan.server_round == 1 and self.align_every and not self._fires(plan.num_rounds):
            logger.warning(
                "align_every is %d, but the run has %d rounds: auxiliary models are never aligned",
                self.align_every, plan.num_rounds,
            )  # fmt: skip
        if self.align == BEFORE_ROUND and self._is_due(round_):
            self._align(round_, names)

    def wants_peek(self, round_: Round) -> bool:
        """In the authors' order the server needs the round's first uploads before it aligns."""
        return self.align == IN_ROUND and self._is_due(round_)

    def after_peek(self, round_: Round, names: list[str]) -> None:
        """Align on buffers that have the round's first uploads."""
        self._align(round_, names)

    def auxiliary_of(self, client: str) -> AuxiliarySent:
        """Return the client's own auxiliary model."""
        own = self.aligned[client]
        return AuxiliarySent(own.version, own.module.state_dict())

    def emulated(self, client: str, smashed: Tensor, labels: Tensor) -> Tensor | None:
        """Return ĝ of an upload as the client has it."""
        return self.aligned[client].emulate(smashed, labels)

    def uploaded(self, client: str, smashed: Tensor, labels: Tensor) -> None:
        """Keep an upload in the client's buffer."""
        try:
            self.aligned[client].buffer.add(smashed, labels)
        except SegmentMismatchError as error:  # the others go on
            error.client = client
            raise

    # --- alignment -----------------------------------------------------------------------

    def _new(self) -> "AlignedAuxiliary":
        return AlignedAuxiliary(
            self.new_auxiliary(),
            self.auxiliary_optimizer,
            at_round(self.auxiliary_lr, 1),
            self.buffer_size,
            self.server.criterion,
        )

    def _is_due(self, round_: Round) -> bool:
        t = round_.plan.server_round - 1
        return bool(self.align_every) and t % self.align_every == 0

    def _fires(self, num_rounds: int) -> bool:
        return self.align == IN_ROUND or self.align_every < num_rounds

    def _align(self, round_: Round, names: list[str]) -> None:
        plan = round_.plan
        lr = at_round(self.auxiliary_lr, plan.server_round)
        for name in names:
            own = self.aligned[name]
            if not len(own.buffer):
                continue  # nothing has come from it yet: before the first round, nobody's has
            seed = derive_seed(plan.seed, "align", name, plan.server_round)
            started = time.perf_counter()
            own.optimizer.set_lr(lr)
            found = own.align(
                self.server,
                self.align_epochs,
                seed,
                batch_size=self.align_batch_size,
                guard=self.align_guard,
            )
            round_.record_alignment(len(own.buffer), self.align_epochs, started)
            round_.record_metrics(
                {
                    "cosine-before-alignment": found.cosine_before,
                    "cosine-after-alignment": found.cosine_after,
                    "alignment-diverged": float(found.diverged),
                }
            )
            if found.diverged:
                logger.warning(
                    "the alignment of client %r in round %d diverged (squared error %g, before "
                    "%g): its auxiliary model stays as it was; a smaller auxiliary_lr may help",
                    name, plan.server_round, found.error_after, found.error_before,
                )  # fmt: skip

    def _check_buffer(self, batch_size: int) -> None:
        if self.buffer_size < batch_size:
            raise ConfigError(
                f"buffer_size is {self.buffer_size}, smaller than a batch ({batch_size}): expected "
                "at least that"
            )

    # --- checkpoints ---------------------------------------------------------------------

    def state_dict(self) -> State:
        """Return all that a checkpoint needs, with auxiliary models and buffers."""
        aligned = {name: own.state_dict() for name, own in self.aligned.items()}
        return super().state_dict() | {"aligned": aligned}

    def load_state_dict(self, state: State) -> None:
        """Go on from a :meth:`state_dict`."""
        super().load_state_dict(state)
        for name, own in state["aligned"].items():
            self.aligned[name] = self._new()
            self.aligned[name].load_state_dict(own)


class UploadBuffer:
    """A client's latest uploads, first in, first out."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.smashed: Tensor | None = None
        self.labels: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of samples."""
        return 0 if self.smashed is None else len(self.smashed)

    def add(self, smashed: Tensor, labels: Tensor) -> None:
        """Take a batch; forget the oldest samples where there are too many.

        SegmentMismatchError if its rows have another shape than those before. MethodError if labels
        are several tensors.
        """
        if not isinstance(labels, Tensor):
            raise MethodError(
                "FSL-SAGE keeps labels that are one tensor, but these are "
                f"{shapes_of(labels)}; take CSE-FSL"
            )
        if self.smashed is not None and self.labels is not None:
            if self.smashed.shape[1:] != smashed.shape[1:]:
                raise SegmentMismatchError(
                    "FSL-SAGE aligns an auxiliary model on several of a client's uploads together, "
                    f"but rows of shape {tuple(smashed.shape[1:])} came after rows of shape "
                    f"{tuple(self.smashed.shape[1:])}: pad the data to one length, or take CSE-FSL"
                )
            smashed = torch.cat([self.smashed, smashed])
            labels = torch.cat([self.labels, labels])
        self.smashed, self.labels = smashed[-self.size :], labels[-self.size :]


@dataclass(frozen=True)
class AlignmentOutcome:
    """What an alignment came to."""

    cosine_before: float  # between the emulated and the true gradient of the buffer
    cosine_after: float
    error_before: float  # sum of squared errors between the two
    error_after: float
    # Whether the result was thrown away: an error or a weight that is NaN or infinite, or an error
    # larger than before. Never without a guard.
    diverged: bool


class AlignedAuxiliary:
    """The server's copy of one client's auxiliary model, changed by alignment alone.

    Its optimizer lives as long as the run.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Callable[..., Optimizer],
        lr: float,
        buffer_size: int,
        criterion: Criterion,
    ) -> None:
        self.criterion = criterion
        self.module = module
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.optimizer = UserOptimizer("auxiliary_optimizer", optimizer, named, lr)
        self.optimizer.warn("")
        self.buffer = UploadBuffer(buffer_size)
        self.version = 0

    def emulate(self, smashed: Tensor, labels: Tensor) -> Tensor:
        """Return ĝ of a batch; nothing changes."""
        with keeping_buffers(self.module):
            return emulated_gradient(self.module, smashed, labels, self.criterion)

    def align(
        self,
        segment: ServerSegment,
        epochs: int,
        seed: int,
        *,
        batch_size: int = 0,
        guard: bool = True,
    ) -> AlignmentOutcome:
        """Label the buffer with the server segment as it is now, and fit the model to that.

        The targets are the gradients of the mean loss over the whole buffer, and so is what they
        are compared with, also in mini-batches of ``batch_size`` samples. If it diverges the
        model and its optimizer are as before, unless there is no ``guard``.
        """
        smashed, labels = self.buffer.smashed, self.buffer.labels
        if smashed is None or labels is None:
            raise ValueError("an empty buffer can't be aligned on")
        with seeded(seed, segment.device):
            targets = true_gradient(segment, smashed, labels)
            kept = copy.deepcopy((self.module.state_dict(), self.optimizer.state()))
            before = self.emulate(smashed, labels)
            for _ in range(epochs):
                for rows in _mini_batches(len(labels), batch_size):
                    self._fit(smashed[rows], labels[rows], targets[rows], len(labels))
            after = self.emulate(smashed, labels)
        errors = [float((one - targets).pow(2).sum()) for one in (before, after)]
        tensors = [*self.module.parameters(), *self.module.buffers()]
        finite = all(bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point())
        diverged = guard and not (finite and errors[1] <= errors[0])
        if diverged:
            self.module.load_state_dict(kept[0])
            self.optimizer.load(kept[1])
            after = before
        else:
            self.version += 1
        return AlignmentOutcome(
            cosine_before=cosine(before, targets),
            cosine_after=cosine(after, targets),
            error_before=errors[0],
            error_after=errors[1],
            diverged=diverged,
        )

    def state_dict(self) -> State:
        """Return model, optimizer and buffer."""
        return {
            "module": dict(self.module.state_dict()),
            "optimizer": self.optimizer.state(),
            "version": self.version,
            "smashed-data": self.buffer.smashed,
            "labels": self.buffer.labels,
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from a :meth:`state_dict`."""
        self.module.load_state_dict(state["module"])
        self.optimizer.load(state["optimizer"])
        self.version = state["version"]
        smashed, labels = state["smashed-data"], state["labels"]
        if smashed is not None:
            device = next(self.module.parameters()).device
            self.buffer.add(smashed.to(device), labels.to(device))

    def _fit(self, smashed: Tensor, labels: Tensor, targets: Tensor, total: int) -> None:
        """Do one optimizer step on Σ ‖ĝ − target‖², differentiating ĝ itself.

        A mini-batch's ĝ is that of its own mean; targets are those of the mean over ``total`` rows.
        """
        gradient = emulated_gradient(
            self.module, smashed, labels, self.criterion, create_graph=True
        )
        if len(labels) < total:
            gradient = gradient * (len(labels) / total)
        error = (gradient - targets).pow(2).sum()
        self.optimizer.zero_grad()
        error.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def _mini_batches(total: int, size: int) -> list[Any]:
    """Return an epoch's rows by mini-batch, in a new order; all as they lie where one is enough."""
    if not 0 < size < total:
        return [slice(None)]
    return list(torch.split(torch.randperm(total), size))


def true_gradient(segment: ServerSegment, smashed: Tensor, labels: Tensor) -> Tensor:
    """Return the cut-layer gradient of the mean loss, in training mode; nothing changes."""
    leaf = smashed.detach().requires_grad_(True)
    segment.train()
    with keeping_buffers(segment.module):
        loss, _ = segment.criterion(segment.forward(leaf.clone()), labels)
        (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient
