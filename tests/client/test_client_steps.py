"""One client's steps: what moves, when, and what does not."""

import pytest
import torch
from driving import Drive, some_gradient
from reference import (
    LR,
    MOMENTUM,
    OPTIMIZERS,
    SEED,
    assert_bit_equal,
    fresh,
    make_parts,
    noisy_net,
    normed_net,
    plain_net,
    split_app,
)
from torch import nn
from torch.optim import SGD

from flsplit.seeds import derive_seed, seeded

CACHE = pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
BATCHES = "num_batches_tracked"


def drive_of(build=noisy_net, size=8, *, cache=True, optimizer=MOMENTUM, tests=None, **options):
    parts = make_parts([size], build)
    tests = None if tests is None else make_parts([tests], build)
    return Drive(split_app(build, parts, tests, optimizer=optimizer, **options), build, cache=cache)


def assert_same_state(first, second):
    """Compare what two rounds' ends hand over."""
    assert_bit_equal(first.segment, second.segment)
    assert first.optimizer.keys() == second.optimizer.keys()
    for index, values in first.optimizer.items():
        assert_bit_equal(values, second.optimizer[index])


@CACHE
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_step_is_an_ordinary_training_step_of_the_segment(optimizer, cache):
    drive = drive_of(optimizer=optimizer, cache=cache)
    front = fresh(noisy_net).front.train()
    own = optimizer(front.parameters(), lr=LR)
    inputs, _ = make_parts([8], noisy_net)[0].tensors
    rng = torch.Generator().manual_seed(derive_seed(SEED, "data", "0", 0))
    order = torch.randperm(8, generator=rng)

    reply = drive.begin()
    for step in range(2):
        with seeded(derive_seed(SEED, "client", "0", 1, step)):
            smashed = front(inputs[order[4 * step : 4 * step + 4]])
        assert torch.equal(reply.smashed, smashed)
        gradient = some_gradient(step, reply)
        own.zero_grad()
        smashed.backward(gradient)
        own.step()
        if step == 0:
            reply = drive.step(1, gradient)
    end = drive.finish(1, gradient)
    assert_bit_equal(end.segment, {f"front.{k}": v for k, v in front.state_dict().items()})
    for index, values in own.state_dict()["state"].items():
        assert_bit_equal(end.optimizer[index], values)


@CACHE
def test_batchnorm_moves_once_per_step(cache):
    drive = drive_of(normed_net, cache=cache)
    reply = drive.begin(local_steps=3, lr=0.0)
    expected = fresh(normed_net).front.train()
    for step in (0, 1):
        reply = drive.step(step + 1, some_gradient(step, reply))
    end = drive.finish(2, some_gradient(2, reply))
    assert end.segment["front.2.num_batches_tracked"] == 3
    inputs, _ = make_parts([8], normed_net)[0].tensors
    for epoch, start in ((0, 0), (0, 4), (1, 0)):
        rng = torch.Generator().manual_seed(derive_seed(SEED, "data", "0", epoch))
        expected(inputs[torch.randperm(8, generator=rng)[start : start + 4]])
    for name in ("running_mean", "running_var"):
        assert torch.equal(end.segment[f"front.2.{name}"], expected.state_dict()[f"2.{name}"])


@CACHE
def test_a_step_whose_gradient_never_came_never_happened(cache):
    """The next round begins with the same batch, buffers, weights and optimizer."""
    undisturbed, disturbed = drive_of(cache=cache), drive_of(cache=cache)
    for drive in (undisturbed, disturbed):
        drive.train_round(some_gradient, local_steps=3)
    reply = disturbed.begin(local_steps=3)
    for step in (1, 2):
        reply = disturbed.step(step, some_gradient(step - 1, reply))
    disturbed_steps = 2  # the third forward pass awaits its gradient for ever
    undisturbed.train_round(some_gradient, local_steps=disturbed_steps)

    # Dropout depends on the round: both go on with the same one.
    assert disturbed.round == undisturbed.round
    ends = [drive.train_round(some_gradient, local_steps=2) for drive in (undisturbed, disturbed)]
    assert_same_state(*ends)
    assert ends[0].segment["front.2.num_batches_tracked"] == 3 + 2 + 2


