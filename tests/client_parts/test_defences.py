"""NoPeek, shuffled batches, and noise on gradients that give labels away."""

import math

import pytest
import torch
from client.driving import Drive, some_gradient
from reference import (
    LR,
    assert_close,
    epoch_batches,
    fresh,
    make_parts,
    plain_net,
    run_split,
    split_app,
    whole_of,
)

from flsplit.client_parts import ClientWhere, LabelNoise, NoPeek, PartWhere, Shuffle, describe_parts
from flsplit.client_parts.marvell import marvell_variances
from flsplit.errors import ConfigError
from flsplit.privacy import cosine_attack, distance_correlation, norm_attack
from flsplit.strategies import PSL

PARTS = make_parts([12, 8])


def drive_of(size=8, *, cache=True):
    return Drive(split_app(plain_net, make_parts([size])), plain_net, cache=cache)


# --- NoPeek ----------------------------------------------------------------------------------


def test_no_peek_is_a_term_of_what_the_client_minimises():
    parts = describe_parts([NoPeek(0.5)])
    found = drive_of().train_round(some_gradient, client_parts=parts)
    front = fresh(plain_net).front
    optimizer = torch.optim.SGD(front.parameters(), lr=LR)
    inputs, _ = make_parts([8])[0].tensors
    for step, rows in enumerate(next(epoch_batches(8, "0", 4))):
        smashed = front(inputs[rows])
        term = 0.5 * distance_correlation(inputs[rows], smashed)
        gradient = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        torch.autograd.backward([smashed, term], [gradient, None])
        optimizer.step()
    assert_close(found.segment, {f"front.{k}": v for k, v in front.state_dict().items()}, 1e-6)


def test_no_peek_lowers_distance_correlation():
    def after(alpha):
        parts = [NoPeek(alpha)] if alpha else []
        data = make_parts([60])
        result = run_split(
            PSL, plain_net, data, client_parts=parts, share_client_segments=True, rounds=8,
            batch_size=20,
        )  # fmt: skip
        model = fresh(plain_net)
        model.load_state_dict(whole_of(result))
        inputs = data[0].tensors[0]
        return float(distance_correlation(inputs, model.front(inputs).detach()))

    assert after(5.0) < after(0.0) - 0.02


def test_no_peek_needs_numbers_and_two_rows():
    where = ClientWhere("0", 1, 0, 1, torch.nn.Identity(), {})
    part, smashed = NoPeek(1.0), torch.randn(3, 2, requires_grad=True)
    assert part.loss(where, torch.ones(3, 4, dtype=torch.int64), smashed, None) is None
    assert part.loss(where, torch.ones(1, 4), smashed[:1], None) is None
    with pytest.raises(ConfigError, match="alpha is -1"):
        NoPeek(-1)


# --- shuffled batches ------------------------------------------------------------------------


def test_rows_and_labels_are_shuffled_together_and_nobody_knows_how():
    inputs, labels = make_parts([8])[0].tensors
    front = fresh(plain_net).front
    rows = next(epoch_batches(8, "0", 4))[0]
    seen = set()
    for _ in range(6):
        reply = drive_of().begin(client_parts=describe_parts([Shuffle()]))
        smashed = front(inputs[rows])
        order = [int((smashed - one).norm(dim=1).argmin()) for one in reply.smashed]
        assert sorted(order) == [0, 1, 2, 3]
        assert torch.equal(reply.labels, labels[rows][order])
        torch.testing.assert_close(reply.smashed, smashed[order])
        seen.add(tuple(order))
    assert len(seen) > 1  # 1 in 24^5 otherwise


@pytest.mark.parametrize("cache", [True, False])
def test_a_shuffled_run_trains_the_same(cache):
    options = {"share_client_segments": True, "cache": cache}
    plain = run_split(PSL, plain_net, PARTS, **options)
    shuffled = run_split(PSL, plain_net, PARTS, client_parts=[Shuffle()], **options)
    for client in ("0", "1"):  # sums in another order
        assert_close(whole_of(shuffled, client), whole_of(plain, client), 1e-5)


