"""Disks that fill up, or can only be read, under a client's state and under checkpoints."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
REASONS = {"full": "No space left on device", "read-only": "Read-only file system"}


@pytest.fixture(scope="module")
def happened(tmp_path_factory):
    """Return what came of the runs in ``disks.py``."""
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*namespace, "true"], check=False).returncode:
        pytest.skip("a disk of one's own needs Linux and user namespaces")
    folder = tmp_path_factory.mktemp("disks")
    done = subprocess.run(
        [*namespace, sys.executable, TESTS / "chaos" / "disks.py", folder],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.chaos(
    "the disk under a client's state fills up, or can only be read",
    "the ledger says so; the same numbers and weights, bit for bit",
)
@pytest.mark.parametrize("fault", REASONS)
def test_a_client_without_a_disk_goes_on_and_says_so(happened, fault):
    found = happened[fault]["client"]
    assert found["equal"]
    assert found["notes"][:2] == [[], []]
    for (note,) in found["notes"][2:]:
        assert note.startswith("client '1': its state is not stored: ")
        assert REASONS[fault] in note


@pytest.mark.chaos(
    "the disk under the checkpoints fills up, or can only be read",
    "the run ends with the reason; resumed, it ends as if nothing had happened",
)
@pytest.mark.parametrize("fault", REASONS)
def test_a_server_without_a_disk_ends_and_can_be_resumed(happened, fault):
    assert REASONS[fault] in happened[fault]["error"]
    assert happened[fault]["resumed"] == {"equal": True, "notes": [[], [], [], []]}
