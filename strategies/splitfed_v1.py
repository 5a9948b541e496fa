"""SplitFed V1."""

from collections.abc import Mapping
from typing import Any

from flwr.app import RecordDict
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from flsplit.errors import ConfigError
from flsplit.message.request import Backward
from flsplit.message.steps import FinishReply
from flsplit.seeds import derive_seed
from flsplit.server.aggregate import SegmentAggregator, Upload
from flsplit.server.segment import ServerSegment
from flsplit.server.step import ClientBatch
from flsplit.strategies.base import backward_requests
from flsplit.strategies.checkpoint import (
    get_flower_strategy,
    get_server_segment,
    put_flower_strategy,
    put_server_segment,
)
from flsplit.strategies.options import of_kind
from flsplit.strategies.parallel import ParallelStrategy
from flsplit.strategies.round import Round

_COPY = "server-copy:"


class SplitFedV1(ParallelStrategy):
    """SplitFed V1: a copy of the server segment for each client, all averaged every round.

    With the same batches and optimizers it computes what FedAvg computes on the unsplit model.
    FSL-SAGE's authors' code calls it SplitFed-MS. Each copy's optimizer lives as long as the
    run; the memory is one server segment (with optimizer) per client.

    Parameters
    ----------
    server_strategy : flwr.serverapp.strategy.Strategy, optional
        Aggregates the server copies on their own. Default: the client strategy aggregates the
        joined models.
    **options
        See :class:`~flsplit.strategies.options.SplitOptions`.

    References
    ----------
    .. [1] Thapa et al., SplitFed: When Federated Learning Meets Split Learning,
       https://arxiv.org/abs/2004.12088
    """

    aggregates = True
    one_by_one = True

    def __init__(self, *, server_strategy: Strategy | None = None, **options: Any) -> None:
        of_kind("server_strategy", server_strategy, Strategy | None)
        self.server_strategy = server_strategy
        super().__init__(**options)
        self.server_aggregator = (
            SegmentAggregator(server_strategy, self.buffer_names()) if server_strategy else None
        )

    def begin_run(self) -> None:
        """Forget copies of an earlier run."""
        self.copies: dict[str, ServerSegment] = {}

    def server_segments(self) -> list[ServerSegment]:
        """Return the clients' copies; the averaged segment itself isn't stepped."""
        return list(self.copies.values())

    def train_round(self, round_: Round) -> dict[str, FinishReply]:
        """Give every participant a copy of the averaged server segment, and train."""
        for name in round_.participants:
            if name not in self.copies:
                self.copies[name] = self.new_server_segment(round_.plan.server_round)
            self.copies[name].load_arrays(self.server.arrays())
        if self.server_aggregator:
            self._configure_server_strategy(round_)
        return super().train_round(round_)

    def server_step(
        self, round_: Round, step: int, steps: int, batches: list[ClientBatch]
    ) -> dict[str, Backward]:
        """Step each client's copy with that client's batch."""
        requests: dict[str, Backward] = {}
        for batch in batches:
            result = self.segment_step(self.copies[batch.client], round_, step, steps, [batch])
            requests |= backward_requests(result, step, [batch])
        return requests

    def end_round(self, round_: Round, finished: Mapping[str, FinishReply]) -> None:
        """Aggregate the joined models, or client segments and server copies apart."""
        if self.server_aggregator:
            super().end_round(round_, finished)
            self.server.load_arrays(self._aggregate_copies(round_, finished))
            return
        if self.aggregator is None:
            raise AssertionError("SplitFedV1 always has an aggregator")
        joined = {
            name: Upload(
                self.parts.join(self.parts_of(reply), self.copies[name].arrays()),
                reply.num_examples,
            )
            for name, reply in finished.items()
        }
        whole = self.aggregator.aggregate(
            round_.plan.server_round, joined, self.aggregated_tensors()
        )
        client, server = self.parts.divide(whole)
        self.replace_client_segment(client)
        self.server.load_arrays(server)

    def state_records(self) -> RecordDict:
        """Return all that a checkpoint needs, with the clients' copies."""
        records = super().state_records()
        for name, copy in self.copies.items():
            put_server_segment(records, f"{_COPY}{name}", copy)
        if self.server_aggregator:
            put_flower_strategy(records, "server-strategy", self.server_aggregator.strategy)
        return records

    def load_state_records(self, records: RecordDict, segment_version: int) -> None:
        """Go on from a checkpoint's records."""
        super().load_state_records(records, segment_version)
        for key in list(records.array_records):
            if key.startswith(_COPY) and not key.endswith(".optimizer"):
                copy = self.copies[key.removeprefix(_COPY)] = self.new_server_segment()
                get_server_segment(records, key, copy)
        if self.server_aggregator:
            get_flower_strategy(records, "server-strategy", self.server_aggregator.strategy)

    def aggregated_tensors(self) -> dict[str, Tensor]:
        """Return the joined model, or the client segment where copies are aggregated apart."""
        if self.server_aggregator:
            return super().aggregated_tensors()
        return self.parts.join(self.client_segment.tensors, self.server.arrays())

    def _aggregate_copies(
        self, round_: Round, finished: Mapping[str, FinishReply]
    ) -> dict[str, Tensor]:
        if self.server_aggregator is None:
            raise AssertionError("called only with a server_strategy")
        uploads = {
            name: Upload(self.copies[name].arrays(), reply.num_examples)
            for name, reply in finished.items()
        }
        return self.server_aggregator.aggregate(
            round_.plan.server_round, uploads, self.server.arrays()
        )

    def _configure_server_strategy(self, round_: Round) -> None:
        if self.server_aggregator is None:
            raise AssertionError("called only with a server_strategy")
        server_round = round_.plan.server_round
        chosen = self.server_aggregator.configure(
            server_round,
            self.server.arrays(),
            lambda: round_.participants,
            derive_seed(self.options.seed, "server-copies", server_round),
        )
        if chosen != round_.participants:
            raise ConfigError(
                f"server_strategy chose {len(chosen)} of the {len(round_.participants)} clients "
                "that train; set fraction_train=1.0 there and let client_strategy choose"
            )
