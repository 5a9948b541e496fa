"""A grid whose messages a test edits or loses, and runs that are expected to go wrong."""

from collections.abc import Callable

from flwr.app import ConfigRecord, Error, Message
from reference import CUT, LR, SEED, WrappedGrid, fresh, plain_net
from torch import Tensor

from flsplit import LocalGrid, client_app
from flsplit.message.arrays import to_record
from flsplit.strategies import PSL

Edit = Callable[[Message, Message], Message | None]
"""Takes a request and its reply; returns what the server gets, None for nothing."""


class TamperedGrid(WrappedGrid):
    """Hands every reply to ``edit`` before the server sees it."""

    def __init__(self, inner: LocalGrid, edit: Edit) -> None:
        super().__init__(inner)
        self.edit = edit

    def send_and_receive(self, messages, *, timeout=None):
        replies = []
        for message in messages:
            (reply,) = self.inner.send_and_receive([message])
            edited = self.edit(message, reply)
            if edited is not None:
                replies.append(edited)
        return replies


def of_client(name: str, message_type: str, edit: Edit, *, step: int | None = None) -> Edit:
    """Let ``edit`` edit one client's replies of one type (to one step), and no others."""

    def only(request: Message, reply: Message) -> Message | None:
        fields = request.content.get("step")
        other_step = step is not None and (
            not isinstance(fields, ConfigRecord) or fields["step"] != step
        )
        if client_of(reply) != name or request.metadata.message_type != message_type or other_step:
            return reply
        return edit(request, reply)

    return only


def client_of(reply: Message) -> str | None:
    """Return which client answered; None if it answered with an error."""
    return None if reply.has_error() else str(reply.content["reply"]["client"])


def lose(request: Message, reply: Message) -> None:
    """Lose the reply on its way."""


def answer_error(request: Message, reply: Message) -> Message:
    """Answer with an error instead."""
    return Message(Error(0, "the dog ate it"), reply_to=request)


def set_up(parts, strategy_class=PSL, *, build=plain_net, client=None, edit=None, **options):
    """Return a strategy, its grid and its initial arrays, ready for :func:`train`.

    ``client`` holds options of the ClientApp; its model and cut are the strategy's by default.
    ``tests`` among them are test data by client, and ``app`` is another app altogether.
    """
    model = fresh(build)
    defaults = {"server_lr": LR, "seed": SEED, "batch_size": 4, "device": "cpu"}
    strategy = strategy_class(**({"model": model, "cut": CUT} | defaults | options))
    client = {"model": build, "cut": strategy.options.cut, "device": "cpu"} | (client or {})
    tests = client.pop("tests", None)

    def load(context):
        index = int(context.node_config["partition-id"])
        return parts[index] if tests is None else (parts[index], tests[index])

    app = client.pop("app", None) or client_app(data=load, **client)
    grid = LocalGrid(app, len(parts), progress=False)
    return strategy, TamperedGrid(grid, edit) if edit else grid, to_record(model.state_dict())


def train(run, rounds: int = 1, **start):
    """Train what :func:`set_up` returned."""
    strategy, grid, arrays = run
    return strategy.start(grid=grid, initial_arrays=arrays, num_rounds=rounds, **start)


def server_weights(strategy) -> dict[str, Tensor]:
    """Return a copy of the server segment's parameters and buffers."""
    return {name: tensor.clone() for name, tensor in strategy.server.arrays().items()}


def initial_server_weights(run) -> dict[str, Tensor]:
    """Return the server segment's part of a run's initial arrays."""
    strategy, _, arrays = run
    return strategy.parts.divide(arrays.to_torch_state_dict())[1]
