"""Losses as users give them: what they return, what labels they take, how their means add up."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from flsplit.errors import TORCH_ERRORS, ConfigError, DataError
from flsplit.log import warn_once
from flsplit.nested import described, num_rows, tensors_of, to_device

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
        """Return ``output.loss``, ``output["loss"]``, or the first scalar of several outputs.

        ConfigError if there is none.
        """
        loss = getattr(output, "loss", None)
        if loss is None and isinstance(output, Mapping):
            loss = output.get("loss")
        if loss is None and isinstance(output, tuple | list):
            loss = next((one for one in output if isinstance(one, Tensor) and not one.ndim), None)
        if not isinstance(loss, Tensor):
            raise ConfigError(
                f"loss is ModelLoss({self.argument!r}), but the model returned a "
                f"{type(output).__name__} without a loss: does its forward take "
                f"{self.argument!r} and compute one?"
            )
        return loss


class Count(NamedTuple):
    """What a mean loss is over, and how many of its predictions are right.

    Attributes
    ----------
    weight : float
        What the mean counts among others: labels that aren't ignored, the sum of their classes'
        weights, or rows.
    correct, classified : int
        Right predictions, and of how many; 0 of 0 where that means nothing.
    """

    weight: float
    correct: int = 0
    classified: int = 0


class Criterion:
    """A user's loss, and what can be seen of how it is computed.

    torch's own losses are watched while it computes: where one of them gives the mean itself, what
    the mean is over is known, whatever wraps it and however logits and labels were reshaped.

    ConfigError if it has parameters of its own: nobody would train them.
    """

    def __init__(self, loss: Loss, device: torch.device) -> None:
        self._loss = _moved(loss, device)
        self._is_torchs = any(loss is one for one in _WATCHED)  # nothing around it is to be watched
        self.argument = loss.argument if isinstance(loss, ModelLoss) else None
        """The argument of the model's forward that takes the labels, if it computes the loss."""
        self._of_model: list[_Call] = []

    @contextmanager
    def watching_model(self) -> Iterator[None]:
        """Watch a model that computes its own loss, which is to be judged next."""
        with _Watch() as watch:
            yield
        self._of_model = watch.calls

    def __call__(self, output: Any, labels: Any) -> tuple[Tensor, Count]:
        """Return the mean loss, and what it counts in a mean over several batches.

        DataError if the labels don't fit the output. ConfigError if the loss isn't one, or can't be
        differentiated.
        """
        try:
            if self._is_torchs:
                calls = [_noted(self._loss, (output, labels), {})]
                loss = calls[0].result
            else:
                with _Watch() as watch:
                    loss = self._loss(output, labels)
                calls, self._of_model = self._of_model + watch.calls, []
        except (ConfigError, DataError):
            raise
        except Exception as error:  # a function of the user's may raise anything
            kind = "" if isinstance(error, TORCH_ERRORS) else f"{type(error).__name__}: "
            raise DataError(
                f"the loss can't take logits of {described(output)} with labels of "
                f"{described(labels)}: {kind}{error}"
            ) from error
        if isinstance(loss, tuple) and len(loss) == 2 and all(map(_is_scalar, loss)):
            total, weight = loss
            mean, weight = total / weight, float(weight)
        else:
            mean = total = loss
            weight = None
        mean = _checked(mean, output)
        call = None
        for one in calls:
            if one.result is total:
                call = one
                break
        if weight is None:
            weight = call.weight() if call else None
            if (
                call
                and call.options.get("reduction") == "sum"
                and reduction_of(self._loss) != "sum"
            ):
                warn_once("", f"the loss has {SUMMED}")  # of one that says so it was said before
        right = call.right() if call else _right(logits_of(output), labels)
        return mean, Count(float(num_rows(labels)) if weight is None else weight, *right)


class _Given(torch.autograd.Function):
    """A loss of which nothing is known but its gradient by the output."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, gradient: Tensor) -> Tensor:
        """Return 0."""
        ctx.save_for_backward(gradient)
        return output.new_zeros((), dtype=output.real.dtype)

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor, None]:
        """Return the gradient."""
        (gradient,) = ctx.saved_tensors
        return factor * gradient, None


class ClientsCriterion(Criterion):
    """In place of a loss, at the server of a U-shaped split: clients say the gradients of theirs.

    They come in the labels' place. As long as they haven't, there are none ``(b, 0)``.
    """

    def __init__(self) -> None:
        self.argument = None

    def __call__(self, output: Any, labels: Any) -> tuple[Tensor, Count]:
        """Return a scalar that has the given gradient; the loss itself isn't known."""
        gradient = labels if labels.shape == output.shape else torch.zeros_like(output)
        return _Given.apply(output, gradient), Count(0.0)  # type: ignore[no-untyped-call]


