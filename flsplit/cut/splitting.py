"""Cuts a model in two."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import fx, nn

from flsplit.cut.crossing import Flow, explained, is_output
from flsplit.cut.cut_errors import (
    CrossingError,
    CutError,
    EmptySegmentError,
    StateDictError,
    UnknownCutError,
    UntraceableError,
    listed,
)
from flsplit.cut.half import Plan, build_segment, part_of, with_copies
from flsplit.cut.ownership import check_each_on_one_side, inventory
from flsplit.cut.program import compile_program
from flsplit.cut.survey import Survey
from flsplit.cut.tracer import Call
from flsplit.cut.tracing import Trace, trace_around

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Split:
    """A model in two halves, which share its parameters and buffers.

    Attributes
    ----------
    client : nn.Module
        The client segment: turns an input batch into smashed data.
    server : nn.Module
        The server segment: turns smashed data into the model's output.
    cut : str
        The cut layer's name.
    keys : tuple of str
        The keys of the whole model's state dict, in its order.
    """

    client: nn.Module
    server: nn.Module
    cut: str
    keys: tuple[str, ...]

    def divide(self, state_dict: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
        """Divide a state dict of the whole model between the segments.

        Parameters
        ----------
        state_dict : mapping of str to anything
            Values by the whole model's keys.

        Returns
        -------
        tuple of two dicts
            The client segment's and the server segment's part. Values are not copied.

        Raises
        ------
        StateDictError
            If keys of the whole model are missing or others are there.
        """
        _check_keys("the whole model's state dict", state_dict, self.keys)
        client_keys = self.client.state_dict().keys()
        client = {key: state_dict[key] for key in self.keys if key in client_keys}
        return client, {key: state_dict[key] for key in self.keys if key not in client_keys}

    def join(self, client: Mapping[str, T], server: Mapping[str, T]) -> dict[str, T]:
        """Join the segments' state dicts.

        Parameters
        ----------
        client, server : mapping of str to anything
            Values by the keys of each segment.

        Returns
        -------
        dict
            The whole model's state dict, in its order. Values are not copied.

        Raises
        ------
        StateDictError
            If keys of a segment are missing or others are there.
        """
        _check_keys("the client segment's state dict", client, tuple(self.client.state_dict()))
        _check_keys("the server segment's state dict", server, tuple(self.server.state_dict()))
        return {key: client[key] if key in client else server[key] for key in self.keys}


def split(model: nn.Module, cut: str) -> Split:
    """Cut a model in two after one of its modules.

    The client segment is everything up to and including the output of the cut layer, the
    server segment is the rest. Both run the model's own operations on the model's own
    parameters, so together they compute bit for bit what the model computes.

    Parameters
    ----------
    model : nn.Module
        The whole model: its forward takes one tensor and returns one. It is not changed.
        No other thread may run a model meanwhile: torch.fx patches ``nn.Module`` to trace.
    cut : str
        The cut layer: the dotted name of a submodule, as in ``model.named_modules()``.

    Returns
    -------
    Split
        The two segments.

    Raises
    ------
    UnknownCutError
        If there is no such module, or forward doesn't call it exactly once.
    UntraceableError
        If the forward of a module around the cut can't be taken apart faithfully.
    CrossingError
        If something else than the cut layer's output crosses the cut.
    SharedStateError
        If both sides need the same parameter or persistent buffer.
    UnusedStateError
        If forward never uses some parameter or persistent buffer.
    EmptySegmentError
        If no parameters are left for the server.
    """
    layer = _find(model, cut)
    trace = trace_around(model, _ancestors(model, cut))
    call = _only_call(model, trace, layer, cut)
    smashed = _only_crossing(model, trace, call, cut)
    check_each_on_one_side(inventory(model, trace), cut, call.position)
    halves = _build(model, trace, call, smashed, cut)
    _check_halves(model, halves)
    return halves


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


def _find(model: nn.Module, cut: str) -> nn.Module:
    modules = _modules(model)
    if cut and cut in modules:
        return modules[cut]
    names = [name for name in modules if name]
    nearest = difflib.get_close_matches(str(cut), names, n=5, cutoff=0.4)
    near = f"The nearest names are {listed(nearest)}. " if nearest else ""
    outermost = listed([name for name in names if "." not in name], limit=12)
    raise UnknownCutError(
        f"{type(model).__name__} has no submodule {cut!r} to cut after. {near}At the top there are "
        f"{outermost or 'none'}. flsplit.cuts(model, example_input) lists every place to cut"
    )


def _ancestors(model: nn.Module, cut: str) -> list[nn.Module]:
    modules, atoms = _modules(model), cut.split(".")
    return [modules[".".join(atoms[:depth])] for depth in range(len(atoms))]


def _only_call(model: nn.Module, trace: Trace, layer: nn.Module, cut: str) -> Call:
    calls = trace.calls_of(layer)
    if len(calls) == 1:
        return calls[0]
    if calls:
        raise UnknownCutError(
            f"forward calls {cut!r} {len(calls)} times, so it doesn't say where to cut. "
            f"{_suggestion(model, layer)}"
        )
    raise UnknownCutError(
        f"forward never calls {cut!r} ({type(layer).__name__}) itself: it may only hold other "
        "modules or weights, or not be used at all. flsplit.cuts(model, example_input) lists "
        "every place to cut"
    )


def _only_crossing(model: nn.Module, trace: Trace, call: Call, cut: str) -> fx.Node:
    """Return the one value that crosses the cut, or say which ones do."""
    crossing = Flow(trace.nodes).crossing(call.position)
    if len(crossing) == 1 and is_output(crossing[0], call.outputs):
        return crossing[0]
    values = "; ".join(explained(node, model) for node in crossing)
    raise CrossingError(
        f"after {cut!r} exactly its output, one tensor, may cross to the server, but what is used "
        f"there is: {values or 'nothing'}. {_suggestion(model, call.module)}"
    )


def _suggestion(model: nn.Module, layer: nn.Module) -> str:
    """Return a sentence about the clean cuts around `layer`."""
    try:
        before, after = Survey(model).nearest(layer)
    except CutError:
        before, after = None, None
    clean = [
        f"{name!r} ({side} it)"
        for name, side in ((before, "before"), (after, "after"))
        if name is not None
    ]
    if clean:
        return f"The nearest clean cuts are {' and '.join(clean)}"
    return "There is no clean cut near it; flsplit.cuts(model, example_input) lists those there are"


def _build(model: nn.Module, trace: Trace, call: Call, smashed: fx.Node, cut: str) -> Split:
    client_nodes, server_nodes = _halves(trace.nodes, call.position, smashed)
    client_program = compile_program(client_nodes, given=trace.nodes[0], result=smashed)
    server_program = compile_program(server_nodes, given=smashed, result=trace.result)
    client_part, server_part = part_of(model, client_nodes), part_of(model, server_nodes)
    server_part = with_copies(server_part, client_part)
    return Split(
        client=build_segment(model, Plan(client_program, "client", cut), client_part),
        server=build_segment(model, Plan(server_program, "server", cut), server_part),
        cut=cut,
        keys=tuple(model.state_dict()),
    )


def _halves(
    nodes: Sequence[fx.Node], position: int, smashed: fx.Node
) -> tuple[list[fx.Node], list[fx.Node]]:
    """Return the calls before and after a place, without inputs, outputs and reads of tensors."""
    client, server = list(nodes[:position]), list(nodes[position:])
    if smashed in server:
        # The cut layer returns a tuple: what picks the tensor out of it moves to the client.
        items = smashed.all_input_nodes[0].users
        client, server = [*client, smashed], [node for node in server if node not in items]
    calls = ("call_module", "call_function", "call_method")
    return [node for node in client if node.op in calls], [n for n in server if n.op in calls]


def _check_halves(model: nn.Module, halves: Split) -> None:
    """Make sure that the server has something to train and that no state is lost."""
    if next(halves.server.parameters(), None) is None:
        raise EmptySegmentError(
            f"no parameters of {type(model).__name__} come after {halves.cut!r}, so the server "
            "would have nothing to train: cut earlier"
        )
    kept = [*halves.client.state_dict(), *halves.server.state_dict()]
    lost = sorted(set(kept) ^ set(halves.keys))
    if lost:
        raise UntraceableError(
            f"the segments' state dicts and that of {type(model).__name__} differ in "
            f"{listed(lost)}: a module around the cut {halves.cut!r} makes its state dict in a "
            "way of its own"
        )


def _check_keys(what: str, found: Mapping[str, object], expected: Sequence[str]) -> None:
    missing = [key for key in expected if key not in found]
    unexpected = sorted(set(found) - set(expected))
    if missing or unexpected:
        raise StateDictError(
            f"{what} should have {len(expected)} keys and has {len(found)}. "
            f"Missing: {listed(missing) or 'none'}. Unexpected: {listed(unexpected) or 'none'}"
        )
