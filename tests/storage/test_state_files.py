"""Files of states: there as a whole or not at all, known when broken, never elsewhere."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flsplit.carry.cohort import Cohort
from flsplit.carry.session.host import HostedClients
from flsplit.carry.session.invitation import Invitation
from flsplit.flower_internals import ensure_task_identity, set_message_id
from flsplit.message.arrays import to_array, to_tensor
from flsplit.storage import (
    LOCK_FILE,
    BrokenFileError,
    FolderLock,
    RoundFolder,
    StorageError,
    folder_name,
    load_records,
    save_records,
)

NAMES = st.text() | st.sampled_from(["", ".", "..", "../../x", "/etc", "a" * 300, "\ud800", "C:"])


def make_records(number=1):
    arrays = ArrayRecord()
    arrays["w"] = to_array(torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16))
    arrays["n"] = to_array(torch.tensor(number))
    return RecordDict({"state": arrays, "progress": ConfigRecord({"round": number})})


def number_in(records):
    number = int(to_tensor(records.array_records["state"]["n"], field="n"))
    assert records.config_records["progress"]["round"] == number
    return number


def fill_the_disk(monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)


@pytest.mark.chaos(
    "a file is cut short anywhere",
    "it is noticed",
)
def test_a_file_that_is_cut_short_is_broken_wherever_it_ends(tmp_path):
    path = tmp_path / "r"
    save_records(path, make_records())
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(BrokenFileError, match=f"{path} is broken"):
            load_records(path)


@pytest.mark.chaos(
    "a bit of a file is flipped",
    "it is noticed",
)
def test_a_changed_bit_is_noticed(tmp_path):
    path = tmp_path / "r"
    save_records(path, make_records())
    whole = path.read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(BrokenFileError):
            load_records(path)


def test_a_file_that_is_not_there_is_not_called_broken(tmp_path):
    with pytest.raises(StorageError, match="can't be read: No such file") as caught:
        load_records(tmp_path / "nothing")
    assert not isinstance(caught.value, BrokenFileError)


def test_a_full_disk_leaves_what_was_there_and_is_the_reason(tmp_path, monkeypatch):
    save_records(tmp_path / "r", make_records(1))
    fill_the_disk(monkeypatch)
    with pytest.raises(StorageError, match=r"r can't be written: \[Errno 28\] No space left"):
        save_records(tmp_path / "r", make_records(2))
    assert number_in(load_records(tmp_path / "r")) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_files_and_their_folder_are_on_the_disk_before_the_next_step(tmp_path, monkeypatch):
    synced, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda d: synced.append(os.readlink(f"/proc/self/fd/{d}")))
    monkeypatch.setattr(os, "replace", lambda *a: synced.append("replace") or replace(*a))
    save_records(tmp_path / "r", make_records())
    assert synced == [str(tmp_path / f".r.{os.getpid()}"), "replace", str(tmp_path)]


def test_a_broken_round_is_set_aside_and_the_one_before_it_taken(tmp_path):
    for server_round in (3, 4):
        RoundFolder(tmp_path).save(server_round, make_records(server_round))
    last = tmp_path / "round-4.safetensors"
    last.write_bytes(last.read_bytes()[:-1])

    folder = RoundFolder(tmp_path)
    server_round, records = folder.load()

    assert (server_round, number_in(records)) == (3, 3)
    assert "round-4.safetensors is broken" in folder.problems[0]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["round-3.safetensors", "round-4.safetensors.broken"]
    # Another one, and nothing is left; what was set aside is still there.
    last.write_bytes(b"x")
    (tmp_path / "round-3.safetensors").write_bytes(b"")
    assert folder.load() is None
    assert len(list(tmp_path.glob("*.broken*"))) == 3


def test_rounds_of_another_time_are_no_later_rounds(tmp_path):
    """A run that began again lost its first rounds to those of the run before it."""
    folder = RoundFolder(tmp_path)
    for server_round in (8, 9, 1):
        folder.save(server_round, make_records(server_round))
    assert folder.rounds() == [1]
    folder.save(2, make_records(2))
    assert [number_in(records) for _, records in folder.stored()] == [2, 1]
    assert folder.load(at_most=1)[0] == 1


@settings(max_examples=50)
@given(NAMES, NAMES)
def test_every_name_has_a_folder_of_its_own(one, other):
    assert (folder_name(one) == folder_name(other)) == (one == other)


@pytest.mark.chaos(
    "any name of an experiment or client",
    "no path leaves the state folder",
)
@settings(max_examples=100)
@given(experiment=NAMES, client=NAMES)
def test_no_name_leads_out_of_the_state_folder(experiment, client):
    root = Path("/var/lib/flsplit")
    node = {"state-dir": str(root), "client-name": client}
    context = Context(1, 7, node, RecordDict(), {})
    invitation = Invitation("s", experiment, "a:1", "t", b"", 0.0, 1, "/elsewhere")
    store = HostedClients(ClientApp(), context, invitation).cohort._store
    folder = store / folder_name(client)
    assert Path(os.path.normpath(folder)) == folder
    assert folder.parent.parent == root
    assert all(0 < len(os.fsencode(part)) < 200 for part in folder.parts)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(group=st.text() | st.from_regex(r"[0-9]{1,12}", fullmatch=True), client=NAMES)
def test_no_round_leads_out_of_it_either(group, client, tmp_path):
    app = ClientApp()

    @app.train("finish")
    def finish(message, context):
        return Message(RecordDict(), reply_to=message)

    ensure_task_identity(run_id=1)
    message = Message(RecordDict(), 7, "train.finish", group_id=group)
    set_message_id(message, "1")
    context = Context(1, 7, {"client-name": client}, RecordDict(), {})
    cohort = Cohort(app, store=tmp_path / "states", cache=False)

    assert not cohort.answer(message, context).has_error()

    assert {path.name for path in tmp_path.iterdir()} <= {"states"}
    for path in (tmp_path / "states").glob("**/*"):
        where = path.relative_to(tmp_path / "states").parts
        assert len(where) == 1 or re.fullmatch(r"round-[0-9]{1,9}\.safetensors", where[1])


@pytest.mark.chaos(
    "a process that uses a folder is killed",
    "the folder is free",
)
def test_a_process_that_is_killed_leaves_no_lock(tmp_path):
    path = str(tmp_path / LOCK_FILE)
    program = f"import filelock; lock = filelock.FileLock({path!r}); lock.acquire(); print()"
    command = [sys.executable, "-u", "-c", f"{program}; input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert not FolderLock(tmp_path).take()
        process.kill()
    assert FolderLock(tmp_path).take()


def test_folders_of_plain_names_are_called_like_them():
    assert folder_name("hospital-a_7") == "hospital-a_7"
