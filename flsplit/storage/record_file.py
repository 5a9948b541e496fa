"""Flower records in a safetensors file: arrays as tensors, the rest as JSON in its header."""

import json
import os
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flsplit.errors import FlsplitError
from flsplit.message.arrays import to_array, to_tensor


class StorageError(FlsplitError):
    """A file of stored state can't be read."""


def save_records(path: Path, records: RecordDict) -> None:
    """Write records to ``path``, all of them or nothing.

    Arrays are read back as raw arrays, whatever they were. Bytes in a ConfigRecord are refused.
    """
    tensors = {
        f"{name}\n{key}": to_tensor(array, field=key)
        for name, record in records.array_records.items()
        for key, array in record.items()
    }
    header = {
        "arrays": list(records.array_records),
        "configs": {name: dict(record) for name, record in records.config_records.items()},
        "metrics": {name: dict(record) for name, record in records.metric_records.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(tensors, temporary, metadata={"records": json.dumps(header)})
    os.replace(temporary, path)


def load_records(path: Path) -> RecordDict:
    """Return the records in a file of :func:`save_records`.

    Raises
    ------
    StorageError
        If the file can't be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["records"])
            records = RecordDict({name: ArrayRecord() for name in header["arrays"]})
            for full_key in file.keys():  # noqa: SIM118 - not a dict
                name, _, key = full_key.partition("\n")
                records.array_records[name][key] = to_array(file.get_tensor(full_key))
        for name, config in header["configs"].items():
            records[name] = ConfigRecord(config)
        for name, metrics in header["metrics"].items():
            records[name] = MetricRecord(metrics)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{path} can't be read: {type(error).__name__}: {error}") from error
    return records
