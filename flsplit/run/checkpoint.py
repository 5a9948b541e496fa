"""Checkpoints of a run on the server: a file per round in a folder that says whose it is."""

import json
import os
from collections import deque
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from flsplit.account import History
from flsplit.errors import ConfigError
from flsplit.log import logger
from flsplit.run.callbacks import Callback
from flsplit.run.history_file import HistoryFile
from flsplit.run.method import SplitMethod
from flsplit.run.run_identity import Plain, differences, digest_of
from flsplit.storage import (
    LOCK_FILE,
    RoundFolder,
    State,
    StorageError,
    folder_name,
    from_records,
    to_records,
    write_atomically,
)

HISTORY_FILE, RUN_FILE = "history.jsonl", "run.json"
"""Beside the checkpoints: the ledger, and which run the folder belongs to."""

_PLAIN = (
    bool, int, float, str, list, dict, tuple, set, deque, np.ndarray, np.generic, Tensor,
    type(None),
)  # fmt: skip


class Checkpoints:
    """The checkpoints of one run in a folder of its own, the last two rounds kept.

    The folder is ``checkpoint_dir`` of the options; nobody else must be using it. A run of another
    identity is a stranger there.
    """

    def __init__(
        self,
        folder: Path,
        method: SplitMethod,
        callbacks: Sequence[Callback] = (),
        identity: Mapping[str, Plain] | None = None,
    ) -> None:
        self._folder = folder
        self._rounds = RoundFolder(folder / "server")
        self._history = HistoryFile(folder / HISTORY_FILE)
        self._method, self._callbacks = method, callbacks
        self._identity = dict(identity or {})
        self._at_start = _shown_attributes(method)
        self._experiment = ""

    @property
    def problems(self) -> list[str]:
        """Which files were broken when the run was resumed."""
        return self._rounds.problems

    def begin(self, experiment: str) -> None:
        """Make the folder that of a new run; one of the same kind that was here is set aside.

        ConfigError if the folder has checkpoints of another run. StorageError if it can't be read
        or written.
        """
        if rounds := self._rounds.rounds():
            found = self._run_in_folder()
            if different := differences(found["identity"], self._identity):
                raise ConfigError(
                    f"checkpoint_dir {self._folder} has the checkpoints of a run {different}; use "
                    "another folder, or remove what is in this one"
                )
            aside = self._set_aside(found["experiment"])
            logger.warning(
                "checkpoint_dir %s had the checkpoints of such a run, up to round %d; they are now "
                "in %s, since resume is False", self._folder, rounds[-1], aside,
            )  # fmt: skip
        self._experiment = experiment
        text = json.dumps({"experiment": experiment, "identity": self._identity}, indent=1)
        write_atomically(self._folder / RUN_FILE, lambda new: new.write_text(text))

    def save(self, clients: State, history: History) -> None:
        """Write down where the run is, after the last round of ``history``.

        ConfigError if the method remembers something and has no ``state_dict``, or one that can't
        be stored. StorageError if a file can't be written.
        """
        self._check_state()
        state = {
            "experiment": self._experiment,
            "clients": clients,
            "method": self._method.state_dict(),
            "callbacks": [[type(one).__name__, one.state_dict()] for one in self._callbacks],
        }
        records = to_records(state | {"history": self._history.add(history[-1])})
        self._rounds.save(history[-1].round, records)

    def load(self) -> tuple[State, History, str]:
        """Set the method back to the last checkpoint that is whole.

        Return what :meth:`save` was told of the clients, the history so far, and the experiment's
        name.

        ConfigError if there is no checkpoint, or one of another run than this. StorageError if none
        can be read.
        """
        if not self._rounds.rounds():
            raise ConfigError(
                f"resume: there is no checkpoint in {self._rounds.folder}: no round was completed "
                "there; start without resume"
            )
        found = self._run_in_folder()
        if different := differences(found["identity"], self._identity):
            raise ConfigError(
                f"resume: the checkpoint in {self._rounds.folder} is of a run {different}"
            )
        self._experiment = found["experiment"]
        state, history = self._last_whole()
        self._method.load_state_dict(state["method"])
        stored = list(state["callbacks"])
        for callback in self._callbacks:  # one that the run didn't have yet begins anew
            for kept in stored:
                if kept[0] == type(callback).__name__:
                    callback.load_state_dict(kept[1])
                    stored.remove(kept)
                    break
        return state["clients"], history, self._experiment

    def _last_whole(self) -> tuple[State, History]:
        problems = self._rounds.problems
        for server_round, records in self._rounds.stored():
            state = from_records(records)
            if state["experiment"] != self._experiment:
                raise ConfigError(
                    f"resume: round {server_round} in {self._rounds.folder} is of another run than "
                    f"{self._folder / RUN_FILE} says"
                )
            try:
                return state, self._history.read(state["history"])
            except StorageError as error:
                problems.append(str(error))
        raise StorageError(f"resume: no checkpoint can be read: {'; '.join(problems)}")

    def _run_in_folder(self) -> dict[str, Any]:
        """Return what the folder says of the run that it belongs to."""
        path = self._folder / RUN_FILE
        try:
            found = json.loads(path.read_text())
            return {"experiment": str(found["experiment"]), "identity": dict(found["identity"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"{self._folder} has checkpoints, but of which run can't be read: {error}"
            ) from error

    def _set_aside(self, experiment: str) -> Path:
        aside = self._folder / "earlier" / folder_name(experiment)
        clients = Path("clients") / folder_name(experiment)
        try:
            for part in (Path("server"), clients, Path(HISTORY_FILE), Path(RUN_FILE)):
                if (self._folder / part).exists():
                    (aside / part).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(self._folder / part, aside / part)
            (aside / LOCK_FILE).touch()
        except OSError as error:
            raise StorageError(f"{self._folder} can't be set aside: {error}") from error
        return aside

    def _check_state(self) -> None:
        """Refuse a method whose attributes have changed and that has no ``state_dict`` of its own.

        A resumed run would go on without what they held, and nobody would notice.
        """
        cls = type(self._method)
        if cls.state_dict is not SplitMethod.state_dict:
            return
        now = _shown_attributes(self._method)
        if changed := [name for name, shown in now.items() if self._at_start.get(name) != shown]:
            raise ConfigError(
                f"{cls.__name__} remembers {', '.join(map(repr, changed))} from round to round but "
                "has no state_dict and load_state_dict: a resumed run would begin without it"
            )


def _shown_attributes(method: SplitMethod) -> dict[str, str]:
    """Return the attributes that are a method's own and plain, as text."""
    own = {name: one for name, one in vars(method).items() if name not in SplitMethod.ATTRIBUTES}
    return {name: _shown(one) for name, one in own.items() if isinstance(one, _PLAIN)}


def _shown(value: object) -> str:
    """Return a value as text that changes with it: ``repr`` leaves out digits and elements."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        return f"{value.dtype} {value.shape} {blake2b(value.tobytes()).hexdigest()}"
    if isinstance(value, Tensor):
        return digest_of(value)
    if isinstance(value, Mapping):
        return str([(repr(key), _shown(one)) for key, one in value.items()])
    if isinstance(value, (list, tuple, deque)):
        return str([_shown(one) for one in value])
    return repr(value)
