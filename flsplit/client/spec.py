"""What a user says about a client: model, cut, data, optimizer and where to compute."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import Context
from flwr.clientapp.typing import Mod
from torch import nn
from torch.optim import Optimizer

from flsplit.auxiliary import BuildAuxiliary
from flsplit.client_parts import ClientPart
from flsplit.cut.client_cuts import ClientCuts, check_cuts, cut_of
from flsplit.errors import ConfigError
from flsplit.losses import Loss

OptimizerFactory = Callable[..., Optimizer]
"""Called as ``factory(parameters, lr=…)``: a torch optimizer class or a ``functools.partial``."""

Unpack = Callable[[Any], tuple[Any, Any]]
"""Turns what a collate function returns into ``(inputs, labels)``, any nestings of tensors."""


@dataclass(frozen=True, kw_only=True)
class ClientSpec:
    """The arguments of :func:`flsplit.client_app`, which documents them."""

    model: Callable[..., nn.Module]
    cut: ClientCuts
    share: Sequence[str] = ()
    data: Callable[[Context], Any]
    optimizer: OptimizerFactory = torch.optim.SGD
    device: str = "auto"
    autocast: torch.dtype | None = None
    max_grad_norm: float | None = None
    unpack: Unpack | None = None
    auxiliary: BuildAuxiliary | None = None
    loss: Loss | None = None
    client_parts: Sequence[type[ClientPart]] = ()
    privacy_mods: Sequence[Mod] = ()  # of Flower, for what is handed over

    def __post_init__(self) -> None:
        """Refuse what can't be used."""
        if isinstance(self.model, nn.Module):
            raise ConfigError(
                f"model is a {type(self.model).__name__} itself, expected a function that returns "
                "a new one"
            )
        for name in ("model", "data", "optimizer"):
            if not callable(found := getattr(self, name)):
                raise ConfigError(f"{name} is {found!r}, expected a function")
        _check_call("model", self.model, **({"context": 0} if _takes_context(self.model) else {}))
        _check_call("data", self.data, "context")
        _check_call("optimizer", self.optimizer, "parameters", lr=0)
        for name in ("auxiliary", "loss", "unpack"):
            if (found := getattr(self, name)) is not None and not callable(found):
                raise ConfigError(f"{name} is {found!r}, expected a function")
        for one in self.client_parts:
            if not (isinstance(one, type) and issubclass(one, ClientPart) and one.name):
                raise ConfigError(
                    f"client_parts: one of them is {one!r}, expected a class of parts with a name"
                )
        check_cuts(self.cut)
        if self.autocast is not None and not isinstance(self.autocast, torch.dtype):
            raise ConfigError(f"autocast is {self.autocast!r}, expected a dtype: torch.bfloat16")
        norm = self.max_grad_norm
        if norm is not None and not (isinstance(norm, int | float) and norm > 0):
            raise ConfigError(f"max_grad_norm is {norm!r}, expected more than 0")

    def build_model(self, context: Context) -> nn.Module:
        """Return a new unsplit model; ``model`` gets the context if it has a parameter for it."""
        takes_context = _takes_context(self.model)
        model = self.model(context=context) if takes_context else self.model()
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model returned a {type(model).__name__}, expected an nn.Module")
        return model

    def cut_for(self, context: Context) -> str:
        """Return where this client is cut; a function of the context is asked for that."""
        if callable(self.cut) and _takes_context(self.cut):
            found = self.cut(context=context)
            check_cuts(found)
            return cut_of(found, client_name(context))
        return cut_of(self.cut, client_name(context))


def _takes_context(function: Callable[..., Any]) -> bool:
    try:
        return "context" in inspect.signature(function).parameters
    except ValueError:  # one of C's, which tells nothing
        return False


def _check_call(name: str, function: Callable[..., Any], *args: str, **kwargs: int) -> None:
    """Refuse a function that can't be called as it will be."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        call = ", ".join([*args, *(f"{one}=…" for one in kwargs)])
        raise ConfigError(f"{name} can't be called as {name}({call}): {error}") from error
    except ValueError:
        return


def pick_device(device: str) -> torch.device:
    """Return the torch device called ``device``; ``auto`` is the GPU if there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device is {device!r}, which can't be used here: {error}") from error


def client_name(context: Context) -> str:
    """Return who this client is: ``client-name`` or ``partition-id`` of its node config.

    Node ids are random, so they only serve where the node config names nothing better.
    """
    for key in ("client-name", "partition-id"):
        if key in context.node_config:
            return str(context.node_config[key])
    return f"node-{context.node_id}"
