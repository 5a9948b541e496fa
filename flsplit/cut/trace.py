"""What a forward did before the cut, as data: which calls returned what, shapes and no values.

A trace travels from the client to the server, so it is plain data: `Trace.to_json` and
`Trace.from_json`, with limits, never pickle.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from flsplit.cut.cut_errors import PathError
from flsplit.cut.private import tree_leaves

MAX_CALLS, MAX_DEPTH, MAX_TEXT, MAX_BYTES = 20_000, 12, 200, 4 * 2**20


NESTED = (-1,)
"""The shape of a nested tensor, whose sizes aren't numbers."""


@dataclass(frozen=True)
class Spec:
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    grad: bool = False
    stride: tuple[int, ...] | None = None  # None: contiguous, or not strided at all

    @classmethod
    def of(cls, tensor: Tensor) -> "Spec":
        """Describe a tensor."""
        strided = tensor.layout is torch.strided and not tensor.is_nested
        odd = strided and not tensor.is_contiguous()
        stride = tuple(tensor.stride()) if odd else None
        shape = NESTED if tensor.is_nested else tuple(tensor.shape)
        return cls(shape, tensor.dtype, tensor.requires_grad, stride)


@dataclass(frozen=True)
class Same:
    """A call returned its n-th tensor argument itself (in-place, contiguous(), to())."""

    n: int


@dataclass(frozen=True)
class Number:
    """A call made a number of tensors: the n-th of `Trace.numbers`."""

    n: int


SCALARS = frozenset(
    {bool, int, float, str, slice, torch.dtype, torch.device, torch.Size, torch.layout}
    | {type(None), type(Ellipsis)}
)


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors in arguments or results; several times faster than pytree for most."""
    if isinstance(tree, Tensor):
        return [tree]
    kind = type(tree)
    if kind is tuple or kind is list:
        items = tree
    elif kind is dict:
        items = tree.values()
    elif kind in SCALARS:
        return []
    else:
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    found: list[Tensor] = []
    for item in items:
        if isinstance(item, Tensor):
            found.append(item)
        elif type(item) not in SCALARS:
            found += tensors_in(item)
    return found


def map_tree(change: Callable[[Any], Any], tree: Any) -> Any:
    """Apply `change` to the leaves of tuples, lists and dicts, in order."""
    kind = type(tree)
    if kind is tuple or kind is list:
        return kind([map_tree(change, item) for item in tree])
    if kind is dict:
        return {key: map_tree(change, item) for key, item in tree.items()}
    if isinstance(tree, tuple) and kind.__module__ == "torch.return_types":
        return kind([map_tree(change, item) for item in tree])  # of torch.max(), sort(), …
    return change(tree)


def leaves_in(tree: Any) -> Iterator[Any]:
    """Return the leaves that `map_tree` visits."""
    found: list[Any] = []
    map_tree(found.append, tree)
    return iter(found)


@dataclass(frozen=True)
class Trace:
    """The calls of a forward before the cut, the model's arguments first.

    Attributes
    ----------
    calls : tuple of (str, tree)
        What was called, and what it returned: a nesting of `Spec`, `Same`, `Number` and constants.
    numbers : tuple
        Numbers that were made of tensors, which differ from batch to batch.
    """

    calls: tuple[tuple[str, Any], ...]
    numbers: tuple[Any, ...] = field(default=(), compare=False)

    @cached_property
    def digest(self) -> str:
        """What stands for the calls, not the numbers, once the other side knows them."""
        return blake2b(self._calls_as_json().encode(), digest_size=16).hexdigest()

    @cached_property
    def nbytes(self) -> int:
        """How long the calls are as JSON."""
        return len(self._calls_as_json())

    def _calls_as_json(self) -> str:
        return json.dumps([[name, _encode(tree)] for name, tree in self.calls])

    def to_json(self) -> str:
        """Return the whole trace as JSON text."""
        numbers = json.loads(numbers_to_json(self.numbers))
        return json.dumps({"calls": json.loads(self._calls_as_json()), "numbers": numbers})

    @classmethod
    def from_json(cls, text: str) -> "Trace":
        """Read what `to_json` wrote.

        PathError if it is something else, or longer or deeper than a trace may be.
        """
        try:
            if len(text) > MAX_BYTES:
                raise ValueError(f"{len(text)} characters, at most {MAX_BYTES} are read")  # noqa: TRY301
            read = json.loads(text)
            calls = tuple((_text(name), _decode(tree)) for name, tree in read["calls"])
            if not 0 < len(calls) <= MAX_CALLS:
                raise ValueError(f"{len(calls)} calls, expected 1 to {MAX_CALLS}")  # noqa: TRY301
            return cls(calls, tuple(_decode(number) for number in read["numbers"]))
        except (ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
            raise PathError(f"the trace of a client's forward can't be read: {error}") from error


def numbers_to_json(numbers: Iterable[Any]) -> str:
    """Return a trace's numbers as JSON text."""
    return json.dumps([_encode(number) for number in numbers])


