"""One step of a client: its forward pass, and what becomes of the gradient that comes back."""

import cmath
import time
from typing import Any

import torch
from torch import Tensor

from flsplit.client.live_client import Client, Pending
from flsplit.client.state import NO_STEP
from flsplit.client.tail import withheld
from flsplit.client_parts.chain import ClientStep
from flsplit.client_parts.compression import Packed
from flsplit.cut import Crossing
from flsplit.cut.smashed import CutGradient, Smashed, detached, fitting, learning_in
from flsplit.errors import NonFiniteError, ProtocolError, located
from flsplit.finite import all_finite, clip_gradients
from flsplit.message.fields import WHOLE
from flsplit.message.request import Backward, Batch
from flsplit.message.steps import FinishReply, FinishRequest, StepReply, StepRequest
from flsplit.message.u_shape import TailReply, TailRequest
from flsplit.nested import num_rows, shapes_of, to_device
from flsplit.seeds import derive_seed, seeded
from flsplit.untrained import put_all


def take_step(client: Client, request: StepRequest) -> StepReply:
    """Do one client step: the last one's backward pass, then the next one's forward pass."""
    started = time.perf_counter()
    if request.plan:
        client.begin(request.plan, request.segment, request.optimizer)
    client.check_round(request.server_round)
    if request.backward:
        backward(client, request.backward)
    pending = forward(client, request.step)
    smashed, labels = pending.leaving
    return StepReply(
        client=client.name,
        server_round=request.server_round,
        step=request.step,
        smashed=smashed,
        labels=labels,
        num_examples=client.num_examples,
        num_steps=client.num_steps,
        seconds=time.perf_counter() - started,
        traces=client.untold([smashed]) if isinstance(smashed, Crossing) else None,
        frozen=not (pending.learning or client.tail) and bool(num_rows(labels)),
        steps_before=client.steps_before,
    )


def take_tail(client: Client, request: TailRequest) -> TailReply:
    """Run the last layers of a U-shaped split forward and backward.

    ProtocolError if no such step is pending, or the model isn't cut twice. DataError,
    SegmentMismatchError or NonFiniteError if the last layers or the loss can't take the batch.
    """
    started = time.perf_counter()
    client.check_round(request.server_round)
    step, plan = request.step, client.plan
    if client.tail is None or step != client.memory.pending:
        raise ProtocolError(
            f"outputs of step {step} came, client {client.name!r} "
            + ("has no layers after them" if client.tail is None else _awaits(client))
        )
    if client.pending and client.pending.passed_tail:  # asked twice for a step
        client.undo_forward()
    client.pending = pending = client.pending or _compute(client, step)
    pending.passed_tail = True
    seed = derive_seed(plan.seed, "tail", client.name, plan.server_round, step)
    try:
        with seeded(seed, client.device), located(f"client {client.name!r}, step {step}"):
            gradient, stays = client.tail.gradients(
                request.outputs, pending.smashed, pending.inputs, pending.labels
            )
        if client.parts.parts:
            at = _part_step(client, step)
            gradient, packed, memory = client.parts.output_gradient(
                at, gradient, pending.labels, pending.rows
            )
            stays |= memory
            if packed:
                client.packed[WHOLE] = packed
        client.memory.tail = stays
    except BaseException:
        client.undo_forward()
        raise
    return TailReply(
        client=client.name,
        server_round=request.server_round,
        step=step,
        gradient=gradient,
        seconds=time.perf_counter() - started,
    )


def finish_round(client: Client, request: FinishRequest) -> FinishReply:
    """Do a round's last backward pass and hand over what the server asks for."""
    started = time.perf_counter()
    client.check_round(request.server_round)
    if request.backward:
        backward(client, request.backward)
    return FinishReply(
        client=client.name,
        server_round=request.server_round,
        num_examples=client.num_examples,
        seconds=time.perf_counter() - started,
        segment=client.handed_over() if request.upload_segment else None,
        optimizer=client.state().optimizer if request.upload_optimizer else None,
    )


def forward(client: Client, step: int, place: str | None = WHOLE) -> Pending:
    """Compute the smashed data of ``step``, whose gradient is awaited then.

    ``place`` is its place in the answer, None if it stays here.

    ProtocolError if ``step`` is not the next one. DataError, SegmentMismatchError or NonFiniteError
    if the batch can't be computed.
    """
    memory = client.memory
    if not step == memory.steps_done < client.num_steps:
        raise ProtocolError(
            f"step is {step}, expected {memory.steps_done} of {client.num_steps} "
            f"(client {client.name!r}, round {client.plan.server_round})"
        )
    if client.pending:  # asked twice for a step: the buffers move once
        client.undo_forward()
    client.pending = pending = _compute(client, step, sent=place is not None)
    memory.pending, memory.tail = step, {}
    for name, packed in pending.packed.items():
        client.packed[f"{place}:{name}" if name else str(place)] = packed
    return pending


def backward(client: Client, request: Backward) -> None:
    """Back-propagate the cut-layer gradient of the pending step and let the optimizer step.

    ProtocolError if the gradient is of another step or another shape. NonFiniteError if it is NaN
    or infinite; the weights stay as they were.
    """
    memory = client.memory
    if request.step != memory.pending:
        raise ProtocolError(
            f"gradient of step {request.step} came, client {client.name!r} {_awaits(client)}"
        )
    # Without a cache the forward pass is gone: compute it again, with the same batch, the
    # same random numbers and the buffers of before.
    if client.pending is None:
        client.pending = _compute(client, request.step)
    if request.gradient is not None:
        _update(client, client.pending, request.gradient)
    if client.tail:  # now: the backward pass may need what the first layers' pass left in them
        client.tail.put_buffers(memory.tail)
        client.parts.remember(memory.tail)
    memory.drawn = client.pending.drawn
    memory.steps_done += 1
    memory.trained += 1
    client.pending, memory.pending, memory.tail = None, NO_STEP, {}
    if client.parts.parts:
        client.parts.check_state()
        memory.parts = client.parts.state()


