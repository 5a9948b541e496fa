"""Which values cross a cut."""

import operator
from collections.abc import Sequence

from torch import fx, nn

from flsplit.cut.tracer import described


class Flow:
    """The values of a trace, from where they are made to where they are last used.

    Parameters
    ----------
    nodes : sequence of fx.Node
        A trace's nodes in order of execution.
    """

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        self._order = {node: place for place, node in enumerate(nodes)}
        # Parameters and buffers don't cross: each segment holds its own.
        self._values = [
            (node, place, max((self._order[user] for user in node.users), default=-1))
            for node, place in self._order.items()
            if node.op != "get_attr"
        ]

    def crossing(self, position: int) -> list[fx.Node]:
        """Return the values made before `position` and used from there on.

        Where only items of a value are used (``x, _ = self.lstm(x)``), these items cross
        in its place.
        """
        crossing = []
        for node, made, last_used in self._values:
            if made < position <= last_used:
                crossing += self._used_items(node, position) or [node]
        return [node for node in crossing if node.users]

    def _used_items(self, node: fx.Node, position: int) -> list[fx.Node]:
        users = [user for user in node.users if self._order[user] >= position]
        return users if all(is_item(user) for user in users) else []


def is_item(node: fx.Node) -> bool:
    """Tell whether a node is ``value[i]`` with a constant number i."""
    return node.target is operator.getitem and isinstance(node.args[1], int)


def is_output(node: fx.Node, outputs: Sequence[fx.Node]) -> bool:
    """Tell whether a value is one of `outputs` or an item of one."""
    return node in outputs or (is_item(node) and node.args[0] in outputs)


def explained(node: fx.Node, model: nn.Module) -> str:
    """Return what a value is, in words."""
    names = {module: name for name, module in model.named_modules()}
    forward_of = node.meta["forward_of"]
    where = f"in the forward of {described(names[forward_of], forward_of)}"
    if node.op == "placeholder":
        return "the model's input"
    if node.op == "call_module":
        return f"the output of {node.target!r}"
    if node.target is getattr:
        return f".{node.args[1]} of {_explained_argument(node, model)}"
    if is_item(node):
        return f"item {node.args[1]} of {_explained_argument(node, model)}"
    called = node.target if isinstance(node.target, str) else _function_name(node.target)
    return f"the result of {called}() {where}"


def _explained_argument(node: fx.Node, model: nn.Module) -> str:
    """Return what the first argument of a node is, in words."""
    first = node.args[0]
    return explained(first, model) if isinstance(first, fx.Node) else repr(first)


def _function_name(function: object) -> str:
    return str(getattr(function, "__name__", function))
