"""Looks at a model with one batch before it is split: what crosses, and whose its state is."""

import copy
import ctypes
import difflib
import gc
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flsplit.cut.clean_cuts import nearest, unshared
from flsplit.cut.cut_errors import (
    CrossingError,
    CutError,
    EmptySegmentError,
    SharedStateError,
    UnknownCutError,
    listed,
)
from flsplit.cut.partial_forward import instrument, place_of, places_of
from flsplit.cut.private import Unseen, has_saving_hooks
from flsplit.cut.scripted import plain_copy
from flsplit.cut.stretch import run_to_layer, tensor_at
from flsplit.cut.survey import Call, Passage, State, Survey
from flsplit.cut.trace import map_tree, tensors_in
from flsplit.cut.whose_state import divided, spans
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

    UnknownCutError, CrossingError, SharedStateError, EmptySegmentError or CutError if the model
    can't be cut like this.
    """
    try:
        return _look(model, cut, args, kwargs, share)
    finally:
        free_copies(model)


def free_copies(model: nn.Module) -> None:
    """Free copies of a large model now: what ran is in circles of references for a while.

    And give the memory back: glibc keeps all pieces below 32 MiB, an activation each.
    """
    if sum(parameter.nbytes for parameter in model.parameters()) > _LARGE:
        gc.collect()
        if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
            trim(0)


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
        free_copies(model)
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
    if passage.item is not None and not _rows_in_front(model, first, passage, args, kwargs):
        passage = replace(passage, item=None)
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


def _rows_in_front(
    model: nn.Module, cut: str, passage: Passage, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool:
    """Tell whether the rows of a batch are the first dimension of the only tensor that crosses.

    They aren't in what a recurrent network returns that takes the time first, or its last hidden
    state. Such tensors are never put behind one another, as those of several clients are.
    """
    (value,) = passage.values.values()
    shape = value.spec.shape if value.spec else ()
    rows = {tensor.shape[0] for tensor in tensors_in((args, kwargs)) if tensor.dim()}
    if len(rows) != 1 or not shape:
        return True  # nobody can tell: a graph's nodes and edges, say
    (known,) = rows
    if shape.count(known) == 1 or shape[0] != known:
        return bool(shape[0] == known)
    # More than one dimension has this size: the one that follows another number of rows is it.
    other = known - 1 or 2

    def resized(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.dim():
            return torch.cat([leaf, leaf])[:other]
        return leaf

    ghost = plain_copy(model)
    instrument(ghost, cut)
    try:
        with undisturbed(args, kwargs), torch.no_grad():
            batch = map_tree(resized, fresh(args, kwargs))
            output = run_to_layer(ghost, cut, *batch)
    except TORCH_ERRORS:
        return True  # the model takes no other number of rows
    return bool(tensor_at(passage.item or 0, output).shape[:1] == (other,))


def _check_tail(survey: Survey, model: nn.Module, call: Call, end: Call, passage: Passage) -> int:
    """Refuse a second cut at which more than one tensor comes back; return which one it is."""
    assert passage.tail is not None  # there are two cuts
    back = {k: value for k, value in passage.tail.values.items() if k not in passage.kept}
    # What depends on nothing but shapes is the same at the client.
    late = [value for value in passage.tail.reads if value.made >= call.reached]
    reads = [value for value in late if value.inputs or value.learnt]
    returned = survey.values_of(end.returned)
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
    unmeasured: AbstractContextManager[object] = nullcontext()
    if has_saving_hooks():  # whoever measures what autograd keeps is not to measure this
        # Only then: no torch.func.grad runs among them.
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


def _check_values(
    survey: Survey, call: Call, passage: Passage, cut: str, share: frozenset[str]
) -> None:
    for value in unshared(survey, call, passage, share):
        shape = f" {value.spec.shape}" if value.spec else ""
        names = ", ".join(map(repr, sorted(value.inputs - share)))
        raise CrossingError(
            f"after {cut!r} the server needs {value.what}{shape}, which is made of the input "
            f"{names} alone: cut elsewhere, or allow it with share=({names},), in client_app and "
            f"in the strategy. {nearest(survey, call)}"
        )


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
