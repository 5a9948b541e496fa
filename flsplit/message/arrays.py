"""Tensors in Flower's ``Array`` and ``ArrayRecord``, and back.

Weights travel in Flower's own serialisation, so that any Flower strategy or mod can read
them. Smashed data, labels and gradients travel raw: they are sent once per mini-batch, and
NumPy's NPY header and copies would cost as much as the transfer; NumPy has no bfloat16 and no
float8 either.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from flsplit.errors import ProtocolError, SegmentMismatchError, located

RAW = "flsplit.raw"
"""``Array.stype`` of raw tensors: ``data`` holds the elements in C order, little-endian.

Of floating-point numbers that lie in memory in another order, ``flsplit.raw:0,2,1`` says which of
their dimensions is the outermost and so on, and ``data`` has that order, too: what is computed of
them would differ in the last digit otherwise.
"""

_IN_ORDER = f"{RAW}:"  # before the dimensions of one that lies in another order

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.complex128, torch.complex64,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
        torch.uint16, torch.uint32, torch.uint64,
        torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz,
    )
}  # fmt: skip

_AS_INTEGERS = {torch.bfloat16: torch.int16} | {
    dtype: torch.uint8 for name, dtype in _DTYPES.items() if name.startswith("float8")
}
"""Dtypes that NumPy hasn't, with integers of the same size."""

_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_SIZE = 2**40
_NAMED = 4  # of the tensors that an error is about


def dtype_name(dtype: torch.dtype) -> str:
    """Return how messages write a dtype, one of those listed above."""
    if dtype not in _NAMES:
        raise ProtocolError(f"a tensor of {dtype} can't be sent; known: {sorted(_DTYPES)}")
    return _NAMES[dtype]


def dtype_of(name: str, *, field: str) -> torch.dtype:
    """Return the dtype that messages write so; ProtocolError if there is none."""
    if name not in _DTYPES:
        raise ProtocolError(f"{field}: dtype is {name!r}, expected one of {sorted(_DTYPES)}")
    return _DTYPES[name]


class RawArray(Array):
    """A raw array of Flower's type that a Flower mod can read, too.

    ``ArrayRecord({...})`` copies it into a plain ``Array``; put it into a record one by one.
    """

    def __init__(self, dtype: str, shape: tuple[int, ...], data: bytes, stype: str = RAW) -> None:
        # Flower's own constructor tells nine forms of arguments apart.
        self.__dict__.update(dtype=dtype, shape=shape, stype=stype, data=data)

    def numpy(self) -> NDArray[Any]:
        """Return a copy as a NumPy array; of bfloat16 or float8, which NumPy lacks, as float32."""
        tensor = to_tensor(self, field="array")
        return (tensor.float() if tensor.dtype in _AS_INTEGERS else tensor).numpy()

    def deflate(self) -> bytes:
        """Return what Flower's own carrier sends: a plain ``Array``, the only kind it knows."""
        return Array(self.dtype, self.shape, self.stype, self.data).deflate()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without what Flower caches; `copy` uses it as well."""
        return RawArray, (self.dtype, self.shape, self.data, self.stype)


def to_array(tensor: Tensor) -> RawArray:
    """Return a raw array with the tensor's elements, of any device and any dtype listed above."""
    dtype = _NAMES.get(tensor.dtype) or dtype_name(tensor.dtype)
    integers = _AS_INTEGERS.get(tensor.dtype)
    plain = tensor.detach().view(integers) if integers else tensor
    stype = RAW
    summed = tensor.is_floating_point() or tensor.is_complex()
    if summed and not plain.is_contiguous() and (order := _order(plain)):
        plain, stype = plain.permute(order), _IN_ORDER + ",".join(map(str, order))
    array = RawArray.__new__(RawArray)  # one call less, for every array of a step
    data = plain.numpy(force=True).tobytes()
    array.__dict__.update(dtype=dtype, shape=tuple(tensor.shape), stype=stype, data=data)
    return array


def _order(tensor: Tensor) -> list[int] | None:
    """Return the dimensions from the outermost in memory on; None if there are gaps between."""
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return order if tensor.permute(order).is_contiguous() else None


def readable(content: RecordDict) -> None:
    """Make every raw array in a message one whose values ``numpy()`` returns.

    Carriers hand over plain arrays, of which Flower knows only its own serialisation.
    """
    for record in content.values():
        if isinstance(record, ArrayRecord):
            for key, array in record.items():
                raw = array.stype == RAW or array.stype.startswith(_IN_ORDER)
                if raw and not isinstance(array, RawArray):
                    shape = tuple(array.shape)
                    record[key] = RawArray(array.dtype, shape, array.data, array.stype)


