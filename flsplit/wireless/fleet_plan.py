"""A plan for a fleet: what to choose, what a round then costs, and what the choice gains."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flsplit.wireless.latency import round_seconds, stage_breakdown
from flsplit.wireless.optimise import Freedom, Optimiser, Solution
from flsplit.wireless.problem import Problem

DRAWS = 3
"""How often what an ablation leaves to chance is drawn."""


@dataclass(frozen=True)
class FleetPlan:
    """What `optimise` found, and what it is worth.

    Attributes
    ----------
    problem : Problem
        The fleet, the model and the method.
    solution : Solution
        The best choice.
    stages : mapping of str to float
        What each stage takes of the round, in s.
    ablations : mapping of str to float
        The round (s) where a part of the choice is left to chance or to custom, by what is.
    """

    problem: Problem
    solution: Solution
    stages: Mapping[str, float]
    ablations: Mapping[str, float]

    @property
    def strategy_args(self) -> str:
        """The strategy's arguments, with which a run trains as planned: a TOML inline table."""
        return inline_table(self.problem.arguments)


def inline_table(value: Any) -> str:
    """Return what TOML can say (a mapping: an inline table, as `strategy-args` takes it)."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k} = {inline_table(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(inline_table, value)) + "]"
    return json.dumps(value)  # JSON's strings, numbers and booleans are TOML's, too


def make_plan(problem: Problem, draws: int = DRAWS) -> FleetPlan:
    """Optimise a round and compare it with the ablations.

    Parameters
    ----------
    problem : Problem
        The fleet, the model and the method.
    draws : int
        How often to draw what an ablation leaves to chance; the mean counts.

    Returns
    -------
    FleetPlan
        With times in s.

    Raises
    ------
    CutError
        If no cut fits into the devices' memory.
    """
    optimiser = Optimiser(problem)
    solution = optimiser.solve()
    phases = problem.phases(solution.place)
    stages = stage_breakdown(phases, problem.fleet, solution.rates)
    return FleetPlan(problem, solution, stages, ablations_of(optimiser, draws))


def ablations_of(optimiser: Optimiser, draws: int = DRAWS) -> dict[str, float]:
    """Return rounds (s) without parts of the optimisation, by what they lack."""
    problem, found = optimiser.problem, {}
    if problem.is_allocated:
        found["random subchannels"] = _mean(optimiser, draws, subchannels=False)
        found["even power"] = optimiser.solve(Freedom(power=False)).seconds
        found["random subchannels, even power"] = _mean(
            optimiser, draws, subchannels=False, power=False
        )
    if len(problem.places) > 1:
        middle = problem.places[len(problem.places) // 2]
        found["fixed cut (the middle)"] = optimiser.solve(Freedom(cut=middle.cut)).seconds
        found["random cut"] = _mean(optimiser, draws, random_cut=True)
    if problem.is_allocated and len(problem.places) > 1:
        found["random subchannels, random cut"] = _mean(
            optimiser, draws, subchannels=False, random_cut=True
        )
        found["even power, random cut"] = _mean(optimiser, draws, power=False, random_cut=True)
        found["random everything"] = _mean(
            optimiser, draws, subchannels=False, power=False, random_cut=True
        )
    return found


def _mean(optimiser: Optimiser, draws: int, *, random_cut: bool = False, **fixed: bool) -> float:
    """Return the mean round (s) of random choices."""
    total = 0.0
    for seed in range(draws):
        cut = None
        if random_cut:
            places = optimiser.problem.places
            cut = places[int(np.random.default_rng([seed, 1]).integers(len(places)))].cut
        total += optimiser.solve(Freedom(cut=cut, **fixed), seed).seconds
    return total / draws


def every_cut(plan: FleetPlan) -> dict[str, float]:
    """Return the round (s) by cut, with the plan's rates."""
    problem, rates = plan.problem, plan.solution.rates
    return {
        place.cut: round_seconds(problem.phases(place), problem.fleet, rates)
        for place in problem.places
    }


# ------------------------------------------------------------------------------------------------
# For people


def format_plan(plan: FleetPlan) -> str:
    """Return a plan as text."""
    problem, training = plan.problem, plan.problem.training
    parts = [
        f"{problem.profile.model} on {problem.fleet.num_devices} devices, {problem.method.name}, "
        f"{training.steps} x {training.batch_size} samples per device and round",
        "\n".join(_cut_lines(plan)),
        "\n".join([*_stage_lines(plan), *([f"({note})"] if (note := problem.method.note) else [])]),
    ]
    if plan.ablations:
        parts.append("\n".join(_ablation_lines(plan)))
    parts.append("\n".join(_device_lines(plan)))
    if not problem.method.whole_model:
        parts.append("\n".join(_paste_lines(plan)))
    return "\n\n".join(parts)


