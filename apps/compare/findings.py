"""What papers let one expect, and whether these runs agree."""

import math
from dataclasses import dataclass

import numpy as np
from jobs import Run
from methods import find_method
from partitions import title_of
from report import (
    Finals,
    by_accuracy,
    bytes_to,
    converged,
    differences,
    final_accuracy,
    mean,
    spread,
)
from verdict import (
    ABOVE,
    BELOW,
    LEAST_SEEDS,
    MATTERS,
    NOT_TOLD_APART,
    TOO_FEW,
    Verdict,
    judge,
    power,
    seeds_for,
)

TOLERANCE = 2.0  # points that EPSL may be below PSL
FEWER = 10.0  # percent of bytes that matter
LOOKED_FOR = 2.0  # points that a comparison should be able to find

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
PAPER = {"cse-fsl": 26.0, "splitfed-v1": 60.2, "splitfed-v2": 109.1, "fedavg": 70.0}  # GB
PAPER_OURS = 12.2
BYTES = (
    "FSL-SAGE needs fewer bytes to the target than CSE-FSL, SplitFed V1, SplitFed V2 and FedAvg "
    f"(its paper's figure, in this order: {' : '.join(map(str, [PAPER_OURS, *PAPER.values()]))} "
    "GB, CIFAR-10, ResNet-18, about 81 %)"
)
WORDS = {ABOVE: "agrees", BELOW: "disagrees"}


@dataclass(frozen=True)
class Finding:
    """What was measured about an expectation: for which labels, what came, and the verdict."""

    expected: str
    where: str
    measured: str
    verdict: str


def findings(finals: dict[str, Finals], target: float, matters: float = MATTERS) -> list[Finding]:
    """Return what can be said from the runs there are, by partition."""
    found: list[Finding] = []
    for partition, own in finals.items():
        where, iid = title_of(partition), partition == "iid"
        if "psl" in own:
            gapsl = [name for name in own if name.startswith("gapsl") and "+" not in name]
            expected = [] if iid else [(GAPSL, name) for name in gapsl]
            expected += [(SGLR, "sglr")] if "sglr" in own else []
            found += [_above(text, where, own, name, matters) for text, name in expected]
            if "epsl" in own and iid:
                found += [_not_far_below(where, own), _half(where, own)]
        if "fsl-sage" in own:
            found += [_fewer(other, where, own, target) for other in PAPER if other in own]
    return found


def summary(finals: Finals, against: str, matters: float = MATTERS) -> str:
    """Return what a partition's runs say, in a few sentences."""
    order = [method for method in by_accuracy(finals) if converged(finals[method])]
    if len(order) < 2:
        return ""
    first, last = order[0], order[-1]
    text = (
        f"The most accurate is {find_method(first).title} with {_percents(finals, first)} %, "
        f"the least {find_method(last).title} with {_percents(finals, last)} %."
    )
    shared = {method: find_method(method).shares_clients for method in order}
    if len(set(shared.values())) == 2:
        best, other = (
            max(_of(finals, m) for m in order if shared[m] == which) for which in (True, False)
        )
        text += (
            f" Among the methods whose clients share a segment the best has {best:.1f} %, among "
            f"those whose clients each keep their own {other:.1f} %."
        )
    return f"{text} {strength(finals, against, matters)}".rstrip()


def strength(finals: Finals, against: str, matters: float = MATTERS) -> str:
    """Return what the number of seeds lets one find, at the spread that was measured."""
    others = [differences(finals, method, against) for method in finals if method != against]
    others = [one for one in others if len(one) >= 2]
    if not others or against not in finals:
        return ""
    seeds, deviations = min(map(len, others)), [float(np.std(one, ddof=1)) for one in others]
    middle = float(np.median(deviations))
    title = find_method(against).title
    told = sum(judge(one, matters).differs for one in others)
    if seeds < LEAST_SEEDS:
        return f"With {seeds} seeds there is no verdict: it takes {LEAST_SEEDS}."
    needed = seeds_for(LOOKED_FOR, middle)
    enough = f"{needed} seeds" if needed else "over 100 seeds"
    return (
        f"{told} of {len(others)} methods were told apart from {title}. Differences to it vary by "
        f"{middle:.1f} points over seeds (median standard deviation); a true one of "
        f"{LOOKED_FOR:g} points is then found in {100 * power(LOOKED_FOR, middle, seeds):.0f} % of "
        f"cases with these {seeds} seeds, and in 80 % with {enough}."
    )


