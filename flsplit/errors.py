"""What flsplit raises for things that a user, a client or a network can get wrong."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

TORCH_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)
"""What torch raises for shapes and dtypes that it can't take."""


class FlsplitError(Exception):
    """Base class of every error that flsplit raises on purpose.

    Attributes
    ----------
    client : str or None
        Whose batch it comes from, if that is known: the others can go on without this client.
    """

    client: str | None = None


class ConfigError(FlsplitError, ValueError):
    """An option has a value that can't be used, or two options contradict each other."""


class DataError(FlsplitError, ValueError):
    """A client's data can't be trained on: empty, of an unexpected kind, labels out of range."""


class ProtocolError(FlsplitError, ValueError):
    """A message lacks a field, or a field holds something else than the protocol says."""


class SegmentMismatchError(FlsplitError, ValueError):
    """Client segment, server segment and arrays don't fit together."""


class NonFiniteError(FlsplitError, ArithmeticError):
    """A loss, an activation or a gradient is NaN or infinite; no weight was changed by it."""


class StateLostError(FlsplitError):
    """A client was asked to go on but has no segment: it is new or lost its state."""


class MethodError(FlsplitError, ValueError):
    """A method did something with a step that it can't: the method is named, not a client."""


OF_A_BATCH = (DataError, SegmentMismatchError, NonFiniteError, ConfigError)
"""What a client's batch can be the cause of: also of a loss or a metric that fails."""


class LostClientsError(FlsplitError):
    """Clients that a step needed once more didn't answer: it is done again without them."""


class NotEnoughClientsError(FlsplitError, RuntimeError):
    """Fewer clients are left than ``min_available_nodes``."""


def at(where: str, error: FlsplitError) -> FlsplitError:
    """Put ``where`` in front of what an error says, unless it says so already; return it."""
    if where not in str(error):
        error.args = (f"{where}: {error}",)
    return error


@contextmanager
def located(where: str) -> Iterator[None]:
    """Put ``where`` in front of what any flsplit error raised inside the block says."""
    try:
        yield
    except FlsplitError as error:
        at(where, error)
        raise


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return how an error goes on that names something unknown: with the nearest that is known."""
    choices = list(known)
    for written in (str(name), str(name).lower()):
        if near := get_close_matches(written, choices, n=1, cutoff=0.4):
            return f"; did you mean {near[0]!r}?"
    return ""
