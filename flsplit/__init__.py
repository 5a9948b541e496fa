"""flsplit: split learning for Flower."""

import importlib
from typing import TYPE_CHECKING, Any

from flsplit.cut import CutError, Split, cuts, split
from flsplit.errors import FlsplitError

if TYPE_CHECKING:
    from flsplit.account import History, draw_histories
    from flsplit.app import client_app
    from flsplit.carry.local import LocalGrid
    from flsplit.carry.session import SessionSettings

__version__ = "0.1.0"

__all__ = [
    "CutError",
    "FlsplitError",
    "History",
    "LocalGrid",
    "SessionSettings",
    "Split",
    "client_app",
    "cuts",
    "draw_histories",
    "split",
]

_OF_RUNS = {
    "History": "flsplit.account",
    "LocalGrid": "flsplit.carry.local",
    "SessionSettings": "flsplit.carry.session",
    "client_app": "flsplit.app",
    "draw_histories": "flsplit.account",
}


def __getattr__(name: str) -> Any:
    """Import what only runs need, and Flower with it, once it is asked for: plans go without."""
    if name not in _OF_RUNS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_OF_RUNS[name]), name)


def __dir__() -> list[str]:
    """Return what there is, and what would be imported."""
    return sorted({*globals(), *__all__})
