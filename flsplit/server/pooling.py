"""Whether clients' smashed data can go through the server segment as one batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flsplit.errors import FlsplitError
from flsplit.log import logger
from flsplit.server.client_batch import ClientBatch
from flsplit.server.segment import ServerSegment


def can_be_pooled(segment: ServerSegment, batches: Sequence[ClientBatch]) -> bool:
    """Tell whether the clients' smashed data can go through the server segment as one batch.

    It has to be tensors with rows of one shape: where several values cross, which of their
    dimensions are rows is not known. And rows must not see each other there, or must do so through
    BatchNorm alone, as they would not in a layout ``(T, b, ...)``. That is tried once for each
    shape of rows, in evaluation mode: together they give what they give one by one.
    """
    if len(batches) == 1:
        return True
    if segment.criterion.argument:  # a model's own loss is a mean over all rows that go in
        return False
    tensors = [one.smashed for one in batches if isinstance(one.smashed, Tensor)]
    kinds = {(one.shape[1:], one.dtype) for one in tensors}
    if len(tensors) < len(batches) or len(kinds) > 1:
        return False
    kind = kinds.pop()
    if kind not in segment.pools:
        problem = _problem_of_pooling(segment, tensors)
        segment.pools[kind] = not problem
        if problem:
            shape = tuple(tensors[0].shape)
            logger.warning(
                "the server segment computes one client at a time: %s of smashed data of shape %s",
                problem,
                shape,
            )
    return segment.pools[kind]


@torch.no_grad()
def _problem_of_pooling(segment: ServerSegment, tensors: Sequence[Tensor]) -> str:
    try:
        with segment.trying():
            pooled = segment.forward(torch.cat(list(tensors)))
            alone = [segment.forward(one) for one in tensors]
    except FlsplitError:
        return ""  # it is said when the step is computed
    if not all(isinstance(output, Tensor) for output in (pooled, *alone)):
        return "the model's output is more than one tensor"
    rows = [len(tensor) for tensor in tensors]
    if len(pooled) != sum(rows) or [len(output) for output in alone] != rows:
        return "the output has not one row for each row"
    one_by_one = torch.cat(alone)
    scale = float(one_by_one.abs().nan_to_num().max()) if one_by_one.numel() else 0.0
    if torch.allclose(pooled, one_by_one, rtol=1e-2, atol=1e-2 * scale, equal_nan=True):
        return ""
    return "it mixes the rows, or they lie in another dimension than the first,"
