"""What the server sees, kept: smashed data, gradients, labels, segments that are handed over."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flsplit.cut.smashed import CutGradient, Smashed
from flsplit.errors import ConfigError
from flsplit.log import logger
from flsplit.message.local_steps import LocalReply
from flsplit.message.request import Reply, Request
from flsplit.message.steps import FinishReply
from flsplit.message.u_shape import TailReply
from flsplit.nested import leaves_of
from flsplit.run.arguments import whole
from flsplit.run.callbacks import Callback
from flsplit.storage.record_file import StorageError, write_atomically

_RUN, _SEGMENTS = "run.json", "segments"

_TOLD = ("seed", "lr", "batch_size", "local_epochs", "local_steps", "drop_last")
"""Of a plan, what tells runs apart."""


class Record(Callback):
    """Writes what the server sees in training to a folder, for attacks on it.

    A file of each client and step holds ``smashed``, ``gradient`` (what the server sent for it),
    ``labels``, where they went up, and ``output-gradient``, where the client has the last layers;
    a file of each client its segment, where it was handed over, as
    of the last time. All are safetensors files. Whoever has the folder knows what the server knows:
    keep it as you would keep the data.

    Parameters
    ----------
    folder : str or Path
        Where to; made if need be. Another recording in it is refused.
    steps : int
        How many steps of each client are kept in a round, from its first.
    every : int
        Only rounds that this divides, and the first.
    most_bytes : int
        Nothing more is written when so much has been.
    """

    def __init__(
        self, folder: str | Path, *, steps: int = 8, every: int = 1, most_bytes: int = 2**30
    ) -> None:
        for name, number in (("steps", steps), ("every", every), ("most_bytes", most_bytes)):
            whole(f"Record: {name}", number, 1)
        self.folder, self.steps, self.every = Path(folder).absolute(), steps, every
        self.most_bytes, self.nbytes = most_bytes, 0
        self._clients: list[str] = []
        self._open: dict[tuple[str, int], dict[str, Tensor]] = {}  # gradients are still to come

    def on_exchange(self, requests: Mapping[str, Request], replies: Mapping[str, Reply]) -> None:
        """Keep what was sent and what came."""
        for client, request in requests.items():
            told = request.backward
            if told and (found := self._open.pop((client, told.step), None)):
                found |= _named("gradient", told.gradient)
                self._write(client, request.server_round, told.step, found)
            if request.plan:
                self._begin(request, len(requests))
        for client, reply in replies.items():
            self._take(client, requests[client], reply)

    def state_dict(self) -> dict[str, Any]:
        """Return whom it knows by which number, and how much it has written."""
        return {"clients": list(self._clients), "nbytes": self.nbytes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`."""
        self._clients, self.nbytes = list(state["clients"]), state["nbytes"]

    def _begin(self, request: Request, at_once: int) -> None:
        assert request.plan is not None
        plan, path = request.plan, self.folder / _RUN
        about: dict[str, Any] = {
            "experiment": plan.experiment, "cut": plan.cut, "client-parts": plan.client_parts
        }  # fmt: skip
        about["told"] = {name.replace("_", "-"): getattr(plan, name) for name in _TOLD}
        about["told"] |= {"request": type(request).__name__, "clients-at-once": at_once}
        if path.exists():
            if (there := _about(path)["experiment"]) != plan.experiment:
                raise ConfigError(f"{self.folder} holds a recording of another run ({there!r})")
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(about))

    def _take(self, client: str, request: Request, reply: Reply) -> None:
        round_ = request.server_round
        if isinstance(reply, FinishReply | LocalReply) and reply.segment:
            segment, like = reply.segment, getattr(request, "like", None)
            whole = like.completed(segment) if like else segment
            self._save(f"{_SEGMENTS}/{self._number(client)}", whole, client, round_, 0)
        if round_ % self.every and round_ > 1:
            return
        if isinstance(reply, TailReply):  # the labels stay with the client, this is made of them
            if found := self._open.get((client, reply.step)):
                found["output-gradient"] = reply.gradient
            return
        uploads = reply.uploads if isinstance(reply, LocalReply) else None  # no gradient follows
        batches = uploads or dict.fromkeys([request.step or 0], *reply.batches()[:1])
        for step, batch in batches.items():
            if batch is None or step >= self.steps:
                continue
            smashed, labels = batch
            found = _named("smashed", smashed)
            found |= {f"labels{place}": one for place, one in leaves_of(labels)}
            if uploads is None:
                self._open = {key: one for key, one in self._open.items() if key[0] != client}
                self._open[client, step] = found
            else:
                self._write(client, round_, step, found)

    def _write(self, client: str, round_: int, step: int, tensors: dict[str, Tensor]) -> None:
        name = f"round-{round_:05}/{step:05}-{self._number(client)}"
        self._save(name, tensors, client, round_, step)

    def _save(
        self, name: str, tensors: Mapping[str, Tensor], client: str, round_: int, step: int
    ) -> None:
        size = sum(one.nbytes for one in tensors.values())
        if self.nbytes + size > self.most_bytes:
            if self.nbytes <= self.most_bytes:
                logger.warning("Record: %d bytes are written, nothing more is kept", self.nbytes)
            self.nbytes = self.most_bytes + 1
            return
        if not name.startswith(_SEGMENTS):  # of segments there is one file each
            self.nbytes += size
        about = {"client": client, "round": str(round_), "step": str(step)}
        plain = {key: one.detach().cpu().contiguous().clone() for key, one in tensors.items()}
        write_atomically(
            self.folder / f"{name}.safetensors", lambda path: save_file(plain, path, about)
        )

    def _number(self, client: str) -> int:
        if client not in self._clients:
            self._clients.append(client)
        return self._clients.index(client)


