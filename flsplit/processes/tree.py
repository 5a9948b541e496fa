"""Processes that are started with a mark in their environment, found by it, and stopped for sure.

This file is also a program, the guard, which must start at once: it imports nothing of flsplit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

STOP_GRACE = 5.0  # seconds between asking processes to end and ending them
LAST_GRACE = 3.0  # the same when everything ends, which must not take five seconds
POLL = 0.05
PROC = Path("/proc")


@dataclasses.dataclass(frozen=True)
class _Entry:
    pid: int
    parent: int
    session: int
    command: str
    environment: bytes


def _process_table() -> Iterator[_Entry]:
    """Yield the living processes of this user; a zombie is not alive."""
    if (PROC / "self" / "environ").exists():
        for folder in PROC.iterdir():
            if not folder.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                # pid (name, which may hold spaces and brackets) state parent group session …
                fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
                if fields[0] not in "ZX":
                    yield _Entry(
                        pid=int(folder.name),
                        parent=int(fields[1]),
                        session=int(fields[3]),
                        command=(folder / "cmdline")
                        .read_bytes()
                        .replace(b"\0", b" ")
                        .decode(errors="replace"),
                        environment=(folder / "environ").read_bytes(),
                    )
        return
    listing = subprocess.run(
        ["ps", "axeww", "-o", "pid=,ppid=,stat=,command="], capture_output=True, check=True
    )
    for line in listing.stdout.splitlines():
        pid, parent, state, command = (*line.split(None, 3), b"")[:4]
        with contextlib.suppress(OSError):
            if not state.startswith(b"Z"):
                session = os.getsid(int(pid))
                yield _Entry(
                    int(pid), int(parent), session, command.decode(errors="replace"), command
                )


class ProcessTree:
    """The processes that were started with a mark in their environment, and all that came of them.

    Some processes lose the mark (Ray's workers overwrite their environment with a title) or their
    parent; so descendants and members of a marked process's session count as well, and sessions
    once seen are remembered. The session and the process of the caller are never touched.

    The session that must never be touched is by default that of this process.
    """

    def __init__(self, mark: str | None = None, spare_session: int | None = None) -> None:
        self.mark = mark or f"FLSPLIT_PROCESSES_{uuid.uuid4().hex}"
        self.spare_session = os.getsid(0) if spare_session is None else spare_session
        self._sessions: set[int] = set()

    @property
    def env(self) -> dict[str, str]:
        """The variable that a process must be started with to belong to this tree."""
        return {self.mark: "1"}

    def find(self, name: str = "") -> list[int]:
        """Return the ids of the living processes whose command line contains `name`."""
        table = {entry.pid: entry for entry in _process_table()}
        sign = self.mark.encode() + b"="
        found = {pid for pid, entry in table.items() if sign in entry.environment}
        self._sessions |= {table[pid].session for pid in found} - {self.spare_session}
        found |= {pid for pid, entry in table.items() if entry.session in self._sessions}
        while more := {p for p, e in table.items() if e.parent in found and p not in found}:
            found |= more
        return sorted(pid for pid in found - {os.getpid()} if name in table[pid].command)

    def signal(self, number: signal.Signals, name: str = "") -> list[int]:
        """Send a signal to all of them, or to those whose command line contains `name`."""
        pids = self.find(name)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return pids

    def stop(self, grace: float = STOP_GRACE) -> None:
        """Ask all of them to end, and end those that have not after `grace` seconds."""
        asked: set[int] = set()
        killing_from = time.monotonic() + grace
        while pids := self.find():
            killing = time.monotonic() >= killing_from
            for pid in pids if killing else set(pids) - asked:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if killing else signal.SIGTERM)
                    os.kill(pid, signal.SIGCONT)  # one that is paused would never hear of it
            asked |= set(pids)
            time.sleep(POLL)


def _guard(mark: str, session: str, scratch: str) -> None:
    """Wait until standard input ends, then stop the marked processes and remove the scratch folder.

    This runs in a process of its own. Its input ends when the process that started it closes it or
    is gone, however that happened.
    """
    sys.stdin.buffer.read()
    ProcessTree(mark, int(session)).stop(LAST_GRACE)
    shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    _guard(*sys.argv[1:])
