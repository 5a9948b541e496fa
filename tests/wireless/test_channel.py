import numpy as np
import pytest

from flsplit.wireless import Allocation, Device, Fleet, Radio, Server, channel
from flsplit.wireless.rates import downlink_bits, link_rates, lone_rates, radio_rates


def at(metres):
    return np.array([float(metres)])


def test_path_losses_by_hand():
    # log10(0.1 km) = -1 and log10(100 m) = 2
    assert channel.MACRO.path_loss_db(1000.0) == pytest.approx(128.1)
    assert channel.MACRO.path_loss_db(100.0) == pytest.approx(128.1 - 37.6)
    assert channel.LINE_OF_SIGHT.path_loss_db(100.0) == pytest.approx(61.4 + 40.0)
    assert channel.BLOCKED.path_loss_db(100.0) == pytest.approx(72.0 + 58.4)


def test_who_sees_the_base_station():
    assert channel.line_of_sight_probability(at(67.1)) == pytest.approx(np.exp(-1))
    far, near = np.full(50, 1e5), np.full(50, 1e-3)
    rng = np.random.default_rng(0)
    assert channel.surroundings_of("mmwave-28ghz", far, rng) == [channel.BLOCKED] * 50
    assert channel.surroundings_of("mmwave-28ghz", near, rng) == [channel.LINE_OF_SIGHT] * 50


def test_shannon_by_hand():
    # 0.3 W * 1e-9 / (1e6 Hz * 1e-16 W/Hz) = 3, and log2(1 + 3) = 2
    assert channel.shannon_rate_bps(1e6, 0.3, 1e-9, 1e-16) == pytest.approx(2e6)


def test_rates_of_a_cell_by_hand(drawn_fleet):
    fleet = drawn_fleet(2, 0, subchannels=3)
    allocation = Allocation(np.array([0, 1, 0]), np.array([0.5, 1.0, 0.7]))
    rates, gains = radio_rates(fleet, allocation), fleet.gains
    noise = fleet.radio.noise_w_per_hz
    by_hand = sum(
        10e6 * np.log2(1 + power * gains[0, k] / (10e6 * noise))
        for k, power in ((0, 0.5), (2, 0.7))
    )
    assert rates.uplink_bps[0] == pytest.approx(by_hand)
    down = 10e6 * np.log2(1 + fleet.radio.downlink_w_per_hz * gains / noise)
    assert rates.downlink_bps == pytest.approx([down[0, [0, 2]].sum(), down[1, 1]])
    assert rates.broadcast_bps == pytest.approx(down.sum(axis=1).min())


def test_rates_of_a_lone_device_by_hand():
    """A gain of 1 and 1 W/Hz of noise; 3 W on each of two subchannels of 1 Hz: log2(1 + 3)."""
    fleet = Fleet(
        devices=(Device(name="0", compute_flops=1.0, distance_m=1.0, power_w=6.0),),
        server=Server(compute_flops=1.0),
        radio=Radio(
            num_subchannels=2,
            subchannel_hz=1.0,
            noise_w_per_hz=1.0,
            antenna_gain=10**6.14,
            downlink_w_per_hz=3.0,
            path_loss="mmwave-28ghz-los",
            shadowing_db=0.0,
            fading=False,
        ),
    )
    assert fleet.gains == pytest.approx(np.ones((1, 2)))
    assert downlink_bits(fleet) == pytest.approx(np.full((1, 2), 2.0))
    rates = lone_rates(fleet)
    assert (rates.uplink_bps, rates.downlink_bps) == (pytest.approx([4.0]), pytest.approx([4.0]))
    assert rates.broadcast_bps == pytest.approx(4.0)


def test_gains_by_hand(drawn_fleet):
    from dataclasses import replace

    fleet = drawn_fleet(2, 0)
    plain = replace(
        fleet, radio=replace(fleet.radio, path_loss="macro-2ghz", shadowing_db=0.0, fading=False)
    )
    loss_db = 128.1 + 37.6 * np.log10(fleet.devices[0].distance_m / 1e3)
    assert plain.gains[0] == pytest.approx(10.0 * 10 ** (-loss_db / 10))


def test_alone_a_device_has_the_whole_band(drawn_fleet):
    fleet = drawn_fleet(3, 0)
    everything = Allocation(np.zeros(12, dtype=int), np.full(12, 1.5 / 12))
    evenly = radio_rates(fleet, everything)
    alone = lone_rates(fleet)
    assert alone.uplink_bps[0] >= evenly.uplink_bps[0]
    assert alone.downlink_bps[0] == pytest.approx(evenly.downlink_bps[0])


def test_links(linked_fleet):
    rates = link_rates(linked_fleet)
    assert list(rates.uplink_bps) == [64.0, 128.0]
    assert rates.broadcast_bps == 128.0  # as fast as to the slowest
    assert lone_rates(linked_fleet).broadcast_bps == 128.0
