"""The server's optimizer and scheduler, made by the user's functions and looked at."""

from collections.abc import Callable
from typing import Any

from torch.nn import Parameter
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from flsplit.errors import ConfigError

_ERRORS = (TypeError, ValueError, RuntimeError, KeyError)


def make_optimizer(
    build: Callable[..., Optimizer], parameters: list[Parameter], lr: float
) -> Optimizer:
    """Return ``build(parameters, lr=lr)``.

    Raises
    ------
    ConfigError
        If that fails, or gives no optimizer, or one that steps only with a closure.
    """
    optimizer = _build("server_optimizer", build, parameters, lr=lr)
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(f"server_optimizer returned {optimizer!r}, expected a torch optimizer")
    if isinstance(optimizer, LBFGS):
        raise ConfigError(
            "server_optimizer is LBFGS, which computes the loss several times per step: split "
            "learning has the smashed data of one forward pass only"
        )
    return optimizer


def make_scheduler(build: Callable[[Optimizer], LRScheduler], optimizer: Optimizer) -> LRScheduler:
    """Return ``build(optimizer)``.

    Raises
    ------
    ConfigError
        If that fails, or gives no scheduler, or one that needs more than the round.
    """
    scheduler = _build("server_scheduler", build, optimizer)
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ConfigError(
            "server_scheduler is ReduceLROnPlateau, which needs a metric; a server_lr that is a "
            "function of the round can do what it does"
        )
    if not isinstance(scheduler, LRScheduler):
        raise ConfigError(f"server_scheduler returned {scheduler!r}, expected a torch scheduler")
    return scheduler


def _build(what: str, build: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        return build(*arguments, **options)
    except _ERRORS as error:
        raise ConfigError(f"{what} can't be made: {type(error).__name__}: {error}") from error
