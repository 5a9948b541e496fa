"""The errors of this package, each of which says what was expected and what came."""

from typing import Any

_SHOWN = 120


class WireError(ValueError):
    """Something on the wire, or on its way there, does not fit the format.

    ``field`` is where it was found, such as ``records[0].entries[2].shape``.
    """

    def __init__(self, field: str, expected: str, got: Any) -> None:
        self.field = field
        self.expected = expected
        self.got = _shorten(got)
        super().__init__(f"{field}: expected {expected}, got {self.got}")


class StreamEnded(ConnectionError):  # noqa: N818 - an ordinary end is not an error
    """The stream to the other side is over, so nothing can be sent on it."""


class TokenRefused(PermissionError):  # noqa: N818 - reads as what happened
    """The token that a host has shown opens nothing; the text says why."""


class DialError(ConnectionError):
    """A host could not open a stream to the session's server.

    ``kind`` is ``unreachable``, ``certificate``, ``token``, ``version`` or ``refused``; ``remedy``
    is what a person can do about it.
    """

    def __init__(self, address: str, kind: str, cause: str, remedy: str) -> None:
        self.address = address
        self.host, _, self.port = address.rpartition(":")
        self.kind = kind
        self.cause = cause
        self.remedy = remedy
        super().__init__(f"cannot open a session stream to {address}: {cause}. {remedy}")


def _shorten(value: Any) -> str:
    # The text goes into logs: a long value from a stranger must not fill them.
    if isinstance(value, Told):
        text = str(value)
    elif isinstance(value, str | bytes):
        text = repr(value[: _SHOWN + 1])
    elif isinstance(value, list | tuple | dict):
        text = f"a {type(value).__name__} of {len(value)}"
    elif isinstance(value, int) and value.bit_length() > _SHOWN:
        text = f"an integer of {value.bit_length()} bits"
    else:
        text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


class Told(str):
    """What was found, described in words: shown as it stands, not as a quoted value."""

    __slots__ = ()
