"""Calls of torch that compute in a way of their own: they work on both sides, or say what to do."""

from collections import OrderedDict

import pytest
import torch
from reference import (
    assert_bit_equal,
    fresh,
    make_parts,
    run_split,
    split_app,
    train_in_turn,
    whole_of,
)
from torch import nn
from torch.optim import SGD

from flsplit import LocalGrid
from flsplit.cut import CutError, split
from flsplit.errors import ConfigError
from flsplit.strategies import PSL, SplitFedV1


class Derived(nn.Module):
    """Adds a derivative of a small network by its input, as energy models do."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.energy = nn.Linear(6, 6)

    def forward(self, x):
        def energy(rows):
            return self.energy(rows).square().sum()

        if self.kind == "grad":
            return x + torch.func.grad(energy)(x)
        if self.kind == "jacrev":
            return x + torch.func.jacrev(self.energy)(x[0]).sum(0)
        output, pull = torch.func.vjp(self.energy, x)
        return x + pull(torch.ones_like(output))[0]


def derived_net(kind, side):
    first, derived, last = nn.Linear(8, 6), Derived(kind), nn.Linear(6, 3)
    front = nn.Sequential(first, derived) if side == "client" else first
    head = nn.Sequential(derived, last) if side == "server" else last
    return nn.Sequential(OrderedDict(front=front, head=head))


@pytest.mark.parametrize("side", ["client", "server"])
@pytest.mark.parametrize("kind", ["grad", "vjp", "jacrev"])
def test_derivatives_in_forward_are_those_of_the_uncut_model(kind, side):
    build, parts = lambda: derived_net(kind, side), make_parts([6])
    result = run_split(PSL, build, parts, optimizer=SGD, rounds=2, share_client_segments=True)
    expected, _ = train_in_turn(build, parts, optimizer=SGD, rounds=2)
    assert_bit_equal(whole_of(result), expected)
    model, x = fresh(build), parts[0].tensors[0]
    halves = split(model, "front", x)  # looked at with a batch that has data
    assert torch.equal(halves.server(halves.client(x)), model(x))


class Chooses(nn.Module):
    def __init__(self, grad):
        super().__init__()
        self.a, self.b, self.grad = nn.Linear(8, 8), nn.Linear(8, 2), grad

    def forward(self, x):
        h = self.a(x)
        with torch.set_grad_enabled(self.grad):
            more = torch.cond(h.sum() > 0, lambda z: z * 2, lambda z: z * 3, (h,))
        return self.b(h + more)


@pytest.mark.parametrize("grad", [True, False])
def test_branches_of_torch_are_refused_by_name(grad):
    with pytest.raises(CutError, match=r"forward calls torch's 'cond', .*torch\.where"):
        split(Chooses(grad), "a", torch.randn(4, 8))


def nested_of(x, layout):
    return torch.nested.as_nested_tensor([x[0, :2], x[1, :3]], layout=layout)


def padded(nested):
    return torch.nested.to_padded_tensor(nested, 0.0)


class Ragged(nn.Module):
    """Rows of several lengths; pads them here, or hands them on."""

    def __init__(self, layout, pads):
        super().__init__()
        self.layer, self.layout, self.pads = nn.Linear(6, 8), layout, pads

    def forward(self, x):
        nested = self.layer(nested_of(x, self.layout))
        return padded(nested) if self.pads else nested


class Pads(nn.Module):
    def forward(self, nested):
        return padded(nested)


LAYOUTS = pytest.mark.parametrize("layout", [torch.jagged, torch.strided])


@LAYOUTS
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("cut", ["0", "1"])
def test_a_nested_tensor_that_goes_from_layer_to_layer_is_refused(layout, cut):
    model = nn.Sequential(Ragged(layout, pads=False), Pads(), nn.Linear(8, 2))
    with pytest.raises(CutError, match=r"makes a nested tensor, .* let one module make it"):
        split(model, cut, torch.randn(2, 4, 6))


@LAYOUTS
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("cut", ["0", "1"])
def test_a_nested_tensor_within_one_module_is_none_of_the_cuts(layout, cut):
    x = torch.randn(2, 4, 6)
    model = nn.Sequential(nn.Linear(6, 6), Ragged(layout, pads=True), nn.Linear(8, 2))
    halves = split(model, cut, x)
    assert torch.equal(halves.server(halves.client(x)), model(x))


class Versioned(nn.Linear):
    """Keeps something beside its weights, as a tensor or not."""

    plain = True

    def get_extra_state(self):
        return {"version": 2} if self.plain else torch.tensor([2])

    def set_extra_state(self, state):
        pass


class VersionedByTensor(Versioned):
    plain = False


def test_extra_state_that_is_no_tensor_is_refused_by_name():
    def build(layer):
        return lambda: nn.Sequential(layer(8, 6), nn.Tanh(), nn.Linear(6, 3))

    with pytest.raises(ConfigError, match=r"'0\._extra_state'\], from .* is of type dict"):
        start_of(build(Versioned))
    assert start_of(build(VersionedByTensor)).arrays["0._extra_state"].numpy() == [2]


def start_of(build):
    method = SplitFedV1(model=build(), cut="1", batch_size=4, fraction_evaluate=0.0)
    grid = LocalGrid(split_app(build, make_parts([8]), cut="1"), 1, progress=False)
    return method.start(grid, build().state_dict(), num_rounds=1)
