"""Clipping, noise and the proximal term: what they do, in numbers by hand."""

import math

import pytest
import torch
from client.driving import Drive, RefusedError, some_gradient
from reference import (
    LR,
    MOMENTUM,
    assert_bit_equal,
    assert_close,
    epoch_batches,
    fresh,
    make_parts,
    plain_net,
    run_split,
    split_app,
    whole_of,
)
from torch import nn
from torch.nn import functional
from torch.optim import SGD

from flsplit.client_parts import ClientWhere, Clip, Noise, Proximal, describe_parts
from flsplit.errors import ConfigError
from flsplit.strategies import PSL

CACHE = pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])


def where(seed=1, segment=None, start=None):
    return ClientWhere("0", 1, 0, seed, segment or nn.Identity(), start or {})


def drive_of(size=8, *, cache=True, optimizer=SGD, **options):
    app = split_app(plain_net, make_parts([size]), optimizer=optimizer, **options)
    return Drive(app, plain_net, cache=cache)


# --- clipping --------------------------------------------------------------------------------


def test_rows_that_are_too_long_are_scaled_down():
    rows = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    found = Clip(1.0).smashed(where(), rows)
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))
    assert torch.equal(found[1:], rows[1:])  # bit for bit


def test_a_row_of_an_image_is_measured_whole():
    images = torch.full((2, 3, 2, 2), 1.0)  # of length √12
    found = Clip(1.0).smashed(where(), images)
    torch.testing.assert_close(found, torch.full((2, 3, 2, 2), 1 / math.sqrt(12)))


def test_a_batch_is_measured_as_one():
    rows = torch.tensor([[3.0, 0.0], [0.0, 4.0]])  # of length 5 together
    found = Clip(2.5, per="batch", place="cut-gradient").cut_gradient(where(), rows)
    assert found.tolist() == [[1.5, 0.0], [0.0, 2.0]]


