"""Short frames that wait together travel together."""

import random

import pytest
from flwr.app import Message
from hypothesis import given
from hypothesis import strategies as st

from flsplit.wire import Decoder, Envelope, WireError, encode
from flsplit.wire.bundles import BUNDLE, BUNDLE_BYTES, SHORT_BYTES, bundled, unbundled
from flsplit.wire.outbox import Outbox

from .peers import make_tensor_message

SHORT = st.binary(min_size=1, max_size=20).map(lambda data: b"\1" + data)
LONG = st.integers(1, 9).map(lambda fill: b"\1" + bytes([fill]) * SHORT_BYTES)


def length(number):
    return number.to_bytes(4, "big")


@given(st.lists(st.tuples(st.one_of(SHORT, LONG), st.booleans()), max_size=12))
def test_what_was_bundled_comes_out_in_order(items):
    """However the next frame may already wait or not."""
    waits = iter([waits for _, waits in items])
    frames = [frame for frame, _ in items]

    payloads = list(bundled(iter(frames), lambda: next(waits)))
    assert [frame for payload in payloads for frame in unbundled(payload)] == frames


def test_frames_that_wait_make_one_payload_and_others_their_own():
    outbox = Outbox(2**20)
    for number in (1, 2, 3):
        outbox.put([b"\1" + bytes([number])], 2)
    payloads = outbox.payloads()
    bundle = next(payloads)
    assert bundle == bytes([BUNDLE]) + b"".join(length(2) + b"\1" + bytes([n]) for n in (1, 2, 3))
    outbox.put([b"\1alone"], 6)
    assert next(payloads) == b"\1alone"
    outbox.finish("done")
    assert list(payloads) == []


def test_long_frames_travel_alone_and_bundles_have_a_limit():
    long, short = b"\1" * (SHORT_BYTES + 1), b"\1" * SHORT_BYTES
    assert list(bundled(iter([long, long]), lambda: True)) == [long, long]
    payloads = list(bundled(iter([short] * 40), lambda: True))
    assert len(payloads) == 3
    assert all(len(payload) < BUNDLE_BYTES + 2 * SHORT_BYTES for payload in payloads)


@pytest.mark.parametrize(
    ("rest", "why"),
    [
        (b"\0\0", "bundle: expected a length of 4 bytes, got 2 bytes"),
        (length(3) + b"ab", "bundle.length: expected at most 65536 and the 2 that are left, got 3"),
        (length(2**31), "bundle.length: expected at most 65536"),
        (length(SHORT_BYTES + 1) + bytes(SHORT_BYTES + 1), "bundle.length: expected at most 65536"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(rest, why):
    with pytest.raises(WireError) as caught:
        list(unbundled(bytes([BUNDLE]) + rest))
    assert why in str(caught.value)


def test_a_bundle_in_a_bundle_is_refused():
    inner = bytes([BUNDLE]) + length(1) + b"\1"
    (frame,) = unbundled(bytes([BUNDLE]) + length(len(inner)) + inner)
    with pytest.raises(WireError, match=r"frame.kind: expected 1"):
        Decoder().add(frame)


def test_mutated_bundles_give_messages_or_an_error():
    frames = [next(encode(Envelope("a", n, 0), make_tensor_message()).frames()) for n in range(3)]
    (bundle,) = bundled(iter(frames), iter([True, True, False]).__next__)
    rng = random.Random(0)
    refused = 0
    for _ in range(3_000):
        mutated = bytearray(bundle)
        for _ in range(rng.randint(1, 4)):
            mutated[rng.randrange(1, len(mutated))] = rng.randrange(256)
        decoder = Decoder(2**20)
        try:
            arrived = [decoder.add(frame) for frame in unbundled(bytes(mutated))]
        except WireError:
            refused += 1
        else:
            assert all(one is None or isinstance(one[1], Message) for one in arrived)
    assert 0 < refused <= 3_000
