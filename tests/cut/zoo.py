"""Runs the zoo, each case in a process of its own: ``python tests/cut/zoo.py [own|tv|hf ...]``.

It ends with the numbers of exact, refused and wrong, and fails if anything is wrong, that is: not
exact and not refused, or refused where it had not to be.
"""

import subprocess
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from zoo_cases import OWN, torchvision_cases, transformers_cases
from zoo_step import assert_exact

from flsplit.cut import CutError

GROUPS = {"own": lambda: OWN, "tv": torchvision_cases, "hf": transformers_cases}


def result_of(case, cut):
    """Return "exact", or "refused" with the reason; raises if it is neither."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, args, kwargs = case.build(), case.args, case.kwargs
    if case.double:

        def double(leaf):
            floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
            return leaf.double() if floating else leaf

        model, args, kwargs = model.double(), *tree_map(double, (args, kwargs))
    try:
        assert_exact(model, cut, args, kwargs, share=case.share)
    except CutError as error:
        return f"refused: {error}"
    return "exact"


def main(groups):
    counts = {"exact": 0, "refused": 0, "wrong": 0}
    for group in groups:
        for name, case in GROUPS[group]().items():
            for cut in case.cuts:
                command = [sys.executable, __file__, "--one", group, name, cut]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                lines = done.stdout.strip().splitlines() or [""]
                kind = lines[-1].partition(":")[0]
                if done.returncode or (kind == "refused") != (cut in case.refused):
                    last = done.stderr.strip().splitlines()[-1:] or [""]
                    kind, lines = "wrong", [f"wrong: {lines[-1]} {last[0]} {done.returncode}"]
                counts[kind] += 1
                print(f"{name} | {cut} | {lines[-1][:200]}", flush=True)
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    return bool(counts["wrong"])


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    sys.path.insert(0, str(Path(__file__).parent))
    if sys.argv[1:2] == ["--one"]:
        print(result_of(GROUPS[sys.argv[2]]()[sys.argv[3]], sys.argv[4]))
    else:
        sys.exit(main(sys.argv[1:] or list(GROUPS)))
