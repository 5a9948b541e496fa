"""How an exception of a client is answered, and how much of it is heard."""

from flwr.app import Error, Message

from flsplit.flower_internals import CLIENT_RAISED

MAX_REASON = 2000
"""Characters of a reason that are kept: it stands in logs and in the history."""


def raised(message: Message, error: Exception) -> Message:
    """Answer a message with an exception's kind and text, and the code that Flower gives it."""
    return Message(Error(CLIENT_RAISED, f"{type(error).__name__}: {error}"), reply_to=message)


def shortened(reason: str, most: int = MAX_REASON) -> str:
    """Return the beginning of what somebody else says, without what can't be printed in a line."""
    beginning = reason[: most + 1]  # so that a long one costs no more
    shown = "".join(one if one.isprintable() else " " for one in beginning)
    return shown if len(shown) <= most else f"{shown[:most]}… ({len(reason)} characters)"
