"""SplitFed V1."""

from collections.abc import Mapping
from typing import Any

from flwr.serverapp.strategy import Strategy
from torch import Tensor

from flsplit.cut import Split
from flsplit.errors import ConfigError
from flsplit.message.request import SegmentArrays
from flsplit.message.steps import FinishReply
from flsplit.run import ParallelStrategy, Round, Step
from flsplit.run.options import of_kind
from flsplit.seeds import derive_seed
from flsplit.server.aggregate import CLIENT_SEGMENTS, COPIES, JOINED, SegmentAggregator
from flsplit.server.segment import ServerSegment
from flsplit.storage import State


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
        See :class:`~flsplit.run.SplitOptions`.

    References
    ----------
    .. [1] Thapa et al., SplitFed: When Federated Learning Meets Split Learning,
       https://arxiv.org/abs/2004.12088
    """

    aggregates = True
    pools = False
    keeps_labels = True
    several_cuts = True  # whole models are averaged, wherever each is cut

    def __init__(self, *, server_strategy: Strategy | None = None, **options: Any) -> None:
        of_kind("server_strategy", server_strategy, Strategy | None)
        self.server_strategy = server_strategy
        super().__init__(**options)
        if server_strategy and self.options.several_cuts:
            raise ConfigError(
                f"server_strategy is {type(server_strategy).__name__}, but clients are cut at "
                "different places: their copies of the server segment have different layers, which "
                "only an average over whole models brings together"
            )
        self.server_aggregator = (
            self.aggregator_of(server_strategy, COPIES) if server_strategy else None
        )

    def _make_aggregator(self) -> SegmentAggregator:
        strategy = self.options.client_strategy or self._default_strategy()
        return self.aggregator_of(strategy, CLIENT_SEGMENTS if self.server_strategy else JOINED)

    def given_aggregators(self) -> list[SegmentAggregator]:
        """Return the server copies', too, where they are aggregated on their own."""
        own = [self.server_aggregator] if self.server_aggregator else []
        return super().given_aggregators() + own

    def _make_parts(self) -> Split:
        return self.parts_at(self.options.default_cut)

    def _make_server(self) -> ServerSegment:
        return self.new_server_segment()

    def begin_run(self) -> None:
        """Forget copies of an earlier run."""
        self.copies: dict[str, ServerSegment] = {}
        self._at_cut: dict[str, tuple[SegmentArrays, ServerSegment]] = {}

    def segment_for(self, client: str) -> SegmentArrays:
        """Return the averaged model's first layers, as many as this client has."""
        return self._at(client)[0] if self.options.several_cuts else self.client_segment

    def server_for(self, client: str) -> ServerSegment:
        """Return the averaged model's other layers, in a copy of their own."""
        return self._at(client)[1] if self.options.several_cuts else self.server

    def _at(self, client: str) -> tuple[SegmentArrays, ServerSegment]:
        parts, version = self.parts_for(client), self.client_segment.version
        known = self._at_cut.get(parts.cut)
        if known is None or known[0].version != version:
            whole = self.parts.join(self.client_segment.tensors, self.server.arrays())
            tensors, arrays = parts.divide(whole)
            server = known[1] if known else self.new_server_segment(parts=parts)
            server.load_arrays(arrays)
            segment = self._segment_of(version, tensors, parts)
            known = self._at_cut[parts.cut] = segment, server
        return known

    def server_segments(self) -> list[ServerSegment]:
        """Return the clients' copies; the averaged segment itself isn't stepped."""
        return list(self.copies.values())

    def begin_round(self, round_: Round) -> None:
        """Give every participant a copy of the averaged server segment."""
        for name in round_.participants:
            if name not in self.copies:
                parts = self.parts_for(name)
                self.copies[name] = self.new_server_segment(round_.plan.server_round, parts)
            self.copies[name].load_arrays(self.server_for(name).arrays())
        if self.server_aggregator:
            self._configure_server_strategy(self.server_aggregator, round_)

    def step(self, step: Step) -> None:
        """Step each client's copy with that client's batch."""
        for batch, found in step.one_by_one(self.copies):
            step.update(found, segment=self.copies[batch.client])
            step.reply(found.cut_gradients)

    def end_round(self, round_: Round, finished: Mapping[str, FinishReply]) -> None:
        """Aggregate the joined models, or client segments and server copies apart."""
        if self.server_aggregator:
            super().end_round(round_, finished)
            copies = {
                name: self.upload(round_, reply, self.copies[name].arrays())
                for name, reply in finished.items()
            }
            before = self.server.arrays()
            server = self.server_aggregator.aggregate(round_.plan.server_round, copies, before)
        else:
            assert self.aggregator is not None  # this method always has one
            joined = {
                name: self.upload(
                    round_,
                    reply,
                    self.parts_for(name).join(self.parts_of(reply), self.copies[name].arrays()),
                )
                for name, reply in finished.items()
            }
            whole = self.aggregator.aggregate(
                round_.plan.server_round, joined, self.aggregated_tensors()
            )
            client, server = self.parts.divide(whole)
            self.replace_client_segment(client)
        self.server.load_arrays(server)

    def aggregated_tensors(self) -> dict[str, Tensor]:
        """Return the joined model, or the client segment where copies are aggregated apart."""
        if self.server_aggregator:
            return super().aggregated_tensors()
        return self.parts.join(self.client_segment.tensors, self.server.arrays())

    def _configure_server_strategy(self, aggregator: SegmentAggregator, round_: Round) -> None:
        server_round = round_.plan.server_round
        chosen = aggregator.configure(
            server_round,
            self.server.arrays(),
            lambda: round_.participants,
            derive_seed(self.options.seed, "server-copies", server_round),
        )
        if aggregator.clipping_norm:
            raise ConfigError(
                f"server_strategy is {type(aggregator.strategy).__name__}, but no client holds a "
                "copy of the server segment to clip: take the wrapper whose name has ServerSide"
            )
        if chosen != round_.participants:
            raise ConfigError(
                f"server_strategy chose {len(chosen)} of the {len(round_.participants)} clients "
                "that train; set fraction_train=1.0 there and let client_strategy choose"
            )

    def state_dict(self) -> State:
        """Return all that a checkpoint needs, with the clients' copies."""
        state = super().state_dict()
        state["copies"] = {name: copy.state_dict() for name, copy in self.copies.items()}
        if self.server_aggregator:
            state["server-strategy"] = self.server_aggregator.state_dict()
        return state

    def load_state_dict(self, state: State) -> None:
        """Go on from a :meth:`state_dict`."""
        super().load_state_dict(state)
        for name, own in state["copies"].items():
            self.copies[name] = self.new_server_segment(parts=self.parts_for(name))
            self.copies[name].load_state_dict(own)
        if self.server_aggregator:
            self.server_aggregator.load_state_dict(state["server-strategy"])