def _above(expected: str, where: str, finals: Finals, method: str, matters: float) -> Finding:
    verdict = judge(differences(finals, method, "psl"), matters)
    measured = _versus_psl(finals, method, verdict)
    return Finding(expected, where, measured, WORDS.get(verdict.says, verdict.says))


def _not_far_below(where: str, finals: Finals) -> Finding:
    found = judge(differences(finals, "epsl", "psl"))
    verdict = NOT_TOLD_APART
    if found.seeds < LEAST_SEEDS:
        verdict = TOO_FEW
    elif found.mean - found.half >= -TOLERANCE:
        verdict = WORDS[ABOVE]
    elif found.mean + found.half < -TOLERANCE:
        verdict = WORDS[BELOW]
    return Finding(EPSL_ACCURACY, where, _versus_psl(finals, "epsl", found), verdict)


def _half(where: str, finals: Finals) -> Finding:
    ours, psl = (converged(finals[name]) for name in ("epsl", "psl"))
    if not (ours and psl):
        return Finding(EPSL_COST, where, "diverged", NOT_TOLD_APART)
    rows, sent = (
        mean(ours, lambda run: run[name]) / mean(psl, lambda run: run[name])  # noqa: B023
        for name in ("rows", "gradients-down")
    )
    measured = f"{rows:.2f} of PSL's rows, {sent:.2f} of its gradient bytes down"
    near = all(abs(ratio - 0.5) <= 0.1 for ratio in (rows, sent))
    return Finding(EPSL_COST, where, measured, "agrees" if near else "disagrees")


def _fewer(other: str, where: str, finals: Finals, target: float) -> Finding:
    """Compare bytes, as ratios: they differ by factors."""
    ours, theirs = (_megabytes(finals[name], target) for name in ("fsl-sage", other))
    measured = f"to {target:g} %: FSL-SAGE {_text(ours, finals['fsl-sage'])}, "
    measured += f"{find_method(other).title} {_text(theirs, finals[other])}"
    both = sorted(ours.keys() & theirs.keys())
    seeds = len(finals["fsl-sage"])
    if both:
        times = np.mean([theirs[seed] for seed in both]) / np.mean([ours[seed] for seed in both])
        measured += f": {times:.1f} times FSL-SAGE's (in the paper {PAPER[other] / PAPER_OURS:.1f})"
    found = judge([100 * math.log(theirs[seed] / ours[seed]) for seed in both], FEWER)
    verdict = WORDS.get(found.says, found.says)
    if not both and seeds >= LEAST_SEEDS and seeds in (len(ours), len(theirs)):  # all against none
        verdict = WORDS[ABOVE if ours else BELOW]
    return Finding(BYTES, where, measured, verdict)


def _megabytes(runs: list[Run], target: float) -> dict[int, float]:
    """Return the megabytes to the target, by seed, of the runs that reach it."""
    found = {run["seed"]: bytes_to(run, target) for run in converged(runs)}
    return {seed: nbytes / 1e6 for seed, nbytes in found.items() if nbytes is not None}


def _text(megabytes: dict[int, float], runs: list[Run]) -> str:
    if not megabytes:
        return "never"
    part = "" if len(megabytes) == len(runs) else f" ({len(megabytes)} of {len(runs)})"
    return f"{spread(list(megabytes.values()))} MB{part}"


def _versus_psl(finals: Finals, method: str, verdict: Verdict) -> str:
    return (
        f"{find_method(method).title} {_percents(finals, method)} %, PSL "
        f"{_percents(finals, 'psl')} %; difference, 95 % interval: "
        f"{str(verdict).partition(':')[0]} points"
    )


def _percents(finals: Finals, method: str) -> str:
    values = [final_accuracy(run) for run in converged(finals[method])]
    return spread(values) if values else "diverged"


def _of(finals: Finals, method: str) -> float:
    return mean(converged(finals[method]), final_accuracy)
