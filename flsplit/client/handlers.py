"""The handlers of a split ClientApp: describe, shape, step, finish, local, evaluate."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from flsplit.client.cache import find_client, keep_client
from flsplit.client.client_step import finish_round, take_step, take_tail
from flsplit.client.evaluating import evaluate_batch, evaluate_tail
from flsplit.client.hand_over import check_mods, through_mods
from flsplit.client.local_training import row_shapes, train_locally
from flsplit.client.spec import ClientSpec, client_name
from flsplit.errors import FlsplitError
from flsplit.log import logger
from flsplit.message.evaluate import EvaluateRequest
from flsplit.message.local_steps import LocalRequest
from flsplit.message.packing import PACKED, put_packed
from flsplit.message.raised import CLIENTS_OWN, raised
from flsplit.message.shape import ShapeRequest
from flsplit.message.steps import FinishRequest, StepRequest
from flsplit.message.u_shape import EvaluateTailRequest, TailRequest

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


def answering_errors(handler: Handler) -> Handler:
    """Answer an exception with an Error in one line, so that the state is kept on any carrier."""

    @wraps(handler)
    def answer(message: Message, context: Context) -> Message:
        threads = context.run_config.get("torch-threads", 0)
        if isinstance(threads, int) and threads > 0:
            torch.set_num_threads(threads)
        try:
            return handler(message, context)
        except CLIENTS_OWN as error:
            expected = isinstance(error, FlsplitError)
            reply = raised(message, error)
            logger.error(
                "client %r: %s", client_name(context), reply.error.reason, exc_info=not expected
            )
            return reply

    return answer
