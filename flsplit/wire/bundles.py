"""Bundles: short frames that travel together, since every gRPC message costs time of its own."""

import struct
from collections.abc import Callable, Iterator

from flsplit.wire.wire_errors import Told, WireError

BUNDLE = 4
"""The kind of a bundle, as the kinds of frames are."""

SHORT_BYTES = 64 * 2**10
"""The longest frame that goes into a bundle."""

BUNDLE_BYTES = 2**20
"""A bundle that is so long is sent, whatever still waits."""

_LENGTH = struct.Struct(">I")
_BUNDLE_BYTE = bytes([BUNDLE])


def bundled(frames: Iterator[bytes], more_wait: Callable[[], bool]) -> Iterator[bytes]:
    """Yield frames in their order, short ones in bundles while more of them wait already.

    Asking for the next frame may take long when none wait.
    """
    short: list[bytes] = []
    size = 0
    for frame in frames:
        if len(frame) <= SHORT_BYTES:
            short.append(frame)
            size += len(frame)
            if size < BUNDLE_BYTES and more_wait():
                continue
            yield _tie(short)
        else:
            if short:
                yield _tie(short)
            yield frame
        short, size = [], 0
    if short:
        yield _tie(short)


def unbundled(payload: bytes) -> Iterator[bytes]:
    """Yield the frames in what one gRPC message holds.

    WireError if it is a bundle whose lengths do not fit.
    """
    if payload[:1] != _BUNDLE_BYTE:
        yield payload
        return
    start = 1
    while start < len(payload):
        end = start + _LENGTH.size
        if end > len(payload):
            raise WireError("bundle", "a length of 4 bytes", Told(f"{len(payload) - start} bytes"))
        (length,) = _LENGTH.unpack_from(payload, start)
        start, end = end, end + length
        if length > SHORT_BYTES or end > len(payload):
            expected = f"at most {SHORT_BYTES} and the {len(payload) - start} that are left"
            raise WireError("bundle.length", expected, length)
        yield payload[start:end]
        start = end


def _tie(frames: list[bytes]) -> bytes:
    if len(frames) == 1:
        return frames[0]
    pieces = [_BUNDLE_BYTE]
    for frame in frames:
        pieces += [_LENGTH.pack(len(frame)), frame]
    return b"".join(pieces)
