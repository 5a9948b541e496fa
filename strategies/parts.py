"""A round of local steps in parts, of which several are on their way at a time."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping

from flsplit.message.local import LocalReply, LocalRequest
from flsplit.server.clients import Sent
from flsplit.strategies.round import Round

AHEAD = 4  # parts: a client with one more to do never waits for the server to take the last one

NextRequest = Callable[[int, int], LocalRequest]
"""Takes the next step and a client's number of steps."""


class FurtherParts:
    """Asks for the local steps after the first part, and yields the clients' replies in order.

    Requests are sent before the ones before them are answered. What a client may be ahead of the
    server is bounded, and so is what piles up at the server.

    Parameters
    ----------
    round_ : Round
        The round.
    first : mapping of str to LocalReply
        The replies to its first part.
    request : callable
        Makes a request.
    """

    def __init__(
        self, round_: Round, first: Mapping[str, LocalReply], request: NextRequest
    ) -> None:
        self._round, self._request = round_, request
        self._num_steps = {name: reply.num_steps for name, reply in first.items()}
        self._asked = {name: reply.steps_done for name, reply in first.items()}
        self._sent: deque[Sent] = deque()
        self._send()

    def __iter__(self) -> Iterator[dict[str, LocalReply]]:
        """Yield a part's replies; the clients are at work on the next parts meanwhile."""
        while self._sent:
            sent = self._sent.popleft()
            replies = self._round.receive_local(sent)
            for name in sent.requests.keys() - replies.keys():
                self._asked.pop(name, None)
            self._send()
            yield replies

    def _send(self) -> None:
        while len(self._sent) < AHEAD:
            requests = {
                name: self._request(step, self._num_steps[name])
                for name, step in self._asked.items()
                if step < self._num_steps[name]
            }
            if not requests:
                return
            self._asked |= {n: one.end(self._num_steps[n]) for n, one in requests.items()}
            self._sent.append(self._round.send_local(requests))
