"""A run that was interrupted and resumed ends as the run that was not, bit for bit."""

import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAdam
from reference import CUT, MOMENTUM, OPTIMIZERS, SEED, fresh, make_parts, noisy_net, split_app

from flsplit import LocalGrid
from flsplit.client_parts import Noise
from flsplit.errors import ConfigError
from flsplit.storage import StorageError
from flsplit.strategies import PSL, SFLGA, CycleSL, SequentialSL, SplitFedV1, SplitFedV2

SIZES = (20, 13, 9)
ROUNDS = 3


def make_grid(state_dir=None, optimizer=MOMENTUM, **options):
    parts = make_parts(SIZES, noisy_net)
    app = split_app(noisy_net, parts, parts, optimizer=optimizer)
    return LocalGrid(app, len(SIZES), state_dir=state_dir, **options)


def run(
    cls,
    folder,
    *,
    num_rounds,
    resume=False,
    optimizer=MOMENTUM,
    state=None,
    grid=None,
    seed=SEED,
    **options,
):
    strategy = cls(
        model=fresh(noisy_net),
        cut=CUT,
        server_lr=0.05,
        server_optimizer=optimizer,
        batch_size=4,
        seed=seed,
        checkpoint_dir=str(folder / "checkpoint"),
        resume=resume,
        **options,
    )
    grid = grid or make_grid(state or folder / "clients", optimizer)
    initial = ArrayRecord(fresh(noisy_net).state_dict())
    return strategy.start(grid, initial, num_rounds=num_rounds)


def outcome(result):
    return result.history.numbers(), {k: v.numpy().tobytes() for k, v in result.arrays.items()}


def fed_adam():
    return FedAdam(min_train_nodes=1, min_available_nodes=1, eta=0.01)


CASES = {
    "psl": (PSL, {}),
    "psl-sampled": (PSL, {"fraction_train": 0.67}),
    "splitfed-v1": (SplitFedV1, {}),
    "splitfed-v2": (SplitFedV2, {}),
    "splitfed-v2-fedadam": (SplitFedV2, {"client_strategy": fed_adam}),
    "sequential-sl": (SequentialSL, {}),
    "cyclesl": (CycleSL, {"server_batch_size": 6, "server_epochs": 2}),
    "sfl-ga": (SFLGA, {}),
}


def options_of(case):
    cls, options = CASES[case]
    return cls, {k: v() if k == "client_strategy" else v for k, v in options.items()}


@cache
def whole(case, optimizer=MOMENTUM):
    """Return the outcome of a run that nothing interrupts."""
    cls, options = options_of(case)
    with TemporaryDirectory() as folder:
        found = run(cls, Path(folder), num_rounds=ROUNDS, optimizer=optimizer, **options)
    return outcome(found)


@pytest.mark.parametrize(
    ("case", "optimizer"),
    [*((case, "momentum") for case in CASES), ("psl", "adam"), ("splitfed-v1", "adam")],
)
def test_resumed_run_equals_uninterrupted_run(case, optimizer, tmp_path):
    optimizer = OPTIMIZERS[optimizer]
    cls, options = options_of(case)
    run(cls, tmp_path, num_rounds=2, optimizer=optimizer, **options)
    cls, options = options_of(case)
    resumed = run(cls, tmp_path, num_rounds=ROUNDS, resume=True, optimizer=optimizer, **options)

    assert outcome(resumed) == whole(case, optimizer)


def test_clients_ahead_of_the_checkpoint_are_rolled_back(tmp_path):
    # The server's file of round 3 is lost, the clients have gone on to round 3.
    run(PSL, tmp_path, num_rounds=3)
    (tmp_path / "checkpoint" / "server" / "round-3.safetensors").unlink()
    resumed = run(PSL, tmp_path, num_rounds=ROUNDS, resume=True)

    assert outcome(resumed) == whole("psl")


def test_a_run_that_is_done_already_says_so_and_is_given_back(tmp_path, caplog):
    done = run(PSL, tmp_path, num_rounds=2)
    again = run(PSL, tmp_path, num_rounds=1, resume=True)

    assert outcome(again) == outcome(done)
    assert "num_rounds is 1, and 2 are done: nothing is left to train" in caplog.text


