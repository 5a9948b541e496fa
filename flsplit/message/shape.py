"""``query.shape``: asks a client what its inputs and its smashed data look like.

The server builds auxiliary models from the answer, and counts FLOPs.
"""

from dataclasses import dataclass
from typing import Annotated

import torch

from flsplit.message import request as common
from flsplit.message.fields import In
from flsplit.message.request import Reply, Request
from flsplit.message.types import SHAPE


@dataclass(frozen=True)
class ShapeReply(Reply):
    """What one row of a client's data looks like.

    Attributes
    ----------
    client : str
        Whose reply it is.
    server_round : int
        The round asked for.
    shape : tuple of int
        Shape of a row of smashed data.
    input_shape, input_dtype : tuple of int, torch.dtype
        Shape and type of a row of the inputs; the shape may be empty.
    seconds : float
        Compute time.
    """

    client: common.Client
    server_round: common.Round
    shape: Annotated[tuple[int, ...], In("smashed-data", 1, length=1)]
    input_shape: Annotated[tuple[int, ...], In("inputs", 1, key="shape")]
    input_dtype: Annotated[torch.dtype, In("inputs", key="dtype")]
    seconds: common.Seconds


@dataclass(frozen=True)
class ShapeRequest(Request):
    """Asks a client what its inputs and its smashed data look like."""

    kind = SHAPE
    answer = ShapeReply

    server_round: Annotated[int, In("config", 1)]
    cut: Annotated[str, In("config")]
