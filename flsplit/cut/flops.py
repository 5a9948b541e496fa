"""Counts what modules compute, without computing it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from flsplit.cut.cut_errors import CutError
from flsplit.cut.examples import needs_values, with_values
from flsplit.cut.scripted import plain_copy
from flsplit.cut.sides import without_data
from flsplit.cut.survey import Survey
from flsplit.cut.trace import Spec, map_tree
from flsplit.seeds import seeded

# More than one sample, because BatchNorm may want that, and to recognise the batch dimension.
BATCH = 2


class CountedSurvey(Survey):
    """A forward in eval mode, and the FLOPs up to the return of each module.

    It runs on the *meta* device, where nothing is computed; of a model that asks for values (of a
    mask, say) a copy runs on the CPU.

    ``flops`` has those of a module's last call by its name, ``total_flops`` those of the whole
    pass.

    CutError if the model can't run on such a batch.
    """

    def __init__(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        try:
            try:
                self._run("meta", without_data(model), args, kwargs)
            except Exception as error:
                if isinstance(error, CutError) or not needs_values(error):
                    raise
                self._run("cpu", plain_copy(model).cpu(), args, kwargs)
        except CutError:
            raise
        except Exception as error:
            raise CutError(
                f"{type(model).__name__} can't be profiled on {_described(args, kwargs)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        self.total_flops = self._counter.get_total_flops()

    def _run(self, device: str, ghost: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        self._counter = FlopCounterMode(display=False, custom_mapping=_ATTENTION_ON_CPU)
        self.flops = dict[str, int]()

        def moved(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return with_values(leaf) if leaf.is_meta and device != "meta" else leaf.to(device)

        args, kwargs = map_tree(moved, (args, dict(kwargs)))
        # Tensors that a forward makes without saying where must be on the same device.
        with torch.device(device), torch.no_grad(), seeded(0), self._counter:
            super().__init__(ghost.eval(), args, kwargs)

    def layer_returned(self, name: str, output: Any) -> None:
        """Count up to here."""
        super().layer_returned(name, output)
        self.flops[name] = self._counter.get_total_flops()


def forward_flops(module: nn.Module, row: Tensor) -> int:
    """Return the FLOPs of one row's forward pass through a module; see `CountedSurvey`."""
    batch = torch.empty((BATCH, *row.shape), dtype=row.dtype, device="meta")
    return CountedSurvey(module, (batch,), {}).total_flops // BATCH


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


_ATTENTION_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
}
"""The one attention that FlopCounterMode doesn't know."""


def _described(args: Any, kwargs: Mapping[str, Any]) -> str:
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
        shape = tuple(args[0].shape[1:])
        return f"{len(args[0])} samples of shape {shape} and type {args[0].dtype}"
    specs = map_tree(lambda leaf: Spec.of(leaf).shape if isinstance(leaf, Tensor) else leaf,
                     (list(args), dict(kwargs)))  # fmt: skip
    return f"a batch {specs}"
