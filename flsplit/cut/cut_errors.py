"""What can be wrong with a cut."""

from flsplit.errors import FlsplitError


class CutError(FlsplitError, ValueError):
    """A model can't be cut as asked. Base class of everything that `flsplit.cut` raises."""


class UnknownCutError(CutError):
    """No submodule has that name, or ``forward`` doesn't call it exactly once."""


class UntraceableError(CutError):
    """The ``forward`` of the model, or of a module around the cut, can't be taken apart."""


class CrossingError(CutError):
    """Something else than the one tensor that the cut layer returns crosses the cut."""


class SharedStateError(CutError):
    """Both segments need the same parameter or buffer."""


class UnusedStateError(CutError):
    """A parameter or buffer belongs to neither segment, because ``forward`` never uses it."""


class EmptySegmentError(CutError):
    """The server segment has no parameters, so there is nothing to train on the server."""


class StateDictError(CutError):
    """A state dict lacks keys of its segment or has keys that are not of its segment."""


def listed(names: list[str], limit: int = 6) -> str:
    """Return quoted names for a message, the first `limit` of them and how many more there are."""
    shown = ", ".join(repr(name) for name in names[:limit])
    left_out = len(names) - limit
    return f"{shown} and {left_out} more" if left_out > 0 else shown
