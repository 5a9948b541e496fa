"""Layers that TorchScript has compiled are trained, whichever side they are on."""

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