@CACHE
def test_a_lost_step_is_no_part_of_evaluation(cache):
    """Evaluation while a gradient is awaited sees the buffers of before that forward pass."""
    drive = drive_of(cache=cache, tests=3)
    reply = drive.begin()
    expected = fresh(noisy_net).front.eval()
    inputs, labels = make_parts([3], noisy_net)[0].tensors
    evaluated = drive.evaluate()
    assert torch.equal(evaluated.smashed, expected(inputs))
    assert torch.equal(evaluated.labels, labels)

    # The gradient may come after all.
    other = drive_of(cache=cache, tests=3)
    ends = []
    for one in (drive, other):
        reply = reply if one is drive else one.begin()
        reply = one.step(1, some_gradient(0, reply))
        ends.append(one.finish(1, some_gradient(1, reply)))
    assert_same_state(*ends)


@CACHE
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_no_update_leaves_weights_and_optimizer_and_goes_on(optimizer, cache):
    drive = drive_of(optimizer=optimizer, cache=cache)
    before = drive.train_round(some_gradient)
    after = drive.train_round(lambda step, reply: None)
    for index, values in before.optimizer.items():
        assert_bit_equal(after.optimizer[index], values)
    for name, tensor in before.segment.items():
        is_buffer = "running" in name or BATCHES in name
        assert torch.equal(after.segment[name], tensor) != is_buffer, name
    assert after.segment[f"front.2.{BATCHES}"] == 4


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_gradient_of_zeros_is_not_no_update(optimizer):
    drive = drive_of(optimizer=optimizer)
    before = drive.train_round(some_gradient)
    after = drive.train_round(lambda step, reply: torch.zeros_like(reply.smashed))
    weights = "front.0.weight"
    assert not torch.equal(after.segment[weights], before.segment[weights])


@CACHE
def test_no_update_moves_on_to_the_next_batch(cache):
    first, second = drive_of(cache=cache), drive_of(cache=cache)
    labels = []
    for drive, gradient_of in ((first, some_gradient), (second, lambda step, reply: None)):
        reply = drive.begin(local_steps=3)
        labels.append([reply.labels])
        for step in (1, 2):
            reply = drive.step(step, gradient_of(step - 1, reply))
            labels[-1].append(reply.labels)
    for one, other in zip(*labels, strict=True):
        assert torch.equal(one, other)


@CACHE
def test_max_grad_norm_clips_the_segments_gradient(cache):
    """With plain SGD the step's length is the learning rate times the norm."""
    ends = {}
    for norm in (None, 0.25, 1e6):
        drive = drive_of(plain_net, 4, cache=cache, optimizer=SGD, max_grad_norm=norm)
        end = drive.train_round(some_gradient, lr=1.0)
        moved = torch.cat([(end.segment[k] - drive.first[k]).flatten() for k in drive.first])
        ends[norm] = moved
    assert ends[None].norm() > 0.5
    assert torch.equal(ends[None], ends[1e6])
    assert ends[0.25].norm().item() == pytest.approx(0.25, rel=1e-4)
    torch.testing.assert_close(ends[0.25] / ends[0.25].norm(), ends[None] / ends[None].norm())


@CACHE
def test_autocast_sends_bfloat16_and_trains(cache):
    drive = drive_of(plain_net, 8, cache=cache, autocast=torch.bfloat16)
    reply = drive.begin()
    assert reply.smashed.dtype == torch.bfloat16
    inputs, _ = make_parts([8])[0].tensors
    rng = torch.Generator().manual_seed(derive_seed(SEED, "data", "0", 0))
    rows = inputs[torch.randperm(8, generator=rng)[:4]]
    exact = fresh(plain_net).front(rows)
    torch.testing.assert_close(reply.smashed.float(), exact, rtol=0.05, atol=0.05)
    reply = drive.step(1, some_gradient(0, reply))
    end = drive.finish(1, some_gradient(1, reply))
    assert {tensor.dtype for tensor in end.segment.values()} == {torch.float32}

    plain = drive_of(plain_net, 8, cache=cache).train_round(some_gradient)
    for name, tensor in plain.segment.items():
        torch.testing.assert_close(end.segment[name], tensor, rtol=0.05, atol=0.05)
        assert not torch.equal(end.segment[name], drive.first[name])


