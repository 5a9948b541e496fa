"""A client's local steps: its auxiliary model in the place of the server."""

import time

import torch
from torch import Tensor

from flsplit.account.memory import Activations, measuring_activations, state_bytes
from flsplit.client.auxiliary_model import Auxiliary
from flsplit.client.client_step import backward, forward
from flsplit.client.live_client import Client
from flsplit.cut.smashed import Smashed, not_one_tensor
from flsplit.errors import (
    DataError,
    NonFiniteError,
    ProtocolError,
    SegmentMismatchError,
    StateLostError,
)
from flsplit.finite import can_be_squared
from flsplit.message.local_steps import LocalReply, LocalRequest
from flsplit.message.request import Backward, Batch
from flsplit.message.shape import ShapeReply, ShapeRequest
from flsplit.nested import map_tensors, num_rows
from flsplit.seeds import derive_seed, seeded


def train_locally(client: Client, request: LocalRequest) -> LocalReply:
    """Take a client's local steps and return what goes up."""
    started = time.perf_counter()
    if request.plan:
        client.begin(request.plan, request.segment, None)
        _begin_auxiliary(client, request)
    client.check_round(request.server_round)
    auxiliary = _auxiliary_of(client)
    end = request.end(client.num_steps)
    wanted = set(request.uploads(end, client.plan))
    uploads: dict[int, Batch] = {}
    rows: list[int] = []
    own, emulating = Activations(), Activations()
    if request.peek:
        smashed, labels = forward(client, request.step, str(request.step)).leaving
        rows.append(num_rows(labels))
        if request.step in wanted:
            uploads[request.step] = smashed, labels
    for step in range(request.step, end):
        with measuring_activations(own, client.segment, active=step == 0):
            smashed, labels = forward(client, step, str(step) if step in wanted else None).leaving
        gradient = None
        if num_rows(labels):  # else the client sits this step out
            one = _one(client, smashed)
            with measuring_activations(emulating, auxiliary.module, active=step == 0):
                gradient = auxiliary.gradient(one, labels, _seed(client, step))
        backward(client, Backward(step, gradient))
        rows.append(num_rows(labels))
        if step in wanted:
            uploads[step] = smashed, labels
    ended = end == client.num_steps and not request.peek
    return LocalReply(
        client=client.name,
        server_round=request.server_round,
        step=request.step,
        uploads=uploads,
        traces=client.untold(smashed for smashed, _ in uploads.values()),
        num_examples=client.num_examples,
        num_steps=client.num_steps,
        steps_done=end,
        steps_before=client.steps_before,
        rows=rows,
        seconds=time.perf_counter() - started,
        memory={
            "segment": state_bytes(client.segment, client.optimizer),
            "activations": own.nbytes,
            "auxiliary": state_bytes(auxiliary.module, auxiliary.optimizer),
            "auxiliary-activations": emulating.nbytes,
        },
        segment=client.handed_over() if ended and request.upload_segment else None,
        auxiliary=auxiliary.module.state_dict() if ended and request.upload_auxiliary else None,
    )


@torch.no_grad()
def row_shapes(client: Client, request: ShapeRequest) -> ShapeReply:
    """Return what one row of the client's inputs and of its smashed data looks like.

    SegmentMismatchError if the model is cut elsewhere, or several values cross.
    """
    started = time.perf_counter()
    client.check_cut(request.cut)
    examples = client.data.train
    if len(examples) == 0:
        raise DataError(f"client {client.name!r} has no training examples")
    client.undo_forward()
    client.segment.expect(request.inputs)
    with seeded(derive_seed(0, "shape", client.name), client.device):
        inputs, _ = examples.batch([examples.in_order("")[0]])
    smashed = client.first.evaluated(inputs)
    if not isinstance(smashed, Tensor):
        raise SegmentMismatchError(
            f"client {client.name!r}: the method needs smashed data that is one tensor, but "
            f"{not_one_tensor(smashed)}; cut where one crosses, with its rows in front"
        )
    return ShapeReply(
        client=client.name,
        server_round=request.server_round,
        shape=tuple(smashed.shape[1:]),
        inputs=map_tensors(lambda one: one[:0].cpu(), inputs),
        seconds=time.perf_counter() - started,
    )


def _begin_auxiliary(client: Client, request: LocalRequest) -> None:
    plan = request.auxiliary_plan
    if plan is None:
        raise ProtocolError("record 'auxiliary-config' is missing, it comes with 'config'")
    if client.auxiliary is None or not client.auxiliary.fits(plan):
        client.auxiliary = Auxiliary(plan, client.spec, client.device, client.split_anew)
    client.auxiliary.begin(plan)
    if request.auxiliary is not None:
        client.auxiliary.replace(request.auxiliary, plan.version)
    if client.auxiliary.version != plan.version:
        raise StateLostError(
            f"client {client.name!r} holds auxiliary model {client.auxiliary.version}, the server "
            f"expects {plan.version}: it is new, or its state was lost"
        )


def _auxiliary_of(client: Client) -> Auxiliary:
    if client.auxiliary is None:
        raise StateLostError(f"client {client.name!r} has no auxiliary model: its state was lost")
    return client.auxiliary


def _one(client: Client, smashed: Smashed) -> Tensor:
    if isinstance(smashed, Tensor):
        if not can_be_squared(smashed):  # the server looks only at what goes up
            raise NonFiniteError(
                f"smashed data of client {client.name!r}: there are values whose squares overflow"
            )
        return smashed
    raise SegmentMismatchError(
        f"client {client.name!r}: an auxiliary model takes smashed data that is one tensor, but "
        f"{len(smashed.values)} values cross at {client.cut!r}; cut where one crosses"
    )


def _seed(client: Client, step: int) -> int:
    return derive_seed(client.plan.seed, "auxiliary", client.name, client.plan.server_round, step)
