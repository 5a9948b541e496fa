"""SplitFed V2: whose turn it is at the server."""

import pytest
import torch
from reference import CUT, LR, assert_bit_equal, fresh, make_parts, plain_net, run_split, weights_of
from torch.nn.functional import cross_entropy

from flsplit.errors import ConfigError
from flsplit.strategies import SplitFedV2

SIZES = (4, 4, 4)  # a step of one batch each


def in_turn(order):
    """A round by hand: the server steps on one client's batch after the other."""
    model = fresh(plain_net)
    names = [name for name, _ in model.named_children()]
    at = names.index(CUT) + 1
    client, server = model[:at], model[at:]
    optimizer = torch.optim.SGD(server.parameters(), lr=LR)
    parts = make_parts(SIZES)
    for index in order:
        inputs, labels = parts[index].tensors
        optimizer.zero_grad()
        cross_entropy(server(client(inputs).detach()), labels).backward()
        optimizer.step()
    return server.state_dict()


def trained(**options):
    found = run_split(SplitFedV2, plain_net, make_parts(SIZES), rounds=1, client_lr=0.0, **options)
    return weights_of(found.arrays)


def test_a_fixed_order_is_that_of_the_clients():
    found, expected = trained(order="fixed"), in_turn((0, 1, 2))

    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
    backwards = in_turn((2, 1, 0))
    assert any(not torch.allclose(found[name], backwards[name], atol=1e-6) for name in backwards)


def test_the_order_is_drawn_by_default():
    assert_bit_equal(trained(), trained(order="random"))
    runs = [trained(seed=seed) for seed in range(6)]
    fixed = [trained(seed=seed, order="fixed") for seed in range(2)]

    assert any(not torch.equal(one["head.weight"], runs[0]["head.weight"]) for one in runs)
    assert all(torch.allclose(v, fixed[1][k], atol=1e-6) for k, v in fixed[0].items())


def test_another_order_is_refused():
    with pytest.raises(ConfigError, match="order is 'reverse', expected one of 'random', 'fixed'"):
        SplitFedV2(model=fresh(plain_net), cut=CUT, order="reverse")
