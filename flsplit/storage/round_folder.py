"""A folder with one file per round, of which the last two are kept."""

import re
from pathlib import Path

from flwr.app import RecordDict

from flsplit.storage.record_file import load_records, save_records

KEEP_ROUNDS = 2
"""A crash may fall between a client's write and the server's: then the round before is needed."""

_FILE = re.compile(r"round-(\d+)\.safetensors")


class RoundFolder:
    """Records by round in one folder, which is made when the first are written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def rounds(self) -> list[int]:
        """Return the rounds that are stored, the oldest first."""
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted(int(match[1]) for name in names if (match := _FILE.fullmatch(name)))

    def save(self, server_round: int, records: RecordDict) -> None:
        """Write the records after a round; forget all but the last two rounds."""
        save_records(self._path(server_round), records)
        for old in self.rounds()[:-KEEP_ROUNDS]:
            self._path(old).unlink(missing_ok=True)

    def load(self) -> tuple[int, RecordDict] | None:
        """Return the last round and its records, None if there is none.

        Raises
        ------
        StorageError
            If the file can't be read.
        """
        rounds = self.rounds()
        return (rounds[-1], load_records(self._path(rounds[-1]))) if rounds else None

    def forget_after(self, server_round: int) -> None:
        """Remove what was written after a round; a resumed run does those rounds again."""
        for later in (r for r in self.rounds() if r > server_round):
            self._path(later).unlink(missing_ok=True)

    def _path(self, server_round: int) -> Path:
        return self.folder / f"round-{server_round}.safetensors"


class ClientStore:
    """The states of one experiment's clients, a folder for each.

    Carriers whose clients live in a process's memory write it at the end of each round;
    Flower's own carrier has ``Context.state`` instead.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of(self, client: str) -> RoundFolder:
        """Return the folder of a client, whatever its name is made of."""
        safe = re.sub(r"[^A-Za-z0-9_-]", lambda match: f"%{ord(match[0]):x}", client)
        return RoundFolder(self.folder / safe)
