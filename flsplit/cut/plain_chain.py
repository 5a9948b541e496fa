"""A short cut: where all modules around a cut are plain Sequentials, each side is a loop.

It calls what the forwards of the Sequentials call, in their order, and needs no watching.
"""

from typing import Any

from torch import nn

from flsplit.cut.private import has_any_global_hook
from flsplit.cut.trace import Trace


class PlainChain:
    """The modules around a cut layer, and which of their children leads to it."""

    def __init__(self, model: nn.Module, layer: str) -> None:
        self._levels: list[tuple[nn.Module, int]] = []
        done: list[nn.Module] = []
        module = model
        for atom in layer.split("."):
            place = list(module._modules).index(atom)
            self._levels.append((module, place))
            done += _children(module)[:place]
            module = _children(module)[place]
        self._of_sequentials = all(_runs_as_sequential(type(one)) for one, _ in self._levels)
        names = {id(module): name for name, module in model.named_modules()}
        self._calls = [
            f"module {names[id(one)]}"
            for one in (*done, module)
            if type(one) is not nn.Identity  # calls nothing, so it is in no trace
        ]

    @property
    def plain(self) -> bool:
        """Whether a loop does what the modules do: anybody may add a hook at any time."""
        if not self._of_sequentials:
            return False
        for module, _ in self._levels:
            if (
                module._forward_hooks
                or module._forward_pre_hooks
                or module._backward_hooks
                or module._backward_pre_hooks
                or "forward" in vars(module)
            ):
                return False
        return not has_any_global_hook()  # type: ignore[no-untyped-call]

    def is_all_of(self, trace: Trace) -> bool:
        """Tell whether nothing that these modules did was needed later, but their output."""
        return [name for name, _ in trace.calls[1:]] == self._calls

    def to_cut(self, value: Any) -> Any:
        """Return what the cut layer returns for the model's input."""
        for module, place in self._levels:
            children: Any = list(module._modules.values())
            for child in children[:place]:
                value = child(value)
        return children[place](value)

    def from_cut(self, value: Any) -> Any:
        """Return the model's output for what the cut layer returned."""
        for module, place in reversed(self._levels):
            children: Any = list(module._modules.values())
            for child in children[place + 1 :]:
                value = child(value)
        return value


def _children(module: nn.Module) -> list[nn.Module]:
    return list(module._modules.values())  # type: ignore[arg-type]  # one of None isn't called


def _runs_as_sequential(kind: type[nn.Module]) -> bool:
    names = ("__call__", "forward", "__iter__", "__getattr__")
    return all(getattr(kind, name, None) is getattr(nn.Sequential, name) for name in names)
