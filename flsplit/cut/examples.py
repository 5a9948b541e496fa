"""Finds an input that a model takes, where nobody gave one: a segment has to know its forward."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

ROWS = 3
"""Rows of a made-up batch: neither one, which BatchNorm refuses, nor a size that layers have."""

NEEDS_VALUES = (RuntimeError, NotImplementedError, TypeError)
"""What torch raises where a tensor without data is asked for its values."""

_SIZES = (224, 32, 28, 64, 8, 16, 299, 96, 128, *range(2, 65))
_LENGTHS = (5, 16)


Row = tuple[tuple[int, ...], torch.dtype]


def likely_rows(model: nn.Module) -> tuple[Row, ...]:
    """Return shape and dtype of rows that the model's first layers take, the likeliest first."""
    return tuple(dict.fromkeys(_rows(model)))


def needs_values(error: Exception) -> bool:
    """Tell whether a forward on the *meta* device failed for want of values."""
    scripted = "TorchScript" in str(error)  # whose weights stay where they are
    formatted = "passed to Tensor.__format__" in str(error)  # f"{x.mean():.3f}" is what asks
    return scripted or formatted or isinstance(error, NotImplementedError) or "meta" in str(error)


def with_values(leaf: Any, integer: int = 0) -> Any:
    """Return a tensor as one that lacks the data, with values; all integers are the same."""
    if not isinstance(leaf, Tensor):
        return leaf
    numbers = torch.Generator().manual_seed(0)
    if not leaf.dtype.is_floating_point:
        return torch.full(leaf.shape, integer, dtype=leaf.dtype)
    return torch.randn(leaf.shape, generator=numbers).to(leaf.dtype)


def _rows(model: nn.Module) -> Iterator[Row]:
    floats = (p.dtype for p in model.parameters() if p.is_floating_point())
    dtype = next(floats, torch.get_default_dtype())
    layers = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
    layers += [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    for layer in layers[:4]:
        yield from _rows_for(layer, _sizes_of(model), dtype)


def _sizes_of(model: nn.Module) -> list[int]:
    said = (getattr(module, "image_size", None) for module in model.modules())
    return list(dict.fromkeys([*(size for size in said if isinstance(size, int)), *_SIZES]))


def _rows_for(layer: nn.Module, sizes: list[int], dtype: torch.dtype) -> Iterator[Row]:
    match layer:
        case nn.Embedding() | nn.EmbeddingBag():
            yield from (((length,), torch.int64) for length in (*_LENGTHS, *sizes))
        case nn.Linear():
            yield from (((*more, layer.in_features), dtype) for more in [(), *_lengths()])
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            dims = len(layer.kernel_size)
            yield from (((layer.in_channels, *[size] * dims), dtype) for size in sizes)
        case nn.BatchNorm1d():
            yield (layer.num_features,), dtype
        case nn.BatchNorm2d():
            yield from (((layer.num_features, size, size), dtype) for size in sizes)
        case nn.LayerNorm():
            yield from (((*more, *layer.normalized_shape), dtype) for more in [(), *_lengths()])
        case nn.RNNBase():
            yield from (((length, layer.input_size), dtype) for length in _LENGTHS)
        case _:
            width = next(layer.parameters(recurse=False)).shape[-1:]
            yield from (((*more, *width), dtype) for more in [(), *_lengths()])


def _lengths() -> Iterator[tuple[int, ...]]:
    return itertools.product(_LENGTHS)