def to_tensor(array: Array, *, field: str) -> Tensor:
    """Return the tensor (CPU, a copy) in a raw or a NumPy array.

    ProtocolError if dtype, shape and data don't fit together; ``field`` names the array.
    """
    order = None
    if array.stype != RAW:
        if not array.stype.startswith(_IN_ORDER):
            return _from_npy(array, field)
        order = _order_of(array, field)
    dtype = _DTYPES.get(array.dtype) or dtype_of(array.dtype, field=field)
    if array.shape and not 0 <= min(array.shape) <= max(array.shape) <= _MAX_SIZE:
        raise ProtocolError(f"{field}: shape is {array.shape}, expected sizes of 0 or more")
    expected = math.prod(array.shape) * dtype.itemsize
    if len(array.data) != expected:
        raise ProtocolError(
            f"{field}: {len(array.data)} bytes came, but {array.dtype} of shape "
            f"{tuple(array.shape)} takes {expected}"
        )
    if expected == 0:
        return torch.empty(tuple(array.shape), dtype=dtype)
    found = torch.frombuffer(bytearray(array.data), dtype=dtype)
    if order is None:
        return found.reshape(tuple(array.shape))
    found = found.reshape([array.shape[one] for one in order])
    return found.permute([order.index(one) for one in range(len(order))])


def _order_of(array: Array, field: str) -> list[int]:
    """Return in which order an array's dimensions lie in its data."""
    written = array.stype.removeprefix(_IN_ORDER).split(",")
    known = [str(one) for one in range(len(array.shape))]
    if sorted(written) != sorted(known):
        raise ProtocolError(
            f"{field}: stype is {array.stype[:60]!r}, expected each of the dimensions "
            f"{', '.join(known)} once after {_IN_ORDER}"
        )
    return list(map(int, written))


def _from_npy(array: Array, field: str) -> Tensor:
    try:
        found = array.numpy()
        tensor = torch.from_numpy(np.array(found))
    except Exception as error:  # NumPy's parser raises many kinds on bytes that it can't read
        raise ProtocolError(f"{field}: not a readable array ({error})") from error
    if (str(found.dtype), found.shape) != (array.dtype, tuple(array.shape)):
        raise ProtocolError(
            f"{field}: the data is {found.dtype} of shape {found.shape}, but the array says "
            f"{array.dtype} of shape {tuple(array.shape)}"
        )
    return tensor


def to_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Return an ``ArrayRecord`` of a state dict's tensors, in Flower's own serialisation.

    NumPy has no bfloat16 and no float8: such tensors are raw arrays, of which ``Array.numpy()`` and
    Flower's ``to_torch_state_dict()`` make float32, which holds the same numbers.

    ProtocolError if one is of a dtype that can't be sent.
    """
    record = ArrayRecord()
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            with located(repr(name)):
                dtype_name(tensor.dtype)
        raw = tensor.dtype in _AS_INTEGERS
        # A copy: a tensor whose memory NumPy has seen can never be resized again.
        record[name] = to_array(tensor) if raw else Array(tensor.detach().cpu().clone().numpy())
    return record


def from_record(record: ArrayRecord, *, field: str) -> dict[str, Tensor]:
    """Return the tensors (CPU, copies) of an ``ArrayRecord`` by name."""
    return {name: to_tensor(array, field=f"{field}[{name!r}]") for name, array in record.items()}


def check_like(
    tensors: Mapping[str, Tensor],
    like: Mapping[str, Tensor],
    *,
    what: str,
    free: Collection[str] = (),
) -> dict[str, Tensor]:
    """Return ``tensors`` in ``like``'s order, dtypes and devices, or say what doesn't fit.

    Those called as in ``free``, a module's buffers, may have any shape.

    SegmentMismatchError if names or shapes differ.
    """
    missing = [name for name in like if name not in tensors]
    unexpected = [name for name in tensors if name not in like]
    if missing or unexpected:
        raise SegmentMismatchError(
            f"{what}: {_some('missing', missing)}{_some('unexpected', unexpected)}"
            "are both sides cut at the same place of the same model?"
        )
    for name, tensor in like.items():
        if tensors[name].shape != tensor.shape and name not in free:
            raise SegmentMismatchError(
                f"{what}: {name!r} came with shape {tuple(tensors[name].shape)}, "
                f"expected {tuple(tensor.shape)}"
            )
    return {name: tensors[name].to(tensor) for name, tensor in like.items()}


def _some(word: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{word} {', '.join(names[:_NAMED])}{more}; "


def nbytes(array: Array) -> int:
    """Return the size in bytes of an array's elements, without any header."""
    dtype = _DTYPES.get(array.dtype)
    try:
        itemsize = dtype.itemsize if dtype else np.dtype(array.dtype).itemsize
    except TypeError as error:
        raise ProtocolError(f"an array says that its dtype is {array.dtype!r}") from error
    return math.prod(array.shape) * itemsize
