"""The radio channel: path loss, shadowing, and the rate that a power reaches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LINE_OF_SIGHT_RANGE_M = 67.1
"""The distance (m) at which a 28 GHz device in New York's streets sees the base station with a
probability of 1/e."""


def macro_path_loss_db(distance_m: Array) -> Array:
    """Return 3GPP's path loss of a macro cell at 2 GHz (TR 36.814).

    ``128.1 + 37.6 log10(d)``, d in km.

    Parameters
    ----------
    distance_m : ndarray
        Distances, in m.

    Returns
    -------
    ndarray
        Path losses, in dB.
    """
    return 128.1 + 37.6 * np.log10(distance_m / 1e3)


def line_of_sight_path_loss_db(distance_m: Array) -> Array:
    """Return the path loss at 28 GHz where the device sees the base station.

    ``61.4 + 20 log10(d)``, d in m, after Akdeniz et al., Millimeter Wave Channel Modeling and
    Cellular Capacity Evaluation, https://arxiv.org/abs/1312.4921.

    Parameters
    ----------
    distance_m : ndarray
        Distances, in m.

    Returns
    -------
    ndarray
        Path losses, in dB.
    """
    return 61.4 + 20.0 * np.log10(distance_m)


def blocked_path_loss_db(distance_m: Array) -> Array:
    """Return the path loss at 28 GHz where something stands between.

    ``72.0 + 29.2 log10(d)``, d in m; source as `line_of_sight_path_loss_db`.

    Parameters
    ----------
    distance_m : ndarray
        Distances, in m.

    Returns
    -------
    ndarray
        Path losses, in dB.
    """
    return 72.0 + 29.2 * np.log10(distance_m)


def line_of_sight_probability(distance_m: Array) -> Array:
    """Return the probability (no unit) that a device at a distance (m) sees the base station.

    ``exp(-d / 67.1 m)``; source as `line_of_sight_path_loss_db`.
    """
    return np.exp(-distance_m / LINE_OF_SIGHT_RANGE_M)


@dataclass(frozen=True)
class Surroundings:
    """How the channel loses power on the way.

    Attributes
    ----------
    path_loss_db : callable
        Path losses (dB) by distances (m).
    shadowing_db : float
        Standard deviation (dB) of log-normal shadowing, per device.
    """

    path_loss_db: Callable[[Array], Array]
    shadowing_db: float


MACRO = Surroundings(macro_path_loss_db, 8.0)
LINE_OF_SIGHT = Surroundings(line_of_sight_path_loss_db, 5.8)
BLOCKED = Surroundings(blocked_path_loss_db, 8.7)

PATH_LOSSES = ("macro-2ghz", "mmwave-28ghz", "mmwave-28ghz-los", "mmwave-28ghz-nlos")
"""The models of path loss. ``mmwave-28ghz`` draws per device whether it has a line of sight."""


def surroundings_of(
    path_loss: str, distance_m: Array, rng: np.random.Generator
) -> list[Surroundings]:
    """Return what surrounds each device.

    Parameters
    ----------
    path_loss : str
        One of `PATH_LOSSES`.
    distance_m : ndarray
        Each device's distance, in m.
    rng : numpy.random.Generator
        Draws who has a line of sight.
    """
    fixed = {
        "macro-2ghz": MACRO,
        "mmwave-28ghz-los": LINE_OF_SIGHT,
        "mmwave-28ghz-nlos": BLOCKED,
    }
    if path_loss in fixed:
        return [fixed[path_loss]] * len(distance_m)
    sees = rng.random(len(distance_m)) < line_of_sight_probability(distance_m)
    return [LINE_OF_SIGHT if seen else BLOCKED for seen in sees]


def shannon_rate_bps(bandwidth_hz: float, power_w: Any, gain: Any, noise_w_per_hz: float) -> Any:
    """Return the rate of a channel with white noise.

    ``B log2(1 + P g / (B N0))``.

    Parameters
    ----------
    bandwidth_hz : float
        B, in Hz.
    power_w : float or ndarray
        P, the power sent, in W.
    gain : float or ndarray
        g, received by sent power, without unit: antennas, path loss, shadowing and fading.
    noise_w_per_hz : float
        N0, the noise's power density, in W/Hz.

    Returns
    -------
    float or ndarray
        Rates, in bit/s.
    """
    return bandwidth_hz * np.log2(1.0 + power_w * gain / (bandwidth_hz * noise_w_per_hz))
