"""Tensors on their way: what arrives is what was sent, or an error that says what isn't."""

import copy

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from flsplit.errors import ProtocolError, SegmentMismatchError
from flsplit.message.arrays import (
    RAW,
    RawArray,
    check_like,
    from_record,
    nbytes,
    readable,
    to_array,
    to_record,
    to_tensor,
)

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    torch.uint64, torch.uint32, torch.uint16,
]  # fmt: skip
FLOAT8 = [
    torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz,
]  # fmt: skip
DTYPES += FLOAT8


@st.composite
def tensors(draw, dtypes=tuple(DTYPES)):
    """Tensors of any dtype and shape (0-d and empty ones included), any bits in them."""
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(st.lists(st.integers(0, 4), max_size=4).map(tuple))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    size = int(np.prod(shape)) * dtype.itemsize
    data = torch.randint(256, (size,), generator=rng, dtype=torch.uint8)
    if dtype is torch.bool:
        data = data % 2
    tensor = data.view(dtype).reshape(shape)
    return draw(st.sampled_from([*rearranged(tensor)]))


def rearranged(tensor):
    """The tensor, and tensors of the same dtype that don't lie in one piece."""
    yield tensor
    if tensor.ndim >= 2:
        yield tensor.transpose(0, -1)
        yield tensor[:, ::2]
    if tensor.ndim >= 1 and len(tensor):
        yield tensor[1:]
        yield tensor[:1].expand(3, *tensor.shape[1:])
        yield tensor[:1].as_strided(tensor[:1].shape, [0] * tensor.ndim)  # NumPy makes such
    if tensor.is_floating_point():
        yield tensor.clone().requires_grad_()


def same_bits(one, other):
    """Compare with NaNs and the sign of zeros."""
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.detach().view(whole), other.detach().view(whole))


# --- raw -------------------------------------------------------------------------------------


@settings(deadline=None)
@given(tensors())
def test_a_tensor_arrives_as_it_was_sent(tensor):
    array = to_array(tensor)
    assert array.stype.startswith(RAW)
    assert nbytes(array) == len(array.data) == tensor.numel() * tensor.element_size()
    found = to_tensor(array, field="x")
    assert same_bits(found, tensor)
    assert not found.requires_grad


def test_what_arrives_is_a_copy():
    tensor = torch.zeros(3)
    array = to_array(tensor)
    tensor += 1
    found = to_tensor(array, field="x")
    found += 5
    assert to_tensor(array, field="x").tolist() == [0, 0, 0]


