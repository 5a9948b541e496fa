"""Smashed data and cut-layer gradients, whether one tensor crosses or several values do."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from flsplit.cut.stretch import Crossing
from flsplit.errors import MethodError
from flsplit.nested import described

Smashed = Tensor | Crossing
"""Smashed data: a tensor ``(b, ...)``, or several values, of which numbers are a part."""

CutGradient = Tensor | dict[str, Tensor]
"""The cut-layer gradient, of the smashed data's shape; of a crossing by the values' names."""


def differentiable(tensor: Tensor) -> bool:
    """Tell whether a tensor is of a dtype that can have a gradient."""
    return tensor.is_floating_point() or tensor.is_complex()


def values_of(smashed: Smashed) -> list[Tensor]:
    """Return the tensors that cross."""
    return [smashed] if isinstance(smashed, Tensor) else list(smashed.values.values())


def smashed_in_words(smashed: Smashed) -> str:
    """Return what crosses, for an error."""
    values = smashed if isinstance(smashed, Tensor) else smashed.values
    return f"smashed data of {described(values)}"


def not_one_tensor(smashed: Crossing) -> str:
    """Say for an error why a method can't take what crosses as one tensor ``(b, ...)``."""
    values = values_of(smashed)
    if len(values) > 1:
        return f"{len(values)} values cross at this cut"
    what = smashed_in_words(smashed)
    if smashed.trace.numbers:
        return f"{what} crosses at this cut with a number beside it"
    return (
        f"{what} crosses at this cut with its rows not in front, or forward asks for sizes that "
        "the server doesn't know (give the strategy an example of the input), or depends on the "
        "input's dtype (give the model inputs of the dtype of its parameters)"
    )


def as_leaves(smashed: Smashed) -> Smashed:
    """Return what crosses without graph, collecting gradients.

    A tensor alone always does; of several values those that need one.
    """
    if isinstance(smashed, Tensor):
        return smashed.detach().requires_grad_()
    return smashed.detached()


def detached(smashed: Smashed) -> Smashed:
    """Return what crosses without graph; each tensor says whether it needs a gradient."""
    if isinstance(smashed, Tensor):
        return smashed.detach().requires_grad_(smashed.requires_grad)
    return smashed.detached()


def learning_in(leaves: Smashed) -> list[Tensor]:
    """Return the tensors that collect a gradient."""
    if isinstance(leaves, Tensor):
        return [leaves] if leaves.requires_grad else []
    return [value for value in leaves.values.values() if value.requires_grad]


def gradient_of(leaves: Smashed, found: Sequence[Tensor | None], weight: float) -> CutGradient:
    """Return the cut-layer gradient: what was found for the tensors that learn, over a weight."""
    if isinstance(leaves, Tensor):
        (gradient,) = found
        return torch.zeros_like(leaves) if gradient is None else gradient / weight
    tensors = [
        torch.zeros_like(leaf) if gradient is None else gradient / weight
        for leaf, gradient in zip(learning_in(leaves), found, strict=True)
    ]
    return dict(zip(leaves.learning, tensors, strict=True))


def gradients_in(gradient: CutGradient) -> list[Tensor]:
    """Return the tensors of a cut-layer gradient."""
    return [gradient] if isinstance(gradient, Tensor) else list(gradient.values())


def fitting(gradient: object, smashed: Smashed) -> list[Tensor] | None:
    """Return the tensors of a cut-layer gradient of the smashed data's shape, None if it isn't."""
    if isinstance(smashed, Tensor):
        fits = isinstance(gradient, Tensor) and gradient.shape == smashed.shape
        return [gradient] if fits else None  # type: ignore[list-item]
    if not isinstance(gradient, dict):
        return None
    tensors = {name: one for name, one in gradient.items() if isinstance(one, Tensor)}
    learning = {name: smashed.values[name].shape for name in smashed.learning}
    fits = learning == {name: one.shape for name, one in tensors.items()}
    return [tensors[name] for name in learning] if fits else None


def value_by_value(
    change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]],
    gradients: Mapping[str, CutGradient],
    rows: Mapping[str, int],
) -> dict[str, CutGradient]:
    """Apply what a method does with the clients' cut-layer gradients to each value that crosses.

    ``change`` takes tensors ``(b_i, ...)`` by client and returns some of the clients'; ``rows``
    says how many rows each client has.

    Raises
    ------
    MethodError
        If other values cross at one client than at another, or one has its rows elsewhere than in
        front.
    """
    tensors = {name: one for name, one in gradients.items() if isinstance(one, Tensor)}
    if len(tensors) == len(gradients):
        return dict(change(tensors))
    several = [one for one in gradients.values() if not isinstance(one, Tensor)]
    if tensors or any(list(one) != list(several[0]) for one in several):
        raise MethodError("other values cross at one client than at another: they can't be mixed")
    found: dict[str, CutGradient] = {}
    alone = len(several[0]) == 1
    for place in several[0]:
        own = {c: one[place] for c, one in gradients.items() if not isinstance(one, Tensor)}
        for client, gradient in own.items():
            shape, known = tuple(gradient.shape), rows[client]
            # A value that crosses by itself may do so because its rows are elsewhere.
            if shape[:1] != (known,) or (alone and shape.count(known) > 1):
                raise MethodError(
                    f"value {place!r} of client {client!r} has shape {shape}, expected its "
                    f"{known} rows in front, and no other dimension of that size"
                )
        for client, gradient in change(own).items():
            values = found.setdefault(client, {})
            if isinstance(values, dict):
                values[place] = gradient
    return found
