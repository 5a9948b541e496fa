"""The server segment: its optimizer lives as long as the segment does."""

import copy

import pytest
import torch
from reference import OPTIMIZERS, assert_bit_equal, fresh, noisy_net, plain_net
from torch.nn import functional
from torch.optim.lr_scheduler import OneCycleLR, StepLR

from flsplit.cut import split
from flsplit.errors import ConfigError
from flsplit.server.segment import ServerSegment

CPU = torch.device("cpu")


def segment_of(build=plain_net, optimizer=torch.optim.SGD, lr=0.1, **options):
    return ServerSegment(
        split(fresh(build), "front").server, loss=functional.cross_entropy,
        optimizer=optimizer, lr=lr, device=CPU, **options,
    )  # fmt: skip


def some_gradients(segment, seed):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=rng) for p in segment.parameters]


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_steps_are_those_of_the_torch_optimizer(optimizer):
    segment = segment_of(optimizer=optimizer)
    model = fresh(plain_net)
    parameters = [*model.middle.parameters(), *model.head.parameters()]
    own = optimizer(parameters, lr=0.1)
    for seed in range(3):
        segment.step(some_gradients(segment, seed))
        for parameter, gradient in zip(parameters, some_gradients(segment, seed), strict=True):
            parameter.grad = gradient
        own.step()
    for found, expected in zip(segment.parameters, parameters, strict=True):
        assert torch.equal(found, expected)


def test_gradients_do_not_pile_up():
    """A step without gradients moves nothing, whatever the step before left."""
    segment = segment_of()
    segment.step(some_gradients(segment, 0))
    before = copy.deepcopy(segment.arrays())
    segment.step([None] * len(segment.parameters))
    assert_bit_equal(segment.arrays(), before)


def test_learning_rate_is_set_for_all_groups():
    segment = segment_of()
    before = [p.detach().clone() for p in segment.parameters]
    segment.set_lr(0.5)
    gradients = some_gradients(segment, 0)
    segment.step(gradients)
    for parameter, old, gradient in zip(segment.parameters, before, gradients, strict=True):
        torch.testing.assert_close(parameter.detach(), old - 0.5 * gradient)


def test_a_scheduler_that_ends_before_the_run_says_so():
    segment = segment_of(scheduler=lambda o: OneCycleLR(o, max_lr=0.1, total_steps=2))
    for _ in range(2):
        segment.end_round()
    with pytest.raises(ConfigError, match="OneCycleLR can't step at the end of the round: Tried"):
        segment.end_round()


def test_a_scheduler_steps_at_each_rounds_end():
    segment = segment_of(lr=0.8, scheduler=lambda o: StepLR(o, step_size=2, gamma=0.5))
    rates = []
    for _ in range(5):
        rates.append(segment.optimizer.param_groups[0]["lr"])
        segment.step(some_gradients(segment, 0))
        segment.end_round()
    assert rates == [0.8, 0.8, 0.4, 0.4, 0.2]


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_segment_goes_on_from_its_state_dict(optimizer):
    def make():
        return segment_of(noisy_net, optimizer, scheduler=lambda o: StepLR(o, 1, gamma=0.5))

    first, second = make(), make()
    for seed in range(2):
        first.step(some_gradients(first, seed))
        first.module.train()(torch.randn(2, 3, 4, 4))
        first.end_round()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for segment in (first, second):
        segment.step(some_gradients(segment, 5))
        segment.end_round()
    assert_bit_equal(second.arrays(), first.arrays())
    assert second.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 8)


def test_loading_arrays_keeps_the_optimizers_momentum():
    segment = segment_of(optimizer=OPTIMIZERS["momentum"])
    start = copy.deepcopy(segment.arrays())
    segment.step(some_gradients(segment, 0))
    segment.load_arrays(start)
    assert_bit_equal(segment.arrays(), start)
    gradients = some_gradients(segment, 1)
    segment.step(copy.deepcopy(gradients))
    first = some_gradients(segment, 0)
    for (name, tensor), one, two in zip(segment.arrays().items(), first, gradients, strict=True):
        torch.testing.assert_close(tensor, start[name] - 0.1 * (0.9 * one + two), msg=name)


def test_smashed_data_is_taken_in_the_weights_dtype():
    received = segment_of().receive(torch.ones(2, 6, dtype=torch.bfloat16))
    assert received.dtype == torch.float32
    assert torch.equal(received, torch.ones(2, 6))
