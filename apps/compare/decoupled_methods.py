"""FSL-SAGE and CSE-FSL, and both with one thing changed."""

from typing import Any

from method import Method, made_with, pairs
from task import pooled_classifier

from flsplit.auxiliary import FIRST_STAGE
from flsplit.strategies import CSEFSL, FSLSAGE

Q = 5  # every fifth mini-batch goes up
L = 5  # rounds between alignments: with the default of 10, a run of 20 rounds would have one

# Server rates as SplitFed V2's: there, too, the server steps for each client in turn. Small client
# rates: FSL-SAGE's auxiliary models are as they were drawn until the first alignment.
_GRID = pairs([0.003, 0.01, 0.03], [0.001, 0.01])


def _fsl_sage(title: str, says: str, **changed: Any) -> Method:
    options = {"upload_every": Q, "align_every": L} | changed
    auxiliary = options.get("auxiliary")
    given = auxiliary if callable(auxiliary) else None
    return Method(title, says, True, made_with(FSLSAGE, **options), _GRID, given)


def _cse_fsl(title: str, says: str, q: int = Q) -> Method:
    return Method(title, says, True, made_with(CSEFSL, upload_every=q), _GRID)


DECOUPLED = {
    "fsl-sage": _fsl_sage(
        "FSL-SAGE",
        f"clients step with auxiliary models and don't wait; every {Q}th mini-batch's smashed data "
        f"goes up; the server aligns the auxiliary models every {L} rounds",
    ),
    "cse-fsl": _cse_fsl(
        "CSE-FSL",
        "the same, but clients train the auxiliary models, whose averages take their place",
    ),
}

ABLATIONS = {
    **{
        f"fsl-sage-q{q}": _fsl_sage(f"FSL-SAGE q={q}", f"q={q}", upload_every=q) for q in (1, 2, 10)
    },
    **{f"cse-fsl-q{q}": _cse_fsl(f"CSE-FSL q={q}", f"q={q}", q) for q in (1, 2, 10)},
    **{f"fsl-sage-l{n}": _fsl_sage(f"FSL-SAGE l={n}", f"l={n}", align_every=n) for n in (1, 2, 10)},
    "fsl-sage-never": _fsl_sage("FSL-SAGE, never aligned", "no alignment", align_every=0),
    "fsl-sage-in-round": _fsl_sage(
        "FSL-SAGE, aligned in the round", "aligned from the first round on", align="in_round"
    ),
    "fsl-sage-pooled": _fsl_sage(
        "FSL-SAGE, pooled", "mean of each channel, linear", auxiliary=pooled_classifier
    ),
    "fsl-sage-first-stage": _fsl_sage(
        "FSL-SAGE, first stage", "the server's first stage, pooled, linear", auxiliary=FIRST_STAGE
    ),
}

AUXILIARY = "FSL-SAGE: the auxiliary model"
STUDIES = {  # what is varied, and each value's method
    "FSL-SAGE: q": {
        "q=1": "fsl-sage-q1", "q=2": "fsl-sage-q2", "q=5": "fsl-sage", "q=10": "fsl-sage-q10",
    },
    "CSE-FSL: q": {
        "q=1": "cse-fsl-q1", "q=2": "cse-fsl-q2", "q=5": "cse-fsl", "q=10": "cse-fsl-q10",
    },
    "FSL-SAGE: l": {
        "l=1": "fsl-sage-l1", "l=2": "fsl-sage-l2", "l=5": "fsl-sage", "l=10": "fsl-sage-l10",
        "never": "fsl-sage-never", "l=5, in the round": "fsl-sage-in-round",
    },
    AUXILIARY: {
        "pooled": "fsl-sage-pooled", "first stage": "fsl-sage-first-stage", "linear": "fsl-sage",
    },
}  # fmt: skip