def _awaits(client: Client) -> str:
    pending = client.memory.pending
    return f"awaits {'none' if pending == NO_STEP else pending}"


def _compute(client: Client, step: int, *, sent: bool = True) -> Pending:
    plan, parts = client.plan, client.parts
    indices, drawn = client.order.batch(plan, step, client.memory.drawn)
    if not indices:
        none, no_labels = torch.empty(0), torch.empty(0, dtype=torch.int64)
        return Pending(step, none, [], (none, no_labels), None, no_labels, [], drawn)
    seed = derive_seed(plan.seed, "client", client.name, plan.server_round, step)
    buffers = list(map(torch.clone, client.first.buffers))
    if not client.first.trains:
        client.first.train()
    loss, packed, rows = None, dict[str, Packed](), None
    try:
        with seeded(seed, client.device):
            inputs, labels = client.data.train.batch(indices)
            smashed = client.first(inputs)
            if parts.parts:
                at = _part_step(client, step)
                smashed = parts.smashed(at, smashed)
                leaving = smashed.values if isinstance(smashed, Crossing) else smashed
                loss = parts.loss(at, to_device(inputs, client.device), leaving, labels)
                smashed, inputs, labels, rows = parts.shuffled(at, smashed, inputs, labels, indices)
        learning = learning_in(smashed)
        _check_smashed(client, smashed, learning, step)
        if rows is not None and sent:
            packed = parts.pack(smashed, rows)
    except BaseException:
        put_all(client.first.buffers, buffers)
        # A part may have remembered something of a step that never happened.
        parts.load(client.memory.parts)
        raise
    kept = inputs if client.tail else None  # their shapes tell the way that forward takes
    goes: Batch = detached(smashed), withheld(labels) if client.tail else labels
    return Pending(step, smashed, learning, goes, kept, labels, buffers, drawn, loss, packed, rows)


def _part_step(client: Client, step: int) -> ClientStep:
    plan, start = client.plan, client.memory.round_start
    return ClientStep(plan.seed, client.name, plan.server_round, step, client.segment, start)


def _update(client: Client, pending: Pending, gradient: CutGradient) -> None:
    wanted, tail, stays = pending.learning, client.tail, client.memory.tail
    given = fitting(gradient, pending.smashed)
    if given is None:
        raise _misshapen(client, pending, gradient)
    if not all(map(all_finite, given)):
        raise _not_finite(client, f"cut-layer gradient of step {pending.step}")
    if client.optimizer is None or not (wanted or tail):
        return
    if tail and not stays:
        raise ProtocolError(
            f"the cut-layer gradient of step {pending.step} came before the outputs (client "
            f"{client.name!r})"
        )
    # None where the first layers have nothing to learn.
    gradients: list[Any] = list(map(Tensor.to, given, wanted))
    if client.parts.parts:
        gradients = client.parts.cut_gradients(_part_step(client, pending.step), gradients)
    client.optimizer.zero_grad()
    outputs = wanted
    if pending.loss is not None:
        outputs, gradients = [*outputs, pending.loss], [*gradients, None]
    if tail:
        tail.put_gradients(stays)
        for kept, own in tail.of_kept(pending.smashed, stays):
            outputs, gradients = [*outputs, kept], [*gradients, own]
    if outputs:
        torch.autograd.backward(outputs, gradients)
    if client.parts.parts:
        client.parts.gradients(_part_step(client, pending.step), client.parameters)
    _check_gradients(client, pending.step)
    if client.spec.max_grad_norm is not None:
        clip_gradients(client.parameters, client.spec.max_grad_norm)
    client.optimizer.step()


def _check_smashed(client: Client, smashed: Smashed, learning: list[Tensor], step: int) -> None:
    # A mask that crosses may be -inf on purpose.
    if not all(map(all_finite, [smashed] if isinstance(smashed, Tensor) else learning)):
        raise _not_finite(client, f"smashed data of step {step}")


def _misshapen(client: Client, pending: Pending, gradient: CutGradient) -> ProtocolError:
    wanted: Any = pending.smashed
    if isinstance(wanted, Crossing):
        wanted = {name: wanted.values[name] for name in wanted.learning}
    return ProtocolError(
        f"cut-gradient has shape {shapes_of(gradient)}, the smashed data of step "
        f"{pending.step} {shapes_of(wanted)} (client {client.name!r})"
    )


def _check_gradients(client: Client, step: int) -> None:
    # One number for all: it is finite only if they are. Only what isn't is looked at closer.
    total: float | Tensor = 0.0
    for parameter in client.parameters:
        if parameter.grad is not None:
            total = total + parameter.grad.sum()
    if isinstance(total, float) or cmath.isfinite(total.item()):
        return
    if not all(all_finite(one.grad) for one in client.parameters if one.grad is not None):
        raise _not_finite(client, f"gradient of the client segment in step {step}")


def _not_finite(client: Client, what: str) -> NonFiniteError:
    return NonFiniteError(
        f"{what} is NaN or infinite (client {client.name!r}, round {client.plan.server_round})"
    )
