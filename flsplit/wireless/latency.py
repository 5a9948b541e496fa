"""How long a round takes, stage by stage."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flsplit.wireless.channel import Array
from flsplit.wireless.fleet import Fleet
from flsplit.wireless.phases import Phase, Stage, Where
from flsplit.wireless.power import Deadline
from flsplit.wireless.rates import Rates

SERVER = "server"
"""Who does what the server does, in a `Span`."""


def stage_seconds(stage: Stage, fleet: Fleet, rates: Rates) -> Array:
    """Return how long a stage takes each device (s), its amount by a speed.

    FLOPs by the device's or the server's FLOP/s, bits by the uplink's, the downlink's or the
    broadcast's bit/s.
    """
    match stage.where:
        case Where.DEVICE:
            return stage.amount / fleet.compute_flops
        case Where.SERVER:
            return np.full(fleet.num_devices, stage.amount / fleet.server.compute_flops)
        case Where.UPLINK:
            return stage.amount / rates.uplink_bps
        case Where.DOWNLINK:
            return stage.amount / rates.downlink_bps
        case Where.BROADCAST:
            return np.full(fleet.num_devices, stage.amount / rates.broadcast_bps)


def round_seconds(phases: Sequence[Phase], fleet: Fleet, rates: Rates) -> float:
    """Return how long a round takes (s).

    ``sum_phases repeat * max_i sum_stages t_i``, in turn ``sum_i``. For one parallel step that is
    ``max_i(T_i^F + T_i^U) + T_s^F + T_s^B + T^B + max_i(T_i^D + T_i^B)``.
    """
    total = 0.0
    for phase in phases:
        seconds = np.sum([stage_seconds(stage, fleet, rates) for stage in phase.stages], axis=0)
        total += phase.repeat * float(seconds.sum() if phase.in_turn else seconds.max())
    return total


def stage_breakdown(phases: Sequence[Phase], fleet: Fleet, rates: Rates) -> dict[str, float]:
    """Return how much of a round (s) each stage takes, by its name; they add up to the round.

    In a phase that devices share, the stages of the device that ends last count; where they take
    turns, everybody's.
    """
    breakdown: dict[str, float] = {}
    for phase in phases:
        seconds = [stage_seconds(stage, fleet, rates) for stage in phase.stages]
        last = int(np.argmax(sum(seconds)))
        for stage, own in zip(phase.stages, seconds, strict=True):
            counted = float(own.sum() if phase.in_turn else own[last])
            breakdown[stage.name] = breakdown.get(stage.name, 0.0) + phase.repeat * counted
    return breakdown


@dataclass(frozen=True)
class Span:
    """Who does what from when to when, for a picture."""

    actor: str  # a device's name, or `SERVER`
    stage: str
    start_s: float  # from the round's beginning
    end_s: float


def spans(phases: Sequence[Phase], fleet: Fleet, rates: Rates) -> list[Span]:
    """Return what happens in a round, in order of the phases."""
    found: list[Span] = []
    for phase in (one for one in phases for _ in range(one.repeat)):
        seconds = [stage_seconds(stage, fleet, rates) for stage in phase.stages]
        start = at = max((span.end_s for span in found), default=0.0)
        for index, device in enumerate(fleet.devices):
            at = at if phase.in_turn else start
            for stage, own in zip(phase.stages, seconds, strict=True):
                begun, at = at, at + float(own[index])
                by_server = stage.where is Where.SERVER
                if not by_server or phase.in_turn or index == 0:  # the server does it once for all
                    found.append(Span(SERVER if by_server else device.name, stage.name, begun, at))
    return found


@dataclass(frozen=True)
class RoundTerms:
    """A round, in the form that is quick to optimise.

    ``sum_g weight_g max_i(fixed_gi + up_g / U_i + down_g / D_i + wide_g / W)``; ``sum_i`` where
    devices take turns.
    """

    weight: Array  # by phase, how often it happens
    fixed_s: Array  # compute time, shape (phases, devices)
    up_bits: Array  # by phase
    down_bits: Array
    wide_bits: Array  # broadcast
    in_turn: NDArray[np.bool_]  # by phase, whether devices take turns

    @classmethod
    def of(cls, phases: Sequence[Phase], fleet: Fleet) -> "RoundTerms":
        """Return the terms of phases."""

        def amounts(where: Where) -> Array:
            return np.array(
                [sum(s.amount for s in phase.stages if s.where is where) for phase in phases],
                dtype=np.float64,
            )

        on_devices = amounts(Where.DEVICE)[:, None] / fleet.compute_flops
        return cls(
            weight=np.array([float(phase.repeat) for phase in phases]),
            fixed_s=on_devices + amounts(Where.SERVER)[:, None] / fleet.server.compute_flops,
            up_bits=amounts(Where.UPLINK),
            down_bits=amounts(Where.DOWNLINK),
            wide_bits=amounts(Where.BROADCAST),
            in_turn=np.array([phase.in_turn for phase in phases]),
        )

    def by_device(self, rates: Rates) -> Array:
        """Return how long each phase takes each device (s), shape (phases, devices)."""
        return (
            self.fixed_s
            + self.up_bits[:, None] / rates.uplink_bps
            + self.down_bits[:, None] / rates.downlink_bps
            + self.wide_bits[:, None] / rates.broadcast_bps
        )

    def seconds(self, rates: Rates) -> float:
        """Return how long the round takes (s)."""
        seconds = self.by_device(rates)
        lengths = np.where(self.in_turn, seconds.sum(axis=1), seconds.max(axis=1))
        return float(self.weight @ lengths)

    def chain_seconds(self, uplink_bps: Array, downlink_bps: Array) -> Array:
        """Return each device's own time (s) in a round, broadcasts and waiting left out.

        ``sum_g weight_g (fixed_gi + up_g / U_i + down_g / D_i)``, by device.
        """
        return np.asarray(
            self.weight @ self.fixed_s
            + (self.weight @ self.up_bits) / uplink_bps
            + (self.weight @ self.down_bits) / downlink_bps
        )

    def deadlines(self, rates: Rates) -> list[Deadline]:
        """Return the phases in which devices send, for power control.

        Phases in which they send as much (a round's first step and the others) are taken for one,
        as the last of them is: with two deadlines the powers can be found exactly. If there are
        more, all but the one in which most is sent are taken for one, their mean. Turns are
        taken for as many phases in which all devices send at once.
        """
        turns = np.where(self.in_turn, self.fixed_s.shape[1], 1)
        fixed = self.by_device(rates) - self.up_bits[:, None] / rates.uplink_bps
        found: dict[float, Deadline] = {}
        for g in np.flatnonzero((self.up_bits > 0) & (self.weight > 0)):
            bits = float(self.up_bits[g])
            before = found[bits].weight if bits in found else 0.0
            found[bits] = Deadline(before + float(turns[g] * self.weight[g]), fixed[g], bits)
        deadlines = list(found.values())
        if len(deadlines) <= 2:
            return deadlines
        most, *rest = sorted(deadlines, key=lambda one: -one.weight * one.bits)
        weights = np.array([one.weight for one in rest])
        mean_s = weights @ [one.fixed_s for one in rest] / weights.sum()
        mean_bits = float(weights @ [one.bits for one in rest] / weights.sum())
        return [most, Deadline(float(weights.sum()), mean_s, mean_bits)]
