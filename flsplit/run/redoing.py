"""Rounds that are done again: where too few clients are left midway, as if it had not begun."""

from weakref import ref

from torch import Tensor

from flsplit.nested import map_tensors
from flsplit.run.method import SplitMethod
from flsplit.server.clients import Clients
from flsplit.storage import State

MOST_ATTEMPTS = 3
"""How often a round is begun. Each may cost the time that clients are waited for."""

Copies = dict[int, tuple[ref[Tensor], int, Tensor]]
"""By a parameter's address: the parameter, its version, and its copy."""


class Beginning:
    """The server as it is before a round, to go back to; a copy in main memory.

    ``known`` are the ``frozen`` of the round before. What is frozen, most of a large model with
    adapters, is taken from there while nobody has written to it. The rest isn't kept that long.
    """

    def __init__(self, method: SplitMethod, clients: Clients, known: Copies) -> None:
        self._method, self._clients = method, clients
        frozen = {
            p.data_ptr(): p
            for segment in method.server_segments()
            for p in segment.module.parameters()
            if not p.requires_grad
        }
        self.frozen: Copies = {}

        def copied(one: Tensor) -> Tensor:
            place = one.data_ptr()
            if place not in frozen:
                return _copy(one)
            owner, version, copy = known.get(place, (lambda: None, 0, one))
            if owner() is not frozen[place] or version != one._version:
                copy = _copy(one)
            self.frozen[place] = ref(frozen[place]), one._version, copy
            return copy

        self._state: State = map_tensors(copied, method.state_dict())
        self._known = clients.state_dict()

    def restore(self) -> None:
        """Be as before the round. Clients do so by themselves when they are to begin it again."""
        self._method.begin_run()
        self._method.load_state_dict(map_tensors(_copy, self._state))
        self._clients.load_state_dict(self._known)


def _copy(one: Tensor) -> Tensor:
    return one.detach().to("cpu", copy=True)
