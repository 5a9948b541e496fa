"""Layers that TorchScript has compiled are trained, whichever side they are on."""

import copy

import pytest
import torch
from reference import (
    assert_close,
    make_parts,
    plain_net,
    run_split,
    train_in_turn,
    weights_of,
    whole_of,
)

from flsplit import split
from flsplit.strategies import PSL, SplitFedV2


def scripted(name):
    def build():
        net = plain_net()
        setattr(net, name, torch.jit.script(getattr(net, name)))
        return net

    return build


@pytest.mark.parametrize("name", ["front", "middle"])
@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("strategy", [PSL, SplitFedV2])
def test_they_learn_what_they_learn_uncompiled(strategy, name, cache):
    parts = make_parts((8,))
    result = run_split(
        strategy, scripted(name), parts, cut="front", cache=cache, share_client_segments=True
    )
    expected, _ = train_in_turn(plain_net, parts, optimizer=torch.optim.SGD, rounds=2)
    found = whole_of(result) if strategy is PSL else weights_of(result.arrays)
    assert_close(found, expected)


@pytest.mark.parametrize("name", ["front", "middle"])
def test_segments_and_their_copies_have_one_side_each(name):
    model = scripted(name)()
    halves = split(model, "front", torch.randn(2, 8))
    assert all(parameter.grad is None for parameter in model.parameters())  # was only looked at
    of_copies = [
        dict(copy.deepcopy(side).named_parameters()) for side in (halves.client, halves.server)
    ]
    of_halves = [dict(side.named_parameters()) for side in (halves.client, halves.server)]
    assert list(map(set, of_copies)) == list(map(set, of_halves))
    assert of_halves[0].keys() | of_halves[1].keys() == dict(model.named_parameters()).keys()
