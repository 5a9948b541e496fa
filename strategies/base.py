"""The base class of all split strategies: a Flower strategy whose rounds have many exchanges."""

import copy
import inspect
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, NoReturn

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import Tensor

from flsplit.client.spec import pick_device
from flsplit.client_parts import ClientPart
from flsplit.cut import split
from flsplit.errors import ConfigError, FlsplitError, NonFiniteError, located
from flsplit.finite import all_finite
from flsplit.message.arrays import check_like, from_record, to_record
from flsplit.message.request import Backward, SegmentArrays
from flsplit.message.steps import FinishReply
from flsplit.seeds import seeded
from flsplit.server.aggregate import SegmentAggregator, Upload
from flsplit.server.passes import PerClient, Pooled, Replay, ServerPass
from flsplit.server.rules import GradientRule, check_rules
from flsplit.server.segment import Gradients, ServerSegment
from flsplit.server.step import ClientBatch, StepResult, loss_weights
from flsplit.strategies.checkpoint import (
    get_client_segment,
    get_flower_strategy,
    get_rules,
    get_server_segment,
    put_client_segment,
    put_flower_strategy,
    put_rules,
    put_server_segment,
)
from flsplit.strategies.options import (
    SplitOptions,
    at_round,
    of_kind,
    option_names,
    refuse_unknown,
)
from flsplit.strategies.report import log_start, log_summary
from flsplit.strategies.result import SplitResult
from flsplit.strategies.round import Round
from flsplit.strategies.run import EvaluateFn, Run
from flsplit.wireless.phases import Method, SaysPhases


