"""Folders that are in use: the operating system's lock, which ends with its process."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from flsplit.errors import ConfigError
from flsplit.storage.record_file import StorageError

LOCK_FILE = "flsplit.lock"
"""It stays when the lock is gone, and tells whose folder this is."""


class FolderLock:
    """A lock on a folder; nobody else can have it until it is let go or the process ends.

    The folder is made if it isn't there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = FileLock(folder / LOCK_FILE, timeout=0, thread_local=False)

    def take(self) -> bool:
        """Take the lock; tell whether it could be had.

        StorageError if nothing can be written to the folder.
        """
        if self._lock.is_locked:
            return True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout:
            return False
        except OSError as error:
            raise StorageError(f"{self.folder} can't be used: {error}") from error
        return True

    def take_or_refuse(self, option: str) -> None:
        """Take the lock, or say that the folder of an option is in use.

        ConfigError if somebody else has it.
        """
        if not self.take():
            raise ConfigError(
                f"{option} {self.folder} is in use by another run; give each run a folder of its "
                "own, or wait until that one has ended"
            )

    def release(self) -> None:
        """Let go of it."""
        self._lock.release()


@contextmanager
def in_use(folder: Path, option: str) -> Iterator[None]:
    """Have the lock on the folder of an option inside the block."""
    lock = FolderLock(folder)
    lock.take_or_refuse(option)
    try:
        yield
    finally:
        lock.release()
