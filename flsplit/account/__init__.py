"""Accounting: the ledger of a run, its history file and its pictures."""

from flsplit.account.clock import Clock
from flsplit.account.history import BrokenHistoryError, History
from flsplit.account.ledger import LeftOut, RoundEntry, Traffic
from flsplit.account.picture import draw_histories

__all__ = [
    "BrokenHistoryError",
    "Clock",
    "History",
    "LeftOut",
    "RoundEntry",
    "Traffic",
    "draw_histories",
]
