"""Rounds of the tiny model on two linked devices, worked out by hand."""

from dataclasses import replace

import pytest
import torch
from flwr.serverapp.strategy import FedAvg
from planned_methods import planned

from flsplit.auxiliary import linear
from flsplit.cut.flops import forward_flops
from flsplit.errors import ConfigError
from flsplit.strategies import CSEFSL, EPSL, FSLSAGE, PSL, SequentialSL, SplitFedV1, SplitFedV2
from flsplit.wireless import (
    Device,
    Fleet,
    Problem,
    Server,
    Training,
    Work,
    round_seconds,
    stage_breakdown,
)
from flsplit.wireless.latency import SERVER, RoundTerms, spans
from flsplit.wireless.phases import Phase, Stage, Where, parallel_steps, server_passes
from flsplit.wireless.rates import link_rates
from flsplit.wireless.unsplit import FEDAVG


class OnePass(EPSL):
    """EPSL as we understand the paper's equations: rows are merged, and all go forward once."""

    @classmethod
    def phases(cls, work, **arguments):
        server = server_passes(work, backward_rows=6, logit_rows=8)
        return parallel_steps(work, shared_rows=2, server=server)


# 4 samples, cut after "first": F_c = 100, B_c = 200, F_s = 300, B_s = 600, B_l = 100 FLOPs and
# 128 bits per sample; client segments of 320 bits, models of 1600 bits.
UP = 4 + 8  # device 0: 400 FLOPs at 100 FLOP/s, 512 bits at 64 bit/s
SERVER_FORWARD = 2.4  # 8 rows of 300 FLOPs at 1000 FLOP/s
BY_HAND = {
    # backward 8 * 100 + (2 + 2 * 2) * 500 = 3800 FLOPs; 2 rows broadcast at 128 bit/s, 2 unicast
    "epsl, one forward pass": (
        planned(OnePass),
        1,
        UP + SERVER_FORWARD + 3.8 + 2 + (2 + 8),
    ),
    # another 2 + 2 * 2 rows of 300 FLOPs forward
    "epsl": (planned(EPSL, phi=0.5), 1, UP + SERVER_FORWARD + 1.8 + 3.8 + 2 + (2 + 8)),
    "epsl, phi 0": (planned(EPSL, phi=0.0), 1, UP + SERVER_FORWARD + 4.8 + 0 + (4 + 8)),
    # all rows go back
    "epsl, shared delta": (
        planned(EPSL, phi=0.5, aggregation="shared_delta"),
        1,
        UP + SERVER_FORWARD + 4.8 + 2 + (2 + 8),
    ),
    "psl": (planned(PSL), 1, UP + SERVER_FORWARD + 4.8 + 0 + (4 + 8)),
    # phi = 1: backward 8 * 100 + 4 * 500 = 2800 FLOPs, 4 rows broadcast, nothing unicast; another
    # 4 rows of 300 FLOPs forward
    "epsl, phi 1": (planned(EPSL, phi=1.0), 1, UP + SERVER_FORWARD + 1.2 + 2.8 + 4 + 8),
    "psl, 3 steps": (planned(PSL), 3, 3 * 31.2),
    # and 320 bits up at 64 bit/s, broadcast at 128 bit/s
    "splitfed": (planned(SplitFedV1), 1, 31.2 + 5 + 2.5),
    "splitfed, 3 steps": (planned(SplitFedV2), 3, 3 * 31.2 + 5 + 2.5),
    # turns of 4 + 8 + 1.2 + 2.4 + 4 + 8 and of 2 + 4 + 1.2 + 2.4 + 2 + 4, hand-overs
    "sequential": (planned(SequentialSL), 1, 27.6 + 15.6 + (5 + 2.5) + (2.5 + 1.25)),
    # 1600 and 3200 FLOPs at 100 FLOP/s, 1600 bits at 64 bit/s, broadcast at 128 bit/s
    "fedavg": (FEDAVG, 1, 16 + 32 + 25 + 12.5),
    # a linear auxiliary model from 4 to 1: 8 + 16 FLOPs, 5 parameters.
    # 5 steps of 4 * (100 + 24 + 200) FLOPs, one upload; the server trains on 8 rows; half of
    # 2 * 10 * (300 + 600 + 2 * 24) FLOPs; half of 160 bits; 320 bits up and broadcast
    "fsl-sage": (
        planned(
            FSLSAGE, upload_every=5, align_every=2, align_epochs=1, buffer_size=10, batch_size=4
        ),
        5,
        (64.8 + 8) + SERVER_FORWARD + 4.8 + 9.48 + 0.625 + 5 + 2.5,
    ),
    # 3 uploads: 512 bits, 8 rows each; segments and auxiliary models of 480 bits up and broadcast
    "cse-fsl": (
        planned(CSEFSL, upload_every=2),
        5,
        (64.8 + 24) + 3 * (SERVER_FORWARD + 4.8) + 7.5 + 3.75,
    ),
    # the auxiliary models stay where they are
    "cse-fsl, not averaged": (
        planned(CSEFSL, upload_every=2, average_auxiliary=False),
        5,
        (64.8 + 24) + 3 * (SERVER_FORWARD + 4.8) + 5 + 2.5,
    ),
    # client segments are averaged where the options say so
    "psl, averaged": (planned(PSL, client_strategy=FedAvg()), 1, 31.2 + 5 + 2.5),
    "epsl, averaged": (
        planned(EPSL, client_strategy=FedAvg()),
        1,
        UP + SERVER_FORWARD + 1.8 + 3.8 + 2 + (2 + 8) + 5 + 2.5,
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_rounds_by_hand(name, tiny_profile, linked_fleet):
    method, steps, seconds = BY_HAND[name]
    problem = Problem(linked_fleet, tiny_profile, method, Training(batch_size=4, steps=steps))
    phases, rates = problem.phases(tiny_profile.places[0]), link_rates(linked_fleet)
    assert round_seconds(phases, linked_fleet, rates) == pytest.approx(seconds)
    breakdown = stage_breakdown(phases, linked_fleet, rates)
    assert sum(breakdown.values()) == pytest.approx(seconds)
    found = spans(phases, linked_fleet, rates)
    assert max(span.end_s for span in found) == pytest.approx(seconds)
    if not problem.in_turn:
        assert RoundTerms.of(phases, linked_fleet).seconds(rates) == pytest.approx(seconds)


def test_devices_go_on_from_step_to_step_without_each_other(tiny_profile):
    """Device 0 has 4 s forward and 8 s backward, device 1 8 s up and 4 s down."""
    fleet = Fleet(
        devices=(
            Device(name="0", compute_flops=100.0, uplink_bps=1e12, downlink_bps=1e12),
            Device(name="1", compute_flops=1e12, uplink_bps=64.0, downlink_bps=128.0),
        ),
        server=Server(compute_flops=1000.0),
    )
    problem = Problem(fleet, tiny_profile, planned(PSL), Training(batch_size=4, steps=2))
    phases = problem.phases(tiny_profile.places[0])
    assert round_seconds(phases, fleet, link_rates(fleet)) == pytest.approx(
        8 + 2 * (2.4 + 4.8) + 12 + 8
    )


@pytest.mark.parametrize("steps", [1, 2])
def test_a_segment_goes_up_while_another_device_still_computes(tiny_profile, steps):
    """Device 0 has 4 s forward and 8 s backward; device 1 8 s up, 4 s down, its segment 5 s up."""
    fleet = Fleet(
        devices=(
            Device(name="0", compute_flops=100.0, uplink_bps=1e12, downlink_bps=1e12),
            Device(name="1", compute_flops=1e12, uplink_bps=64.0, downlink_bps=128.0),
        ),
        server=Server(compute_flops=1000.0),
    )
    problem = Problem(fleet, tiny_profile, planned(SplitFedV1), Training(batch_size=4, steps=steps))
    phases, rates = problem.phases(tiny_profile.places[0]), link_rates(fleet)
    expected = pytest.approx(8 + steps * (2.4 + 4.8) + (steps - 1) * 12 + (4 + 5) + 2.5)
    assert round_seconds(phases, fleet, rates) == expected
    assert RoundTerms.of(phases, fleet).seconds(rates) == expected
    at = {(span.actor, span.stage): span.start_s for span in spans(phases, fleet, rates)}
    assert at["1", "aggregation up"] < at["0", "aggregation up"]


def test_phases_without_waiting_are_chained_where_devices_are_by_themselves():
    think = Phase((Stage("think", Where.DEVICE, 1),), 3)
    send = Phase((Stage("send", Where.UPLINK, 2),), 2, waits=False)
    serve = Phase((Stage("serve", Where.SERVER, 3),))
    turns = replace(think, in_turn=True)

    class Stranger(PSL):
        @classmethod
        def phases(cls, work, **arguments):
            return (think, send, serve, send, turns, send)

    both = Phase((*think.stages, *send.stages))
    found = planned(Stranger).phases(Work(None, None, 2, Training()))
    assert found == (
        replace(think, repeat=2), both, replace(send, repeat=1), serve, send, turns, send,
    )  # fmt: skip


def test_power_control_knows_at_most_two_deadlines(tiny_profile, linked_fleet):
    problem = Problem(
        linked_fleet, tiny_profile, planned(SplitFedV1), Training(batch_size=4, steps=3)
    )
    terms = RoundTerms.of(problem.phases(tiny_profile.places[0]), linked_fleet)
    steps, segments = terms.deadlines(link_rates(linked_fleet))
    # 512 bits three times, after 4 s down, 8 s backward and 4 s forward; 320 bits once
    assert (steps.weight, steps.bits, steps.fixed_s[0]) == (3.0, 512.0, 16.0)
    assert (segments.weight, segments.bits) == (1.0, 320.0)
    assert segments.fixed_s == pytest.approx([4 + 8, 2 + 4])  # it follows a backward pass


def test_more_deadlines_are_taken_for_two(linked_fleet):
    """512 bits three times; 96 bits once, 320 bits after 2 s (device 0) and 1 s, three times."""
    phases = [
        Phase((Stage("smashed data", Where.UPLINK, 512),), 3),
        Phase((Stage("segment", Where.UPLINK, 96),)),
        Phase((Stage("think", Where.DEVICE, 200), Stage("labels", Where.UPLINK, 320)), 3),
    ]
    deadlines = RoundTerms.of(phases, linked_fleet).deadlines(link_rates(linked_fleet))
    assert [(one.weight, one.bits) for one in deadlines] == [(3.0, 512.0), (4.0, 264.0)]
    assert deadlines[1].fixed_s == pytest.approx([1.5, 0.75])


def test_stages_by_hand(tiny_profile, linked_fleet):
    problem = Problem(linked_fleet, tiny_profile, planned(EPSL, phi=0.5), Training(batch_size=4))
    phases = problem.phases(tiny_profile.places[0])
    assert stage_breakdown(phases, linked_fleet, link_rates(linked_fleet)) == pytest.approx(
        {
            "client forward": 4.0,
            "uplink": 8.0,
            "server forward": 4.2,
            "server backward": 3.8,
            "broadcast": 2.0,
            "unicast": 2.0,
            "client backward": 8.0,
        }
    )


def test_chains_by_hand(tiny_profile, linked_fleet):
    problem = Problem(linked_fleet, tiny_profile, planned(PSL), Training(batch_size=4))
    terms = RoundTerms.of(problem.phases(tiny_profile.places[0]), linked_fleet)
    rates = link_rates(linked_fleet)
    chains = terms.chain_seconds(rates.uplink_bps, rates.downlink_bps)
    assert chains == pytest.approx([31.2, 2 + 4 + 2.4 + 4.8 + 2 + 4])


def test_who_does_what_when(tiny_profile, linked_fleet):
    problem = Problem(linked_fleet, tiny_profile, planned(PSL), Training(batch_size=4))
    phases = problem.phases(tiny_profile.places[0])
    found = spans(phases, linked_fleet, link_rates(linked_fleet))
    times = {(span.actor, span.stage): (span.start_s, span.end_s) for span in found}
    assert times["1", "uplink"] == pytest.approx((2.0, 6.0))
    assert times[SERVER, "server forward"] == pytest.approx((12.0, 14.4))
    assert times["1", "client backward"] == pytest.approx((21.2, 25.2))


def test_the_auxiliary_model_is_the_strategy_s_default(resnet18):
    place = resnet18.place("layer2")
    work = Work(resnet18, place, 5, Training())
    auxiliary = linear(place.activation_shape, 7)
    row = torch.empty(place.activation_shape, device="meta")
    assert work.auxiliary_flops == 3 * forward_flops(auxiliary, row)
    assert work.auxiliary_bits == 32 * sum(p.numel() for p in auxiliary.parameters())


@pytest.mark.parametrize(
    ("phi", "rows", "expected"), [(0.0, 64, 0), (0.5, 63, 32), (0.1, 30, 3), (1.0, 64, 64)]
)
def test_aggregated_rows(phi, rows, expected, resnet18):
    work = Work(resnet18, resnet18.place("layer2"), 5, Training(batch_size=rows))
    amounts = {
        stage.name: stage.amount
        for phase in planned(EPSL, phi=phi).phases(work)
        for stage in phase.stages
    }
    assert amounts["broadcast"] == expected * work.gradient_bits
    assert amounts["unicast"] == (rows - expected) * work.gradient_bits


@pytest.mark.parametrize("method", [EPSL, SequentialSL])
def test_what_is_shared_goes_up_and_has_no_gradient(method, resnet18):
    """100 bytes of a mask beside 4 · 64 · 16 · 16 bytes of smashed data."""
    place = replace(resnet18.place("layer1"), shared_bytes=100)
    work = Work(resnet18, place, 5, Training(batch_size=2))
    arguments = {"phi": 0.0} if method is EPSL else {}
    amounts = {
        stage.name: stage.amount
        for phase in planned(method, **arguments).phases(work)
        for stage in phase.stages
    }
    assert amounts["uplink"] == 8 * 2 * (4 * 64 * 16 * 16 + 100)
    assert amounts["unicast"] == 8 * 2 * 4 * 64 * 16 * 16


def test_what_is_no_training_is_refused():
    with pytest.raises(ConfigError, match="batch_size is 0, expected at least 1"):
        Training(batch_size=0)
