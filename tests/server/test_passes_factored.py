"""PerClientFactored says of gradients what PerClient keeps."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from flsplit.server.gradients import ClientBatch
from flsplit.server.linear import Factors
from flsplit.server.passes import PerClient, PerClientFactored
from flsplit.server.products import KeptProducts
from flsplit.server.segment import ServerSegment

WIDTH = 48  # with so few rows, factors are the cheaper for a layer of this size


class Twice(nn.Module):
    """A layer that is called twice, and another whose weight is used beside its calls, too."""

    def __init__(self):
        super().__init__()
        self.called_twice = nn.Linear(WIDTH, WIDTH)
        self.used_beside = nn.Linear(WIDTH, WIDTH)
        self.only_beside = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = self.called_twice(self.called_twice(x).tanh())
        x = functional.linear(self.used_beside(x), self.used_beside.weight)
        return functional.linear(x, self.only_beside.weight)


class Tokens(nn.Module):
    """A layer that gets three dimensions."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return self.layer(x.unsqueeze(1).expand(-1, 2, -1)).mean(1)


class OfConstants(nn.Module):
    """Layers whose input needs no gradient, and one that is called without a graph."""

    def __init__(self):
        super().__init__()
        self.register_buffer("queries", torch.randn(2, WIDTH))
        self.with_bias = nn.Linear(WIDTH, WIDTH)
        self.without_bias = nn.Linear(WIDTH, WIDTH, bias=False)
        self.without_graph = nn.Linear(WIDTH, WIDTH)
        self.both = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        with torch.no_grad():
            gate = self.without_graph(x).sigmoid()
        constants = self.with_bias(self.queries) + self.without_bias(self.queries)
        return self.both(gate * x) + (constants + self.both(self.queries)).tanh().mean(0)


NETS = {
    "in-place": lambda: [nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True), nn.BatchNorm1d(WIDTH)],
    "used twice": lambda: [Twice()],
    "three dimensions": lambda: [Tokens()],
    "frozen": lambda: [nn.Linear(WIDTH, WIDTH).requires_grad_(False), nn.Linear(WIDTH, WIDTH)],
    "attention": lambda: [nn.TransformerEncoderLayer(WIDTH, 2, 64, 0.0, batch_first=True)],
    "constants": lambda: [OfConstants()],
    "small": lambda: [nn.Linear(WIDTH, 2), nn.Linear(2, WIDTH)],
}


def segment_of(net):
    torch.manual_seed(0)
    module = nn.Sequential(*NETS[net](), nn.Linear(WIDTH, 3)).double().train()
    return ServerSegment(
        module, loss=functional.cross_entropy, optimizer=torch.optim.SGD, lr=0.1,
        device=torch.device("cpu"),
    )  # fmt: skip


def batches():
    rng = torch.Generator().manual_seed(1)
    return [
        ClientBatch(
            str(client),
            torch.randn(rows, WIDTH, generator=rng, dtype=torch.float64),
            torch.randint(3, (rows,), generator=rng),
            rows,
        )
        for client, rows in enumerate((2, 4, 3))
    ]


@pytest.mark.parametrize("net", NETS)
def test_products_and_combinations_are_those_of_the_gradients(net):
    weights = {"0": 0.2, "1": 0.5, "2": 0.3}
    kept = PerClient(keep_gradients=True)(segment_of(net), batches(), weights)
    found = PerClientFactored()(segment_of(net), batches(), weights)

    assert found.losses == pytest.approx(kept.losses)
    for client, gradient in kept.cut_gradients.items():
        torch.testing.assert_close(found.cut_gradients[client], gradient)
    vectors = torch.stack(
        [
            torch.cat([g.flatten() for g in one if g is not None])
            for one in kept.client_server_gradients.values()
        ]
    )
    torch.testing.assert_close(found.products.gram(), vectors @ vectors.T)
    combined = found.products.combine(list(weights.values()), into=found.server_gradients)
    for one, expected in zip(combined, kept.server_gradients, strict=True):
        torch.testing.assert_close(one, expected)


def test_large_linear_layers_are_kept_as_factors_and_small_ones_are_not():
    segment = segment_of("in-place")
    found = PerClientFactored()(segment, batches(), {})
    for one in found.products.gradients:
        kinds = [type(gradient) for gradient in one]
        assert kinds[0] is Factors  # weight of 48 x 48
        assert Factors not in kinds[1:]  # bias, BatchNorm, and a head of 48 x 3


def test_a_client_that_counts_nothing_adds_nothing():
    products = KeptProducts([[Factors(torch.ones(1, 2), torch.full((1, 3), 2.0))]] * 2)
    (combined,) = products.combine([0.0, 0.5], into=[None])
    torch.testing.assert_close(combined, torch.ones(2, 3))
    assert products.combine([0.0, 0.0], into=[None]) == [None]


def test_layers_are_as_they_were_afterwards():
    segment = segment_of("in-place")
    before = segment.module(batches()[1].smashed)
    PerClientFactored()(segment, batches(), {})
    assert all("forward" not in vars(module) for module in segment.module.modules())
    assert segment.module(batches()[1].smashed).grad_fn is not None
    torch.testing.assert_close(segment.module(batches()[1].smashed), before)
