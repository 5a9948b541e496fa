"""Checkpoints of a run on the server: one atomic file per round, no pickle."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.serverapp.strategy import Strategy

from flsplit.account import History, RoundEntry
from flsplit.errors import ConfigError
from flsplit.message.arrays import from_record, to_array
from flsplit.message.optimizer_state import (
    OptimizerState,
    get_state,
    set_state,
    state_from_records,
    state_to_records,
)
from flsplit.message.request import SegmentArrays
from flsplit.server.segment import ServerSegment
from flsplit.storage import RoundFolder

if TYPE_CHECKING:
    from flsplit.strategies.base import SplitStrategy

_RUN, _CLIENT_SEGMENT, _RULES = "run", "client-segment", "rules"


class Checkpoints:
    """The checkpoints of one experiment, the last two rounds kept.

    Parameters
    ----------
    folder : Path
        ``checkpoint_dir`` of the options.
    """

    def __init__(self, folder: Path) -> None:
        self._rounds = RoundFolder(folder / "server")

    def save(
        self, strategy: "SplitStrategy", holds: Mapping[str, int], history: History, experiment: str
    ) -> None:
        """Write down where the run is, after the last round of ``history``."""
        records = strategy.state_records()
        records[_RUN] = ConfigRecord(
            {
                "experiment": experiment,
                "identity": json.dumps(strategy.identity()),
                "segment-version": strategy.client_segment.version,
                "holds": json.dumps(dict(holds)),
                "history": json.dumps([entry.to_json() for entry in history]),
            }
        )
        self._rounds.save(history[-1].round, records)

    def load(self, strategy: "SplitStrategy") -> tuple[dict[str, int], History, str]:
        """Set the strategy back to the last checkpoint.

        Returns
        -------
        tuple
            Which segment each client holds, the history so far, the experiment's name.

        Raises
        ------
        ConfigError
            If there is no checkpoint, or one of another run than this.
        StorageError
            If it can't be read.
        """
        found = self._rounds.load()
        if found is None:
            raise ConfigError(f"resume: there is no checkpoint in {self._rounds.folder}")
        records = found[1]
        run: Mapping[str, Any] = records.config_records[_RUN]
        self._check_identity(json.loads(run["identity"]), strategy.identity())
        strategy.load_state_records(records, int(run["segment-version"]))
        history = History(RoundEntry.from_json(entry) for entry in json.loads(run["history"]))
        return json.loads(run["holds"]), history, str(run["experiment"])

    def _check_identity(self, stored: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        for name, value in own.items():
            if stored.get(name) != value:
                raise ConfigError(
                    f"resume: the checkpoint in {self._rounds.folder} is of a run with {name} "
                    f"{stored.get(name)!r}, this one has {value!r}"
                )


def put_client_segment(records: RecordDict, segment: SegmentArrays) -> None:
    """Write the server's version of the client segment."""
    arrays = {name: to_array(tensor) for name, tensor in segment.tensors.items()}
    records[_CLIENT_SEGMENT] = ArrayRecord(arrays)


def get_client_segment(records: RecordDict, version: int) -> SegmentArrays:
    """Return the client segment in ``records``."""
    arrays = records.array_records[_CLIENT_SEGMENT]
    return SegmentArrays(version, from_record(arrays, field=_CLIENT_SEGMENT))


def put_server_segment(records: RecordDict, name: str, segment: ServerSegment) -> None:
    """Write a server segment with optimizer and scheduler under ``name``."""
    records[name] = ArrayRecord({k: to_array(v) for k, v in segment.arrays().items()})
    put_optimizer_state(records, f"{name}.optimizer", get_state(segment.optimizer))
    scheduler = segment.scheduler.state_dict() if segment.scheduler else {}
    records[f"{name}.scheduler"] = ConfigRecord({"state": json.dumps(scheduler)})


def get_server_segment(records: RecordDict, name: str, segment: ServerSegment) -> None:
    """Set a server segment to what is in ``records`` under ``name``."""
    segment.load_arrays(from_record(records.array_records[name], field=name))
    set_state(segment.optimizer, get_optimizer_state(records, f"{name}.optimizer"))
    scheduler = json.loads(str(records.config_records[f"{name}.scheduler"]["state"]))
    if segment.scheduler and scheduler:
        segment.scheduler.load_state_dict(scheduler)
        for group, lr in zip(
            segment.optimizer.param_groups, segment.scheduler.get_last_lr(), strict=True
        ):
            group["lr"] = lr


def put_optimizer_state(records: RecordDict, name: str, state: OptimizerState) -> None:
    """Write an optimizer's state under ``name``."""
    records[name], records[f"{name}-numbers"] = state_to_records(state)


def get_optimizer_state(records: RecordDict, name: str) -> OptimizerState:
    """Return the optimizer's state under ``name``."""
    return state_from_records(
        records.array_records[name], records.config_records[f"{name}-numbers"]
    )


def put_flower_strategy(records: RecordDict, name: str, strategy: Strategy) -> None:
    """Write the arrays that a Flower strategy remembers from round to round.

    FedAdam, FedAvgM and their like keep them as dicts of NumPy arrays in attributes; Flower has
    no interface for saving them.
    """
    for attribute, value in vars(strategy).items():
        if (
            isinstance(value, dict)
            and value
            and all(isinstance(v, np.ndarray) for v in value.values())
        ):
            arrays = {key: Array(np.asarray(array)) for key, array in value.items()}
            records[f"{name}.{attribute}"] = ArrayRecord(arrays)


def get_flower_strategy(records: RecordDict, name: str, strategy: Strategy) -> None:
    """Give a Flower strategy back what :func:`put_flower_strategy` wrote."""
    for key, arrays in records.array_records.items():
        if key.startswith(f"{name}."):
            tensors = from_record(arrays, field=key)
            value = {one: tensor.numpy() for one, tensor in tensors.items()}
            setattr(strategy, key.removeprefix(f"{name}."), value)


def put_rules(records: RecordDict, states: list[dict[str, Any]]) -> None:
    """Write what gradient rules remember; it must be made of what JSON can hold."""
    records[_RULES] = ConfigRecord({"states": json.dumps(states)})


def get_rules(records: RecordDict) -> list[dict[str, Any]]:
    """Return what gradient rules remembered."""
    states: list[dict[str, Any]] = json.loads(str(records.config_records[_RULES]["states"]))
    return states
