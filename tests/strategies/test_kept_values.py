"""Models that keep what they compute train as plain torch trains them."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.prune import l1_unstructured
from torch.utils.data import TensorDataset

from flsplit import LocalGrid, client_app
from flsplit.strategies import PSL, SplitFedV1

INPUTS = torch.randn(16, 5, generator=torch.Generator().manual_seed(1))
CLASSES = (INPUTS.sum(1) > 0).long()


def dense():
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))


def renewed(change):
    """Return a net whose weights are computed anew before each forward, and kept."""

    def build():
        net = dense()
        for layer in (net[0], net[2]):
            change(layer)
        return net

    return build


class Keeping(nn.Module):
    """Keeps its features, as a model does that one wants to look into."""

    def __init__(self):
        super().__init__()
        self.net, self.features = dense(), []

    def forward(self, x):
        self.features.append(self.net[1](self.net[0](x)))
        return self.net[2](self.features[-1])


def used_before():
    """Return one that has been tried out."""
    net = Keeping()
    net(INPUTS[:2])
    return net


KINDS = {
    "older weight norm": (renewed(nn.utils.weight_norm), "1"),
    "older spectral norm": (renewed(nn.utils.spectral_norm), "1"),
    "pruned": (renewed(partial(l1_unstructured, name="weight", amount=0.5)), "1"),
    "kept features": (used_before, "net.1"),
}


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated")
@pytest.mark.parametrize(("strategy", "cache"), [(PSL, True), (SplitFedV1, False)])
@pytest.mark.parametrize("kind", KINDS)
def test_one_client_is_plain_training(kind, strategy, cache):
    build, cut = KINDS[kind]
    torch.manual_seed(0)
    model = build()
    torch.manual_seed(0)
    plain = build().train()
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        functional.cross_entropy(plain(INPUTS), CLASSES).backward()
        optimizer.step()
    app = client_app(
        model=build, cut=cut, data=lambda _: TensorDataset(INPUTS, CLASSES), device="cpu"
    )
    split = strategy(
        model=model, cut=cut, server_lr=0.1, batch_size=16, fraction_evaluate=0.0,
        share_client_segments=True, device="cpu",
    )  # fmt: skip
    grid = LocalGrid(app, 1, cache=cache, progress=False)
    result = split.start(grid, dict(model.state_dict()), num_rounds=3)
    assert result.history[-1].left_out == []
    found = result.arrays.to_torch_state_dict()
    for shared in result.client_segments.values():
        found |= shared.to_torch_state_dict()
    for name, expected in plain.state_dict().items():  # rows are in another order
        assert torch.allclose(found[name], expected, rtol=1e-5, atol=1e-5), name
