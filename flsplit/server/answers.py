"""Answers of a Grid: whose they are, and what an Error says."""

from collections.abc import Iterable

from flwr.app import Message

from flsplit.errors import FlsplitError, ProtocolError, StateLostError
from flsplit.flower_internals import NODE_AWAY

_STATE_LOST = StateLostError.__name__  # how a client's Error says so


class AwayError(FlsplitError):
    """A client's node or host was lost; nothing is wrong with the client itself."""


def by_node(answers: Iterable[Message], asked: Iterable[Message] = ()) -> dict[int, Message]:
    """Return the answers by the node that was asked.

    For a node that is away the SuperLink answers, with an Error in its own name.
    """
    requests = [one.metadata for one in asked]
    nodes = {one.dst_node_id for one in requests}
    node_of = {one.message_id: one.dst_node_id for one in requests}
    found = {}
    for answer in answers:
        node = answer.metadata.src_node_id
        if answer.has_error() and node not in nodes:
            node = node_of.get(answer.metadata.reply_to_message_id, node)
        found[node] = answer
    return found


def raise_error(message: Message) -> None:
    """Raise what an Error says; nothing, if the message is none.

    Raises
    ------
    AwayError
        If the client's node or host was lost.
    StateLostError
        If the client doesn't hold what it should hold.
    ProtocolError
        Otherwise.
    """
    if not message.has_error():
        return
    reason = message.error.reason or "an error without a reason"
    if message.error.code == NODE_AWAY:
        raise AwayError(reason)
    raise StateLostError(reason) if _STATE_LOST in reason else ProtocolError(reason)
