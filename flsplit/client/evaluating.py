"""A client's test data: through its first layers, and through its last ones if it has them."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from flsplit.client.live_client import Client
from flsplit.client.tail import withheld
from flsplit.cut.smashed import Smashed
from flsplit.errors import DataError, ProtocolError
from flsplit.message.evaluate import EvaluateReply, EvaluateRequest
from flsplit.message.u_shape import EvaluateTailReply, EvaluateTailRequest
from flsplit.nested import num_rows
from flsplit.seeds import derive_seed, seeded
from flsplit.untrained import keeping_buffers


@torch.no_grad()
def evaluate_batch(client: Client, request: EvaluateRequest) -> EvaluateReply:
    """Run one test batch through the client segment.

    Without test data there are 0 batches, and both tensors are empty.
    """
    started = time.perf_counter()
    if request.segment:
        client.replace_segment(request.segment)
    client.check_version(request.segment_version)
    client.segment.expect(request.inputs)
    rows, num_batches = _rows(client, request.batch, request.batch_size)
    smashed: Smashed = torch.empty(0)
    labels: Any = torch.empty(0, dtype=torch.int64)
    if num_batches:
        if request.batch == 0:
            client.memory.told, client.memory.tested = (), {}
        smashed, inputs, labels = _run(client, request.batch, rows)
        if client.tail:
            client.last_test = request.batch, request.batch_size, smashed, inputs, labels
            labels = withheld(labels)
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


@torch.no_grad()
def evaluate_tail(client: Client, request: EvaluateTailRequest) -> EvaluateTailReply:
    """Run one test batch through the last layers of a U-shaped split; tell the sums with the last.

    Before that they are kept: a batch's loss would tell of its labels.
    """
    started = time.perf_counter()
    if client.tail is None:
        raise ProtocolError(f"outputs came, client {client.name!r} has no layers after them")
    batch, size, last = request.batch, request.batch_size, client.last_test
    if last is None or last[:2] != (batch, size):  # without a cache: compute it again
        last = batch, size, *_run(client, batch, _rows(client, batch, size)[0])
    client.first.eval()
    seed = derive_seed(0, "test tail", client.name, batch)
    with keeping_buffers(client.segment), seeded(seed, client.device):
        loss, count, _ = client.tail.loss(request.outputs, *last[2:])
    now = {
        "loss": loss * count.weight if count.weight else 0.0,  # else there is no mean
        "weight": count.weight,
        "correct": count.correct,
        "classified": count.classified,
        "num_examples": num_rows(last[-1]),
    }
    sums = client.memory.tested
    for name, number in now.items():
        own = torch.as_tensor(number, dtype=torch.float64).cpu()
        sums[name] = sums[name] + own if name in sums else own
    told = {name: float(one) if request.last else 0.0 for name, one in sums.items()}
    return EvaluateTailReply(
        client=client.name,
        server_round=request.server_round,
        batch=batch,
        loss=told["loss"],
        weight=told["weight"],
        correct=int(told["correct"]),
        classified=int(told["classified"]),
        num_examples=int(told["num_examples"]),
        seconds=time.perf_counter() - started,
    )


def _rows(client: Client, batch: int, batch_size: int) -> tuple[Sequence[int], int]:
    tests, memory = client.data.test, client.memory
    if tests is None:
        return [], 0
    order = tests.in_order(memory.plan.experiment if memory.plan else "")
    if batch == 0 or not memory.num_tests:  # data grow or shrink between evaluations
        memory.num_tests = len(order)
    num_batches = -(-memory.num_tests // batch_size)
    if not num_batches:
        return [], 0
    if batch >= num_batches:
        raise ProtocolError(
            f"test batch {batch} asked for, client {client.name!r} has {num_batches}"
        )
    if len(order) < memory.num_tests:
        raise DataError(
            f"client {client.name!r} began an evaluation with {memory.num_tests} test "
            f"examples, now there are {len(order)}"
        )
    return order[batch * batch_size : min((batch + 1) * batch_size, memory.num_tests)], num_batches


def _run(client: Client, batch: int, rows: Sequence[int]) -> tuple[Smashed, Any, Any]:
    assert client.data.test is not None
    client.undo_forward()
    # Seeded as a training step is: a transform that draws gives the same scores again.
    with seeded(derive_seed(0, "test", client.name, batch), client.device):
        inputs, labels = client.data.test.batch(rows)
    return client.first.evaluated(inputs), inputs, labels
