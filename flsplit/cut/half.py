"""A client or server segment: part of a model, under the names of the whole model."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, fx, nn

from flsplit.cut.cut_errors import CrossingError
from flsplit.cut.ownership import used_tensors
from flsplit.cut.program import Program


@dataclass(frozen=True)
class Plan:
    """What a segment computes: its program, its side and the cut it ends or begins at."""

    program: Program
    side: Literal["client", "server"]
    cut: str


class Segment(nn.Module):
    """One side of a cut model: one tensor in, one tensor out.

    Its parameters and buffers are the model's own, under the same names. Modules that lie
    wholly on this side are the model's own, too; those around the cut are empty shells.
    `build_segment` makes one.

    Parameters
    ----------
    plan : Plan
        What it computes.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self._segment_plan = plan  # one attribute, so that no submodule's name is taken

    def forward(self, given: Tensor) -> Tensor:
        """Return the smashed data of an input, or the model's output for smashed data.

        The server segment works on a copy of what it is given: its first operation may be one
        in place, which autograd refuses on a leaf that requires grad, and which would
        otherwise change the caller's smashed data.

        Raises
        ------
        CrossingError
            If the result is not one tensor.
        """
        plan = self._segment_plan
        result = plan.program.run(self, given.clone() if plan.side == "server" else given)
        if isinstance(result, Tensor):
            return result
        source = f"the cut layer {plan.cut!r}" if plan.side == "client" else "the model"
        raise CrossingError(
            f"{source} returned a {type(result).__name__}; the {plan.side} segment must return one "
            "tensor. Cut at a module that returns a tensor, or wrap the model in one that does"
        )

    def extra_repr(self) -> str:
        """Return the side and the cut."""
        return f"{self._segment_plan.side} segment, cut={self._segment_plan.cut!r}"


@dataclass(frozen=True)
class Part:
    """What of a model a segment holds.

    Attributes
    ----------
    modules : dict of nn.Module to nn.Module
        The modules that the segment calls, and what stands for each in the segment.
    tensors : set of int
        Ids of the parameters and buffers that belong to this side.
    shells : set of nn.Module
        Modules that the segment needs only for their ``training`` flag.
    """

    modules: dict[nn.Module, nn.Module]
    tensors: set[int]
    shells: set[nn.Module] = field(default_factory=set)


def build_segment(model: nn.Module, plan: Plan, part: Part) -> nn.Module:
    """Return the segment of `model` that holds `part` and computes `plan`."""
    segment = Segment(plan)
    _fill(segment, model, part)
    return segment


def part_of(model: nn.Module, nodes: Sequence[fx.Node]) -> Part:
    """Return what `nodes` need of a model."""
    called = [model.get_submodule(str(node.target)) for node in nodes if node.op == "call_module"]
    reads = [source for node in nodes for source in node.all_input_nodes if source.op == "get_attr"]
    owners = [model.get_submodule(str(read.target).rpartition(".")[0]) for read in reads]
    modules = {module: module for module in called}
    return Part(modules, used_tensors(list(nodes), model), set(owners))


def with_copies(part: Part, other: Part) -> Part:
    """Return `part` with copies of the modules that `other` calls, too.

    Such a module (a ReLU used everywhere, a Dropout) has no state but its training mode, which
    must not couple the two segments.
    """
    modules = {
        module: _copy(module) if module in other.modules else module for module in part.modules
    }
    return Part(modules, part.tensors, part.shells)


def _copy(module: nn.Module) -> nn.Module:
    """Copy a module but not its (non-persistent) buffers, which stay the model's."""
    return copy.deepcopy(module, {id(buffer): buffer for buffer in module.buffers()})


def _fill(shell: nn.Module, source: nn.Module, part: Part) -> None:
    """Register in `shell` what of `source` belongs to `part`, under the same names."""
    shell.training = source.training
    for name, parameter in source.named_parameters(recurse=False, remove_duplicate=False):
        if id(parameter) in part.tensors:
            shell.register_parameter(name, parameter)
    for name, buffer in source.named_buffers(recurse=False, remove_duplicate=False):
        if id(buffer) in part.tensors:
            persistent = name not in source._non_persistent_buffers_set
            shell.register_buffer(name, buffer, persistent=persistent)
    for name, child in source._modules.items():
        kept = _kept(child, part) if child is not None else None
        if kept is not None:
            shell.add_module(name, kept)


def _kept(module: nn.Module, part: Part) -> nn.Module | None:
    if module in part.modules:
        return part.modules[module]
    shell = nn.Module()
    _fill(shell, module, part)
    empty = not (shell._parameters or shell._buffers or shell._modules)
    return None if empty and module not in part.shells else shell
