"""Whether a recording is of the same run as another, without its defences."""

import json
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from flsplit.errors import ConfigError
from flsplit.log import logger
from flsplit.privacy.recording import RecordedRun, RecordedStep, read_recording

_Key = tuple[str, int, int]


def check_undefended(folder: str | Path, undefended: str | Path) -> None:
    """Refuse a recording to compare with that is not of the same run, as far as recordings know.

    They know the cut, what clients were told (batch size, steps, rate, seed), who they are, the
    shapes of what crossed and of segments, and labels. Only client parts may be fewer. Neither the
    method's name nor the server's options are in them.

    Raises
    ------
    ConfigError
        If something differs; all of it is named.
    flsplit.storage.StorageError
        If a file can't be read.
    """
    run, other = read_recording(folder), read_recording(undefended)
    if different := list(_differences(run, other)):
        raise ConfigError(
            f"{undefended} is not the run of {folder} without its defences: {'; '.join(different)}"
        )
    if _steps(run).keys() != _steps(other).keys():
        logger.warning(
            "%s and %s have other rounds or steps (%d and %d of clients): means are over all that "
            "each has", folder, undefended, len(run.steps), len(other.steps),
        )  # fmt: skip


def _differences(run: RecordedRun, other: RecordedRun) -> Iterator[str]:
    """Give what differs, first as it is in ``other``."""
    if run.cut != other.cut:
        yield f"cut is {other.cut!r}, here {run.cut!r}"
    for name in run.told:
        if name in other.told and run.told[name] != other.told[name]:
            yield f"{name} is {other.told[name]!r}, here {run.told[name]!r}"
    here = _parts(run)
    if more := [part for part in _parts(other) if part not in here]:
        yield f"client parts are {', '.join(more)}, which are not here"
    if {*run.clients} != {*other.clients}:
        yield f"clients are {sorted(other.clients)}, here {sorted(run.clients)}"
    if bool(run.segments) != bool(other.segments):
        with_them = "here alone" if run.segments else "there alone"
        yield f"segments are handed over {with_them}: another method, or share_client_segments"
    for client in run.segments.keys() & other.segments.keys():
        if _shapes(run.segments[client]) != _shapes(other.segments[client]):
            yield "the model's client segment has other tensors"
            break
    theirs = _steps(other)
    for key, step in _steps(run).items():
        if key in theirs and (what := _step_difference(step, theirs[key])):
            yield f"{what} (client {key[0]!r}, round {key[1]}, step {key[2]})"
            break


def _step_difference(step: RecordedStep, other: RecordedStep) -> str:
    """Return what differs first; parts change what tensors hold, but of labels."""
    for name in ("smashed", "gradient", "labels", "output_gradient"):
        one, two = getattr(step, name), getattr(other, name)
        called = name.replace("_", " ")
        if (one is None) != (two is None):
            return f"the server sees {called} {'here' if two is None else 'there'} alone"
        if one is not None and one.shape != two.shape:
            return f"{called} has shape {[*two.shape]}, here {[*one.shape]}"
    labels, others = step.labels, other.labels
    if labels is not None and others is not None and not labels.equal(others):
        return "labels are others: another seed or other data"
    return ""


def _steps(run: RecordedRun) -> dict[_Key, RecordedStep]:
    return {(one.client, one.round, one.step): one for one in run.steps}


def _parts(run: RecordedRun) -> list[str]:
    found = json.loads(run.client_parts or "[]")
    return [f"{one['name']} {one.get('arguments', {})}" for one in found]


def _shapes(tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: [*one.shape] for name, one in tensors.items()}
