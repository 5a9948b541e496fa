"""Any nn.Sequential, however nested, can be cut anywhere."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flsplit.cut import split

WIDTH = 3

LAYERS = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "relu": lambda: nn.ReLU(inplace=True),
    "tanh": nn.Tanh,
    "dropout": lambda: nn.Dropout(0.5, inplace=True),
    "norm": lambda: nn.BatchNorm1d(WIDTH),
    "identity": nn.Identity,
}

networks = st.recursive(
    st.sampled_from(sorted(LAYERS)),
    lambda parts: st.lists(parts, min_size=1, max_size=4),
    max_leaves=10,
)


def build(network):
    if isinstance(network, str):
        return LAYERS[network]()
    return nn.Sequential(*(build(part) for part in network))


@settings(max_examples=40, deadline=None)
@given(network=networks, data=st.data())
def test_any_cut_of_any_sequence(network, data):
    torch.manual_seed(0)
    body = build(network)
    model = nn.Sequential(body, nn.Linear(WIDTH, 2))
    names = [name for name, _ in body.named_modules(prefix="0")]
    cut = data.draw(st.sampled_from(names))
    training = data.draw(st.booleans())
    halves = split(model.train(training), cut)
    client, server = halves.client.state_dict(), halves.server.state_dict()
    assert not client.keys() & server.keys()
    assert list(halves.join(client, server)) == list(model.state_dict())

    batch = torch.randn(4, WIDTH)
    torch.manual_seed(1)
    expected = model(batch.clone())
    torch.manual_seed(1)
    smashed = halves.client(batch.clone()).detach().requires_grad_()
    assert torch.equal(halves.server(smashed), expected)
