import copy
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flsplit.wire import Decoder, Envelope, WireError, encode
from flsplit.wire.frames import (
    FIRST,
    FIRST_PREFIX,
    FRAME_BYTES,
    MAX_HELLO_BYTES,
    MORE,
    SHORTEST_UNFINISHED,
    read_goodbye,
    read_hello,
    write_goodbye,
    write_hello,
)

from .peers import make_tensor_message

MAX_BYTES = 2**20
ENVELOPE = Envelope("client-0", 4, 1, "step")
MORE_BYTE = bytes([MORE])


def make_frame():
    return next(encode(ENVELOPE, make_tensor_message()).frames())


def split(frame):
    end = FIRST_PREFIX.size + FIRST_PREFIX.unpack_from(frame)[1]
    return json.loads(frame[FIRST_PREFIX.size : end]), frame[end:]


def join(header, payload=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return FIRST_PREFIX.pack(FIRST, len(text)) + text + payload


def refusal(*frames, **limits):
    decoder = Decoder(**({"max_bytes": MAX_BYTES} | limits))
    *sound, wrong = frames
    for frame in sound:
        assert decoder.add(frame) is None
    with pytest.raises(WireError) as caught:
        decoder.add(wrong)
    with pytest.raises(WireError, match="after an error"):
        decoder.add(make_frame())
    return caught.value


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("envelope", 3, "envelope"),
        ("envelope.client", 3, "envelope.client"),
        ("envelope.sequence", -1, "envelope.sequence"),
        ("envelope.epoch", True, "envelope.epoch"),
        ("envelope.epoch", 1.0, "envelope.epoch"),
        ("envelope.extra", 1, "envelope"),
        ("metadata.run_id", "1", "metadata.run_id"),
        ("metadata.ttl", None, "metadata.ttl"),
        ("metadata.ttl", 10**400, "metadata.ttl"),
        ("metadata.message_type", "explode", "metadata.message_type"),
        ("extra", 1, "header"),
        ("error", {"code": 1, "reason": None}, "header"),
        ("records", {}, "records"),
        ("records.0", ["smashed", "arrays"], "records[0]"),
        ("records.0.1", "pickles", "records[0].kind"),
        ("records.0.1", [], "records[0].kind"),
        ("records.1.0", "smashed", "records[1].name"),
        ("records.0.2.0", ["x", "uint8", [8], "raw"], "records[0].entries[0]"),
        ("records.0.2.0.1", 8, "records[0].entries[0].dtype"),
        ("records.0.2.0.2", [-8], "records[0].entries[0].shape"),
        ("records.0.2.0.2", [1.5], "records[0].entries[0].shape"),
        ("records.0.2.0.2", [1] * 65, "records[0].entries[0].shape"),
        ("records.0.2.0.4", -1, "records[0].entries[0].size"),
        ("records.0.2.0.4", 2**62, "message"),
        ("records.0.2.0.4", 2**70, "records[0].entries[0].size"),
        ("records.0.2.0.4", 7, "frame"),
        ("records.1.2.0.1", "complex", "records[1].entries[0].type"),
        ("records.1.2.0.1", {}, "records[1].entries[0].type"),
        ("records.1.2.0.2", "3ff", "records[1].entries[0].value"),
        ("records.1.2.0.2", "3FF0000000000000", "records[1].entries[0].value"),
        ("records.1.2.0.2", 1.5, "records[1].entries[0].value"),
        ("records.1.2.2.2", 1, "records[1].entries[2].value"),
        ("records.1.2.1.0", "lr", "records[1].entries[1].key"),
        ("records.2.2.0.1", "str", "records[2].entries[0].type"),
        ("records.2.2.1.2", [], "records[2].entries[1].value"),
        ("records.2.2.1.2", [True], "records[2].entries[1].value"),
        ("records.2.2.1.2", [2**64], "records[2].entries[1].value"),
    ],
)
def test_a_wrong_field_is_named(path, value, field):
    header, payload = split(make_frame())
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    at = header
    for part in parents:
        at = at[part]
    at[last] = value
    error = refusal(join(header, payload))
    assert error.field == field
    assert error.expected in str(error)