def test_the_factor_is_differentiated():
    """y = x / n, with n = 5 for x = (3, 4): dy_1/dx = (1/n - x_1²/n³, -x_1 x_2/n³)."""
    rows = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], requires_grad=True)
    Clip(1.0).smashed(where(), rows)[:, 0].sum().backward()
    expected = torch.tensor([[16 / 125, -12 / 125], [1.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(rows.grad, expected)


@CACHE
def test_clipped_gradients_are_those_of_torch(cache):
    parts = describe_parts([Clip(0.25, per="batch", place="gradients")])
    found = drive_of(cache=cache, optimizer=MOMENTUM).train_round(some_gradient, client_parts=parts)
    front = fresh(plain_net).front
    own = MOMENTUM(front.parameters(), lr=LR)
    inputs, _ = make_parts([8])[0].tensors
    for step, rows in enumerate(next(epoch_batches(8, "0", 4))):
        smashed = front(inputs[rows])
        own.zero_grad()
        smashed.backward(torch.randn(4, 6, generator=torch.Generator().manual_seed(step)))
        assert nn.utils.clip_grad_norm_(front.parameters(), 0.25) > 0.25
        own.step()
    assert_bit_equal(found.segment, {f"front.{k}": v for k, v in front.state_dict().items()})


# --- noise -----------------------------------------------------------------------------------


def test_noise_has_its_standard_deviation_and_no_mean():
    like = torch.full((200, 500), 3.0)
    noise = Noise(0.5).smashed(where(), like) - like
    # 100,000 draws: the standard error of the mean is 0.5/316, that of the deviation 0.5/447.
    assert abs(noise.mean()) < 5 * 0.5 / 316
    assert abs(noise.std() - 0.5) < 5 * 0.5 / 447
    assert torch.equal(noise, Noise(0.5).smashed(where(), like) - like)
    assert not torch.equal(noise, Noise(0.5).smashed(where(seed=2), like) - like)


def test_the_gradient_goes_through_noise_as_it_is():
    rows = torch.zeros(2, 3, requires_grad=True)
    Noise(1.0).smashed(where(), rows).backward(torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
    assert rows.grad.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_noise_keeps_the_type_of_what_it_is_added_to():
    half = torch.zeros(2, 3, dtype=torch.bfloat16)
    found = Noise(1.0, place="cut-gradient").cut_gradient(where(), half)
    full = Noise(1.0, place="cut-gradient").cut_gradient(where(), half.float())
    assert torch.equal(found, full.bfloat16())


def test_every_client_step_part_and_place_draws_its_own():
    parts = describe_parts([Noise(1.0), Noise(1.0)])
    plain, noisy = drive_of(), drive_of()
    first = [noisy.begin(client_parts=parts, lr=0.0), plain.begin(lr=0.0)]
    second = [noisy.step(1, None), plain.step(1, None)]
    one, two = (pair[0].smashed - pair[1].smashed for pair in (first, second))
    assert not torch.equal(one, two)
    single = drive_of()
    alone = single.begin(client_parts=describe_parts([Noise(1.0)]), lr=0.0).smashed
    other = one - (alone - first[1].smashed)  # what the second part added
    assert not torch.allclose(other, alone - first[1].smashed)


# --- the proximal term -----------------------------------------------------------------------


@CACHE
def test_the_proximal_term_with_one_client_is_that_of_unsplit_training(cache):
    """μ/2 ‖w - w_round‖² over the layers before the cut, beside the ordinary loss."""
    mu, parts = 0.7, make_parts([12])
    result = run_split(
        PSL, plain_net, parts, optimizer=MOMENTUM, rounds=3, cache=cache,
        client_parts=[Proximal(mu)], share_client_segments=True,
    )  # fmt: skip
    model = fresh(plain_net)
    own = MOMENTUM(model.parameters(), lr=LR)
    inputs, labels = parts[0].tensors
    epochs = epoch_batches(12, "0", 4)
    for _ in range(3):
        start = [p.detach().clone() for p in model.front.parameters()]
        for rows in next(epochs):
            far = zip(model.front.parameters(), start, strict=True)
            term = sum(((p - w) ** 2).sum() for p, w in far)
            loss = functional.cross_entropy(model(inputs[rows]), labels[rows]) + mu / 2 * term
            own.zero_grad()
            loss.backward()
            own.step()
    # Sums of squares in another order, and gradients added up in another.
    assert_close(whole_of(result), dict(model.state_dict()), 1e-6)
    without = run_split(
        PSL, plain_net, parts, optimizer=MOMENTUM, rounds=3, share_client_segments=True
    )
    moved = whole_of(without)["front.0.weight"] - whole_of(result)["front.0.weight"]
    assert moved.abs().max() > 1e-3


def test_without_weight_the_proximal_term_changes_nothing():
    drives = [drive_of(optimizer=MOMENTUM) for _ in range(2)]
    ends = [
        drive.train_round(some_gradient, client_parts=parts)
        for drive, parts in zip(drives, ["", describe_parts([Proximal(0)])], strict=True)
    ]
    assert_bit_equal(ends[0].segment, ends[1].segment)


def test_frozen_layers_have_no_proximal_term():
    def frozen():
        net = plain_net()
        net.front[0].weight.requires_grad_(False)
        return net

    drive = Drive(split_app(frozen, make_parts([8])), frozen)
    end = drive.train_round(some_gradient, client_parts=describe_parts([Proximal(5.0)]))
    assert "front.0.weight" not in end.segment  # it has not changed
    assert not torch.equal(end.segment["front.0.bias"], drive.first["front.0.bias"])


# --- arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Clip(0.0), "client part 'clip': norm is 0.0, expected more than 0"),
        (lambda: Clip(True), "client part 'clip': norm is True, expected more than 0"),
        (lambda: Clip(1.0, per="row"), "per is 'row', expected 'sample' or 'batch'"),
        (
            lambda: Clip(1.0, place="labels"),
            "place is 'labels', expected 'smashed', 'cut-",
        ),
        (lambda: Clip(1.0, place="gradients"), "gradients are those of a whole batch; clip them"),
        (lambda: Noise(-0.1), "client part 'noise': sigma is -0.1, expected at least 0"),
        (lambda: Noise("much"), "sigma is 'much', expected at least 0"),
        (lambda: Proximal(-1), "client part 'proximal': mu is -1, expected at least 0"),
        (lambda: describe_parts([Noise(math.inf)]), "sigma is inf, expected a number, a string"),
    ],
)
def test_arguments_that_cannot_be_used(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


def test_gradients_that_noise_has_made_infinite_change_no_weight():
    drive = drive_of()
    drive.begin(client_parts=describe_parts([Noise(1e38, place="gradients"), Noise(1e38)]))
    with pytest.raises(RefusedError, match="NonFiniteError"):
        drive.step(1, torch.full((4, 6), 3e38))
