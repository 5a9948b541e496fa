"""Cuts after which a single tensor crosses."""

import inspect
from collections.abc import Iterable, Iterator

from torch import nn

from flsplit.cut.cut_errors import CutError, listed
from flsplit.cut.survey import Call, Passage, State, Survey, Value
from flsplit.cut.whose_state import sides, spans


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
            not (share or several) or unshared(survey, call, passage, share)
        ):
            continue
        places.add(call.reached)
        yield call, [*smashed, *(value for value in values if value not in smashed)]


def _is_servers(state: State, call: Call) -> bool:
    return isinstance(state.tensor, nn.Parameter) and sides(state, call)[1]


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


def shared_inputs(model: nn.Module, share: str | Iterable[str]) -> frozenset[str]:
    """Return the names of the inputs that may be sent.

    CutError if one is no argument of the model's forward, which may take any: then none is.
    """
    names = frozenset([share] if isinstance(share, str) else share)
    known = inspect.signature(model.forward).parameters if names else {}
    anything = any(one.kind is one.VAR_KEYWORD for one in known.values())
    if not anything and (unknown := sorted(names - known.keys())):
        raise CutError(
            f"share has {listed(unknown)}, but the inputs of {type(model).__name__} are "
            f"{listed(list(known))}"
        )
    return names


def unshared(survey: Survey, call: Call, passage: Passage, share: frozenset[str]) -> list[Value]:
    """Return what crosses and is made of inputs alone that may not leave the client."""
    # The layer's own output was named by the user: it may cross even if nothing was learnt yet.
    own = [id(value) for value in survey.values_of(call.returned)]
    return [
        value
        for value in [*passage.values.values(), *passage.reads]
        if value.inputs - share and not value.learnt and id(value) not in own
    ]
