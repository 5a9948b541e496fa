"""Which clients are there: their names, their nodes, their fixed order, and whose an answer is."""

import re
import time
from collections.abc import Iterable, Sequence
from functools import lru_cache

from flwr.app import ConfigRecord, Message, Metadata, RecordDict

from flsplit.carry.carrier import Carrier
from flsplit.carry.polling import polling
from flsplit.carry.refusals import Refusals
from flsplit.errors import FlsplitError, NotEnoughClientsError, ProtocolError, StateLostError
from flsplit.flower_internals import NODE_AWAY
from flsplit.log import logger
from flsplit.message.fields import record, value
from flsplit.message.raised import shortened
from flsplit.message.types import DESCRIBE

MAX_NAME = 100
"""Characters in a client's name: it stands in logs, in the history and in names of files."""

_PATIENCE = 15.0  # seconds that other nodes are waited for where all run into the app's errors
_FIRST_FEW = 8  # nodes that are asked before the others: a page of log is written for each failure

_STATE_LOST = StateLostError.__name__  # how a client's Error says so


class AwayError(FlsplitError):
    """A client's node or host was lost; nothing is wrong with the client itself."""


class Directory:
    """The clients behind a carrier, by name.

    Of several nodes with the same name one is used: the first of the run to have it, as long as it
    is connected. A node that has been one client can't be another later.
    """

    def __init__(self, carrier: Carrier, timeout: float) -> None:
        self._carrier = carrier
        self._timeout = timeout
        self._can_join = not carrier.in_process
        self._unusable = Refusals()
        self._broken_since: float | None = None
        self._first: dict[str, int] = {}  # by name, the node that had it first
        self._names: dict[int, str] = {}
        self.node_of: dict[str, int] = {}
        """The nodes of the clients that were connected when last looked."""

    def discover(self) -> list[str]:
        """Return the names of the connected clients, in their fixed order."""
        nodes = set(self._carrier.get_node_ids())
        self.node_of = {name: node for name, node in self.node_of.items() if node in nodes}
        self._unusable.keep_only(nodes)
        unknown = self._unusable.due(nodes - set(self.node_of.values()))
        if not self.node_of:
            first, unknown = unknown[:_FIRST_FEW], unknown[_FIRST_FEW:]
            self._describe(first)
        if self.node_of:
            self._describe(unknown)
        return in_order(self.node_of)

    def wait_for(self, minimum: int) -> list[str]:
        """Return the connected clients once there are at least ``minimum``.

        NotEnoughClientsError if there are fewer after ``timeout`` seconds, or at once where none
        can join: over a grid in this process. BrokenAppError if no node can run the ClientApp, nor
        another comes that can.
        """
        timeout, told = self._timeout if self._can_join else 0.0, False
        for _ in polling(timeout):
            if len(names := self.discover()) >= minimum:
                return names
            self._check_app()
            if self._can_join and not told:
                logger.info(
                    "waiting for %d clients, %d are connected%s",
                    minimum, len(names), self._refusals(),
                )  # fmt: skip
                told = True
        raise NotEnoughClientsError(
            f"{len(self.node_of)} clients are connected after {timeout:g} s, expected at "
            f"least {minimum} (min_available_nodes, min_train_nodes){self._refusals()}"
        )

    def _refusals(self) -> str:
        return f"; {self._unusable.told()}" if self._unusable else ""

    def _check_app(self) -> None:
        """Don't wait on where all nodes that were asked can't run the ClientApp."""
        if self.node_of or not self._unusable.all_broken():
            self._broken_since = None
            return
        now = time.monotonic()
        self._broken_since = self._broken_since or now
        if now - self._broken_since >= (0.0 if self._carrier.simulated else _PATIENCE):
            raise self._unusable.broken_app()

    def _describe(self, nodes: list[int]) -> None:
        if not nodes:
            return
        messages = [Message(RecordDict(), node, DESCRIBE) for node in nodes]
        answers = self._carrier.send_and_receive(messages, timeout=self._timeout)
        found = by_node(answers, messages)
        for node in (one for one in nodes if one in found):  # the order of arrival says nothing
            try:
                self._take_in(node, _described(found[node]))
            except FlsplitError as error:
                answer = found[node]
                if answer.has_error():
                    self._unusable.note(node, answer.error)
                else:  # it is well, but for its name, which its operator may mend
                    self._unusable.note(node, error, at_once=True)

    def _take_in(self, node: int, name: str) -> None:
        """Take a node for the client that it says it is, if it may be."""
        if (before := self._names.get(node, name)) != name:
            raise ProtocolError(f"it calls itself client {name!r}, and was client {before!r}")
        first, now = self._first.setdefault(name, node), self.node_of.get(name, node)
        twins = ProtocolError(
            f"two nodes call themselves client {name!r}; give each its own partition-id or "
            "client-name in its node config"
        )
        if node not in (first, now):
            raise twins
        if now != node:
            self._unusable.note(now, twins, at_once=True)
        self._unusable.forget(node)
        self.node_of[name], self._names[node] = node, name


def in_order(names: Iterable[str]) -> list[str]:
    """Return names in the fixed order: ``"2"`` before ``"10"``, ``"01"`` always before ``"1"``."""
    return sorted(names, key=_natural)


@lru_cache(maxsize=2**16)
def _natural(name: str) -> tuple[list[tuple[int, str]], str]:
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], name


def _described(message: Message) -> str:
    """Return the client's name in a reply to ``query.describe``."""
    raise_error(message)
    name = value(record(message.content, "reply", ConfigRecord), "client", str)
    if not (0 < len(name) <= MAX_NAME and name.isprintable()):
        raise ProtocolError(
            f"client: the name is {shortened(repr(name), 60)}, of {len(name)} characters, expected "
            f"1 to {MAX_NAME} that can be printed (partition-id or client-name in its node config)"
        )
    return name


def by_node(answers: Iterable[Message], asked: Sequence[Message] = ()) -> dict[int, Message]:
    """Return the answers by the node that was asked.

    For a node that is away the SuperLink answers, with an Error in its own name.
    """
    found = {}
    for answer in answers:
        node = answer.metadata.src_node_id
        if answer.has_error():
            node = _node_asked(answer, [one.metadata for one in asked], node)
        found[node] = answer
    return found


def _node_asked(answer: Message, asked: list[Metadata], node: int) -> int:
    if node in {one.dst_node_id for one in asked}:
        return node
    node_of = {one.message_id: one.dst_node_id for one in asked}
    return node_of.get(answer.metadata.reply_to_message_id, node)


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
    reason = shortened(message.error.reason or "an error without a reason")
    if message.error.code == NODE_AWAY:
        raise AwayError(reason)
    raise StateLostError(reason) if _STATE_LOST in reason else ProtocolError(reason)
