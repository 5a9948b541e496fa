"""Different cuts for different clients: who is cut where."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from flsplit.cut.splitting import Split, cut_name
from flsplit.errors import ConfigError

Place = str | tuple[str, str]
"""A cut layer, or the two of a U-shaped split, which can also be one text: ``"conv2,fc1"``."""

ClientCuts = Place | Mapping[str, Place] | Callable[..., Place]
"""A place to cut; or places by patterns of clients' names (``"weak-*"``), of which the first that
fits counts, and ``"default"`` for all others; or a function of a client's name."""

DEFAULT = "default"


def check_cuts(cuts: ClientCuts) -> None:
    """Refuse what can't say where clients are cut.

    ConfigError if it is no name, no mapping of names to names, and no function.
    """
    if isinstance(cuts, tuple) and len(cuts) == 2 and all(isinstance(cut, str) for cut in cuts):
        return
    if isinstance(cuts, str) or callable(cuts):
        return
    names = isinstance(cuts, Mapping) and all(
        isinstance(key, str) and isinstance(value, str | tuple) for key, value in cuts.items()
    )
    if not (names and cuts):
        raise ConfigError(
            f"cut is {cuts!r}, expected the name of a submodule, two of them (a tuple) for a "
            "U-shaped split, a dict of such names by patterns of clients' names, or a function of "
            "a client's name"
        )


def cut_of(cuts: ClientCuts, client: str) -> str:
    """Return a client's cut layer; ConfigError if there is none for this client."""
    if isinstance(cuts, str | tuple):
        return cut_name(cuts)
    found: Place | None
    if callable(cuts):
        found = cuts(client)
    else:
        fitting = (cut for name, cut in cuts.items() if fnmatchcase(client, name))
        found = next(fitting, cuts.get(DEFAULT))
    if not isinstance(found, str | tuple):
        raise ConfigError(f"cut: there is {found!r} for client {client!r}, expected a submodule")
    return cut_name(found)


def default_cut(cuts: ClientCuts) -> str:
    """Return the cut of clients of which nothing else is said."""
    if isinstance(cuts, Mapping) and DEFAULT not in cuts:
        return cut_name(next(iter(cuts.values())))
    return cut_of(cuts, DEFAULT)


def all_cuts(cuts: ClientCuts) -> list[str]:
    """Return every cut that a client may have.

    ConfigError if a function says it: of whom it will be asked isn't known.
    """
    if isinstance(cuts, str | tuple):
        return [cut_name(cuts)]
    if not isinstance(cuts, Mapping):
        raise ConfigError(
            "cut is a function, but one server segment for all clients begins at the earliest cut "
            "and needs to know them all: give a dict of cuts by patterns of clients' names"
        )
    return list(dict.fromkeys(map(cut_name, cuts.values())))


def joined(splits: Sequence[Split], cut: str) -> Split:
    """Return the largest client segment with the largest server segment of several cuts.

    What lies between the earliest and the latest cut is in both.

    ConfigError if no cut is the earliest, or none the latest.
    """
    earliest = max(splits, key=lambda one: len(one.server.state_dict()))
    latest = max(splits, key=lambda one: len(one.client.state_dict()))
    for one in splits:
        own = {*one.server.state_dict()} - {*earliest.server.state_dict()}
        own |= {*one.client.state_dict()} - {*latest.client.state_dict()}
        if own:
            raise ConfigError(
                f"cut: of {earliest.cut!r}, {one.cut!r} and {latest.cut!r} none is the earliest or "
                f"the latest, because of {min(own)!r}; expected cuts one after the other"
            )
    return Split(latest.client, earliest.server, cut, earliest.keys)
