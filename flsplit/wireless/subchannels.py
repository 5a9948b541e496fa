"""Who gets which subchannel: greedily after the straggler, improved, or by chance."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flsplit.wireless.channel import Array
from flsplit.wireless.fleet import Fleet
from flsplit.wireless.latency import RoundTerms
from flsplit.wireless.power import Filling, Owned, Subchannels, packed, scaled_budgets
from flsplit.wireless.rates import Allocation, Rates, downlink_bits, who_owns

Owner = NDArray[np.int64]
"""By subchannel, the index of the device that has it."""

Devices = NDArray[np.int64]

_WORTHWHILE = 1.0 - 1e-5  # a change that shortens a round by less is not made
_FEW_SUBCHANNELS = 40  # with more, not all exchanges are looked at
_MOST_CHANGES = 200


@dataclass(frozen=True)
class Cell:
    """A fleet's radio cell, and how powers are filled in while subchannels are divided."""

    snr_per_watt: Array  # signal to noise per watt (1/W), shape (devices, subchannels)
    down: Array  # what the base station sends, in bit/s per Hz, in the same shape
    budget_w: Array  # powers by device, scaled down so that they keep to the total
    bandwidth_hz: float  # of a subchannel
    filling: Filling  # divides a device's power over its subchannels

    @classmethod
    def of(cls, fleet: Fleet, filling: Filling) -> "Cell":
        """Return the cell of a fleet with a radio."""
        assert fleet.radio is not None
        budget_w = scaled_budgets(fleet.power_w, fleet.radio.total_power_w)
        bandwidth = fleet.radio.subchannel_hz
        return cls(fleet.snr_per_watt, downlink_bits(fleet), budget_w, bandwidth, filling)

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of devices and of subchannels."""
        num_devices, num_subchannels = self.snr_per_watt.shape
        return num_devices, num_subchannels

    @property
    def broadcast_bps(self) -> float:
        """The rate of a broadcast."""
        return self.bandwidth_hz * float(self.down.sum(axis=1).min())

    def up_bps(self, devices: Devices, own: Subchannels, real: Owned) -> Array:
        """Return uplink rates (bit/s) of devices with the subchannels ``own``, where ``real``."""
        snr_per_watt = self.snr_per_watt[devices[:, None], own]
        bits = self.filling.bits(snr_per_watt, real, self.budget_w[devices])
        return self.bandwidth_hz * bits

    def down_bps(self, devices: Devices, own: Subchannels, real: Owned) -> Array:
        """Return downlink rates (bit/s) of devices with the subchannels ``own``, where ``real``."""
        return np.asarray(self.bandwidth_hz * (self.down[devices[:, None], own] * real).sum(axis=1))

    def rates(self, owner: Owner) -> Rates:
        """Return all rates, in bit/s."""
        everybody, (own, real) = np.arange(self.shape[0]), packed(who_owns(owner, len(self.down)))
        up, down = (link(everybody, own, real) for link in (self.up_bps, self.down_bps))
        return Rates(up, down, self.broadcast_bps)

    def allocation(self, owner: Owner) -> Allocation:
        """Return an allocation with the powers (W) of the filling."""
        owned = who_owns(owner, len(self.down))
        powers = self.filling.powers(self.snr_per_watt, owned, self.budget_w)
        return Allocation(owner, powers.sum(axis=0))


def at_random(num_devices: int, num_subchannels: int, rng: np.random.Generator) -> Owner:
    """Return owners drawn by chance, after each device got one subchannel."""
    owner = rng.integers(num_devices, size=num_subchannels)
    owner[rng.permutation(num_subchannels)[:num_devices]] = np.arange(num_devices)
    return owner


def greedy(cell: Cell, terms: RoundTerms) -> Owner:
    """Give subchannels to whoever is slowest.

    First each device gets one, those with the longest compute (s) first; then, until none is left,
    the device with the longest time of its own in the round (s) gets another. Each time it is the
    one with the best gain of those that are left.
    """
    num_devices, num_subchannels = cell.shape
    owner = np.full(num_subchannels, -1)
    up, down = np.zeros(num_devices), np.zeros(num_devices)

    def give(device: int) -> None:
        gains = np.where(owner < 0, cell.snr_per_watt[device], -1.0)
        best = int(gains.argmax())
        owner[best] = device
        only, own = np.array([device]), np.flatnonzero(owner == device)[None]
        up[device] = cell.up_bps(only, own, np.ones_like(own, dtype=bool))[0]
        down[device] = cell.down_bps(only, own, np.ones_like(own, dtype=bool))[0]

    for device in np.argsort(-(terms.weight @ terms.fixed_s), kind="stable"):
        give(int(device))
    for _ in range(num_subchannels - num_devices):
        give(int(terms.chain_seconds(up, down).argmax()))
    return owner


def improved(cell: Cell, terms: RoundTerms, owner: Owner) -> Owner:
    """Move or swap subchannels as long as the round gets shorter, 200 times at most.

    For each device that a phase waits for, two kinds of changes are looked at: it gets another's
    subchannel; or it gets one in exchange for one of its own. The best of all is made. Where there
    are many subchannels, only those are looked at that suit the one better in comparison with the
    other than all others do.
    """
    owner = owner.copy()
    rates = cell.rates(owner)
    best = terms.seconds(rates)
    for _ in range(_MOST_CHANGES):
        found = _best_of(cell, terms, rates, owner, _changes(cell, terms, rates, owner))
        if found is None or found[0] >= best * _WORTHWHILE:
            return owner
        best, owner = found
        rates = cell.rates(owner)
    return owner


def _changes(cell: Cell, terms: RoundTerms, rates: Rates, owner: Owner) -> NDArray[np.int64]:
    """Return rows (to, subchannel, from, back): ``back`` is given for it, or nothing if -1."""
    several = np.bincount(owner, minlength=cell.shape[0]) > 1
    changes = []
    for late in np.unique(terms.by_device(rates).argmax(axis=1)):
        taken, back = _pairs(cell, owner, int(late))
        moved = np.unique(taken[several[owner[taken]]])
        for subchannels, given in ((taken, back), (moved, np.full_like(moved, -1))):
            to = np.full_like(subchannels, late)
            changes.append(np.column_stack([to, subchannels, owner[subchannels], given]))
    return np.concatenate(changes)


def _pairs(cell: Cell, owner: Owner, late: int) -> tuple[Subchannels, Subchannels]:
    """Return subchannels that a late device could get, and for each one to give for it."""
    mine = owner == late
    if len(owner) <= _FEW_SUBCHANNELS:
        others, own = np.flatnonzero(~mine), np.flatnonzero(mine)
        return np.repeat(others, len(own)), np.tile(own, len(others))
    others = np.delete(np.arange(cell.shape[0]), late)
    suits = cell.snr_per_watt[late] / cell.snr_per_watt[others]  # shape (others, subchannels)
    theirs = owner == others[:, None]
    takes = np.where(theirs, suits, -1.0).argmax(axis=1)
    return takes, np.where(mine, 1.0 / suits, -1.0).argmax(axis=1)


def _best_of(
    cell: Cell, terms: RoundTerms, rates: Rates, owner: Owner, changes: NDArray[np.int64]
) -> tuple[float, Owner] | None:
    """Return the shortest round (s) that one of the changes leads to, and its owners."""
    if not len(changes):
        return None
    to, taken, source, back = changes.T
    own, real = packed(who_owns(owner, len(cell.down)))
    is_swap = (back >= 0)[:, None]
    gaining = (
        np.hstack([own[to], taken[:, None]]),
        np.hstack([real[to] & (own[to] != back[:, None]), np.ones_like(is_swap)]),
    )
    losing = (
        np.hstack([own[source], np.maximum(back, 0)[:, None]]),
        np.hstack([real[source] & (own[source] != taken[:, None]), is_swap]),
    )
    up = np.repeat(rates.uplink_bps[None], len(changes), axis=0)
    down = np.repeat(rates.downlink_bps[None], len(changes), axis=0)
    rows = np.arange(len(changes))
    for devices, subchannels in ((to, gaining), (source, losing)):
        up[rows, devices] = cell.up_bps(devices, *subchannels)
        down[rows, devices] = cell.down_bps(devices, *subchannels)
    seconds = _seconds_of_many(terms, up, down, rates.broadcast_bps)
    best = int(seconds.argmin())
    changed = owner.copy()
    changed[taken[best]] = to[best]
    if back[best] >= 0:
        changed[back[best]] = source[best]
    return float(seconds[best]), changed


def _seconds_of_many(terms: RoundTerms, up: Array, down: Array, broadcast_bps: float) -> Array:
    """Return rounds' lengths (s) by rows of uplink and downlink rates (bit/s)."""
    total = np.zeros(len(up))
    for g, weight in enumerate(terms.weight):
        seconds = terms.fixed_s[g] + terms.wide_bits[g] / broadcast_bps
        if terms.up_bits[g]:
            seconds = seconds + terms.up_bits[g] / up
        if terms.down_bits[g]:
            seconds = seconds + terms.down_bits[g] / down
        total += weight * (seconds.sum(axis=-1) if terms.in_turn[g] else seconds.max(axis=-1))
    return total
