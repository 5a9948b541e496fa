"""Where a client lies between two messages: in the process's cache, or in ``Context.state``.

A carrier that keeps the process (LocalGrid, a session) dispatches messages inside
``with cache:``. Flower's own carrier doesn't, and then every message misses: the client is
rebuilt from its state and written back. There is no other difference between the two.
"""

from contextvars import ContextVar, Token

from flwr.app import Context

from flsplit.client.live_client import Client
from flsplit.client.spec import ClientSpec, client_name
from flsplit.client.state import ClientState


class ClientCache:
    """The live clients of this process, by name; active inside ``with cache:``."""

    def __init__(self) -> None:
        self.clients: dict[str, Client] = {}
        self._tokens: list[Token[ClientCache | None]] = []

    def __enter__(self) -> "ClientCache":
        """Let handlers that run in this thread find the cache."""
        self._tokens.append(_active.set(self))
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Hide the cache again; it keeps its clients."""
        _active.reset(self._tokens.pop())


_active: ContextVar[ClientCache | None] = ContextVar("flsplit_client_cache", default=None)


def find_client(spec: ClientSpec, context: Context) -> Client:
    """Return this context's client, from the cache or from its state."""
    cache, name = _active.get(), client_name(context)
    client = cache.clients.get(name) if cache else None
    if client is None:
        client = Client(spec, context)
        if state := ClientState.get(context.state):
            client.load(state)
        if cache:  # at once: it is kept also when its first step fails
            cache.clients[name] = client
    return client


def keep_client(client: Client, context: Context) -> None:
    """Write down what became of a client, where it is not in a cache; also when a step fails."""
    if _active.get() is None:
        client.state().put(context.state)
