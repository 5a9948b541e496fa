"""Rounds that are done again: where too few clients are left midway, as if it had not begun."""

from flsplit.nested import map_tensors
from flsplit.run.method import SplitMethod
from flsplit.server.clients import Clients
from flsplit.storage import State

MOST_ATTEMPTS = 3
"""How often a round is begun. Each may cost the time that clients are waited for."""


class Beginning:
    """The server as it is before a round, to go back to; a copy in main memory."""

    def __init__(self, method: SplitMethod, clients: Clients) -> None:
        self._method, self._clients = method, clients
        self._state = _copied(method.state_dict())
        self._known = clients.state_dict()

    def restore(self) -> None:
        """Be as before the round. Clients do so by themselves when they are to begin it again."""
        self._method.begin_run()
        self._method.load_state_dict(_copied(self._state))
        self._clients.load_state_dict(self._known)


def _copied(state: State) -> State:
    copy: State = map_tensors(lambda one: one.detach().to("cpu", copy=True), state)
    return copy