@pytest.mark.parametrize("key", ["envelope", "metadata", "records"])
def test_a_missing_field_is_named(key):
    header, payload = split(make_frame())
    del header[key]
    assert key in str(refusal(join(header, payload)))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"a":1,"a":2}',
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a":' + b"9" * 10_000 + b"}",
    ],
)
def test_a_header_that_is_no_strict_json_is_refused(text):
    refusal(join(text))


def test_frames_that_do_not_fit_are_refused():
    frame = make_frame()
    assert refusal(b"").field == "frame"
    assert refusal(frame[:3]).field == "frame"
    assert refusal(frame[:40]).field == "frame"
    assert refusal(b"\x09" + frame[1:]).field == "frame.kind"
    assert refusal(MORE_BYTE + b"x").field == "frame.kind"
    assert refusal(frame + b"x").got == "1 more bytes"
    assert refusal(bytes(FRAME_BYTES + 1)).field == "frame"
    assert refusal(frame, max_header_bytes=100).field == "frame.header_length"
    assert refusal(frame, max_bytes=200).field == "message"


def test_a_message_must_go_on_as_it_began():
    header, _ = split(make_frame())
    header["records"][0][2][0][4] = 5 * SHORTEST_UNFINISHED
    first = join(header, bytes(SHORTEST_UNFINISHED))
    assert refusal(first, first).field == "frame.kind"
    assert refusal(first, MORE_BYTE + bytes(5 * SHORTEST_UNFINISHED)).field == "frame"
    # Crumbs would cost more memory than their content.
    assert "at least 65536" in str(refusal(first, MORE_BYTE + b"crumb"))
    assert "at least 65536" in str(refusal(join(header)))
    assert "at least 65536" in str(refusal(first, MORE_BYTE))


def test_nothing_is_allocated_for_what_is_only_announced():
    header, _ = split(make_frame())
    header["records"][0][2][0][4] = 2**29
    frame = join(header, bytes(SHORTEST_UNFINISHED))
    tracemalloc.start()
    try:
        assert Decoder(max_bytes=2**30).add(frame) is None
        assert tracemalloc.get_traced_memory()[1] < 10 * SHORTEST_UNFINISHED
    finally:
        tracemalloc.stop()


def test_memory_is_bounded_while_a_message_arrives():
    data = bytes(40 * 2**20)
    frames = list(encode(ENVELOPE, make_tensor_message(data)).frames())
    decoder = Decoder()
    tracemalloc.start()
    try:
        arrived = None
        while frames:
            arrived = decoder.add(frames.pop(0)) or arrived
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert arrived is not None
    # The frames were made before, so this is the one copy that joins them.
    assert peak < 1.1 * len(data)


def mutate(rng, frame):
    """Return a frame that is damaged a little, or a lot."""
    raw = bytearray(frame)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(raw)) if raw else 0
        match rng.randrange(5):
            case 0:
                raw[at : at + 1] = rng.randbytes(1)
            case 1:
                del raw[at : at + rng.randrange(1, 20)]
            case 2:
                raw[at:at] = rng.choice((b"[", b'"', b"{", b"-1", b"1e9", b"null", b",", b"\x00"))
            case 3:
                del raw[at:]
            case 4:
                raw[at:at] = raw[at : at + rng.randrange(1, 60)]
    return bytes(raw)


def mutate_tree(rng, frame):
    """Return a frame whose header is sound JSON with one value replaced."""
    header, payload = split(frame)
    at = header
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = rng.choice(keys)
        if isinstance(at[key], dict | list) and at[key] and rng.random() < 0.8:
            at = at[key]
            continue
        odd = (None, True, -1, 0, 2**63, 1.5, "", "int[]", [], {}, [[]], [1], "7ff0000000000000")
        at[key] = copy.copy(rng.choice(odd))
        return join(header, payload)


