"""How commands say what goes on, and what is wrong."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from flsplit.errors import FlsplitError


def say(text: str) -> None:
    """Tell the user what is going on."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def errors_in_a_line(*more: type[Exception]) -> Iterator[None]:
    """Say what is wrong in one line, and exit with 1: errors of flsplit's, and of more kinds."""
    kinds: tuple[type[Exception], ...] = (FlsplitError, *more)
    try:
        yield
    except kinds as error:
        say(f"error: {error}")
        raise typer.Exit(1) from error
