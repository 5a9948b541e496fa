"""Runs the zoo, each case in a process of its own: ``python tests/cut/zoo.py [own|peft|... ]``.

It ends with the numbers of exact, refused and wrong, and fails if anything is wrong, that is: not
exact and not refused, or refused where it had not to be.
"""

import multiprocessing
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from zoo_cases import OWN
from zoo_images import timm_cases, torchvision_cases
from zoo_step import assert_exact
from zoo_words import adapter_cases, transformers_cases

from flsplit.cut import CutError

GROUPS = {
    "own": lambda: OWN,
    "torchvision": torchvision_cases,
    "timm": timm_cases,
    "transformers": transformers_cases,
    "peft": adapter_cases,
}
TIMEOUT = 900  # seconds; the slowest case takes ten unless the machine is busy
FORK = multiprocessing.get_context("fork")  # what is imported once stays imported


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


def judged(case, cut):
    """Return the result; anything that it had not to be is "wrong", with what it is."""
    try:
        result = result_of(case, cut)
    except Exception as error:
        return f"wrong: {type(error).__name__}: {error}"
    expected = result.startswith("refused") == (cut in case.refused)
    return result if expected else f"wrong: {result}"


def judged_apart(case, cut):
    """Do so in a process of its own, which may die of it."""
    receiving, sending = FORK.Pipe(duplex=False)
    process = FORK.Process(target=lambda: sending.send(judged(case, cut)[:500]))
    process.start()
    process.join(TIMEOUT)
    if process.is_alive():
        process.kill()
        process.join()
        return f"wrong: not done in {TIMEOUT} seconds"
    return receiving.recv() if receiving.poll() else f"wrong: exit code {process.exitcode}"


def main(groups):
    torch.set_num_threads(1)  # threads don't survive a fork
    counts = {"exact": 0, "refused": 0, "wrong": 0}
    for group in groups:
        for name, case in GROUPS[group]().items():
            for cut in case.cuts:
                result = judged_apart(case, cut)
                counts[result.partition(":")[0]] += 1
                print(f"{group}: {name} | {cut} | {' '.join(result.split())[:200]}", flush=True)
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    return bool(counts["wrong"])


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main(sys.argv[1:] or list(GROUPS)))
