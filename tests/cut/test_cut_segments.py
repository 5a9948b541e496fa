"""What a segment holds and how it behaves."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional

from flsplit.cut import CutError, StateDictError, split


class Net(nn.Module):
    """Has parameters and buffers of its own, functional dropout, and a ReLU used everywhere."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.gain = nn.Parameter(torch.ones(6))
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)
        self.register_buffer("shift", torch.tensor(0.5))
        self.second = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.last = nn.Linear(6, 3)

    def forward(self, x, unused=None):
        x = self.relu(self.first(x * self.scale))
        x = functional.dropout(self.drop(x), p=0.5, training=self.training)
        x = self.second(x * self.gain)
        x = functional.relu(x, inplace=True) + self.shift
        x = self.relu(self.norm(x)) * self.scale
        return self.last(functional.dropout(self.drop(x), 0.5, self.training))


def batch():
    torch.manual_seed(3)
    return torch.randn(5, 4)


CUTS = ["first", "second", "norm"]


@pytest.mark.parametrize("cut", CUTS)
def test_trains_the_same(assert_same_step, cut):
    assert_same_step(Net(), cut, batch(), torch.tensor([0, 1, 2, 0, 1]))


@pytest.mark.parametrize("cut", CUTS)
def test_state_dicts_partition_the_models_under_its_names(cut):
    model = Net()
    halves = split(model, cut)
    client, server = halves.client.state_dict(), halves.server.state_dict()
    assert not client.keys() & server.keys()
    assert client.keys() | server.keys() == model.state_dict().keys()


def test_each_side_holds_what_it_uses():
    halves = split(Net(), "second")
    assert sorted(halves.client.state_dict()) == [
        "first.bias",
        "first.weight",
        "gain",
        "second.bias",
        "second.weight",
    ]
    assert dict(halves.server.named_buffers()).keys() == {
        "scale",
        "shift",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }


def test_parameters_and_buffers_are_the_models_own():
    model = Net()
    halves = split(model, "second")
    whole = dict([*model.named_parameters(), *model.named_buffers()])
    for segment in (halves.client, halves.server):
        for name, tensor in [*segment.named_parameters(), *segment.named_buffers()]:
            assert tensor is whole[name]


@pytest.mark.parametrize("cut", CUTS)
def test_training_mode_is_followed_as_by_the_whole_model(cut):
    model = Net()
    halves = split(model, cut)  # cut in train mode
    model.eval()
    halves.client.eval()
    halves.server.eval()
    assert torch.equal(halves.server(halves.client(batch())), model(batch()))
    model.train()
    halves.client.train()
    halves.server.train()
    torch.manual_seed(0)
    expected = model(batch())
    torch.manual_seed(0)
    assert torch.equal(halves.server(halves.client(batch())), expected)


def test_a_model_cut_in_eval_mode_gives_segments_in_eval_mode():
    model = Net().eval()
    halves = split(model, "second")
    assert not any(
        module.training for module in [*halves.client.modules(), *halves.server.modules()]
    )
    assert torch.equal(halves.server(halves.client(batch())), model(batch()))


def test_a_stateless_module_used_on_both_sides_does_not_couple_their_modes():
    halves = split(Net(), "second")
    halves.client.eval()
    assert not halves.client.drop.training
    assert halves.server.drop.training


