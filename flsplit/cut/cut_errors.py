"""What can be wrong with a cut."""

from collections.abc import Mapping, Sequence

from flsplit.errors import FlsplitError

GIVE_AN_EXAMPLE = "give split() an example of the model's input, or a strategy: example=…"


class CutError(FlsplitError, ValueError):
    """A model can't be cut as asked. Base class of everything that `flsplit.cut` raises."""


class UnknownCutError(CutError):
    """No submodule has that name, or ``forward`` doesn't call it that often."""


class ExampleError(CutError):
    """The model has to be run once to be cut, and can't be: an example of its input is needed."""


class CrossingError(CutError):
    """A value crosses the cut that mustn't, or is needed and didn't cross."""


class SharedStateError(CutError):
    """Both segments would train the same parameter or buffer."""


class EmptySegmentError(CutError):
    """The server segment has no parameters, so there is nothing to train on the server."""


class PathError(CutError):
    """The two sides' forwards went different ways before the cut."""


class StateDictError(CutError):
    """A state dict lacks keys of its segment or has keys that are not of its segment."""


def listed(names: list[str], limit: int = 6) -> str:
    """Return quoted names for a message, the first `limit` of them and how many more there are."""
    shown = ", ".join(repr(name) for name in names[:limit])
    left_out = len(names) - limit
    return f"{shown} and {left_out} more" if left_out > 0 else shown


def check_keys(what: str, found: Mapping[str, object], expected: Sequence[str]) -> None:
    """Raise StateDictError if a state dict has other keys than are expected."""
    missing = [key for key in expected if key not in found]
    unexpected = sorted(set(found) - set(expected))
    if missing or unexpected:
        raise StateDictError(
            f"{what} should have {len(expected)} keys and has {len(found)}. "
            f"Missing: {listed(missing) or 'none'}. Unexpected: {listed(unexpected) or 'none'}"
        )
