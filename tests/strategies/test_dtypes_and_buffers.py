"""Weights of any dtype, and buffers that change shape, train as plain torch trains them."""

from functools import partial

import pytest
import torch
from flwr.app import ArrayRecord
from reference import half_base_net, quantised_net
from torch import nn
from torch.nn import functional
from torch.nn.utils.prune import l1_unstructured
from torch.utils.data import TensorDataset

from flsplit import LocalGrid, client_app
from flsplit.server.aggregate import average_buffers
from flsplit.strategies import PSL, SplitFedV1, SplitFedV2
from flsplit.untrained import load_state, put

RNG = torch.Generator().manual_seed(1)
INPUTS = torch.randn(16, 5, generator=RNG)
CLASSES = (INPUTS.sum(1) > 0).long()


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 6, dtype=torch.complex64)
        self.second = nn.Linear(6, 2, dtype=torch.complex64)

    def forward(self, x):
        return self.second(self.first(x.to(torch.complex64))).abs()


class Counting(nn.Module):
    """Remembers all means that it has seen: a buffer that grows."""

    def __init__(self):
        super().__init__()
        self.register_buffer("means", torch.zeros(0))

    def forward(self, x):
        if self.training:
            self.means = torch.cat([self.means, x.detach().mean()[None]])
        return x


def dense(dtype=None):
    return lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)


def growing():
    return nn.Sequential(
        nn.Linear(5, 8), nn.Sequential(nn.Tanh(), Counting()), Counting(), nn.Linear(8, 2)
    )


def renewed(change):
    """Return a net whose weights are computed anew before each forward, and kept."""

    def build():
        net = dense()()
        for layer in (net[0], net[2]):
            change(layer)
        return net

    return build


class Keeping(nn.Module):
    """Keeps its features, as a model does that one wants to look into."""

    def __init__(self):
        super().__init__()
        self.net, self.features = dense()(), []

    def forward(self, x):
        self.features.append(self.net[1](self.net[0](x)))
        return self.net[2](self.features[-1])


def used_before():
    """Return one that has been tried out."""
    net = Keeping()
    net(INPUTS[:2])
    return net


def loss(outputs, labels):
    return functional.cross_entropy(outputs.float(), labels)


KINDS = {
    "bfloat16": (dense(torch.bfloat16), "1", INPUTS.bfloat16()),
    "float64": (dense(torch.float64), "1", INPUTS.double()),
    "half base": (partial(half_base_net, 5), "1", INPUTS.half()),
    "complex": (Complex, "first", INPUTS),
    "growing buffer": (growing, "1", INPUTS),
    "quantisation": (quantised_net, "1", INPUTS),
    "older weight norm": (renewed(nn.utils.weight_norm), "1", INPUTS),
    "older spectral norm": (renewed(nn.utils.spectral_norm), "1", INPUTS),
    "pruned": (renewed(partial(l1_unstructured, name="weight", amount=0.5)), "1", INPUTS),
    "kept features": (used_before, "net.1", INPUTS),
}


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated")
@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("strategy", [PSL, SplitFedV1, SplitFedV2])
@pytest.mark.parametrize("kind", KINDS)
def test_one_client_is_plain_training(kind, strategy, cache):
    build, cut, inputs = KINDS[kind]
    torch.manual_seed(0)
    model = build()
    torch.manual_seed(0)
    plain = build().train()
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss(plain(inputs), CLASSES).backward()
        optimizer.step()
    app = client_app(
        model=build, cut=cut, data=lambda _: TensorDataset(inputs, CLASSES), device="cpu"
    )
    split = strategy(
        model=model, cut=cut, server_lr=0.1, batch_size=16, loss=loss, fraction_evaluate=0.0,
        share_client_segments=True, device="cpu",
    )  # fmt: skip
    grid = LocalGrid(app, 1, cache=cache, progress=False)
    result = split.start(grid, dict(model.state_dict()), num_rounds=3)
    assert result.history[-1].left_out == []
    found = result.arrays.to_torch_state_dict()
    for shared in result.client_segments.values():
        found |= shared.to_torch_state_dict()
    # The order of a batch's rows is another one, which sums notice in their last bits.
    tolerance = {"bfloat16": 2e-2, "half base": 2e-3}.get(kind, 1e-5)
    for name, expected in plain.state_dict().items():
        assert found[name].shape == expected.shape, name
        number = found[name].to(expected.dtype)
        assert torch.allclose(number, expected, rtol=tolerance, atol=tolerance), name


def test_bfloat16_weights_come_back_as_the_same_numbers():
    """NumPy has no bfloat16; float32 holds all of its numbers."""
    model = dense(torch.bfloat16)()
    app = client_app(
        model=dense(torch.bfloat16), cut="1", device="cpu",
        data=lambda _: TensorDataset(INPUTS.bfloat16(), CLASSES),
    )  # fmt: skip
    split = SplitFedV2(model=model, cut="1", server_lr=0.0, loss=loss, device="cpu")
    grid = LocalGrid(app, 2, progress=False)
    found = split.start(grid, dict(model.state_dict()), num_rounds=1).arrays.to_torch_state_dict()
    for name, expected in model.state_dict().items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name].bfloat16(), expected)


def test_smashed_data_keep_their_dtype():
    seen = []

    class Looking(nn.Module):
        def forward(self, x):
            if torch.initial_seed():  # 0 while the model is looked at
                seen.append(x.dtype)
            return x

    def build():
        return nn.Sequential(*half_base_net(5)[:2], Looking(), *half_base_net(5)[2:])

    model = build()
    app = client_app(
        model=build, cut="1", data=lambda _: TensorDataset(INPUTS.half(), CLASSES), device="cpu"
    )
    split = PSL(model=model, cut="1", loss=loss, device="cpu", fraction_evaluate=0.0)
    grid = LocalGrid(app, 2, progress=False)
    entry = split.start(grid, ArrayRecord(model.state_dict()), num_rounds=1).history[0]
    assert set(seen) == {torch.float16}
    assert entry.traffic.logical["activations-up"] == 2 * 16 * 8 * 2
    assert entry.traffic.logical["gradients-down-unicast"] == 2 * 16 * 8 * 2


def test_a_buffer_stays_the_same_object_whatever_its_shape_becomes():
    buffer = torch.zeros(0)
    put(buffer, torch.ones(2, 3))
    assert torch.equal(buffer, torch.ones(2, 3))
    module = Counting()
    held = module.means
    load_state(module, {"means": torch.arange(3.0)})
    assert module.means is held
    assert held.tolist() == [0, 1, 2]


def test_buffers_of_several_shapes_are_averaged_over_most_examples():
    buffers = [{"b": torch.ones(2)}, {"b": torch.zeros(0)}, {"b": torch.tensor([4.0, 7.0])}]
    assert average_buffers(buffers, [1, 2, 2])["b"].tolist() == [3.0, 5.0]
