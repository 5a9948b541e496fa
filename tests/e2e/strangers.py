"""Methods of somebody else's package, written as docs/new-method.md says."""

METHODS = '''"""Three methods."""

import statistics

from flsplit.client_parts import Clip, Noise
from flsplit.run import ParallelStrategy
from flsplit.wireless.phases import parallel_steps, server_passes


class Cycle(ParallelStrategy):
    """The server trains on mixed rows first, and gives gradients then."""

    def __init__(self, *, server_epochs=2, **options):
        self.server_epochs = server_epochs
        super().__init__(**options)

    def step(self, step):
        for _ in range(self.server_epochs):
            for rows in step.shuffled_rows(16):
                step.update(step.gradients(rows))
        step.reply(step.gradients(per_client=True).cut_gradients)

    @classmethod
    def phases(cls, work, *, server_epochs=2, **arguments):
        rows = (server_epochs + 1) * work.rows
        server = server_passes(work, forward_rows=rows, backward_rows=rows)
        return parallel_steps(work, server=server)


class Broadcast(ParallelStrategy):
    """All clients step with one mean, row by row, where they have a row."""

    def step(self, step):
        found = step.gradients()
        step.update(found)
        longest = max(step.batches, key=len)
        mean = 0 * found.cut_gradients[longest.client]
        for client, gradient in found.cut_gradients.items():
            mean[: len(gradient)] += step.shares[client] * gradient
        step.reply(
            {b.client: mean[: len(b)] for b in step.batches},
            shared_rows={b.client: len(b) for b in step.batches},
        )


class Careful(ParallelStrategy):
    """Clients clip and add noise; the server leaves out whose gradient is far from the usual."""

    client_parts = (Clip(5.0), Noise(0.01))

    def step(self, step):
        found = step.gradients(per_client=True)
        norms = {client: float(g.norm()) for client, g in found.cut_gradients.items()}
        middle = statistics.median(norms.values())
        kept = [client for client, norm in norms.items() if norm <= 1.2 * middle]
        total = sum(step.shares[client] for client in kept)
        weights = [step.shares[c] / total if c in kept else 0.0 for c in step.clients]
        step.update(found.clients.combine(weights))
        step.reply({client: found.cut_gradients[client] for client in kept})
        step.record({"kept": len(kept)})
'''
NAMES = ("stranger-cycle", "stranger-broadcast", "stranger-careful")
ENTRY_POINTS = """
[flsplit.strategies]
stranger-cycle = stranger:Cycle
stranger-broadcast = stranger:Broadcast
stranger-careful = stranger:Careful
"""
