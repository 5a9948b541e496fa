import math
import struct

import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    MetricRecord,
    RecordDict,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from flsplit.wire import Decoder, Envelope, WireError, encode, make_message
from flsplit.wire.frames import FRAME_BYTES, cut

from .peers import make_metadata, make_tensor_message

ENVELOPE = Envelope("client-0", 4, 1, "step")
INTS = st.integers(-(2**63), 2**64 - 1)
FLOATS = st.integers(0, 2**64 - 1).map(lambda bits: struct.unpack(">d", bits.to_bytes(8))[0])
TEXT = st.text(max_size=8)
BYTES = st.binary(max_size=20)


def lists(values):
    return st.lists(values, max_size=4)


ARRAYS = st.builds(
    Array,
    dtype=TEXT,
    shape=st.lists(st.integers(0, 2**40), max_size=4).map(tuple),
    stype=st.sampled_from(["flsplit.raw", "numpy.ndarray"]),
    data=st.binary(max_size=200),
)
METRICS = INTS | FLOATS | lists(INTS) | lists(FLOATS)
CONFIGS = METRICS | TEXT | BYTES | st.booleans() | lists(TEXT) | lists(BYTES) | lists(st.booleans())
RECORDS = (
    st.dictionaries(TEXT, ARRAYS, max_size=4).map(ArrayRecord)
    | st.dictionaries(TEXT, METRICS, max_size=4).map(MetricRecord)
    | st.dictionaries(TEXT, CONFIGS, max_size=4).map(ConfigRecord)
)
CONTENTS = st.dictionaries(TEXT, RECORDS, max_size=4).map(RecordDict)


def pass_on(message, envelope=ENVELOPE):
    decoder = Decoder()
    arrived = None
    for frame in encode(envelope, message).frames():
        assert arrived is None
        arrived = decoder.add(frame)
    assert arrived is not None
    assert decoder.idle
    return arrived


def exact(value):
    """What `==` cannot see: types, and the bits of floats."""
    if isinstance(value, list):
        return [exact(item) for item in value]
    return type(value), struct.pack(">d", value) if isinstance(value, float) else value


def exact_record(record):
    if isinstance(record, ArrayRecord):
        return [(key, a.dtype, a.shape, a.stype, a.data) for key, a in record.items()]
    return [(key, exact(value)) for key, value in record.items()]


@settings(deadline=None)
@given(CONTENTS, st.builds(Envelope, TEXT, st.integers(0, 2**64 - 1), st.integers(0, 99), TEXT))
def test_content_survives_to_the_last_bit(content, envelope):
    message = make_message(make_metadata(), content=content)
    found, arrived, _ = pass_on(message, envelope)
    assert found == envelope
    assert arrived.metadata == message.metadata
    assert list(arrived.content) == list(content)
    for name, record in content.items():
        assert type(arrived.content[name]) is type(record)
        assert exact_record(arrived.content[name]) == exact_record(record)


@given(st.integers(-100, 1000), st.none() | TEXT)
def test_errors_survive(code, reason):
    _, arrived, _ = pass_on(make_message(make_metadata(), error=Error(code, reason)))
    assert not arrived.has_content()
    assert arrived.error == Error(code, reason)


@settings(deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=6), st.integers(20, 200))
def test_cutting_loses_nothing(segments, frame_bytes):
    frames = list(cut(b"header", segments, frame_bytes))
    assert all(len(frame) == frame_bytes for frame in frames[:-1])
    assert len(frames[-1]) <= frame_bytes
    payload = frames[0][11:] + b"".join(frame[1:] for frame in frames[1:])
    assert payload == b"".join(segments)


def test_a_long_array_takes_several_frames():
    data = bytes(range(256)) * (FRAME_BYTES // 100)
    message = make_tensor_message(data)
    parcel = encode(ENVELOPE, message)
    assert [len(frame) for frame in parcel.frames()][:-1] == [FRAME_BYTES] * 2
    _, arrived, size = pass_on(message)
    assert arrived.content["smashed"]["x"].data == data
    assert size == parcel.size


def test_segments_are_not_copied_before_they_are_sent():
    data = bytes(1000)
    assert any(s is data for s in encode(ENVELOPE, make_tensor_message(data)).segments)


def test_later_changes_are_not_sent():
    message = make_tensor_message(b"before")
    parcel = encode(ENVELOPE, message)
    message.content["smashed"]["x"] = Array("uint8", (5,), "flsplit.raw", b"after")
    arrived = Decoder().add(next(parcel.frames()))
    assert arrived[1].content["smashed"]["x"].data == b"before"


def test_booleans_among_integers_are_sent_as_flower_sends_them():
    content = RecordDict({"c": ConfigRecord({"mixed": [2, True]})})
    _, arrived, _ = pass_on(make_message(make_metadata(), content=content))
    assert exact(arrived.content["c"]["mixed"]) == exact([2, 1])


def refuse(envelope, message):
    with pytest.raises(WireError) as caught:
        encode(envelope, message, max_bytes=10_000)
    return caught.value


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"group_id": 3}, "metadata.group_id"),
        ({"ttl": math.inf}, "metadata.ttl"),
        ({"run_id": 2**64}, "metadata.run_id"),
    ],
)
def test_metadata_that_does_not_fit_is_refused_at_the_sender(changes, field):
    assert refuse(ENVELOPE, make_tensor_message(**changes)).field == field


def test_what_cannot_be_carried_is_refused_at_the_sender():
    assert refuse(Envelope("a", -1, 0), make_tensor_message()).field == "envelope.sequence"
    assert refuse(ENVELOPE, make_tensor_message(bytes(20_000))).field == "message"
    empty = make_tensor_message()
    empty.content = None
    assert refuse(ENVELOPE, empty).got == "neither"
    mutable = make_tensor_message()
    mutable.content["smashed"]["x"].data = bytearray(4)
    assert refuse(ENVELOPE, mutable).field == "smashed.x.data"
    mixed = make_tensor_message()
    mixed.content["config"]["list"] = items = [1.0]
    items.append("b")
    assert refuse(ENVELOPE, mixed).field == "config.list"
    large = make_tensor_message()
    large.content["config"]["n"] = 2**70
    assert "from -9223372036854775808" in str(refuse(ENVELOPE, large))
