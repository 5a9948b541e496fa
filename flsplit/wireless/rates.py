"""Who has which subchannel at what power, and the rates that follow."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flsplit.wireless.channel import Array
from flsplit.wireless.fleet import Fleet
from flsplit.wireless.power import WATER


@dataclass(frozen=True)
class Allocation:
    """A division of a cell's subchannels and powers."""

    owner: NDArray[np.int64]  # by subchannel, the index of the device that has it
    power_w: Array  # by subchannel, the power (W) that its device sends on it

    def device_power_w(self, num_devices: int) -> Array:
        """Return the power (W) that each device sends in all."""
        spent = np.bincount(self.owner, weights=self.power_w, minlength=num_devices)
        return spent.astype(np.float64)


@dataclass(frozen=True)
class Rates:
    """What the links carry."""

    uplink_bps: Array  # each device's rates, in bit/s
    downlink_bps: Array
    broadcast_bps: float  # the rate (bit/s) at which all devices can be told the same


def who_owns(owner: NDArray[np.int64], num_devices: int) -> NDArray[np.bool_]:
    """Return who owns what, shape (devices, subchannels), from the owner of each subchannel."""
    return np.asarray(owner[None, :] == np.arange(num_devices)[:, None])


def link_rates(fleet: Fleet) -> Rates:
    """Return the rates of measured links.

    A broadcast goes to every device over its own link, at the same time: it takes as long as to
    the slowest.
    """
    uplink = np.array([device.uplink_bps for device in fleet.devices])
    downlink = np.array([device.downlink_bps for device in fleet.devices])
    return Rates(uplink, downlink, float(downlink.min()))


def radio_rates(fleet: Fleet, allocation: Allocation) -> Rates:
    """Return the rates of a cell.

    Uplink and unicast: ``R_i = sum_k r_ik B log2(1 + P_k g_ik / (B N0))`` over the device's own
    subchannels (B in Hz, P_k in W, N0 in W/Hz); downlink powers follow from the radio's power
    density. Broadcast: the same over all subchannels, for the device that hears worst.
    """
    assert fleet.radio is not None
    owned = who_owns(allocation.owner, fleet.num_devices)
    sent = np.log2(1.0 + allocation.power_w * fleet.snr_per_watt) * owned
    received = downlink_bits(fleet)
    bandwidth = fleet.radio.subchannel_hz
    return Rates(
        uplink_bps=bandwidth * sent.sum(axis=1),
        downlink_bps=bandwidth * (received * owned).sum(axis=1),
        broadcast_bps=bandwidth * float(received.sum(axis=1).min()),
    )


def lone_rates(fleet: Fleet) -> Rates:
    """Return the rates of devices that take turns: each alone has the whole band.

    It sends its whole power (no more than all may together), poured over the subchannels. Rates
    in bit/s. Over measured links nothing changes.
    """
    if fleet.radio is None:
        return link_rates(fleet)
    bandwidth = fleet.radio.subchannel_hz
    budget = np.minimum(fleet.power_w, fleet.radio.total_power_w)
    everything = np.ones_like(fleet.snr_per_watt, dtype=bool)
    bits = WATER.bits(fleet.snr_per_watt, everything, budget)
    received = downlink_bits(fleet).sum(axis=1)
    return Rates(bandwidth * bits, bandwidth * received, bandwidth * float(received.min()))


def downlink_bits(fleet: Fleet) -> Array:
    """Return what the base station can send, in bit/s per Hz, shape (devices, subchannels).

    ``log2(1 + p g / N0)``, p in W/Hz.
    """
    assert fleet.radio is not None
    sent_w = fleet.radio.downlink_w_per_hz * fleet.radio.subchannel_hz
    return np.log2(1.0 + sent_w * fleet.snr_per_watt)
