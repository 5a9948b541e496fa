"""The base class of all split strategies: a Flower strategy whose rounds have many exchanges."""

from collections.abc import Callable, Iterable, Mapping
from typing import NoReturn

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from flsplit.errors import ConfigError
from flsplit.message.arrays import to_record
from flsplit.run.callbacks import Stopping
from flsplit.run.execute import EvaluateFn, Run
from flsplit.run.method import SplitMethod
from flsplit.run.options import of_kind
from flsplit.run.own_arguments import own_argument_names
from flsplit.run.report import log_start, log_summary
from flsplit.run.result import SplitResult


class SplitStrategy(SplitMethod, Strategy):
    """Base class of split strategies.

    What a method says of itself is in :class:`~flsplit.run.method.SplitMethod`; most derive from
    :class:`~flsplit.run.parallel.ParallelStrategy` and only say what the server does in one step.
    """

    # --- Flower's interface --------------------------------------------------------------

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | Mapping[str, Tensor],
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
        should_stop: Callable[..., bool] | None = None,
    ) -> SplitResult:
        """Train and evaluate for ``num_rounds`` rounds.

        Parameters
        ----------
        grid : Grid
            The carrier: Flower's own, or a :class:`flsplit.LocalGrid`.
        initial_arrays : ArrayRecord, or mapping of str to torch.Tensor
            The state dict of the whole model, in Flower's ``ArrayRecord`` or as it is: that can't
            hold bfloat16.
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

        should_stop : callable, optional
            Asked after every round whether the run ends there; gets as many of (round, result) as
            it takes. The option ``callbacks`` can do more.

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
        of_kind("initial_arrays", initial_arrays, ArrayRecord | dict)
        if not isinstance(initial_arrays, ArrayRecord):
            for name, tensor in initial_arrays.items():
                if str(name).endswith("_extra_state") and not isinstance(tensor, Tensor):
                    raise ConfigError(
                        f"initial_arrays[{name!r}], from a module's get_extra_state(), is of type "
                        f"{type(tensor).__name__}, expected a tensor: segments travel as tensors, "
                        "so let it return one, or keep its parts in buffers"
                    )
                of_kind(f"initial_arrays[{name!r}]", tensor, Tensor)
            initial_arrays = to_record(initial_arrays)
        of_kind("num_rounds", num_rounds, int)
        if num_rounds < 1:
            raise ConfigError(f"num_rounds is {num_rounds}, expected at least 1")
        log_start(self, num_rounds, initial_arrays)
        self.summary()
        self.begin(initial_arrays)
        run = Run(self, num_rounds, timeout, train_config, evaluate_config, evaluate_fn)
        if should_stop:
            run.callbacks.append(Stopping(should_stop, run.result))
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
