"""Lets ``python -m flsplit`` be the command ``flsplit``."""

from flsplit.cli import app

app(prog_name="flsplit")
