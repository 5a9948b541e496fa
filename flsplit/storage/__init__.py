"""State on disk: records in safetensors files, the last rounds of a run in a folder."""

from flsplit.storage.record_file import StorageError, load_records, save_records
from flsplit.storage.round_folder import ClientStore, RoundFolder
from flsplit.storage.state_codec import State, from_records, to_records

__all__ = [
    "ClientStore",
    "RoundFolder",
    "State",
    "StorageError",
    "from_records",
    "load_records",
    "save_records",
    "to_records",
]
