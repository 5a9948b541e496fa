"""What papers let one expect, and whether these runs agree."""

import math
from collections.abc import Iterator

import byte_findings
import numpy as np
from finding import Finding, verdict_on
from methods import METHODS
from report import Finals, alpha_name, by_accuracy, converged, final_accuracy, mean, spread

TOLERANCE = 2.0  # points that EPSL may be below PSL

GAPSL = (
    "GAPSL above PSL where labels are skewed (its paper: 63.3 against 47.3 %, CIFAR-10, VGG-16, "
    "10 clients, Dirichlet(0.1))"
)
SGLR = (
    "SGLR above PSL (its paper: 87.5 against 84.9 %, FashionMNIST, 20 clients; labels there are "
    "IID, so for skewed labels this is an expectation of ours)"
)
EPSL_ACCURACY = f"EPSL φ=0.5 at most {TOLERANCE:g} points below PSL on IID data"
EPSL_COST = "EPSL φ=0.5 with about half of PSL's rows back-propagated and gradient bytes down"

TRIED = {
    GAPSL: "What was tried to find out why, on MNIST with Dirichlet(0.1): the clients' server "
    "gradients were measured, and are nearly at right angles to each other, so that agreement with "
    "the leader separates clients mostly by chance and by label. The fewer clients a larger η "
    "keeps, the lower the accuracy, by less than its spread over seeds. With one seed, letting "
    "dropped clients skip their step and taking the mean of the kept gradients instead of their "
    "sum both helped, but not above PSL; averaged client segments did more, but not above SFL. "
    "Not tried: mini-batches, runs and a network as large as the paper's. The numbers are in "
    "docs/comparison.md, under “Why GAPSL doesn't win here”.",
    byte_findings.EXPECTED: byte_findings.TRIED,
}
"""By what was expected: what was tried to find out why it didn't come."""


def findings(finals: dict[float, Finals], target: float) -> list[Finding]:
    """Return what can be said from the runs there are."""
    found: list[Finding] = []
    for alpha, own in finals.items():
        found += [*_of_alpha(alpha, own), *byte_findings.fewer_bytes(alpha, own, target)]
    return found


def tried(expected: str, found: list[Finding]) -> str:
    """Return what was done to find out why something didn't come as expected, if anything was."""
    missed = any(one.verdict != "agrees" for one in found)
    return TRIED.get(expected, "") if missed else ""


def summary(finals: Finals) -> str:
    """Return two sentences on an alpha's result."""
    order = [method for method in by_accuracy(finals) if converged(finals[method])]
    if len(order) < 2:
        return ""
    first, last = order[0], order[-1]
    text = (
        f"The most accurate is {METHODS[first].title} with {_percent(finals, first)} %, "
        f"the least {METHODS[last].title} with {_percent(finals, last)} %."
    )
    groups = [[m for m in order if METHODS[m].shares_clients == shared] for shared in (True, False)]
    if all(groups):
        best, other = (max(_of(finals, m) for m in group) for group in groups)
        text += (
            f" Among the methods whose clients share a segment the best has {best:.1f} %, among "
            f"those whose clients each keep their own {other:.1f} %."
        )
    return text


def _of_alpha(alpha: float, finals: Finals) -> Iterator[Finding]:
    where = alpha_name(alpha)
    if "psl" not in finals:
        return
    if not math.isinf(alpha):
        for method in [name for name in finals if name.startswith("gapsl")]:
            yield _above(GAPSL, where, finals, method)
    if "sglr" in finals:
        yield _above(SGLR, where, finals, "sglr")
    if "epsl-0.5" in finals and math.isinf(alpha):
        yield _not_far_below(where, finals)
        yield _half(where, finals)


def _above(expected: str, where: str, finals: Finals, method: str) -> Finding:
    points = differences(finals, method)
    return Finding(expected, where, _versus_psl(finals, method, points), verdict_on(points))


def _not_far_below(where: str, finals: Finals) -> Finding:
    points = differences(finals, "epsl-0.5")
    verdict = "agrees" if np.mean(points) >= -TOLERANCE else "disagrees"
    return Finding(EPSL_ACCURACY, where, _versus_psl(finals, "epsl-0.5", points), verdict)


def _half(where: str, finals: Finals) -> Finding:
    rows, sent = (_ratio(finals, name) for name in ("rows", "gradients-down"))
    measured = f"{rows:.2f} of PSL's rows, {sent:.2f} of its gradient bytes down"
    near = all(abs(ratio - 0.5) <= 0.1 for ratio in (rows, sent))
    return Finding(EPSL_COST, where, measured, "agrees" if near else "disagrees")


def differences(finals: Finals, method: str) -> list[float]:
    """Return by how many points a method is above PSL, for each seed that both finished."""
    ours, psl = (
        {run["seed"]: final_accuracy(run) for run in converged(finals[name])}
        for name in (method, "psl")
    )
    return [ours[seed] - psl[seed] for seed in ours if seed in psl] or [-math.inf]


def _versus_psl(finals: Finals, method: str, points: list[float]) -> str:
    return (
        f"{METHODS[method].title} {_percent(finals, method)} %, PSL {_percent(finals, 'psl')} %; "
        f"difference, seed by seed: {spread(points, '{:+.1f}').replace('± +', '± ')} points"
    )


def _ratio(finals: Finals, name: str) -> float:
    ours, psl = (mean(finals[method], lambda run: run[name]) for method in ("epsl-0.5", "psl"))
    return ours / psl


def _percent(finals: Finals, method: str) -> str:
    values = [final_accuracy(run) for run in converged(finals[method])]
    return spread(values) if values else "diverged"


def _of(finals: Finals, method: str) -> float:
    return mean(converged(finals[method]), final_accuracy)
