"""Choosing the carrier of a run: a session where one can be opened, else Flower's messages."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

from flwr.app import Message
from flwr.serverapp import Grid

from flsplit.carry.carrier import Carrier
from flsplit.carry.polling import polling
from flsplit.carry.session.session_grid import NoHostError, SessionGrid
from flsplit.carry.session.settings import SessionSettings
from flsplit.errors import FlsplitError, NotEnoughClientsError
from flsplit.flower_internals import Run, simulates
from flsplit.log import logger

CarrierName = Literal["auto", "session", "flower"]

MAX_FALLBACK_SECONDS = 600.0
"""How long a run over Flower's messages may be predicted to take, if a session was wanted."""


class TooSlowError(FlsplitError):
    """No session could be opened, and over Flower's own messages the run would take too long."""


class FlowerCarrier(Carrier):
    """Carries a run's messages over any Grid, one by one.

    ``why_no_session`` says why this is a fallback; it is empty if it was wanted.
    """

    def __init__(self, grid: Grid, why_no_session: str = "", *, simulated: bool = False) -> None:
        self._grid = grid
        self.simulated = simulated
        self._why_no_session = why_no_session

    @property
    def run(self) -> Run:
        """Flower's description of the run."""
        return self._grid.run

    def set_run(self, run: Run) -> None:
        """Set the run of Flower's grid."""
        self._grid.set_run(run)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the connected nodes."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; return their ids."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the answers that have come, each once."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages and return the answers that come in time."""
        return self._grid.send_and_receive(messages, timeout=timeout)

    def check_speed(self, exchange_seconds: float, exchanges: int) -> None:
        """Stop a fallback that would take too long.

        Raises
        ------
        TooSlowError
            If ``exchanges`` more of this length take more than ten minutes.
        """
        predicted = exchange_seconds * exchanges
        if self._why_no_session and predicted > MAX_FALLBACK_SECONDS:
            raise TooSlowError(
                f"over Flower's own messages the run would take about {predicted / 3600:.1f} hours "
                f"({exchanges} exchanges of {exchange_seconds:.1f} s), and no session could be "
                f"opened: {self._why_no_session}. carrier='flower' runs it all the same"
            )


@contextmanager
def open_carrier(
    grid: Grid,
    name: CarrierName,
    settings: SessionSettings,
    timeout: float,
    *,
    experiment: str,
    state_dir: str,
) -> Iterator[Carrier]:
    """Open the carrier of a run, and close it at its end.

    A grid that is a Carrier, such as a LocalGrid, is used as it is. ``auto`` opens a session and
    falls back on Flower's messages. ``timeout`` is for the first node, without which no session can
    be opened, and for a first host, which may be busy with another run. Below ``state_dir`` lies
    the folder of simulated clients' states, which a resumed run finds by ``experiment``; empty for
    nowhere.

    ConfigError if the ServerApp can't listen where the settings say, also with ``auto``.
    NotEnoughClientsError if no node has connected by then. NoHostError if ``name`` is ``session``
    and no node can dial back. BrokenAppError if no node can run the ClientApp.
    """
    if isinstance(grid, Carrier):
        try:
            yield grid
        finally:
            grid.end_run()
        return
    if name == "flower":
        yield FlowerCarrier(grid, simulated=simulates(grid))
        return
    _wait_for_a_node(grid, timeout)
    session = SessionGrid(
        grid, settings, experiment=experiment, state_dir=state_dir, timeout=timeout
    )
    try:
        session.open()
    except NoHostError as error:
        if name == "session":
            raise
        logger.warning("no session, going on over Flower's own messages: %s", error)
        yield FlowerCarrier(grid, str(error), simulated=simulates(grid))
        return
    with session:
        yield session


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
