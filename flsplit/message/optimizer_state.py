"""A torch optimizer's state as Flower records: what must travel, be stored or be resumed.

What travels is the state per parameter (momentum, Adam's moments, step counts) and what a step
has changed in a group. Hyper-parameters are set on either side: the learning rate every round,
the rest by the optimizer's factory.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord

from flsplit.errors import ConfigError, ProtocolError
from flsplit.message.arrays import to_array, to_tensor
from flsplit.message.fields import Records, Slot, Written, record
from flsplit.optimizers import UserOptimizer

IndexedState = dict[int, dict[str, Any]]
"""Tensors and plain values by name, for each index: of a parameter, or of a client part."""

OptimizerState = IndexedState
"""What :meth:`flsplit.optimizers.UserOptimizer.state` returns."""


_MAX_DIGITS = 10  # of a parameter's index


def get_state(optimizer: UserOptimizer | None) -> OptimizerState:
    """Return the state of ``optimizer``; a segment without parameters has none."""
    return optimizer.state() if optimizer else {}


def set_state(optimizer: UserOptimizer | None, state: OptimizerState) -> None:
    """Give ``optimizer`` the state; its hyper-parameters stay as they are."""
    if optimizer:
        optimizer.load(state)


def indexed(key: str) -> Slot:
    """Return how such a state travels, and is kept: in the records ``key`` and ``key-numbers``."""
    numbers = f"{key}-numbers"

    def put(records: Written, state: IndexedState) -> None:
        records[key], records[numbers] = state_to_records(state)

    def get(records: Records) -> IndexedState:
        arrays = record(records, key, ArrayRecord)
        return state_from_records(arrays, record(records, numbers, ConfigRecord))

    return Slot(key, put, get)


def state_to_records(state: IndexedState) -> tuple[ArrayRecord, ConfigRecord]:
    """Return the tensors and the plain values of a state, under keys ``"<index>/<name>"``.

    None, dicts and lists are written as a list of one string: JSON, with the numbers of the
    tensors in them, which are the arrays ``"<index>/<name>/<number>"``.
    """
    arrays, numbers = ArrayRecord(), ConfigRecord()
    for index, values in state.items():
        for name, value in values.items():
            key = f"{index}/{name}"
            if isinstance(value, torch.Tensor):
                arrays[key] = to_array(value)
            elif isinstance(value, (bool, int, float, str)):
                numbers[key] = value
            else:
                tensors: list[torch.Tensor] = []
                numbers[key] = [json.dumps(_to_json(value, tensors, key))]
                for number, tensor in enumerate(tensors):
                    arrays[f"{key}/{number}"] = to_array(tensor)
    return arrays, numbers


def _to_json(value: Any, tensors: list[torch.Tensor], key: str) -> Any:
    """Return JSON, in which a list begins with what it stands for."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return ["tensor", len(tensors) - 1]
    if isinstance(value, Mapping):
        return ["dict", *([name, _to_json(part, tensors, key)] for name, part in value.items())]
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return [kind, *(_to_json(part, tensors, key) for part in value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ConfigError(
        f"optimizer state {key!r} holds a {type(value).__name__}, expected tensors, numbers, "
        "strings, and dicts and lists of them"
    )


def _from_json(tree: Any, arrays: ArrayRecord, key: str) -> Any:
    if not isinstance(tree, list):
        return tree
    kind, *parts = tree
    if kind == "tensor":
        (number,) = parts
        name = f"{key}/{number}"
        return to_tensor(arrays[name], field=f"optimizer[{name!r}]")
    if kind == "dict":
        return {name: _from_json(part, arrays, key) for name, part in parts}
    built = [_from_json(part, arrays, key) for part in parts]
    return {"list": list, "tuple": tuple}[kind](built)


def state_from_records(arrays: ArrayRecord, numbers: ConfigRecord) -> IndexedState:
    """Return the state in records of :func:`state_to_records`.

    ProtocolError if a key is not ``"<index>/<name>"`` or an array can't be read.
    """
    state: IndexedState = {}
    nested = tuple(f"{key}/" for key, value in numbers.items() if isinstance(value, list))
    for key in (*arrays, *numbers):
        index, slash, name = key.partition("/")
        if not (slash and index.isdecimal() and len(index) < _MAX_DIGITS):
            raise ProtocolError(f"optimizer state: key is {key!r}, expected '<index>/<name>'")
        if key in arrays:
            if nested and key.startswith(nested):
                continue  # a tensor in a nesting
            value: Any = to_tensor(arrays[key], field=f"optimizer[{key!r}]")
        else:
            value = numbers[key]
        if isinstance(value, list):
            try:
                (text,) = value
                value = _from_json(json.loads(text), arrays, key)
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise ProtocolError(
                    f"optimizer state {key!r} can't be read: {type(error).__name__}: {error}"
                ) from error
        state.setdefault(int(index), {})[name] = value
    return state
