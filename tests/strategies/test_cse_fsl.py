"""CSE-FSL: what it computes, against a twin; what it sends."""

import pytest
import torch
from reference import (
    NUM_CLASSES,
    OPTIMIZERS,
    assert_bit_equal,
    make_parts,
    plain_net,
    run_split,
    weights_of,
)
from twins.fsl_sage import Twin
from twins.recording import assert_same_run

from flsplit.errors import ConfigError
from flsplit.strategies import CSEFSL

SIZES = (20, 13, 9)
FLOAT = 4
SEGMENT = (8 * 6 + 6) * FLOAT
AUXILIARY = (6 * NUM_CLASSES + NUM_CLASSES) * FLOAT


def cse(rounds=4, sizes=SIZES, **options):
    return run_split(
        CSEFSL, plain_net, make_parts(sizes), rounds=rounds, **({"upload_every": 2} | options)
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_agrees_with_the_twin_step_by_step(optimizer):
    optimizer = OPTIMIZERS[optimizer]
    for rounds in (1, 2, 4):
        twin = Twin(plain_net, make_parts(SIZES), (6,), NUM_CLASSES, optimizer, cse=True)
        found = assert_same_run(CSEFSL, twin, rounds, upload_every=2)

        for entry, losses in zip(found.history, twin.losses, strict=True):
            assert entry.steps == len(losses)
            mean = sum(loss * rows for loss, rows in losses) / entry.rows
            assert entry.loss == pytest.approx(mean, abs=1e-6)


def test_logical_bytes_of_a_round_are_the_formula():
    """Σ_i 2|x_c| + 2|x_a| + Σ bytes(s_n) of the uploads; labels apart."""
    rows = 12 + 8 + 5
    for entry in cse(fraction_evaluate=0.0).history:
        logical = dict(entry.traffic.logical)
        assert logical.pop("labels-up") == rows * 8
        assert sum(logical.values()) == 3 * 2 * (SEGMENT + AUXILIARY) + rows * 6 * FLOAT


def test_without_averaging_auxiliary_models_stay_with_the_clients():
    first, second, *_ = cse(average_auxiliary=False).history

    assert first.traffic.logical["auxiliary-down"] == 3 * AUXILIARY
    assert second.traffic.logical["auxiliary-down"] == 0
    assert first.traffic.logical["auxiliary-up"] == 0
    assert "auxiliary-cosine" not in second.metrics


def test_the_auxiliary_learning_rate_can_follow_the_round():
    fixed = cse(auxiliary_lr=0.05)
    function = cse(auxiliary_lr=lambda server_round: 0.05)
    other = cse(auxiliary_lr=lambda server_round: 0.05 / server_round)

    assert fixed.history.numbers() == function.history.numbers()
    assert fixed.history.numbers() != other.history.numbers()


def test_cosines_and_memory_are_in_the_ledger():
    for entry in cse(sizes=(40, 40)).history:
        assert -1 <= entry.metrics["auxiliary-cosine"] <= 1
        assert entry.metrics["client-memory-bytes"] < entry.metrics["whole-model-memory-bytes"]


@pytest.mark.parametrize(
    ("option", "value"), [("auxiliary_lr", -1.0), ("average_auxiliary", 1), ("align_every", 2)]
)
def test_options_that_cannot_be_used_are_refused(option, value):
    with pytest.raises(ConfigError, match=option):
        cse(**{option: value})


def test_a_second_run_on_the_same_clients_begins_anew():
    """The auxiliary models' optimizer, too: Adam would remember."""
    parts, grid = make_parts((8, 8)), []

    def kept(one):
        grid.append(one)
        return grid[0]

    runs = [
        run_split(CSEFSL, plain_net, parts, optimizer=torch.optim.Adam, wrap=kept) for _ in range(2)
    ]
    assert len(grid) == 2
    assert_bit_equal(weights_of(runs[1].arrays), weights_of(runs[0].arrays))
