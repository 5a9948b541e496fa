"""``query.shape``: asks a client what its inputs and its smashed data look like.

The server builds auxiliary models from the answer, and counts FLOPs.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any

from flsplit.errors import ProtocolError
from flsplit.message import request as common
from flsplit.message.fields import In
from flsplit.message.nestings import nesting
from flsplit.message.request import Reply, Request
from flsplit.message.types import SHAPE

MAX_DIMENSIONS, MOST_VALUES = 16, 2**28
"""Of a row of smashed data that a client can say it has."""


@dataclass(frozen=True)
class ShapeReply(Reply):
    """What one row of a client's data looks like."""

    client: common.Client
    server_round: common.Round
    # Shape of a row of smashed data
    shape: Annotated[tuple[int, ...], In("smashed-data", 1, length=1, longest=MAX_DIMENSIONS)]
    # The inputs' shapes ``(0, ...)`` and dtypes, without a row
    inputs: Annotated[Any, nesting("inputs")]
    seconds: common.Seconds


@dataclass(frozen=True)
class ShapeRequest(Request):
    """Asks a client what its inputs and its smashed data look like."""

    kind = SHAPE
    answer = ShapeReply

    server_round: Annotated[int, In("config", 1)]
    cut: Annotated[str, In("config")]
    inputs: Annotated[str, In("config")] = ""

    def check(self, reply: ShapeReply) -> None:
        """Refuse a row that nobody sends: the server computes with one like it."""
        if math.prod(reply.shape) > MOST_VALUES:
            raise ProtocolError(
                f"smashed-data: a row has shape {reply.shape}, expected at most {MOST_VALUES} "
                "values in it"
            )
