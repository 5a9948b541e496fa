"""Checks the optimisation on many drawn fleets: it never goes up, and no ablation beats it.

python apps/planning/check.py --fleets 100
"""

import argparse
from itertools import pairwise, product

import numpy as np
from cell import PaperEPSL, draw_devices, method, resnet18

from flsplit.strategies import PSL, SplitFedV1
from flsplit.wireless import Fleet, Freedom, Optimiser, Problem, Radio, Server, Training

TOLERANCE = 1e-6


def drawn_fleet(seed: int) -> Fleet:
    """Return 5 to 20 devices with 1 to 4 times as many subchannels."""
    rng = np.random.default_rng([7, seed])
    devices = int(rng.integers(5, 21))
    return Fleet(
        devices=draw_devices(devices, rng),
        server=Server(compute_flops=float(rng.choice([1.6e11, 2e12]))),
        radio=Radio(
            num_subchannels=int(devices * rng.integers(1, 5)),
            subchannel_hz=10e6,
            antenna_gain=10.0,
            total_power_w=5.0 if seed % 2 else 1e9,
            path_loss="mmwave-28ghz" if seed % 3 else "macro-2ghz",
        ),
        seed=seed,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fleets", type=int, default=100)
    options = parser.parse_args()
    profile = resnet18()
    methods = method(PaperEPSL, "epsl"), method(PSL, "psl"), method(SplitFedV1, "splitfed-v1")
    cuts = [None, *(place.cut for place in profile.places[3::3])]
    factors: dict[Freedom, list[float]] = {}
    failures = []
    for seed in range(options.fleets):
        one = methods[seed % 3]
        problem = Problem(drawn_fleet(seed), profile, one, Training())
        optimiser = Optimiser(problem)
        best = optimiser.solve()
        if any(after > before for before, after in pairwise(best.history)):
            failures.append(f"fleet {seed} goes up: {best.history}")
        for subchannels, power, cut in product((True, False), (True, False), cuts):
            freedom = Freedom(subchannels, power, cut)
            if freedom == Freedom():
                continue
            factor = optimiser.solve(freedom, seed).seconds / best.seconds
            factors.setdefault(freedom, []).append(factor)
            if factor < 1 - TOLERANCE:
                failures.append(f"fleet {seed} ({one.name}) is beaten by {freedom}: {factor}")
    for freedom, found in factors.items():
        print(f"{freedom}: {np.mean(found):.3f} times as long, at least {min(found):.6f}")
    print(*failures, f"{len(failures)} failures on {options.fleets} fleets", sep="\n")


if __name__ == "__main__":
    main()
