"""A run's history on disk while it goes on: a line is added per round, none is written again."""

import json
import os
from hashlib import blake2b
from pathlib import Path

from flsplit.account import History, RoundEntry
from flsplit.storage import BrokenFileError, State, StorageError


class HistoryFile:
    """The lines of a run's rounds, which a checkpoint only needs to count.

    What is in the file is of no account until :meth:`read`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size, self._digest = 0, blake2b(digest_size=16)

    def add(self, entry: RoundEntry) -> State:
        """Write a round's line, and return what :meth:`read` needs to find the file's end again.

        StorageError if the file can't be written.
        """
        line = (json.dumps(entry.to_json(), allow_nan=False) + "\n").encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.truncate(self._size)  # what an interrupted run has left
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(f"{self.path} can't be written: {error}") from error
        self._size += len(line)
        self._digest.update(line)
        return self._end()

    def read(self, end: State) -> History:
        """Return the history up to where :meth:`add` said that it ends, and go on from there.

        BrokenFileError if it isn't what was written. StorageError if the file can't be read.
        """
        try:
            with open(self.path, "rb") as file:
                raw = file.read(end["bytes"])
        except OSError as error:
            raise StorageError(f"{self.path} can't be read: {error}") from error
        self._size, self._digest = len(raw), blake2b(raw, digest_size=16)
        if self._end() != end:
            raise BrokenFileError(f"{self.path} is broken: its first {end['bytes']} bytes differ")
        return History(RoundEntry.from_json(json.loads(line)) for line in raw.splitlines())

    def _end(self) -> State:
        return {"bytes": self._size, "checksum": self._digest.hexdigest()}
