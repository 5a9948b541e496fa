"""What a method can do wrong with a step, in words."""

from collections.abc import Sequence

from torch import Tensor

from flsplit.cut.smashed import Smashed, fitting
from flsplit.finite import all_finite
from flsplit.server.segment import ServerSegment


def wrong_update(gradients: object, segment: ServerSegment) -> str:
    """Return why something can't update a server segment, "" if it can."""
    expected = [tuple(parameter.shape) for parameter in segment.parameters]
    if not isinstance(gradients, Sequence) or len(gradients) != len(expected):
        return (
            f"{shown(gradients)}, expected {len(expected)} gradients, one per trainable parameter "
            "of the server segment"
        )
    for index, (gradient, shape) in enumerate(zip(gradients, expected, strict=True)):
        fits = isinstance(gradient, Tensor) and tuple(gradient.shape) == shape
        if not (gradient is None or fits):
            return f"{shown(gradient)} for parameter {index}, expected a gradient of shape {shape}"
    return ""


def wrong_reply(gradient: object, smashed: Smashed) -> str:
    """Return why something can't be a cut-layer gradient of this smashed data, "" if it can."""
    tensors = fitting(gradient, smashed)
    if tensors is None:
        if isinstance(smashed, Tensor):
            expected = f"a cut-layer gradient of shape {tuple(smashed.shape)}"
        else:
            expected = f"a dict of cut-layer gradients of {smashed.learning}"
        return f"{shown(gradient)}, expected {expected}"
    for one in tensors:
        if not (one.is_floating_point() or one.is_complex()):
            return f"{one.dtype}, expected floating point"
        if not all_finite(one):
            return "NaN or infinite values"
    return ""


def shown(value: object) -> str:
    """Return a value, or its kind, in words."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    plain = value is None or isinstance(value, (str, int, float))
    return repr(value) if plain else f"a {type(value).__name__}"
