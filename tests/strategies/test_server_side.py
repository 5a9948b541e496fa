"""What a strategy does on the server: shares, learning rates, a method of one's own."""

from functools import partial

import pytest
import torch
from flwr.app import ArrayRecord
from flwr.clientapp import ClientApp
from reference import (
    CUT,
    LR,
    MOMENTUM,
    OPTIMIZERS,
    assert_bit_equal,
    assert_close,
    epoch_batches,
    fresh,
    make_parts,
    normed_net,
    plain_net,
    run_split,
    train_in_turn,
    weights_of,
    whole_of,
)
from torch.nn import functional
from torch.optim import LBFGS, SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from flsplit import LocalGrid
from flsplit.errors import ConfigError
from flsplit.strategies import PSL, SequentialSL, SplitFedV1, SplitFedV2

ALL = [PSL, SplitFedV1, SplitFedV2, SequentialSL]
SHARE = {"share_client_segments": True}

# --- shares and reduction --------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shares", ["examples", "batch", "equal"])
def test_server_steps_by_the_weighted_sum_and_clients_by_their_own_loss(shares, reduction):
    sizes, rows = (3, 7, 10), (3, 4, 4)
    parts = make_parts(sizes)
    result = run_split(
        PSL, plain_net, parts, rounds=1, local_steps=1, shares=shares, reduction=reduction, **SHARE
    )
    counts = {"examples": sizes, "batch": rows, "equal": (1, 1, 1)}[shares]
    factor = 3 if reduction == "sum" else 1
    expected = dict(fresh(plain_net).state_dict())
    for index, part in enumerate(parts):
        model = fresh(plain_net)
        inputs, labels = part[next(epoch_batches(sizes[index], str(index), 4))[0]]
        functional.cross_entropy(model(inputs), labels).backward()
        segment = weights_of(result.client_segments[str(index)])
        for name, parameter in model.named_parameters():
            if name in segment:
                torch.testing.assert_close(segment[name], parameter.data - LR * parameter.grad)
            else:
                share = counts[index] / sum(counts) * factor
                expected[name] = expected[name] - LR * share * parameter.grad
    server = weights_of(result.arrays)
    assert_close(server, {name: expected[name] for name in server}, 1e-6)


@pytest.mark.parametrize(("batchnorm", "moves"), [("pooled", 3), ("per_client", 6)])
def test_server_batchnorm_sees_all_clients_or_one_at_a_time(batchnorm, moves):
    result = run_split(
        PSL, normed_net, make_parts((6, 6), normed_net), rounds=1, batch_size=2,
        server_batchnorm=batchnorm,
    )  # fmt: skip
    assert weights_of(result.arrays)["middle.3.num_batches_tracked"] == moves


def test_both_ways_to_normalise_agree_without_batchnorm():
    parts = make_parts((6, 9))
    pooled, apart = (
        run_split(PSL, plain_net, parts, optimizer=MOMENTUM, server_batchnorm=one, **SHARE)
        for one in ("pooled", "per_client")
    )
    for client in ("0", "1"):
        assert_close(whole_of(pooled, client), whole_of(apart, client), 1e-6)
    assert [e.rows for e in pooled.history] == [e.rows for e in apart.history] == [15, 15]


# --- learning rates --------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_learning_rate_may_be_a_function_of_the_round(optimizer):
    def rate(server_round):
        return LR / server_round**2

    parts = make_parts([8])
    result = run_split(
        PSL, plain_net, parts, optimizer=optimizer, rounds=3, server_lr=rate, **SHARE
    )
    weights, _ = train_in_turn(plain_net, parts, optimizer=optimizer, rounds=3, lr=rate)
    assert_bit_equal(whole_of(result), weights)


@pytest.mark.parametrize("strategy_class", ALL)
def test_a_torch_scheduler_does_what_a_function_of_the_round_does(strategy_class):
    """Also for SplitFed V1's copies, of which some begin in a later round."""
    parts = make_parts((6, 9, 4, 5))

    def run(**options):
        return run_split(
            strategy_class, plain_net, parts, optimizer=MOMENTUM, rounds=4, fraction_train=0.5,
            client_lr=LR, **options,
        )  # fmt: skip

    scheduled = run(server_scheduler=lambda optimizer: StepLR(optimizer, 1, gamma=0.5))
    by_round = run(server_lr=lambda server_round: LR * 0.5 ** (server_round - 1))
    constant = run()
    assert_close(weights_of(scheduled.arrays), weights_of(by_round.arrays), 1e-7)
    assert scheduled.history[0].loss == constant.history[0].loss
    assert scheduled.history[-1].loss != constant.history[-1].loss


def test_flowers_train_config_goes_before_the_options():
    parts = make_parts([8])
    from_config = run_split(
        PSL, plain_net, parts, server_lr=LR, client_lr=99.0, batch_size=1,
        start={"train_config": {"lr": LR, "batch-size": 4, "local-epochs": 2}}, **SHARE,
    )  # fmt: skip
    from_options = run_split(PSL, plain_net, parts, local_epochs=2, **SHARE)
    assert_bit_equal(whole_of(from_config), whole_of(from_options))


# --- a method of one's own -------------------------------------------------------------------


def scaling(strategy_class, cut, server, plus=0.0):
    """Return a strategy that multiplies what it tells clients, and what the server steps with."""

    class Scaling(strategy_class):
        def step(self, step):
            update, reply = step.update, step.reply
            step.update = lambda found, **o: update(
                [g * server for g in found.server_gradients], **o
            )
            step.reply = lambda told: reply({c: g * cut + plus for c, g in told.items()})
            super().step(step)

    return Scaling


