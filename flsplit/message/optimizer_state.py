"""A torch optimizer's state as Flower records: what must travel, be stored or be resumed.

What travels is the state per parameter (momentum, Adam's moments, step counts) and what a step
has changed in a group. Hyper-parameters are set on either side: the learning rate every round,
the rest by the optimizer's factory.
"""

from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord

from flsplit.errors import ProtocolError
from flsplit.message.arrays import to_array, to_tensor
from flsplit.message.fields import Record, Records, Slot, record
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

    def put(records: dict[str, Record], state: IndexedState) -> None:
        records[key], records[numbers] = state_to_records(state)

    def get(records: Records) -> IndexedState:
        arrays = record(records, key, ArrayRecord)
        return state_from_records(arrays, record(records, numbers, ConfigRecord))

    return Slot(key, put, get)


def state_to_records(state: IndexedState) -> tuple[ArrayRecord, ConfigRecord]:
    """Return the tensors and the plain numbers of a state, under keys ``"<index>/<name>"``."""
    arrays, numbers = ArrayRecord(), ConfigRecord()
    for index, values in state.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                arrays[f"{index}/{name}"] = to_array(value)
            elif value is not None:
                numbers[f"{index}/{name}"] = value
    return arrays, numbers


def state_from_records(arrays: ArrayRecord, numbers: ConfigRecord) -> IndexedState:
    """Return the state in records of :func:`state_to_records`.

    Raises
    ------
    ProtocolError
        If a key is not ``"<index>/<name>"`` or an array can't be read.
    """
    state: IndexedState = {}
    for key in (*arrays, *numbers):
        index, slash, name = key.partition("/")
        if not (slash and index.isdecimal() and len(index) < _MAX_DIGITS):
            raise ProtocolError(f"optimizer state: key is {key!r}, expected '<index>/<name>'")
        value = (
            to_tensor(arrays[key], field=f"optimizer[{key!r}]") if key in arrays else numbers[key]
        )
        state.setdefault(int(index), {})[name] = value
    return state
