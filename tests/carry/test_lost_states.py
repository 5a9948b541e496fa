"""A client that comes back without its state, or with an older one, is in the ledger."""

import errno
import os
import shutil

import pytest
from carry.threaded import ThreadedGrid
from flwr.app import ArrayRecord, RecordDict
from reference import CUT, LR, MOMENTUM, SEED, fresh, make_parts, plain_net, split_app

from flsplit import LocalGrid
from flsplit.carry.cohort import Cohort
from flsplit.carry.session import SessionSettings
from flsplit.message.storage_note import problem_in, put_problem
from flsplit.run import Callback
from flsplit.storage import FolderLock, StorageError, folder_name
from flsplit.strategies import (
    CSEFSL,
    EPSL,
    FSLSAGE,
    GAPSL,
    PSL,
    SFLGA,
    SGLR,
    CycleSL,
    SequentialSL,
    SplitFedV1,
    SplitFedV2,
)

METHODS = [PSL, SplitFedV1, SplitFedV2, SequentialSL, SGLR, EPSL, GAPSL, CycleSL, SFLGA, CSEFSL,
           FSLSAGE]  # fmt: skip
SIZES = (8, 8, 8)
ROUNDS = 4


class Meanwhile(Callback):
    """Does something after the second round."""

    def __init__(self, do):
        self.do = do

    def on_round_end(self, round_):
        if round_.entry.round == 2:
            self.do()


def make_app():
    return split_app(plain_net, make_parts(SIZES), optimizer=MOMENTUM)


def train(cls, *, rounds=ROUNDS, grid=None, state_dir=None, cache=True, meanwhile=None, **options):
    app = make_app()
    grid = grid or LocalGrid(app, len(SIZES), state_dir=state_dir, cache=cache, progress=False)
    callbacks = [Meanwhile(lambda: meanwhile(grid))] if meanwhile else []
    strategy = cls(
        model=fresh(plain_net), cut=CUT, server_lr=LR, server_optimizer=MOMENTUM, seed=SEED,
        batch_size=4, device="cpu", fraction_evaluate=0.0, callbacks=callbacks, **options,
    )  # fmt: skip
    return strategy.start(grid, ArrayRecord(fresh(plain_net).state_dict()), num_rounds=rounds)


def kill(grid, index=1):
    """Lose what the process of a client holds in memory."""
    cohort, context = grid._cohort, list(grid._contexts.values())[index]
    context.state = RecordDict()
    kept = {name: one for name, one in cohort._contexts.items() if name != str(index)}
    cached = cohort._cache is not None
    clients = dict(cohort._cache) if cached else {}
    clients.pop(str(index), None)
    grid._cohort = Cohort(cohort._app, store=cohort._store, cache=cached)
    grid._cohort._contexts |= kept
    if cached:
        grid._cohort._cache |= clients


def restarted(result):
    return [entry.restarted for entry in result.history]


def arrays_of(result):
    return {name: array.data for name, array in result.arrays.items()}


@pytest.mark.chaos(
    "a client loses its state",
    "the ledger has it under restarted",
)
@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.__name__)
def test_a_client_that_lost_its_state_is_told_for_every_method(cls, cache):
    """Without a cache a client lives in Flower's own ``Context.state``, as over its messages."""
    result = train(cls, cache=cache, meanwhile=kill)
    assert restarted(result) == [[], [], ["1"], []]
    assert all(entry.left_out == [] for entry in result.history)


@pytest.mark.parametrize("cls", [PSL, SplitFedV2, CSEFSL], ids=lambda cls: cls.__name__)
def test_a_client_that_finds_its_state_again_has_lost_nothing(cls, tmp_path):
    whole = train(cls)
    result = train(cls, state_dir=tmp_path, meanwhile=kill)
    assert result.history.numbers() == whole.history.numbers()
    assert arrays_of(result) == arrays_of(whole)
    assert all(entry.notes == [] for entry in result.history)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.chaos(
    "the newest state file is cut short",
    "it is set aside, the one before is taken, the ledger says so",
)
@pytest.mark.parametrize("cls", [PSL, SplitFedV2, CSEFSL], ids=lambda cls: cls.__name__)
def test_a_client_whose_newest_state_is_broken_goes_on_from_the_one_before(cls, tmp_path, caplog):
    def break_newest(grid):
        kill(grid)
        cut_short(tmp_path / "1" / "round-2.safetensors")

    result = train(cls, state_dir=tmp_path, meanwhile=break_newest)

    assert restarted(result) == [[], [], ["1"], []]
    (note,) = result.history[2].notes
    assert note.startswith(f"client '1': {tmp_path}/1/round-2.safetensors is broken: ")
    assert note.endswith("; it goes on from round 1")
    assert len({(entry.steps, entry.rows) for entry in result.history}) == 1  # none misses any
    assert (tmp_path / "1" / "round-2.safetensors.broken").exists()
    assert "of its 4 steps in this run it goes on after step 2" in caplog.text


