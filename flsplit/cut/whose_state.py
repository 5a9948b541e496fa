"""On which side of a cut a parameter or buffer is used."""

from flsplit.cut.survey import Call, State, Survey


def sides(state: State, call: Call, end: Call | None = None) -> tuple[bool, bool]:
    """Tell whether the client uses a parameter or buffer, and whether the server does."""
    at_server = [call.reached <= use and not (end and end.reached <= use) for use in state.uses]
    return not all(at_server), any(at_server)


def spans(state: State, call: Call, end: Call | None = None) -> bool:
    """Tell whether both sides of a cut would change a parameter or buffer."""
    changes = state.tensor.requires_grad or state.tensor._version != state.version
    return changes and all(sides(state, call, end))


def divided(
    survey: Survey, call: Call, end: Call | None = None
) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of the state that the client and the server need."""
    client, server = set[str](), set[str]()
    for state in survey.state.values():
        needed = sides(state, call, end)
        if not state.uses:
            unused = _unused_is_clients(survey, state, call, end)
            needed = unused, not unused
        for names, needs in zip((client, server), needed, strict=True):
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
