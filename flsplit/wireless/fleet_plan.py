"""A plan for a fleet: what to choose, what a round then costs, and what the choice gains."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flsplit.wireless.latency import round_seconds, stage_breakdown
from flsplit.wireless.optimise import Freedom, Optimiser, Solution
from flsplit.wireless.problem import Problem
from flsplit.wireless.units import with_unit

_LINKS = ("uplink_bps", "downlink_bps")
DRAWS = 3  # how often what an ablation leaves to chance is drawn


@dataclass(frozen=True)
class FleetPlan:
    """What `optimise` found, and what it is worth."""

    problem: Problem
    solution: Solution
    stages: Mapping[str, float]  # what each stage takes of the round, in s
    # the round (s) where a part of the choice is left to chance or to custom, by what is
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
    """Optimise a round and compare it with the ablations, the mean of so many draws.

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
    problem = optimiser.problem
    places = problem.places

    def mean(*, random_cut: bool = False, **fixed: bool) -> float:
        """Return the mean round (s) of random choices."""
        total = 0.0
        for seed in range(draws):
            index = int(np.random.default_rng([seed, 1]).integers(len(places)))
            cut = places[index].cut if random_cut else None
            total += optimiser.solve(Freedom(cut=cut, **fixed), seed).seconds
        return total / draws

    found = {}
    if problem.is_allocated:
        found["random subchannels"] = mean(subchannels=False)
        found["even power"] = optimiser.solve(Freedom(power=False)).seconds
        found["random subchannels, even power"] = mean(subchannels=False, power=False)
    if len(places) > 1:
        middle = places[len(places) // 2].cut
        found["fixed cut (the middle)"] = optimiser.solve(Freedom(cut=middle)).seconds
        found["random cut"] = mean(random_cut=True)
    if problem.is_allocated and len(places) > 1:
        found["random subchannels, random cut"] = mean(subchannels=False, random_cut=True)
        found["even power, random cut"] = mean(power=False, random_cut=True)
        found["random everything"] = mean(subchannels=False, power=False, random_cut=True)
    return found


def format_plan(plan: FleetPlan) -> str:
    """Return a plan as text."""
    problem, solution, training = plan.problem, plan.solution, plan.problem.training
    whole = problem.method.whole_model
    cut = [
        "devices train the whole model: there is no cut"
        if whole
        else f"cut after {solution.place.cut}"
    ]
    cut += [f"excluded: {one.place.cut} {one.text()}" for one in problem.excluded]
    stages = _in_columns({**plan.stages, "round": solution.seconds})
    if note := problem.note:
        stages.append(f"({note})")
    parts = [
        [
            f"{problem.profile.model} on {problem.fleet.num_devices} devices, "
            f"{problem.method.name}, {training.steps} x {training.batch_size} samples per device "
            "and round"
        ],
        cut,
        stages,
    ]
    if plan.ablations:
        factors = [one / solution.seconds for one in plan.ablations.values()]
        lines = zip(_in_columns(plan.ablations), factors, strict=True)
        parts.append(["compared with", *(f"{a}  {b:.2f} times as long" for a, b in lines)])
    parts.append(_device_lines(plan))
    if not whole:
        parts.append(
            [
                "to paste:",
                f'cut = "{solution.place.cut}"  # of the strategy and of the client_app',
                "# the run config; strategy-args go before an app's own keys, such as batch-size",
                f'strategy = "{problem.method.name}"',
                f"strategy-args = '{plan.strategy_args}'",
            ]
        )
    return "\n\n".join("\n".join(lines) for lines in parts)


def _in_columns(seconds: Mapping[str, float]) -> list[str]:
    width, longest = max(map(len, seconds)), max(seconds.values())
    factor, unit = (1.0, "s") if longest >= 0.1 else (1e3, "ms") if longest >= 1e-4 else (1e6, "µs")
    return [f"{name:<{width}}  {factor * value:10.4f} {unit}" for name, value in seconds.items()]


def _device_lines(plan: FleetPlan) -> list[str]:
    lines = [f"{'device':<12}{'uplink':>14}{'downlink':>14}{'power':>12}  subchannels"]
    for device in _devices(plan):
        power, own = device["power_w"], device["subchannels"]
        lines.append(
            f"{device['name']:<12}"
            + "".join(f"{with_unit(device[link], 'bit/s', '.2f'):>14}" for link in _LINKS)
            + (f"{1e3 * power:>9.4g} mW" if power is not None else f"{'-':>12}")
            + ("  " + ",".join(map(str, own)) if own is not None else "  -")
        )
    return lines


def plan_to_json(plan: FleetPlan) -> dict[str, Any]:
    """Return a plan as JSON's types; units are in the keys."""
    problem, solution, rates = plan.problem, plan.solution, plan.solution.rates
    excluded = [
        {"cut": one.place.cut, "needed_bytes": one.needed_bytes, "devices": list(one.devices)}
        for one in problem.excluded
    ]
    every_cut = {
        place.cut: round_seconds(problem.phases(place), problem.fleet, rates)
        for place in problem.places
    }
    return {
        "model": problem.profile.model,
        "strategy": problem.method.name,
        "strategy_args": plan.strategy_args,
        "note": problem.note,
        "batch_size": problem.training.batch_size,
        "steps": problem.training.steps,
        "cut": None if problem.method.whole_model else solution.place.cut,
        "excluded_cuts": excluded,
        "round_s": solution.seconds,
        "stages_s": dict(plan.stages),
        "ablations_s": dict(plan.ablations),
        "cuts_s": every_cut,  # with the plan's rates
        "history_s": list(solution.history),
        "broadcast_bps": rates.broadcast_bps,
        "devices": _devices(plan),
    }


def _devices(plan: FleetPlan) -> list[dict[str, Any]]:
    fleet, rates, allocation = plan.problem.fleet, plan.solution.rates, plan.solution.allocation
    found: list[dict[str, Any]] = []
    for index, device in enumerate(fleet.devices):
        one: dict[str, Any] = {
            "name": device.name,
            "uplink_bps": float(rates.uplink_bps[index]),
            "downlink_bps": float(rates.downlink_bps[index]),
        }
        if allocation is None:
            one |= dict.fromkeys(("power_w", "subchannels", "subchannel_power_w"))
        else:
            own = np.flatnonzero(allocation.owner == index)
            one["power_w"] = float(allocation.device_power_w(fleet.num_devices)[index])
            one["subchannels"] = own.tolist()
            one["subchannel_power_w"] = allocation.power_w[own].tolist()
        found.append(one)
    return found