class SplitStrategy(SaysPhases, Strategy):
    """Base class of split strategies.

    A subclass says how a round is trained (:meth:`train_round`); most derive from
    :class:`~flsplit.strategies.parallel.ParallelStrategy` and only say what the server does
    with the smashed data of one step.

    Parameters
    ----------
    **options
        The fields of :class:`~flsplit.strategies.options.SplitOptions`; ``model`` and ``cut``
        are required.

    Attributes
    ----------
    aggregates : bool
        Whether client segments are aggregated even if no ``client_strategy`` is given; then by
        FedAvg.
    hands_on : bool
        Whether all clients work on one segment in turn, so that a whole model comes out.
    one_by_one : bool
        Whether every server step is one client's, so that nothing can be shared or compared.

    Raises
    ------
    ConfigError
        If an option doesn't exist, has a value that can't be used, or contradicts another.
    flsplit.cut.CutError
        If the model can't be cut there.
    """

    hands_on: ClassVar[bool] = False
    one_by_one: ClassVar[bool] = False
    client_parts: Sequence[ClientPart] = ()
    """What the method has its clients do beside the plain step; the options' parts come after."""

    server: ServerSegment
    client_segment: SegmentArrays

    def __init__(self, **options: Any) -> None:
        refuse_unknown(type(self).__name__, options, argument_names(type(self)))
        self.options = SplitOptions(**options)
        self.parts = split(self.options.model, self.options.cut)
        self.device = pick_device(self.options.device)
        self.server_pass: ServerPass = self.options.server_pass or (
            Pooled() if self.options.server_batchnorm == "pooled" else PerClient()
        )
        self.rules = list(self.options.rules)
        check_rules(self.server_pass, self.rules, self.options.reduction)
        self.server_pass.check_loss(self.options.loss)
        self._check_across_clients()
        self.aggregator = self._make_aggregator()

    # --- what a subclass says ------------------------------------------------------------

    @abstractmethod
    def train_round(self, round_: Round) -> dict[str, FinishReply]:
        """Train one round and return the clients' replies at its end."""

    def begin_run(self) -> None:
        """Prepare what the method remembers beside the server segment."""

    def end_round(self, round_: Round, finished: Mapping[str, FinishReply]) -> None:
        """Aggregate what the clients handed over at the end of a round."""
        if self.aggregator:
            uploads = {
                name: Upload(self.parts_of(reply), reply.num_examples)
                for name, reply in finished.items()
            }
            aggregated = self.aggregator.aggregate(
                round_.plan.server_round, uploads, self.client_segment.tensors
            )
            self.replace_client_segment(aggregated)

    def exchanges_per_round(self, steps: int, participants: int) -> int:
        """Return how many exchanges a round takes whose clients have up to ``steps`` steps."""
        return steps + 1

    # --- what the planner and a fleet's clock ask ----------------------------------------

    def planned(self, name: str = "", given: Mapping[str, Any] | None = None) -> Method:
        """Return the method as the planner wants it: the class, and what it was made with.

        An argument of the constructor has the value of the attribute of that name, as far as there
        is one, and otherwise its default.

        Parameters
        ----------
        name : str
            The strategy's name in a run's configuration. Default: its class's.
        given : mapping of str to object, optional
            Its arguments in a run's configuration, to be shown with a plan.
        """
        kind, options = type(self), self.options
        arguments = {one.name: getattr(options, one.name) for one in fields(options)}
        for parameter in own_parameters(kind):
            kept = vars(self).get(parameter.name, parameter.default)
            arguments.setdefault(parameter.name, kept)
        del arguments["model"], arguments["cut"]  # a plan has a profile and a place instead
        return Method(name or kind.__name__, kind, arguments, given or {})

    # --- Flower's interface --------------------------------------------------------------

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> SplitResult:
        """Train and evaluate for ``num_rounds`` rounds.

        Parameters
        ----------
        grid : Grid
            The carrier: Flower's own, or a :class:`flsplit.LocalGrid`.
        initial_arrays : ArrayRecord
            The state dict of the whole model.
        num_rounds : int (default: 3)
            Number of rounds.
        timeout : float (default: 3600)
            Seconds to wait for the clients' answers to one exchange, and for nodes to connect.
        train_config : ConfigRecord, optional
            Overrides ``lr`` (the client's), ``batch-size``, ``local-epochs``, ``local-steps`` and
            ``drop-last`` of the options.
        evaluate_config : ConfigRecord, optional
            Overrides ``batch-size`` of federated evaluation.
        evaluate_fn : callable, optional
            Central evaluation: takes the round and the whole model's arrays. Only for methods
            that give back a whole model.

        Returns
        -------
        SplitResult
            Flower's ``Result`` with the history. ``arrays`` is a whole model's state dict where
            client segments are aggregated or handed on, else the server segment's.

        Raises
        ------
        ConfigError
            If an argument can't be used, or ``evaluate_fn`` is given and the method keeps client
            segments at home.
        NotEnoughClientsError
            If fewer than ``min_available_nodes`` clients are there, or left in a round.
        NonFiniteError, DataError, SegmentMismatchError
            If a step can't be computed; the server's weights stay as they were.
        """
        if evaluate_fn and not self.gives_whole_model:
            raise ConfigError(
                f"evaluate_fn needs a whole model, but {type(self).__name__} keeps a client "
                "segment of its own at every client; pass client_strategy=FedAvg() to aggregate "
                "them, or use federated evaluation"
            )
        of_kind("grid", grid, Grid)
        of_kind("initial_arrays", initial_arrays, ArrayRecord)
        of_kind("num_rounds", num_rounds, int)
        if num_rounds < 1:
            raise ConfigError(f"num_rounds is {num_rounds}, expected at least 1")
        log_start(self, num_rounds, initial_arrays)
        self._begin(initial_arrays)
        run = Run(self, num_rounds, timeout, train_config, evaluate_config, evaluate_fn)
        return run.execute(grid)

    def summary(self) -> None:
        """Log the strategy's arguments as a tree."""
        log_summary(self, own_argument_names(type(self)))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Not called: see :meth:`train_round`."""
        self._refuse("configure_train")

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Not called: see :meth:`end_round`."""
        self._refuse("aggregate_train")

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Not called: federated evaluation has an exchange per test batch."""
        self._refuse("configure_evaluate")

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Not called: federated evaluation has an exchange per test batch."""
        self._refuse("aggregate_evaluate")

    def _refuse(self, method: str) -> NoReturn:
        raise ConfigError(
            f"{type(self).__name__}.{method} belongs to rounds of one exchange; a split round has "
            "one per mini-batch. To wrap or replace how client segments are aggregated, pass any "
            "Flower strategy as client_strategy"
        )

    # --- state of a run ------------------------------------------------------------------

    @property
    def gives_whole_model(self) -> bool:
        """Whether ``Result.arrays`` is a whole model's state dict."""
        return self.aggregator is not None or self.hands_on

    def arrays(self) -> ArrayRecord:
        """Return the whole model's state dict, or the server segment's."""
        server = self.server.arrays()
        if not self.gives_whole_model:
            return to_record(server)
        return to_record(self.parts.join(self.client_segment.tensors, server))

    def replace_client_segment(self, tensors: dict[str, Tensor]) -> None:
        """Make ``tensors`` the server's version of the client segment, which clients then get."""
        self.client_segment = SegmentArrays(self.client_segment.version + 1, tensors)

    def parts_of(self, reply: FinishReply) -> dict[str, Tensor]:
        """Return the client segment in a reply at the end of a round."""
        if reply.segment is None:
            raise FlsplitError(f"client {reply.client!r} handed over no segment")
        return reply.segment

    def new_server_segment(self, server_round: int = 1) -> ServerSegment:
        """Return a copy of the server segment as it is in the model, with a new optimizer."""
        options = self.options
        segment = ServerSegment(
            copy.deepcopy(self.parts.server),
            loss=options.loss,
            optimizer=options.server_optimizer,
            lr=at_round(options.server_lr, server_round),
            scheduler=options.server_scheduler,
            device=self.device,
        )
        for _ in range(1, server_round):
            segment.end_round()
        return segment

    def server_segments(self) -> list[ServerSegment]:
        """Return all server segments that learn; their learning rates go together."""
        return [self.server]

    def _begin(self, initial_arrays: ArrayRecord) -> None:
        tensors = from_record(initial_arrays, field="initial_arrays")
        client, server = self.parts.divide(tensors)
        like = self.parts.client.state_dict()
        client = check_like(client, like, what="initial_arrays, client segment")
        self.client_segment = SegmentArrays(0, client)
        self.server = self.new_server_segment()
        with located("initial_arrays"):
            self.server.load_arrays(server)
        for rule in self.rules:
            rule.begin_run()
        self.begin_run()

    # --- a round -------------------------------------------------------------------------

    def least_clients(self) -> int:
        """Return how many clients a round needs; a client strategy would wait for them for ever."""
        least = max(self.options.min_available_nodes, self.options.min_train_nodes)
        if self.aggregator:
            least = max(least, self.aggregator.least_clients)
        return least

    def aggregated_tensors(self) -> dict[str, Tensor]:
        """Return what the client strategy aggregates, as it is before the round."""
        return self.client_segment.tensors

    def segment_step(
        self,
        segment: ServerSegment,
        round_: Round,
        step: int,
        steps: int,
        batches: list[ClientBatch],
    ) -> StepResult:
        """Do one server step: pass, gradient rules, optimizer.

        Raises
        ------
        NonFiniteError, DataError, SegmentMismatchError
            If the loss or a gradient is NaN or infinite, or the step can't be computed; the
            segment is as it was before.
        """
        started = time.perf_counter()
        context = round_.context(step, batches, self.options.shares, steps)
        batches = [batch.to(segment) for batch in batches]
        segment.module.train()
        where = f"round {context.round}, step {step}"
        with segment.undoing_buffers():
            with located(where), seeded(round_.server_seed(context), self.device):
                weights = loss_weights(context.shares, self.options.reduction)
                result = self.server_pass(segment, batches, weights)
                for rule in self.rules:
                    result = rule(context, result)
            check_finite(result, where, lambda: culprits(segment, batches))
        segment.step(result.server_gradients, result.server_lr_factor)
        replays = isinstance(self.server_pass, Replay) and self.server_pass.phi > 0
        round_.record_step(step, batches, result, started, replays=replays)
        return result

    # --- checkpoints ---------------------------------------------------------------------

    def auxiliary_flops(self) -> int:
        """Return the FLOPs of a row's forward pass through an auxiliary model, if there is one."""
        return 0

    def identity(self) -> dict[str, Any]:
        """Return what a run must have in common with the one that it resumes."""
        return {
            "strategy": type(self).__name__,
            "cut": self.options.cut,
            "seed": self.options.seed,
            "server_optimizer": type(self.server.optimizer).__name__,
            "rules": [type(rule).__name__ for rule in self.rules],
            "client_strategy": type(self.aggregator.strategy).__name__ if self.aggregator else "",
        }

    def state_records(self) -> RecordDict:
        """Return all that a checkpoint of the method needs."""
        records = RecordDict()
        put_client_segment(records, self.client_segment)
        put_server_segment(records, "server", self.server)
        put_rules(records, [rule.state_dict() for rule in self.rules])
        if self.aggregator:
            put_flower_strategy(records, "client-strategy", self.aggregator.strategy)
        return records

    def load_state_records(self, records: RecordDict, segment_version: int) -> None:
        """Go on from a checkpoint's records."""
        self.client_segment = get_client_segment(records, segment_version)
        get_server_segment(records, "server", self.server)
        for rule, state in zip(self.rules, get_rules(records), strict=True):
            rule.load_state_dict(state)
        if self.aggregator:
            get_flower_strategy(records, "client-strategy", self.aggregator.strategy)

    # --- construction --------------------------------------------------------------------

    def _check_across_clients(self) -> None:
        parts: list[ServerPass | GradientRule] = [self.server_pass, *self.rules]
        for one in parts:
            if self.one_by_one and one.across_clients:
                raise ConfigError(
                    f"{type(one).__name__} works across the clients of a step, but in "
                    f"{type(self).__name__} every server step is one client's; use it with PSL"
                )

    def _make_aggregator(self) -> SegmentAggregator | None:
        strategy = self.options.client_strategy
        if strategy is None and not self.aggregates:
            return None
        return SegmentAggregator(strategy or self._default_strategy(), self.buffer_names())

    def _default_strategy(self) -> FedAvg:
        options = self.options
        return FedAvg(
            fraction_train=options.fraction_train,
            min_train_nodes=options.min_train_nodes,
            min_available_nodes=options.min_available_nodes,
            weighted_by_key=options.weighted_by_key,
        )

    def buffer_names(self) -> set[str]:
        """Return the names of the whole model's buffers."""
        return {name for name, _ in self.options.model.named_buffers()}


