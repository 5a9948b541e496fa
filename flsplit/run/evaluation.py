"""Federated evaluation: test data through each client's own segment and the server's."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from flsplit.account.ledger import RoundEntry
from flsplit.errors import OF_A_BATCH, FlsplitError, located
from flsplit.message.evaluate import EvaluateReply, EvaluateRequest
from flsplit.message.request import SegmentArrays
from flsplit.message.u_shape import EvaluateTailReply, EvaluateTailRequest
from flsplit.nested import num_rows
from flsplit.run.scores import Scores, run_test_batch, update_all
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
                wanted = [scores]
                if each:
                    wanted.append(of_client.setdefault(name, Scores(metrics)))
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
                            update_all(wanted, server_for(name), reply)
                except OF_A_BATCH as error:
                    failed.append(error)
                    clients.leave_out(name, None, error, entry)
                    continue
            said[name] = reply.num_batches
            if batch < reply.num_batches and batch != batches:
                remaining.append(name)
        for name, sums in (clients.exchange(outputs, entry) if outputs else {}).items():
            if isinstance(sums, EvaluateTailReply) and outputs[name].last:
                for one in (scores, *([of_client[name]] if each else [])):
                    one.add(sums)
        gone = {one.client for one in entry.left_out}
        remaining = [name for name in remaining if name not in gone]
    if failed and not scores.compute():
        raise failed[0]
    return scores.compute(), {name: own.compute() for name, own in of_client.items()}
