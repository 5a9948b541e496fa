"""Counts what modules compute, without computing it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flsplit.cut.cut_errors import CutError
from flsplit.cut.halves import without_data
from flsplit.cut.survey import Survey
from flsplit.cut.trace import Spec, map_tree

# More than one sample, because BatchNorm may want that, and to recognise the batch dimension.
BATCH = 2


class CountedSurvey(Survey):
    """A forward in eval mode on the *meta* device, and the FLOPs up to the return of each module.

    There, and not on the CPU, FlopCounterMode sees what attention computes.

    Attributes
    ----------
    flops : dict of str to int
        By the module's name; of its last call.
    total_flops : int
        Of the whole pass.

    Raises
    ------
    CutError
        If the model can't run on the *meta* device or on such a batch.
    """

    def __init__(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        self._counter, self.flops = FlopCounterMode(display=False), dict[str, int]()
        args, kwargs = map_tree(_to_meta, (args, dict(kwargs)))
        try:
            ghost = without_data(model).eval()
            # Tensors that a forward makes without saying where must be on the same device.
            with torch.device("meta"), torch.no_grad(), self._counter:
                super().__init__(ghost, args, kwargs)
        except CutError:
            raise
        except Exception as error:
            raise CutError(
                f"{type(model).__name__} can't be profiled on {_described(args, kwargs)}, on the "
                "meta device, where tensors have shapes but no data: "
                f"{type(error).__name__}: {error}"
            ) from error
        self.total_flops = self._counter.get_total_flops()

    def layer_returned(self, name: str, output: Any) -> None:
        """Count up to here."""
        super().layer_returned(name, output)
        self.flops[name] = self._counter.get_total_flops()


def forward_flops(module: nn.Module, row: Tensor) -> int:
    """Return the FLOPs of one row's forward pass through a module; see `CountedSurvey`."""
    batch = torch.empty((BATCH, *row.shape), dtype=row.dtype, device="meta")
    return CountedSurvey(module, (batch,), {}).total_flops // BATCH


def _to_meta(leaf: Any) -> Any:
    return leaf.to("meta") if isinstance(leaf, Tensor) else leaf


def _described(args: Any, kwargs: Mapping[str, Any]) -> str:
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
        shape = tuple(args[0].shape[1:])
        return f"{len(args[0])} samples of shape {shape} and type {args[0].dtype}"
    specs = map_tree(lambda leaf: Spec.of(leaf).shape if isinstance(leaf, Tensor) else leaf,
                     (list(args), dict(kwargs)))  # fmt: skip
    return f"a batch {specs}"
