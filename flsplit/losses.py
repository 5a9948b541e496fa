"""Losses as users give them: what they return, what labels they take, how their means add up."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flsplit.errors import TORCH_ERRORS, ConfigError, DataError
from flsplit.nested import map_tensors, num_rows, tensors_of

Loss = Callable[[Any, Any], Any]
"""Takes the model's output and the labels; returns the mean loss, a scalar tensor, or a pair of
scalar tensors ``(sum, weight)``, of which the mean is the quotient."""

IGNORED = -100
"""The label that torch's cross-entropy leaves out unless it is told another one."""


class ModelLoss:
    """The loss that a model computes itself, if it is given the labels.

    Models of the transformers library do: ``loss=ModelLoss()``. The labels go into the part of
    forward that the server computes. One client's rows go through it at a time.

    Parameters
    ----------
    argument : str
        The argument of the model's forward that takes the labels.
    """

    def __init__(self, argument: str = "labels") -> None:
        self.argument = argument

    def __call__(self, output: Any, labels: Any) -> Tensor:
        """Return ``output.loss``, ``output["loss"]``, or the first of several outputs.

        Raises
        ------
        ConfigError
            If there is none.
        """
        loss = getattr(output, "loss", None)
        if loss is None and isinstance(output, Mapping):
            loss = output.get("loss")
        if loss is None and isinstance(output, tuple | list) and output:
            loss = output[0]
        if not isinstance(loss, Tensor):
            raise ConfigError(
                f"loss is ModelLoss({self.argument!r}), but the model returned a "
                f"{type(output).__name__} without a loss: does its forward take "
                f"{self.argument!r} and compute one?"
            )
        return loss


class Criterion:
    """A user's loss, and what is known about it.

    Parameters
    ----------
    loss : callable
        See :data:`Loss`, or a :class:`ModelLoss`.
    device : torch.device
        Where its buffers, class weights say, are needed.

    Raises
    ------
    ConfigError
        If it has parameters of its own: nobody would train them.
    """

    def __init__(self, loss: Loss, device: torch.device) -> None:
        if isinstance(loss, nn.Module):
            if learnt := [name for name, p in loss.named_parameters() if p.requires_grad]:
                raise ConfigError(
                    f"loss has parameters of its own ({', '.join(learnt[:3])}), which no optimizer "
                    "would train: make them parameters of the model, after the cut, and let it "
                    "return what the loss needs of them"
                )
            loss = loss.to(device)
        self._loss = loss
        self.argument = loss.argument if isinstance(loss, ModelLoss) else None
        """The argument of the model's forward that takes the labels, if it computes the loss."""
        kind, options = _unwrapped(loss)
        self._is_cross_entropy = kind in (functional.cross_entropy, functional.nll_loss)
        self._is_binary = kind is functional.binary_cross_entropy_with_logits
        weight = options.get("weight")
        self._weight = weight.to(device) if isinstance(weight, Tensor) else None
        ignored = options.get("ignore_index", IGNORED)
        self.ignored = ignored if isinstance(ignored, int) else IGNORED
        """The class label that doesn't count."""
        self._is_mean = options.get("reduction", "mean") == "mean"

    def __call__(self, output: Any, labels: Any) -> tuple[Tensor, float]:
        """Return the mean loss, and what it counts in a mean over several batches.

        Raises
        ------
        DataError
            If the labels don't fit the output.
        ConfigError
            If the loss isn't one, or can't be differentiated.
        """
        if self._is_cross_entropy and isinstance(output, Tensor) and isinstance(labels, Tensor):
            check_classes(output, labels, self.ignored)
        try:
            loss = self._loss(output, labels)
        except TORCH_ERRORS as error:
            if isinstance(error, ConfigError):
                raise
            raise DataError(
                f"the loss can't take logits of {_described(output)} with labels of "
                f"{_described(labels)}: {error}"
            ) from error
        if isinstance(loss, tuple) and len(loss) == 2 and all(map(_is_scalar, loss)):
            total, count = loss
            return _checked(total / count, output), float(count)
        return _checked(loss, output), self._count(output, labels)

    def _count(self, output: Any, labels: Any) -> float:
        """Return how many labels a mean is over; rows, if the loss is none of torch's own."""
        known = self._is_cross_entropy and self._is_mean and isinstance(labels, Tensor)
        if not known or labels.is_floating_point():
            return float(num_rows(labels))
        counts = labels != self.ignored
        if self._weight is None:
            return float(counts.sum())
        return float(self._weight[labels[counts]].sum())

    def count_correct(self, output: Any, labels: Any) -> tuple[int, int]:
        """Return how many predictions are right, and of how many.

        There are none unless labels are class indices ``(b,)`` beside logits ``(b, C)``; for
        torch's own cross-entropy also ``(b, ...)`` beside ``(b, C, ...)``, and for its binary one
        a label per logit, one in a row.
        """
        logits = logits_of(output)
        if not (isinstance(logits, Tensor) and isinstance(labels, Tensor)):
            return 0, 0
        if self._is_binary and labels.shape == logits.shape and logits.numel() == len(logits):
            return int(((logits > 0) == (labels > 0.5)).sum()), len(labels)
        if labels.is_floating_point() or logits.ndim != labels.ndim + 1 or logits.shape[1] < 2:
            return 0, 0
        if labels.ndim != 1 and not self._is_cross_entropy:
            return 0, 0  # which dimension classes are in, and if labels are shifted, is not known
        right = logits.argmax(1) == labels
        counts = labels != self.ignored
        return int((right & counts).sum()), int(counts.sum())


