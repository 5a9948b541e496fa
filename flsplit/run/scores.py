"""Loss, accuracy and metrics of an evaluation, over all samples however they come in batches."""

import copy
from collections.abc import Mapping
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from flsplit.errors import ConfigError
from flsplit.losses import Count, logits_of
from flsplit.message.evaluate import EvaluateReply
from flsplit.message.u_shape import EvaluateTailReply
from flsplit.nested import num_rows, shapes_of, tensors_of, to_device
from flsplit.server.segment import ServerSegment

if TYPE_CHECKING:
    from torchmetrics import Metric


class Scored(NamedTuple):
    """A test batch: what :meth:`Scores.update` takes."""

    output: Any
    labels: Any
    loss: float
    counted: Count


class Scores:
    """Loss and metrics over all samples of one evaluation.

    The metrics' objects themselves are left as they are.
    """

    def __init__(self, metrics: "Mapping[str, Metric]") -> None:
        self._metrics = {name: copy.deepcopy(metric) for name, metric in metrics.items()}
        for metric in self._metrics.values():  # one may have been used before
            if hasattr(metric, "reset"):
                metric.reset()
        self._loss, self._weight, self._samples = 0.0, 0.0, 0
        self._correct, self._classified = 0, 0

    def update(self, output: Any, labels: Any, loss: float, count: Count) -> None:
        """Count a test batch, its mean loss and what that is over.

        ConfigError if a metric can't take the logits or labels; the batch isn't counted then.
        """
        logits = logits_of(output)
        for name, metric in self._metrics.items():
            try:
                metric.to(tensors_of(labels)[0].device).update(logits, labels)
            except Exception as error:  # a metric of the user's may raise anything
                raise ConfigError(
                    f"metrics: {name!r} can't take logits of shape {shapes_of(logits)} with "
                    f"labels of shape {shapes_of(labels)}: {type(error).__name__}: {error}"
                ) from error
        if count.weight:  # where all labels are ignored there is no mean
            self._loss += loss * count.weight
        self._weight += count.weight
        self._samples += num_rows(labels)
        self._correct += count.correct
        self._classified += count.classified

    def add(self, sums: EvaluateTailReply) -> None:
        """Count the test batches of a client that has computed loss and accuracy itself."""
        self._loss += sums.loss
        self._weight += sums.weight
        self._samples += sums.num_examples
        self._correct += sums.correct
        self._classified += sums.classified

    def compute(self) -> dict[str, float]:
        """Return loss and metrics, nothing if no sample came."""
        if not self._samples:
            return {}
        scores: dict[str, float] = {"num-examples": self._samples}
        if self._weight:
            scores = {"loss": self._loss / self._weight, **scores}
        if self._classified:
            scores["accuracy"] = self._correct / self._classified
        for name, metric in self._metrics.items():
            try:
                scores |= _numbers(name, metric.compute())
            except Exception as error:
                raise ConfigError(
                    f"metrics: {name!r} can't be computed: {type(error).__name__}: {error}"
                ) from error
        return scores


@torch.no_grad()
def score_test_batch(segment: ServerSegment, reply: EvaluateReply) -> Scored:
    """Run a test batch through the server segment, and compute its loss."""
    labels = to_device(reply.labels, segment.device)
    output = run_test_batch(segment, reply, labels)
    loss, count = segment.criterion(output, labels)
    return Scored(output, labels, float(loss), count)


@torch.no_grad()
def run_test_batch(segment: ServerSegment, reply: EvaluateReply, labels: Any) -> Any:
    """Return what the server segment gives for a test batch."""
    segment.module.eval()
    # What is tested is trained on by nobody: buffers stay as they are, whatever forward does.
    return segment.forward(segment.receive(reply.smashed), labels, moves_buffers=False)


def _numbers(name: str, value: Any) -> dict[str, float]:
    """Give every number of a metric its own name: ``f1``, ``f1/0``, ``confusion/0/1``."""
    if isinstance(value, Mapping):
        return {
            k: v for key, one in value.items() for k, v in _numbers(f"{name}/{key}", one).items()
        }
    if isinstance(value, (tuple, list)) and not all(isinstance(one, (int, float)) for one in value):
        return _numbers(name, dict(enumerate(value)))  # of other shapes each, as a curve's are
    tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
    places = product(*map(range, tensor.shape))
    return {"/".join([name, *map(str, place)]): float(tensor[place]) for place in places}
