"""What a reply must be before the server uses it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from flsplit.errors import NonFiniteError, ProtocolError
from flsplit.finite import all_finite
from flsplit.message.arrays import check_like
from flsplit.message.evaluate import EvaluateReply, EvaluateRequest
from flsplit.message.finish import FinishReply, FinishRequest
from flsplit.message.local import LocalReply, LocalRequest
from flsplit.message.shape import ShapeReply, ShapeRequest
from flsplit.message.step import StepReply, StepRequest

Request = StepRequest | FinishRequest | EvaluateRequest | LocalRequest | ShapeRequest
Reply = StepReply | FinishReply | EvaluateReply | LocalReply | ShapeReply


def check_reply(name: str, request: Request, reply: Reply) -> None:
    """Check that a reply answers the request and holds something to compute with.

    Parameters
    ----------
    name : str
        The client that was asked.
    request, reply : dataclasses of ``flsplit.message``
        What it was asked, and what it answered.

    Raises
    ------
    ProtocolError
        If the reply is of another client, round, step or batch, or has another number of steps than
        the client had before, or its tensors can't be used.
    SegmentMismatchError
        If the client handed over another segment than it was given.
    NonFiniteError
        If smashed data or a segment handed over is NaN or infinite.
    """
    for key in ("server_round", "step", "batch", "num_steps"):
        asked = getattr(request, key, None)
        if asked is not None and getattr(reply, key) != asked:
            raise ProtocolError(
                f"reply: {key.replace('_', '-')} is {getattr(reply, key)}, expected {asked}"
            )
    if reply.client != name:
        raise ProtocolError(f"reply: client is {reply.client!r}, expected {name!r}")
    if isinstance(request, FinishRequest) and isinstance(reply, FinishReply):
        if request.upload_optimizer and reply.optimizer is None:
            raise ProtocolError(
                "record 'optimizer' is missing, the optimizer's state was asked for"
            )
        if request.upload_segment:
            _check_segment(reply.segment, request.like)
    elif isinstance(request, LocalRequest) and isinstance(reply, LocalReply):
        _check_local(request, reply)
    elif isinstance(reply, StepReply) or (isinstance(reply, EvaluateReply) and reply.num_batches):
        _check_batch(reply.smashed, reply.labels)


def _check_local(request: LocalRequest, reply: LocalReply) -> None:
    done = request.end(reply.num_steps)
    if reply.steps_done != done:
        raise ProtocolError(f"reply: steps-done is {reply.steps_done}, expected {done}")
    if list(reply.uploads) != (expected := request.uploads(done)):
        raise ProtocolError(
            f"smashed-data is of steps {list(reply.uploads)}, expected steps {expected}"
        )
    if len(reply.rows) != (steps := done - request.step or 1):
        raise ProtocolError(f"field 'rows' is {list(reply.rows)}, expected {steps} numbers")
    for step, (smashed, labels) in reply.uploads.items():
        _check_batch(smashed, labels)
        if len(smashed) != (rows := reply.rows[step - request.step]):
            raise ProtocolError(
                f"smashed-data of step {step} has {len(smashed)} rows, field 'rows' says {rows}"
            )
    if done < reply.num_steps or request.peek:
        return
    if request.upload_segment:
        _check_segment(reply.segment, request.like)
    if request.upload_auxiliary:
        if reply.auxiliary is None:
            raise ProtocolError("record 'auxiliary' is missing, the auxiliary model was asked for")
        if request.auxiliary_like is not None:
            _check_state(reply.auxiliary, request.auxiliary_like, what="auxiliary model")


def _check_batch(smashed: Tensor, labels: Tensor) -> None:
    if not smashed.is_floating_point():
        raise ProtocolError(f"smashed-data: dtype is {smashed.dtype}, expected floating point")
    if smashed.ndim == 0 or len(smashed) == 0:
        raise ProtocolError(
            f"smashed-data: shape is {tuple(smashed.shape)}, expected one row or more"
        )
    if labels.shape[:1] != smashed.shape[:1]:
        raise ProtocolError(
            f"labels: shape is {tuple(labels.shape)}, expected {len(smashed)} rows as in the "
            f"smashed data {tuple(smashed.shape)}"
        )
    if not all_finite(smashed):
        raise NonFiniteError("smashed-data: there are values that are NaN or infinite")


def _check_segment(segment: dict[str, Tensor] | None, like: dict[str, Tensor] | None) -> None:
    if segment is None:
        raise ProtocolError("record 'arrays' is missing, the client segment was asked for")
    if like is not None:
        _check_state(segment, like, what="client segment")


def _check_state(state: Mapping[str, Tensor], like: Mapping[str, Tensor], *, what: str) -> None:
    for key, tensor in check_like(state, like, what=what).items():
        # A buffer may be infinite on purpose (a mask): only what became so is wrong.
        if bool((~torch.isfinite(tensor) & torch.isfinite(like[key])).any()):
            raise NonFiniteError(f"{what}: {key!r} has values that are NaN or infinite")
