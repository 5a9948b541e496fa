"""Names of torch's calls: which compute, and which only ask a tensor what it is like."""

from typing import Any

import torch

# Calls that ask a tensor for what an `Absent` knows, too. So do all properties but these VIEWS.
# Every other call either computes or turns values into numbers, and so is written down.
ASKS_SIZES = {"size", "numel", "nelement", "__len__", "stride", "is_contiguous", "storage_offset"}
ASKS_SIZES |= {"is_same_size", "untyped_storage", ".shape", ".itemsize", ".nbytes"}
ASKS_DTYPES = {".dtype", "is_floating_point", "is_complex", "is_signed", "element_size"}
ASKS_DTYPES |= {".itemsize", ".nbytes"}
ASKS = ASKS_SIZES | ASKS_DTYPES | {"dim", "ndimension"}
ASKS |= {"is_inference", "get_device", "data_ptr", "has_torch_function"}
ASKS |= {"is_tensor", "register_hook", "retain_grad", "register_post_accumulate_grad_hook"}
HOOKS = {"register_hook", "retain_grad", "register_post_accumulate_grad_hook"}
VIEWS = {".T", ".mT", ".H", ".mH", ".data", ".real", ".imag", ".grad"}

# Calls that only look at the shape, dtype and device of their first tensor.
LIKES = {f"{kind}_like" for kind in ("empty", "zeros", "ones", "full", "rand", "randn", "randint")}
LIKES |= {f"new_{kind}" for kind in ("empty", "zeros", "ones", "full", "tensor")}


# Of those operators of which torch doesn't say so: what they return is as large as values say.
SIZED_BY_DATA = {"aten::_pack_padded_sequence", "aten::tensor_split.tensor_indices_or_sections"}


def name_of(func: Any) -> str:
    """Return what a call is called; a property has a dot before it."""
    name = getattr(func, "__name__", None) or str(func)
    return f".{func.__self__.__name__}" if name == "__get__" else name


def asks(name: str) -> bool:
    """Tell whether a call asks a tensor only for what an `Absent` knows."""
    return name in ASKS or (name[0] == "." and name not in VIEWS)


def is_of_rows(name: str, args: Any) -> bool:
    """Tell whether a call asks for the size of the first dimension only."""
    return name == "__len__" or (name == "size" and args[1:] == (0,))


def is_sized_by_data(func: Any, args: Any) -> bool:
    """Tell whether an operator of ATen returns as much as its arguments' values say."""
    if func.name() == "aten::index.Tensor":
        return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    return torch.Tag.dynamic_output_shape in func.tags or func.name() in SIZED_BY_DATA


def reads_data(func: Any) -> bool:
    """Tell whether an operator of ATen makes numbers of a tensor's values."""
    return torch.Tag.data_dependent_output in func.tags