def logits_of(output: Any) -> Any:
    """Return what a model's output has for logits: itself, or what is called so in it."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return output.get("logits")
    return getattr(output, "logits", None)


def check_classes(logits: Tensor, labels: Tensor, ignored: int = IGNORED) -> None:
    """Raise DataError if class labels (integers, beside logits ``(b, C, ...)``) are out of range.

    On a GPU torch would end the process instead of raising.
    """
    is_class_index = not labels.is_floating_point() and logits.ndim == labels.ndim + 1
    if not is_class_index or labels.numel() == 0:
        return
    num_classes = logits.shape[1]
    wrong = ((labels >= num_classes) | (labels < 0)) & (labels != ignored)
    if bool(wrong.any()):
        raise DataError(
            f"label {int(labels[wrong][0])} is out of range: the model has {num_classes} classes, "
            f"0 to {num_classes - 1}"
        )


_FUNCTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.CrossEntropyLoss: functional.cross_entropy,
    nn.NLLLoss: functional.nll_loss,
    nn.BCEWithLogitsLoss: functional.binary_cross_entropy_with_logits,
}


def _unwrapped(loss: Any) -> tuple[Any, dict[str, Any]]:
    """Return torch's function behind a loss, and the options that it is called with."""
    options: dict[str, Any] = {}
    while isinstance(loss, partial):
        options = loss.keywords | options
        loss = loss.func
    if type(loss) in _FUNCTIONS:
        names = ("weight", "ignore_index", "reduction", "label_smoothing")
        own = {name: getattr(loss, name) for name in names if hasattr(loss, name)}
        return _FUNCTIONS[type(loss)], own | options
    return loss, options


def _is_scalar(thing: object) -> bool:
    return (isinstance(thing, Tensor) and thing.ndim == 0) or isinstance(thing, (int, float))


def _checked(loss: Any, output: Any) -> Tensor:
    if not (isinstance(loss, Tensor) and loss.ndim == 0):
        what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise ConfigError(
            f"the loss returned {what}, expected a scalar tensor (a mean), or (sum, weight)"
        )
    if not loss.requires_grad and any(tensor.requires_grad for tensor in tensors_of(output)):
        raise ConfigError("the loss returned a tensor that is detached from the logits")
    return loss


def _described(tree: Any) -> str:
    if isinstance(tree, Tensor):
        return f"shape {tuple(tree.shape)} and dtype {tree.dtype}"
    shapes = map_tensors(lambda tensor: (tuple(tensor.shape), tensor.dtype), tree)
    return f"shapes and dtypes {shapes}"
