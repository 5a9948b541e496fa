"""Runs on a fleet, with rounds worked out by hand.

The plain net's client segment takes 96 FLOPs per row, its server segment 180, its head 60; a row
of smashed data has 24 bytes and a label 8, a client segment 216 bytes. On the fleet a row takes a
device 1 s forward, 2 s backward, 1 s up and 1 s down, and the server 1 s; a segment takes 9 s down
and 6.75 s up.
"""

from collections import OrderedDict

import pytest
from flwr.serverapp.strategy import FedAvg
from reference import make_parts, noisy_net, plain_net, run_split
from torch import nn

from flsplit.errors import ConfigError
from flsplit.strategies import (
    CSEFSL,
    EPSL,
    FSLSAGE,
    GAPSL,
    PSL,
    SGLR,
    SequentialSL,
    SplitFedV1,
    SplitFedV2,
)
from flsplit.wireless import Device, Fleet, Radio, Server

FLEET = Fleet(
    devices=tuple(
        Device(name=name, compute_flops=96.0, uplink_bps=256.0, downlink_bps=192.0)
        for name in ("0", "1")
    ),
    server=Server(compute_flops=540.0),
)
STEPS = (4 + 4) + 8 + (4 + 8 + 4 + 4) + 8 + (4 + 8)  # two steps of 4 rows per client
DOWN, UP = 9.0, 6.75

# A local step of 4 rows: 4 * (96 + 192 + 108) FLOPs, with a linear auxiliary model from 6 to 3.
LOCAL = 16.5
AUXILIARY_DOWN, AUXILIARY_UP = 3.5, 2.625  # 84 bytes

TURN = DOWN + (4 + 4) + 4 + (4 + 8 + 4 + 4) + 4 + (4 + 8) + UP

EPSL_MORE = 2 * (6 * 180 - 2 * 240) / 540

BY_HAND = {
    "psl": (PSL, {}, [DOWN + STEPS, STEPS]),
    "splitfed-v1": (SplitFedV1, {}, 2 * [DOWN + STEPS + UP]),
    "splitfed-v2": (SplitFedV2, {}, 2 * [DOWN + STEPS + UP]),
    "averaging": (PSL, {"client_strategy": FedAvg()}, 2 * [DOWN + STEPS + UP]),
    "sequential": (SequentialSL, {}, 2 * [2 * TURN]),
    # all rows are the mean of both clients' and broadcast: over links that takes as long
    "sglr": (SGLR, {"phi": 1.0, "shares": "equal"}, [DOWN + STEPS, STEPS]),
    # of the server's 8 s per step, 2 of 8 rows save 240 FLOPs each; 6 go forward a second time
    "epsl": (EPSL, {"phi": 0.5}, [DOWN + STEPS + EPSL_MORE, STEPS + EPSL_MORE]),
    "epsl, phi 0": (EPSL, {"phi": 0.0}, [DOWN + STEPS, STEPS]),
    # all rows go back
    "epsl, shared delta": (
        EPSL,
        {"phi": 0.5, "aggregation": "shared_delta"},
        [DOWN + STEPS, STEPS],
    ),
    # uploads come after 4 s of the first local step; the server is ready before the clients
    "fsl-sage": (
        FSLSAGE,
        {"upload_every": 2, "align_every": 0},
        [DOWN + AUXILIARY_DOWN + LOCAL + 4 + LOCAL + UP, DOWN + LOCAL + 4 + LOCAL + UP],
    ),
    "cse-fsl": (
        CSEFSL,
        {"upload_every": 2},
        2 * [DOWN + AUXILIARY_DOWN + LOCAL + 4 + LOCAL + UP + AUXILIARY_UP],
    ),
}


def times(strategy_class, build=plain_net, sizes=(8, 8), **options):
    options = {"fleet": FLEET, "fraction_evaluate": 0.0} | options
    result = run_split(strategy_class, build, make_parts(sizes, build), **options)
    return result, [entry.simulated_seconds for entry in result.history]


@pytest.mark.parametrize("name", BY_HAND)
def test_rounds_by_hand(name):
    strategy_class, options, expected = BY_HAND[name]
    result, found = times(strategy_class, **options)
    assert found == pytest.approx(expected)
    assert result.history.simulated_so_far() == pytest.approx([found[0], sum(found)])
    assert result.train_metrics_clientapp[1]["simulated-seconds"] == found[0]


def test_test_batches_take_no_time_but_the_segment_that_comes_with_them_does():
    _, without = times(SplitFedV2)
    _, found = times(SplitFedV2, fraction_evaluate=1.0, tests=make_parts((5, 5)))
    assert found == pytest.approx([without[0] + DOWN, without[1]])


def test_skipped_clients_compute_no_backward_pass():
    _, (_, found) = times(GAPSL)
    assert found <= STEPS


def test_ragged_rounds_are_counted_as_they_are():
    """Client 1 has one batch of 3: it sends 3 rows, and is ready while client 0 goes on."""
    _, (_, found) = times(PSL, sizes=(8, 3))
    assert found == pytest.approx((4 + 4) + 7 + (4 + 8 + 4 + 4) + 4 + (4 + 8))


