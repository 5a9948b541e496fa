"""CycleSL, step by step, in one process."""

import torch
from reference import LR
from torch.nn import functional

from twins.loop import Answer, Moment


def cyclesl(optimizer, server_epochs: int = 1, server_batch_size: int = 32):
    """Return the twin of CycleSL; it moves the server itself, several times in a step."""
    kept = []  # one optimizer for the whole run

    def step(moment: Moment) -> Answer:
        server = moment.server
        if not kept:
            kept.append(optimizer(server.parameters(), lr=LR))
        rows = torch.cat(list(moment.smashed.values()))
        labels = torch.cat(list(moment.labels.values()))
        for _ in range(server_epochs):
            order = moment.rng.permutation(len(rows))
            for start in range(0, len(rows), server_batch_size):
                mixed = order[start : start + server_batch_size]
                kept[0].zero_grad()
                functional.cross_entropy(server(rows[mixed]), labels[mixed]).backward()
                kept[0].step()
        cut = {}
        for i, smashed in moment.smashed.items():
            leaf = smashed.clone().requires_grad_()
            loss = functional.cross_entropy(server(leaf), moment.labels[i])
            (cut[i],) = torch.autograd.grad(loss, leaf)
        done = [None] * len(moment.parameters)  # nothing is left for the loop's optimizer
        return Answer(done, cut, notes={"rows": (server_epochs + 1) * len(rows)})

    return step