def test_the_elements_lie_in_c_order_and_little_endian():
    array = to_array(torch.tensor([[1, 256], [-1, 0]], dtype=torch.int16).T)
    assert array.data == bytes([1, 0, 255, 255, 0, 1, 0, 0])
    assert (array.dtype, tuple(array.shape)) == ("int16", (2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_numbers_arrive_in_the_order_in_which_they_lay_in_memory(dtype):
    lying = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    for tensor in (
        lying.transpose(1, 2),
        lying.permute(3, 0, 2, 1),
        lying.contiguous(memory_format=torch.channels_last),
        lying[0, 0].T,
    ):
        array = to_array(tensor)
        found = to_tensor(array, field="x")
        assert torch.equal(found, tensor)
        assert found.is_contiguous() == tensor.is_contiguous()
        if array.stype != RAW:
            assert found.stride() == tensor.stride()
        again = RawArray(array.dtype, array.shape, array.data, array.stype)
        assert copy.copy(again).numpy().shape == tuple(tensor.shape)
    with_gaps = to_array(lying[:, ::2])
    assert with_gaps.stype == RAW
    assert to_tensor(with_gaps, field="x").is_contiguous()


@pytest.mark.parametrize("order", ["", "0", "0,0", "0,1,2", "1,0,", "-1,0", "a,b", "1, 0"])
def test_an_order_of_other_dimensions_is_refused(order):
    array = Array("int16", (2, 2), f"{RAW}:{order}", bytes(8))
    with pytest.raises(
        ProtocolError, match=r"^x: stype is .*, expected each of the dimensions 0, 1"
    ):
        to_tensor(array, field="x")


@pytest.mark.parametrize(
    ("stype", "raw"),
    [(RAW, True), (f"{RAW}:1,0", True), (f"{RAW}est", False), ("numpy.ndarray", False)],
)
def test_what_a_mod_can_read_is_what_is_raw(stype, raw):
    content = RecordDict({"it": ArrayRecord({"0": Array("int16", (2, 2), stype, bytes(8))})})
    readable(content)
    assert isinstance(content["it"]["0"], RawArray) == raw
    assert content["it"]["0"].stype == stype


def test_a_dtype_that_cannot_travel():
    with pytest.raises(ProtocolError, match=r"torch\.complex32 can't be sent; known: .*bfloat16"):
        to_array(torch.zeros(2, dtype=torch.complex32))


@settings(deadline=None)
@given(tensors(), st.binary(min_size=1, max_size=5))
def test_bytes_too_many_are_refused(tensor, more):
    array = to_array(tensor)
    wrong = Array(array.dtype, tuple(array.shape), RAW, array.data + more)
    with pytest.raises(ProtocolError, match=rf"^x: {len(wrong.data)} bytes came, but"):
        to_tensor(wrong, field="x")


@settings(deadline=None)
@given(
    st.sampled_from(["float32", "float31", "object", "", "O", "complex64"]),
    st.lists(st.one_of(st.integers(-3, 3), st.integers(-(2**70), 2**70)), max_size=4),
    st.sampled_from([RAW, f"{RAW}:1,0", f"{RAW}:0", "numpy.ndarray", "", "pickle"]),
    st.one_of(st.binary(max_size=40), st.just(b"\x93NUMPY\x01\x00"), st.just(b"PK\x03\x04")),
)
def test_whatever_an_array_says_nothing_else_than_a_protocol_error_comes(dtype, shape, stype, data):
    array = Array(dtype, tuple(shape), stype, data)
    try:
        found = to_tensor(array, field="the field")
    except ProtocolError as error:
        said = str(error)
    else:
        said = "the field: "
        assert str(found.dtype) == f"torch.{dtype}"
        assert list(found.shape) == shape
    assert said.startswith("the field: ")


@settings(deadline=None)
@given(st.binary(max_size=120))
def test_whatever_follows_numpys_magic_nothing_else_than_a_protocol_error_comes(data):
    array = Array("float32", (2,), "numpy.ndarray", b"\x93NUMPY\x01\x00" + data)
    with pytest.raises(ProtocolError, match="the field: not a readable array"):
        to_tensor(array, field="the field")


# --- Flower's own serialisation --------------------------------------------------------------


NUMPY_KNOWS = tuple(one for one in DTYPES if one not in (torch.bfloat16, *FLOAT8))


@settings(deadline=None)
@given(tensors(NUMPY_KNOWS))
def test_weights_travel_in_flowers_own_serialisation(tensor):
    record = to_record({"w": tensor})
    assert record["w"].numpy().shape == tuple(tensor.shape)
    assert same_bits(from_record(record, field="arrays")["w"], tensor)


def test_weights_of_flower_itself_can_be_read():
    state = torch.nn.Linear(3, 2).state_dict()
    found = from_record(ArrayRecord(state), field="arrays")
    assert list(found) == list(state)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("values", [np.array(["a", "b"]), np.array(["2024-01-01"], "datetime64")])
def test_an_array_that_torch_does_not_know_names_the_field(values):
    with pytest.raises(ProtocolError, match=r"arrays\['w'\]: not a readable array"):
        from_record(ArrayRecord({"w": Array(values)}), field="arrays")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"shape": (3, 2)}, r"the data is float32 of shape \(2, 3\), but .* shape \(3, 2\)"),
        ({"dtype": "float64"}, "the data is float32 .* but the array says float64"),
    ],
)
def test_an_array_that_is_another_than_it_says(changed, said):
    array = Array(np.zeros((2, 3), np.float32))
    fields = {"dtype": array.dtype, "shape": (2, 3), "stype": array.stype, "data": array.data}
    with pytest.raises(ProtocolError, match=said):
        to_tensor(Array(**(fields | changed)), field="x")


# --- check_like ------------------------------------------------------------------------------

LIKE = {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.float64)}


def test_tensors_that_fit_come_back_in_order_and_dtype():
    found = check_like({"b": torch.ones(4), "a": torch.ones(2, 3)}, LIKE, what="it")
    assert list(found) == ["a", "b"]
    assert [t.dtype for t in found.values()] == [torch.float32, torch.float64]
    assert all(bool((t == 1).all()) for t in found.values())


@pytest.mark.parametrize(
    ("tensors_", "said"),
    [
        ({"a": torch.zeros(2, 3)}, "it: missing b; are both sides cut"),
        (LIKE | {"c": torch.zeros(1)}, "it: unexpected c; are both"),
        ({"c": torch.zeros(1)}, "it: missing a, b; unexpected c; are both"),
        (LIKE | {"a": torch.zeros(3, 2)}, r"it: 'a' came with shape \(3, 2\), expected \(2, 3\)"),
        (LIKE | {"a": torch.zeros(6)}, r"'a' came with shape \(6,\), expected \(2, 3\)"),
        ({}, "it: missing a, b"),
        (
            LIKE | {f"x{i}": torch.zeros(1) for i in range(6)},
            "it: unexpected x0, x1, x2, x3 and 2 more; are both",
        ),
    ],
)
def test_tensors_that_do_not_fit(tensors_, said):
    with pytest.raises(SegmentMismatchError, match=said):
        check_like(tensors_, LIKE, what="it")
