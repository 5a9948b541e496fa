"""The few places where flsplit needs more of Flower than its public API. Nothing else imports them.

* Strategies build messages with ``Message(content, dst_node_id, …)``, which asks a
  process-wide identity that only Flower's own runtime sets. Outside it (LocalGrid in a
  notebook, a test) any Flower strategy would fail, so flsplit sets it there.
* ``Grid.run`` must return a ``Run``, whose class is not public.
* A message's id is given by the carrier, and ``Metadata`` has no setter for it.
* Every value that is put into a record costs Flower a check that builds two typing objects; in
  a step of a small network that took a quarter of the time.
* The codes of an ``Error`` that say "the ClientApp raised" and "the node is away" are not public
  either.
"""

from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

CLIENT_RAISED = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
NODE_AWAY = ErrorCode.NODE_UNAVAILABLE
CLIPPING_NORM, NORM_BIT = "clipping_norm", "norm_bit"  # between its privacy wrappers and mods
SERVER_NODE_ID = 1  # what Flower gives the ServerApp's node, too

__all__ = [
    "CLIENT_RAISED",
    "CLIPPING_NORM",
    "NODE_AWAY",
    "NORM_BIT",
    "SERVER_NODE_ID",
    "Run",
    "ensure_task_identity",
    "fill",
    "set_message_id",
]


def ensure_task_identity(run_id: int) -> None:
    """Give this process an identity, unless Flower's runtime has done so."""
    try:
        _ = TaskIdentity.run_id
    except RuntimeError:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, SERVER_NODE_ID, 0


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message its id, which its reply then refers to."""
    message.metadata.__dict__["_message_id"] = message_id


def fill(record: RecordDict | ArrayRecord | ConfigRecord | MetricRecord, values: Any) -> None:
    """Put a dict's values into a record without a check: they must be of types that it takes."""
    record.__dict__["_data"].update(values)
