"""What the messages of an exchange carry and have done: for the ledger and a simulated clock."""

from collections.abc import Mapping

from flwr.app import ArrayRecord, RecordDict

from flsplit.account.clock import Errand, Exchange
from flsplit.account.ledger import Traffic
from flsplit.message.arrays import RAW, nbytes
from flsplit.message.local_steps import LocalRequest
from flsplit.message.request import Reply, Request

_SENT_WHOLE = {"segment": "client-segments-down", "auxiliary": "auxiliary-down"}
"""What may be the same for all clients of an exchange, and its category in the ledger."""


def count(
    content: RecordDict, categories: Mapping[str, str], traffic: Traffic, *, sends: bool
) -> None:
    """Count a message's arrays by the categories of their records.

    ``sends`` says whether anything goes over a wire.
    """
    for name, record in content.items():
        if name in categories and type(record) is ArrayRecord:
            category = categories[name]
            for array in record.values():
                size = len(array.data)
                traffic.logical[category] += size if array.stype == RAW else nbytes(array)
                traffic.wire[category] += size if sends else 0


def exchange_of(
    requests: Mapping[str, Request],
    replies: Mapping[str, Reply],
    traffic: Mapping[str, Traffic],
    shared_rows_bytes: int,
) -> Exchange:
    """Return an exchange as a clock wants it.

    A segment or an auxiliary model that goes to several clients is sent once, to all.
    """
    shared = [
        category
        for field, category in _SENT_WHOLE.items()
        if _is_shared([getattr(request, field) for request in requests.values()])
    ]
    # Clients that hold it already receive nothing.
    whole = [max(one.logical[category] for one in traffic.values()) for category in shared]
    decoupled = all(isinstance(request, LocalRequest) for request in requests.values())
    errands = {}
    for name, request in requests.items():
        one, reply = traffic[name], replies.get(name)
        own_bytes = one.down_bytes - sum(one.logical[category] for category in shared)
        gradient = request.backward.gradient if request.backward else None
        backward_rows = 0 if gradient is None else len(gradient)
        legs = reply.legs(backward_rows, one.up_bytes) if reply else ()
        errands[name] = Errand(own_bytes, tuple(legs))
    return Exchange(
        errands=errands,
        shared_bytes=shared_rows_bytes + sum(whole),
        after_server=not decoupled or any(request.plan for request in requests.values()),
        before_server=not decoupled,
    )


def _is_shared(things: list[object]) -> bool:
    sent = [thing for thing in things if thing is not None]
    return len(sent) > 1 and all(thing is sent[0] for thing in sent)
