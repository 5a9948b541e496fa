"""A client's parts at work, one after the other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flsplit.client_parts.client_part import (
    HOOKS,
    Argument,
    ClientPart,
    ClientWhere,
    PartWhere,
    overrides,
    seed_at,
)
from flsplit.client_parts.compression import Compression, Packed, compressing
from flsplit.client_parts.defences import Shuffle
from flsplit.client_parts.finding import build_parts
from flsplit.cut.smashed import CutGradient, Smashed, differentiable
from flsplit.errors import ConfigError, ProtocolError
from flsplit.nested import map_tensors

_MEMORY = "memory:"


@dataclass(frozen=True)
class ClientStep:
    """A client's step, as its parts are told of it."""

    seed: int
    client: str
    round: int
    step: int
    segment: nn.Module
    round_start: Mapping[str, Tensor]

    def at(self, index: int, hook: str, labels: Any = None) -> ClientWhere:
        """Return the place of one hook of the part at ``index``."""
        seed = seed_at(self.seed, self.client, self.round, self.step, index, hook)
        where = (self.client, self.round, self.step, seed)
        return ClientWhere(*where, self.segment, self.round_start, labels=labels)


class PartChain:
    """The parts that a plan describes, in the order of the plan.

    ``own`` are classes that the ClientApp has beside those that are installed.
    """

    def __init__(self, described: str, own: Sequence[type[ClientPart]], client: str) -> None:
        self.described = described
        self.parts = build_parts(described, own, client)
        self._arguments: list[dict[str, Argument]] = [part.arguments() for part in self.parts]
        self._hooks = {
            hook: [(index, one) for index, one in enumerate(self.parts) if overrides(one, hook)]
            for hook in HOOKS
        }
        self.check_state()

    @property
    def needs_round_start(self) -> bool:
        """Whether a part wants to know the parameters at the round's beginning."""
        return any(part.needs_round_start for part in self.parts)

    def smashed(self, step: ClientStep, smashed: Smashed) -> Smashed:
        """Return the smashed data that leaves; of several values those that a layer computed."""
        if not self._hooks["smashed"]:
            return smashed
        if isinstance(smashed, Tensor):
            return self._edited("smashed", step, smashed)
        values = {
            name: self._edited("smashed", step, value)
            if name not in smashed.raw and differentiable(value)
            else value
            for name, value in smashed.values.items()
        }
        return replace(smashed, values=values)

    def cut_gradients(self, step: ClientStep, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return the cut-layer gradients to back-propagate, of each value that needs one."""
        return [self._edited("cut_gradient", step, one) for one in gradients]

    def loss(self, step: ClientStep, inputs: Any, smashed: Any, labels: Any) -> Tensor | None:
        """Return the sum of the parts' terms, None if there are none."""
        terms = []
        for index, part in self._hooks["loss"]:
            term = part.loss(step.at(index, "loss"), inputs, smashed, labels)
            if term is None:
                continue
            if not (isinstance(term, Tensor) and term.ndim == 0 and term.is_floating_point()):
                raise ConfigError(f"{_told(part, 'loss')} {_kind(term)}, expected a scalar")
            if term.requires_grad:
                terms.append(term)
        return torch.stack(terms).sum() if terms else None

    def shuffled(
        self, step: ClientStep, smashed: Smashed, inputs: Any, labels: Any, rows: Sequence[int]
    ) -> tuple[Smashed, Any, Any, Tensor]:
        """Return smashed data and all that goes with it in another order of rows.

        These are the inputs, of which last layers at the client may need some, the labels, and
        which examples the rows are.
        """
        examples = torch.tensor(rows)
        for index, part in enumerate(self.parts):
            if isinstance(part, Shuffle):
                if not isinstance(smashed, Tensor):
                    raise ConfigError(
                        "client part 'shuffle': several values cross, which may have their rows in "
                        "other dimensions; it takes smashed data that is one tensor"
                    )
                order = part.order(step.at(index, "order"), len(rows))
                smashed = smashed[order.to(smashed.device)]
                inputs, labels = (_in_order(one, order) for one in (inputs, labels))
                examples = examples[order]
        return smashed, inputs, labels, examples

    def pack(self, smashed: Smashed, rows: Tensor) -> dict[str, Packed]:
        """Return what is sent in fewer bytes, by value; ``""`` is smashed data that is one."""
        part = compressing(self.parts, "smashed-data")
        if part is None:
            return {}
        values = {"": smashed} if isinstance(smashed, Tensor) else smashed.values
        raw = () if isinstance(smashed, Tensor) else smashed.raw
        if part.uses_rows and (lost := [n for n, one in values.items() if len(one) != len(rows)]):
            raise ConfigError(
                f"client part {part.name!r}: value {lost[0]!r} doesn't have the batch in front"
            )
        return {
            name: part.pack(one, part.memory_of(name), rows)
            for name, one in values.items()
            if differentiable(one) and name not in raw
        }

    def output_gradient(
        self, step: ClientStep, gradient: Tensor, labels: Any, rows: Tensor | None
    ) -> tuple[Tensor, Packed | None, dict[str, Tensor]]:
        """Return the gradient that goes up at the second cut, and how it is sent, if packed.

        ``rows`` says which examples these are.

        What is to be remembered of that once the step is done comes last, for :meth:`remember`.
        """
        for index, part in self._hooks["output_gradient"]:
            where = step.at(index, "output_gradient", labels)
            gradient = _called(part, "output_gradient", where, gradient)
        sends = compressing(self.parts, "output-gradient")
        if sends is None:
            return gradient, None, {}
        memory = dict(sends.memory_of(""))  # a copy: the step may be asked for again
        packed = sends.pack(gradient, memory, rows)
        return gradient, packed, {_MEMORY + name: one for name, one in memory.items()}

    def remember(self, stays: Mapping[str, Tensor]) -> None:
        """Remember what :meth:`output_gradient` said, which may be among other things."""
        if part := compressing(self.parts, "output-gradient"):
            own = {name: one for name, one in stays.items() if name.startswith(_MEMORY)}
            part.memory_of("").update({n.removeprefix(_MEMORY): one for n, one in own.items()})

    def unpack(self, record: str, key: str, packed: Packed) -> Tensor:
        """Return what the server sent packed in a record."""
        part = compressing(self.parts, record)
        if part is None:
            raise ProtocolError(f"packed: {record!r} came packed, which the plan doesn't say")
        return part.unpack(packed, {})

    def forget(self) -> None:
        """Let compression begin anew: something was lost on the way."""
        for part in self.parts:
            if isinstance(part, Compression):
                part.forget()

    def gradients(self, step: ClientStep, parameters: Sequence[nn.Parameter]) -> None:
        """Let the parts edit the gradients."""
        for index, part in self._hooks["gradients"]:
            part.gradients(step.at(index, "gradients"), parameters)

    def _edited(self, hook: str, step: ClientStep, tensor: Tensor) -> Tensor:
        for index, part in self._hooks[hook]:
            tensor = _called(part, hook, step.at(index, hook), tensor)
        return tensor

    # --- state ---------------------------------------------------------------------------

    def check_state(self) -> None:
        """Refuse parts that remember something and don't say it."""
        for part, arguments in zip(self.parts, self._arguments, strict=True):
            part.check_state(arguments)

    def state(self) -> dict[int, dict[str, Any]]:
        """Return what the parts remember, by their index."""
        found = {}
        for index, part in enumerate(self.parts):
            state = part.state_dict()
            for name, value in state.items():
                if not isinstance(value, (Tensor, bool, int, float, str)):
                    raise ConfigError(
                        f"client part {part.name!r}: state_dict()[{name!r}] is {_kind(value)}, "
                        "expected a tensor, a number, a string or a boolean"
                    )
            if state:  # copied: the next forward pass may be undone
                found[index] = {
                    name: value.detach().clone() if isinstance(value, Tensor) else value
                    for name, value in state.items()
                }
        return found

    def load(self, state: Mapping[int, Mapping[str, Any]]) -> None:
        """Go on from what was remembered."""
        for index, part in enumerate(self.parts):
            if overrides(part, "state_dict"):
                part.load_state_dict(state.get(index, {}))

    def follow(self, before: "PartChain") -> None:
        """Go on with what the parts of the round before remember, where the names are the same."""
        for old, new in zip(before.parts, self.parts, strict=False):
            if old.name == new.name:
                new.load_state_dict(old.state_dict())


def _in_order(tree: Any, order: Tensor) -> Any:
    def ordered(one: Tensor) -> Tensor:
        has_rows = one.ndim and len(one) == len(order)
        return one[order.to(one.device)] if has_rows else one

    return map_tensors(ordered, tree)


def sent_down(
    parts: Sequence[ClientPart],
    seed: int,
    client: str,
    round_: int,
    step: int,
    gradient: CutGradient,
    labels: Any = None,
) -> CutGradient:
    """Return the cut-layer gradient that goes down to a client, edited by the parts' ``down``."""
    editing = [(index, part) for index, part in enumerate(parts) if overrides(part, "down")]
    if not editing:
        return gradient

    def edited(one: Tensor) -> Tensor:
        for index, part in editing:
            own = seed_at(seed, client, round_, step, index, "down")
            where = PartWhere(client, round_, step, own, labels=labels)
            one = _called(part, "down", where, one)
        return one

    found: CutGradient = map_tensors(edited, gradient)
    return found


def _called(part: ClientPart, hook: str, where: PartWhere, tensor: Tensor) -> Tensor:
    found = getattr(part, hook)(where, tensor)
    if not (isinstance(found, Tensor) and found.shape == tensor.shape):
        expected = f"expected a tensor of shape {tuple(tensor.shape)}"
        raise ConfigError(f"{_told(part, hook)} {_kind(found)}, {expected}")
    if hook == "smashed" and tensor.requires_grad and not found.requires_grad:
        raise ConfigError(
            f"{_told(part, hook)} a detached tensor, through which no gradient would come back to "
            "the client segment; compute it without detach() and no_grad()"
        )
    return found


def _told(part: ClientPart, hook: str) -> str:
    return f"client part {part.name!r}: {hook} returned"


def _kind(value: object) -> str:
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
    return f"a {type(value).__name__}{shape}"
