"""The page of docs/, from finished runs: tables, findings, pictures."""

import platform
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import torch
from leak import CLIENTS, CUTS, DELTA, Size
from matplotlib import pyplot as plt
from rows import DEFENCES, METHODS, PHIS, ROWS, U_DEFENCES

Runs = Mapping[tuple[str, str, int], dict[str, Any]]

PAPER = (0.2153, 0.2142, 0.2166, 0.2296, 0.2759)
"""SGLR's cross-entropy by φ, FashionMNIST, as its paper has it."""

COLUMNS = (
    "accuracy, %", "up", "down", "explained", "SSIM", "cross-entropy", "dcor²", "MI", "member",
    "labels", "ε", "seeds",
)  # fmt: skip

U_COLUMNS = (
    "accuracy, %", "up", "down", "explained", "labels, clustering", "labels, SDAR", "seeds",
)  # fmt: skip

SHOWN = [
    "psl", "sglr-0", "sglr-1", "splitfed-v2", "fsl-sage", "no-peek-1", "no-peek-10", "noise-0.5",
    "noise-2", "int8", "top-k", "low-rank",
]  # fmt: skip


class Numbers:
    """What the runs found, by row and cut, over seeds."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.cuts = [cut for cut in CUTS if any(key[1] == cut for key in runs)]
        self.rows = [row for row in ROWS if any(key[0] == row for key in runs)]
        """Those that were run with any cut."""
        self.seeds = sorted({key[2] for key in runs})

    def rows_at(self, cut: str) -> list[str]:
        """Return the rows that were run with a cut."""
        return [row for row in self.rows if any(key[:2] == (row, cut) for key in self.runs)]

    def all(self, row: str, cut: str, what: str) -> list[float]:
        """Return the numbers of all seeds."""
        found = [one.get(what) for key, one in self.runs.items() if key[:2] == (row, cut)]
        return [one for one in found if one is not None]

    def mean(self, row: str, cut: str, what: str) -> float:
        """Return their mean."""
        return statistics.fmean(self.all(row, cut, what))

    def shown(self, row: str, cut: str, what: str, form: str, scale: float = 1.0) -> str:
        """Return mean ± standard deviation, or a dash."""
        values = [one * scale for one in self.all(row, cut, what)]
        if not values:
            return "-"
        mean = f"{statistics.fmean(values):{form}}"
        return f"{mean} ± {statistics.stdev(values):{form}}" if len(values) > 1 else mean

    def gap(self, one: str, other: str, cut: str, what: str) -> tuple[float, float]:
        """Return by how much ``one`` is above ``other`` with the same seeds: mean and deviation."""
        runs = self.runs
        gaps = [
            runs[one, cut, seed][what] - runs[other, cut, seed][what]
            for seed in self.seeds
            if (one, cut, seed) in runs and (other, cut, seed) in runs
        ]
        return statistics.fmean(gaps), statistics.stdev(gaps) if len(gaps) > 1 else 0.0


def write_page(path: Path, runs: Runs, size: Size) -> None:
    """Write the page, and its pictures beside it."""
    numbers = Numbers(runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    sections = [_beginning(numbers, size)]
    for cut in numbers.cuts:
        sections.append(_table(numbers, cut))
        if 0 in numbers.seeds:
            draw(numbers, cut, path.with_name(f"{path.stem}-{cut}.png"))
            sections.append(
                f"![What the server reconstructs at {cut}]({path.stem}-{cut}.png)\n\n*The first "
                "eight private images of client 0 (seed 0), and what the decoder makes of their "
                "smashed data.*"
            )
    sections += [_findings(numbers), _averaging(numbers), _u_shape(numbers, size), _end(numbers)]
    path.write_text("\n\n".join(sections) + "\n")


def _beginning(numbers: Numbers, size: Size) -> str:
    floor, guess = (numbers.mean("psl", numbers.cuts[0], one) for one in ("floor", "label-guess"))
    return f"""# Accuracy against leakage against bytes

What a server finds out about its clients' images with each method, and with each defence of one of
them. The page and its pictures are written by `make privacy ARGS="--data-dir /path/to/data"`;
[Measuring leakage](leakage.md) says what each attack knows and how it fails.

