"""One run of a strategy: rounds of training and evaluation over a carrier, and what is kept."""

import random
import time
import uuid
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid

from flsplit.account import Clock, RoundEntry
from flsplit.account.ledger import LeftOut
from flsplit.carry.choose import open_carrier
from flsplit.client_parts import check_places, describe_parts, warn_of_second_cut
from flsplit.errors import NotEnoughClientsError
from flsplit.log import logger
from flsplit.message.arrays import to_record
from flsplit.message.shape import ShapeRequest
from flsplit.message.steps import FinishReply
from flsplit.run.callbacks import Callback, FinishedRound, may_stop
from flsplit.run.checkpoint import Checkpoints
from flsplit.run.configs import evaluate_amounts, make_plan
from flsplit.run.evaluation import evaluate_clients
from flsplit.run.method import SplitMethod
from flsplit.run.options import at_round
from flsplit.run.redoing import MOST_ATTEMPTS, Beginning, Copies
from flsplit.run.report import log_round
from flsplit.run.result import SplitResult
from flsplit.run.round import Round
from flsplit.run.run_clock import make_clock
from flsplit.run.run_identity import Identity, describe, identity_of
from flsplit.seeds import derive_seed, set_aside
from flsplit.server.clients import Clients
from flsplit.server.misfits import Fits
from flsplit.storage import State, in_use

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


