"""A torch.fx tracer that opens only some modules and refuses what it can't keep."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from flsplit.cut.cut_errors import CutError, UntraceableError
from flsplit.cut.guards import Frozen, nothing_changes, torch_modes

_REMEDY = (
    "Only the modules around the cut are traced, so cut at a whole module further out, or change "
    "that forward, or put two modules of your own in a row: "
    "nn.Sequential(OrderedDict(client=front, server=back)), cut at 'client'"
)

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_METHODS = ("train", "eval", "get_extra_state", "_save_to_state_dict", "_load_from_state_dict")


@dataclass(frozen=True)
class Call:
    """One call of a module during the trace.

    Attributes
    ----------
    name : str
        The module's first name in ``model.named_modules()``.
    module : nn.Module
        The module.
    position : int
        How many nodes the graph had when the call returned: the place of a cut after it.
    outputs : tuple of fx.Node
        The values that it returned, several where it returned a tuple or list.
    """

    name: str
    module: nn.Module
    position: int
    outputs: tuple[fx.Node, ...]


def described(name: str, module: nn.Module) -> str:
    """Return e.g. ``'layer1.0' (BasicBlock)``, or ``the model (ResNet)`` for the root."""
    return f"{name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"


def untraceable(name: str, module: nn.Module, error: Exception) -> UntraceableError:
    """Return the error that says why a module's forward can't be traced, and what to do."""
    reason = str(error) if isinstance(error, Frozen) else f"{type(error).__name__}: {error}"
    return UntraceableError(
        f"the forward of {described(name, module)} can't be traced: {reason}. {_REMEDY}"
    )


class _StandIn(fx.Proxy):
    """Stands for a value while its model is traced; ``isinstance`` takes it for a tensor."""

    # isinstance(value, nn.Parameter) and nn.Module.__setattr__ ask every tensor for these.
    _is_param = False
    _is_buffer = False

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return Tensor


class Tracer(fx.Tracer):
    """Records the forward of a model as a graph whose leaves are the modules not opened.

    Parameters
    ----------
    model : nn.Module
        What will be traced.
    opens : callable
        Tells of a module whether its forward is traced (or recorded as one call).
    """

    def __init__(self, model: nn.Module, opens: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._model = model
        self._opens = opens
        self._names = {module: name for name, module in model.named_modules()}
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self._tensor_names = {id(tensor): name for name, tensor in tensors}
        self._entered: list[nn.Module] = []
        self._modes = torch_modes()

    def create_args_for_root(
        self, root_fn: object, is_module: bool, concrete_args: object = None
    ) -> tuple[Callable[..., object], list[fx.Proxy]]:
        """Make the first input a stand-in; the others keep their defaults."""
        return self._run_model, [self.create_proxy("placeholder", "input", (), {})]

    def _run_model(self, given: fx.Proxy) -> object:
        return self.enter(self._model, self._model.forward, (given,), {})

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> object:
        """Record the call of a module, or trace into it."""
        if m not in self._names:
            raise Frozen(f"it calls a {type(m).__name__} that is not a submodule of the model")
        opened = self._opens(m)
        output = self.enter(m, forward, args, kwargs) if opened else self.record(m, args, kwargs)
        call = Call(self._names[m], m, len(self.graph.nodes), _nodes_in(output))
        self.calls.append(call)
        return output

    def record(self, m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        """Record the call of a module as one node."""
        return self.create_proxy("call_module", self._names[m], args, kwargs)

    def enter(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> object:
        """Trace into a module, guarding against what a trace would lose or freeze."""
        self._entered.append(m)
        try:
            _check_openable(m)
            with nothing_changes(m):
                return forward(*args, **kwargs)
        except CutError:
            raise
        except Exception as error:
            raise untraceable(self._names[m], m, error) from error
        finally:
            self._entered.pop()

    def getattr(self, attr: str, attr_val: object, parameter_proxy_cache: object) -> object:
        """Return a stand-in for a parameter or buffer, so that its use is recorded."""
        name = self._tensor_names.get(id(attr_val)) if isinstance(attr_val, Tensor) else None
        return attr_val if name is None else self.create_proxy("get_attr", name, (), {})

    def create_arg(self, a: Any) -> Any:
        """Refuse arguments that torch.fx would store as constants of the model."""
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, Tensor) and id(a) not in self._tensor_names:
            raise Frozen(
                "it uses a tensor that is neither a parameter nor a buffer: register it in "
                "__init__, with register_buffer(name, tensor, persistent=False)"
            )
        if isinstance(a, nn.Module):
            raise Frozen(f"it hands a module ({type(a).__name__}) to a function")
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Record a node, and whose forward it is from."""
        if torch_modes() != self._modes:
            raise Frozen("it switches gradients or autocast (torch.no_grad, ...) for a part of it")
        node = super().create_node(*args, **kwargs)
        node.meta["forward_of"] = self._entered[-1] if self._entered else self._model
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return the stand-in for a node's result."""
        return _StandIn(node, self)

    def iter(self, obj: fx.Proxy) -> NoReturn:
        """Refuse loops over the data."""
        raise Frozen("it loops over a value that depends on its input")

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Refuse control flow that depends on the data."""
        raise Frozen("it branches on a value that depends on its input (if, while, assert, and)")


class LenientTracer(Tracer):
    """Keeps a module as one call where it can't be opened, instead of giving up."""

    def enter(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> object:
        """Trace into a module; if that fails, forget what was recorded of it and make it a leaf."""
        num_nodes, num_calls = len(self.graph.nodes), len(self.calls)
        try:
            return super().enter(m, forward, args, kwargs)
        except UntraceableError:
            if m is self._model:
                raise
            for node in reversed(list(self.graph.nodes)[num_nodes:]):
                self.graph.erase_node(node)
            del self.calls[num_calls:]
            return self.record(m, args, kwargs)


def _check_openable(module: nn.Module) -> None:
    """Raise `Frozen` if a segment, which has no `module` but only its parts, would lack something.

    Reading ``__dict__`` keeps clear of torch.fx's patches.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise Frozen("it is compiled by TorchScript")
    hooks = [name for name in _HOOKS if vars(module).get(name)]
    if hooks:
        raise Frozen(
            f"it has hooks ({', '.join(hooks)}), which wouldn't fire in a segment: register them "
            "on the segments, or on a module that is not around the cut"
        )
    own = [name for name in _METHODS if getattr(type(module), name) is not getattr(nn.Module, name)]
    if own:
        raise Frozen(f"its class overrides {own[0]}(), which a segment wouldn't call")


def _nodes_in(output: object) -> tuple[fx.Node, ...]:
    values = output if isinstance(output, tuple | list) else (output,)
    return tuple(value.node for value in values if isinstance(value, fx.Proxy))
