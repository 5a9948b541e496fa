"""The client: notes when it computes, and can be as slow as a weaker device."""

import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable

from flsplit import client_app
from traced.task import CUT, build_model, load_partition
from traced.trace import Trace


def trace_messages(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Note when a message was worked on, and what local steps it asked for."""
    began = time.monotonic()
    reply = call_next(message, context)
    trace = open_trace(str(context.run_config["trace-dir"]), context.node_config["partition-id"])
    group = message.metadata.group_id
    if message.metadata.message_type != "train.local" or reply.has_error():
        number = int(group) if group.isdecimal() else 0
        trace.add("message", number, began, kind=message.metadata.message_type)
        return reply
    first: Any = message.content.config_records["local"]["step"]
    done: Any = reply.content.metric_records["metrics"]["steps-done"]
    wait_for_device(began, done - first, context)
    span = {"node": str(context.node_id), "step": first, "steps": done - first}
    trace.add("client", int(group), began, **span)
    return reply


def wait_for_device(began: float, steps: int, context: Context) -> None:
    """Take as long as a device that needs ``pace`` seconds for a step: the emulation itself."""
    pace: Any = context.run_config["pace"]
    time.sleep(max(0.0, began + steps * pace - time.monotonic()))


@cache
def open_trace(folder: str, client: int) -> Trace:
    return Trace(Path(folder) / f"client-{client}.jsonl")


app = client_app(
    model=build_model,
    cut=CUT,
    data=load_partition,
    optimizer=torch.optim.Adam,
    mods=[trace_messages],
)