# --- noise on gradients ----------------------------------------------------------------------


def logistic(n=2000, share=0.2, d=5):
    """Return gradients (σ(z) - y) w of a logistic loss, and labels."""
    rng = torch.Generator().manual_seed(0)
    labels = (torch.rand(n, generator=rng) < share).long()
    z = torch.randn(n, generator=rng) * 0.5 + math.log(share / (1 - share))
    w = torch.randn(d, generator=rng)
    return (torch.sigmoid(z) - labels.float())[:, None] * w, labels


def noisy(part, gradients, labels):
    return part.down(PartWhere("0", 1, 0, 7, labels=labels), gradients)


def test_chosen_noise_hides_labels_better_than_the_same_power_in_all_directions():
    gradients, labels = logistic()
    positive = labels.bool()
    gap = (gradients[positive].mean(0) - gradients[~positive].mean(0)).square().sum()
    chosen = noisy(LabelNoise(4.0), gradients, labels)
    power = float((chosen - gradients).square().sum(1).mean())
    assert power == pytest.approx(4 * float(gap), rel=0.15)
    same = LabelNoise(power / float(gradients.square().sum(1).mean()), marvell=False)
    plain = noisy(same, gradients, labels)
    assert cosine_attack(gradients, positive, known=5) == 1.0
    auc = [abs(cosine_attack(one, positive, known=5) - 0.5) for one in (chosen, plain)]
    assert auc[0] < auc[1] - 0.02
    assert abs(norm_attack(chosen, positive) - 0.5) < abs(norm_attack(gradients, positive) - 0.5)


def test_the_variances_are_the_best():
    """No other split of the same power makes the divergence less (a grid around the solution)."""
    gap, (v, u), d, share, power = 2.0, (0.1, 0.3), 4, 0.3, 3.0

    def divergence(a1, b1, a0, b0):
        p, q, r, s = a1 + v, a0 + u, b1 + v, b0 + u
        kl_1 = p / q + 3 * r / s - 4 + gap / q + math.log(q / p) + 3 * math.log(s / r)
        kl_0 = q / p + 3 * s / r - 4 + gap / p + math.log(p / q) + 3 * math.log(r / s)
        return kl_1 + kl_0

    (a1, b1), (a0, b0) = marvell_variances(gap, [v, u], d, share, power)
    spent = share * (a1 + 3 * b1) + (1 - share) * (a0 + 3 * b0)
    assert spent == pytest.approx(power)
    best = divergence(a1, b1, a0, b0)
    rng = torch.Generator().manual_seed(0)
    for _ in range(2000):
        w = torch.rand(4, generator=rng).double() ** 3
        w = w / w.sum() * power
        other = (w[0] / share, w[1] / share / 3, w[2] / (1 - share), w[3] / (1 - share) / 3)
        assert best <= divergence(*map(float, other)) + 1e-6


def test_plain_noise_where_there_are_more_than_two_classes():
    gradients = torch.ones(4000, 5)
    labels = torch.arange(4000) % 3
    noise = noisy(LabelNoise(2.0), gradients, labels) - gradients
    # Σ over 5 directions is 2 times the squared length 5; 20,000 draws.
    assert noise.square().sum(1).mean() == pytest.approx(10, rel=0.05)


def test_the_server_sends_noisy_gradients_and_steps_with_exact_ones():
    plain = run_split(PSL, plain_net, PARTS, rounds=1, local_steps=1, share_client_segments=True)
    noise = run_split(
        PSL, plain_net, PARTS, rounds=1, local_steps=1, share_client_segments=True,
        client_parts=[LabelNoise(0.5)],
    )  # fmt: skip
    one, other = whole_of(plain), whole_of(noise)
    for name in one:
        assert torch.equal(one[name], other[name]) == (not name.startswith("front"))