@pytest.mark.chaos(
    "a client's process loses its state, over a session",
    "from state-dir nothing is lost; without, the ledger says so",
)
@pytest.mark.parametrize("keeps", [True, False], ids=["state-dir", "none"])
def test_over_a_session_too(keeps, tmp_path):
    """Deployed: each node has a folder, which is in use as long as the session lasts."""
    states, used = tmp_path / "states", []
    node = {"state-dir": str(states)} if keeps else {}

    def resumed(rounds, *, resume):
        grid = ThreadedGrid(make_app(), len(SIZES), node_config=node)
        folder = {"checkpoint_dir": str(tmp_path / "server"), "resume": resume}
        settings = SessionSettings(join_timeout=20.0, grace=2.0)
        locks = states.glob("*/*/flsplit.lock")
        look = (
            (lambda _: used.extend(FolderLock(one.parent).take() for one in locks))
            if keeps
            else None
        )
        return train(
            SplitFedV2, rounds=rounds, grid=grid, carrier="session", session=settings,
            meanwhile=look, **folder,
        )  # fmt: skip

    resumed(2, resume=False)
    if keeps:
        assert used == [False, False, False]
        (newest,) = states.glob("*/1/round-2.safetensors")
        cut_short(newest)
    result = resumed(3, resume=True)
    assert result.history[2].restarted == (["1"] if keeps else ["0", "1", "2"])
    assert [len(entry.notes) for entry in result.history] == [0, 0, int(keeps)]


@pytest.mark.chaos(
    "all state files are broken",
    "the client starts anew, the ledger says so",
)
def test_a_client_without_any_state_that_can_be_read_starts_anew(tmp_path):
    def break_all(grid):
        kill(grid)
        for path in (tmp_path / "1").iterdir():
            cut_short(path)

    result = train(SplitFedV2, state_dir=tmp_path, meanwhile=break_all)
    assert restarted(result) == [[], [], ["1"], []]
    assert result.history[2].notes[0].endswith("; no earlier one is left")


@pytest.mark.chaos(
    "a state folder is removed",
    "the client starts anew, the ledger says so",
)
def test_a_client_whose_folder_is_gone_starts_anew(tmp_path):
    def remove(grid):
        kill(grid)
        shutil.rmtree(tmp_path / "1")

    assert restarted(train(SplitFedV2, state_dir=tmp_path, meanwhile=remove)) == [[], [], ["1"], []]


@pytest.mark.chaos(
    "a state file can't be read",
    "its client is left out with the reason",
)
def test_a_state_that_cannot_be_read_leaves_its_client_out_with_the_reason(tmp_path):
    def make_unreadable(grid):
        kill(grid)
        for path in (tmp_path / "1").iterdir():
            path.unlink()
            path.mkdir()  # what opens and can't be read, also for root

    result = train(PSL, state_dir=tmp_path, meanwhile=make_unreadable)
    ((out,), (again,)) = (result.history[index].left_out for index in (2, 3))
    assert (out.client, again.client) == ("1", "1")
    assert out.reason.startswith("StorageError: ")
    assert "round-2.safetensors can't be read: " in out.reason


@pytest.mark.chaos(
    "a client's disk is full",
    "the ledger says so, the numbers are the same",
)
def test_a_full_disk_is_in_the_ledger_and_changes_nothing_else(tmp_path, monkeypatch):
    whole = train(SplitFedV2)
    fsync = os.fsync

    def full(descriptor):
        if f"/{folder_name('1')}/" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    result = train(SplitFedV2, state_dir=tmp_path)

    assert result.history.numbers() == whole.history.numbers()
    for server_round, entry in enumerate(result.history, 1):
        (note,) = entry.notes
        assert note.startswith("client '1': its state is not stored: ")
        assert f"round-{server_round}.safetensors can't be written: [Errno 28] No space" in note
    assert list((tmp_path / "1").iterdir()) == []


@pytest.mark.chaos(
    "the newest checkpoint is broken",
    "the one before it is taken, the ledger says so",
)
def test_a_server_whose_newest_checkpoint_is_broken_goes_on_from_the_one_before(tmp_path):
    folder, states = tmp_path / "server", tmp_path / "states"
    whole = train(SplitFedV2)
    train(SplitFedV2, rounds=3, state_dir=states, checkpoint_dir=str(folder))
    cut_short(folder / "server" / "round-3.safetensors")
    resumed = train(SplitFedV2, state_dir=states, checkpoint_dir=str(folder), resume=True)

    assert resumed.history.numbers() == whole.history.numbers()
    (note,) = resumed.history[2].notes
    assert "round-3.safetensors is broken" in note


@pytest.mark.chaos(
    "the server's disk is full",
    "the run ends with the reason",
)
def test_a_server_that_cannot_write_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(StorageError, match=r"can't be written: \[Errno 28\] No space left"):
        train(PSL, checkpoint_dir=str(tmp_path))


def test_what_a_host_says_of_its_disk_is_bounded_and_must_be_text():
    content = RecordDict()
    assert problem_in(content) == ""
    put_problem(content, "x" * 9999)
    assert problem_in(content) == "x" * 500
    content["storage"]["problem"] = 7
    assert problem_in(content) == ""
