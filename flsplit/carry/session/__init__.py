"""Sessions: Flower messages over one stream per host, opened by a single Flower message."""

from flsplit.carry.session.session_grid import SessionGrid
from flsplit.carry.session.settings import SessionSettings

__all__ = ["SessionGrid", "SessionSettings"]
