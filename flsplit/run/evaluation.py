"""Federated evaluation: test data through each client's own segment and the server's."""

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

from flsplit.account.ledger import RoundEntry
from flsplit.errors import OF_A_BATCH, FlsplitError, NonFiniteError, located
from flsplit.message.evaluate import EvaluateReply, EvaluateRequest
from flsplit.message.u_shape import EvaluateTailReply, EvaluateTailRequest
from flsplit.nested import num_rows
from flsplit.run.method import SplitMethod
from flsplit.run.scores import Scores, run_test_batch, score_test_batch
from flsplit.server.clients import Clients
from flsplit.server.misfits import Fits

T = TypeVar("T")


def evaluate_clients(
    method: SplitMethod,
    clients: Clients,
    names: list[str],
    entry: RoundEntry,
    *,
    batch_size: int,
    batches: int = 0,
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Return loss and metrics over the test samples of the clients ``names``.

    Each tests ``batches`` batches at most, 0 for as many as its data have. There is no loss where
    nobody has test data. The second dict has the same of each client by name, where a client
    strategy may want it.
    """
    tests = _Evaluation(method, clients, entry, batch_size, batches)
    batch, remaining = 0, names
    while remaining:
        replies = tests.ask(remaining, batch)
        done = tests.score_at_clients if method.options.keeps_labels else tests.score
        batch += 1
        remaining = [
            name for name in done(replies) if batch < replies[name].num_batches and batch != batches
        ]
    return tests.result()


class _Evaluation:
    def __init__(
        self,
        method: SplitMethod,
        clients: Clients,
        entry: RoundEntry,
        batch_size: int,
        batches: int,
    ) -> None:
        self._method, self._clients, self._entry = method, clients, entry
        self._batch_size, self._batches = batch_size, batches
        self._metrics = method.options.metrics
        self._fits = Fits(method.server_for, pools=False)
        self._each = bool(method.given_aggregators())
        self._scores, self._of_client = Scores(self._metrics), dict[str, Scores]()
        # Of clients whose loss isn't finite.
        self._odd, self._odd_losses = Scores(self._metrics), dict[str, float]()
        self._failed: FlsplitError | None = None  # the first batch that could not be computed
        self._said: dict[str, int] = {}  # how many batches there are
        self._rows: dict[str, int] = {}  # how many a client has had

    def ask(self, names: list[str], batch: int) -> dict[str, EvaluateReply]:
        requests, entry = {}, self._entry
        for name in names:
            segment = self._method.segment_for(name)
            requests[name] = EvaluateRequest(
                entry.round,
                batch,
                self._batch_size,
                segment.version,
                segment if batch == 0 else None,
                self._said.get(name),
                self._method.options.keeps_labels,
                self._method.inputs,
            )
        replies = self._clients.exchange(requests, entry)
        found = {}
        for name, reply in self._fits.sifted(self._clients, requests, replies, entry).items():
            assert isinstance(reply, EvaluateReply)
            found[name], self._said[name] = reply, reply.num_batches
        return found

    def score(self, replies: Mapping[str, EvaluateReply]) -> list[str]:
        """Score a batch of each client here; return who can go on."""
        return list(self._computed(replies, self._score))

    def _score(self, name: str, reply: EvaluateReply) -> None:
        found = score_test_batch(self._method.server_for(name), reply)
        if found.counted.weight and not math.isfinite(found.loss):
            self._odd_losses.setdefault(name, found.loss)
        self._scores_of(name).update(*found)
        if self._each:
            self._of_client.setdefault(name, Scores(self._metrics)).update(*found)

    def score_at_clients(self, replies: Mapping[str, EvaluateReply]) -> list[str]:
        """Let clients that keep their labels score a batch; return who can go on."""
        outputs = self._computed(replies, self._tail_request)
        tails = self._clients.exchange(outputs, self._entry) if outputs else {}
        for name, sums in tails.items():
            if isinstance(sums, EvaluateTailReply) and outputs[name].last:
                if not math.isfinite(sums.loss):
                    self._odd_losses[name] = sums.loss
                self._scores_of(name).add(sums)
                self._of_client[name] = Scores(self._metrics)
                self._of_client[name].add(sums)
        return list(tails)

    def _tail_request(self, name: str, reply: EvaluateReply) -> EvaluateTailRequest:
        rows = self._rows[name] = self._rows.get(name, 0) + num_rows(reply.labels)
        output = run_test_batch(self._method.server_for(name), reply, None)
        last = reply.batch + 1 in (reply.num_batches, self._batches)
        return EvaluateTailRequest(
            reply.server_round, reply.batch, self._batch_size, last, output, rows
        )

    def _scores_of(self, name: str) -> Scores:
        return self._odd if name in self._odd_losses else self._scores

    def _computed(
        self,
        replies: Mapping[str, EvaluateReply],
        compute: Callable[[str, EvaluateReply], T],
    ) -> dict[str, T]:
        """Return what is computed of each client that has test data and whose batch can be used."""
        found = {}
        for name, reply in replies.items():
            if not reply.num_batches:
                continue
            try:
                with located(f"evaluation of round {self._entry.round}, client {name!r}"):
                    found[name] = compute(name, reply)
            except OF_A_BATCH as error:
                self._failed = self._failed or error
                self._odd_losses.pop(name, None)
                self._clients.leave_out(name, None, error, self._entry)
        return found

    def result(self) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        totals = self._scores.compute()
        if not totals:  # where no client's loss is finite it is the model's, and is told
            totals, self._odd_losses = self._odd.compute(), {}
        if self._failed and not totals:
            raise self._failed
        for name, loss in self._odd_losses.items():
            why = NonFiniteError(f"its test loss is {loss}, and those of other clients are finite")
            self._clients.leave_out(name, None, why, self._entry)
            self._of_client.pop(name, None)
        return totals, {name: own.compute() for name, own in self._of_client.items()}
