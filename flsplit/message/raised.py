"""How an exception of a client is answered, and how much of it is heard."""

import sysconfig
import traceback
from asyncio import CancelledError
from pathlib import Path

from flwr.app import Error, Message

from flsplit.errors import FlsplitError
from flsplit.flower_internals import CLIENT_RAISED, ends_process

CLIENTS_OWN = (Exception, SystemExit, CancelledError)
"""What a user's function may raise, and what then is that client's affair: not Ctrl-C."""

MAX_REASON = 2000
"""Characters of a reason that are kept: it stands in logs and in the history."""


def raised(message: Message, error: BaseException) -> Message:
    """Answer a message with what an exception says, and the code that Flower gives it.

    What ends the whole process goes on: its node is stopped, which is no client's affair.
    """
    if ends_process(error):
        raise error
    return Message(Error(CLIENT_RAISED, reason_of(error)), reply_to=message)


def reason_of(error: BaseException) -> str:
    """Return an exception's kind and text; and of one that is none of flsplit's, where it was."""
    own = None if isinstance(error, FlsplitError) else _in_users_code(error)
    where = f" ({Path(own.filename).name}, line {own.lineno}, in {own.name})" if own else ""
    return f"{type(error).__name__}: {error}{where}"


def _in_users_code(error: BaseException) -> traceback.FrameSummary | None:
    """Return the innermost frame that is in no library; None if there is none."""
    libraries = (sysconfig.get_path("stdlib"), str(Path(__file__).parents[1]))
    return next(
        (
            frame
            for frame in reversed(traceback.extract_tb(error.__traceback__))
            if not frame.filename.startswith(("<", *libraries))
            and "site-packages" not in frame.filename
        ),
        None,
    )


def shortened(reason: str, most: int = MAX_REASON) -> str:
    """Return the beginning of what somebody else says, without what can't be printed in a line."""
    beginning = reason[: most + 1]  # so that a long one costs no more
    shown = "".join(one if one.isprintable() else " " for one in beginning)
    return shown if len(shown) <= most else f"{shown[:most]}… ({len(reason)} characters)"
