"""Finds every clean cut of a model from one trace."""

import itertools
from dataclasses import dataclass

from torch import fx, nn

from flsplit.cut.crossing import Flow, is_item, is_output
from flsplit.cut.ownership import Held, inventory
from flsplit.cut.tracer import Call
from flsplit.cut.tracing import Trace, trace_everywhere


@dataclass(frozen=True)
class Candidate:
    """A module after which exactly one value crosses.

    Attributes
    ----------
    call : Call
        Where it is called in the trace.
    item : int or None
        Which item of the module's output crosses; None if the output itself does.
    client_params, server_params : int
        Numbers of parameters on the two sides.
    """

    call: Call
    item: int | None
    client_params: int
    server_params: int


class Survey:
    """A model, traced as deep as it can be, and its clean cuts.

    Parameters
    ----------
    model : nn.Module
        The whole model.

    Raises
    ------
    UntraceableError
        If the forward of the model itself can't be traced.
    """

    def __init__(self, model: nn.Module) -> None:
        self._trace = trace_everywhere(model)
        self._flow = Flow(self._trace.nodes)
        self._inventory = inventory(model, self._trace)
        self._closed = _assign_unused(model, self._trace, self._inventory)

    def candidates(self) -> list[Candidate]:
        """Return the clean cuts in order of execution, one for each place.

        Of several modules that end at the same place, such as ``layer1`` and ``layer1.1``, it is
        the innermost, which returns first.
        """
        found: dict[int, Candidate] = {}
        for call in self._trace.calls:
            candidate = self._candidate(call)
            if candidate is not None:
                found.setdefault(call.position, candidate)
        return list(found.values())

    def nearest(self, module: nn.Module) -> tuple[str | None, str | None]:
        """Return the names of the last clean cut before a module's end and the first after it."""
        candidates = self.candidates()
        position = max((call.position for call in self._trace.calls_of(module)), default=None)
        if position is None:
            return None, None
        before = [cut.call.name for cut in candidates if cut.call.position < position]
        after = [cut.call.name for cut in candidates if cut.call.position > position]
        return (before[-1] if before else None), (after[0] if after else None)

    def _candidate(self, call: Call) -> Candidate | None:
        crossing = self._flow.crossing(call.position)
        if len(crossing) != 1 or not is_output(crossing[0], call.outputs):
            return None
        if len(self._trace.calls_of(call.module)) != 1 or self._inside_closed(call.name):
            return None
        if any(held.spans(call.position) for held in self._inventory if held.uses):
            return None
        client, server = self._parameters(call.position)
        return Candidate(call, _item(crossing[0], call), client, server) if server else None

    def _inside_closed(self, name: str) -> bool:
        return any(name.startswith(f"{closed}.") or not closed for closed in self._closed)

    def _parameters(self, position: int) -> tuple[int, int]:
        """Return how many parameters the calls before and after a place use."""
        parameters = [held for held in self._inventory if isinstance(held.tensor, nn.Parameter)]
        client = sum(held.tensor.numel() for held in parameters if min(held.uses) < position)
        return client, sum(held.tensor.numel() for held in parameters) - client


def _item(crossing: fx.Node, call: Call) -> int | None:
    """Return the place of the crossing value in what the module returns."""
    if crossing not in call.outputs:
        return int(str(crossing.args[1])) if is_item(crossing) else None
    return call.outputs.index(crossing) if len(call.outputs) > 1 else None


def _assign_unused(model: nn.Module, trace: Trace, inventory: list[Held]) -> set[str]:
    """Give state that no recorded call uses to the innermost called module that holds it.

    A cut outside that module leaves it whole, so the state goes where the module goes. A cut
    inside it would have to be refused.

    Returns
    -------
    set of str
        The names of those modules; empty for the model itself.
    """
    ends = {call.name: call.position for call in trace.calls} | {"": len(trace.nodes)}
    holders = set()
    for held in inventory:
        if not held.uses:
            holder = next(name for name in _ancestors(held.names[0]) if name in ends)
            held.uses.append(ends[holder] - 1)
            if held.lasting:
                holders.add(holder)
    return holders


def _ancestors(name: str) -> list[str]:
    """Return the names of the modules that hold a tensor or module, innermost first."""
    atoms = name.split(".")[:-1]
    outermost_first = ["", *itertools.accumulate(atoms, "{}.{}".format)]
    return outermost_first[::-1]