def argument_names(cls: type[SplitStrategy]) -> list[str]:
    """Return the arguments that a strategy's constructor takes, its own ones first."""
    return own_argument_names(cls) + option_names()


def own_argument_names(cls: type[SplitStrategy]) -> list[str]:
    """Return the arguments that a strategy takes beside the options of all."""
    return [parameter.name for parameter in own_parameters(cls)]


def own_parameters(cls: type[SplitStrategy]) -> list[inspect.Parameter]:
    """Return the parameters that a strategy's constructor has beside the options of all."""
    own: list[inspect.Parameter] = []
    for one in cls.__mro__:
        if "__init__" in vars(one) and issubclass(one, SplitStrategy):
            parameters = list(inspect.signature(one.__init__).parameters.values())[1:]
            own += [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return own


def backward_requests(
    result: StepResult, step: int, batches: list[ClientBatch]
) -> dict[str, Backward]:
    """Return what each client of a step is told for its backward pass."""
    return {
        batch.client: Backward(
            step,
            None if batch.client in result.skipped else result.cut_gradients[batch.client],
            result.shared_rows.get(batch.client, 0),
            batch.client in result.repeated,
        )
        for batch in batches
    }


def culprits(segment: ServerSegment, batches: list[ClientBatch]) -> list[str]:
    """Return whose batches alone give gradients that are NaN or infinite; all if none does."""
    found = []
    for batch in batches:
        try:
            with segment.keeping_buffers():
                own = Pooled()(segment, [batch], {batch.client: 1.0})
        except FlsplitError:  # BatchNorm can't train on one row
            continue
        if not _all_finite(own.server_gradients):
            found.append(batch.client)
    return found or [batch.client for batch in batches]


def check_finite(result: StepResult, where: str, culprits: Callable[[], list[str]]) -> None:
    """Raise NonFiniteError if a loss or gradient is NaN or infinite, naming client and step."""
    for client, loss in result.losses.items():
        gradient = result.cut_gradients[client]
        for what, finite in (
            ("loss", loss - loss == 0.0),
            ("cut-layer gradient", all_finite(gradient)),
        ):
            if not finite:
                raise NonFiniteError(
                    f"{what} of client {client!r} is NaN or infinite ({where}); a smaller learning "
                    "rate may help. The server's weights are those of the step before"
                )
    if not _all_finite(result.server_gradients):
        raise NonFiniteError(
            f"a gradient of the server segment is NaN or infinite ({where}, clients "
            f"{', '.join(map(repr, culprits()))}); the server's weights are those of the step "
            "before"
        )


def _all_finite(gradients: Gradients) -> bool:
    norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
    return bool(torch.isfinite(norm))