class _Call(NamedTuple):
    """A call of one of torch's own losses."""

    function: Callable[..., Tensor]
    options: dict[str, Any]
    result: Tensor
    all_count: bool  # whether it is known that no label is ignored

    @property
    def _counts(self) -> Tensor:
        ignored: int = self.options.get("ignore_index", IGNORED)
        return torch.ne(self.options["target"], ignored)

    def weight(self) -> float | None:
        """Return how many labels a mean is over, None if rows say it."""
        options, logits, labels = self.options, self.options["input"], self.options["target"]
        if self.function not in _CROSS_ENTROPY or options.get("reduction", "mean") != "mean":
            return None
        if labels.is_floating_point():  # class probabilities
            return float(labels.numel() / logits.shape[min(1, logits.ndim - 1)])
        if (weight := options.get("weight")) is None:
            return float(labels.numel() if self.all_count else self._counts.sum())
        return float(weight[labels[self._counts].long()].sum())  # uint8 would be a mask

    def right(self) -> tuple[int, int]:
        """Return how many predictions are right, and of how many."""
        logits, labels = self.options["input"], self.options["target"]
        if self.function is functional.binary_cross_entropy_with_logits:
            if logits.numel() != logits.shape[:1].numel():  # several labels a row
                return 0, 0
            return int(((logits > 0) == (labels > 0.5)).sum()), labels.numel()
        if labels.is_floating_point():
            return 0, 0
        found = logits.argmax(min(1, logits.ndim - 1)) == labels
        if self.all_count:
            return int(found.sum()), labels.numel()
        return int((found & self._counts).sum()), int(self._counts.sum())


class _Watch(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call ``func``."""
        if func not in _NAMES:
            return func(*args, **kwargs or {})
        call = _noted(func, args, kwargs or {})
        self.calls.append(call)
        return call.result


def _noted(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Call:
    """Call one of torch's own losses, if class labels are in range."""
    options = {**dict(zip(_NAMES[func], args, strict=False)), **kwargs}
    all_count = False
    if func is not functional.binary_cross_entropy_with_logits:
        ignored = options.get("ignore_index", IGNORED) if func in _CROSS_ENTROPY else None
        try:
            all_count = check_classes(options["input"], options["target"], ignored)
        except RuntimeError:  # inside torch.vmap nothing has a value that can be looked at
            all_count = False
    return _Call(func, options, func(*args, **kwargs), all_count)


_CROSS_ENTROPY = (functional.cross_entropy, functional.nll_loss)
_WATCHED = (
    *_CROSS_ENTROPY,
    functional.binary_cross_entropy_with_logits,
    functional.multi_margin_loss,
)
_NAMES = {one: tuple(inspect.signature(one).parameters) for one in _WATCHED}


def _right(logits: Any, labels: Any) -> tuple[int, int]:
    """Return how many of class indices ``(b,)`` logits ``(b, C)`` have right, for any loss."""
    if not (isinstance(logits, Tensor) and isinstance(labels, Tensor)):
        return 0, 0
    if labels.is_floating_point() or labels.ndim != 1 or logits.ndim != 2 or logits.shape[1] < 2:
        return 0, 0
    counts = labels >= 0
    return int(((logits.argmax(1) == labels) & counts).sum()), int(counts.sum())


SUMMED = (
    "reduction='sum', where a mean is expected: it is trained as it is, but an evaluation's loss "
    "depends on evaluate_batch_size; a loss may return (sum, weight)"
)


def reduction_of(loss: Loss) -> object:
    """Return what one of torch's losses, or a `functools.partial` of one, does with its rows."""
    return getattr(loss, "reduction", getattr(loss, "keywords", {}).get("reduction"))


def is_plain_cross_entropy(loss: Loss) -> bool:
    """Tell whether a loss is cross-entropy without any option."""
    if type(loss) is not nn.CrossEntropyLoss:
        return loss is functional.cross_entropy
    options = (loss.weight, loss.ignore_index, loss.reduction, loss.label_smoothing)
    return options == (None, IGNORED, "mean", 0.0)


def logits_of(output: Any) -> Any:
    """Return what a model's output has for logits: itself, or what is called so in it."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return output.get("logits")
    return getattr(output, "logits", None)


def check_classes(logits: Tensor, labels: Tensor, ignored: int | None) -> bool:
    """Raise DataError if class labels (integers, beside logits ``(b, C, ...)``) are out of range.

    On a GPU torch would end the process instead of raising. Otherwise, tell whether they are known
    to be classes all, none ``ignored``.
    """
    is_class_index = not labels.is_floating_point() and logits.ndim == labels.ndim + 1
    if not is_class_index or labels.numel() == 0:
        return False
    num_classes = logits.shape[1 if logits.ndim > 1 else 0]
    least, most = labels.aminmax()
    if least >= 0 and most < num_classes:
        return ignored is None or not least <= ignored <= most
    wrong = (labels >= num_classes) | (labels < 0)
    if ignored is not None:
        wrong &= labels != ignored
    if bool(wrong.any()):
        raise DataError(
            f"label {int(labels[wrong][0])} is out of range: the model has {num_classes} classes, "
            f"0 to {num_classes - 1}"
        )
    return False


def _moved(loss: Any, device: torch.device) -> Any:
    """Return a loss with its tensors on ``device``; raise ConfigError if it would be trained."""
    if isinstance(loss, partial):
        keywords = to_device(loss.keywords, device)
        return partial(_moved(loss.func, device), *to_device(loss.args, device), **keywords)
    if not isinstance(loss, nn.Module):
        return loss
    if learnt := [name for name, p in loss.named_parameters() if p.requires_grad]:
        raise ConfigError(
            f"loss has parameters of its own ({', '.join(learnt[:3])}), which no optimizer "
            "would train: make them parameters of the model, after the cut, and let it "
            "return what the loss needs of them"
        )
    return loss.to(device)


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