MNIST, {CLIENTS} clients with {size.examples} images each, evenly dealt; {size.rounds} rounds of
{size.steps} steps, batches of {size.batch_size}; a network of two convolutions and two dense
layers, cut after the first (`conv1`, 8 by 14 by 14 numbers) or the second (`conv2`, 16 by 7 by 7).
Learning rates are those of `apps/privacy/rows.py`, chosen once and not tuned for any row. Mean ±
standard deviation over seeds {", ".join(map(str, numbers.seeds))}. The attacker has {size.known}
other images of MNIST **and client 0's segment at the end**, which PSL, SGLR, EPSL and GAPSL do not
hand over: for these it is an upper bound of what a server with data of its own learns.

| column | |
|---|---|
| accuracy | on test images, mean over clients with their own segments |
| up, down | MB of smashed data and of cut-layer gradients in the whole run, all clients |
| explained | share of the variance of private images that the decoder finds: 1 all, 0 none |
| SSIM, cross-entropy | of reconstructions; more cross-entropy is better. With itself: {floor:.4f} |
| dcor² | bias-corrected squared distance correlation of images and smashed data |
| MI | mutual information between two principal components of each, nats |
| member | AUC of telling client 0's images from others by the nearest recorded smashed data |
| labels | share found by clustering the last round's cut-layer gradients; guessing: {guess:.2f} |
| ε | of a client's smashed data, δ = {DELTA:g}, adjacency `client` |
| seeds | how many runs the row has |"""


def _table(numbers: Numbers, cut: str) -> str:
    lines = [
        f"## Cut after `{cut}`",
        "",
        f"| | {' | '.join(COLUMNS)} |",
        "|---|" + "---|" * len(COLUMNS),
    ]
    rows = [row for row in numbers.rows_at(cut) if row not in U_DEFENCES]
    for row in rows:
        if row == next((one for one in rows if one in DEFENCES), ""):
            lines.append("| *PSL with a defence* |" + " |" * len(COLUMNS))
        cells = [
            numbers.shown(row, cut, "accuracy", ".1f", 100),
            f"{numbers.mean(row, cut, 'up') / 1e6:.1f}",
            f"{numbers.mean(row, cut, 'down') / 1e6:.1f}",
            numbers.shown(row, cut, "explained", ".3f"),
            numbers.shown(row, cut, "ssim", ".3f"),
            numbers.shown(row, cut, "cross-entropy", ".4f"),
            f"{numbers.mean(row, cut, 'dcor-unbiased'):.2f}",
            f"{numbers.mean(row, cut, 'mutual-information'):.2f}",
            numbers.shown(row, cut, "membership", ".2f"),
            numbers.shown(row, cut, "label-clusters", ".2f"),
            f"{numbers.mean(row, cut, 'epsilon'):.3g}" if numbers.all(row, cut, "epsilon") else "",
            str(len(numbers.all(row, cut, "accuracy"))),
        ]
        lines.append(f"| {ROWS[row].title} | {' | '.join(cells)} |")
    missing = set(numbers.rows) - {*rows, *U_DEFENCES}
    if missing := [ROWS[row].title for row in ROWS if row in missing]:
        lines += ["", f"Not run with this cut: {', '.join(missing)}."]
    return "\n".join(lines)


# --- what holds ------------------------------------------------------------------------------


def _findings(numbers: Numbers) -> str:
    found = [*_methods(numbers)]
    for cut in numbers.cuts:
        found += _defences(numbers, cut)
    return "## What holds, and what doesn't\n\n" + "\n".join(f"* {one}" for one in found)


def _methods(numbers: Numbers) -> list[str]:
    found = []
    for cut in numbers.cuts:
        methods = [row for row in METHODS if row in numbers.rows_at(cut)]
        means = {row: numbers.mean(row, cut, "explained") for row in methods}
        least, most = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
        found.append(
            f"**No method hides the images** (`{cut}`): the decoder explains {means[least]:.3f} "
            f"({ROWS[least].title}) to {means[most]:.3f} ({ROWS[most].title}) of their variance."
        )
    return found


def _defences(numbers: Numbers, cut: str) -> list[str]:
    def both(row: str, what: str, form: str = ".3f", scale: float = 1.0) -> str:
        values = (numbers.mean(one, cut, what) * scale for one in ("psl", row))
        return "{:{form}} → {:{form}}".format(*values, form=form)

    found, rows = [], numbers.rows_at(cut)
    for row in ("no-peek-1", "no-peek-10"):
        if row in rows:
            found.append(
                f"{ROWS[row].title} (`{cut}`): dcor² {both(row, 'dcor-unbiased', '.2f')}, which it "
                f"minimises; explained {both(row, 'explained')}, accuracy "
                f"{both(row, 'accuracy', '.1f', 100)} %."
            )
    for row in ("noise-0.5", "noise-2"):
        if row in rows:
            eps = numbers.all(row, cut, "epsilon")
            bought = f", for ε = {eps[0]:.3g}, which promises nothing" if eps else ""
            found.append(
                f"{ROWS[row].title} (`{cut}`): explained {both(row, 'explained')}, accuracy "
                f"{both(row, 'accuracy', '.1f', 100)} %{bought}."
            )
    smaller = ("half", "int8", "top-k", "top-k-feedback", "top-k-example", "low-rank", "difference")
    for row in smaller:
        if row in rows:
            sent = [
                sum(numbers.mean(one, cut, way) for way in ("up", "down")) for one in ("psl", row)
            ]
            points = 100 * numbers.gap(row, "psl", cut, "accuracy")[0]
            found.append(
                f"{ROWS[row].title} (`{cut}`): {sent[1] / sent[0]:.3f} of the bytes, accuracy "
                f"{points:+.1f} points, explained {both(row, 'explained')}."
            )
    if "label-noise" in rows:
        found.append(
            f"Noise on gradients (`{cut}`): labels found by clustering "
            f"{both('label-noise', 'label-clusters', '.2f')}, accuracy "
            f"{both('label-noise', 'accuracy', '.1f', 100)} %."
        )
    return found


def _averaging(numbers: Numbers) -> str:
    rows = [f"sglr-{phi:g}" for phi in PHIS]
    if any(not set(rows) <= set(numbers.rows_at(cut)) for cut in numbers.cuts):
        return "## SGLR's claim\n\nNot all φ were run."
    lines = [
        "## SGLR's claim",
        "",
        "Its abstract says that averaging cut-layer gradients leaks less; the paper's measure is "
        "the cross-entropy of reconstructions of FashionMNIST by a decoder trained on CIFAR-10 "
        "(more is less leakage). Ours is that of a decoder trained on other images of MNIST: its "
        "size can't be compared with theirs, its course over φ can.",
        "",
        "| φ | " + " | ".join(f"{phi:g}" for phi in PHIS) + " |",
        "|---|" + "---|" * len(PHIS),
        "| the paper | " + " | ".join(f"{one:.4f}" for one in PAPER) + " |",
    ]
    said = []
    for cut in numbers.cuts:
        cells = [numbers.shown(row, cut, "cross-entropy", ".4f") for row in rows]
        lines.append(f"| here, `{cut}` | " + " | ".join(cells) + " |")
        gap, spread = numbers.gap("sglr-1", "sglr-0", cut, "cross-entropy")
        relative = gap / numbers.mean("sglr-0", cut, "cross-entropy")
        verdict = f"leaks {'less' if gap > 0 else 'more'} than φ = 0"
        if abs(gap) <= spread:
            verdict = "and φ = 0 can't be told apart"
        labels = [numbers.mean(row, cut, "label-clusters") for row in (rows[0], rows[-1])]
        points = 100 * numbers.gap("sglr-1", "sglr-0", cut, "accuracy")[0]
        explained = [numbers.mean(row, cut, "explained") for row in (rows[0], rows[-1])]
        said.append(
            f"* `{cut}`: φ = 1 {verdict}: cross-entropy {gap:+.4f} ± {spread:.4f} "
            f"({100 * relative:+.1f} %; the paper +28.1 %), explained {explained[0]:.3f} → "
            f"{explained[1]:.3f}, accuracy {points:+.1f} points. What an averaged gradient does "
            f"hide are labels, from who sees gradients alone: {labels[0]:.2f} → {labels[1]:.2f}."
        )
    return "\n".join([*lines, "", *said])


def _u_shape(numbers: Numbers, size: Size) -> str:
    lines = ["## U-shaped split", ""]
    for cut in numbers.cuts:
        if "u-shape" not in numbers.rows_at(cut):
            lines += [f"Not measured at `{cut}`.", ""]
            continue
        found, guess, simulated = (
            numbers.shown("u-shape", cut, f"label-{one}", ".2f")
            for one in ("clusters", "guess", "simulated")
        )
        lines += [
            f"`{cut}`: labels never leave the clients, but clustering the last round's gradients "
            f"at the second cut (64 numbers a row) finds {found} of them, and simulating a client "
            f"on {size.known} images with labels (SDAR), which looks at no gradient, {simulated}; "
            f"guessing finds {guess}. **A U-shaped split is not label privacy.** What the smashed "
            "data gives away is as without it. With a defence:",
            "",
            f"| | {' | '.join(U_COLUMNS)} |",
            "|---|" + "---|" * len(U_COLUMNS),
        ]
        for row in ("u-shape", *U_DEFENCES):
            if row in numbers.rows_at(cut):
                cells = [
                    numbers.shown(row, cut, "accuracy", ".1f", 100),
                    *(f"{numbers.mean(row, cut, way) / 1e6:.1f}" for way in ("up", "down")),
                    numbers.shown(row, cut, "explained", ".3f"),
                    numbers.shown(row, cut, "label-clusters", ".2f"),
                    numbers.shown(row, cut, "label-simulated", ".2f"),
                    str(len(numbers.all(row, cut, "accuracy"))),
                ]
                title = "no defence" if row == "u-shape" else ROWS[row].title
                lines.append(f"| {title} | {' | '.join(cells)} |")
        lines.append("")
        if "u-both" in numbers.rows_at(cut):
            accuracy, clusters, simulated = (
                numbers.mean("u-both", cut, one)
                for one in ("accuracy", "label-clusters", "label-simulated")
            )
            lines += [
                "Noise on gradients stops clustering, not SDAR. Noise on smashed data stops SDAR "
                f"({simulated:.2f}), and learning, too ({100 * accuracy:.1f} %); where little is "
                f"learned, noise of the same power leaves {clusters:.2f} to clustering.",
                "",
            ]
    return "\n".join(lines).rstrip()


def _end(numbers: Numbers) -> str:
    lines = ["## What this doesn't say", ""]
    inverted = [one["inverted-mse"] for one in numbers.runs.values() if "inverted-mse" in one]
    if inverted:
        lines.append(
            f"* An attacker without data and weights (`invert`, eight images, `{CUTS[0]}`, seed 0) "
            f"gets a mean squared error of {inverted[0]:.3f}; the decoder has "
            f"{numbers.mean('psl', CUTS[0], 'mse'):.4f}."
        )
    lines += [
        "* One data set of simple images, one small network, few steps; nothing is tuned. A better "
        "decoder finds more, also where noise was added.",
        "* Smashed data in evaluation leave without any defence.",
        "* The attacker of this table is honest, has data of the same kind and the segment. What a "
        "malicious server does (FSHA) is [measured apart]"
        "(leakage.md#servers-that-do-more-than-look).",
        "* Differences of a point of accuracy are within the spread of the seeds.",
        f"* Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}, "
        "no GPU; no number depends on how many processes there are.",
    ]
    return "\n".join(lines)


# --- pictures --------------------------------------------------------------------------------


def draw(numbers: Numbers, cut: str, path: Path) -> None:
    """Draw originals and reconstructions, one row below the other."""
    rows = [row for row in SHOWN if (row, cut, 0) in numbers.runs]
    first = numbers.runs[rows[0], cut, 0]
    lines = [("private images", first["originals"])]
    lines += [(ROWS[row].title, numbers.runs[row, cut, 0]["pictures"]) for row in rows]
    if "inverted" in first:
        lines.append(("PSL, without data", first["inverted"]))
    figure, places = plt.subplots(
        len(lines), 8, figsize=(7, 0.72 * len(lines)), squeeze=False, layout="constrained"
    )
    for axes, (title, pictures) in zip(places, lines, strict=True):
        for one, picture in zip(axes, pictures, strict=True):
            one.imshow(picture, cmap="gray", vmin=0, vmax=255)
            one.set_xticks([])
            one.set_yticks([])
        axes[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
