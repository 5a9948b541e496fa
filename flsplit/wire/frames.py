"""Frames: how a message is cut into pieces for the stream, and put together again."""

import json
import struct
from collections import deque
from collections.abc import Iterator
from typing import Any

from flsplit.wire.strict import parse_json
from flsplit.wire.wire_errors import Told, WireError

FRAME_BYTES = 8 * 2**20
"""The longest frame, with everything in it."""

SHORTEST_UNFINISHED = 64 * 2**10
"""The shortest frame that may leave its message unfinished.

Every piece costs the receiver some memory of its own; crumbs would cost it more than their content.
"""

MAX_HELLO_BYTES = 64 * 2**10
MAX_REASON_BYTES = 500

HELLO = 0
FIRST = 1
MORE = 2
GOODBYE = 3

FIRST_PREFIX = struct.Struct(">BI")
"""The kind and the length of the header that follows."""

_HELLO_BYTE = bytes([HELLO])
_MORE_BYTE = bytes([MORE])
_GOODBYE_BYTE = bytes([GOODBYE])


def cut(header: bytes, segments: list[bytes], frame_bytes: int = FRAME_BYTES) -> Iterator[bytes]:
    """Yield the frames of one message.

    Each frame is made when it is asked for, so a long message is never in memory twice.

    The header must leave room in the first frame.
    """
    pieces: list[bytes | memoryview] = [FIRST_PREFIX.pack(FIRST, len(header)), header]
    room = frame_bytes - FIRST_PREFIX.size - len(header)
    for segment in segments:
        view = memoryview(segment)
        while view:
            if not room:
                yield b"".join(pieces)
                pieces, room = [_MORE_BYTE], frame_bytes - len(_MORE_BYTE)
            piece, view = view[:room], view[room:]
            pieces.append(piece)
            room -= len(piece)
    yield b"".join(pieces)


def split_first(frame: bytes, max_header_bytes: int) -> tuple[bytes, memoryview]:
    """Return the header in the first frame of a message and what follows it."""
    if len(frame) < FIRST_PREFIX.size:
        raise WireError("frame", f"at least {FIRST_PREFIX.size} bytes", Told(_length(frame)))
    _, length = FIRST_PREFIX.unpack_from(frame)
    if length > max_header_bytes:
        raise WireError("frame.header_length", f"at most {max_header_bytes}", length)
    end = FIRST_PREFIX.size + length
    if end > len(frame):
        raise WireError("frame", f"a header of {length} bytes", Told(_length(frame)))
    return frame[FIRST_PREFIX.size : end], memoryview(frame)[end:]


def write_hello(hello: dict[str, Any]) -> bytes:
    """Return the frame with which a host introduces itself."""
    try:
        text = json.dumps(hello, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise WireError("hello", "an object that JSON can hold", Told(str(error))) from error
    frame = _HELLO_BYTE + text.encode()
    read_hello(frame)
    return frame


def read_hello(frame: bytes) -> dict[str, Any]:
    """Return what a host says of itself in its first frame."""
    if frame[:1] != _HELLO_BYTE:
        raise WireError("frame.kind", f"{HELLO} (hello)", frame[:1])
    if len(frame) > MAX_HELLO_BYTES:
        raise WireError("hello", f"at most {MAX_HELLO_BYTES} bytes", Told(_length(frame)))
    hello = parse_json("hello", frame[1:])
    if not isinstance(hello, dict):
        raise WireError("hello", "an object", hello)
    return hello


def write_goodbye(reason: str) -> bytes:
    """Return the frame with which a host ends its stream.

    Without it, gRPC shows the server the same end whether a host has closed its stream or died.
    """
    return _GOODBYE_BYTE + shorten_reason(reason)


def read_goodbye(frame: bytes) -> str | None:
    """Return a host's reason for ending its stream, or None if this is another frame."""
    if frame[:1] != _GOODBYE_BYTE:
        return None
    if len(frame) > 1 + MAX_REASON_BYTES:
        raise WireError("goodbye", f"at most {MAX_REASON_BYTES} bytes", Told(_length(frame)))
    return frame[1:].decode("utf-8", "replace")


def shorten_reason(reason: str) -> bytes:
    """Return the beginning of a reason, in as much UTF-8 as may be sent."""
    whole = reason.encode("utf-8", "replace")[:MAX_REASON_BYTES]
    return whole.decode("utf-8", "ignore").encode()


def segments_of(pieces: deque[memoryview], sizes: list[int]) -> Iterator[bytes]:
    """Yield the segments of a message, with one copy of every byte; `pieces` are let go of."""
    for size in sizes:
        parts: list[memoryview] = []
        while size:
            piece = pieces.popleft()
            parts.append(piece[:size])
            if len(piece) > size:
                pieces.appendleft(piece[size:])
            size -= len(parts[-1])
        yield b"".join(parts)


def _length(frame: bytes) -> str:
    return f"{len(frame)} bytes"
