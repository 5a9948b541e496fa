"""The clients that one process serves: their contexts, their cache, and their states on disk."""

import re
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flsplit.client.cache import live_clients
from flsplit.client.live_client import Client
from flsplit.client.spec import client_name
from flsplit.client.state import ClientState
from flsplit.log import logger
from flsplit.message.raised import CLIENTS_OWN, raised
from flsplit.message.storage_note import put_problem
from flsplit.message.types import EVALUATE, FINISH, LOCAL, SHAPE, STEP
from flsplit.storage import RoundFolder, StorageError, folder_name


class Cohort:
    """Dispatches messages to a ClientApp on behalf of several clients.

    In ``store``, a folder with one for each client, a client's state is looked up when it first
    appears, and written at the end of each of its rounds. Flower's own carrier has
    ``Context.state`` instead. With ``cache``, live clients are kept between messages.
    """

    def __init__(
        self,
        app: ClientApp,
        *,
        store: Path | None = None,
        cache: bool = True,
    ) -> None:
        self._app = app
        self._store = store
        self._cache: dict[str, Client] | None = {} if cache else None
        self._contexts: dict[str, Context] = {}
        self._problems: dict[str, str] = {}  # what the next answer says of a client's files

    def answer(self, message: Message, context: Context) -> Message:
        """Return the ClientApp's reply to a message for the client of ``context``."""
        name = client_name(context)
        server_round = _round_of(message) if self._store else -1
        folder = None
        if self._store and server_round >= 0:
            folder = RoundFolder(self._store / folder_name(name))
        if folder and self._needs_restoring(name, message, context):
            # Before training in a round, the state is that after an earlier one: a run that was
            # resumed does again what it did after its checkpoint.
            begins = message.metadata.message_type in (STEP, LOCAL, SHAPE)
            try:
                self._restore(name, folder, server_round - begins, context)
            except StorageError as error:  # it may well be there: nothing else takes its place
                logger.error("client %r: %s", name, error)
                return raised(message, error)
        if message.metadata.group_id:
            self._contexts[name] = context
        token = live_clients.set(self._cache)
        learns, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
        try:
            reply = self._app(message, context)
        except CLIENTS_OWN as error:  # answered as an Error, as Flower's runtime does
            reply = raised(message, error)
            logger.exception("client %r", name)
        finally:
            live_clients.reset(token)
            if torch.is_grad_enabled() != learns or torch.get_default_dtype() != dtype:
                # Other clients of this process would compute with it.
                torch.set_grad_enabled(learns)
                torch.set_default_dtype(dtype)
                logger.warning(
                    "client %r: its code leaves torch's gradients switched, or another default "
                    "dtype: they are set back", name,
                )  # fmt: skip
        if reply.has_error():
            return reply
        if folder and _changes_what_is_kept(message, reply):
            self._save(name, folder, server_round, context)
        if name in self._problems:
            put_problem(reply.content, self._problems.pop(name))
        return reply

    def _save(self, name: str, folder: RoundFolder, server_round: int, context: Context) -> None:
        """Write a client's state; without a disk it goes on all the same, and says so."""
        records = context.state
        if self._cache is not None:
            records = RecordDict()
            self._cache[name].state().put(records)
        try:
            folder.save(server_round, records)
        except StorageError as error:
            logger.error("client %r: its state is not stored: %s", name, error)
            self._problems[name] = f"its state is not stored: {error}"

    def flush(self) -> None:
        """Write live clients back into their contexts, for a carrier that keeps those."""
        for name, client in (self._cache or {}).items():
            client.state().put(self._contexts[name].state)

    def _needs_restoring(self, name: str, message: Message, context: Context) -> bool:
        """Tell whether a client is new here, or has been in the round that begins already."""
        if name not in self._contexts:
            return True
        if message.metadata.message_type not in (STEP, LOCAL) or not message.has_content():
            return False
        config = message.content.get("config")
        if not isinstance(config, ConfigRecord):
            return False
        live = (self._cache or {}).get(name)
        state = live.state() if live else ClientState.get(context.state)
        experiment = str(config.get("experiment"))
        return state is not None and state.is_ahead_of(int(message.metadata.group_id), experiment)

    def _restore(self, name: str, folder: RoundFolder, at_most: int, context: Context) -> None:
        folder.forget_after(at_most)
        stored = folder.load(at_most)
        if self._cache:
            self._cache.pop(name, None)
        if stored:
            context.state = stored[1]
        if folder.problems:
            now = f"it goes on from round {stored[0]}" if stored else "no earlier one is left"
            self._problems[name] = f"{'; '.join(folder.problems)}; {now}"


def _round_of(message: Message) -> int:
    """Return the round that a message belongs to, -1 if to none."""
    group = message.metadata.group_id
    return int(group) if re.fullmatch("[0-9]{1,9}", group) else -1


def _changes_what_is_kept(message: Message, reply: Message) -> bool:
    """Tell whether a client's round ends, or its segment is replaced after that."""
    kind = message.metadata.message_type
    if kind == LOCAL:
        metrics = reply.content.get("metrics")
        return isinstance(metrics, MetricRecord) and (
            metrics.get("steps-done", -1) == metrics.get("num-steps")
        )
    return kind == FINISH or (kind == EVALUATE and "arrays" in message.content)
