"""Batches are nestings of tensors: tuples, named tuples, lists and mappings, in one another."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def map_tensors(change: Callable[[Tensor], Any], tree: Any) -> Any:
    """Return ``tree`` with each tensor replaced by ``change(tensor)``.

    These are new containers, in the order of the old ones: tuples and named tuples stay what they
    are, other sequences become lists and mappings dicts. What is no tensor stays, the same object,
    and so do the lengths that a packed sequence holds.
    """
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, PackedSequence):  # torch wants its lengths on the CPU, as they are
        data, lengths, *places = tree
        return PackedSequence(
            change(data), lengths, *[None if one is None else change(one) for one in places]
        )
    if isinstance(tree, tuple):
        parts = [map_tensors(change, part) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    if isinstance(tree, list):
        return [map_tensors(change, part) for part in tree]
    if isinstance(tree, Mapping):
        return {key: map_tensors(change, part) for key, part in tree.items()}
    return tree


def leaves_of(
    tree: Any, place: str = "", *, whole: type | tuple[type, ...] = ()
) -> Iterator[tuple[str, Any]]:
    """Yield what a nesting holds, tensors and all else, with its place in it.

    What is of the type ``whole`` is not looked into.

    A place is written as in Python: ``['mask']``, ``[0]['ids']``, ``.h`` of a named tuple; the
    place of a ``tree`` that is no container is empty. Nothing is where the tree holds nothing.
    """
    if isinstance(tree, whole):
        yield place, tree
    elif isinstance(tree, Mapping):
        for key, part in tree.items():
            yield from leaves_of(part, f"{place}[{key!r}]", whole=whole)
    elif isinstance(tree, tuple) and hasattr(tree, "_fields"):
        for name, part in zip(tree._fields, tree, strict=True):
            yield from leaves_of(part, f"{place}.{name}", whole=whole)
    elif isinstance(tree, tuple | list):
        for index, part in enumerate(tree):
            yield from leaves_of(part, f"{place}[{index}]", whole=whole)
    else:
        yield place, tree


def tensors_of(tree: Any) -> list[Tensor]:
    """Return the tensors in a nesting, in its order."""
    return [leaf for _, leaf in leaves_of(tree) if isinstance(leaf, Tensor)]


def cat_rows(trees: Sequence[Any]) -> Any:
    """Return nestings of the same places, with the tensors at each concatenated."""
    columns = iter(zip(*map(tensors_of, trees), strict=True))
    return map_tensors(lambda _: torch.cat(next(columns)), trees[0])


def num_rows(labels: Any) -> int:
    """Return how many rows labels have; 0 if they are of different lengths, or have none."""
    if isinstance(labels, Tensor):
        return len(labels) if labels.ndim else 0
    lengths = {len(one) if one.ndim else 0 for one in tensors_of(labels)}
    return lengths.pop() if len(lengths) == 1 else 0


def shapes_of(tree: Any) -> Any:
    """Return the shapes of a nesting's tensors, in the same nesting."""
    return map_tensors(lambda tensor: tuple(tensor.shape), tree)


def described(tree: Any) -> str:
    """Return the shapes and dtypes of a nesting's tensors in words, for an error."""
    if isinstance(tree, Tensor):
        return f"shape {tuple(tree.shape)} and dtype {tree.dtype}"
    shapes = map_tensors(lambda tensor: (tuple(tensor.shape), tensor.dtype), tree)
    return f"shapes and dtypes {shapes}"


def to_device(tree: Any, device: torch.device) -> Any:
    """Return ``tree`` with its tensors on ``device``."""
    if isinstance(tree, Tensor):
        return tree.to(device)
    return map_tensors(lambda tensor: tensor.to(device), tree)


def as_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments with which a model is called for ``inputs``.

    Keyword arguments for a mapping, positional ones for a tuple or list, one argument for what
    is neither; a named tuple (a packed sequence is one) is one, too.
    """
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list) and not hasattr(inputs, "_fields"):
        return tuple(inputs), {}
    return (inputs,), {}
