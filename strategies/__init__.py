"""Split-learning strategies for Flower: who computes what, and when."""

from flsplit.strategies.base import SplitStrategy
from flsplit.strategies.cse_fsl import CSEFSL
from flsplit.strategies.decoupled import DecoupledStrategy
from flsplit.strategies.epsl import EPSL
from flsplit.strategies.fsl_sage import FSLSAGE
from flsplit.strategies.gapsl import GAPSL
from flsplit.strategies.options import SplitOptions
from flsplit.strategies.parallel import ParallelStrategy
from flsplit.strategies.psl import PSL
from flsplit.strategies.registry import (
    make_rule,
    make_server_pass,
    make_strategy,
    rule_names,
    strategy_names,
)
from flsplit.strategies.result import SplitResult
from flsplit.strategies.sequential_sl import SequentialSL
from flsplit.strategies.sglr import SGLR
from flsplit.strategies.splitfed_v1 import SplitFedV1
from flsplit.strategies.splitfed_v2 import SplitFedV2

__all__ = [
    "CSEFSL",
    "EPSL",
    "FSLSAGE",
    "GAPSL",
    "PSL",
    "SGLR",
    "DecoupledStrategy",
    "ParallelStrategy",
    "SequentialSL",
    "SplitFedV1",
    "SplitFedV2",
    "SplitOptions",
    "SplitResult",
    "SplitStrategy",
    "make_rule",
    "make_server_pass",
    "make_strategy",
    "rule_names",
    "strategy_names",
]
