"""Looks at a model with one batch before it is split: what crosses, and whose its state is."""

import copy
import difflib
import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flsplit.cut.cut_errors import (
    CrossingError,
    CutError,
    EmptySegmentError,
    SharedStateError,
    UnknownCutError,
    listed,
)
from flsplit.cut.private import Unseen
from flsplit.cut.sides import one_side
from flsplit.cut.stretch import Crossing, aliases, for_tail, run_from_cut, run_to_cut, tensor_at
from flsplit.cut.survey import Call, Passage, State, Survey, Value
from flsplit.cut.trace import map_tree, tensors_in
from flsplit.cut.watch import eager, instrument, place_of, places_of, plain_copy
from flsplit.errors import TORCH_ERRORS
from flsplit.seeds import seeded

_TRIES = 3
"""A random number that seems to be drawn by forward may be another thread's: Flower's draw some.
Forward draws each time."""


_LARGE = 2**26
"""Bytes of a model's weights that are worth looking for what can be freed, which takes 0.1 s."""


@dataclass(frozen=True)
class Look:
    """What was found out about a cut."""

    passage: Passage  # what crosses, on the way that the batch took
    before: frozenset[str]  # the modules that are done before the cut
    # Names of the parameters and buffers that each side needs. What is frozen may be on both.
    client: frozenset[str]
    server: frozenset[str]
    item: int = 0  # of two cuts: which of the tensors that the second layer returns comes back


def look(
    model: nn.Module,
    cut: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    share: frozenset[str] = frozenset(),
) -> Look:
    """Follow the forward of a copy of a model with one batch.

    Raises
    ------
    UnknownCutError, CrossingError, SharedStateError, EmptySegmentError, CutError
        If the model can't be cut like this.
    """
    try:
        return _look(model, cut, args, kwargs, share)
    finally:
        free_copies(model)


def free_copies(model: nn.Module) -> None:
    """Free copies of a large model now: what ran is in circles of references for a while."""
    if sum(parameter.nbytes for parameter in model.parameters()) > _LARGE:
        gc.collect()


def _look(
    model: nn.Module,
    cut: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    share: frozenset[str],
) -> Look:
    first, second = places_of(cut)
    with undisturbed(args, kwargs):
        ghost = plain_copy(model)
        once = Survey(ghost, *fresh(args, kwargs))
        for _ in range(_TRIES):
            survey = Survey(ghost, *fresh(args, kwargs), before=once)
            call = call_at(survey, model, first)
            end = call_at(survey, model, second) if second else None
            if not call.drawn:
                break
    for place in (call, *([end] if end else [])):
        check_call(place)
    if end and end.reached <= call.reached:
        raise CutError(
            f"the second cut {second!r} doesn't come after the first one {first!r}: name the last "
            "layer before the server's and the server's last, in the order of forward"
        )
    passage = survey.passage(call, end)
    _check_values(survey, call, passage, first, share)
    _check_state(survey, call, end, cut)
    client, server = divided(survey, call, end)
    if not any(_is_trained(state) and not server.isdisjoint(state.names) for state in _all(survey)):
        where = f"between {first!r} and {second!r}" if second else f"after {first!r}"
        raise EmptySegmentError(
            f"no parameters of {type(model).__name__} come {where}, so the server would have "
            "nothing to train: cut earlier"
        )
    passage.trace.to_json()  # what can't be described is refused here
    last = end or call
    around = {c.name for c in last.around}
    before = {c.name for c in survey.calls if c.end <= last.reached} - around
    item = _check_tail(survey, model, call, end, passage) if end else 0
    return Look(passage, frozenset(before), client, server, item)


def _check_tail(survey: Survey, model: nn.Module, call: Call, end: Call, passage: Passage) -> int:
    """Refuse a second cut at which more than one tensor comes back; return which one it is."""
    assert passage.tail is not None  # there are two cuts
    back = {k: value for k, value in passage.tail.values.items() if k not in passage.kept}
    # What depends on nothing but shapes is the same at the client.
    late = [value for value in passage.tail.reads if value.made >= call.reached]
    reads = [value for value in late if value.inputs or value.learnt]
    returned = survey.values_in(end.returned)
    found = [n for n, value in enumerate(returned) if any(value is one for one in back.values())]
    if len(back) != 1 or not found or reads:
        kinds = [value.what for value in (*back.values(), *reads)]
        raise CrossingError(
            f"after the second cut {end.name!r} the client's last layers need {len(kinds)} values "
            f"of the server's ({listed(kinds, limit=4)}), but only one tensor may come back, and "
            f"it has to be what {end.name!r} returns. {nearest(survey, end)}"
        )
    if not any(_is_trained(s) and s.uses and s.uses[-1] >= end.reached for s in _all(survey)):
        raise EmptySegmentError(
            f"no parameters of {type(model).__name__} come after the second cut {end.name!r}: the "
            "client's last layers would have nothing to train. Cut earlier"
        )
    return found[0]


