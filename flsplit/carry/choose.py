"""Choosing the carrier of a run: a session where one can be opened, else Flower's messages."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from flwr.serverapp import Grid

from flsplit.carry.local import LocalGrid
from flsplit.carry.polling import polling
from flsplit.carry.session.grid import NoHostError, SessionGrid
from flsplit.carry.session.settings import SessionSettings
from flsplit.errors import FlsplitError, NotEnoughClientsError
from flsplit.log import logger

Carrier = Literal["auto", "session", "flower"]

MAX_FALLBACK_SECONDS = 600.0
"""How long a run over Flower's messages may be predicted to take, if a session was wanted."""


class TooSlowError(FlsplitError):
    """No session could be opened, and over Flower's own messages the run would take too long."""


@dataclass(frozen=True)
class Experiment:
    """Which states on disk belong to a run.

    Attributes
    ----------
    name : str
        Names the folder; a resumed run keeps it.
    state_dir : str
        Where simulated hosts keep their clients' states; empty for nowhere.
    """

    name: str
    state_dir: str


@dataclass(frozen=True)
class OpenCarrier:
    """The carrier that a run uses.

    Attributes
    ----------
    grid : Grid
        What to send messages with.
    why_no_session : str
        Why this is a fallback; empty if it isn't one.
    timeout : float
        For how many seconds a session that hands over is opened again while no node comes.
    """

    grid: Grid
    why_no_session: str = ""
    timeout: float = 0.0

    def end_round(self, server_round: int) -> None:
        """Let a session hand over where its settings say so; not to be called after the last."""
        if isinstance(self.grid, SessionGrid):
            self.grid.end_round(server_round, self.timeout)

    def check_speed(self, exchange_seconds: float, exchanges: int) -> None:
        """Stop a fallback that would take too long.

        Raises
        ------
        TooSlowError
            If ``exchanges`` more of this length take more than ten minutes.
        """
        predicted = exchange_seconds * exchanges
        if self.why_no_session and predicted > MAX_FALLBACK_SECONDS:
            raise TooSlowError(
                f"over Flower's own messages the run would take about {predicted / 3600:.1f} hours "
                f"({exchanges} exchanges of {exchange_seconds:.1f} s), and no session could be "
                f"opened: {self.why_no_session}. carrier='flower' runs it all the same"
            )


@contextmanager
def open_carrier(
    grid: Grid,
    carrier: Carrier,
    settings: SessionSettings,
    experiment: Experiment,
    timeout: float,
) -> Iterator[OpenCarrier]:
    """Open the carrier of a run, and close it at its end.

    Parameters
    ----------
    grid : Grid
        What Flower handed in, or a LocalGrid, which needs no session.
    carrier : {'auto', 'session', 'flower'}
        ``auto`` opens a session and falls back on Flower's messages.
    settings : SessionSettings
        For a session.
    experiment : Experiment
        For a session's clients.
    timeout : float
        How many seconds to wait for the first node, without which no session can be opened; also
        where a session hands over to the next.

    Raises
    ------
    ConfigError
        If the ServerApp can't listen where the settings say, also with ``auto``.
    NotEnoughClientsError
        If no node has connected by then.
    NoHostError
        If ``carrier`` is ``session`` and no node can dial back.
    """
    if carrier == "flower" or getattr(grid, "in_process", False):
        try:
            yield OpenCarrier(grid)
        finally:
            if isinstance(grid, LocalGrid):
                grid.end_run()
        return
    _wait_for_a_node(grid, timeout)
    session = SessionGrid(
        grid, settings, experiment=experiment.name, state_dir=experiment.state_dir
    )
    try:
        session.open()
    except NoHostError as error:
        if carrier == "session":
            raise
        logger.warning("no session, going on over Flower's own messages: %s", error)
        yield OpenCarrier(grid, why_no_session=str(error))
        return
    with session:
        yield OpenCarrier(session, timeout=timeout)


def _wait_for_a_node(grid: Grid, timeout: float) -> None:
    if list(grid.get_node_ids()):
        return
    logger.info("waiting for SuperNodes: none is connected")
    for _ in polling(timeout):
        if list(grid.get_node_ids()):
            return
    raise NotEnoughClientsError(
        f"0 clients are connected after {timeout:g} s, expected at least 1; are SuperNodes "
        "running, and connected to this SuperLink?"
    )
