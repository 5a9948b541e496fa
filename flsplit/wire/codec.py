"""Messages to frames and back."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from flwr.app import Message

from flsplit.wire.frames import (
    FIRST,
    FRAME_BYTES,
    MORE,
    SHORTEST_UNFINISHED,
    cut,
    segments_of,
    split_first,
)
from flsplit.wire.header import CheckedHeader, Envelope, read_header, write_header
from flsplit.wire.wire_errors import Told, WireError

MAX_HEADER_BYTES = 4 * 2**20
"""The longest header. Parsed JSON takes up to some 40 times its length in memory."""

DEFAULT_MAX_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Parcel:
    """A message made ready to be sent."""

    header: bytes  # the JSON header
    segments: list[bytes]  # the raw bytes that follow it; those of the message itself, not copies

    @property
    def size(self) -> int:
        """The bytes of header and segments, which is what `max_bytes` limits."""
        return len(self.header) + sum(map(len, self.segments))

    def frames(self) -> Iterator[bytes]:
        """Yield the frames, each made when it is asked for."""
        return cut(self.header, self.segments)


def encode(envelope: Envelope, message: Message, max_bytes: int = DEFAULT_MAX_BYTES) -> Parcel:
    """Make a message ready to be sent.

    What it holds is taken down at once: later changes to the message are not sent.

    WireError if the message holds something that the format cannot carry, or is too long.
    """
    parcel = Parcel(*write_header(envelope, message))
    _check_length("header", len(parcel.header), MAX_HEADER_BYTES)
    _check_length("message", parcel.size, max_bytes)
    return parcel


class Decoder:
    """Takes the frames of a stream one by one and gives back its messages.

    Everything is checked on arrival, and a message costs no more memory than twice what has arrived
    of it. After an error the stream has lost its place, so the decoder takes nothing more.
    """

    def __init__(
        self, max_bytes: int = DEFAULT_MAX_BYTES, max_header_bytes: int = MAX_HEADER_BYTES
    ) -> None:
        self._max_bytes = max_bytes
        self._max_header_bytes = max_header_bytes
        self._plan: CheckedHeader | None = None
        self._failed = False

    @property
    def idle(self) -> bool:
        """Whether the next frame begins a message."""
        return self._plan is None

    def add(self, frame: bytes) -> tuple[Envelope, Message, int] | None:
        """Take one frame; return envelope, message and its size once it is complete.

        WireError if the frame does not fit, naming the field, what was expected and what came.
        """
        if self._failed:
            raise WireError("frame", "none after an error", Told("another frame"))
        try:
            return self._add(frame)
        except WireError:
            self._failed = True
            self._plan = None
            raise

    def _add(self, frame: bytes) -> tuple[Envelope, Message, int] | None:
        _check_frame(frame, FIRST if self._plan is None else MORE)
        piece = memoryview(frame)[1:]
        if self._plan is None:
            header, piece = split_first(frame, self._max_header_bytes)
            plan = read_header(header)
            self._missing = sum(plan.sizes)
            self._size = len(header) + self._missing
            _check_length("message", self._size, self._max_bytes)
            self._plan, self._pieces = plan, deque[memoryview]()
        if len(piece) > self._missing:
            more = len(piece) - self._missing
            raise WireError("frame", "the end of the message", Told(f"{more} more bytes"))
        self._pieces.append(piece)
        self._missing -= len(piece)
        if self._missing:
            _check_filled(frame)
            return None
        plan, pieces = self._plan, self._pieces
        self._plan, self._pieces = None, deque()
        return plan.envelope, plan.build(segments_of(pieces, plan.sizes)), self._size


def _check_frame(frame: bytes, kind: int) -> None:
    if type(frame) is not bytes:
        raise WireError("frame", "bytes", Told(type(frame).__name__))
    if not 0 < len(frame) <= FRAME_BYTES:
        raise WireError("frame", f"1 to {FRAME_BYTES} bytes", Told(f"{len(frame)} bytes"))
    if frame[0] != kind:
        name = "the first of a message" if kind == FIRST else "one that goes on with a message"
        raise WireError("frame.kind", f"{kind} ({name})", frame[0])


def _check_filled(frame: bytes) -> None:
    if len(frame) < SHORTEST_UNFINISHED:
        expected = f"the rest of the message, or at least {SHORTEST_UNFINISHED} bytes of it"
        raise WireError("frame", expected, Told(f"{len(frame)} bytes"))


def _check_length(field: str, length: int, most: int) -> None:
    if length > most:
        raise WireError(field, f"at most {most} bytes", Told(f"{length} bytes"))
