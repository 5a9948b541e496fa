"""State on disk: records in safetensors files, the last rounds of a run in a folder."""

from flsplit.storage.folder_lock import LOCK_FILE, FolderLock, in_use
from flsplit.storage.record_file import (
    BrokenFileError,
    StorageError,
    load_records,
    save_records,
    write_atomically,
)
from flsplit.storage.round_folder import MAX_ROUND, RoundFolder, folder_name
from flsplit.storage.state_codec import State, from_records, to_records

__all__ = [
    "LOCK_FILE",
    "MAX_ROUND",
    "BrokenFileError",
    "FolderLock",
    "RoundFolder",
    "State",
    "StorageError",
    "folder_name",
    "from_records",
    "in_use",
    "load_records",
    "save_records",
    "to_records",
    "write_atomically",
]