@pytest.mark.parametrize("strategy_class", ALL)
def test_a_method_edits_the_gradients(strategy_class):
    """With plain SGD a factor is as good as another learning rate."""
    parts = make_parts((6, 9))
    edited = run_split(scaling(strategy_class, 0.5, 2.0), plain_net, parts, **SHARE)
    rated = run_split(strategy_class, plain_net, parts, client_lr=LR / 2, server_lr=LR * 2, **SHARE)
    assert_close(weights_of(edited.arrays), weights_of(rated.arrays), 1e-6)
    for client, segment in edited.client_segments.items():
        assert_close(weights_of(segment), weights_of(rated.client_segments[client]), 1e-6)


class Compare(PSL):
    """Wants to see each client's server gradients."""

    def step(self, step):
        pooled = step.gradients()
        own = step.gradients(per_client=True).clients
        combined = [
            sum(step.shares[c] * g for c, g in zip(step.clients, layer, strict=True))
            for layer in zip(*(own.of(c) for c in step.clients), strict=True)
        ]
        gaps = [zip(other, pooled.server_gradients, strict=True)
                for other in (combined, own.combine(list(step.shares.values())))]  # fmt: skip
        gap = max(float((a - b).abs().max()) for pairs in gaps for a, b in pairs)
        step.record({"gap": gap, "clients": len(step.clients)})
        step.update(pooled)
        step.reply(pooled.cut_gradients)


def test_a_method_sees_per_client_gradients_and_reports_to_the_ledger():
    parts = make_parts((4, 8))  # 2 clients in the first step, 1 in the second
    result = run_split(Compare, plain_net, parts)
    for entry in result.history:
        assert entry.metrics["clients"] == 1.5
        assert entry.metrics["gap"] < 1e-6
        assert entry.rows == 2 * (4 + 8)  # each row went back twice
    assert result.train_metrics_clientapp[1]["clients"] == 1.5
    usual = run_split(PSL, plain_net, parts)
    assert_bit_equal(weights_of(result.arrays), weights_of(usual.arrays))
    assert [e.loss for e in result.history] == [e.loss for e in usual.history]


def test_a_method_learns_where_in_the_run_it_is():
    notes = [[], []]
    for note in notes:

        class Note(PSL):
            def step(self, step, note=note):
                note.append((step, step.rng.random()))
                super().step(step)

        run_split(Note, plain_net, make_parts((4, 12)), rounds=2)
    steps = [step for step, _ in notes[0]]
    assert [(s.round, s.index) for s in steps] == [(r, s) for r in (1, 2) for s in (0, 1, 2)]
    assert [s.clients for s in steps] == [["0", "1"], ["1"], ["1"]] * 2
    assert [s.shares for s in steps[:2]] == [{"0": 0.25, "1": 0.75}, {"1": 1.0}]
    assert [s.progress for s in steps] == pytest.approx([n / 6 for n in range(6)])
    assert {s.num_rounds for s in steps} == {2}
    draws = [[draw for _, draw in note] for note in notes]
    assert draws[0] == draws[1]
    assert len(set(draws[0])) == 6


class Skip(PSL):
    """Lets one client sit out."""

    def step(self, step):
        found = step.gradients()
        step.update(found)
        step.reply({c: g for c, g in found.cut_gradients.items() if c != "1"})


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
def test_a_skipped_client_keeps_its_weights_and_gets_no_gradient(cache):
    parts = make_parts((8, 8))
    options = {"optimizer": MOMENTUM, "cache": cache} | SHARE
    skipping = run_split(Skip, plain_net, parts, **options)
    usual = run_split(PSL, plain_net, parts, **options)
    before = {f"front.{k}": v for k, v in fresh(plain_net).front.state_dict().items()}
    assert_bit_equal(weights_of(skipping.client_segments["1"]), before)
    assert not torch.equal(weights_of(skipping.client_segments["0"])["front.0.bias"],
                           before["front.0.bias"])  # fmt: skip
    # The server goes on learning from both, and the skipped one from batch to batch.
    assert skipping.history[0].loss == pytest.approx(usual.history[0].loss, rel=0.05)
    assert skipping.history[0].rows == usual.history[0].rows == 16
    category = "gradients-down-unicast"
    sent = [run.history[0].traffic.logical[category] for run in (skipping, usual)]
    assert sent == [8 * 6 * 4, 16 * 6 * 4]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"server_optimizer": partial(SGD, momentun=0.9)},
            "server_optimizer can't be made.*momentun",
        ),
        ({"server_optimizer": partial(SGD, momentum=-0.9)}, "can't be made: ValueError.*momentum"),
        (
            {"server_optimizer": lambda _parameters, lr: lr},
            "server_optimizer returned 0.05, expected",
        ),
        ({"server_optimizer": LBFGS}, "server_optimizer is LBFGS"),
        ({"server_scheduler": StepLR}, "server_scheduler can't be made.*step_size"),
        ({"server_scheduler": ReduceLROnPlateau}, "ReduceLROnPlateau, which needs a metric"),
        ({"server_scheduler": lambda _optimizer: None}, "server_scheduler returned None"),
    ],
)
def test_an_optimizer_or_scheduler_that_cannot_be_used_is_named_before_training(options, expected):
    grid, model = LocalGrid(ClientApp(), 1, progress=False), plain_net()
    strategy = PSL(model=model, cut=CUT, **({"server_lr": 0.05} | options))
    with pytest.raises(ConfigError, match=expected):
        strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=1)
