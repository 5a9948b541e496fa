"""The methods of split learning, one file each."""

from flsplit.strategies.cse_fsl import CSEFSL
from flsplit.strategies.cyclesl import CycleSL
from flsplit.strategies.epsl import EPSL
from flsplit.strategies.fsl_sage import FSLSAGE
from flsplit.strategies.gapsl import GAPSL
from flsplit.strategies.psl import PSL
from flsplit.strategies.sequential_sl import SequentialSL
from flsplit.strategies.sfl_ga import SFLGA
from flsplit.strategies.sglr import SGLR
from flsplit.strategies.splitfed_v1 import SplitFedV1
from flsplit.strategies.splitfed_v2 import SplitFedV2

__all__ = [
    "CSEFSL",
    "EPSL",
    "FSLSAGE",
    "GAPSL",
    "PSL",
    "SFLGA",
    "SGLR",
    "CycleSL",
    "SequentialSL",
    "SplitFedV1",
    "SplitFedV2",
]
