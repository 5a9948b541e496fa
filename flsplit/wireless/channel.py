"""The radio channel: path loss, shadowing, and the rate that a power reaches."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# At this distance a 28 GHz device in New York's streets sees the base station with 1/e
LINE_OF_SIGHT_RANGE_M = 67.1


@dataclass(frozen=True)
class Surroundings:
    """How the channel loses power on the way."""

    reference_m: float  # a distance
    reference_db: float  # path loss there
    decade_db: float  # what ten times the distance adds
    shadowing_db: float  # standard deviation of log-normal shadowing, per device

    def path_loss_db(self, distance_m: float) -> float:
        """Return the path loss (dB) at a distance (m).

        ``reference_db + decade_db log10(distance_m / reference_m)``.
        """
        return self.reference_db + self.decade_db * math.log10(distance_m / self.reference_m)


MACRO = Surroundings(1e3, 128.1, 37.6, 8.0)
"""A macro cell at 2 GHz, by 3GPP (TR 36.814)."""

LINE_OF_SIGHT = Surroundings(1.0, 61.4, 20.0, 5.8)
"""At 28 GHz, where the device sees the base station; after Akdeniz et al., Millimeter Wave Channel
Modeling and Cellular Capacity Evaluation, https://arxiv.org/abs/1312.4921."""

BLOCKED = Surroundings(1.0, 72.0, 29.2, 8.7)
"""At 28 GHz, where something stands between; source as `LINE_OF_SIGHT`."""

_DRAWN = "mmwave-28ghz"
_FIXED = {"macro-2ghz": MACRO, "mmwave-28ghz-los": LINE_OF_SIGHT, "mmwave-28ghz-nlos": BLOCKED}

PATH_LOSSES = (_DRAWN, *_FIXED)
"""The models of path loss. ``mmwave-28ghz`` draws per device whether it has a line of sight."""


def line_of_sight_probability(distance_m: Array) -> Array:
    """Return the probability (no unit) that a device at a distance (m) sees the base station.

    ``exp(-d / 67.1 m)``; source as `LINE_OF_SIGHT`.
    """
    return np.exp(-distance_m / LINE_OF_SIGHT_RANGE_M)


def surroundings_of(
    path_loss: str, distance_m: Array, rng: np.random.Generator
) -> list[Surroundings]:
    """Return what surrounds each device at its distance (m), by one of `PATH_LOSSES`."""
    if path_loss in _FIXED:
        return [_FIXED[path_loss]] * len(distance_m)
    sees = rng.random(len(distance_m)) < line_of_sight_probability(distance_m)
    return [LINE_OF_SIGHT if seen else BLOCKED for seen in sees]


def shannon_rate_bps(bandwidth_hz: float, power_w: Any, gain: Any, noise_w_per_hz: float) -> Any:
    """Return the rate (bit/s) of a channel with white noise: ``B log2(1 + P g / (B N0))``.

    B in Hz, P in W, N0 in W/Hz; g is received by sent power (antennas, path loss, shadowing and
    fading), without unit.
    """
    return bandwidth_hz * np.log2(1.0 + power_w * gain / (bandwidth_hz * noise_w_per_hz))
