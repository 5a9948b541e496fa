"""Disks that fill up, or can only be read, while a run writes to them: real ones, in main memory.

A program for a mount namespace of its own: ``unshare --user --map-root-user --mount python
disks.py folder``. It prints what happened as JSON.
"""

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from carry.test_lost_states import arrays_of, train

from flsplit.storage import StorageError
from flsplit.strategies import SplitFedV2


def _mount(disk, *options):
    subprocess.run(["mount", *options, "none", disk], check=True)


def _fill(disk):
    with suppress(OSError), (disk / "rest").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


# What happens after the second round, and what an operator does about it.
FAULTS = {
    "full": (_fill, lambda disk: (disk / "rest").unlink()),
    "read-only": (
        lambda disk: _mount(disk, "-o", "remount,ro"),
        lambda disk: _mount(disk, "-o", "remount,rw"),
    ),
}


def _result(result, whole):
    return {
        "equal": result.history.numbers() == whole.history.numbers()
        and arrays_of(result) == arrays_of(whole),
        "notes": [entry.notes for entry in result.history],
    }


def _disturb(folder, fault, mend, whole):
    client, server = folder / "states" / "1", folder / "checkpoints" / "server"
    for disk in (client, server):
        disk.mkdir(parents=True)
        _mount(disk, "-t", "tmpfs", "-o", "size=1m")
    found = {}
    result = train(SplitFedV2, state_dir=client.parent, meanwhile=lambda _: fault(client))
    found["client"] = _result(result, whole)
    options = {"checkpoint_dir": str(server.parent), "state_dir": folder / "others"}
    try:
        train(SplitFedV2, meanwhile=lambda _: fault(server), **options)
    except StorageError as error:
        found["error"] = str(error)
    mend(server)
    found["resumed"] = _result(train(SplitFedV2, resume=True, **options), whole)
    return found


if __name__ == "__main__":
    undisturbed = train(SplitFedV2)
    happened = {
        name: _disturb(Path(sys.argv[1]) / name, *both, undisturbed)
        for name, both in FAULTS.items()
    }
    print(json.dumps(happened))
