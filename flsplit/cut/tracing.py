"""Takes a model's forward apart into a graph of calls, as deep as a cut needs.

Only the modules *around* a cut are opened, that is, their forward is traced; every other
module stays one call in the graph. So a model needs to be traceable only where it is cut.
"""

import inspect
from dataclasses import dataclass
from threading import Lock

import torch
from torch import fx, nn

from flsplit.cut.cut_errors import UntraceableError
from flsplit.cut.guards import Frozen, NoTensorWork, training_flags
from flsplit.cut.tracer import Call, LenientTracer, Tracer, described, untraceable

# torch.fx patches nn.Module for the whole process while it traces.
_one_at_a_time = Lock()


@dataclass(frozen=True)
class Trace:
    """A model's forward.

    Attributes
    ----------
    nodes : list of fx.Node
        Everything it does, in order of execution. The first node is its input.
    calls : list of Call
        The module calls among it, in order of return.
    result : fx.Node
        What it returns.
    """

    nodes: list[fx.Node]
    calls: list[Call]
    result: fx.Node

    def calls_of(self, module: nn.Module) -> list[Call]:
        """Return the calls of one module."""
        return [call for call in self.calls if call.module is module]


def trace_around(model: nn.Module, ancestors: list[nn.Module]) -> Trace:
    """Trace `model`, opening only `ancestors`.

    Raises
    ------
    UntraceableError
        If the forward of the model or an ancestor can't be traced faithfully.
    """
    opened = set(ancestors)
    return _trace(model, Tracer(model, lambda module: module in opened))


def trace_everywhere(model: nn.Module) -> Trace:
    """Trace `model`, opening every module with submodules that can be opened.

    Raises
    ------
    UntraceableError
        If the forward of the model itself can't be traced faithfully.
    """
    return _trace(model, LenientTracer(model, _may_hold_cuts))


def _trace(model: nn.Module, tracer: Tracer) -> Trace:
    _check_model(model)
    with _one_at_a_time, training_flags(model), NoTensorWork():  # type: ignore[no-untyped-call]
        try:
            nodes = list(tracer.trace(model).nodes)
        except Frozen as reason:  # of what the model returns
            raise untraceable("", model, reason) from reason
    result = nodes[-1].args[0]
    if not isinstance(result, fx.Node):
        raise UntraceableError(
            f"{described('', model)} returns several values, or one that doesn't depend on its "
            "input; a segment returns one tensor. Wrap the model in a module that returns one"
        )
    return Trace(nodes, tracer.calls, result)


def _check_model(model: nn.Module) -> None:
    """Refuse compiled models and those whose forward needs something else than one input."""
    if isinstance(model, torch.jit.ScriptModule):
        raise UntraceableError(
            f"{described('', model)} is compiled by TorchScript: cut the model that it was made of"
        )
    signature = inspect.signature(model.forward)
    try:
        signature.bind(None)
    except TypeError as error:
        raise UntraceableError(
            f"forward{signature} of {described('', model)} can't be called with one tensor "
            f"({error}); a segment gets one tensor and returns one"
        ) from None


def _may_hold_cuts(module: nn.Module) -> bool:
    """Tell whether to look for cuts inside: not in torch's own layers, except nn.Sequential."""
    has_children = next(module.children(), None) is not None
    is_torchs_own = type(module).__module__.startswith("torch.nn.")
    return has_children and (isinstance(module, nn.Sequential) or not is_torchs_own)
