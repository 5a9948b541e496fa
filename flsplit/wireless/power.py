"""Transmit power: water-filling, and the powers that make the slowest device fastest."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flsplit.wireless.channel import Array
from flsplit.wireless.search import falling_root, golden_section

Owned = NDArray[np.bool_]
Subchannels = NDArray[np.int64]

_NO_FLOOR_W = 1e300


@dataclass(frozen=True)
class Filling:
    """A way to divide a device's power over its subchannels.

    Both functions take signal to noise per watt (1/W), with a row for each device, which of the
    subchannels it owns, in the same shape, and the budgets (W) by device.
    """

    powers: Callable[[Array, Owned, Array], Array]  # in W, zero on what isn't owned
    bits: Callable[[Array, Owned, Array], Array]  # what they carry: see `carried_bits`


def carried_bits(snr_per_watt: Array, power_w: Array) -> Array:
    """Return what powers P (W) carry by device: ``sum_k log2(1 + P_k a_k)``.

    In bit/s per Hz of one subchannel's bandwidth; a is signal to noise per watt (1/W).
    """
    return np.asarray(np.log2(1.0 + power_w * snr_per_watt).sum(axis=1))


def even_powers(snr_per_watt: Array, owned: Owned, budget_w: Array) -> Array:
    """Return powers (W): a device's budget (W) by the number of its subchannels."""
    share = budget_w / np.maximum(owned.sum(axis=1), 1)
    return np.where(owned, share[:, None], 0.0)


class Basin:
    """The floors 1/a (W) that power is poured over, each device's from the lowest up.

    ``snr_per_watt``, a (1/W), and ``owned``, who owns what, have the shape (devices, subchannels);
    each device owns something.
    """

    def __init__(self, snr_per_watt: Array, owned: Owned) -> None:
        with np.errstate(divide="ignore"):
            floor_w = np.where(owned, np.minimum(1.0 / snr_per_watt, _NO_FLOOR_W), np.inf)
        self._order = np.argsort(floor_w, axis=1)
        self._floor_w = np.take_along_axis(floor_w, self._order, axis=1)
        self._sums_w = np.cumsum(self._floor_w, axis=1)
        self._logs = np.cumsum(np.log2(self._floor_w), axis=1)
        self._counts = np.arange(1, owned.shape[1] + 1)
        self._rows = np.arange(len(owned))

    def pour(self, budget_w: Array) -> Array:
        """Return the powers (W) that carry most with ``budget_w`` (W) in all: water-filling.

        ``P_k = max(0, w - 1/a_k)``, with the level w (W) at which they add up to the budget.
        """
        levels_w = self._levels_of_budgets(budget_w)
        return self._powers(np.take_along_axis(levels_w, self._last(levels_w), axis=1))

    def bits(self, budget_w: Array) -> Array:
        """Return what `pour` carries, in bit/s per Hz: ``sum_k log2(w a_k)`` where under water."""
        levels_w = self._levels_of_budgets(budget_w)
        last = self._last(levels_w)
        level_w = np.take_along_axis(levels_w, last, axis=1)
        logs = np.take_along_axis(self._logs, last, axis=1)
        return np.asarray(((last + 1) * np.log2(level_w) - logs)[:, 0])

    def carry(self, bits: Array) -> Array:
        """Return the least powers (W) that carry ``bits`` (bit/s per Hz, by device).

        The level w (W) is the one at which ``sum_k log2(max(1, w a_k))`` is ``bits``.
        """
        levels_w = self._levels_of_bits(bits)
        return self._powers(np.take_along_axis(levels_w, self._last(levels_w), axis=1))

    def carry_together(self, bits: Array) -> float:
        """Return the sum of `carry`'s powers (W): ``sum_k (w - 1/a_k)`` where under water.

        Quicker, since a search for powers mostly asks for no more than that.
        """
        levels_w = self._levels_of_bits(bits)
        last = self._last(levels_w)[:, 0]
        level_w, sum_w = levels_w[self._rows, last], self._sums_w[self._rows, last]
        return float(np.maximum((last + 1) * level_w - sum_w, 0.0).sum())

    def _levels_of_bits(self, bits: Array) -> Array:
        """Return the level (W) if a subchannel were the highest under water."""
        with np.errstate(over="ignore"):
            return np.asarray(np.exp2((bits[:, None] + self._logs) / self._counts))

    def _levels_of_budgets(self, budget_w: Array) -> Array:
        """Return the level (W) if a subchannel were the highest under water."""
        return np.asarray((budget_w[:, None] + self._sums_w) / self._counts)

    def _last(self, levels_w: Array) -> Subchannels:
        """Return the highest subchannel whose floor lies below its level; the lowest if none."""
        wet = (levels_w > self._floor_w).sum(axis=1)  # they come first
        return np.asarray(np.maximum(wet - 1, 0)[:, None])

    def _powers(self, level_w: Array) -> Array:
        powers = np.empty_like(self._floor_w)
        depth_w = np.maximum(level_w - self._floor_w, 0.0)
        np.put_along_axis(powers, self._order, depth_w, axis=1)
        return powers


EVEN = Filling(even_powers, lambda a, own, budget: carried_bits(a, even_powers(a, own, budget)))
"""The same power on all of a device's subchannels."""

