"""Computations of one step, repeated or on other clients' batches, draw random numbers apart."""

import torch
from reference import make_parts, plain_net, run_split
from torch import nn

from flsplit.strategies import PSL

SEEDS = []


class Seen(nn.Module):
    """Notes how the generator was seeded when rows came through."""

    def forward(self, x):
        if torch.initial_seed():  # 0 while the model is looked at
            SEEDS.append(torch.initial_seed())
        return x


def seen_net():
    net = plain_net()
    net.middle = nn.Sequential(Seen(), *net.middle)
    return net


class Repeats(PSL):
    def step(self, step):
        for _ in range(3):
            step.gradients(step.batches[:1])
        super().step(step)


def test_a_clients_second_computation_is_not_seeded_as_two_clients_first_one():
    """Clients are called '0', '1' and '2', as the numbers of computations are."""
    SEEDS.clear()
    options = {"rounds": 1, "local_steps": 1, "fraction_evaluate": 0.0}
    run_split(Repeats, seen_net, make_parts((4, 4)), **options)
    assert len(SEEDS) == len(set(SEEDS)) == 4
    first = list(SEEDS)
    SEEDS.clear()
    run_split(Repeats, seen_net, make_parts((4, 4)), **options)
    assert first == SEEDS
