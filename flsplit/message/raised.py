"""How an exception of a client is answered."""

from flwr.app import Error, Message

from flsplit.flower_internals import CLIENT_RAISED


def raised(message: Message, error: Exception) -> Message:
    """Answer a message with an exception's kind and text, and the code that Flower gives it."""
    return Message(Error(CLIENT_RAISED, f"{type(error).__name__}: {error}"), reply_to=message)
