"""CycleSL against its twin; dropout and seeds; the ledger."""

import pytest
import torch
from reference import (
    MOMENTUM,
    assert_bit_equal,
    make_parts,
    noisy_net,
    normed_net,
    plain_net,
    run_split,
    whole_of,
)
from twins.cyclesl import cyclesl
from twins.loop import train_twin
from twins.recording import assert_same_weights, recorded

from flsplit.errors import ConfigError
from flsplit.strategies import PSL, CycleSL

SIZES = (8, 14, 11)  # 2, 4 and 3 mini-batches of up to 4: 12, 12, 7 and 2 rows at the server
SHARE = {"share_client_segments": True}
CASES = [
    {},
    {"server_batch_size": 5},
    {"server_epochs": 3, "server_batch_size": 4},
    {"server_epochs": 2, "server_batch_size": 100},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("build", [plain_net, normed_net])
def test_every_step_is_the_twins(build, case):
    parts = make_parts(SIZES, build)
    answers, fronts, server = train_twin(
        cyclesl(MOMENTUM, **case), build, parts, optimizer=MOMENTUM
    )
    result, steps = recorded(CycleSL, build, parts, optimizer=MOMENTUM, **SHARE, **case)
    assert len(steps) == len(answers) == 8
    for step, answer in zip(steps, answers, strict=True):
        assert not step.skipped
        assert step.rows == answer.notes["rows"]
        for client, gradient in answer.cut.items():
            torch.testing.assert_close(
                step.cut_gradients[str(client)], gradient, rtol=1e-5, atol=1e-6
            )
    assert_same_weights(result, fronts, server)


def test_clients_hear_of_the_new_server():
    """With a server that stays as it is, they step as in PSL."""
    parts, options = make_parts(SIZES), {"rounds": 1, "client_lr": 0.05, **SHARE}
    psl = whole_of(run_split(PSL, plain_net, parts, server_lr=0.0, **options))
    still = whole_of(run_split(CycleSL, plain_net, parts, server_lr=0.0, **options))
    moved = whole_of(run_split(CycleSL, plain_net, parts, server_lr=0.5, **options))
    for key in psl:
        torch.testing.assert_close(still[key], psl[key])
        assert not torch.allclose(moved[key], psl[key])


def test_with_dropout_one_seed_is_one_result():
    parts, options = make_parts(SIZES, noisy_net), {"server_epochs": 2, **SHARE}
    options |= {"server_batch_size": 5}
    one, same, other = (
        run_split(CycleSL, noisy_net, parts, seed=seed, **options) for seed in (1, 1, 2)
    )
    assert one.history.numbers() == same.history.numbers()
    for client in "012":
        assert_bit_equal(whole_of(one, client), whole_of(same, client))
    assert one.history.numbers() != other.history.numbers()


def test_with_and_without_cache_the_history_is_the_same():
    parts = make_parts(SIZES, noisy_net)
    runs = [run_split(CycleSL, noisy_net, parts, cache=cache) for cache in (True, False)]
    assert runs[0].history.numbers() == runs[1].history.numbers()


@pytest.mark.parametrize("epochs", [1, 3])
def test_the_ledger_has_all_rows_and_psls_traffic(epochs):
    """E passes over the mixed rows and one more over everybody's batches; only that is sent."""
    parts = make_parts(SIZES)
    (psl,) = run_split(PSL, plain_net, parts, rounds=1).history
    (found,) = run_split(CycleSL, plain_net, parts, rounds=1, server_epochs=epochs).history
    assert psl.rows == sum(SIZES)
    assert found.rows == (epochs + 1) * sum(SIZES)
    assert found.steps == psl.steps == 4
    assert found.traffic.logical == psl.traffic.logical


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"server_epochs": 0}, "server_epochs is 0"),
        ({"server_epochs": 1.5}, "server_epochs is 1.5"),
        ({"server_batch_size": 0}, "server_batch_size is 0"),
        ({"server_batch_size": "32"}, "server_batch_size is '32'"),
        ({"rules": []}, "CycleSL has no argument 'rules'"),
        ({"server_epoch": 1}, "no argument 'server_epoch'; did you mean 'server_epochs'"),
    ],
)
def test_what_can_not_be_is_refused_at_construction(options, why):
    with pytest.raises(ConfigError, match=why):
        CycleSL(model=plain_net(), cut="front", **options)
