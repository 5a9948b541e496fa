"""The one language of state: nested dicts, lists and tuples of tensors, numbers and strings.

Strategies, server segments and optimizers say what they remember in it. Tensors go into a
safetensors file, all else as JSON beside them; nothing is pickled.
"""

import json
from collections.abc import Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from flsplit.errors import ConfigError
from flsplit.message.arrays import to_array, to_tensor
from flsplit.storage.record_file import BrokenFileError

State = dict[str, Any]
"""Keys are strings or whole numbers; values tensors, numbers, strings, None, dicts, lists
and tuples, of which a named one is read back as a plain one."""

_TENSORS, _TREE = "tensors", "tree"


def to_records(state: Mapping[str, Any]) -> RecordDict:
    """Return a state as records.

    ConfigError if something in it can't be stored; its place in the state is named.
    """
    arrays = ArrayRecord()
    tree = _encode(state, "", arrays)
    return RecordDict({_TENSORS: arrays, _TREE: ConfigRecord({"json": json.dumps(tree)})})


def from_records(records: RecordDict) -> State:
    """Return the state in records of :func:`to_records`.

    BrokenFileError if they hold something that it doesn't write.
    """
    arrays = records.array_records[_TENSORS]
    tree = json.loads(str(records.config_records[_TREE]["json"]))
    state: State = _decode(tree, arrays)
    return state


def _encode(value: Any, path: str, arrays: ArrayRecord) -> Any:
    """Return JSON: a list with a tag where it stands for what JSON has not."""
    if isinstance(value, Tensor):
        arrays[path] = to_array(value)
        return ["tensor", path]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, (str, int)) or isinstance(key, bool):
                raise ConfigError(f"state{path}: key {key!r} can't be stored, expected a string")
        return ["dict", [[k, _encode(v, f"{path}/{k}", arrays)] for k, v in value.items()]]
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return [kind, [_encode(v, f"{path}/{i}", arrays) for i, v in enumerate(value)]]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ConfigError(
        f"state{path} is {type(value).__name__}, which can't be stored; expected tensors, numbers, "
        "strings, and dicts, lists and tuples of them"
    )


def _decode(tree: Any, arrays: ArrayRecord) -> Any:
    if not isinstance(tree, list):
        return tree
    kind, content = tree
    if kind == "tensor":
        return to_tensor(arrays[content], field=content)
    if kind == "dict":
        return {key: _decode(value, arrays) for key, value in content}
    if kind == "tuple":
        return tuple(_decode(value, arrays) for value in content)
    if kind == "list":
        return [_decode(value, arrays) for value in content]
    raise BrokenFileError(f"a state has {kind!r}, expected 'tensor', 'dict', 'list' or 'tuple'")