WATER = Filling(
    lambda a, own, budget: Basin(a, own).pour(budget),
    lambda a, own, budget: Basin(a, own).bits(budget),
)
"""The powers that carry most; see `Basin.pour`."""


def packed(owned: Owned) -> tuple[Subchannels, Owned]:
    """Return each device's own subchannels, in rows as long as the longest, and which are real."""
    most = int(owned.sum(axis=1).max())
    own = np.argsort(~owned, axis=1, kind="stable")[:, :most]
    return own, np.take_along_axis(owned, own, axis=1)


@dataclass(frozen=True)
class Deadline:
    """A part of a round that ends when the last device has sent something.

    It lasts ``max_i(fixed_i + bits / R_i)``, in s.
    """

    weight: float  # how often it happens in a round
    fixed_s: Array  # time by device that power does not change
    bits: float  # what each device sends

    def seconds(self, rate_bps: Array) -> float:
        """Return how long it lasts (s) at rates (bit/s)."""
        return float((self.fixed_s + self.bits / rate_bps).max())

    def needed_bps(self, seconds: float) -> Array:
        """Return the rates (bit/s) at which it lasts no longer than ``seconds`` (s)."""
        left = seconds - self.fixed_s
        with np.errstate(divide="ignore"):
            return np.where(left > 0, self.bits / left, np.inf)


def scaled_budgets(budget_w: Array, total_w: float) -> Array:
    """Return budgets (W), all reduced by one factor if together they exceed ``total_w`` (W)."""
    return budget_w * min(1.0, total_w / float(budget_w.sum()))


def control_power(
    snr_per_watt: Array,
    owned: Owned,
    budget_w: Array,
    total_w: float,
    bandwidth_hz: float,
    deadlines: Sequence[Deadline],
) -> Array:
    """Return the powers (W) that make ``sum_g weight_g max_i(fixed_gi + bits_g / R_i)`` smallest.

    A convex problem. Where the devices' own budgets keep to the total, each sends all it may.
    Otherwise, the rate that a deadline needs, and with it the least power (water-filling), falls
    as the deadline grows: a root of one variable is the shortest that all can meet. With two
    deadlines the shortest first one is a convex function of the second, which golden section
    minimises.

    Signal to noise (1/W), who owns what (each device something) and the powers have the shape
    (devices, subchannels); ``budget_w`` is what each device may send, ``total_w`` what all may
    together. There are at most two deadlines, with bits to send.
    """
    own, real = packed(owned)
    basin = Basin(np.take_along_axis(snr_per_watt, own, axis=1), real)
    scaled_w = scaled_budgets(budget_w, total_w)
    if budget_w.sum() <= total_w or not deadlines:
        found = basin.pour(scaled_w)
    else:
        search = _Search(
            basin,
            total_w,
            bandwidth_hz,
            greatest_bps=bandwidth_hz * basin.bits(budget_w),
            scaled_bps=bandwidth_hz * basin.bits(scaled_w),
        )
        needs = search.needed if len(deadlines) == 1 else search.needed_by_two
        found = basin.carry(needs(*deadlines) / bandwidth_hz)
    powers = np.zeros_like(snr_per_watt)
    np.put_along_axis(powers, own, found, axis=1)
    return powers


@dataclass(frozen=True)
class _Search:
    basin: Basin
    total_w: float
    bandwidth_hz: float
    greatest_bps: Array  # with every device's whole budget, which the total forbids
    scaled_bps: Array  # with budgets scaled down to the total, which are possible

    def shortest(self, deadline: Deadline, at_least_bps: Array) -> float:
        """Return the shortest time (s) of a deadline while rates are at least so (bit/s)."""

        def excess(seconds: float) -> float:
            """Return by how much (ratio, logarithmic) the total power is exceeded."""
            rates = np.maximum(deadline.needed_bps(seconds), at_least_bps)
            rates = np.minimum(rates, self.greatest_bps)
            power = self.basin.carry_together(rates / self.bandwidth_hz)
            return math.log(power / self.total_w) if power > 0 else -math.inf

        # at_least_bps may leave others less than scaled_bps: then it is longer than the second
        bounds = deadline.seconds(self.greatest_bps), deadline.seconds(self.scaled_bps)
        return falling_root(excess, *bounds)

    def needed(self, deadline: Deadline) -> Array:
        """Return the rates (bit/s) of the shortest deadline."""
        nothing = np.zeros_like(self.greatest_bps)
        needed = deadline.needed_bps(self.shortest(deadline, nothing))
        return np.minimum(needed, self.greatest_bps)

    def needed_by_two(self, first: Deadline, second: Deadline) -> Array:
        """Return the rates (bit/s) that make two weighted deadlines together shortest."""

        def shortest_first(seconds: float) -> float:
            return self.shortest(first, second.needed_bps(seconds))

        def total(seconds: float) -> float:
            return first.weight * shortest_first(seconds) + second.weight * seconds

        low = self.shortest(second, np.zeros_like(self.greatest_bps)) * (1 + 1e-12)
        high = second.seconds(np.maximum(self.needed(first), 1e-300))
        best = golden_section(total, low, high) if high > low else low
        both = np.maximum(first.needed_bps(shortest_first(best)), second.needed_bps(best))
        return np.minimum(both, self.greatest_bps)
