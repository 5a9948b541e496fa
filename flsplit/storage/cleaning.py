"""What runs have left behind on disk, and may go: ``flsplit clean``."""

import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flsplit.storage.folder_lock import LOCK_FILE, FolderLock
from flsplit.storage.record_file import StorageError

_DAY = 86400.0
_IN_USE = "in use"
_TEMPORARY = re.compile("flsplit-([a-z]+-)?[a-z0-9_]{8}")  # as tempfile.mkdtemp names them
_EXPERIMENT = re.compile("[0-9a-f]{32}")
_OURS = re.compile(
    r"round-[0-9]{1,9}\.safetensors(\.broken(-[0-9]+)?)?|run\.json|history\.jsonl"
    r"|\.(round-[0-9]{1,9}\.safetensors|run\.json)\.[0-9]+|" + re.escape(LOCK_FILE)
)


@dataclass(frozen=True)
class Leftover:
    """A folder that a run made."""

    folder: Path
    files: list[Path]  # what may be removed there, the lock last; of a temporary folder, all of it
    age_days: float  # days since the newest of them was written
    is_temporary: bool  # whether nobody but the run that made it has any use for it
    keep: str  # why it stays; empty if it may go

    @property
    def nbytes(self) -> int:
        """What its files take."""
        return sum(_stat(one).st_size for one in self.files)


def find_leftovers(
    folders: Iterable[Path], days: float, *, temporary_in: Iterable[Path] = ()
) -> list[Leftover]:
    """Return what runs have made below some folders and, for their own use, in others.

    A folder that a run uses stays, and all below it. Others may go when nothing was written there
    for ``days`` days; temporary ones that a run had locked may go at once, since it has ended. A
    folder that was never locked is nobody's to judge: it isn't looked at.

    Parameters
    ----------
    folders : iterable of Path
        Checkpoint and state folders, or what is around them.
    days : float
        How old they must be.
    temporary_in : iterable of Path
        Where temporary folders lie.
    """
    found = [one for root in folders for one in _below(root, days)]
    found.sort(key=lambda one: -len(one.folder.parts))  # a folder is empty when what is in it went
    for root in dict.fromkeys(path.resolve() for path in temporary_in):
        for folder in sorted(root.glob("flsplit-*")):
            marked = not folder.is_symlink() and (folder / LOCK_FILE).exists()
            if marked and _TEMPORARY.fullmatch(folder.name):
                found.append(_looked_at(folder, [*_all_files(folder)], 0.0, is_temporary=True))
    return found


def remove(leftover: Leftover) -> None:
    """Remove a folder that may go; nothing that flsplit didn't write, and what is left around it.

    StorageError if it is in use by now, or can't be removed.
    """
    lock = FolderLock(leftover.folder)
    if not lock.take():
        raise StorageError(f"{leftover.folder} is in use")
    try:
        if leftover.is_temporary:
            shutil.rmtree(leftover.folder)
            return
        for file in leftover.files:
            file.unlink(missing_ok=True)
        empty = [Path(here) for here, _, _ in os.walk(leftover.folder, topdown=False)]
        if _EXPERIMENT.fullmatch(leftover.folder.parent.name):
            empty.append(leftover.folder.parent)
        for folder in empty:
            if not os.listdir(folder):
                folder.rmdir()
    except OSError as error:
        raise StorageError(f"{leftover.folder} can't be removed: {error}") from error
    finally:
        lock.release()


def _below(root: Path, days: float) -> Iterator[Leftover]:
    if not root.is_dir():
        raise StorageError(f"{root} is no folder")
    for here, inner, names in os.walk(root):
        if LOCK_FILE not in names:
            continue
        folder = Path(here)
        leftover = _looked_at(folder, [*_own_files(folder)], days, is_temporary=False)
        if leftover.keep == _IN_USE:
            inner.clear()
        yield leftover


def _own_files(folder: Path) -> Iterator[Path]:
    """Return the files that flsplit wrote, but not those below another folder with a lock."""
    for here, inner, names in os.walk(folder):
        inner[:] = [one for one in inner if not (Path(here) / one / LOCK_FILE).exists()]
        yield from (Path(here) / one for one in names if _OURS.fullmatch(one) and one != LOCK_FILE)
    yield folder / LOCK_FILE


def _all_files(folder: Path) -> Iterator[Path]:
    for here, _, names in os.walk(folder):
        yield from (Path(here) / one for one in names)


def _looked_at(folder: Path, files: list[Path], days: float, *, is_temporary: bool) -> Leftover:
    age = (time.time() - max(_stat(one).st_mtime for one in [folder, *files])) / _DAY
    keep = f"written {age:.1f} days ago" if age < days else ""
    try:
        if _in_use(folder):
            keep = _IN_USE
    except StorageError as error:  # somebody else's
        keep = str(error)
    return Leftover(folder, files, age, is_temporary, keep)


def _stat(path: Path) -> os.stat_result:
    """Return what is known of a path; of one that is gone by now, nothing but zeros."""
    try:
        return path.lstat()
    except OSError:
        return os.stat_result([0] * 10)


def _in_use(folder: Path) -> bool:
    lock = FolderLock(folder)
    free = lock.take()
    lock.release()
    return not free