def numbers_from_json(text: str) -> tuple[Any, ...]:
    """Read what `numbers_to_json` wrote.

    PathError if it is something else, or longer than a trace may be.
    """
    try:
        if len(text) > MAX_BYTES:
            raise ValueError(f"{len(text)} characters, at most {MAX_BYTES} are read")  # noqa: TRY301
        return tuple(_decode(number) for number in list(json.loads(text)))
    except (ValueError, TypeError, RecursionError, AttributeError) as error:
        raise PathError(f"a trace's numbers can't be read: {error}") from error


def can_be_sent(tree: Any) -> bool:
    """Tell whether a tree can be part of a trace."""
    return all(map(_is_constant, leaves_in(tree)))


def _is_constant(leaf: Any) -> bool:
    try:
        _encode(leaf)
    except PathError:
        return False
    return True


def _encode(tree: Any) -> Any:
    """Turn a tree into JSON: constants as they are, everything else a list with its kind first."""
    match tree:
        case None | bool() | int():
            return tree
        case str() if len(tree) <= MAX_TEXT:
            return tree
        case float():
            return ["f", tree.hex()]  # bit for bit, also inf and nan
        case complex():
            return ["c", tree.real.hex(), tree.imag.hex()]
        case Spec(shape=shape) if shape == NESTED:
            raise PathError(
                "before the cut, forward makes a nested tensor, whose sizes can't be described to "
                "the other side: let one module make it, compute with it and pad it, cut before "
                "it, or pad the batch and give a mask"
            )
        case Spec():
            stride = list(tree.stride) if tree.stride else None
            return ["t", list(tree.shape), _plain(tree.dtype), tree.grad, stride]
        case Same():
            return ["=", tree.n]
        case Number():
            return ["#", tree.n]
        case torch.dtype():
            return ["dtype", _plain(tree)]
        case torch.device():
            return ["device", str(tree)]
        case torch.Size():
            return ["size", list(tree)]
        case dict() if type(tree) is dict and all(type(key) is str for key in tree):
            return ["d", [[key, _encode(item)] for key, item in tree.items()]]
        case list() | tuple() if type(tree) in (list, tuple):
            return ["l" if type(tree) is list else "u", [_encode(item) for item in tree]]
        case tuple() if type(tree).__module__ == "torch.return_types":
            return ["r", type(tree).__name__, [_encode(item) for item in tree]]
        case _:
            raise PathError(
                f"a {type(tree).__name__} can't be described to the other side of a cut: only "
                "tensors, numbers, text, and tuples, lists and dicts of them"
            )


def _decode(tree: Any, depth: int = 0) -> Any:
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    match tree:
        case None | bool() | int():
            return tree
        case str():
            return _text(tree)
        case ["f", str(number)]:
            return float.fromhex(number)
        case ["c", str(real), str(imag)]:
            return complex(float.fromhex(real), float.fromhex(imag))
        case ["t", list(shape), str(dtype), bool(grad), stride]:
            return Spec(_sizes(shape), _dtype(dtype), grad, _sizes(stride) if stride else None)
        case ["=", int(n)]:
            return Same(n)
        case ["#", int(n)]:
            return Number(n)
        case ["dtype", str(name)]:
            return _dtype(name)
        case ["device", str(name)] if len(name) < 20:
            return torch.device(name)
        case ["size", list(sizes)]:
            return torch.Size(_sizes(sizes))
        case ["d", list(items)]:
            return {_text(key): _decode(item, depth + 1) for key, item in items}
        case ["l", list(items)]:
            return [_decode(item, depth + 1) for item in items]
        case ["u", list(items)]:
            return tuple(_decode(item, depth + 1) for item in items)
        case ["r", str(name), list(items)]:
            kind = vars(torch.return_types).get(name)
            if isinstance(kind, type) and kind.__module__ == "torch.return_types":
                return kind([_decode(item, depth + 1) for item in items])
    raise ValueError(f"unexpected {str(tree)[:60]}")


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name[:40]!r} is no dtype")  # noqa: TRY004 - of the text, not the call
    return dtype


def _sizes(sizes: list[Any]) -> tuple[int, ...]:
    if len(sizes) > 16 or not all(type(n) is int and 0 <= n < 2**40 for n in sizes):
        raise ValueError(f"{str(sizes)[:60]} is no shape")
    return tuple(sizes)


def _text(text: Any) -> str:
    if type(text) is not str or len(text) > MAX_TEXT:
        raise ValueError(f"{str(text)[:60]!r} is no text of at most {MAX_TEXT} characters")
    return text
