"""What is compared: methods, and defences of one of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from flsplit.client_parts import (
    ClientPart,
    Clip,
    Difference,
    HalfPrecision,
    Int8,
    LabelNoise,
    LowRank,
    Noise,
    NoPeek,
    Shuffle,
    TopK,
)
from flsplit.strategies import EPSL, FSLSAGE, GAPSL, PSL, SGLR, SplitFedV2

RATES = {"server_lr": 0.05, "client_lr": 0.05}
_SMALLER = {"server_lr": 0.01, "client_lr": 0.05}  # a step for each client, or their sum


@dataclass(frozen=True)
class Row:
    """A line of the page's table: a method with options, or PSL with a defence.

    Attributes
    ----------
    title : str
        What the page calls it.
    make : callable
        The strategy.
    options : dict
        Beside those that all have.
    parts : callable
        Makes the defence's client parts.
    keeps_labels : bool
        Whether the clients have the last layer and the labels.
    """

    title: str
    make: Callable[..., Any] = PSL
    options: dict[str, Any] = field(default_factory=lambda: dict(RATES))
    parts: Callable[[], Sequence[ClientPart]] = tuple
    keeps_labels: bool = False


def _psl(title: str, *parts: Callable[[], ClientPart]) -> Row:
    return Row(title, parts=lambda: [make() for make in parts])


PHIS = (0.0, 0.25, 0.5, 0.75, 1.0)

METHODS = {
    "psl": Row("PSL"),
    **{
        f"sglr-{phi:g}": Row(f"SGLR φ={phi:g}", SGLR, {"phi": phi, "alpha": 1.0, "client_lr": 0.02})
        for phi in PHIS
    },
    "splitfed-v2": Row("SplitFed V2", SplitFedV2, _SMALLER),
    "epsl": Row("EPSL φ=0.5", EPSL, {"phi": 0.5, **RATES}),
    "gapsl": Row("GAPSL", GAPSL, _SMALLER),
    "u-shape": Row("U-shaped PSL", keeps_labels=True),
    "fsl-sage": Row("FSL-SAGE", FSLSAGE, {"align_epochs": 20, **RATES}),
}

DEFENCES = {
    "no-peek-1": _psl("NoPeek 1", lambda: NoPeek(1.0)),
    "no-peek-10": _psl("NoPeek 10", lambda: NoPeek(10.0)),
    "noise-0.5": _psl("clip 10, noise 0.5", lambda: Clip(10.0), lambda: Noise(0.5)),
    "noise-2": _psl("clip 10, noise 2", lambda: Clip(10.0), lambda: Noise(2.0)),
    "half": _psl("float16 both ways", HalfPrecision, lambda: HalfPrecision("cut-gradient")),
    "int8": _psl("int8 both ways", Int8, lambda: Int8("cut-gradient")),
    "top-k": _psl("top tenth both ways", TopK, lambda: TopK(place="cut-gradient")),
    "top-k-feedback": _psl(
        "the same with feedback",
        lambda: TopK(feedback=True),
        lambda: TopK(place="cut-gradient", feedback=True),
    ),
    "top-k-example": _psl(
        "the same, per example up",
        lambda: TopK(feedback="example"),
        lambda: TopK(place="cut-gradient", feedback=True),
    ),
    "low-rank": _psl("rank 4 both ways", LowRank, lambda: LowRank(place="cut-gradient")),
    "difference": _psl("int8 differences up", Difference),
    "label-noise": _psl("gradient noise, power 1", lambda: LabelNoise(1.0, marvell=False)),
    "shuffle": _psl("shuffled batches", Shuffle),
}


def _kept(title: str, *parts: Callable[[], ClientPart]) -> Row:
    return Row(title, parts=lambda: [make() for make in parts], keeps_labels=True)


U_DEFENCES = {
    "u-label-noise": _kept(
        "gradient noise, power 1", lambda: LabelNoise(1.0, marvell=False, place="output-gradient")
    ),
    "u-noise": _kept(
        "gradients clipped to 0.05, noise 0.003",
        lambda: Clip(0.05, place="output-gradient"),
        lambda: Noise(0.003, "output-gradient"),
    ),
    "u-int8": _kept(
        "int8 everywhere",
        *(
            partial(Int8, place)
            for place in ("smashed", "cut-gradient", "outputs", "output-gradient")
        ),
    ),
    "u-both": _kept(
        "smashed data clipped to 10, noise 2; gradient noise, power 1",
        lambda: Clip(10.0),
        lambda: Noise(2.0),
        lambda: LabelNoise(1.0, marvell=False, place="output-gradient"),
    ),
}
"""Defences of U-shaped PSL: at its second cut, and at both."""

ROWS = METHODS | DEFENCES | U_DEFENCES
QUICK = ["psl", "sglr-0", "sglr-1", "splitfed-v2", "no-peek-10", "noise-0.5", "int8", "top-k"]
