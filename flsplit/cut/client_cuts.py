"""Different cuts for different clients: who is cut where."""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

from flsplit.errors import ConfigError

ClientCuts = str | Mapping[str, str] | Callable[[str], str]
"""A cut layer; or cut layers by patterns of clients' names (``"weak-*"``), of which the first that
fits counts, and ``"default"`` for all others; or a function of a client's name."""

DEFAULT = "default"


def check_cuts(cuts: ClientCuts) -> None:
    """Refuse what can't say where clients are cut.

    Raises
    ------
    ConfigError
        If it is no name, no mapping of names to names, and no function.
    """
    if isinstance(cuts, str) or callable(cuts):
        return
    names = isinstance(cuts, Mapping) and all(
        isinstance(key, str) and isinstance(value, str) for key, value in cuts.items()
    )
    if not (names and cuts):
        raise ConfigError(
            f"cut is {cuts!r}, expected the name of a submodule, a dict of such names by patterns "
            "of clients' names, or a function of a client's name"
        )


def cut_of(cuts: ClientCuts, client: str) -> str:
    """Return a client's cut layer.

    Raises
    ------
    ConfigError
        If there is none for this client.
    """
    if isinstance(cuts, str):
        return cuts
    found: str | None
    if callable(cuts):
        found = cuts(client)
    else:
        fitting = (cut for name, cut in cuts.items() if fnmatchcase(client, name))
        found = next(fitting, cuts.get(DEFAULT))
    if not isinstance(found, str):
        raise ConfigError(f"cut: there is {found!r} for client {client!r}, expected a submodule")
    return found


def default_cut(cuts: ClientCuts) -> str:
    """Return the cut of clients of which nothing else is said."""
    if isinstance(cuts, Mapping) and DEFAULT not in cuts:
        return next(iter(cuts.values()))
    return cut_of(cuts, DEFAULT)
