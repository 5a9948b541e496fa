"""The parallel schedule in a plain loop: whole models in one process, no messages.

A twin says what one method does with the smashed data of a step; everything else is here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from reference import LR, SEED, epoch_batches, fresh, numbered_batches
from torch import Tensor, nn
from torch.nn import functional

from flsplit.seeds import derive_seed


@dataclass
class Moment:
    """What a twin sees of a step: for each client in it, by index."""

    server: nn.Module
    smashed: dict[int, Tensor]
    labels: dict[int, Tensor]
    sizes: dict[int, int]  # of the clients' training data
    rng: np.random.Generator
    progress: float

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.server.parameters())


@dataclass
class Answer:
    """What a twin computes: None as cut gradient lets the client not step at all."""

    server: list[Tensor]
    cut: dict[int, Tensor | None]
    lr_factor: float = 1.0
    notes: dict[str, float] = field(default_factory=dict)


class Copy(nn.Module):
    """The next layer may work in place; smashed data must survive that."""

    def forward(self, x):
        return x.clone()


def train_twin(
    method: Callable[[Moment], Answer],
    build,
    parts: Sequence,
    *,
    optimizer,
    rounds: int = 2,
    batch_size: int = 4,
    local_steps: int = 0,
    lr: float = LR,
) -> tuple[list[Answer], list[nn.Module], nn.Module]:
    """Return the answers of all steps, the clients' models and the server's."""
    whole = [fresh(build) for _ in parts]
    fronts = [model.front for model in whole]
    server = nn.Sequential(Copy(), whole[0].middle, whole[0].head).train()
    own = [optimizer(front.parameters(), lr=lr) for front in fronts]
    of_server = optimizer(server.parameters(), lr=lr)
    epochs = [epoch_batches(len(part), str(i), batch_size) for i, part in enumerate(parts)]
    endless = [numbered_batches(part, str(i), batch_size) for i, part in enumerate(parts)]
    answers = []
    for server_round in range(1, rounds + 1):
        batches = [
            list(islice(endless[i], local_steps)) if local_steps else next(epochs[i])
            for i in range(len(parts))
        ]
        steps = max(map(len, batches))
        for step in range(steps):
            present = [i for i, indices in enumerate(batches) if step < len(indices)]
            taken = {i: parts[i][batches[i][step]] for i in present}
            outputs = {i: fronts[i].train()(inputs) for i, (inputs, _) in taken.items()}
            seed = derive_seed(SEED, "rules", server_round, step, *map(str, present))
            moment = Moment(
                server,
                {i: smashed.detach() for i, smashed in outputs.items()},
                {i: labels for i, (_, labels) in taken.items()},
                {i: len(parts[i]) for i in present},
                np.random.default_rng(seed),
                (server_round - 1 + step / steps) / rounds,
            )
            answer = method(moment)
            answers.append(answer)
            for i, gradient in answer.cut.items():
                if gradient is not None:
                    own[i].zero_grad()
                    outputs[i].backward(gradient)
                    own[i].step()
            for parameter, gradient in zip(server.parameters(), answer.server, strict=True):
                parameter.grad = gradient
            of_server.param_groups[0]["lr"] = lr * answer.lr_factor
            of_server.step()
    return answers, fronts, server


def own_losses(moment: Moment) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Return each client's mean loss, of one forward pass over all rows, and its leaves."""
    leaves = {i: smashed.clone().requires_grad_() for i, smashed in moment.smashed.items()}
    rows = [len(leaf) for leaf in leaves.values()]
    logits = dict(
        zip(leaves, moment.server(torch.cat(list(leaves.values()))).split(rows), strict=True)
    )
    return {i: functional.cross_entropy(z, moment.labels[i]) for i, z in logits.items()}, leaves
