"""Flower records in a safetensors file: arrays as tensors, the rest as JSON in its header.

A file is there as a whole or not at all, also after a power cut, and says if it was changed since.
"""

import errno
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flsplit.errors import FlsplitError
from flsplit.message.arrays import to_array, to_tensor


class StorageError(FlsplitError):
    """A file of stored state can't be read or written."""


class BrokenFileError(StorageError):
    """A file is not what was written: cut short, or changed."""


def save_records(path: Path, records: RecordDict) -> None:
    """Write records to ``path``, all of them or nothing.

    Arrays are read back as raw arrays, whatever they were. Bytes in a ConfigRecord are refused.

    StorageError if the file can't be written; what was there before is still there.
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
    text = json.dumps(header)
    metadata = {"records": text, "checksum": _checksum(text, tensors)}
    write_atomically(path, lambda new: save_file(tensors, new, metadata=metadata))


def load_records(path: Path) -> RecordDict:
    """Return the records in a file of :func:`save_records`.

    BrokenFileError if it isn't what was written. StorageError if the file can't be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
        text = metadata["records"]
        _compare(metadata["checksum"], _checksum(text, tensors))
        header = json.loads(text)
        records = RecordDict({name: ArrayRecord() for name in header["arrays"]})
        for full_key, tensor in tensors.items():
            name, _, key = full_key.partition("\n")
            records.array_records[name][key] = to_array(tensor)
        for name, config in header["configs"].items():
            records[name] = ConfigRecord(config)
        for name, metrics in header["metrics"].items():
            records[name] = MetricRecord(metrics)
    except OSError as error:
        raise StorageError(f"{path} can't be read: {error}") from error
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise BrokenFileError(f"{path} is broken: {type(error).__name__}: {error}") from error
    return records


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` write a new file, and put it in the place of ``path`` when it is on the disk.

    StorageError if that fails; what was there before is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StorageError(f"{path} can't be written: {error}") from error


def sync(path: Path) -> None:
    """Wait until a file, or what a folder says of its files, is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # there it can't be opened
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno == errno.EINVAL):  # some disks know no such thing
            raise
    finally:
        os.close(descriptor)


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return what tells a file's contents from any others."""
    digest = blake2b(text.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _compare(stored: str, found: str) -> None:
    if stored != found:
        raise ValueError(f"its checksum is {found}, expected {stored}")
