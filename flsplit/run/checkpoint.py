"""Checkpoints of a run on the server: one atomic file per round, no pickle."""

import json
from collections import deque
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flsplit.account import History, RoundEntry
from flsplit.errors import ConfigError
from flsplit.run.callbacks import Callback
from flsplit.run.method import SplitMethod
from flsplit.storage import RoundFolder, from_records, to_records

_PLAIN = (
    bool, int, float, str, list, dict, tuple, set, deque, np.ndarray, np.generic, Tensor,
    type(None),
)  # fmt: skip


class Checkpoints:
    """The checkpoints of one experiment, the last two rounds kept.

    Parameters
    ----------
    folder : Path
        ``checkpoint_dir`` of the options.
    method : SplitMethod
        What is written down.
    callbacks : sequence of Callback
        What watches over the run, and may remember something, too.
    """

    def __init__(
        self, folder: Path, method: SplitMethod, callbacks: Sequence[Callback] = ()
    ) -> None:
        self._rounds = RoundFolder(folder / "server")
        self._method, self._callbacks = method, callbacks
        self._at_start = _shown_attributes(method)

    def save(self, holds: Mapping[str, int], history: History, experiment: str) -> None:
        """Write down where the run is, after the last round of ``history``.

        Raises
        ------
        ConfigError
            If the method remembers something and has no ``state_dict``, or one that can't be
            stored.
        """
        self._check_state()
        state = {
            "experiment": experiment,
            "identity": self._method.identity(),
            "holds": dict(holds),
            # as text: a history is read as a whole, and has a format of its own
            "history": [json.dumps(entry.to_json()) for entry in history],
            "method": self._method.state_dict(),
            "callbacks": [[type(one).__name__, one.state_dict()] for one in self._callbacks],
        }
        self._rounds.save(history[-1].round, to_records(state))

    def load(self) -> tuple[dict[str, int], History, str]:
        """Set the method back to the last checkpoint.

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
        state = from_records(found[1])
        self._check_identity(state["identity"])
        self._method.load_state_dict(state["method"])
        stored = list(state["callbacks"])
        for callback in self._callbacks:  # one that the run didn't have yet begins anew
            for kept in stored:
                if kept[0] == type(callback).__name__:
                    callback.load_state_dict(kept[1])
                    stored.remove(kept)
                    break
        history = History(RoundEntry.from_json(json.loads(entry)) for entry in state["history"])
        return state["holds"], history, state["experiment"]

    def _check_identity(self, stored: Mapping[str, Any]) -> None:
        for name, value in self._method.identity().items():
            if stored.get(name) != value:
                raise ConfigError(
                    f"resume: the checkpoint in {self._rounds.folder} is of a run with {name} "
                    f"{stored.get(name)!r}, this one has {value!r}"
                )

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
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return f"{value.dtype} {tuple(value.shape)} {blake2b(raw.tobytes()).hexdigest()}"
    if isinstance(value, Mapping):
        return str([(repr(key), _shown(one)) for key, one in value.items()])
    if isinstance(value, (list, tuple, deque)):
        return str([_shown(one) for one in value])
    return repr(value)
