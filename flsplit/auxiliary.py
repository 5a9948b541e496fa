"""Auxiliary models: small classifiers of smashed data that stand in for the server segment.

Both sides build the same module from a kind, the shape of one row of smashed data and the number
of classes; the weights come from the server. What is used of an auxiliary model is the gradient
of its own loss by its input, so its output always has the shape of a cut-layer gradient.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flsplit.cut import Split
from flsplit.errors import TORCH_ERRORS, ConfigError, DataError, SegmentMismatchError, located
from flsplit.losses import Criterion

LINEAR, FIRST_STAGE, GIVEN = "linear", "first-stage", "given"

BuildAuxiliary = Callable[[tuple[int, ...], int], nn.Module]
"""Takes the shape of one row of smashed data and the number of classes, returns a module that
turns smashed data ``(b, *shape)`` into logits ``(b, num_classes)``, or where the model gives logits
of every position of a sequence, into ``(b, T, num_classes)``; T is the first of ``shape``."""


class MeanOverRest(nn.Module):
    """Pooling: the mean over all dimensions behind the first two, ``(b, C, ...)`` to ``(b, C)``."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``(b, C)``."""
        return inputs.flatten(2).mean(2) if inputs.ndim > 2 else inputs


class FlattenedRows(nn.Module):
    """Flatten rows of smashed data, ``(b, ...)`` to ``(b, n)``, that may be of several lengths.

    Parameters
    ----------
    shape : sequence of int
        Shape of a row. Of rows of another one, as padding gives them that follows the batch, each
        dimension that differs is averaged (adaptive average pooling) to the size it has here.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, rows: Tensor) -> Tensor:
        """Return ``(b, n)``."""
        if rows.ndim == len(self.shape) + 1:
            for dim, size in enumerate(self.shape, start=1):
                if rows.shape[dim] != size:
                    last = rows.movedim(dim, -1)
                    pooled = functional.adaptive_avg_pool1d(last.flatten(0, -2), size)
                    rows = pooled.reshape(*last.shape[:-1], size).movedim(-1, dim)
        return rows.flatten(1)


def linear(shape: Sequence[int], num_classes: int) -> nn.Module:
    """Return a linear classifier of the flattened smashed data."""
    return nn.Sequential(FlattenedRows(shape), nn.Linear(math.prod(shape), num_classes))


def first_stage(parts: Split, shape: Sequence[int], num_classes: int) -> nn.Module:
    """Return the server segment's first stage, pooling and a linear head.

    The first stage is the first module with parameters after the cut layer, among its siblings or
    else those of the module around it. Its weights are drawn anew.

    ConfigError if there is none, or it can't take smashed data on its own.
    """
    name, stage = _first_stage_of(parts)
    for module in stage.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    stage.eval()
    try:
        with torch.no_grad():
            features = MeanOverRest()(stage(_rows(shape, stage)))
        width = int(features.shape[1])
    except TORCH_ERRORS as error:
        raise ConfigError(
            f"auxiliary='first-stage': {name!r} alone can't take smashed data of shape "
            f"{(1, *shape)}: {error}; use 'linear', or give a function of your own"
        ) from error
    return nn.Sequential(stage, MeanOverRest(), nn.Linear(width, num_classes))


def _first_stage_of(parts: Split) -> tuple[str, nn.Module]:
    modules = dict(parts.server.named_modules())
    parent, _, _ = parts.cut.rpartition(".")
    while True:
        around = modules.get(parent)
        for name, child in around.named_children() if around else ():
            if any(True for _ in child.parameters()):
                return f"{parent}.{name}".lstrip("."), child
        if not parent:
            raise ConfigError(
                f"auxiliary='first-stage': there is no module with parameters after {parts.cut!r}; "
                "use 'linear', or give a function of your own"
            )
        parent, _, _ = parent.rpartition(".")


def build_auxiliary(
    kind: str,
    shape: Sequence[int],
    num_classes: int,
    *,
    given: BuildAuxiliary | None,
    parts: Callable[[], Split],
) -> nn.Module:
    """Return an auxiliary model, with weights as torch's random state says.

    ``given`` is the user's function; ``parts`` returns the model, cut in two, and is called for
    ``first-stage`` only.

    ConfigError if it can't be made. SegmentMismatchError if it doesn't turn such smashed data into
    logits of these classes.
    """
    if kind == GIVEN:
        if given is None:
            raise ConfigError(
                "the server's auxiliary model is a function of the user's, but the ClientApp has "
                "none; pass the same function as client_app(auxiliary=…)"
            )
        module = given(tuple(shape), num_classes)
        if not isinstance(module, nn.Module):
            raise ConfigError(f"auxiliary returned a {type(module).__name__}, expected a module")
    elif kind == FIRST_STAGE:
        module = first_stage(parts(), shape, num_classes)
    else:
        module = linear(shape, num_classes)
    _check_fits(module, shape, num_classes)
    if not any(p.requires_grad for p in module.parameters()):
        raise ConfigError("the auxiliary model has no parameters that can be trained")
    return module.train()


def _check_fits(module: nn.Module, shape: Sequence[int], num_classes: int) -> None:
    rows = _rows(shape, module)
    try:
        with torch.no_grad():
            logits = module.eval()(rows)
    except TORCH_ERRORS as error:
        raise SegmentMismatchError(
            f"the auxiliary model can't take smashed data of shape {tuple(rows.shape)}: {error}"
        ) from error
    found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    each = shape[:1] if len(found) == 3 else ()  # the positions of a sequence
    if found != (len(rows), *each, num_classes):
        raise SegmentMismatchError(
            f"the auxiliary model turns smashed data of shape {tuple(rows.shape)} into {found}, "
            f"expected logits of shape {(len(rows), num_classes)} as the server segment's"
        )


def _rows(shape: Sequence[int], like: nn.Module) -> Tensor:
    parameter = next(like.parameters(), torch.empty(0))
    return torch.zeros(1, *shape, device=parameter.device, dtype=parameter.dtype)


def auxiliary_loss(module: nn.Module, smashed: Tensor, labels: Any, criterion: Criterion) -> Tensor:
    """Return an auxiliary model's mean loss; errors say which shape didn't fit."""
    try:
        logits = module(smashed.clone())  # an in-place first operation fails on a leaf
    except TORCH_ERRORS as error:
        if "more than 1 value per channel" in str(error):
            raise DataError(
                "BatchNorm in the auxiliary model can't train on a batch of one (smashed data "
                f"{tuple(smashed.shape)}); use another batch-size, or drop-last"
            ) from error
        raise SegmentMismatchError(
            f"the auxiliary model can't take smashed data of shape {tuple(smashed.shape)}: {error}"
        ) from error
    with located("the auxiliary model"):
        return criterion(logits, labels)[0]


def emulated_gradient(
    module: nn.Module,
    smashed: Tensor,
    labels: Any,
    criterion: Criterion,
    *,
    create_graph: bool = False,
) -> Tensor:
    """Return ĝ: the gradient of the auxiliary model's mean loss by the smashed data."""
    leaf = smashed.detach().requires_grad_(True)
    loss = auxiliary_loss(module, leaf, labels, criterion)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=create_graph)
    return gradient


def cosine(first: Tensor, second: Tensor) -> float:
    """Return the cosine of the angle between two tensors, in float64; 0 if one of them is 0."""
    a, b = first.double().flatten(), second.double().flatten()
    norms = float(a.norm()) * float(b.norm())
    return float(a @ b) / norms if norms else 0.0
