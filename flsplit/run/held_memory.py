"""What a client of a decoupled method holds in memory, against the whole model."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from flsplit.account.memory import Activations, measuring_activations, state_bytes
from flsplit.cut.smashed import values_of
from flsplit.message.local_steps import LocalReply
from flsplit.server.client_batch import ClientBatch
from flsplit.server.segment import ServerSegment


class HeldMemory:
    """Measures one round."""

    def __init__(self, server: ServerSegment) -> None:
        self._server = server
        self._activations = Activations()
        self._smashed_bytes = 0
        self._of_clients: dict[str, dict[str, int]] = {}

    def take(self, replies: Mapping[str, LocalReply]) -> None:
        """Note what clients say that they hold; of activations only one reply in a round does."""
        for name, reply in replies.items():
            known = self._of_clients.setdefault(name, dict(reply.memory))
            known |= {what: n for what, n in reply.memory.items() if n}

    @contextmanager
    def measuring(self, batch: ClientBatch) -> Iterator[None]:
        """Measure the activations of the server's step on a batch, unless that is done."""
        first = self._activations.nbytes == 0
        with measuring_activations(self._activations, self._server.module, active=first):
            yield
        if first:
            self._smashed_bytes = sum(value.nbytes for value in values_of(batch.smashed))

    def metrics(self, clients: Collection[str]) -> dict[str, float]:
        """Return bytes: of the client that needs most, and of the whole model.

        The smashed data, which both sides may keep, is counted once for the whole model.
        """
        if not (clients and self._activations.nbytes):
            return {}
        most = max((self._of_clients[name] for name in clients), key=lambda m: sum(m.values()))
        server = state_bytes(self._server.module, self._server.updates)
        activations = most["activations"] + self._activations.nbytes - self._smashed_bytes
        return {
            "client-memory-bytes": sum(most.values()),
            "whole-model-memory-bytes": most["segment"] + server + activations,
        }
