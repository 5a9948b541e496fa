"""``flsplit clean``: what ended runs have left, and nothing else."""

import os
import tempfile
import time

import pytest
from reference import make_parts, plain_net, run_split
from typer.testing import CliRunner

from flsplit.cli import app
from flsplit.storage import FolderLock
from flsplit.strategies import PSL


def age(folder, days):
    then = time.time() - days * 86400
    for here, inner, names in os.walk(folder):
        for name in [*inner, *names, "."]:
            os.utime(os.path.join(here, name), (then, then))


@pytest.fixture
def clean(tmp_path, monkeypatch):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(temporary))

    def call(*arguments):
        result = CliRunner().invoke(app, ["clean", *map(str, arguments)])
        assert result.exit_code == 0, result.output
        return [line for line in result.stdout.splitlines() if str(tmp_path) in line]

    return call


@pytest.fixture
def used(tmp_path):
    folder = tmp_path / "checkpoints" / "run"
    run_split(PSL, plain_net, make_parts((4, 4)), rounds=1, checkpoint_dir=str(folder))
    (folder / "notes.txt").write_text("mine")
    (folder / "server" / "more").mkdir()
    return folder


def test_an_old_run_is_shown_and_removed_only_when_told_to(clean, used):
    age(used, 31)
    (line,) = clean(used.parent)
    assert line.startswith(f"may go: {used} (0.0 MB, 31.0 days old)")
    assert (used / "run.json").exists()
    (line,) = clean("--yes", used.parent)
    assert line.startswith(f"removed: {used}")
    assert [path.name for path in used.iterdir()] == ["notes.txt"]  # is not flsplit's


def test_a_recent_run_stays_unless_it_is_asked_for(clean, used):
    assert clean("--yes", used.parent) == [f"stays: {used} (written 0.0 days ago)"]
    assert clean("--yes", "--days", 0, used)[0].startswith("removed")


def test_a_run_in_use_stays_and_all_below_it(clean, used):
    (used / "earlier" / "x").mkdir(parents=True)
    (used / "earlier" / "x" / "flsplit.lock").touch()
    age(used, 99)
    lock = FolderLock(used)
    assert lock.take()
    assert clean("--yes", "--days", 0, used) == [f"stays: {used} (in use)"]
    assert (used / "run.json").exists()
    lock.release()
    assert len(clean("--yes", "--days", 0, used)) == 2


def test_states_of_a_node_go_with_the_folders_that_were_made_for_them(clean, tmp_path):
    client = tmp_path / "state" / ("0" * 32) / "7"
    FolderLock(client).take()
    (client / "round-3.safetensors").touch()
    (client / "round-3.safetensors.broken-2").touch()
    age(tmp_path / "state", 40)
    clean("--yes", tmp_path / "state")
    assert list((tmp_path / "state").iterdir()) == []


def test_temporary_folders_of_runs_that_ended_go_at_once(clean, tmp_path):
    ended, running, unmarked, other = (
        tmp_path / "tmp" / name
        for name in ("flsplit-abcdefgh", "flsplit-ray-12345678", "flsplit-_______1", "flsplit-x")
    )
    for folder in (ended, running, unmarked, other):
        (folder / "inside").mkdir(parents=True)
    FolderLock(ended).take()
    FolderLock(other).take()  # not a name that a run gives
    lock = FolderLock(running)
    assert lock.take()

    lines = clean("--yes")

    assert [line.partition(" (")[0] for line in lines] == [
        f"removed: {ended}", f"stays: {running}"
    ]  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "tmp").iterdir()) == sorted(
        [unmarked.name, running.name, other.name]
    )
