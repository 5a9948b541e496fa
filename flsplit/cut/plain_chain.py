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

    def sides(self) -> tuple[list[nn.Module], list[nn.Module]] | None:
        """Return what to call one after the other, up to the cut and from it.

        None where that isn't what the modules do: anybody may add a hook at any time.
        """
        if not self._of_sequentials or has_any_global_hook():  # type: ignore[no-untyped-call]
            return None
        before: list[Any] = []
        after: list[Any] = []
        for module, place in self._levels:
            if (
                module._forward_hooks
                or module._forward_pre_hooks
                or module._backward_hooks
                or module._backward_pre_hooks
                or "forward" in vars(module)
            ):
                return None
            children = list(module._modules.values())
            before += children[:place]
            after = children[place + 1 :] + after
        return [*before, children[place]], after

    def is_all_of(self, trace: Trace) -> bool:
        """Tell whether nothing that these modules did was needed later, but their output."""
        return [name for name, _ in trace.calls[1:]] == self._calls


def _children(module: nn.Module) -> list[nn.Module]:
    return list(module._modules.values())  # type: ignore[arg-type]  # one of None isn't called


def _runs_as_sequential(kind: type[nn.Module]) -> bool:
    names = ("__call__", "forward", "__iter__", "__getattr__")
    return all(getattr(kind, name, None) is getattr(nn.Sequential, name) for name in names)
