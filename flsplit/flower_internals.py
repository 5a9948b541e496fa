"""The few places where flsplit needs more of Flower than its public API. Nothing else imports them.

* Strategies build messages with ``Message(content, dst_node_id, …)``, which asks a
  process-wide identity that only Flower's own runtime sets. Outside it (LocalGrid in a
  notebook, a test) any Flower strategy would fail, so flsplit sets it there.
* ``Grid.run`` must return a ``Run``, whose class is not public.
* A message's id is given by the carrier, and ``Metadata`` has no setter for it.
* To make a record, Flower tells forms of arguments apart, and every value that is put into it
  costs a check that builds two typing objects; in a step of a small network that took a quarter of
  the time.
* The codes of an ``Error`` that say "the ClientApp raised" and "the node is away" are not public
  either.
* Nothing public tells a ServerApp whether its nodes are simulated.
* Nor a ClientApp whether it is Flower that ends its process, whose node is to stop.
"""

from typing import Any, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.constant import TaskType
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

CLIENT_RAISED = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
NODE_AWAY = ErrorCode.NODE_UNAVAILABLE
APP_ERRORS = (  # besides the first: Flower's runtime could not run the ClientApp
    ErrorCode.UNKNOWN,  # what a simulation calls all errors of Ray
    ErrorCode.LOAD_CLIENT_APP_EXCEPTION,
    ErrorCode.INVALID_FAB,
    ErrorCode.CLIENT_APP_CRASHED,
)
CLIPPING_NORM, NORM_BIT = "clipping_norm", "norm_bit"  # between its privacy wrappers and mods
SERVER_NODE_ID = 1  # what Flower gives the ServerApp's node, too

__all__ = [
    "APP_ERRORS",
    "CLIENT_RAISED",
    "CLIPPING_NORM",
    "NODE_AWAY",
    "NORM_BIT",
    "SERVER_NODE_ID",
    "Run",
    "content_of",
    "ends_process",
    "ensure_task_identity",
    "made",
    "set_message_id",
    "simulates",
]


def ensure_task_identity(run_id: int) -> None:
    """Give this process an identity, unless Flower's runtime has done so."""
    try:
        _ = TaskIdentity.run_id
    except RuntimeError:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, SERVER_NODE_ID, 0


def ends_process(error: BaseException) -> bool:
    """Tell whether Flower raised ``SystemExit``, from a signal handler, wherever that came in."""
    where = error.__traceback__
    while where and where.tb_next:
        where = where.tb_next
    raised_by = where.tb_frame.f_globals.get("__name__", "") if where else ""
    return isinstance(error, SystemExit) and str(raised_by).startswith("flwr.")


def simulates(grid: Grid) -> bool:
    """Tell whether a grid's nodes are simulated, by what Flower says of the run in this process.

    ``run_simulation`` gives its runs no type, but only a simulation has a grid in memory.
    """
    # Where there is one it is imported already; elsewhere that would take a second.
    from flwr.superlink.grid import InMemoryGrid

    return isinstance(grid, InMemoryGrid) or grid.run.primary_task_type == TaskType.SIMULATION


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message its id, which its reply then refers to."""
    message.metadata.__dict__["_message_id"] = message_id


R = TypeVar("R", RecordDict, ArrayRecord, ConfigRecord, MetricRecord)

_EMPTY = {kind: vars(kind()) for kind in (RecordDict, ArrayRecord, ConfigRecord, MetricRecord)}


def made(kind: type[R], values: dict[str, Any]) -> R:
    """Return a record of these values without a check: they must be of types that it takes."""
    record = kind.__new__(kind)
    vars(record).update(_EMPTY[kind], _data=values)
    return record


def content_of(records: dict[str, Any]) -> RecordDict:
    """Return a message's content: each a record, or a kind of record and what it is made of."""
    for name, one in records.items():
        if type(one) is tuple:
            kind, values = one
            record = records[name] = kind.__new__(kind)  # as in `made`, without a call for each
            vars(record).update(_EMPTY[kind], _data=values)
    content = RecordDict.__new__(RecordDict)
    vars(content).update(_EMPTY[RecordDict], _data=records)
    return content