def _named(what: str, values: Smashed | CutGradient | None) -> dict[str, Tensor]:
    if values is None:
        return {}
    if isinstance(values, Tensor):
        return {what: values}
    several = values if isinstance(values, dict) else values.values
    return {f"{what}:{name}": one for name, one in several.items()}


@dataclass(frozen=True)
class RecordedStep:
    """One client's step as the server saw it.

    Attributes
    ----------
    client : str
        Whose it is.
    round, step : int
        Which.
    smashed, gradient : torch.Tensor or None
        ``(b, ...)``; None where several values cross, or no gradient was sent.
    labels : torch.Tensor or None
        ``(b, ...)``; None where they did not go up, or are no single tensor.
    output_gradient : torch.Tensor or None
        ``(b, ...)``, at the second cut of a U-shaped split.
    """

    client: str
    round: int
    step: int
    smashed: Tensor | None
    gradient: Tensor | None
    labels: Tensor | None
    output_gradient: Tensor | None = None


@dataclass(frozen=True)
class RecordedRun:
    """A folder of :class:`Record`.

    Attributes
    ----------
    folder : Path
        Where it is.
    cut : str
        The cut layer.
    client_parts : str
        What clients did beside the plain step, as plans describe it.
    steps : list of RecordedStep
        In their order.
    segments : dict of str to dict of str to torch.Tensor
        The client segments that were handed over last, by client.
    told : dict
        What clients were told at first: batch size, steps, rate, seed. Empty in older recordings.
    """

    folder: Path
    cut: str
    client_parts: str
    steps: list[RecordedStep] = field(repr=False)
    segments: dict[str, dict[str, Tensor]] = field(repr=False)
    told: dict[str, Any] = field(default_factory=dict)

    def of(self, client: str) -> list[RecordedStep]:
        """Return the steps of one client."""
        return [one for one in self.steps if one.client == client]

    @property
    def clients(self) -> list[str]:
        """Who was recorded."""
        return list(dict.fromkeys(one.client for one in self.steps))


def read_recording(folder: str | Path) -> RecordedRun:
    """Return what :class:`Record` wrote.

    Raises
    ------
    ConfigError
        If there is no recording in the folder.
    flsplit.storage.StorageError
        If a file can't be read.
    """
    place = Path(folder)
    if not (place / _RUN).is_file():
        raise ConfigError(f"{place} holds no recording: there is no {_RUN}")
    about = _about(place / _RUN)
    steps = []
    for tensors, said in map(_read, sorted(place.glob("round-*/*.safetensors"))):
        names = ("smashed", "gradient", "labels", "output-gradient")
        one = [tensors.get(name) for name in names]
        steps.append(RecordedStep(said["client"], int(said["round"]), int(said["step"]), *one))
    segments = {
        said["client"]: tensors
        for tensors, said in map(_read, sorted(place.glob(f"{_SEGMENTS}/*.safetensors")))
    }
    return RecordedRun(place, about["cut"], about["client-parts"], steps, segments, about["told"])


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            said = file.metadata() or {}
            return tensors, {name: said[name] for name in ("client", "round", "step")}
    except (OSError, SafetensorError, KeyError) as error:
        raise StorageError(f"{path} can't be read: {type(error).__name__}: {error}") from error


def _about(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        about = {name: str(found[name]) for name in ("experiment", "cut", "client-parts")}
        return about | {"told": dict(found.get("told", {}))}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{path} can't be read: {type(error).__name__}: {error}") from error
