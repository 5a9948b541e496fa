"""One half of a trace, as a list of steps that plain pickle and copy.deepcopy understand.

A torch.fx.GraphModule could run it, too, but it traces its own code anew when it is unpickled,
and forgets which buffers are persistent.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate


@dataclass(frozen=True)
class Result:
    """Stands, among a step's arguments, for the result of an earlier step."""

    number: int


@dataclass(frozen=True)
class ProgramStep:
    """One call.

    Attributes
    ----------
    number : int
        Its result's number.
    kind : str
        ``call_module``, ``call_function``, ``call_method`` or ``get_attr``, as in torch.fx.
    target : str or callable
        What is called: the name of a module, method or attribute, or a function.
    args, kwargs
        Arguments, with a `Result` for what an earlier step returned.
    """

    number: int
    kind: str
    target: Any
    args: Any
    kwargs: Any

    def run(self, module: nn.Module, values: Mapping[int, Any]) -> Any:
        """Make the call with the results so far."""
        args, kwargs = map_aggregate(
            (self.args, self.kwargs),
            lambda arg: values[arg.number] if isinstance(arg, Result) else arg,
        )
        if self.kind == "call_module":
            return attrgetter(self.target)(module)(*args, **kwargs)
        if self.kind == "call_function":
            return self.target(*args, **kwargs)
        if self.kind == "call_method":
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        return attrgetter(self.target)(module)


@dataclass(frozen=True)
class Program:
    """Steps from one tensor to one tensor.

    Attributes
    ----------
    steps : tuple of ProgramStep
        In order of execution. Result 0 is what the program is given.
    result : int
        Number of the result that the program returns.
    last_uses : dict of int to tuple of int
        Which results aren't needed any more after a step, by that step's number.
    """

    steps: tuple[ProgramStep, ...]
    result: int
    last_uses: dict[int, tuple[int, ...]]

    def run(self, module: nn.Module, given: Tensor) -> Any:
        """Run the steps on `given`, with the modules and tensors of `module`."""
        values: dict[int, Any] = {0: given}
        for step in self.steps:
            values[step.number] = step.run(module, values)
            for number in self.last_uses.get(step.number, ()):
                del values[number]
        return values[self.result]


def compile_program(nodes: Sequence[fx.Node], given: fx.Node, result: fx.Node) -> Program:
    """Return the program of `nodes`, which turn the value `given` into the value `result`.

    Parameters
    ----------
    nodes : sequence of fx.Node
        In order of execution; reads of parameters and buffers are added where they are needed.
    given, result : fx.Node
        The values that go in and come out.
    """
    numbers = {given: 0}
    steps = []
    for node in _with_reads(nodes):
        numbers[node] = len(numbers)
        args, kwargs = _numbered((node.args, node.kwargs), numbers)
        steps.append(ProgramStep(numbers[node], node.op, node.target, args, kwargs))
    return Program(tuple(steps), numbers[result], _last_uses(steps, keep=numbers[result]))


def _numbered(arguments: Any, numbers: Mapping[fx.Node, int]) -> Any:
    """Put a `Result` in the place of every node among `arguments`, however deep."""

    def numbered(argument: Any) -> Any:
        return Result(numbers[argument]) if isinstance(argument, fx.Node) else argument

    return map_aggregate(arguments, numbered)


def _with_reads(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Put the reads of parameters, buffers and flags before the first node that needs them."""
    ordered: dict[fx.Node, None] = {}
    for node in nodes:
        reads = [source for source in node.all_input_nodes if source.op == "get_attr"]
        ordered.update(dict.fromkeys([*reads, node]))
    return list(ordered)


def _last_uses(steps: list[ProgramStep], keep: int) -> dict[int, tuple[int, ...]]:
    last_use = {0: 0}
    for step in steps:
        last_use[step.number] = step.number  # a result that nobody uses goes at once
        last_use.update(dict.fromkeys(_results_in(step), step.number))
    del last_use[keep]
    uses: dict[int, tuple[int, ...]] = {}
    for number, at in last_use.items():
        uses[at] = (*uses.get(at, ()), number)
    return uses


def _results_in(step: ProgramStep) -> list[int]:
    found: list[int] = []
    map_aggregate(
        (step.args, step.kwargs),
        lambda arg: found.append(arg.number) if isinstance(arg, Result) else None,
    )
    return found
