"""Draws what a round costs as the network, the fleet, the server and phi change.

python apps/planning/sweep.py --out docs/img
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from cell import PaperEPSL, draw_devices, method, resnet18
from matplotlib.figure import Figure

from flsplit.strategies import EPSL, PSL, SequentialSL, SplitFedV1
from flsplit.wireless import (
    Fleet,
    Freedom,
    Method,
    ModelProfile,
    Optimiser,
    Problem,
    Radio,
    Server,
    Training,
    make_plan,
)
from flsplit.wireless.pictures import draw_profile, draw_round, save_picture

METHODS: dict[str, Method] = {
    "EPSL": method(PaperEPSL, "epsl"),
    "PSL": method(PSL, "psl"),
    "SplitFed": method(SplitFedV1, "splitfed-v1"),
    "SL": method(SequentialSL, "sequential-sl"),
}


def fleet(
    *,
    devices: int = 5,
    bandwidth_mhz: float = 200.0,
    server_gflops: float = 160.0,
    seed: int = 0,
) -> Fleet:
    """Return a fleet of devices within 200 m, 4 subchannels each, at 28 GHz."""
    rng = np.random.default_rng(seed)
    subchannels = 4 * devices
    return Fleet(
        devices=draw_devices(devices, rng),
        server=Server(compute_flops=server_gflops * 1e9),
        radio=Radio(
            num_subchannels=subchannels,
            subchannel_hz=bandwidth_mhz * 1e6 / subchannels,
            antenna_gain=10.0,
            total_power_w=5.0,
            path_loss="mmwave-28ghz",
        ),
        seed=seed,
    )


@dataclass(frozen=True)
class Sweep:
    """How long rounds take as one thing changes.

    Attributes
    ----------
    title : str
        What changes, with its unit.
    values : sequence of float
        What it is set to.
    optimised, plain : mapping of str to sequence of float
        Rounds (s) by method, one for each value, with everything chosen and with nothing.
    """

    title: str
    values: Sequence[float]
    optimised: Mapping[str, Sequence[float]]
    plain: Mapping[str, Sequence[float]]


def draw_sweeps(sweeps: Sequence[Sweep], path: str | Path) -> Path:
    """Draw sweeps side by side; solid lines with everything chosen, dashed ones with nothing.

    Parameters
    ----------
    sweeps : sequence of Sweep
        One panel each.
    path : str or Path
        Where to write the picture; the suffix chooses the format.

    Returns
    -------
    Path
        ``path``.
    """
    columns = 2
    rows = -(-len(sweeps) // columns)
    figure = Figure(figsize=(10, 3.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, sweep in zip(grid.flat, sweeps, strict=True):
        for index, name in enumerate(sweep.optimised):
            colour = f"C{index}"
            axes.plot(sweep.values, sweep.optimised[name], "o-", color=colour, ms=4, label=name)
            axes.plot(sweep.values, sweep.plain[name], "x--", color=colour, ms=4, alpha=0.7)
        axes.set(xlabel=sweep.title, ylabel="seconds per round", yscale="log")
        axes.grid(alpha=0.3, which="both")
    grid[0][0].legend(fontsize=8)
    figure.suptitle("solid: everything chosen; dashed: random cut and subchannels, even power")
    return save_picture(figure, path)


def plain_seconds(optimiser: Optimiser, seed: int) -> float:
    """Return the mean round (s) over all cuts with random subchannels and even power."""
    seconds = [
        optimiser.solve(Freedom(subchannels=False, power=False, cut=place.cut), seed).seconds
        for place in optimiser.problem.places
    ]
    return float(np.mean(seconds))


def sweep(
    title: str,
    values: Sequence[float],
    make: Callable[[float, int], Fleet],
    profile: ModelProfile,
    seeds: int,
    methods: Callable[[float], dict[str, Method]] = lambda value: METHODS,
) -> Sweep:
    """Return mean rounds (s) over seeds."""
    optimised: dict[str, list[float]] = {}
    plain: dict[str, list[float]] = {}
    for value in values:
        fleets = [make(value, seed) for seed in range(seeds)]
        for name, kind in methods(value).items():
            own = [Optimiser(Problem(one, profile, kind, Training())) for one in fleets]
            best = [optimiser.solve().seconds for optimiser in own]
            worst = [plain_seconds(optimiser, seed) for seed, optimiser in enumerate(own)]
            optimised.setdefault(name, []).append(float(np.mean(best)))
            plain.setdefault(name, []).append(float(np.mean(worst)))
    return Sweep(title, values, optimised, plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/img"))
    parser.add_argument("--seeds", type=int, default=3, help="fleets drawn per point")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    profile = resnet18()
    draw_profile(profile, options.out / "planning-profile.png")
    problem = Problem(fleet(), profile, method(EPSL, "epsl", phi=0.5), Training())
    draw_round(make_plan(problem, draws=1), options.out / "planning-round-epsl.png")
    slow = replace(problem, method=METHODS["SL"])
    draw_round(make_plan(slow, draws=1), options.out / "planning-round-sl.png")

    sweeps = [
        sweep(
            "bandwidth (MHz)",
            (25, 50, 100, 200, 400),
            lambda value, seed: fleet(bandwidth_mhz=value, seed=seed),
            profile,
            options.seeds,
        ),
        sweep(
            "devices, sharing 200 MHz",
            (2, 5, 10, 15, 20),
            lambda value, seed: fleet(devices=int(value), seed=seed),
            profile,
            options.seeds,
        ),
        sweep(
            "server compute (GFLOP/s)",
            (40, 160, 640, 2560),
            lambda value, seed: fleet(server_gflops=value, seed=seed),
            profile,
            options.seeds,
        ),
        sweep(
            "phi",
            (0.0, 0.25, 0.5, 0.75, 1.0),
            lambda value, seed: fleet(seed=seed),
            profile,
            options.seeds,
            lambda phi: {**METHODS, "EPSL": method(PaperEPSL, "epsl", phi=phi)},
        ),
    ]
    draw_sweeps(sweeps, options.out / "planning-sweeps.png")
    for one in sweeps:
        print(one.title, json.dumps(list(one.values)))
        for name, seconds in one.optimised.items():
            factors = [round(b / a, 2) for a, b in zip(seconds, one.plain[name], strict=True)]
            print(f"  {name:10} {[round(s, 3) for s in seconds]} s, plain {factors} times as long")
        epsl = one.optimised["EPSL"]
        for name in ("PSL", "SplitFed", "SL"):
            gains = [round(b / a, 2) for a, b in zip(epsl, one.optimised[name], strict=True)]
            print(f"  {name} takes {gains} times as long as EPSL")


if __name__ == "__main__":
    main()
