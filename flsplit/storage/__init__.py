"""State on disk: records in safetensors files, the last rounds of a run in a folder."""

from flsplit.storage.record_file import StorageError, load_records, save_records
from flsplit.storage.round_folder import ClientStore, RoundFolder

__all__ = ["ClientStore", "RoundFolder", "StorageError", "load_records", "save_records"]
