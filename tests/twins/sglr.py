"""SGLR, step by step, in one process."""

import math

import torch

from twins.loop import Answer, Moment, own_losses


def sglr(phi: float, alpha: float, averaging: str = "position_mean", phases=(0.0, 1.0)):
    """Return the twin of SGLR with these parameters."""

    def step(moment: Moment) -> Answer:
        losses, leaves = own_losses(moment)
        clients = list(leaves)
        b = {i: len(leaf) for i, leaf in leaves.items()}
        # One mean loss over all rows of the step.
        loss = sum(losses[i] * b[i] for i in clients) / sum(b.values())
        gradients = torch.autograd.grad(loss, moment.parameters, retain_graph=True)
        of_rows = torch.autograd.grad(loss, list(leaves.values()))
        # Of the size of a gradient of the client's own mean loss.
        own = {i: q * sum(b.values()) / b[i] for i, q in zip(clients, of_rows, strict=True)}

        active = []
        count = math.ceil(phi * len(clients) - 1e-9)
        if count and phases[0] <= moment.progress < phases[1]:
            drawn = moment.rng.choice(len(clients), size=count, replace=False)
            active = [clients[k] for k in sorted(drawn)]
        cut = dict(own)
        for i in active:
            cut[i] = torch.stack([shared(active, own, b, j, averaging) for j in range(b[i])]) / b[i]
        return Answer(list(gradients), cut, len(clients) ** alpha, {"active": len(active)})

    return step


def shared(active, own, b, j, averaging):
    """Return the gradient per sample that active clients have at position j."""
    if averaging == "batch_mean":
        rows = [b[k] * row for k in active for row in own[k]]
        return sum(rows) / len(rows)
    rows = [b[k] * own[k][j] for k in active if j < b[k]]
    return sum(rows) / (len(rows) if averaging == "position_mean" else 1)
