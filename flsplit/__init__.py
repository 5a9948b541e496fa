"""flsplit: split learning for Flower."""

from flsplit.account import History, draw_histories
from flsplit.app import client_app
from flsplit.carry.local import LocalGrid
from flsplit.carry.session import SessionSettings
from flsplit.cut import CutError, Split, cuts, split
from flsplit.errors import FlsplitError

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