def _all(survey: Survey) -> Iterable[State]:
    return survey.state.values()


def _is_trained(state: State) -> bool:
    return isinstance(state.tensor, nn.Parameter)


def fresh(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a copy of a batch: forward may change it in place."""

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.detach().clone().requires_grad_(leaf.requires_grad)
        return copy.deepcopy(leaf)

    return map_tree(copied, (tuple(args), dict(kwargs)))  # type: ignore[no-any-return]


@contextmanager
def undisturbed(args: Any, kwargs: Any) -> Iterator[None]:
    """Leave all random generators as they are, and measurements of memory."""
    device = next((t.device for t in tensors_in((args, kwargs))), None)
    # Whoever measures what autograd keeps is not to measure this.
    unmeasured = torch.autograd.graph.saved_tensors_hooks(_with_version, _unchanged)
    with seeded(0, device), unmeasured:
        yield


def call_at(survey: Survey, model: nn.Module, cut: str) -> Call:
    """Return the call that a cut lies behind, or say why there is none."""
    name, nth = place_of(cut)
    calls = survey.calls_of(name)
    if not calls:
        raise UnknownCutError(
            f"forward never calls {cut!r} ({type(model.get_submodule(name)).__name__}) itself: it "
            "may only hold other modules or weights, or not be used at all. "
            "flsplit.cuts(model, example_input) lists every place to cut"
        )
    if nth > len(calls) or (len(calls) > 1 and "#" not in cut):
        raise UnknownCutError(
            f"forward calls {name!r} {len(calls)} times, so it doesn't say where to cut: "
            f"'{name}#1' is after the first. {nearest(survey, calls[0])}"
        )
    return calls[nth - 1]


def find_layer(model: nn.Module, cut: str) -> None:
    """Refuse a cut that names no submodule.

    Raises
    ------
    UnknownCutError
        It names the nearest.
    """
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    if place_of(cut)[0] in names:
        return
    close = difflib.get_close_matches(str(cut), names, n=5, cutoff=0.4)
    near = f"The nearest names are {listed(close)}. " if close else ""
    outermost = listed([name for name in names if "." not in name], limit=12)
    raise UnknownCutError(
        f"{type(model).__name__} has no submodule {cut!r} to cut after. {near}At the top there are "
        f"{outermost or 'none'}. flsplit.cuts(model, example_input) lists every place to cut"
    )


def check_call(call: Call) -> None:
    """Refuse a cut that lies where the other side can't follow."""
    if not call.grad:
        raise CutError(
            f"the cut {call.name!r} lies in a region without gradients (torch.no_grad, a reentrant "
            "checkpoint): cut outside it"
        )
    if call.drawn:
        raise CutError(
            f"before the cut {call.name!r}, forward draws a random number in Python or NumPy, "
            "which the other side can't repeat: draw it with torch"
        )


def _with_version(tensor: Tensor) -> tuple[Tensor, int]:
    """Detached: a node that keeps its own output, and that its graph, would never be freed."""
    with Unseen():  # it is none of forward's calls
        return (tensor if tensor.is_leaf else tensor.detach()), tensor._version


def _unchanged(kept: tuple[Tensor, int]) -> Tensor:
    """Do what autograd leaves out where there are hooks: refuse what was changed in place."""
    tensor, version = kept
    if tensor._version != version:
        raise RuntimeError("a variable needed for gradients has been modified in place")
    return tensor


# ----------------------------------------------------------------------------------- clean cuts


def clean(
    survey: Survey, share: frozenset[str] = frozenset(), *, several: bool = False
) -> Iterator[tuple[Call, list[Value]]]:
    """Return the module calls after which a single tensor crosses, one for each place.

    Of several that end at the same place, such as ``layer1`` and ``layer1.1``, it is the
    innermost, which returns first. What is made of inputs in ``share`` may cross beside it; where
    ``several``, any number of tensors.
    """
    places = set[int]()
    for call in survey.calls:
        if call.reached in places or len(survey.calls_of(call.name)) > 1 or not _may_be_cut(call):
            continue
        values = survey.crossing(call)
        smashed = [value for value in values if value.learnt or not value.inputs <= share]
        if not smashed or (len(smashed) > 1 and not several):
            continue
        if any(spans(s, call) for s in survey.state.values()):
            continue
        if not any(_is_servers(s, call) for s in survey.state.values()):
            continue
        passage = survey.passage(call)
        if passage.item is None and (
            not (share or several) or _unshared(survey, call, passage, share)
        ):
            continue
        places.add(call.reached)
        yield call, [*smashed, *(value for value in values if value not in smashed)]


def _is_servers(state: State, call: Call) -> bool:
    return isinstance(state.tensor, nn.Parameter) and _sides(state, call)[1]


def _may_be_cut(call: Call) -> bool:
    return call.grad and not call.drawn and not call.inside_torch


def nearest(survey: Survey, call: Call) -> str:
    """Return a sentence about the clean cuts around a call."""
    found = [c for c, _ in clean(survey)]
    before = [f"{c.name!r} (before it)" for c in found if c.reached < call.reached][-1:]
    after = [f"{c.name!r} (after it)" for c in found if c.reached > call.reached][:1]
    if both := [*before, *after]:
        return f"The nearest cuts that a single tensor crosses are {' and '.join(both)}"
    return "No single tensor crosses anywhere near it"


# ---------------------------------------------------------------------------------------- checks


def _check_values(
    survey: Survey, call: Call, passage: Passage, cut: str, share: frozenset[str]
) -> None:
    for value in _unshared(survey, call, passage, share):
        shape = f" {value.spec.shape}" if value.spec else ""
        names = ", ".join(map(repr, sorted(value.inputs - share)))
        raise CrossingError(
            f"after {cut!r} the server needs {value.what}{shape}, which is made of the input "
            f"{names} alone: cut elsewhere, or allow it with share=({names},). "
            f"{nearest(survey, call)}"
        )


def _unshared(survey: Survey, call: Call, passage: Passage, share: frozenset[str]) -> list[Value]:
    """Return what crosses and is made of inputs alone that may not leave the client."""
    # The layer's own output was named by the user: it may cross even if nothing was learnt yet.
    own = [id(value) for value in survey.values_in(call.returned)]
    return [
        value
        for value in [*passage.values.values(), *passage.reads]
        if value.inputs - share and not value.learnt and id(value) not in own
    ]


def _sides(state: State, call: Call, end: Call | None = None) -> tuple[bool, bool]:
    """Tell whether the client uses a parameter or buffer, and whether the server does."""
    at_server = [call.reached <= use and not (end and end.reached <= use) for use in state.uses]
    return not all(at_server), any(at_server)


def spans(state: State, call: Call, end: Call | None = None) -> bool:
    """Tell whether both sides of a cut would change a parameter or buffer."""
    changes = state.tensor.requires_grad or state.tensor._version != state.version
    return changes and all(_sides(state, call, end))


def _check_state(survey: Survey, call: Call, end: Call | None, cut: str) -> None:
    both = [state for state in survey.state.values() if spans(state, call, end)]
    if both:
        names = [" = ".join(state.names) for state in both]
        raise SharedStateError(
            f"a cut at {cut!r} leaves {listed(names)} on both sides: weights are tied, or a module "
            "is called before and after the cut. Two machines can't train one tensor: untie them "
            "(give each side its own module), freeze them, or cut where all their uses are on one "
            f"side. {nearest(survey, call)}"
        )


def divided(
    survey: Survey, call: Call, end: Call | None = None
) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of the state that the client and the server need."""
    client, server = set[str](), set[str]()
    for state in survey.state.values():
        sides = _sides(state, call, end)
        if not state.uses:
            unused = _unused_is_clients(survey, state, call, end)
            sides = unused, not unused
        for names, needs in zip((client, server), sides, strict=True):
            if needs:
                names.update(state.names)
    return frozenset(client), frozenset(server)


def _unused_is_clients(survey: Survey, state: State, call: Call, end: Call | None) -> bool:
    """Give what forward never uses to the side of the innermost called module that holds it."""
    holder = state.names[0]
    while "." in holder:
        holder = holder.rpartition(".")[0]
        if calls := survey.calls_of(holder):
            of_tail = end is not None and calls[0].start >= end.reached
            return calls[0].reached <= call.reached or of_tail
    return False


# ------------------------------------------------------------------------------------ comparing


def verify(
    model: nn.Module, cut: str, found: Look, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Run one step whole and split, on copies, and compare the results.

    Outputs, gradients and buffers must agree up to the order of a sum: what no rule sees (a hook
    on a value that crosses, say) shows here. There is one more model in memory at a time: first
    the whole, then its parts, each with its own side's weights.

    Raises
    ------
    CutError
        If they differ.
    """
    expected, result, learns = _whole_step(model, args, kwargs)
    free_copies(model)
    client, server = (plain_copy(one_side(model, names)) for names in (found.client, found.server))
    for half in (client, server):
        instrument(half, cut, found.before)
    with undisturbed(args, kwargs), eager():
        args, kwargs = fresh(args, kwargs)
        trace, held = run_to_cut(client, cut, args, kwargs, [found.passage])
        if trace != found.passage.trace:
            raise CutError(f"forward takes another way before {cut!r} when it is run again")
        values = {key: held[key] for key in found.passage.values}
        kept = {key: held[key] for key in found.passage.kept}
        crossing = Crossing(values, trace, aliases(values), kept=kept)
        sent = crossing.detached()
        try:
            output = middle = run_from_cut(server, cut, sent)
            if found.passage.tail:
                middle = tensor_at(found.item, output)
                tail = for_tail(found.passage, middle.detach(), crossing)
                output = run_from_cut(client, places_of(cut)[1], tail)
        except TORCH_ERRORS as error:
            if isinstance(error, CutError):
                raise
            raise CutError(
                f"cut at {cut!r}, the rest of forward fails, and uncut it doesn't: {error}"
            ) from error
        if learns:
            _backward(output)
            if found.passage.tail and (gradient := tail.given.grad) is not None:
                middle.backward(gradient)
        if learns and (crossing.learning or kept):
            gradients = {key: sent.values[key].grad for key in crossing.learning}
            crossing.backward(gradients, tail.gradients if kept else {})
    pairs: list[tuple[str, Tensor | None, Tensor | None]] = [
        ("an output", *both) for both in zip(expected, tensors_in(output), strict=True)
    ]
    theirs = {half: dict(_named(half)) for half in (client, server)}
    for name, tensor in result.items():
        other = theirs[client if name in found.client else server][name]
        if not isinstance(other, nn.Parameter):
            pairs.append((name, tensor, other))
        elif learns:
            pairs.append((f"the gradient of {name}", tensor, other.grad))
    for what, a, b in pairs:
        if a is not b and (a is None or b is None or not _close(a, b)):
            raise CutError(f"cut at {cut!r}, the model computes something else: {what} differs")


def _whole_step(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Tensor], dict[str, Tensor | None], bool]:
    """Return what a copy computes: its outputs, gradients and buffers, and whether it can learn."""
    whole = plain_copy(model)
    with undisturbed(args, kwargs), eager():
        own_args, own_kwargs = fresh(args, kwargs)
        output = whole(*own_args, **own_kwargs)
        try:
            _backward(output)
            learns = torch.is_grad_enabled()
        except RuntimeError:  # this model can't be trained in one piece, either
            learns = False
    _check_frozen(model, whole)
    result = {n: t.grad if isinstance(t, nn.Parameter) else t for n, t in _named(whole)}
    # Without their graph, which holds the weights.
    return [tensor.detach() for tensor in tensors_in(output)], result, learns


def _check_frozen(before: nn.Module, after: nn.Module) -> None:
    """Refuse a forward that moves frozen parameters: they are sent once, and never averaged."""
    pairs = zip(before.named_parameters(), after.parameters(), strict=True)
    for (name, old), new in pairs:
        if not (old.requires_grad or torch.equal(old, new) or bool(old.isnan().any())):
            raise CutError(
                f"forward changes the frozen parameter {name!r} itself (a moving average?): make "
                "it a buffer (register_buffer), which is kept and averaged as part of the state"
            )


def _backward(output: Any) -> None:
    floats = [t for t in tensors_in(output) if t.requires_grad]
    if floats and torch.is_grad_enabled():
        torch.stack([t.abs().double().square().mean() for t in floats]).sum().backward()  # type: ignore[no-untyped-call]


def _named(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.layout is not torch.strided or a.is_nested:
        a, b = a.to_dense(), b.to_dense()
    if torch.equal(a, b):
        return True
    tolerance = 1e-2 if a.dtype in (torch.float16, torch.bfloat16) else 1e-4
    return torch.allclose(a.detach(), b.detach(), rtol=tolerance, atol=1e-6, equal_nan=True)
