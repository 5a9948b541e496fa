"""One step of a model whole and split, compared."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flsplit.cut.cut_errors import CutError
from flsplit.cut.look import Look, free_copies, fresh, undisturbed
from flsplit.cut.partial_forward import eager, instrument, places_of
from flsplit.cut.scripted import plain_copy
from flsplit.cut.sides import one_side
from flsplit.cut.stretch import Crossing, aliases, for_tail, run_from_cut, run_to_cut, tensor_at
from flsplit.cut.trace import tensors_in
from flsplit.errors import TORCH_ERRORS


def verify(
    model: nn.Module, cut: str, found: Look, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Run one step whole and split, on copies, and compare the results.

    Outputs, gradients and buffers must agree up to the order of a sum: what no rule sees (a hook
    on a value that crosses, say) shows here. There is one more model in memory at a time: first
    the whole, then its parts, each with its own side's weights.

    CutError if they differ.
    """
    expected, result, learns = _whole_step(model, args, kwargs)
    free_copies(model)
    client, server = (plain_copy(one_side(model, names)) for names in (found.client, found.server))
    for half in (client, server):
        instrument(half, cut, found.before)
    with undisturbed(args, kwargs), eager():
        args, kwargs = fresh(args, kwargs)
        trace, held = run_to_cut(client, cut, args, kwargs, [found.passage])
        if trace != found.passage.trace:
            raise CutError(f"forward takes another way before {cut!r} when it is run again")
        values = {key: held[key] for key in found.passage.values}
        kept = {key: held[key] for key in found.passage.kept}
        crossing = Crossing(values, trace, aliases(values), kept=kept)
        sent = crossing.detached()
        try:
            output = middle = run_from_cut(server, cut, sent)
            if found.passage.tail:
                middle = tensor_at(found.item, output)
                tail = for_tail(found.passage, middle.detach(), crossing)
                output = run_from_cut(client, places_of(cut)[1], tail)
        except TORCH_ERRORS as error:
            if isinstance(error, CutError):
                raise
            raise CutError(
                f"cut at {cut!r}, the rest of forward fails, and uncut it doesn't: {error}"
            ) from error
        if learns:
            _backward(output)
            if found.passage.tail and (gradient := tail.given.grad) is not None:
                middle.backward(gradient)
        if learns and (crossing.learning or kept):
            gradients = {key: sent.values[key].grad for key in crossing.learning}
            crossing.backward(gradients, tail.gradients if kept else {})
    pairs: list[tuple[str, Tensor | None, Tensor | None]] = [
        ("an output", *both) for both in zip(expected, tensors_in(output), strict=True)
    ]
    theirs = {half: dict(_named(half)) for half in (client, server)}
    for name, tensor in result.items():
        other = theirs[client if name in found.client else server][name]
        if not isinstance(other, nn.Parameter):
            pairs.append((name, tensor, other))
        elif learns:
            pairs.append((f"the gradient of {name}", tensor, other.grad))
    for what, a, b in pairs:
        if a is not b and (a is None or b is None or not _close(a, b)):
            raise CutError(f"cut at {cut!r}, the model computes something else: {what} differs")


def _whole_step(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Tensor], dict[str, Tensor | None], bool]:
    """Return what a copy computes: its outputs, gradients and buffers, and whether it can learn."""
    whole = plain_copy(model)
    with undisturbed(args, kwargs), eager():
        own_args, own_kwargs = fresh(args, kwargs)
        output = whole(*own_args, **own_kwargs)
        try:
            _backward(output)
            learns = torch.is_grad_enabled()
        except RuntimeError:  # this model can't be trained in one piece, either
            learns = False
    _check_frozen(model, whole)
    result = {n: t.grad if isinstance(t, nn.Parameter) else t for n, t in _named(whole)}
    # Without their graph, which holds the weights.
    return [tensor.detach() for tensor in tensors_in(output)], result, learns


def _check_frozen(before: nn.Module, after: nn.Module) -> None:
    """Refuse a forward that moves frozen parameters: they are sent once, and never averaged."""
    pairs = zip(before.named_parameters(), after.parameters(), strict=True)
    for (name, old), new in pairs:
        if not (old.requires_grad or torch.equal(old, new) or bool(old.isnan().any())):
            raise CutError(
                f"forward changes the frozen parameter {name!r} itself (a moving average?): make "
                "it a buffer (register_buffer), which is kept and averaged as part of the state"
            )


def _backward(output: Any) -> None:
    floats = [t for t in tensors_in(output) if t.requires_grad]
    if floats and torch.is_grad_enabled():
        # By the mean of squares, whose own graph would hold several times what a model returns.
        torch.autograd.backward(floats, [2 * t.detach() / max(t.numel(), 1) for t in floats])


def _named(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.layout is not torch.strided or a.is_nested:
        a, b = a.to_dense(), b.to_dense()
    if torch.equal(a, b):
        return True
    tolerance = 1e-2 if a.dtype in (torch.float16, torch.bfloat16) else 1e-4
    return torch.allclose(a.detach(), b.detach(), rtol=tolerance, atol=1e-6, equal_nan=True)