def _cut_lines(plan: FleetPlan) -> list[str]:
    if plan.problem.method.whole_model:
        lines = ["devices train the whole model: there is no cut"]
    else:
        lines = [f"cut after {plan.solution.place.cut}"]
    for one in plan.problem.excluded:
        lines.append(
            f"excluded: {one.place.cut} needs {one.needed_bytes / 1e6:.1f} MB, more than device "
            f"{_some(one.devices)} may use"
        )
    return lines


def _some(names: tuple[str, ...], most: int = 3) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _stage_lines(plan: FleetPlan) -> list[str]:
    width = max(len(name) for name in (*plan.stages, "round"))
    lines = [f"{name:<{width}}  {_seconds(value)}" for name, value in plan.stages.items()]
    return [*lines, f"{'round':<{width}}  {_seconds(plan.solution.seconds)}"]


def _ablation_lines(plan: FleetPlan) -> list[str]:
    width = max(len(name) for name in plan.ablations)
    return ["compared with"] + [
        f"{name:<{width}}  {_seconds(value)}  {value / plan.solution.seconds:.2f} times as long"
        for name, value in plan.ablations.items()
    ]


def _device_lines(plan: FleetPlan) -> list[str]:
    lines = [f"{'device':<12}{'uplink':>14}{'downlink':>14}{'power':>12}  subchannels"]
    for device in _devices(plan):
        power, own = device["power_w"], device["subchannels"]
        lines.append(
            f"{device['name']:<12}{device['uplink_bps'] / 1e6:>7.2f} Mbit/s"
            f"{device['downlink_bps'] / 1e6:>7.2f} Mbit/s"
            + (f"{1e3 * power:>9.4g} mW" if power is not None else f"{'-':>12}")
            + ("  " + ",".join(map(str, own)) if own is not None else "  -")
        )
    return lines


def _paste_lines(plan: FleetPlan) -> list[str]:
    return [
        "to paste:",
        f'cut = "{plan.solution.place.cut}"  # of the strategy and of the client_app',
        "# the run config; strategy-args go before an app's own keys, such as batch-size",
        f'strategy = "{plan.problem.method.name}"',
        f"strategy-args = '{plan.strategy_args}'",
    ]


def _seconds(value: float) -> str:
    return f"{value:10.4f} s"


# ------------------------------------------------------------------------------------------------
# For programs


def plan_to_json(plan: FleetPlan) -> dict[str, Any]:
    """Return a plan as JSON's types; units are in the keys."""
    problem, solution = plan.problem, plan.solution
    return {
        "model": problem.profile.model,
        "strategy": problem.method.name,
        "strategy_args": plan.strategy_args,
        "note": problem.method.note,
        "batch_size": problem.training.batch_size,
        "steps": problem.training.steps,
        "cut": None if problem.method.whole_model else solution.place.cut,
        "excluded_cuts": [
            {
                "cut": one.place.cut,
                "needed_bytes": one.needed_bytes,
                "devices": list(one.devices),
            }
            for one in problem.excluded
        ],
        "round_s": solution.seconds,
        "stages_s": dict(plan.stages),
        "ablations_s": dict(plan.ablations),
        "cuts_s": every_cut(plan),
        "history_s": list(solution.history),
        "broadcast_bps": solution.rates.broadcast_bps,
        "devices": _devices(plan),
    }


def _devices(plan: FleetPlan) -> list[dict[str, Any]]:
    fleet, solution = plan.problem.fleet, plan.solution
    allocation = solution.allocation
    powers = None if allocation is None else allocation.device_power_w(fleet.num_devices)
    found = []
    for index, device in enumerate(fleet.devices):
        own = None
        if allocation is not None:
            own = [int(k) for k in np.flatnonzero(allocation.owner == index)]
        found.append(
            {
                "name": device.name,
                "uplink_bps": float(solution.rates.uplink_bps[index]),
                "downlink_bps": float(solution.rates.downlink_bps[index]),
                "power_w": None if powers is None else float(powers[index]),
                "subchannels": own,
                "subchannel_power_w": None
                if allocation is None or own is None
                else [float(allocation.power_w[k]) for k in own],
            }
        )
    return found
