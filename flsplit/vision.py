"""Imports torchvision, also beside a PyTorch build that its wheel was not compiled for.

torchvision's wheel on PyPI is compiled for the CUDA build of PyTorch. Beside a CPU-only build
its operators can't be loaded, and torchvision, which describes two of them to PyTorch
while it is imported, fails: ``operator torchvision::nms does not exist``. Models, data sets and
transforms need none of them.
"""

import importlib
import sys
from functools import cache
from types import ModuleType

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def load_torchvision() -> ModuleType:
    """Import torchvision, declaring its missing operators if it can't be imported without.

    Where torchvision's operators load, this is ``import torchvision`` and nothing else. Declared
    operators have no implementation: calling one raises.

    Returns
    -------
    ModuleType
        The module ``torchvision``.

    Raises
    ------
    ImportError
        If torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # what the failed import left behind is incomplete
    _declare_operators()
    return importlib.import_module("torchvision")


@cache  # PyTorch forgets a declaration when its Library object goes
def _declare_operators() -> torch.library.Library:
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        library.define(schema)  # type: ignore[no-untyped-call]
    return library
