"""A round of local steps in parts, of which several are on their way at a time."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping

from flsplit.message.local_steps import LocalReply, LocalRequest
from flsplit.run.round import Round
from flsplit.server.clients import Sent

AHEAD = 4  # parts: a client with one more to do never waits for the server to take the last one

NextRequest = Callable[[int, LocalReply], LocalRequest]
"""Takes the next step and a client's first reply."""


class FurtherParts:
    """Asks for the local steps after the first part, and yields the clients' replies in order.

    The order is part by part, and by client within a part. A reply is yielded as soon as it and
    those before it are there, whatever the clients after it are at. Requests are sent before the
    ones before them are answered. What a client may be ahead of the server is bounded, and so is
    what piles up at the server.
    """

    def __init__(
        self, round_: Round, first: Mapping[str, LocalReply], request: NextRequest
    ) -> None:
        self._round, self._request = round_, request
        self._first = first
        self._asked = {name: reply.steps_done for name, reply in first.items()}
        self._sent: dict[str, deque[Sent]] = {name: deque() for name in first}
        for _ in range(AHEAD):  # a host that serves many clients works in the order of requests
            for name in first:
                self._send(name)

    def __iter__(self) -> Iterator[dict[str, LocalReply]]:
        """Yield a client's reply; all clients are at work on the next parts meanwhile."""
        while any(self._sent.values()):
            for name, sent in self._sent.items():
                if sent:
                    yield self._receive(name)

    def _receive(self, name: str) -> dict[str, LocalReply]:
        """Return a client's next reply, none if it is left out, and ask for one more part."""
        replies = self._round.receive_local(self._sent[name].popleft())
        if name in replies:
            self._send(name)
        return replies

    def _send(self, name: str) -> None:
        step, first = self._asked[name], self._first[name]
        if step < first.num_steps:
            request = self._request(step, first)
            self._asked[name] = request.end(first.num_steps)
            self._sent[name].append(self._round.send_local({name: request}))
