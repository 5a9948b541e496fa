"""LocalGrid: a ClientApp's clients in this very process, for notebooks, debuggers and tests."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import cast

from flwr.app import ConfigRecord, Context, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from rich.progress import Progress, TaskID

from flsplit.carry.carrier import Carrier
from flsplit.carry.cohort import Cohort
from flsplit.errors import ConfigError
from flsplit.flower_internals import SERVER_NODE_ID, Run, ensure_task_identity, set_message_id
from flsplit.storage import FolderLock


class LocalGrid(Carrier):
    """A Grid that calls the ClientApp directly: no Ray, no server, no other process.

    Parameters
    ----------
    client_app : flwr.clientapp.ClientApp
        The app of :func:`flsplit.client_app`, or any other.
    num_clients : int
        How many clients; client ``i`` has ``partition-id`` i and ``num-partitions`` num_clients
        in its node config.
    run_config : dict, optional
        What the app sees as its run config.
    cache : bool
        Keep live clients between messages. Without, each message rebuilds its client from
        ``Context.state``, as on Flower's own carrier; the numbers are the same.
    state_dir : str or Path, optional
        Keep the clients' states in this folder, so that another LocalGrid can go on with them.
    progress : bool, optional
        Show a progress bar over the rounds. Default: if stderr is a terminal.

    Raises
    ------
    ConfigError
        If ``client_app`` is no ClientApp, or ``num_clients`` is not at least 1; in a run, if
        another one uses ``state_dir``.
    """

    in_process = True

    def __init__(
        self,
        client_app: ClientApp,
        num_clients: int,
        *,
        run_config: UserConfig | None = None,
        cache: bool = True,
        state_dir: str | Path | None = None,
        progress: bool | None = None,
    ) -> None:
        if not isinstance(client_app, ClientApp):
            raise ConfigError(
                f"client_app is {client_app!r}, expected a ClientApp, e.g. what "
                "flsplit.client_app(model=…, cut=…, data=…) returns"
            )
        if num_clients < 1:
            raise ConfigError(f"num_clients is {num_clients}, expected at least 1")
        store = Path(state_dir) if state_dir else None
        self._lock = FolderLock(store) if store else None
        self._cohort = Cohort(client_app, store=store, cache=cache)
        self._run = Run.create_empty(run_id=1)
        self._contexts = {
            SERVER_NODE_ID + 1 + index: Context(
                run_id=1,
                node_id=SERVER_NODE_ID + 1 + index,
                node_config={"partition-id": index, "num-partitions": num_clients},
                state=RecordDict(),
                run_config=dict(run_config or {}),
            )
            for index in range(num_clients)
        }
        self._sent = 0
        self._replies: dict[str, Message] = {}
        show = sys.stderr.isatty() if progress is None else progress
        self._bar = _RoundBar() if show else None
        ensure_task_identity(run_id=1)

    @property
    def run(self) -> Run:
        """Flower's description of the run."""
        return self._run

    def set_run(self, run: Run) -> None:
        """Replace the description of the run."""
        self._run = run

    def get_node_ids(self) -> Iterable[int]:
        """Return the clients' node ids."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Call the ClientApp with each message; return the messages' ids."""
        if self._lock:  # until the run has ended
            self._lock.take_or_refuse("state_dir")
        ids = []
        for message in messages:
            node_id = message.metadata.dst_node_id
            if node_id not in self._contexts:
                raise ConfigError(f"there is no node {node_id}; there are {list(self._contexts)}")
            self._sent += 1
            message_id = str(self._sent)
            set_message_id(message, message_id)
            if self._bar:
                self._bar.watch(message)
            self._replies[message_id] = self._cohort.answer(message, self._contexts[node_id])
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to pushed messages, each once."""
        return [self._replies.pop(one) for one in message_ids if one in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Call the ClientApp with each message and return the replies; there is no timeout."""
        return list(map(self._replies.pop, self.push_messages(messages)))

    def end_run(self) -> None:
        """Take the progress bar away, and let go of the clients' states; another run may follow."""
        if self._lock:
            self._lock.release()
        if self._bar:
            self._bar.stop()


class _RoundBar:
    """A progress bar that learns of rounds from the messages passing by."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def watch(self, message: Message) -> None:
        config = message.content.get("config")
        if not (isinstance(config, ConfigRecord) and "num-rounds" in config):
            return
        current, total = cast(int, config["server-round"]), cast(int, config["num-rounds"])
        if self._progress is None:
            self._progress = Progress(transient=True)
            self._task = self._progress.add_task("training", total=total)
            self._progress.start()
        self._progress.update(
            self._task, completed=current - 1, description=f"round {current}/{total}"
        )

    def stop(self) -> None:
        if self._progress:
            self._progress.stop()
        self._progress = None
