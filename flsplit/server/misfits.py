"""Whose smashed data and labels are not of the shape and kind that the server segment takes."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flsplit.account.ledger import RoundEntry
from flsplit.cut import Crossing
from flsplit.cut.smashed import Smashed
from flsplit.errors import OF_A_BATCH, FlsplitError, SegmentMismatchError
from flsplit.message.request import Batch, Reply, Request
from flsplit.nested import leaves_of, map_tensors, to_device
from flsplit.server.clients import Clients
from flsplit.server.segment import ServerSegment

_Kind = tuple[int, Any, Any]


class Fits:
    """Tells which clients' batches a server segment can't take, before it computes a step.

    As long as all are of one shape and kind nothing is computed. Of others, a batch is tried.

    Where a method ``pools`` all rows of a step, they must be of one shape.
    """

    def __init__(self, server_for: Callable[[str], ServerSegment], *, pools: bool) -> None:
        self._server_for = server_for
        self._pools = pools
        self._taken: set[_Kind] = set()

    def sifted(
        self,
        clients: Clients,
        requests: Mapping[str, Request],
        replies: Mapping[str, Reply],
        entry: RoundEntry,
    ) -> Mapping[str, Reply]:
        """Return the replies, without those that the server segment can't take."""
        kinds = set()
        for name, reply in replies.items():
            for smashed, labels in reply.batches():
                kinds.add(self._kind(name, smashed, labels))
        if len(kinds) == 1 and kinds <= self._taken:  # as in most steps
            return replies
        misfits = self._misfits({name: reply.batches() for name, reply in replies.items()})
        for name, error in misfits.items():
            clients.leave_out(name, requests[name].step, error, entry)
        return {name: reply for name, reply in replies.items() if name not in misfits}

    def _misfits(self, batches: Mapping[str, Sequence[Batch]]) -> dict[str, FlsplitError]:
        """Return whose batches don't fit, and why; nobody if no client's ever have.

        Then client and server segments don't fit together, which the step will say.
        """
        kinds = {
            name: [self._kind(name, *one) for one in of_client]
            for name, of_client in batches.items()
        }
        if not self._taken and len({kind for known in kinds.values() for kind in known}) == 1:
            self._taken |= set(next(known for known in kinds.values() if known))
        found: dict[str, FlsplitError] = {}
        for name, of_client in batches.items():
            for one in of_client:
                if name not in found and (error := self._problem(name, *one)):
                    found[name] = error
        if not self._taken:
            return {}
        return found | self._odd_rows({n: k for n, k in kinds.items() if k and n not in found})

    def _kind(self, client: str, smashed: Smashed, labels: Any) -> _Kind:
        server = id(self._server_for(client))
        if isinstance(smashed, Tensor) and isinstance(labels, Tensor):
            return server, (smashed.shape[1:], smashed.dtype), (labels.shape[1:], labels.dtype)
        return server, _rows_of(smashed), _rows_of(labels)

    def _problem(self, client: str, smashed: Smashed, labels: Any) -> FlsplitError | None:
        if (kind := self._kind(client, smashed, labels)) in self._taken:
            return None
        segment = self._server_for(client)
        try:
            with torch.no_grad(), segment.trying():
                # A loss may change labels in place, and computes with them once more in the step.
                given = to_device(map_tensors(Tensor.clone, labels), segment.device)
                segment.criterion(segment.forward(segment.receive(smashed), given), given)
        except OF_A_BATCH as error:
            return error
        self._taken.add(kind)
        return None

    def _odd_rows(self, kinds: Mapping[str, Sequence[_Kind]]) -> dict[str, FlsplitError]:
        """Return whose rows can't be concatenated with those of most."""
        if not self._pools:
            return {}
        at_cut: dict[int, dict[str, Any]] = {}
        for name, of_client in kinds.items():
            segment, row, _ = of_client[0]
            at_cut.setdefault(segment, {})[name] = row
        found: dict[str, FlsplitError] = {}
        for rows in at_cut.values():
            usual, _ = Counter(rows.values()).most_common(1)[0]
            for name, row in rows.items():
                if row != usual:
                    found[name] = SegmentMismatchError(
                        f"smashed-data: a row has shape {_shown(row)}, those of most clients have "
                        f"{_shown(usual)}, and the method puts all clients' rows together: make "
                        "them alike (pad them), or take a method that computes clients one by one"
                    )
        return found


def _rows_of(tree: Any) -> Any:
    """Return what all but the number of rows of a tensor says; of several, where each is."""
    if isinstance(tree, Tensor):
        return tree.shape[1:], tree.dtype
    if isinstance(tree, Crossing):
        return tuple((name, _rows_of(value)) for name, value in tree.values.items())
    return tuple((place, _rows_of(leaf)) for place, leaf in leaves_of(tree))


def _shown(row: Any) -> Any:
    return tuple(row[0]) if row and isinstance(row[0], tuple) else row