@pytest.mark.parametrize("make", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_non_persistent_buffers_stay_so_and_follow_to(make):
    halves = make(split(Net(), "second"))
    for segment in (halves.client, halves.server):
        assert "scale" in dict(segment.named_buffers())
        assert "scale" not in segment.state_dict()
        segment.to(torch.float64)
        assert segment.scale.dtype == torch.float64
    assert halves.server(halves.client(batch().double())).dtype == torch.float64


def test_the_model_is_left_as_it_was():
    model = Net()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    split(model, "second")
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


@pytest.mark.parametrize(
    "in_place", [nn.ReLU(inplace=True), nn.Sequential(nn.Hardswish(inplace=True), nn.Tanh())]
)
def test_an_in_place_first_operation_leaves_the_smashed_data_alone(in_place):
    model = nn.Sequential(nn.Linear(4, 4), in_place, nn.Linear(4, 2))
    halves = split(model, "0")
    smashed = halves.client(batch()).detach().requires_grad_()
    before = smashed.detach().clone()
    halves.server(smashed).sum().backward()
    with torch.no_grad():
        halves.server(smashed)
    assert torch.equal(smashed, before)
    assert smashed.grad.shape == smashed.shape


def test_two_modules_in_a_row_are_cut_at_the_client():
    front, back = nn.Sequential(nn.Linear(4, 5), nn.ReLU()), nn.Linear(5, 2)
    halves = split(nn.Sequential(OrderedDict(client=front, server=back)), "client")
    assert list(halves.client.state_dict()) == ["client.0.weight", "client.0.bias"]
    assert list(halves.server.state_dict()) == ["server.weight", "server.bias"]
    assert torch.equal(halves.server(halves.client(batch())), back(front(batch())))


def test_branches_on_data_may_lie_on_either_side():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else self.layer(-x)

    model = nn.Sequential(OrderedDict(client=Branches(), server=Branches()))
    halves = split(model, "client")
    for sign in (1, -1):
        data = sign * batch().abs()
        assert torch.equal(halves.server(halves.client(data)), model(data))


def test_forward_may_ask_for_types():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(2 * x if isinstance(x, torch.Tensor) else -x)

    model = nn.Sequential(Asks(), nn.Linear(4, 2))
    halves = split(model, "0.layer")
    assert torch.equal(halves.server(halves.client(batch())), model(batch()))


def test_forward_may_format_what_it_computes():
    said = []

    class Talks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = self.layer(x)
            said.append(f"{x.mean():.3f}")
            return self.head(x)

    model = Talks()
    halves = split(model, "layer")  # looked at without data, which can't be formatted
    expected = model(batch())
    said.clear()
    smashed = halves.client(batch())
    assert torch.equal(halves.server(smashed), expected)
    assert said[-1] == f"{smashed.mean():.3f}"


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 6, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x, _ = self.lstm(x)
        return self.head(x[:, -1])


def test_a_cut_layer_may_return_a_tuple_of_which_one_item_is_used(assert_same_step):
    sequences = torch.randn(3, 7, 4)
    assert split(Recurrent(), "lstm").client(sequences).shape == (3, 7, 6)
    assert_same_step(Recurrent(), "lstm", sequences, torch.tensor([0, 1, 0]))


def test_a_client_without_parameters_is_allowed(assert_same_step):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    assert_same_step(model, "0", torch.randn(3, 2, 2), torch.tensor([0, 1, 0]))


def test_a_module_with_two_names_keeps_both():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, layer, nn.Linear(4, 2))
    halves = split(nn.Sequential(OrderedDict(client=model, server=nn.Linear(2, 2))), "client")
    assert list(halves.client.state_dict())[:4] == [
        "client.0.weight",
        "client.0.bias",
        "client.1.weight",
        "client.1.bias",
    ]


def test_a_cut_layer_may_return_a_dict(assert_same_step):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return {"x": self.layer(x)}

    class Use(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x["x"])

    model = nn.Sequential(Pair(), Use())
    assert split(model, "0").client(batch()).shape == (5, 4)
    assert_same_step(model, "0", batch(), torch.tensor([0, 1, 2, 0, 1]))


def test_what_cannot_be_trained_in_one_piece_is_compared_without_gradients():
    """Dropout overwrites what tanh needs; behind a cut it has a copy."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(inplace=True), nn.Linear(4, 2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(batch()).sum().backward()
    halves = split(model, "1")
    assert halves.server(halves.client(batch()).detach()).shape == (5, 2)


class TestDivideAndJoin:
    def test_join_undoes_divide_in_the_models_order(self):
        model = Net()
        halves = split(model, "second")
        whole = model.state_dict()
        client, server = halves.divide(whole)
        assert client.keys() == halves.client.state_dict().keys()
        assert server.keys() == halves.server.state_dict().keys()
        assert list(halves.join(server=server, client=client)) == list(whole)

    def test_values_may_be_anything(self):
        halves = split(Net(), "second")
        sizes = {key: index for index, key in enumerate(halves.keys)}
        assert halves.join(*halves.divide(sizes)) == sizes

    def test_divide_names_missing_and_unexpected_keys(self):
        halves = split(Net(), "second")
        wrong = dict.fromkeys(halves.keys, 0) | {"stranger": 0}
        del wrong["norm.bias"]
        with pytest.raises(StateDictError, match=r"Missing: 'norm.bias'. Unexpected: 'stranger'"):
            halves.divide(wrong)

    def test_join_names_the_segment(self):
        halves = split(Net(), "second")
        client, server = halves.divide(dict.fromkeys(halves.keys, 0))
        with pytest.raises(StateDictError, match=r"client segment.*Missing: 'gain'"):
            halves.join({key: 0 for key in client if key != "gain"}, server)
        with pytest.raises(CutError, match=r"server segment.*Unexpected: 'gain'"):
            halves.join(client, server | {"gain": 0})
