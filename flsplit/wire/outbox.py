"""What waits to be sent on one stream."""

import threading
from collections import deque
from collections.abc import Iterable, Iterator

from flsplit.wire.bundles import bundled
from flsplit.wire.wire_errors import StreamEnded

DEFAULT_MAX_QUEUED_BYTES = 64 * 2**20


class Outbox:
    """A queue of messages, bounded by their bytes, that one thread fills and gRPC empties.

    One message is always let in, however long it is.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Iterable[bytes], int]] = deque()
        self._bytes = 0
        self._open = True
        self._dropped = False
        self._reason = ""

    def put(self, frames: Iterable[bytes], size: int, timeout: float | None = None) -> None:
        """Add a message, waiting until there is room.

        StreamEnded if the stream is over, or ends while this waits. TimeoutError if there is no
        room within `timeout` seconds.
        """
        with self._changed:
            if not self._has_room(size) and not self._changed.wait_for(
                lambda: self._has_room(size), timeout
            ):
                raise TimeoutError(
                    f"the other side has not taken what waits for it ({self._bytes} bytes) "
                    f"within {timeout} s"
                )
            if not self._open:
                raise StreamEnded(self._reason)
            self._waiting.append((frames, size))
            self._bytes += size
            self._changed.notify_all()

    def finish(self, reason: str, last: bytes | None = None) -> None:
        """Take nothing more but one last frame; what waits is still sent."""
        with self._changed:
            if self._open and last is not None:
                self._waiting.append(([last], 0))
        self._close(reason, drop=False)

    def drop(self, reason: str) -> None:
        """Take nothing more and forget what waits."""
        self._close(reason, drop=True)

    def payloads(self) -> Iterator[bytes]:
        """Yield what gRPC is to send until the end; it asks when the one before has left."""
        return bundled(self._frames(), lambda: bool(self._waiting))

    def _frames(self) -> Iterator[bytes]:
        while (item := self._next()) is not None:
            frames, size = item
            for frame in frames:
                if self._dropped:
                    return
                yield frame
            self._sent(size)

    def _close(self, reason: str, *, drop: bool) -> None:
        with self._changed:
            if self._open:
                self._open, self._reason = False, reason
            if drop:
                self._dropped = True
                self._waiting.clear()
            self._changed.notify_all()

    def _has_room(self, size: int) -> bool:
        return not self._open or not self._bytes or self._bytes + size <= self._max_bytes

    def _next(self) -> tuple[Iterable[bytes], int] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or not self._open)
            return self._waiting.popleft() if self._waiting else None

    def _sent(self, size: int) -> None:
        with self._changed:
            self._bytes -= size
            self._changed.notify_all()
