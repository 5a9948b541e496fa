"""Cutting a model into a client segment and a server segment."""

from flsplit.cut.cut_errors import (
    CrossingError,
    CutError,
    EmptySegmentError,
    SharedStateError,
    StateDictError,
    UnknownCutError,
    UntraceableError,
    UnusedStateError,
)
from flsplit.cut.points import CutPoint, cuts
from flsplit.cut.splitting import Split, split
from flsplit.cut.table import format_cuts

__all__ = [
    "CrossingError",
    "CutError",
    "CutPoint",
    "EmptySegmentError",
    "SharedStateError",
    "Split",
    "StateDictError",
    "UnknownCutError",
    "UntraceableError",
    "UnusedStateError",
    "cuts",
    "format_cuts",
    "split",
]
