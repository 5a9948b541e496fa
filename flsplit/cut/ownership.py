"""Which segment a parameter or buffer belongs to: the one whose calls use it."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, fx, nn

from flsplit.cut.cut_errors import SharedStateError, UnusedStateError, listed
from flsplit.cut.tracing import Trace


@dataclass
class Held:
    """One parameter or buffer of a model.

    Attributes
    ----------
    tensor : Tensor
        The parameter or buffer itself.
    names : list of str
        Its names in the model: several where weights are tied.
    lasting : bool
        Whether it must belong to one segment: not so a buffer that isn't in the state dict.
    uses : list of int
        The places in the trace of the calls that use it.
    """

    tensor: Tensor
    lasting: bool
    names: list[str] = field(default_factory=list)
    uses: list[int] = field(default_factory=list)

    def spans(self, position: int) -> bool:
        """Tell whether both sides of a cut need it and mustn't."""
        return self.lasting and min(self.uses) < position <= max(self.uses)


def inventory(model: nn.Module, trace: Trace) -> list[Held]:
    """Return every parameter and buffer of `model` with its names and its uses in `trace`."""
    held = _held_by(model)
    for place, node in enumerate(trace.nodes):
        for tensor in _tensors_of(node, model):
            held[id(tensor)].uses.append(place)
    return list(held.values())


def check_each_on_one_side(inventory: list[Held], cut: str, position: int) -> None:
    """Refuse state that no call uses and state that calls on both sides use.

    Raises
    ------
    UnusedStateError
        If forward never uses a parameter or a persistent buffer.
    SharedStateError
        If both segments would need the same parameter or persistent buffer.
    """
    unused = [held.names[0] for held in inventory if held.lasting and not held.uses]
    if unused:
        raise UnusedStateError(
            f"forward never uses {listed(unused)}, so they belong to neither segment of a cut at "
            f"{cut!r}: delete what holds them from the model before you cut it"
        )
    shared = [held for held in inventory if held.uses and held.spans(position)]
    if shared:
        names = [" = ".join(held.names) for held in shared]
        raise SharedStateError(
            f"a cut at {cut!r} leaves {listed(names)} on both sides: weights are tied, or a module "
            "is called before and after the cut. Two machines can't train one tensor: untie them "
            "(give each side its own module), or cut where all their uses are on one side; a "
            "constant buffer may be on both sides if it is registered with persistent=False"
        )


def used_tensors(nodes: list[fx.Node], model: nn.Module) -> set[int]:
    """Return the ids of the parameters and buffers that `nodes` use."""
    return {id(tensor) for node in nodes for tensor in _tensors_of(node, model)}


def _held_by(model: nn.Module) -> dict[int, Held]:
    held: dict[int, Held] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor, lasting in _own_tensors(module):
            entry = held.setdefault(id(tensor), Held(tensor, lasting))
            entry.lasting |= lasting
            entry.names.append(f"{path}.{name}" if path else name)
    return held


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        yield name, parameter, True
    for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
        yield name, buffer, name not in module._non_persistent_buffers_set


def _tensors_of(node: fx.Node, model: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers that one node uses, in its module or as arguments."""
    used = [_attribute(source, model) for source in node.all_input_nodes if source.op == "get_attr"]
    tensors = [value for value in used if isinstance(value, Tensor)]
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        tensors += [*module.parameters(), *module.buffers()]
    return tensors


def _attribute(node: fx.Node, model: nn.Module) -> object:
    path, _, name = str(node.target).rpartition(".")
    return getattr(model.get_submodule(path), name)
