"""flsplit: split learning for Flower."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flsplit.account import History, draw_histories
    from flsplit.app import client_app
    from flsplit.carry.local_grid import LocalGrid
    from flsplit.carry.session import SessionSettings
    from flsplit.cut import CutError, Split, cuts, split
    from flsplit.errors import FlsplitError
    from flsplit.losses import ModelLoss

__version__ = "0.1.0"

__all__ = [
    "CutError",
    "FlsplitError",
    "History",
    "LocalGrid",
    "ModelLoss",
    "SessionSettings",
    "Split",
    "client_app",
    "cuts",
    "draw_histories",
    "split",
]

_MODULES = {
    "flsplit.account": ("History", "draw_histories"),
    "flsplit.app": ("client_app",),
    "flsplit.carry.local_grid": ("LocalGrid",),
    "flsplit.carry.session": ("SessionSettings",),
    "flsplit.cut": ("CutError", "Split", "cuts", "split"),
    "flsplit.errors": ("FlsplitError",),
    "flsplit.losses": ("ModelLoss",),
}


def __getattr__(name: str) -> Any:
    """Import a name once it is asked for.

    The command line needs few of them: it answers without PyTorch, and plans without Flower.
    """
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return what there is, and what would be imported."""
    return sorted({*globals(), *__all__})