@dataclass
class Run:
    """A strategy at work for some rounds.

    The arguments are those of :meth:`~flsplit.run.strategy.SplitStrategy.start`.
    """

    strategy: SplitMethod
    num_rounds: int
    timeout: float
    train_config: ConfigRecord | None
    evaluate_config: ConfigRecord | None
    evaluate_fn: EvaluateFn | None
    result: SplitResult = field(default_factory=SplitResult)
    callbacks: list[Callback] = field(init=False)
    _client_scores: dict[str, dict[str, float]] = field(default_factory=dict)
    _frozen: Copies = field(default_factory=dict)
    _experiment: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        """Take the callbacks that the options name."""
        self.callbacks = list(self.strategy.options.callbacks)

    def execute(self, grid: Grid) -> SplitResult:
        """Do all rounds, from the last checkpoint on if the options say so."""
        options, parts = self.strategy.options, self.strategy.all_client_parts()
        check_places(parts, two_cuts=options.keeps_labels)
        if options.keeps_labels:
            warn_of_second_cut(parts)
        with ExitStack() as stack:
            folder = Path(
                options.checkpoint_dir or stack.enter_context(TemporaryDirectory(prefix="flsplit-"))
            ).absolute()
            stack.enter_context(in_use(folder, "checkpoint_dir"))
            checkpoints = None
            if options.checkpoint_dir:
                identity = self._identity()
                checkpoints = Checkpoints(folder, self.strategy, self.callbacks, identity)
            known = self._begin(checkpoints)
            carrier = stack.enter_context(
                open_carrier(
                    grid,
                    options.carrier,
                    options.session,
                    self.timeout,
                    experiment=self._experiment,
                    state_dir=str(folder / "clients"),
                )
            )
            clients = Clients(carrier, self.timeout)
            clients.load_state_dict(known)
            clients.recall(self.result.history)
            clients.clock = self._make_clock(clients)
            self._do_rounds(clients, checkpoints)
        return self.result

    def _begin(self, checkpoints: Checkpoints | None) -> State:
        """Begin a new run, or go on with the one that is in the folder; return its clients."""
        if checkpoints is None:
            return {}
        if not self.strategy.options.resume:
            checkpoints.begin(self._experiment)
            return {}
        known, history, self._experiment = checkpoints.load()
        for entry in history:
            self._keep(entry)
        logger.info("resuming after round %d", self._rounds_done)
        if self._rounds_done >= self.num_rounds:
            logger.warning(
                "num_rounds is %d, and %d are done: nothing is left to train",
                self.num_rounds, self._rounds_done,
            )  # fmt: skip
        return known

    def _identity(self) -> Identity:
        """Return what tells this run from others: its method's identity, and what is told here."""
        configs = {"train_config": self.train_config, "evaluate_config": self.evaluate_config}
        given = {f"{what}.{k}": v for what, one in configs.items() for k, v in (one or {}).items()}
        found = identity_of(self.strategy)
        for name, value in given.items():
            found |= describe(name, value)
        return found

    def _make_clock(self, clients: Clients) -> Clock | None:
        strategy = self.strategy
        if strategy.options.fleet:  # some client must be there to say what its inputs look like
            clients.directory.wait_for(strategy.least_clients())
        return make_clock(
            strategy.options,
            strategy.planned(),
            strategy.auxiliary_flops,
            clients,
            ShapeRequest(self._rounds_done + 1, strategy.options.default_cut, strategy.inputs),
        )

    @property
    def _rounds_done(self) -> int:
        return self.result.history[-1].round if self.result.history else 0

    @cached_property
    def _fits(self) -> Fits:
        pooled = self.strategy.options.server_batchnorm == "pooled"
        return Fits(self.strategy.server_for, pools=pooled and self.strategy.pools)

    def _do_rounds(self, clients: Clients, checkpoints: Checkpoints | None) -> None:
        started, first = time.perf_counter(), self._rounds_done + 1
        # All of a large model would be written once a round, to be read by nobody.
        shows_arrays = bool(self.evaluate_fn or self.callbacks)
        if shows_arrays:
            self.result.arrays = self.strategy.arrays()
        if first == 1:
            self._evaluate_centrally(0)
        for server_round in range(first, self.num_rounds + 1):
            round_, finished = self._train(server_round, clients, is_first=server_round == first)
            if server_round == first and checkpoints:
                round_.entry.notes += checkpoints.problems
            self.strategy.end_round(round_, finished)
            for segment in self.strategy.server_segments():
                segment.end_round()
            self._evaluate(round_)
            if shows_arrays:
                self.result.arrays = self.strategy.arrays()
            self._keep_shared(finished)
            self._evaluate_centrally(server_round)
            self._keep(round_.close())
            self._keep_aggregated(round_)
            stop = self._call_back(round_)
            if checkpoints:
                checkpoints.save(clients.state_dict(), self.result.history)
            spent = (time.perf_counter() - started) / (server_round - first + 1)
            log_round(round_.entry, self.num_rounds, spent * (self.num_rounds - server_round))
            if stop:
                break
            if server_round < self.num_rounds:
                clients.carrier.end_round(server_round, self.timeout)
            if server_round == first and clients.exchanges:  # now evaluation is known, too
                mean = round_.entry.waiting_seconds / clients.exchanges
                left = clients.exchanges * (self.num_rounds - server_round)
                clients.carrier.check_speed(mean, left)
        self.result.arrays = self.strategy.arrays()

    def _call_back(self, round_: Round) -> bool:
        """Let all callbacks see the round; tell whether one of them ends the run."""
        if not self.callbacks:
            return False
        central: Mapping[str, object] = self.result.evaluate_metrics_serverapp.get(
            round_.entry.round, {}
        )
        finished = FinishedRound(
            round_.entry,
            self.num_rounds,
            self.result.arrays,
            {name: one for name, one in central.items() if isinstance(one, (int, float))},
            self.strategy.gives_whole_model,
        )
        answers = [one.on_round_end(finished) for one in self.callbacks]  # all of them see it
        return any(answers)

    @cached_property
    def _who_evaluates(self) -> tuple[float, int]:
        """Which fraction of the clients evaluates, and how many at least."""
        options, aggregator = self.strategy.options, self.strategy.aggregator
        asked = options.fraction_evaluate, options.min_evaluate_nodes
        return aggregator.evaluates(*asked) if aggregator and options.client_strategy else asked

    def _exchanges_left(self, round_: Round, steps: int) -> int:
        """Return how many exchanges it takes from this round on; in evaluation, at least one."""
        per_round = self.strategy.exchanges_per_round(steps, len(round_.participants))
        per_round += self._who_evaluates[0] > 0.0
        return per_round * (self.num_rounds - round_.plan.server_round + 1)

    # --- a round -------------------------------------------------------------------------

    def _train(
        self, server_round: int, clients: Clients, *, is_first: bool
    ) -> tuple[Round, dict[str, FinishReply]]:
        """Train a round; one that has lost its clients midway is done again, a few times."""
        before, lost = Beginning(self.strategy, clients, self._frozen), list[LeftOut]()
        self._frozen = before.frozen
        for attempt in range(1, MOST_ATTEMPTS + 1):
            round_ = self._open(server_round, clients, lost)
            if is_first:
                round_.exchanges_left = partial(self._exchanges_left, round_)
            self.strategy.begin_round(round_)
            with set_aside():
                finished = self.strategy.train_round(round_)
            if round_.enough_are_left():
                break
            if attempt == MOST_ATTEMPTS:
                raise NotEnoughClientsError(f"{round_.problem} (attempt {attempt})")
            lost += round_.close().left_out
            before.restore()
            logger.warning("round %d is done again", server_round)
        round_.entry.redone = lost
        return round_, finished

    def _open(self, server_round: int, clients: Clients, lost: Sequence[LeftOut]) -> Round:
        """Begin a round; without those whom it has lost already, though they are connected."""
        strategy, options = self.strategy, self.strategy.options
        clients.directory.wait_for(strategy.least_clients())
        if not options.server_scheduler:
            for segment in strategy.server_segments():
                segment.set_lr(at_round(options.server_lr, server_round))
        parts = strategy.all_client_parts()
        clients.links.follow(parts)
        version = strategy.client_segment.version
        unusable = {one.client for one in lost if not one.away}
        participants = self._choose(server_round, partial(self._present, clients, unusable))
        several = options.several_cuts
        plan = make_plan(
            options,
            server_round,
            self.num_rounds,
            self.train_config,
            version,
            self._experiment,
            describe_parts(parts),
            strategy.inputs,
        )
        round_ = Round(
            clients=clients,
            plan=replace(plan, **strategy.clipping(participants)),
            client_parts=parts,
            segment=strategy.client_segment,
            participants=participants,
            segments={name: strategy.segment_for(name) for name in participants if several},
            upload_segment=strategy.gives_whole_model
            or (
                options.share_client_segments
                # any round may be the last where a callback can end the run
                and (server_round == self.num_rounds or any(map(may_stop, self.callbacks)))
            ),
            min_clients=options.min_available_nodes,
            fits=self._fits,
            callbacks=self.callbacks,
        )
        if several:
            round_.overrides |= {n: {"cut": strategy.parts_for(n).cut} for n in participants}
        return round_

    def _present(self, clients: Clients, but: Set[str]) -> list[str]:
        names = clients.directory.discover()
        others = [name for name in names if name not in but]
        return others if len(others) >= max(1, self.strategy.least_clients()) else names

    def _choose(self, server_round: int, present: Callable[[], list[str]]) -> list[str]:
        options, strategy = self.strategy.options, self.strategy
        seed = derive_seed(options.seed, "clients", server_round)
        if strategy.aggregator:
            arrays = strategy.aggregated_tensors()
            return strategy.aggregator.configure(server_round, arrays, present, seed)
        if options.fraction_train == 0.0:
            return []
        names = present()
        count = max(int(len(names) * options.fraction_train), options.min_train_nodes)
        return sample(names, count, seed)

    def _evaluate(self, round_: Round) -> None:
        options, (fraction, least) = self.strategy.options, self._who_evaluates
        if fraction == 0.0:
            return
        names = round_.clients.directory.discover()
        count = max(int(len(names) * fraction), least)
        seed = derive_seed(options.seed, "evaluate", round_.plan.server_round)
        batch_size, batches = evaluate_amounts(options, self.evaluate_config)
        round_.entry.evaluation, self._client_scores = evaluate_clients(
            self.strategy,
            round_.clients,
            sample(names, count, seed),
            round_.entry,
            batch_size=batch_size,
            batches=batches,
        )

    def _evaluate_centrally(self, server_round: int) -> None:
        if self.evaluate_fn and (metrics := self.evaluate_fn(server_round, self.result.arrays)):
            logger.info("\tcentral evaluation: %s", metrics)
            self.result.evaluate_metrics_serverapp[server_round] = metrics

    # --- results -------------------------------------------------------------------------

    def _keep(self, entry: RoundEntry) -> None:
        self.result.history.append(entry)
        self.result.train_metrics_clientapp[entry.round] = entry.train_metrics()
        if entry.evaluation:
            metrics = MetricRecord({**entry.evaluation})
            self.result.evaluate_metrics_clientapp[entry.round] = metrics

    def _keep_aggregated(self, round_: Round) -> None:
        """Add what Flower strategies' metric aggregation functions return, under other names."""
        server_round, result = round_.plan.server_round, self.result
        kept = []
        for aggregator in self.strategy.given_aggregators():
            kept.append((result.train_metrics_clientapp, aggregator.metrics))
            if self._client_scores:
                found = aggregator.evaluate(server_round, self._client_scores)
                kept.append((result.evaluate_metrics_clientapp, found))
        for record, more in kept:
            own = record.get(server_round, MetricRecord())
            record[server_round] = MetricRecord({**more, **own})

    def _keep_shared(self, finished: Mapping[str, FinishReply]) -> None:
        if self.strategy.options.share_client_segments and not self.strategy.gives_whole_model:
            for name, reply in finished.items():
                if reply.segment is not None:
                    self.result.client_segments[name] = to_record(self.strategy.parts_of(reply))


def sample(names: list[str], count: int, seed: int) -> list[str]:
    """Return ``count`` of the names, chosen by ``seed``, in their order."""
    chosen = set(random.Random(seed).sample(names, min(count, len(names))))
    return [name for name in names if name in chosen]
