"""The last layers of a U-shaped split, which a client computes with its labels."""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flsplit.client.spec import ClientSpec
from flsplit.cut import Crossing
from flsplit.cut.halves import ClientHalf
from flsplit.cut.private import gradient_hooks
from flsplit.cut.smashed import Smashed
from flsplit.errors import ConfigError, NonFiniteError, SegmentMismatchError
from flsplit.losses import Count, Criterion
from flsplit.nested import as_arguments, num_rows, to_device
from flsplit.untrained import put

_GRADIENT, _KEPT, _BUFFER, _DONE = "gradient:", "kept:", "buffer:", "done"


def check_accumulated_hooks(what: str, named: Mapping[str, Tensor]) -> None:
    """Refuse hooks that nobody would call: these gradients are computed and not accumulated."""
    for name, parameter in named.items():
        if (kind := "register_post_accumulate_grad_hook") in gradient_hooks(parameter):
            raise ConfigError(
                f"{what} has a hook of the parameter {name!r} ({kind}), which would not be called: "
                "take register_hook"
            )


def withheld(labels: Any) -> Tensor:
    """Return what is sent in the place of labels that stay here: none ``(b, 0)``."""
    return torch.empty(num_rows(labels), 0)


class Tail:
    """The last layers of a client's segment, with the loss."""

    def __init__(self, segment: ClientHalf, spec: ClientSpec, device: torch.device) -> None:
        self._segment, self._device, self._autocast = segment, device, spec.autocast
        loss = functional.cross_entropy if spec.loss is None else spec.loss
        self._criterion = Criterion(loss, device)
        self._named = {n: p for n, p in segment.named_parameters() if p.requires_grad}
        check_accumulated_hooks("the model, cut twice,", self._named)

    def loss(
        self, outputs: Tensor, head: Smashed, inputs: Any, labels: Any
    ) -> tuple[Tensor, Count, Any]:
        """Return the mean loss of a batch, what it counts, and what collects its gradients.

        ``head`` is what the first layers gave for it, ``outputs`` what the server segment did.
        """
        args, kwargs = as_arguments(to_device(inputs, self._device))
        labels = to_device(labels, self._device)
        extra = {self._criterion.argument: labels} if self._criterion.argument else {}
        watching = self._criterion.watching_model() if extra else nullcontext()
        kind, dtype = self._device.type, self._autocast
        try:
            with torch.autocast(kind, dtype=dtype) if dtype else nullcontext(), watching:
                returning = self._segment.returning(outputs.to(self._device), head, args, kwargs)
                found = self._segment.tail(returning, **extra)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise SegmentMismatchError(
                f"the last layers can't take outputs of shape {tuple(outputs.shape)}: {error}"
            ) from error
        return *self._criterion(found, labels), returning

    def gradients(
        self, outputs: Tensor, head: Smashed, inputs: Any, labels: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the gradient of a batch's mean loss by the outputs, and what stays here.

        That is the gradients by the last layers' parameters and by what the first layers have kept
        for them, and the buffers as they are now, all by name.

        NonFiniteError if the loss is NaN or infinite.
        """
        loss, _, returning = self.loss(outputs, head, inputs, labels)
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError("the loss is NaN or infinite")
        kept = {
            n: v for n, v in returning.values.items() if v.requires_grad and n != returning.name
        }
        wanted = [returning.given, *self._named.values(), *kept.values()]
        given, *found = torch.autograd.grad(loss, wanted, allow_unused=True)
        names = [_GRADIENT + name for name in self._named] + [_KEPT + name for name in kept]
        stays = {n: one for n, one in zip(names, found, strict=True) if one is not None}
        stays |= {_BUFFER + n: one.detach().clone() for n, one in self._segment.named_buffers()}
        # Something is there of every step, also of layers that are frozen: it tells that it was.
        stays = stays or {_DONE: torch.empty(0)}
        return torch.zeros_like(outputs) if given is None else given.to(outputs), stays

    def put_buffers(self, stays: Mapping[str, Tensor]) -> None:
        """Let the buffers be what they were after the forward pass."""
        for name, buffer in self._segment.named_buffers():
            if (value := stays.get(_BUFFER + name)) is not None:
                put(buffer, value)

    def put_gradients(self, stays: Mapping[str, Tensor]) -> None:
        """Give the last layers' parameters their gradients."""
        for name, parameter in self._named.items():
            if (gradient := stays.get(_GRADIENT + name)) is not None:
                parameter.grad = gradient.to(parameter).clone()  # the first layers' is added to it

    def of_kept(
        self, head: Smashed, stays: Mapping[str, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what the first layers have kept for the last, and the gradients by it."""
        for name, value in head.kept.items() if isinstance(head, Crossing) else ():
            if (gradient := stays.get(_KEPT + name)) is not None:
                yield value, gradient.to(value)
