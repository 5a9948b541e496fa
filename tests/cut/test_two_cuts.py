"""A stretch out of the middle of a model: output, gradients and buffers are the uncut model's."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

from flsplit.cut import CrossingError, CutError, EmptySegmentError, UnknownCutError, split
from flsplit.cut.smashed import as_leaves
from tests.language_models import bert, gpt


class UNet(nn.Module):
    """The outer skip is between layers of the client, the inner one is the server's."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
        self.further = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8))
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.out = nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))

    def forward(self, x):
        outer = self.down(x)
        inner = self.further(outer)
        return self.out(torch.cat([outer, self.up(self.middle(inner) + inner)], 1))


class Branch(nn.Linear):
    """Branches on what it computes."""

    def forward(self, x):
        output = super().forward(x)
        return output if output.sum() > 0 else -output


class Twice(nn.Module):
    """One layer in the first and in the last stretch, and a branch on the data before the cut."""

    def __init__(self):
        super().__init__()
        self.ends, self.middle = Branch(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        first = self.ends(x)
        return self.ends(torch.tanh(self.middle(torch.tanh(first))))


def plain():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 8, 3, padding=1),
        nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 64, 10),
    )  # fmt: skip


def words():
    rng = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(1, 50, (3, 7), generator=rng)}


def padded():
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:] = 0
    return words() | {"attention_mask": mask}


def images():
    return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


CASES = {
    "plain": (plain, ("1", "5"), images),
    "in one text": (plain, " 0 , 3 ", images),
    "u-net": (UNet, ("further", "up"), images),
    "called twice": (Twice, ("ends#1", "middle"), lambda: images()[:, 0, 0, :6]),
    "gpt with adapters": (
        gpt, tuple(f"base_model.model.transformer.h.{n}" for n in (0, 1)), words,
    ),
    "gpt, tied": (
        lambda: gpt().unload().requires_grad_(), ("transformer.wte", "transformer.h.2"), words,
    ),
    "bert": (bert, ("bert.encoder.layer.0", "bert.encoder.layer.1"), padded),
}  # fmt: skip


def loss_of(output):
    output = output if isinstance(output, torch.Tensor) else output.logits
    return output.square().mean()


@pytest.mark.parametrize("kind", CASES)
def test_three_stretches_are_the_whole_model(kind):
    build, cut, batch = CASES[kind]
    torch.manual_seed(0)
    model = build().train()
    whole, batch = copy.deepcopy(model), batch()
    kwargs = batch if isinstance(batch, dict) else {}
    args = () if kwargs else (batch,)
    parts = split(model, cut, batch, share=("attention_mask",) if "bert" in kind else ())
    parts = pickle.loads(pickle.dumps(parts))

    smashed = parts.client(*args, **kwargs)
    sent = as_leaves(smashed)
    middle = parts.server(sent)
    returning = parts.client.returning(middle, smashed, args, kwargs)
    output = parts.client.tail(returning)
    loss_of(output).backward()
    middle.backward(returning.given.grad)
    if isinstance(smashed, torch.Tensor):
        smashed.backward(sent.grad)
    else:
        gradients = {name: sent.values[name].grad for name in smashed.learning}
        smashed.backward(gradients, returning.gradients)

    expected = whole(*args, **kwargs)
    loss_of(expected).backward()
    assert torch.equal(loss_of(output), loss_of(expected))
    for name, parameter in whole.named_parameters():
        own = [
            half.get_parameter(name)
            for half in (parts.client, parts.server)
            if name in dict(half.named_parameters())
        ]
        if parameter.grad is not None:
            found = [p.grad for p in own if p.grad is not None]
            assert any(torch.equal(gradient, parameter.grad) for gradient in found), name
    for name, buffer in whole.named_buffers():
        own = dict(parts.client.named_buffers()) | dict(parts.server.named_buffers())
        assert torch.equal(own[name], buffer), name


def test_state_dicts_of_the_parts_are_the_models():
    model = plain()
    parts = split(model, ("1", "5"))
    assert list(parts.client.state_dict()) == ["0.weight", "0.bias", "6.weight", "6.bias"]
    client, server = parts.divide(model.state_dict())
    assert {*client} | {*server} == {*model.state_dict()}
    assert list(parts.join(client, server)) == list(model.state_dict())


@pytest.mark.parametrize(
    ("cut", "error", "what"),
    [
        (("1", "6"), EmptySegmentError, "client's last layers would have nothing to train"),
        (("5", "1"), CutError, "the second cut '1' doesn't come after the first one '5'"),
        (("1", "1"), CutError, "doesn't come after"),
        (("3", "4"), EmptySegmentError, "come between '3' and '4', so the server"),
        (("2", "nope"), UnknownCutError, "no submodule 'nope'"),
    ],
)
def test_cuts_that_leave_a_side_without_anything_are_refused(cut, error, what):
    with pytest.raises(error, match=what):
        split(plain(), cut, images())


class Choosing(Twice):
    """The server's layers branch on data, or hand two values on."""

    def __init__(self, *, branches):
        super().__init__()
        self.branches = branches
        self.last = nn.Linear(6, 6)

    def forward(self, x):
        first = torch.tanh(self.ends(x))
        second = self.middle(-first if self.branches and first.mean() > 0.1 else first)
        return self.last(second) + (0 if self.branches else first)


@pytest.mark.parametrize(
    ("branches", "what"), [(True, r"__bool__\(\)"), (False, "need 2 values of the server's")]
)
def test_what_one_tensor_cannot_bring_back_is_refused_by_name(branches, what):
    with pytest.raises(CrossingError, match=what):
        split(Choosing(branches=branches), ("ends", "middle"), torch.randn(4, 6))


def test_the_tail_takes_labels():
    class WithLoss(nn.Sequential):
        def forward(self, x, labels=None):
            output = super().forward(x)
            return output if labels is None else functional.cross_entropy(output, labels)

    model = WithLoss(*plain())
    parts = split(model, ("1", "5"), images())
    smashed, labels = parts.client(images()), torch.tensor([1, 2, 3])
    middle = parts.server(smashed)
    returning = parts.client.returning(middle, smashed, (images(),), {})
    assert torch.equal(parts.client.tail(returning, labels=labels), model(images(), labels))
