"""The computations of a step at the server: each seeded by its place, and undone if it fails."""

import copy
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from flsplit.seeds import derive_seed, seeded
from flsplit.server.segment import ServerSegment
from flsplit.storage import State
from flsplit.untrained import put_all

T = TypeVar("T")


class Computations:
    """Runs what a step computes, and remembers how server segments were before it."""

    def __init__(self, seed: int, server_round: int, step: int) -> None:
        self._seed, self._place = seed, (server_round, step)
        self._calls: dict[tuple[str, ...], int] = {}
        # By segment, as at its last update.
        self._buffers: dict[int, tuple[ServerSegment, list[Tensor]]] = {}
        self._states: dict[int, tuple[ServerSegment, State]] = {}

    def run(self, segment: ServerSegment, names: Sequence[str], compute: Callable[[], T]) -> T:
        """Return what is computed on the named clients' batches; if it fails, no buffer moves."""
        key = tuple(names)
        calls = self._calls[key] = self._calls.get(key, -1) + 1
        # The first computation on some clients' batches is seeded by their names alone; a second
        # one by its number, too, or it would draw the same dropout masks. The number stands in
        # the first label: after the names it could be taken for one more client's.
        use = f"server again {calls}" if calls else "server"
        seed = derive_seed(self._seed, use, *self._place, *names)
        segment.train()
        before = list(map(torch.clone, segment.buffers))
        self._buffers.setdefault(id(segment), (segment, before))
        try:
            with seeded(seed, segment.device):
                return compute()
        except Exception:
            put_all(segment.buffers, before)
            raise

    def update(
        self, segment: ServerSegment, gradients: list[Tensor | None], lr_factor: float
    ) -> None:
        """Let a segment's optimizer step: its buffers are then as they are to be."""
        segment.step(gradients, lr_factor)
        self._buffers.pop(id(segment), None)

    def keep_state(self, segment: ServerSegment) -> None:
        """Remember a segment's state, if that isn't yet, for :meth:`undo`."""
        if id(segment) not in self._states:
            self._states[id(segment)] = segment, copy.deepcopy(segment.state_dict())

    def undo_buffers(self, segment: ServerSegment) -> None:
        """Put the segment's buffers back to what they were at its last update."""
        if id(segment) in self._buffers:
            put_all(segment.buffers, self._buffers[id(segment)][1])

    def undo(self) -> None:
        """Put all buffers back, and the states that were kept."""
        for segment, _ in self._buffers.values():
            self.undo_buffers(segment)
        for segment, state in self._states.values():
            segment.load_state_dict(state)
