"""A folder with one file per round, of which the last two are kept."""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

from flwr.app import RecordDict

from flsplit.log import logger
from flsplit.storage.record_file import BrokenFileError, StorageError, load_records, save_records

KEEP_ROUNDS = 2
"""A crash may fall between a client's write and the server's: then the round before is needed."""

MAX_ROUND = 10**9
"""A round of more digits is none; it could not even be a file's name."""

BROKEN = ".broken"

_FILE = re.compile(r"round-([0-9]{1,9})\.safetensors")
_LONGEST_NAME = 100


class RoundFolder:
    """Records by round in one folder, which is made when the first are written.

    ``problems`` say which files were broken when they were to be read, and where they are now.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[str] = []

    def rounds(self) -> list[int]:
        """Return the rounds that are stored, the oldest first.

        StorageError if the folder can't be read.
        """
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StorageError(f"{self.folder} can't be read: {error}") from error
        return sorted(int(match[1]) for name in names if (match := _FILE.fullmatch(name)))

    def save(self, server_round: int, records: RecordDict) -> None:
        """Write the records after a round; forget all but the last two rounds.

        StorageError if the file can't be written.
        """
        save_records(self._path(server_round), records)
        for old in [one for one in self.rounds() if one <= server_round][:-KEEP_ROUNDS]:
            self._forget(old)
        self.forget_after(server_round)

    def load(self, at_most: int = MAX_ROUND) -> tuple[int, RecordDict] | None:
        """Return the last round up to ``at_most`` and its records, None if there is none.

        A broken file is set aside, under another name, and the round before is taken.

        StorageError if a file can't be read, though it may well be whole.
        """
        return next(self.stored(at_most), None)

    def stored(self, at_most: int = MAX_ROUND) -> Iterator[tuple[int, RecordDict]]:
        """Return rounds and their records as :meth:`load` does, the last first."""
        for server_round in reversed([one for one in self.rounds() if one <= at_most]):
            path = self._path(server_round)
            try:
                records = load_records(path)
            except BrokenFileError as error:
                self._set_aside(path, error)
            else:
                yield server_round, records

    def forget_after(self, server_round: int) -> None:
        """Remove what was written after a round; a resumed run does those rounds again."""
        for later in (r for r in self.rounds() if r > server_round):
            self._forget(later)

    def _forget(self, server_round: int) -> None:
        with suppress(OSError):  # where nothing can be removed, nothing can be written either
            self._path(server_round).unlink(missing_ok=True)

    def _set_aside(self, path: Path, error: BrokenFileError) -> None:
        """Give a broken file another name: it is not read again, and whoever wants to can look."""
        aside, number = path.with_name(path.name + BROKEN), 1
        while aside.exists():
            number += 1
            aside = path.with_name(f"{path.name}{BROKEN}-{number}")
        with suppress(OSError):  # on a read-only disk it stays
            os.replace(path, aside)
        logger.warning("%s; it is set aside as %s", error, aside.name)
        self.problems.append(str(error))

    def _path(self, server_round: int) -> Path:
        return self.folder / f"round-{server_round}.safetensors"


def folder_name(name: str) -> str:
    """Return what a folder is called for a name that came from elsewhere: for each its own.

    It never leads out of the folder that it lies in.
    """
    raw = name.encode("utf-8", "surrogatepass")
    safe = re.sub(
        "[^A-Za-z0-9_-]",
        lambda match: "".join(f"%{byte:02x}" for byte in match[0].encode("utf-8", "surrogatepass")),
        name,
    )
    if 0 < len(safe) <= _LONGEST_NAME:
        return safe
    # No byte is written as %-, so this is nobody else's.
    return f"{safe[:50]}%-{blake2b(raw, digest_size=16).hexdigest()}"