def test_a_client_without_its_state_starts_from_the_servers_segment_and_is_listed(tmp_path):
    run(PSL, tmp_path, num_rounds=2)
    shutil.rmtree(tmp_path / "clients" / "1")

    resumed = run(PSL, tmp_path, num_rounds=3, resume=True)

    assert [entry.restarted for entry in resumed.history] == [[], [], ["1"]]
    assert resumed.history[-1].left_out == []


def test_a_new_run_does_not_take_up_the_states_of_an_old_one(tmp_path):
    first = run(PSL, tmp_path / "a", num_rounds=2)
    again = run(PSL, tmp_path / "a", num_rounds=2)
    assert outcome(again) == outcome(first)


def test_two_rounds_are_kept_on_both_sides(tmp_path):
    run(PSL, tmp_path, num_rounds=4)
    for folder in (tmp_path / "checkpoint" / "server", tmp_path / "clients" / "0"):
        names = sorted(path.name for path in folder.iterdir())
        assert names == ["round-3.safetensors", "round-4.safetensors"]


def interrupt(grid, server_round, step):
    """Let Ctrl-C come before a message of a round is delivered."""
    push = grid.push_messages

    def interrupted(messages):
        messages = list(messages)
        for message in messages:
            record = message.content.config_records.get("step", {})
            if (record.get("server-round"), record.get("step")) == (server_round, step):
                grid.push_messages = push
                raise KeyboardInterrupt
        return push(messages)

    grid.push_messages = interrupted


@pytest.mark.parametrize(
    ("case", "cache"), [*((case, True) for case in CASES), ("psl", False), ("splitfed-v2", False)]
)
def test_a_grid_that_lives_on_is_rolled_back_too(case, cache, tmp_path):
    """As in a notebook: interrupted in the middle of a round, resumed on the same grid."""
    grid = make_grid(tmp_path / "clients", cache=cache)
    interrupt(grid, server_round=3, step=2)
    cls, options = options_of(case)
    with pytest.raises(KeyboardInterrupt):
        run(cls, tmp_path, num_rounds=ROUNDS, grid=grid, **options)
    cls, options = options_of(case)
    resumed = run(cls, tmp_path, num_rounds=ROUNDS, grid=grid, resume=True, **options)
    assert outcome(resumed) == whole(case)


def test_a_grid_that_lives_on_without_states_on_disk_says_who_begins_anew(tmp_path):
    grid = make_grid()
    interrupt(grid, server_round=3, step=2)
    with pytest.raises(KeyboardInterrupt):
        run(PSL, tmp_path, num_rounds=ROUNDS, grid=grid)
    resumed = run(PSL, tmp_path, num_rounds=3, grid=grid, resume=True)
    assert resumed.history[-1].restarted == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"cls": SequentialSL}, "with strategy 'PSL', this one has 'SequentialSL'"),
        ({"optimizer": torch.optim.Adam}, "with server_optimizer 'SGD', this one has 'Adam'"),
        ({"seed": SEED + 1}, "with seed "),
        ({"client_parts": [Noise(0.1)]}, "with client_parts '', .*noise"),
        ({"client_strategy": fed_adam()}, "with client_strategy '', this one has 'FedAdam'"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(changed, expected, tmp_path):
    run(PSL, tmp_path, num_rounds=1)
    with pytest.raises(ConfigError, match=expected):
        run(**({"cls": PSL, "folder": tmp_path, "num_rounds": 2, "resume": True} | changed))


def test_resume_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(ConfigError, match="no checkpoint"):
        run(PSL, tmp_path, num_rounds=1, resume=True)


def test_a_broken_checkpoint_is_named(tmp_path):
    run(PSL, tmp_path, num_rounds=1)
    path = tmp_path / "checkpoint" / "server" / "round-1.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(StorageError, match=r"round-1\.safetensors"):
        run(PSL, tmp_path, num_rounds=2, resume=True)
