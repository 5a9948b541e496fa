"""FSL-SAGE."""

import time
from collections.abc import Callable
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor
from torch.optim import Optimizer

from flsplit.errors import ConfigError
from flsplit.log import logger
from flsplit.message.arrays import from_record, to_array
from flsplit.message.optimizer_state import get_state, set_state
from flsplit.seeds import derive_seed
from flsplit.server.alignment import AlignedAuxiliary
from flsplit.server.arguments import number, one_of, whole
from flsplit.strategies.checkpoint import get_optimizer_state, put_optimizer_state
from flsplit.strategies.decoupled import DecoupledStrategy, Sent
from flsplit.strategies.round import Round
from flsplit.wireless.phases import Phase, Stage, Where, Work, server_phase

BEFORE_ROUND, IN_ROUND = "before_round", "in_round"

_MODEL, _OPTIMIZER, _BUFFER = "aligned:", "aligned-optimizer:", "aligned-buffer:"
_NUMBERS = "aligned-version:"


class FSLSAGE(DecoupledStrategy):
    """FSL-SAGE: an auxiliary model per client, aligned with the server's gradients.

    The server keeps each client's latest uploads. Every ``align_every`` rounds it computes their
    true cut-layer gradients with its segment as it is then, fits the client's auxiliary model's
    gradients to them, and sends the model down. Nothing else changes auxiliary models, and they
    are never averaged.

    Parameters
    ----------
    align_every : int
        l: rounds between two alignments; 0 for none at all.
    align_epochs : int
        A: optimizer steps on the whole buffer in an alignment.
    buffer_size : int
        Samples that a client's buffer holds.
    align : {'before_round', 'in_round'}
        Whether alignment stands before a round, on the uploads of earlier rounds, or in it, after
        its first uploads, which takes a second exchange.
    auxiliary_optimizer : callable
        Called as ``auxiliary_optimizer(parameters, lr=…)``; lives as long as the run.
    auxiliary_lr : float
        Its learning rate.
    upload_every, auxiliary, overlap
        See :class:`~flsplit.strategies.decoupled.DecoupledStrategy`.
    **options
        See :class:`~flsplit.strategies.options.SplitOptions`.

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
        buffer_size: int = 1000,
        align: str = BEFORE_ROUND,
        auxiliary_optimizer: Callable[..., Optimizer] = torch.optim.Adam,
        auxiliary_lr: float = 1e-3,
        **options: Any,
    ) -> None:
        self.align_every = whole("align_every", align_every, 0)
        self.align_epochs = whole("align_epochs", align_epochs, 1)
        self.buffer_size = whole("buffer_size", buffer_size, 1)
        self.align = one_of("align", align, (BEFORE_ROUND, IN_ROUND))
        self.auxiliary_lr = number("auxiliary_lr", auxiliary_lr, 0.0)
        if not callable(auxiliary_optimizer):
            raise ConfigError(
                f"auxiliary_optimizer is {auxiliary_optimizer!r}, expected something to call"
            )
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

    def auxiliary_of(self, client: str) -> Sent:
        """Return the client's own auxiliary model."""
        own = self.aligned[client]
        return Sent(own.version, own.module.state_dict())

    def emulated(self, client: str, smashed: Tensor, labels: Tensor) -> Tensor | None:
        """Return ĝ of an upload as the client has it."""
        return self.aligned[client].emulate(smashed, labels)

    def uploaded(self, client: str, smashed: Tensor, labels: Tensor) -> None:
        """Keep an upload in the client's buffer."""
        self.aligned[client].buffer.add(smashed, labels)

    # --- alignment -----------------------------------------------------------------------

    def _new(self) -> AlignedAuxiliary:
        return AlignedAuxiliary(
            self.new_auxiliary(), self.auxiliary_optimizer, self.auxiliary_lr, self.buffer_size
        )

    def _is_due(self, round_: Round) -> bool:
        t = round_.plan.server_round - 1
        return bool(self.align_every) and t % self.align_every == 0

    def _fires(self, num_rounds: int) -> bool:
        return self.align == IN_ROUND or self.align_every < num_rounds

    def _align(self, round_: Round, names: list[str]) -> None:
        plan = round_.plan
        for name in names:
            own = self.aligned[name]
            if not len(own.buffer):
                continue  # nothing has come from it yet: before the first round, nobody's has
            seed = derive_seed(plan.seed, "align", name, plan.server_round)
            started = time.perf_counter()
            found = own.align(self.server, self.align_epochs, seed)
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

    def state_records(self) -> RecordDict:
        """Return all that a checkpoint needs, with auxiliary models and buffers."""
        records = super().state_records()
        for name, own in self.aligned.items():
            state = own.module.state_dict()
            records[_MODEL + name] = ArrayRecord({k: to_array(v) for k, v in state.items()})
            put_optimizer_state(records, _OPTIMIZER + name, get_state(own.optimizer))
            records[_NUMBERS + name] = ConfigRecord({"version": own.version})
            buffer = ArrayRecord()
            if own.buffer.smashed is not None and own.buffer.labels is not None:
                buffer["smashed-data"] = to_array(own.buffer.smashed)
                buffer["labels"] = to_array(own.buffer.labels)
            records[_BUFFER + name] = buffer
        return records

    def load_state_records(self, records: RecordDict, segment_version: int) -> None:
        """Go on from a checkpoint's records."""
        super().load_state_records(records, segment_version)
        for key in list(records.array_records):
            if not key.startswith(_MODEL):
                continue
            name = key.removeprefix(_MODEL)
            own = self.aligned[name] = self._new()
            own.module.load_state_dict(from_record(records.array_records[key], field=key))
            set_state(own.optimizer, get_optimizer_state(records, _OPTIMIZER + name))
            own.version = int(records.config_records[_NUMBERS + name]["version"])  # type: ignore[arg-type]
            buffer = from_record(records.array_records[_BUFFER + name], field=_BUFFER + name)
            if buffer:
                smashed, labels = buffer["smashed-data"], buffer["labels"]
                own.buffer.add(smashed.to(self.device), labels.to(self.device))
