"""Buffers that get another shape in a forward pass, as observers of quantisation have."""

import pytest
import torch
from reference import quantised_net
from torch import nn
from torch.utils.data import TensorDataset

from flsplit import LocalGrid, client_app
from flsplit.server.aggregate import average_buffers
from flsplit.strategies import PSL, SplitFedV1, SplitFedV2
from flsplit.untrained import load_state, put


class Counting(nn.Module):
    """Remembers all means that it has seen: a buffer that grows."""

    def __init__(self):
        super().__init__()
        self.register_buffer("means", torch.zeros(0))

    def forward(self, x):
        if self.training:
            self.means = torch.cat([self.means, x.detach().mean()[None]])
        return x


def growing():
    return nn.Sequential(
        Counting(), nn.Linear(5, 8), nn.ReLU(), Counting(), nn.Linear(8, 2), Counting()
    )


@pytest.mark.parametrize(
    ("strategy", "cache"),
    [(SplitFedV1, True), (SplitFedV1, False), (SplitFedV2, True), (PSL, False)],
)
@pytest.mark.parametrize(("build", "cut"), [(quantised_net, "1"), (growing, "2")])
def test_one_client_is_the_model_in_one_piece(build, cut, strategy, cache, tmp_path):
    x = torch.randn(1, 5, generator=torch.Generator().manual_seed(1))
    y = torch.tensor([1])
    torch.manual_seed(0)
    plain, model = build(), build()
    start = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(x), y).backward()
        optimizer.step()
    app = client_app(model=build, cut=cut, data=lambda context: TensorDataset(x, y))
    method = strategy(
        model=model, cut=cut, server_lr=0.1, batch_size=1, fraction_evaluate=0.0,
        share_client_segments=strategy is PSL, checkpoint_dir=str(tmp_path),
    )  # fmt: skip
    result = method.start(LocalGrid(app, 1, cache=cache), start, num_rounds=3)
    found = result.arrays.to_torch_state_dict()
    for segment in result.client_segments.values():
        found |= segment.to_torch_state_dict()
    assert found.keys() == plain.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(found[name], tensor), name


def test_shapes_that_most_examples_have_are_averaged():
    sized = [
        {"b": torch.tensor([1.0, 3.0])},
        {"b": torch.zeros(0)},
        {"b": torch.tensor([3.0, 7.0])},
    ]
    assert average_buffers(sized, [3, 2, 1])["b"].tolist() == [1.5, 4.0]


def test_complex_buffers_are_averaged():
    found = average_buffers([{"b": torch.tensor(1 + 2j)}, {"b": torch.tensor(3 - 2j)}], [1, 1])
    assert found["b"] == torch.tensor(2 + 0j)


def test_a_buffer_stays_the_same_object_whatever_its_shape_becomes():
    buffer = torch.zeros(0)
    put(buffer, torch.ones(2, 3))
    assert torch.equal(buffer, torch.ones(2, 3))
    module = Counting()
    held = module.means
    load_state(module, {"means": torch.arange(3.0)})
    assert module.means is held
    assert held.tolist() == [0, 1, 2]
