"""What fine-tuning takes on a device, as the operating system sees it: a process of its own.

    python apps/llm/device_memory.py --model gpt2-40m --steps 3

A client of the split model trains in a new process, with the server in this one, and beside it
somebody who holds the whole model, as FedAvg asks of everybody. What counts is the most memory
that the process ever had resident (VmHWM of Linux), less what it had before there was a model. A
split client needs more in its first step: its weights come as a message, and the cut is looked at.
"""

import argparse
import multiprocessing
import re
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

APP = Path(__file__).resolve().parent
sys.path.insert(0, str(APP))

from llm.client_app import app  # noqa: E402
from llm.data import load_partition  # noqa: E402
from llm.models import add_adapters, load_base  # noqa: E402
from llm.server_app import strategy_of  # noqa: E402

from flsplit import LocalGrid  # noqa: E402
from flsplit.carry.cohort import Cohort  # noqa: E402
from flsplit.flower_internals import ensure_task_identity  # noqa: E402
from flsplit.message.types import LOCAL, STEP  # noqa: E402
from flsplit.wire.codec import Decoder, encode  # noqa: E402
from flsplit.wire.header import Envelope  # noqa: E402

MIB = 2**20
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32, checkpointing": {"checkpointing": True},
    "bf16": {"precision": "bf16"},
    "bf16, checkpointing": {"precision": "bf16", "checkpointing": True},
}


def resident(which: str) -> int:
    """Return bytes of this process from Linux: VmRSS now, or VmHWM, the most ever."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{which}:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def forget_peak() -> None:
    """Let VmHWM begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def split_client(connection: Connection, config: dict[str, Any]) -> None:
    """Be the one client of a split run, and answer what comes until nothing more does."""
    torch.set_num_threads(1)
    ensure_task_identity(run_id=1)
    before, cohort, decoder = resident("VmRSS"), Cohort(app), Decoder()
    context, first, steps = context_of(config), 0, 0
    while frame := connection.recv_bytes():
        if decoded := decoder.add(frame):
            envelope, message, _ = decoded
            send(connection, envelope, cohort.answer(message, context))
            steps += message.metadata.message_type in (STEP, LOCAL)
            if steps == 1 and not first:  # its forward pass is done, with all that comes once
                first = resident("VmHWM")
                del decoded, message
                forget_peak()
    connection.send((max(first, resident("VmHWM")) - before, resident("VmHWM") - before))


def whole_client(connection: Connection, config: dict[str, Any]) -> None:
    """Fine-tune the whole model, as a client of FedAvg does."""
    torch.set_num_threads(1)
    before = resident("VmRSS")
    loader, _ = load_partition(context_of(config))
    model = add_adapters(load_base(config), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    rows = [loader.dataset[index] for index in range(config["batch-size"])]
    batch = loader.collate_fn(rows)
    for _ in range(config["local-steps"]):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    connection.recv_bytes()
    connection.send((resident("VmHWM") - before,) * 2)


def context_of(config: dict[str, Any]) -> Context:
    node = {"partition-id": 0, "num-partitions": 1}
    return Context(1, 1, node, RecordDict(), config)


def send(connection: Connection, envelope: Envelope, message: Message) -> None:
    for frame in encode(envelope, message).frames():
        connection.send_bytes(bytes(frame))


class ElsewhereApp(ClientApp):
    """A ClientApp that answers in another process."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection
        self._sent = 0

    def __call__(self, message: Message, _context: Context) -> Message:
        """Send the message there, and return what comes back."""
        self._sent += 1
        send(self._connection, Envelope("", self._sent, 1), message)
        decoder = Decoder()
        while not (decoded := decoder.add(self._connection.recv_bytes())):
            pass
        return decoded[1]


@contextmanager
def process(work: Callable[..., None], config: dict[str, Any]) -> Iterator[Connection]:
    """Run something in a process that shares nothing with this one."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    child = spawn.Process(target=work, args=(theirs, config))
    child.start()
    theirs.close()
    yield ours
    child.join()


def measure_split(config: dict[str, Any], rounds: int = 1) -> dict[str, float]:
    """Return a split client's peak, and the last round's bytes per token, up and down."""
    torch.manual_seed(0)
    model = add_adapters(load_base(config), config)
    with process(split_client, config) as connection:
        grid = LocalGrid(ElsewhereApp(connection), 1, run_config=config, progress=False)
        result = strategy_of(config, model).start(grid, model.state_dict(), num_rounds=rounds)
        connection.send_bytes(b"")
        peak, later = connection.recv()
    entry = result.history[-1]
    sent, tokens = entry.traffic.logical, entry.rows * int(config["seq-length"])
    up = sent["activations-up"] + sent["labels-up"]
    return {
        "peak": peak,
        "later": later,
        "up": up / tokens,
        "down": sent["gradients-down-unicast"] / tokens,
    }


def measure_whole(config: dict[str, Any]) -> dict[str, float]:
    """Return the peak of somebody who holds the whole model, and what FedAvg sends a round."""
    with process(whole_client, config) as connection:
        connection.send_bytes(b"go on")
        peak, later = connection.recv()
        return {"peak": peak, "later": later}


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gpt2-40m")
    parser.add_argument("--cut", default="1")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--variants", nargs="*", choices=[*VARIANTS], default=[*VARIANTS])
    given = parser.parse_args()
    defaults = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    common = defaults | {
        "model": given.model, "cut": given.cut, "local-steps": given.steps, "strategy": "psl",
        "strategy-args": "{fraction-evaluate = 0.0}", "batch-size": given.batch_size,
        "seq-length": given.seq_length, "train-head": False,
    }  # fmt: skip
    print("| | whole model, MiB | split client, MiB | after its first step | up, B/token | down |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in given.variants:
        started, config = time.perf_counter(), common | VARIANTS[name]
        whole, split = measure_whole(config), measure_split(config)
        print(
            f"| {name} | {whole['peak'] / MIB:.0f} | {split['peak'] / MIB:.0f} "
            f"| {split['later'] / MIB:.0f} | {split['up']:.0f} | {split['down']:.0f} |",
            flush=True,
        )
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