# Together ten thousand; with the profile "thorough" one hundred thousand.
EXAMPLES, MUTATIONS = settings.default.max_examples // 10, 1000


@pytest.mark.chaos(
    "any damaged message",
    "it is taken or refused, in bounded memory",
)
@settings(max_examples=EXAMPLES, deadline=None)
@given(st.randoms(use_true_random=True))
def test_mutations_are_taken_or_refused_within_bounded_memory(rng):
    sound, taken = make_frame(), 0
    tracemalloc.start()
    try:
        for number in range(MUTATIONS):
            change = mutate if number % 4 else mutate_tree
            try:
                Decoder(max_bytes=MAX_BYTES).add(change(rng, sound))
            except WireError:
                continue
            taken += 1
        assert tracemalloc.get_traced_memory()[1] < MAX_BYTES
    finally:
        tracemalloc.stop()
    assert 0 < taken < MUTATIONS


@pytest.mark.parametrize("filling", [b"[],", b"{},", b'"",', b"0,", b"[[[[]]]],"])
def test_a_hostile_header_costs_a_bounded_multiple_of_its_length(filling):
    text = b"[" + filling * (200_000 // len(filling)) + b"0]"
    tracemalloc.start()
    try:
        refusal(join(text))
        assert tracemalloc.get_traced_memory()[1] < 40 * len(text)
    finally:
        tracemalloc.stop()


def test_hello():
    hello = {"version": "0.1.0", "clients": ["a", "b"], "n": 3}
    assert read_hello(write_hello(hello)) == hello
    for wrong in (b"", b"\x01{}", b"\x00[]", b"\x00{", b"\x00" + b" " * MAX_HELLO_BYTES + b"{}"):
        with pytest.raises(WireError):
            read_hello(wrong)
    for wrong in ({"a": object()}, {"a": float("nan")}, {"a": "x" * MAX_HELLO_BYTES}):
        with pytest.raises(WireError, match="hello"):
            write_hello(wrong)


def test_goodbye():
    assert read_goodbye(write_goodbye("no more dätä")) == "no more dätä"
    assert read_goodbye(write_goodbye("ä" * 1000)) == "ä" * 250
    assert read_goodbye(write_goodbye("\udc80")) == "?"
    assert read_goodbye(make_frame()) is None
    assert read_goodbye(b"\x03\xff") == "\ufffd"
    with pytest.raises(WireError, match="at most 500 bytes"):
        read_goodbye(b"\x03" + b"x" * 501)


def test_a_key_that_stands_twice_is_refused_wherever_it_stands():
    # A decoder that lets the last one win would take these.
    text = json.dumps(split(make_frame())[0])
    for key in ("envelope", "epoch", "ttl", "records"):
        value = json.dumps(json.loads(text).get(key, 5))
        twice = text.replace(f'"{key}":', f'"{key}": {value}, "{key}":')
        error = refusal(join(twice.encode()))
        assert (error.field, error.expected, error.got) == ("object", "each key once", repr(key))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"ttl": 1e999', "metadata.ttl: expected `float` <= 1.797"),
        ('"ttl": "5"', "metadata.ttl: expected `float`, got '5'"),
        ('"ttl": true', "metadata.ttl: expected `float`, got True"),
        ('"TTL": 5', "metadata: expected"),
    ],
)
def test_an_error_says_what_was_expected_and_what_came(text, expected):
    header, payload = split(make_frame())
    sound = json.dumps(header)
    assert '"ttl": 3600.5' in sound
    error = refusal(join(sound.replace('"ttl": 3600.5', text).encode(), payload))
    assert expected in str(error)


def test_a_header_has_records_or_an_error():
    header, payload = split(make_frame())
    for change in ({"records": None}, {"error": None}, {"error": {"code": 1, "reason": None}}):
        assert refusal(join(header | change, payload)).field in ("records", "error", "header")
    del header["records"]
    assert refusal(join(header)).got == "neither"
