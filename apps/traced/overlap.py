"""Measures how far clients and server of FSL-SAGE work at the same time, on real SuperNodes.

    python apps/traced/overlap.py --pace 0.03 0.06 0.12

Starts a SuperLink with two SuperNodes and runs the app of this folder over a session, twice for
each pace: with overlap, and without. Without it the clients compute while the server waits, and
the server while the clients wait: that gives either's work alone. With it a round should take as
long as the slower of the two. Writes a trace and draws it.

Everything has one torch thread. Where there are fewer processor cores than clients and server, a
pace makes room: clients wait after their steps, as if they were devices that need that
many seconds for a step.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flsplit import History
from flsplit.processes import Federation, deployment

APP = Path(__file__).parent
WARM_UP = 1  # rounds that are not counted

Span = dict[str, Any]
Work = tuple[float, float, float]  # seconds: the busier client's, the server's, the round's


@dataclass(frozen=True)
class Traced:
    """A run's trace and ledger."""

    spans: list[Span]
    arrivals: list[tuple[float, str]]
    history: History

    def work(self, server_round: int) -> Work:
        """Return the busier client's, the server's and all seconds of a round."""
        mine = [one for one in self.spans if one["round"] == server_round]
        clients = [sum(map(seconds, spans)) for spans in by_node(mine).values()]
        server = sum(seconds(s) for s in mine if s["what"] in ("server", "alignment"))
        return max(clients), server, self.history[server_round - 1].seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pace",
        type=float,
        nargs="+",
        default=[0.03, 0.06, 0.12],
        help="seconds of a client's step",
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--local-steps", type=int, default=20)
    parser.add_argument("--upload-every", type=int, default=5)
    parser.add_argument("--align-every", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("overlap-results"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="flsplit-") as temporary,
        deployment(Path(temporary) / "flower", num_supernodes=2) as flower,
    ):
        for pace in options.pace:
            folder = Path(temporary) / f"pace-{pace:g}"
            apart = run(flower, folder / "apart", pace, options, overlap=False)
            beside = run(flower, folder / "beside", pace, options, overlap=True)
            write(apart, beside, options.out / folder.name)


def write(apart: Traced, beside: Traced, path: Path) -> None:
    text = table(apart, beside)
    Path(f"{path}.md").write_text(text + "\n")
    Path(f"{path}.json").write_text(json.dumps([apart.spans, beside.spans]))
    draw(apart, beside, Path(f"{path}.png"))
    print(f"{path.name}\n{text}", flush=True)


def run(
    flower: Federation, folder: Path, pace: float, options: argparse.Namespace, *, overlap: bool
) -> Traced:
    """Run the app and return its trace."""
    folder.mkdir(parents=True)
    config = {
        "pace": pace,
        "num-server-rounds": options.rounds,
        "local-steps": options.local_steps,
        "upload-every": options.upload_every,
        "align-every": options.align_every,
        "overlap": overlap,
        "trace-dir": str(folder),
    }
    finished = flower.run_app(APP, config)
    if not finished.completed:
        raise SystemExit(finished.log)
    paths = [folder / "server.jsonl", *sorted(folder.glob("client-*.jsonl"))]
    spans = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    arrivals = json.loads((folder / "arrivals.json").read_text())
    return Traced(spans, arrivals, History.load(folder / "history.jsonl"))


def seconds(span: Span) -> float:
    return float(span["ended"] - span["began"])


def by_node(spans: list[Span]) -> dict[str, list[Span]]:
    """Return the clients' spans, by node."""
    found: dict[str, list[Span]] = {}
    for span in spans:
        if span["what"] == "client":
            found.setdefault(span["node"], []).append(span)
    return found


def table(apart: Traced, beside: Traced) -> str:
    """Return a row per round: what the sides did, what the round took, and how that compares.

    The last row is their mean. The first round isn't counted.
    """
    lines = [
        "| round | without overlap: clients, s | server, s | round, s "
        "| with overlap: clients, s | server, s | round, s "
        "| over the slower of the two | over the slower alone |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    works = []
    for entry in beside.history[WARM_UP:]:
        works.append((apart.work(entry.round), beside.work(entry.round)))
        aligned = " (alignment)" if "cosine-after-alignment" in entry.metrics else ""
        lines.append(row(f"{entry.round}{aligned}", [works[-1]]))
    return "\n".join([*lines, row("mean", works)])


def row(name: str, works: list[tuple[Work, Work]]) -> str:
    """Return a row with means over rounds; the slower side is that of each round."""
    before, after = (list(zip(*own, strict=True)) for own in zip(*works, strict=True))
    means = " | ".join(f"{statistics.mean(column):.2f}" for column in (*before, *after))
    own = sum(max(work[:2]) for _, work in works)
    alone = sum(max(work[:2]) for work, _ in works)
    took = sum(after[2])
    return f"| {name} | {means} | {took / own - 1:+.0%} | {took / alone - 1:+.0%} |"


# --- the picture -----------------------------------------------------------------------------


def draw(apart: Traced, beside: Traced, path: Path) -> None:
    """Draw the second round without and with overlap, on the same scale."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    both = figure.subplots(2, 1, sharex=True)
    for axes, traced, title in zip(
        both, (apart, beside), ("without overlap", "with overlap"), strict=True
    ):
        draw_round(axes, traced, WARM_UP + 1)
        axes.set_title(title)
    both[1].set_xlabel("seconds since the round began")
    both[0].legend(loc="upper right", fontsize=8)
    figure.savefig(path, dpi=90)


def draw_round(axes: Axes, traced: Traced, server_round: int) -> None:
    mine = [span for span in traced.spans if span["round"] == server_round]
    [whole] = [span for span in mine if span["what"] == "round"]
    start, end = whole["began"], whole["ended"]
    nodes = by_node(mine)
    rows = {node: row for row, node in enumerate(sorted(nodes), start=1)}
    for row, (node, spans) in zip(rows.values(), sorted(nodes.items()), strict=True):
        label = "local steps" if row == 1 else None
        axes.broken_barh(
            bars(spans, start), (row - 0.4, 0.8), color="tab:blue", ec="w", label=label
        )
        times = [t - start for t, host in traced.arrivals if host == node and start < t < end]
        label = "arrives at the server" if row == 1 else None
        axes.plot(times, [row - 0.5] * len(times), "k^", markersize=6, label=label)
    for shade, (what, colour) in {
        "server step": ("server", "tab:orange"),
        "alignment": ("alignment", "tab:red"),
    }.items():
        spans = [span for span in mine if span["what"] == what]
        axes.broken_barh(bars(spans, start), (-0.4, 0.8), color=colour, ec="w", label=shade)
    axes.axvline(end - start, color="grey", linestyle=":")
    names = ["server", *(f"client {index}" for index in range(len(rows)))]
    axes.set_yticks(range(len(names)), names)


def bars(spans: list[Span], start: float) -> list[tuple[float, float]]:
    return [(span["began"] - start, seconds(span)) for span in spans]


if __name__ == "__main__":
    main()
