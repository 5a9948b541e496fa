"""Cutting a model into a client segment and a server segment."""

from flsplit.cut.cut_errors import (
    CrossingError,
    CutError,
    EmptySegmentError,
    ExampleError,
    PathError,
    SharedStateError,
    StateDictError,
    UnknownCutError,
)
from flsplit.cut.points import CutPoint, cuts
from flsplit.cut.splitting import Split, split
from flsplit.cut.stretch import Crossing
from flsplit.cut.table import format_cuts
from flsplit.cut.trace import Trace

__all__ = [
    "Crossing",
    "CrossingError",
    "CutError",
    "CutPoint",
    "EmptySegmentError",
    "ExampleError",
    "PathError",
    "SharedStateError",
    "Split",
    "StateDictError",
    "Trace",
    "UnknownCutError",
    "cuts",
    "format_cuts",
    "split",
]
