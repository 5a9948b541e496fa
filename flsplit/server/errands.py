"""What an exchange has clients receive, compute and send, for a simulated clock."""

from collections.abc import Iterator, Mapping

from flsplit.account.clock import Errand, Exchange, Leg
from flsplit.account.ledger import Traffic
from flsplit.message.finish import FinishReply
from flsplit.message.local import LocalReply, LocalRequest
from flsplit.message.step import StepReply
from flsplit.server.checks import Reply, Request

_SENT_WHOLE = {"segment": "client-segments-down", "auxiliary": "auxiliary-down"}
"""What may be the same for all clients of an exchange, and its category in the ledger."""


def exchange_of(
    requests: Mapping[str, Request],
    replies: Mapping[str, Reply],
    traffic: Mapping[str, Traffic],
    shared_rows_bytes: int,
) -> Exchange:
    """Return an exchange as the clock wants it.

    A segment or an auxiliary model that goes to several clients is sent once, to all.

    Parameters
    ----------
    requests, replies : mapping of str to dataclasses of ``flsplit.message``
        What was asked of each client, and what those that did answered.
    traffic : mapping of str to Traffic
        What each client received and sent.
    shared_rows_bytes : int
        Bytes of the gradient rows that clients share.
    """
    shared = [
        category
        for field, category in _SENT_WHOLE.items()
        if _is_shared([getattr(request, field, None) for request in requests.values()])
    ]
    own = {
        name: one.down_bytes - sum(one.logical[category] for category in shared)
        for name, one in traffic.items()
    }
    # Clients that hold it already receive nothing.
    whole = [max(one.logical[category] for one in traffic.values()) for category in shared]
    decoupled = all(isinstance(request, LocalRequest) for request in requests.values())
    begins = any(getattr(request, "plan", None) for request in requests.values())
    return Exchange(
        errands={
            name: Errand(own[name], tuple(_legs(request, replies.get(name), traffic[name])))
            for name, request in requests.items()
        },
        shared_bytes=shared_rows_bytes + sum(whole),
        after_server=begins or not decoupled,
        before_server=not decoupled,
    )


def _is_shared(things: list[object]) -> bool:
    sent = [thing for thing in things if thing is not None]
    return len(sent) > 1 and all(thing is sent[0] for thing in sent)


def _legs(request: Request, reply: Reply | None, traffic: Traffic) -> Iterator[Leg]:
    backward = getattr(request, "backward", None)
    gradient = backward.gradient if backward else None
    backward_rows = 0 if gradient is None else len(gradient)
    if isinstance(reply, StepReply):
        yield Leg(
            forward_rows=len(reply.smashed),
            backward_rows=backward_rows,
            up_bytes=traffic.up_bytes,
            step=reply.step,
        )
    elif isinstance(reply, FinishReply):
        yield Leg(backward_rows=backward_rows, up_bytes=traffic.up_bytes)
    elif isinstance(reply, LocalReply):
        yield from _local_legs(reply, traffic)


def _local_legs(reply: LocalReply, traffic: Traffic) -> Iterator[Leg]:
    """Return a leg per step; what goes up of a step goes up before the next."""
    is_peek = reply.steps_done == reply.step
    sent = {step: x.nbytes + y.nbytes for step, (x, y) in reply.uploads.items()}
    for step, rows in enumerate(reply.rows, start=reply.step):
        trained = 0 if is_peek else rows
        yield Leg(
            forward_rows=rows,
            backward_rows=trained,
            auxiliary_rows=trained,
            up_bytes=sent.get(step, 0),
            step=step if step in sent else None,
        )
    yield Leg(up_bytes=traffic.up_bytes - sum(sent.values()))
