"""Where only Sequentials are around the cut, the segments call their modules themselves."""

from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from flsplit.cut import split
from flsplit.cut.partial_forward import PartialForward

LABELS = torch.tensor([0, 1, 2, 0])


def network():
    inner = nn.Sequential(
        OrderedDict(
            linear=nn.Linear(6, 6),
            same=nn.Identity(),
            relu=nn.ReLU(inplace=True),
            norm=nn.BatchNorm1d(6),
        )
    )
    return nn.Sequential(
        OrderedDict(
            first=nn.Linear(4, 6),
            block=nn.Sequential(OrderedDict(inner=inner, drop=nn.Dropout(0.5))),
            last=nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 3)),
        )
    )


def batch():
    torch.manual_seed(3)
    return torch.randn(4, 4)


@pytest.mark.parametrize(
    "cut",
    [
        "first",
        "block.inner.linear",
        "block.inner.same",
        "block.inner.relu",
        "block.inner.norm",
        "block.inner",
        "block",
    ],
)
def test_nothing_is_watched_once_the_way_is_known(cut, assert_same_step, monkeypatch):
    def watched(self, *args):
        raise AssertionError("a forward was watched")

    assert_same_step(
        network(),
        cut,
        batch(),
        LABELS,
        known=lambda: monkeypatch.setattr(PartialForward, "run", watched),
    )


def test_a_hook_that_is_added_later_counts():
    """Of the Sequentials that a loop does without, too."""
    model = network().eval()
    client, x = split(model, "block.inner.relu").client, batch()
    client(x)
    client.block.inner.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    assert torch.equal(client(x), model.block.inner[:3](2 * model.first(x)))


def test_a_hook_for_all_modules_counts():
    halves, x, called = split(network().eval(), "block.inner"), batch(), []
    halves.server(halves.client(x).detach())
    handle = register_module_forward_pre_hook(lambda module, args: called.append(type(module)))
    try:
        halves.server(halves.client(x).detach())
    finally:
        handle.remove()
    assert called.count(nn.Sequential) >= 4  # the model's and the block's, on either side


class Parcel(nn.Linear):
    """Returns what can't be described, and keeps a size for later."""

    def forward(self, x):
        self.size = x.size()
        return SimpleNamespace(inside=super().forward(x))


class Unpack(nn.Tanh):
    def forward(self, parcel):
        return super().forward(parcel.inside)


class Sized(nn.Linear):
    def __init__(self, parcel):
        super().__init__(6, 3)
        vars(self)["parcel"] = parcel

    def forward(self, x):
        return super().forward(x) * self.parcel.size[1]


def test_a_module_that_leaves_something_behind_is_run(assert_same_step):
    parcel = Parcel(4, 6)
    assert_same_step(nn.Sequential(parcel, Unpack(), Sized(parcel)), "1", batch(), LABELS)


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


class First(nn.Linear):
    def forward(self, pair):
        return super().forward(pair[0])


def test_a_layer_that_returns_a_tuple(assert_same_step):
    assert_same_step(nn.Sequential(Pair(4, 6), First(6, 3)), "0", batch(), LABELS)
