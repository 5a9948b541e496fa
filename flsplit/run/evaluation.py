"""Federated evaluation: test data through each client's own segment and the server's."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from flsplit.account.ledger import RoundEntry
from flsplit.errors import OF_A_BATCH, FlsplitError, NonFiniteError, located
from flsplit.message.evaluate import EvaluateReply, EvaluateRequest
from flsplit.message.request import SegmentArrays
from flsplit.message.u_shape import EvaluateTailReply, EvaluateTailRequest
from flsplit.nested import num_rows
from flsplit.run.scores import Scores, run_test_batch, score_test_batch
from flsplit.server.clients import Clients
from flsplit.server.misfits import Fits, leave_out_misfits
from flsplit.server.segment import ServerSegment

if TYPE_CHECKING:
    from torchmetrics import Metric


def evaluate_clients(
    server_for: Callable[[str], ServerSegment],
    clients: Clients,
    names: list[str],
    segment_for: Callable[[str], SegmentArrays],
    entry: RoundEntry,
    *,
    batch_size: int,
    batches: int = 0,
    metrics: "Mapping[str, Metric]",
    fits: Fits,
    each: bool = False,
    keeps_labels: bool = False,
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Return loss and metrics over the test samples of the clients ``names``.

    Parameters
    ----------
    server_for : callable
        Returns a client's server segment; it is used in evaluation mode.
    clients : Clients
        Talks to the clients.
    names : list of str
        Who evaluates.
    segment_for : callable
        Returns the segment that is sent to a client that doesn't hold this version.
    entry : RoundEntry
        Where bytes are counted and clients that fail are named.
    batch_size : int
        Test examples per exchange.
    batches : int
        How many exchanges with a client there are at most; 0 for as many as its data have.
    metrics : mapping of str to torchmetrics.Metric
        Further metrics by name, updated with ``(logits, labels)``.
    fits : Fits
        Tells whose smashed data and labels the server segment can't take.
    each : bool
        Whether each client's scores are wanted, too.
    keeps_labels : bool
        Whether clients have the last layers, and compute the scores.

    Returns
    -------
    tuple of dicts
        ``loss``, ``num-examples``, ``accuracy`` where labels are classes, and the metrics; empty
        if no client has test data. And the same of each client by name, where it is wanted.
    """
    scores, remaining, batch = Scores(metrics), list(names), 0
    of_client: dict[str, Scores] = {}
    odd, odd_losses = Scores(metrics), dict[str, float]()  # of clients whose loss isn't finite
    failed: list[FlsplitError] = []
    said: dict[str, int] = {}  # how many batches there are
    rows: dict[str, int] = {}  # how many a client has had
    while remaining:
        requests = {}
        for name in remaining:
            segment = segment_for(name)
            whole = segment if batch == 0 else None
            requests[name] = EvaluateRequest(
                entry.round,
                batch,
                batch_size,
                segment.version,
                whole,
                said.get(name),
                keeps_labels,
            )
        replies = clients.exchange(requests, entry)
        replies = leave_out_misfits(fits, clients, requests, replies, entry)
        batch += 1
        remaining = []
        outputs: dict[str, EvaluateTailRequest] = {}
        for name, reply in replies.items():
            if not isinstance(reply, EvaluateReply):
                raise FlsplitError(
                    f"client {name!r} answered an evaluation with {type(reply).__name__}"
                )
            if reply.num_batches:
                try:
                    with located(f"evaluation of round {entry.round}, client {name!r}"):
                        if keeps_labels:
                            rows[name] = rows.get(name, 0) + num_rows(reply.labels)
                            last = batch in (reply.num_batches, batches)
                            output = run_test_batch(server_for(name), reply, None)
                            outputs[name] = EvaluateTailRequest(
                                entry.round, batch - 1, batch_size, last, output, rows[name]
                            )
                        else:
                            found = score_test_batch(server_for(name), reply)
                            if found.counted.weight and not math.isfinite(found.loss):
                                odd_losses.setdefault(name, found.loss)
                            wanted = [odd if name in odd_losses else scores]
                            if each:
                                wanted.append(of_client.setdefault(name, Scores(metrics)))
                            for one in wanted:
                                one.update(*found)
                except OF_A_BATCH as error:
                    failed.append(error)
                    odd_losses.pop(name, None)
                    clients.leave_out(name, None, error, entry)
                    continue
            said[name] = reply.num_batches
            if batch < reply.num_batches and batch != batches:
                remaining.append(name)
        if outputs:
            tails = clients.exchange(outputs, entry)
            remaining = [name for name in remaining if name in tails]
            for name, sums in tails.items():
                if isinstance(sums, EvaluateTailReply) and outputs[name].last:
                    if not math.isfinite(sums.loss):
                        odd_losses[name] = sums.loss
                    of_client[name] = Scores(metrics)
                    for one in (odd if name in odd_losses else scores, of_client[name]):
                        one.add(sums)
    totals = scores.compute()
    if not totals:  # where no client's loss is finite it is the model's, and is told
        totals, odd_losses = odd.compute(), {}
    if failed and not totals:
        raise failed[0]
    for name, loss in odd_losses.items():
        why = NonFiniteError(f"its test loss is {loss}, and those of other clients are finite")
        clients.leave_out(name, None, why, entry)
        of_client.pop(name, None)
    return totals, {name: own.compute() for name, own in of_client.items()}
