"""What a client part is: a small object with a name and numbers, and hooks into a client's step."""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flsplit.errors import ConfigError, did_you_mean
from flsplit.seeds import derive_seed

Argument = bool | int | float | str


@dataclass(frozen=True)
class PartWhere:
    """Where in a run a part is at work.

    Attributes
    ----------
    client : str
        The client's name.
    round, step : int
        The round, from 1, and the client's step in it, from 0.
    seed : int
        Follows from the run's seed and all of this, the part's index and the hook.
    labels : nesting of torch.Tensor, optional
        Of the step's rows; in :meth:`ClientPart.down` and :meth:`ClientPart.output_gradient`.
    """

    client: str
    round: int
    step: int
    seed: int
    labels: Any = field(default=None, kw_only=True, repr=False)

    @cached_property
    def rng(self) -> torch.Generator:
        """A generator (CPU) of this hook's own: asked again, the step gives the same numbers."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class ClientWhere(PartWhere):
    """The same on the client.

    Attributes
    ----------
    segment : nn.Module
        The client segment, in training mode.
    round_start : mapping of str to Tensor
        Its trainable parameters as they were when the round began, by name; empty unless a part
        has ``needs_round_start``.
    """

    segment: nn.Module
    round_start: Mapping[str, Tensor]


HOOKS = ("smashed", "cut_gradient", "output_gradient", "loss", "gradients", "down")


class ClientPart:
    """Base of what a method has its clients do inside a step.

    A part is sent by name and arguments, never as code: its constructor takes plain numbers,
    strings and booleans, and keeps each in an attribute of the same name. A class is registered
    under ``name`` in the entry-point group ``flsplit.client_parts``, or given to ``client_app``.

    Hooks are called in the order in which a method lists its parts. Random numbers come from
    ``where.rng``: without a cache, a client computes a step's forward pass twice.

    Attributes
    ----------
    name : str
        What it is called in entry points, plans and errors.
    needs_round_start : bool
        Whether the client keeps its parameters as they were at the round's beginning.
    """

    name: ClassVar[str] = ""
    needs_round_start: ClassVar[bool] = False

    def smashed(self, where: ClientWhere, smashed: Tensor) -> Tensor:
        """Return the smashed data ``(b, ...)`` that leaves, of the same shape; differentiable.

        Where several values cross, it is called for each floating-point one that the client's
        layers computed, one after the other; an input that is shared leaves as it is.
        """
        return smashed

    def cut_gradient(self, where: ClientWhere, gradient: Tensor) -> Tensor:
        """Return the cut-layer gradient to back-propagate, of the same shape.

        Of several values it is called for each that has one.
        """
        return gradient

    def loss(self, where: ClientWhere, inputs: Any, smashed: Any, labels: Any) -> Tensor | None:
        """Return a term that the client adds to what it minimises, a scalar; None for none.

        Inputs and labels are nestings of tensors, as the client's data gives them. ``smashed`` is
        what leaves, after all parts' :meth:`smashed`, and part of the graph: a tensor, or a dict
        of those that cross.
        """
        return None

    def output_gradient(self, where: ClientWhere, gradient: Tensor) -> Tensor:
        """Return the gradient that goes up at a U-shaped split's second cut, of the same shape.

        It is that of the client's mean loss by the server's outputs. The last layers learn from
        their own, whatever is returned here.
        """
        return gradient

    def gradients(self, where: ClientWhere, parameters: Sequence[nn.Parameter]) -> None:
        """Edit ``grad`` of the client's parameters (those that have one) in place."""

    def down(self, where: PartWhere, cut_gradient: Tensor) -> Tensor:
        """Return the cut-layer gradient that the server sends down, of the same shape.

        This one runs on the server, for each client, and must not keep anything.
        """
        return cut_gradient

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive between steps: tensors and plain numbers by name."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned at some time."""

    def arguments(self) -> dict[str, Argument]:
        """Return the constructor's arguments.

        Raises
        ------
        ConfigError
            If one is not kept in an attribute, or can't be sent.
        """
        found: dict[str, Argument] = {}
        for argument in inspect.signature(type(self)).parameters:
            value: Any = getattr(self, argument, None)
            plain = isinstance(value, (bool, int, float, str))
            if not plain or (isinstance(value, float) and not math.isfinite(value)):
                raise ConfigError(
                    f"client part {self.name!r}: {argument} is {value!r}, expected a number, a "
                    "string or a boolean in the attribute of this name"
                )
            found[argument] = value
        return found

    def check_state(self, arguments: Mapping[str, Argument]) -> None:
        """Refuse a part that has more in it than its arguments, and no ``state_dict``."""
        if type(self).state_dict is not ClientPart.state_dict:
            return
        changed = [name for name, value in vars(self).items() if arguments.get(name) is not value]
        if changed:
            raise ConfigError(
                f"client part {self.name!r} keeps {', '.join(map(repr, changed))} beside its "
                "arguments but has no state_dict: it would be lost wherever a client is built anew"
            )


def refuse_without_hook(part: ClientPart) -> None:
    """Raise ConfigError if a part does nothing, as one does whose hook is misspelt."""
    cls = type(part)
    if any(overrides(part, hook) for hook in HOOKS):
        return
    own = [name for name in vars(cls) if not name.startswith("_") and not hasattr(ClientPart, name)]
    meant = next(filter(None, (did_you_mean(name, HOOKS) for name in own)), "")
    raise ConfigError(
        f"client part {part.name!r} ({cls.__qualname__}) has none of the hooks that are called: "
        f"{', '.join(HOOKS)}{meant}"
    )


def overrides(part: ClientPart, hook: str) -> bool:
    """Tell whether a part has a hook of its own."""
    return getattr(type(part), hook) is not getattr(ClientPart, hook)


def seed_at(seed: int, client: str, round_: int, step: int, index: int, hook: str) -> int:
    """Return the seed of one hook of the part at ``index``, from the run's seed."""
    return derive_seed(seed, "client-part", index, hook, client, round_, step)
