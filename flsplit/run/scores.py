"""Loss, accuracy and metrics of an evaluation, over all samples however they come in batches."""

import copy
from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flsplit.errors import TORCH_ERRORS, ConfigError
from flsplit.message.evaluate import EvaluateReply
from flsplit.run.round import count_correct
from flsplit.server.segment import ServerSegment

if TYPE_CHECKING:
    from torchmetrics import Metric


class Scores:
    """Loss and metrics over all samples of one evaluation.

    Parameters
    ----------
    metrics : mapping of str to torchmetrics.Metric
        Further metrics by name; the objects themselves are left as they are.
    """

    def __init__(self, metrics: "Mapping[str, Metric]") -> None:
        self._metrics = {name: copy.deepcopy(metric) for name, metric in metrics.items()}
        self._loss, self._samples = 0.0, 0
        self._correct, self._classified = 0, 0

    def update(self, logits: Tensor, labels: Tensor, loss: float) -> None:
        """Count a test batch, whose mean loss is ``loss``.

        Raises
        ------
        ConfigError
            If a metric can't take the logits or labels.
        """
        self._loss += loss * len(labels)
        self._samples += len(labels)
        correct, classified = count_correct(logits, labels)
        self._correct += correct
        self._classified += classified
        for name, metric in self._metrics.items():
            try:
                metric.to(logits.device).update(logits, labels)
            except TORCH_ERRORS as error:
                raise ConfigError(
                    f"metrics: {name!r} can't take logits of shape {tuple(logits.shape)} with "
                    f"labels of shape {tuple(labels.shape)} and dtype {labels.dtype}: {error}"
                ) from error

    def compute(self) -> dict[str, float]:
        """Return loss and metrics, nothing if no sample came."""
        if not self._samples:
            return {}
        scores = {"loss": self._loss / self._samples, "num-examples": self._samples}
        if self._classified:
            scores["accuracy"] = self._correct / self._classified
        for name, metric in self._metrics.items():
            scores |= _numbers(name, metric.compute())
        return scores


@torch.no_grad()
def update_all(scores: Sequence[Scores], segment: ServerSegment, reply: EvaluateReply) -> None:
    """Run a test batch through the server segment, and count it in all ``scores``."""
    labels = reply.labels.to(segment.device)
    logits = segment.forward(segment.receive(reply.smashed))
    loss = float(segment.mean_loss(logits, labels))
    for one in scores:
        one.update(logits, labels, loss)


def _numbers(name: str, value: Any) -> dict[str, float]:
    """Give every number of a metric its own name: ``f1``, ``f1/0``, ``confusion/0/1``."""
    if isinstance(value, Mapping):
        return {
            k: v for key, one in value.items() for k, v in _numbers(f"{name}/{key}", one).items()
        }
    tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
    places = product(*map(range, tensor.shape))
    return {"/".join([name, *map(str, place)]): float(tensor[place]) for place in places}
