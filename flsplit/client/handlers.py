"""The handlers of a split ClientApp: describe, shape, step, finish, local, evaluate."""

import time
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from flsplit.client.cache import find_client, keep_client
from flsplit.client.hand_over import check_mods, through_mods
from flsplit.client.live_client import Client
from flsplit.client.local_training import row_shapes, train_locally
from flsplit.client.spec import ClientSpec, client_name
from flsplit.cut import Crossing
from flsplit.cut.smashed import learning_in
from flsplit.errors import FlsplitError
from flsplit.log import logger
from flsplit.message.evaluate import EvaluateReply, EvaluateRequest
from flsplit.message.local_steps import LocalRequest
from flsplit.message.packing import PACKED, put_packed
from flsplit.message.raised import raised
from flsplit.message.shape import ShapeRequest
from flsplit.message.steps import FinishReply, FinishRequest, StepReply, StepRequest
from flsplit.message.u_shape import (
    EvaluateTailReply,
    EvaluateTailRequest,
    TailReply,
    TailRequest,
)
from flsplit.nested import num_rows

Handler = Callable[[Message, Context], Message]


def add_handlers(app: ClientApp, spec: ClientSpec) -> None:
    """Register split learning's handlers with an existing ClientApp."""

    @app.query("describe")
    @answering_errors
    def describe(message: Message, context: Context) -> Message:
        head = ConfigRecord({"client": client_name(context)})
        return Message(RecordDict({"reply": head}), reply_to=message)

    def serve(register: Callable[[Handler], Handler], request_type: Any, compute: Any) -> None:
        @register
        @answering_errors
        def handle(message: Message, context: Context) -> Message:
            client, content = None, message.content
            if PACKED in content:
                client = find_client(spec, context)
                content = client.unpacked(content, request_type.packed)
            request = request_type.from_content(content)
            client = client or find_client(spec, context)
            client.packed = {}
            if request.plan:
                check_mods(spec.privacy_mods, request.plan)
            try:
                reply = compute(client, request)
                if spec.privacy_mods:
                    reply = through_mods(client, message, reply)
                content = reply.to_content()
                if client.packed:
                    put_packed(content, reply.packed, client.packed)
                return Message(content, reply_to=message)
            finally:  # also when a step fails
                keep_client(client, context)

    serve(app.train("step"), StepRequest, take_step)
    serve(app.train("tail"), TailRequest, take_tail)
    serve(app.train("finish"), FinishRequest, finish_round)
    serve(app.train("local"), LocalRequest, train_locally)
    serve(app.query("shape"), ShapeRequest, row_shapes)
    serve(app.evaluate("step"), EvaluateRequest, evaluate_batch)
    serve(app.evaluate("tail"), EvaluateTailRequest, evaluate_tail)


def take_step(client: Client, request: StepRequest) -> StepReply:
    """Do one client step: the last one's backward pass, then the next one's forward pass."""
    started = time.perf_counter()
    if request.plan:
        client.begin(request.plan, request.segment, request.optimizer)
    client.check_round(request.server_round)
    if request.backward:
        client.backward(request.backward)
    smashed, labels = client.forward(request.step)
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
        frozen=not (learning_in(smashed) or client.tail) and bool(num_rows(labels)),
        steps_before=client.steps_before,
    )


def take_tail(client: Client, request: TailRequest) -> TailReply:
    """Run the last layers of a U-shaped split forward and backward."""
    started = time.perf_counter()
    client.check_round(request.server_round)
    gradient = client.tail_gradient(request.step, request.outputs)
    return TailReply(
        client=client.name,
        server_round=request.server_round,
        step=request.step,
        gradient=gradient,
        seconds=time.perf_counter() - started,
    )


def finish_round(client: Client, request: FinishRequest) -> FinishReply:
    """Do a round's last backward pass and hand over what the server asks for."""
    started = time.perf_counter()
    client.check_round(request.server_round)
    if request.backward:
        client.backward(request.backward)
    return FinishReply(
        client=client.name,
        server_round=request.server_round,
        num_examples=client.num_examples,
        seconds=time.perf_counter() - started,
        segment=client.handed_over() if request.upload_segment else None,
        optimizer=client.state().optimizer if request.upload_optimizer else None,
    )


def evaluate_batch(client: Client, request: EvaluateRequest) -> EvaluateReply:
    """Run one test batch through the client segment."""
    started = time.perf_counter()
    if request.segment:
        client.replace_segment(request.segment)
    client.check_version(request.segment_version)
    smashed, labels, num_batches = client.evaluate(request.batch, request.batch_size)
    return EvaluateReply(
        client=client.name,
        server_round=request.server_round,
        batch=request.batch,
        num_batches=num_batches,
        smashed=smashed,
        labels=labels,
        seconds=time.perf_counter() - started,
        traces=client.untold([smashed]),
    )


def evaluate_tail(client: Client, request: EvaluateTailRequest) -> EvaluateTailReply:
    """Run one test batch through the last layers of a U-shaped split."""
    started = time.perf_counter()
    sums = client.evaluate_tail(request.batch, request.batch_size, request.outputs)
    if not request.last:  # a batch's loss would tell of its labels
        sums = dict.fromkeys(sums, 0.0)
    loss, weight = sums.pop("loss"), sums.pop("weight")
    return EvaluateTailReply(
        client=client.name,
        server_round=request.server_round,
        batch=request.batch,
        loss=loss,
        weight=weight,
        **{name: int(number) for name, number in sums.items()},
        seconds=time.perf_counter() - started,
    )


def answering_errors(handler: Handler) -> Handler:
    """Answer an exception with an Error in one line, so that the state is kept on any carrier."""

    @wraps(handler)
    def answer(message: Message, context: Context) -> Message:
        threads = context.run_config.get("torch-threads", 0)
        if isinstance(threads, int) and threads > 0:
            torch.set_num_threads(threads)
        try:
            return handler(message, context)
        except Exception as error:
            expected = isinstance(error, FlsplitError)
            reply = raised(message, error)
            logger.error(
                "client %r: %s", client_name(context), reply.error.reason, exc_info=not expected
            )
            return reply

    return answer
