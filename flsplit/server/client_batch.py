"""One client's mini-batch at the cut layer, and what several clients' batches are as one."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flsplit.cut.smashed import Smashed, not_one_tensor
from flsplit.errors import (
    OF_A_BATCH,
    DataError,
    FlsplitError,
    MethodError,
    SegmentMismatchError,
    at,
)
from flsplit.nested import cat_rows, described, leaves_of, num_rows, to_device
from flsplit.server.segment import ServerSegment


@dataclass(frozen=True)
class ClientBatch:
    """One client's mini-batch at the cut layer, on the server's device.

    Attributes
    ----------
    client : str
        Whose it is.
    smashed : torch.Tensor or Crossing
        Smashed data ``(b, ...)``, or all that crosses where that is more than one tensor.
    labels : nesting of torch.Tensor
        Labels ``(b, ...)``; none, ``(b, 0)``, where they stay with the client.
    num_examples : int
        Size of the client's training data.
    frozen : bool
        Whether the client needs no cut-layer gradient: nothing before the cut is trained.
    """

    client: str
    smashed: Smashed
    labels: Any
    num_examples: int
    frozen: bool = False

    def __len__(self) -> int:
        """Return the number of rows."""
        labels = self.labels
        return labels.size(0) if isinstance(labels, Tensor) and labels.ndim else num_rows(labels)

    def to(self, segment: ServerSegment) -> "ClientBatch":
        """Return the batch on the segment's device."""
        smashed, labels = segment.receive(self.smashed), to_device(self.labels, segment.device)
        if smashed is self.smashed and labels is self.labels:
            return self
        return replace(self, smashed=smashed, labels=labels)

    @property
    def tensor(self) -> Tensor:
        """The smashed data as one tensor ``(b, ...)``; MethodError if what crosses is none."""
        if isinstance(self.smashed, Tensor):
            return self.smashed
        raise MethodError(
            f"the method computes with smashed data that is one tensor, but "
            f"{not_one_tensor(self.smashed)}; cut where one crosses, with its rows in front "
            "(flsplit.cuts lists them), or take a method that works with gradients alone"
        )


def named(batches: Sequence[ClientBatch]) -> str:
    """Return whose batches these are, for an error."""
    names = ", ".join(repr(batch.client) for batch in batches)
    return f"client {names}" if len(batches) == 1 else f"clients {names}"


def pool(smashed: Sequence[Tensor], batches: Sequence[ClientBatch]) -> Tensor:
    """Return the clients' smashed data, concatenated.

    SegmentMismatchError if one client's differs from another's in more than the number of rows.
    """
    if len(smashed) == 1:
        return smashed[0]
    for tensor, batch in zip(smashed, batches, strict=True):
        if tensor.shape[1:] != smashed[0].shape[1:]:
            raise SegmentMismatchError(
                f"the smashed data of client {batch.client!r} has shape {tuple(tensor.shape)}, "
                f"that of client {batches[0].client!r} {tuple(smashed[0].shape)}: do the clients' "
                "models and inputs differ?"
            )
    return torch.cat(list(smashed))


def pool_labels(batches: Sequence[ClientBatch]) -> Any:
    """Return the clients' labels, concatenated.

    DataError if one client's differ from those of most in more than the number of rows; it names
    it.
    """
    kinds = [
        tuple((place, leaf.shape[1:]) for place, leaf in leaves_of(batch.labels))
        for batch in batches
    ]
    ((usual, _),) = Counter(kinds).most_common(1)
    for kind, batch in zip(kinds, batches, strict=True):
        if kind != usual:
            error = DataError(
                f"labels of {described(batch.labels)} can't be mixed with those of most clients"
            )
            raise blamed(error, [batch])
    return cat_rows([batch.labels for batch in batches])


def blamed(error: FlsplitError, batches: Sequence[ClientBatch]) -> FlsplitError:
    """Return the error with the clients' names."""
    if len(batches) == 1 and isinstance(error, OF_A_BATCH):
        error.client = batches[0].client
    return at(named(batches), error)
