"""Nodes that can't take part now: why, and when each of them is asked again."""

import re
import time
from collections.abc import Collection
from dataclasses import dataclass

from flwr.app import Error

from flsplit.errors import NotEnoughClientsError
from flsplit.flower_internals import APP_ERRORS, CLIENT_RAISED, NODE_AWAY
from flsplit.log import logger, without_colours
from flsplit.message.raised import shortened

_FIRST_PAUSE = 1.0  # seconds; doubled at each refusal of the same node
_LONGEST_PAUSE = 300.0
_LONGEST_REASON = 500
_MOST_NAMED = 5

# How Flower's runtime writes an exception that no handler has caught.
_UNCAUGHT = re.compile(r"<class '([^']+)'>:<'(.*)'>", re.DOTALL)
_PLACE = re.compile(r'File "([^"]+)", line (\d+)')


class BrokenAppError(NotEnoughClientsError):
    """No node can run the ClientApp: it can't be loaded there, or raises before it answers."""


@dataclass
class _Refusal:
    reason: str
    broken: bool
    pause: float
    again: float  # by time.monotonic


class Refusals:
    """Keeps why nodes can't take part, each reason logged once, and asks them ever less often."""

    def __init__(self) -> None:
        self._of: dict[int, _Refusal] = {}

    def __len__(self) -> int:
        """Return how many nodes can't take part now."""
        return len(self._of)

    def note(self, node: int, error: Error | Exception, *, at_once: bool = False) -> None:
        """Keep why a node can't take part, and ask it again after a pause, or `at_once`."""
        broken = isinstance(error, Error) and is_broken(error)
        reason = brief(error) if isinstance(error, Error) else _one_line(str(error))
        if broken:
            reason = f"its ClientApp can't be run: {reason}"
        earlier = self._of.get(node)
        if earlier is None or earlier.reason != reason:
            logger.warning("node %d is left out: %s", node, reason)
        pause = min(2 * earlier.pause, _LONGEST_PAUSE) if earlier else _FIRST_PAUSE
        self._of[node] = _Refusal(
            reason, broken, pause, time.monotonic() + (0.0 if at_once else pause)
        )

    def forget(self, node: int) -> None:
        """Forget that a node could not take part: it can."""
        self._of.pop(node, None)

    def keep_only(self, nodes: Collection[int]) -> None:
        """Forget nodes that are not connected any more."""
        self._of = {node: one for node, one in self._of.items() if node in nodes}

    def ask_at_once(self) -> None:
        """Let all nodes be asked again, as where a new session begins."""
        for one in self._of.values():
            one.again = 0.0

    def due(self, nodes: Collection[int]) -> list[int]:
        """Return which of these nodes may be asked now, in their order by id."""
        now = time.monotonic()
        return [n for n in sorted(nodes) if n not in self._of or self._of[n].again <= now]

    def all_broken(self) -> bool:
        """Tell whether there are nodes here, and all because they can't run the ClientApp."""
        return bool(self._of) and all(one.broken for one in self._of.values())

    def told(self) -> str:
        """Return the reasons, each with the first node that gave it, and how many did."""
        by_reason: dict[str, list[int]] = {}
        for node, one in self._of.items():
            by_reason.setdefault(one.reason, []).append(node)
        named = [
            f"node {nodes[0]}{f' and {len(nodes) - 1} more' if nodes[1:] else ''}: {reason}"
            for reason, nodes in list(by_reason.items())[:_MOST_NAMED]
        ]
        return "; ".join([*named, *(["…"] if len(by_reason) > _MOST_NAMED else [])])

    def broken_app(self) -> BrokenAppError:
        """Return the error that ends a run of which no node can run the ClientApp."""
        return BrokenAppError(
            f"no node can run the ClientApp: {self.told()} (each SuperNode's log says all of it)"
        )


def is_broken(error: Error) -> bool:
    """Tell whether the ClientApp could not run at all; flsplit's own handlers answer otherwise."""
    if error.code == CLIENT_RAISED:
        return bool(_UNCAUGHT.fullmatch((error.reason or "").strip()))
    return error.code in APP_ERRORS


def brief(error: Error) -> str:
    """Return an Error's reason in one short line.

    Where Ray is in between, Flower hands on a whole traceback, whose end says what happened.
    """
    reason = without_colours(error.reason or "no reason given").strip()  # Ray's
    if error.code == NODE_AWAY or not (uncaught := _UNCAUGHT.fullmatch(reason)):
        return _one_line(reason)
    kind, text = uncaught.groups()
    if "Traceback (most recent call last)" not in text:
        return _one_line(f"{kind.rpartition('.')[2]}: {text}")
    last = text.strip().splitlines()[-1]
    place = _PLACE.findall(text)[-1:]
    return _one_line(last + "".join(f" ({file}, line {line})" for file, line in place))


def _one_line(text: str) -> str:
    return shortened(" ".join(text.split()), _LONGEST_REASON)