def test_an_alignment_takes_the_server_time():
    """4 rows of 540 FLOPs and of 2 * 3 epochs of 108, for each of two clients."""
    options = {"upload_every": 2, "align_epochs": 3, "auxiliary_lr": 0.0, "align": "before_round"}
    _, (_, without) = times(FSLSAGE, align_every=0, **options)
    _, (_, found) = times(FSLSAGE, align_every=1, **options)
    aligned = 2 * 4 * (540 + 2 * 3 * 108) / 540
    assert found == pytest.approx(aligned + AUXILIARY_DOWN + without)


@pytest.mark.parametrize("strategy_class", [PSL, SequentialSL, FSLSAGE])
def test_times_are_the_same_without_live_clients(strategy_class):
    _, cached = times(strategy_class, noisy_net, sizes=(9, 6))
    _, rebuilt = times(strategy_class, noisy_net, sizes=(9, 6), cache=False)
    assert cached == rebuilt


def test_on_a_radio_network_the_plan_divides_the_band():
    radio = Fleet(
        devices=tuple(
            Device(name=name, compute_flops=96.0, distance_m=d, power_w=1.0)
            for name, d in (("0", 100.0), ("1", 300.0))
        ),
        server=Server(compute_flops=540.0),
        radio=Radio(num_subchannels=4, subchannel_hz=100.0, shadowing_db=0.0, fading=False),
    )
    _, parallel = times(PSL, fleet=radio)
    _, in_turn = times(SequentialSL, fleet=radio)
    assert 0 < parallel[0] < in_turn[0]


def test_inputs_may_be_a_dict():
    """Two linear layers have the same FLOPs and bytes as ever."""

    class Named(nn.Sequential):
        def forward(self, pixels):
            return super().forward(pixels)

    def named_net():
        return Named(OrderedDict(plain_net().named_children()))

    rows = [list(part) for part in make_parts((8, 8), plain_net)]
    parts = [[{"pixels": x, "label": y} for x, y in part] for part in rows]
    named = run_split(PSL, named_net, parts, fleet=FLEET, fraction_evaluate=0.0)
    _, found = times(PSL)
    assert [entry.simulated_seconds for entry in named.history] == found


def test_without_a_fleet_there_is_no_simulated_time():
    result, found = times(PSL, fleet=None)
    assert found == [None, None]
    assert result.history.simulated_so_far() == [None, None]
    assert "simulated-seconds" not in result.train_metrics_clientapp[1]


def test_a_file_may_describe_the_fleet(tmp_path):
    path = tmp_path / "fleet.toml"
    path.write_text(
        '[server]\ncompute = "540 FLOP/s"\n'
        '[[devices]]\ncount = 2\ncompute = "96 FLOP/s"\n'
        'uplink = "256 bit/s"\ndownlink = "192 bit/s"\n'
    )
    _, found = times(PSL, fleet=str(path))
    assert found == pytest.approx([DOWN + STEPS, STEPS])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fleet": "nowhere.toml"}, "fleet is 'nowhere.toml', but .* has no such file; an app"),
        ({"fleet": "/nowhere/fleet.toml"}, "the fleet /nowhere/fleet.toml can't be read"),
        ({"fleet": 3}, "fleet is 3, expected an object of type Fleet"),
        ({"fleet": "", "realtime": True}, "realtime is True, but there is no fleet"),
        ({"realtime": 1}, "realtime is 1, expected an object of type bool"),
    ],
)
def test_what_is_no_fleet_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        times(PSL, **options)


def test_clients_that_are_no_devices_are_refused():
    with pytest.raises(ConfigError, match="client '2' takes part, but the fleet has no device"):
        times(PSL, sizes=(4, 4, 4))


def test_a_device_without_the_memory_for_the_cut_is_refused():
    small = Fleet(
        devices=tuple(
            Device(name=n, compute_flops=1.0, uplink_bps=1.0, downlink_bps=1.0, memory_bytes=10.0)
            for n in ("0", "1")
        ),
        server=FLEET.server,
    )
    with pytest.raises(ValueError, match="fleet: no cut of Sequential fits"):
        times(PSL, fleet=small)


@pytest.mark.parametrize(
    ("strategy_class", "options", "expected"),
    [
        (PSL, {}, {}),
        (EPSL, {"phi": 0.25}, {"phi": 0.25, "aggregation": "replay", "client_strategy": None}),
        (
            FSLSAGE,
            {"upload_every": 2, "align_every": 3, "align_epochs": 4, "buffer_size": 50},
            {"upload_every": 2, "align_every": 3, "align_epochs": 4, "buffer_size": 50},
        ),
        (CSEFSL, {"upload_every": 2}, {"upload_every": 2, "average_auxiliary": True}),
        (PSL, {"shares": "equal"}, {"shares": "equal", "local_epochs": 1}),
    ],
)
def test_phases_are_told_the_strategy_s_arguments(strategy_class, options, expected):
    strategy = strategy_class(model=plain_net(), cut="front", **options)
    found = strategy.planned()
    assert (found.name, found.kind) == (strategy_class.__name__, strategy_class)
    assert {name: found.arguments[name] for name in expected} == expected
    assert not {"model", "cut"} & found.arguments.keys()
