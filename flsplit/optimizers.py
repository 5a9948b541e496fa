"""A user's optimizer and scheduler, on clients and server: made, looked at, and set.

The factory is a function of the learning rate: what it gives its groups at a rate is what they
get at that rate. So groups keep the ratios that it gives them, and a rate that it fixes is fixed.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from flsplit.errors import TORCH_ERRORS, ConfigError, ProtocolError
from flsplit.log import warn_once
from flsplit.nested import leaves_of, map_tensors, to_device
from flsplit.snapshots import snapshot

NOMINAL_LR = 0.001
"""With which an optimizer is made before its rate is known; some refuse 0."""

_ERRORS = (*TORCH_ERRORS, KeyError, AttributeError, NotImplementedError)

_Groups = list[dict[str, Any]]
_SET_HERE = ("params", "lr")
_KEPT = ("state", "param_groups", "defaults")  # groups may share values with the last


class UserOptimizer:
    """An optimizer that a user's factory made, with its learning rates.

    ``option`` is what the user calls the factory, which is called as ``build(parameters, lr=…)``;
    ``left_out`` are the names of parameters that what it returned does not train.

    ConfigError if the factory fails, or gives no optimizer, one that steps only with a closure, one
    with a scheduler, one of other parameters, or one whose state dict isn't torch's.
    """

    def __init__(
        self,
        option: str,
        build: Callable[..., Optimizer],
        named: Iterable[tuple[str, Parameter]],
        lr: float,
    ) -> None:
        self._option, self._build = option, build
        self._names = dict(named)
        self._lr = lr
        self.torch = self._made(lr)
        self._as_made = _values(self.torch)
        self._looked_at = False  # whether what it keeps is known to be of kinds that can be kept
        trained = {id(p) for group in self.torch.param_groups for p in group["params"]}
        self.left_out = [name for name, p in self._names.items() if id(p) not in trained]
        foreign = len(trained) - len(self._names) + len(self.left_out)
        if foreign:
            raise ConfigError(
                f"{option} made an optimizer with {foreign} parameter(s) that it was not called "
                "with, expected those that it gets and no others"
            )
        written = self.torch.state_dict()
        if not (isinstance(written, dict) and isinstance(written.get("state"), dict)):
            raise ConfigError(
                f"{option}: the state_dict() of {type(self.torch).__name__} has "
                f"{', '.join(map(repr, written)) or 'nothing'}, expected torch's: a dict 'state', "
                "by the index of a parameter, beside 'param_groups'"
            )

    def warn(self, run: str) -> None:
        """Say once in a run which parameters are not trained."""
        if self.left_out:
            warn_once(
                run,
                f"{self._option} leaves out {', '.join(self.left_out)}: they stay as they are",
            )

    def set_lr(self, lr: float) -> None:
        """Give each group the learning rate that the factory gives it at ``lr``.

        The same goes for whatever else the factory makes of the rate.
        """
        if lr == self._lr:
            return
        made = _values(self._made(lr))
        before, self._as_made, self._lr = self._as_made, made, lr
        for group, old, new in zip(self.torch.param_groups, before, made, strict=True):
            changed = {k: v for k, v in new.items() if not (k in old and _same(v, old[k]))}
            group |= _copied(changed)

    def step(self, lr_factor: float = 1.0) -> None:
        """Step with the parameters' gradients, at ``lr_factor`` times the learning rates.

        ConfigError if the optimizer can't, or keeps what can neither travel nor be stored.
        """
        before = None if self._looked_at else self._attributes()
        groups = self.torch.param_groups
        rates = list(map(itemgetter("lr"), groups))
        for group, lr in zip(groups, rates, strict=True):
            group["lr"] = lr * lr_factor
        try:
            self.torch.step()
        except _ERRORS as error:
            raise ConfigError(
                f"{self._option}: {type(self.torch).__name__} can't step: "
                f"{type(error).__name__}: {error}"
            ) from error
        if len(self.torch.param_groups) != len(rates):
            raise ConfigError(
                f"{self._option}: {type(self.torch).__name__} had {len(rates)} parameter group(s) "
                f"before a step and has {len(self.torch.param_groups)} after it, expected all "
                f"groups to be there as soon as it is made, by {self._option}"
            )
        for group, lr in zip(groups, rates, strict=True):
            if group["lr"] != lr * lr_factor:
                warn_once(
                    "",
                    f"{self._option}: {type(self.torch).__name__} changes its learning rate "
                    "itself, which has no effect: the plan sets it",
                )
            group["lr"] = lr
        if before:
            self._looked_at = True
            self._refuse_attributes(before[0])
            self._refuse_state()

    def zero_grad(self) -> None:
        """Forget the gradients, also of parameters that the optimizer leaves out."""
        for parameter in self._names.values():
            parameter.grad = None

    def also_as_made(self) -> None:
        """Take what a scheduler has just added to the groups for what they were made with."""
        for group, made in zip(self.torch.param_groups, self._as_made, strict=True):
            made |= {k: v for k, v in _without(group, _SET_HERE).items() if k not in made}

    # --- state ---------------------------------------------------------------------------

    def state(self) -> dict[int, dict[str, Any]]:
        """Return what the optimizer remembers, by the index of a parameter and then of a group.

        Of a group that is what has changed since it was made, but for the learning rate.
        """
        state: dict[int, dict[str, Any]] = self.torch.state_dict()["state"]
        count = self._num_parameters()
        changed = (
            {
                key: value
                for key, value in _without(group, _SET_HERE).items()
                if not (key in made and _same(value, made[key]))
            }
            for group, made in zip(self.torch.param_groups, self._as_made, strict=True)
        )
        return state | {count + i: values for i, values in enumerate(changed) if values}

    def load(self, state: Mapping[int, Mapping[str, Any]]) -> None:
        """Go on from a :meth:`state`; rates and what was not in it are as they were made.

        ProtocolError if it is the state of an optimizer with more parameters or groups.
        """
        optimizer, count = self.torch, self._num_parameters()
        most = count + len(optimizer.param_groups)
        if any(index >= most for index in state):
            raise ProtocolError(
                f"optimizer state: index is {max(state)}, expected less than {most}: do the "
                f"{self._option} functions here and there differ?"
            )
        own = {index: dict(values) for index, values in state.items() if index < count}
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": own, "param_groups": groups})
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, values in own.items():
            placed, device = optimizer.state[parameters[index]], parameters[index].device
            for name, value in values.items():  # torch casts dtypes, and spoils strings
                placed[name] = _restored(placed.get(name), value, device)
        for index, (group, made) in enumerate(
            zip(optimizer.param_groups, self._as_made, strict=True)
        ):
            device = group["params"][0].device if group["params"] else torch.device("cpu")
            kept = {key: group[key] for key in _SET_HERE}
            given = to_device(_copied(state.get(count + index, {})), device)
            group.clear()
            group |= _copied(made) | given | kept

    def _num_parameters(self) -> int:
        return sum(len(group["params"]) for group in self.torch.param_groups)

    def _refuse_state(self) -> None:
        count = self._num_parameters()
        for index, values in self.state().items():
            known = isinstance(index, int)
            of = "the state of a parameter" if known and index < count else "a group"
            for place, value in leaves_of(values) if known else [("", values)]:
                plain = value is None or isinstance(value, (bool, int, float, str))
                dense = isinstance(value, Tensor) and value.layout == torch.strided
                if not ((plain or dense) and place):
                    kind = f"a {value.layout} tensor" if isinstance(value, Tensor) else repr(value)
                    where = f"{place} of {of}" if place else of
                    raise ConfigError(
                        f"{self._option}: {type(self.torch).__name__} keeps {kind} as "
                        f"{where if known else f'state[{index!r}]'}, expected dense tensors, "
                        "numbers, strings, and dicts and lists of them, by name, of a parameter or "
                        "of a group: nothing else can be sent or stored"
                    )

    def _attributes(self) -> tuple[dict[str, list[Any]], dict[int, Any]]:
        """Return what tells whether attributes change, by name, and what is to be held till then.

        An id is soon another object's. The optimizer's state and groups are none of them, wherever
        they are, and neither are the parameters.
        """
        own = self.torch
        held = {id(one): one for one in (own.state, own.param_groups, *own.param_groups)}
        held |= {id(one): one for one in self._names.values()}
        others = {name: one for name, one in vars(own).items() if name not in _KEPT}
        return {name: list(snapshot(one, held, _in_place)) for name, one in others.items()}, held

    def _refuse_attributes(self, before: Mapping[str, list[Any]]) -> None:
        for name, now in self._attributes()[0].items():
            if now != before.get(name, []):
                raise ConfigError(
                    f"{self._option}: a step of {type(self.torch).__name__} changes its attribute "
                    f"{name!r}, expected all that it remembers in its state of a parameter or in a "
                    "group: nothing else can be sent or stored"
                )

    # --- construction --------------------------------------------------------------------

    def _made(self, lr: float) -> Optimizer:
        option = self._option
        found = _call(option, self._build, list(self._names.values()), lr=lr)
        if not isinstance(found, Optimizer):
            raise ConfigError(f"{option} returned {found!r}, expected a torch optimizer")
        if hasattr(found.step, "_wrapped_by_lr_sched"):
            raise ConfigError(
                f"{option} makes a scheduler for its {type(found).__name__}, which nobody would "
                "step; expected the optimizer alone: its rate is that of the round, which "
                "server_scheduler, or client_lr and server_lr as functions of the round, change"
            )
        if _needs_closure(found):
            raise ConfigError(
                f"{option} is {type(found).__name__}, which computes the loss itself, maybe "
                "several times per step (its step needs a closure): split learning has the "
                "smashed data of one forward pass only"
            )
        return found


def make_scheduler(
    build: Callable[[Optimizer], LRScheduler], optimizer: UserOptimizer
) -> LRScheduler:
    """Return ``build(optimizer)``.

    ConfigError if that fails, or gives no scheduler, or one that needs more than the round.
    """
    scheduler = _call("server_scheduler", build, optimizer.torch)
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ConfigError(
            "server_scheduler is ReduceLROnPlateau, which needs a metric; a server_lr that is a "
            "function of the round can do what it does"
        )
    if not isinstance(scheduler, LRScheduler):
        raise ConfigError(f"server_scheduler returned {scheduler!r}, expected a torch scheduler")
    optimizer.also_as_made()
    return scheduler


def _call(what: str, build: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        return build(*arguments, **options)
    except _ERRORS as error:
        call = " (called with parameters and lr=…)" if "lr" in options else ""
        why = f"{type(error).__name__}: {error}{call}"
        raise ConfigError(f"{what} can't be made: {why}") from error


def _needs_closure(optimizer: Optimizer) -> bool:
    parameters = inspect.signature(optimizer.step).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return any(p.default is p.empty and p.kind not in variadic for p in parameters)


def _in_place(value: Any) -> tuple[Any, ...] | None:
    """Return what stands for a value of an attribute.

    Flags that something was done (a check, a table filled) may be set, and functions made.
    """
    if value is None or isinstance(value, bool):
        return ()
    if isinstance(value, Tensor):
        return id(value), value._version
    return () if callable(value) and not isinstance(value, nn.Module) else None


def _without(group: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in keys}


def _values(optimizer: Optimizer) -> _Groups:
    return [_copied(_without(group, ("params",))) for group in optimizer.param_groups]


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    copy: dict[str, Any] = map_tensors(torch.clone, values)
    return copy


def _same(one: Any, other: Any) -> bool:
    ones, others = list(leaves_of(one)), list(leaves_of(other))
    return len(ones) == len(others) and all(
        place == there and type(a) is type(b) and _equal(a, b)
        for (place, a), (there, b) in zip(ones, others, strict=True)
    )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


def _restored(placed: Any, value: Any, device: torch.device) -> Any:
    """Return a value of the state as it came, on the device that torch would place it on."""
    if isinstance(value, Tensor):
        return value.to(placed.device if isinstance(placed, Tensor) else device)
    if isinstance(value, (str, list, tuple, Mapping)):
        return map_tensors(lambda tensor: tensor.to(device), value)
    return placed  # a number; Adam makes tensors of old ones