@CACHE
def test_learning_rate_comes_with_every_round(cache):
    drive = drive_of(plain_net, 4, cache=cache, optimizer=SGD)
    segments = [drive.first]
    for lr in (0.1, 0.0, 0.2):
        reply = drive.begin(lr=lr)
        segments.append(drive.finish(0, torch.ones_like(reply.smashed)).segment)
    # The bias's gradient through the tanh differs from step to step, but not its sign.
    assert_bit_equal(segments[2], segments[1])
    assert not torch.equal(segments[1]["front.0.bias"], segments[0]["front.0.bias"])
    assert not torch.equal(segments[3]["front.0.bias"], segments[2]["front.0.bias"])


@CACHE
def test_a_new_segment_replaces_weights_and_buffers_but_not_the_optimizer(cache):
    drive = drive_of(cache=cache)
    before = drive.train_round(some_gradient)
    given = {k: v.clone() for k, v in fresh(noisy_net, seed=9).state_dict().items()}
    given = {k: v + 1 for k, v in given.items() if k in drive.first}
    drive.begin(segment=given, version=1, lr=0.0)
    drive.step(1, None)
    end = drive.finish(1, None)
    for name in ("front.0.weight", "front.2.bias"):
        assert torch.equal(end.segment[name], given[name])
    assert end.segment[f"front.2.{BATCHES}"] == given[f"front.2.{BATCHES}"] + 2
    for index, values in before.optimizer.items():
        assert_bit_equal(end.optimizer[index], values)


@CACHE
def test_an_optimizer_state_that_is_handed_on_is_used(cache):
    """A client that never stepped goes on with another's segment and momentum as that one would."""
    giver, taker = drive_of(cache=cache), drive_of(cache=cache)
    given = giver.train_round(some_gradient)
    taker.train_round(lambda step, reply: None)
    ends = [
        giver.train_round(some_gradient),
        taker.train_round(
            some_gradient, segment=given.segment, version=1, optimizer=given.optimizer
        ),
    ]
    assert_same_state(*ends)


class Offset(nn.Module):
    """Makes a buffer, which a state dict leaves out, as long as the longest batch."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 6)
        self.register_buffer("rows", torch.zeros(0, 1), persistent=False)

    def forward(self, x):
        if len(self.rows) < len(x):
            self.rows = torch.arange(len(x), dtype=x.dtype)[:, None]
        return self.linear(x) + self.rows[: len(x)]


def offset_net():
    net = plain_net()
    net.front = Offset()
    return net


def test_buffers_outside_the_state_dict_may_be_made_in_forward():
    replies = []
    for cache in (True, False):
        drive = drive_of(offset_net, 8, cache=cache)
        reply = drive.begin(local_steps=3)
        for step in (1, 2):
            reply = drive.step(step, some_gradient(step - 1, reply))
        replies.append(reply.smashed)
    assert torch.equal(*replies)


def frozen_net():
    net = plain_net()
    net.front.requires_grad_(False)
    return net


def half_frozen_net():
    net = noisy_net()
    net.front[0].weight.requires_grad_(False)
    return net


@CACHE
def test_frozen_layers_stay(cache):
    end = drive_of(frozen_net, 8, cache=cache).train_round(some_gradient)
    assert end.segment == {}  # what never changes is not handed over
    assert end.optimizer == {}

    drive = drive_of(half_frozen_net, cache=cache)
    end = drive.train_round(some_gradient)
    assert "front.0.weight" not in end.segment
    moved = {k for k in end.segment if not torch.equal(drive.first[k], end.segment[k])}
    assert {"front.0.bias", "front.2.weight", "front.2.bias"} <= moved
