"""Where a client lies between two messages: in the process's cache, or in ``Context.state``.

A carrier that keeps the process (LocalGrid, a session) sets `live_clients` while it dispatches a
message. Flower's own carrier doesn't, and then every message misses: the client is
rebuilt from its state and written back. There is no other difference between the two.
"""

from contextvars import ContextVar

from flwr.app import Context

from flsplit.client.live_client import Client
from flsplit.client.spec import ClientSpec, client_name
from flsplit.client.state import ClientState

live_clients: ContextVar[dict[str, Client] | None] = ContextVar("flsplit_clients", default=None)
"""The live clients, by name, that handlers find which run in this thread now."""


def find_client(spec: ClientSpec, context: Context) -> Client:
    """Return this context's client, from the cache or from its state."""
    cache, name = live_clients.get(), client_name(context)
    client = None if cache is None else cache.get(name)
    if client is None:
        client = Client(spec, context)
        if state := ClientState.get(context.state):
            client.load(state)
        if cache is not None:  # at once: it is kept also when its first step fails
            cache[name] = client
    return client


# A function of this module: Ray pickles the handlers, with all that they name, and no ContextVar.
def keep_client(client: Client, context: Context) -> None:
    """Write a client's state back, where there is no cache that keeps the client."""
    if live_clients.get() is None:
        client.state().put(context.state)
