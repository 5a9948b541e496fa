"""Measures FSL-SAGE's rounds over Flower's own messages, for different numbers of local steps.

    python apps/traced/exchanges.py --local-steps 10 100 1000

Starts a SuperLink with two SuperNodes and runs the app of this folder with ``carrier = flower``
and the small network of the quickstart. A round is one message to each client, so what Flower
takes beside the computing should not depend on the number of steps.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from flsplit import History
from flsplit.processes import Federation, deployment

APP = Path(__file__).parent
WARM_UP = 1  # rounds that are not counted: the first also asks for shapes
HEAD = """\
| local steps | rounds | messages to a client in a round | a round, s | until clients begin, s \
| clients compute, s | server computes, s | the rest, s |
|---|---|---|---|---|---|---|---|"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--local-steps", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--upload-every", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--carrier", choices=["flower", "session"], default="flower")
    options = parser.parse_args()
    print(HEAD)
    with (
        tempfile.TemporaryDirectory(prefix="flsplit-") as temporary,
        deployment(Path(temporary) / "flower", num_supernodes=2) as flower,
    ):
        for steps in options.local_steps:
            folder = Path(temporary) / str(steps)
            print(row(steps, run(flower, folder, steps, options)), flush=True)


def run(flower: Federation, folder: Path, steps: int, options: argparse.Namespace) -> Path:
    """Run the app and return the folder with its ledger and trace."""
    folder.mkdir()
    config = {
        "network": "quickstart",
        "carrier": options.carrier,
        "local-steps": steps,
        "upload-every": options.upload_every,
        "align-every": 0,
        "num-server-rounds": options.rounds,
        "trace-dir": str(folder),
    }
    finished = flower.run_app(APP, config)
    if not finished.completed:
        raise SystemExit(finished.log)
    return folder


def row(steps: int, folder: Path) -> str:
    """Return medians; the two clients compute at the same time."""
    rounds = History.load(folder / "history.jsonl")[WARM_UP:]
    spans = read(folder / "client-0.jsonl", folder / "client-1.jsonl")
    began = {s["round"]: s["began"] for s in read(folder / "server.jsonl") if s["what"] == "round"}
    until, messages = [], []
    for entry in rounds:
        mine = [span for span in spans if span["round"] == entry.round]
        messages.append(len(mine) / 2)
        until.append(min(span["began"] for span in mine) - began[entry.round])
    whole = [entry.seconds for entry in rounds]
    client = [entry.client_seconds / 2 for entry in rounds]
    server = [entry.server_seconds for entry in rounds]
    rest = [w - c - s for w, c, s in zip(whole, client, server, strict=True)]
    figures = " | ".join(f"{statistics.median(one):.1f}" for one in (whole, until, client, server))
    return (
        f"| {steps} | {len(rounds)} | {max(messages):g} | {figures} "
        f"| {statistics.median(rest):.1f} ({min(rest):.1f} to {max(rest):.1f}) |"
    )


def read(*paths: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
