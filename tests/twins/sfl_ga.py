"""SFL-GA, position by position, in one process."""

import torch

from twins.loop import Answer, Moment, own_losses


def sfl_ga():
    """Return the twin of SFL-GA."""

    def step(moment: Moment) -> Answer:
        losses, leaves = own_losses(moment)
        total = sum(moment.sizes.values())
        lam = {i: moment.sizes[i] / total for i in leaves}
        loss = sum(lam[i] * losses[i] for i in leaves)
        gradients = torch.autograd.grad(loss, moment.parameters, retain_graph=True)
        of_rows = torch.autograd.grad(loss, list(leaves.values()))
        # Of the size of a gradient of the client's own mean loss (and just that without BatchNorm).
        own = {i: q / lam[i] for i, q in zip(leaves, of_rows, strict=True)}
        b = {i: len(leaf) for i, leaf in leaves.items()}
        mean = []  # the gradient per sample that all have at a position
        for j in range(max(b.values())):
            there = [i for i in leaves if j < b[i]]
            summed = sum(lam[i] * b[i] * own[i][j] for i in there)
            mean.append(summed / sum(lam[i] for i in there))
        cut = {i: torch.stack(mean[: b[i]]) / b[i] for i in leaves}
        return Answer(list(gradients), cut, notes={"rows": sum(b.values())})

    return step
