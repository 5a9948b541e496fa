"""What a clock is told, against rounds worked out by hand as in test_latency.

A row costs device 0 1 s forward and 2 s backward, and 2 s up and 1 s down; device 1 half of that.
A row costs the server 0.3 s forward, and 0.6 s backward of which 0.1 s for the last layer.
"""

import pytest

from flsplit.account.clock import Errand, Exchange, Leg
from flsplit.errors import ConfigError
from flsplit.wireless.fleet_clock import Costs, FleetClock
from flsplit.wireless.rates import link_rates


@pytest.fixture
def make(linked_fleet, tiny_profile):
    def clock(**options):
        costs = Costs(tiny_profile.places[0], tiny_profile.last_layer_flops_backward, lambda: 100)
        return FleetClock(linked_fleet, link_rates(linked_fleet), costs, **options)

    return clock


def ask(clock, *legs, down=0, shared=0, started=0.0, names=("0", "1"), **order):
    errands = {name: Errand(down, legs) for name in names}
    clock.exchanged(Exchange(errands, shared, **order), started)


def step(clock, uploads, rows, backward_rows, started=0.0):
    """Tell of a step in which all rows go forward and through the last layer."""
    clock.stepped(
        uploads,
        forward_rows=rows,
        backward_rows=backward_rows,
        logit_rows=rows,
        started=started,
    )


def leg(rows, **more):
    return Leg(forward_rows=rows, up_bytes=16 * rows, step=0, **more)


def test_a_parallel_step(make):
    clock = make()
    ask(clock, leg(4))  # device 0: 4 + 8
    step(clock, [("0", 0), ("1", 0)], 8, 8)  # 8 rows of 0.9
    ask(clock, Leg(backward_rows=4), down=64)  # 4 + 8
    assert clock.end_round() == pytest.approx(31.2)
    assert clock.end_round() == 0.0


def test_a_step_with_aggregated_rows(make):
    clock = make()
    ask(clock, leg(4))
    step(clock, [("0", 0), ("1", 0)], 8, 6)  # 8 rows of 0.3 + 0.1, 6 of 0.5
    ask(clock, Leg(backward_rows=4), down=32, shared=32)  # 2 rows for all, 2 for each
    assert clock.end_round() == pytest.approx(12 + 2.4 + 3.8 + 2 + (2 + 8))


def test_a_step_in_two_parts(make):
    """All rows forward and through the last layer, then 6 again and on to the cut."""
    clock, whole = make(), make()
    for one in (clock, whole):
        ask(one, leg(4))
    uploads = [("0", 0), ("1", 0)]
    clock.stepped(uploads, forward_rows=8, backward_rows=0, logit_rows=8, started=0.0)
    clock.stepped(uploads, forward_rows=6, backward_rows=6, logit_rows=0, started=0.0)
    whole.stepped(uploads, forward_rows=14, backward_rows=6, logit_rows=8, started=0.0)
    assert clock.end_round() == pytest.approx(12 + 14 * 0.3 + 8 * 0.1 + 6 * 0.5)
    assert whole.end_round() == pytest.approx(12 + 14 * 0.3 + 8 * 0.1 + 6 * 0.5)


def test_turns(make):
    clock = make()
    for name in ("0", "1"):
        ask(clock, leg(4), names=[name])
        step(clock, [(name, 0)], 4, 4)
        ask(clock, Leg(backward_rows=4), down=64, names=[name])
    assert clock.end_round() == pytest.approx(27.6 + 15.6)


def local_leg(**upload):
    return Leg(forward_rows=1, backward_rows=1, auxiliary_rows=1, **upload)


def test_clients_that_do_not_wait(make):
    """A local step is 100 + 200 + 300 FLOPs: 6 and 3 s. The server has 0.9 s for each upload."""
    clock = make()
    order = {"before_server": False}
    ask(clock, local_leg(up_bytes=16, step=0), local_leg(), down=32, **order)  # 2+6+2+6, half
    step(clock, [("0", 0)], 1, 1)  # it came after 10 s
    step(clock, [("1", 0)], 1, 1)
    ask(clock, local_leg(), Leg(up_bytes=40), after_server=False, **order)  # 6 + 5
    assert clock.end_round() == pytest.approx(16 + 11)


def test_the_server_may_be_the_last(make):
    clock = make()
    ask(clock, local_leg(up_bytes=16, step=0), before_server=False)
    step(clock, [("0", 0)], 100, 100)
    assert clock.end_round() == pytest.approx(6 + 2 + 90)


def test_in_chunks_or_at_once_is_the_same_to_the_bit(make):
    chunked, whole = make(), make()
    legs = [local_leg(up_bytes=15, step=0), local_leg(), local_leg(up_bytes=17, step=2)]
    ask(whole, *legs, down=7, before_server=False)
    ask(chunked, legs[0], down=7, before_server=False)
    for one in legs[1:]:
        ask(chunked, one, before_server=False, after_server=False)
    for clock in (whole, chunked):
        step(clock, [("0", 0)], 3, 3)
        step(clock, [("0", 2)], 30, 30)
    assert whole.end_round() == chunked.end_round()


def test_flops_by_hand(tiny_profile):
    costs = Costs(tiny_profile.places[0], tiny_profile.last_layer_flops_backward, lambda: 7)
    work = Leg(forward_rows=2, backward_rows=3, auxiliary_rows=4)
    assert costs.leg_flops(work) == 2 * 100 + 3 * 200 + 4 * 3 * 7
    assert costs.step_flops(8, 6, 8) == 8 * 300 + 8 * 100 + 6 * 500
    assert costs.step_flops(14, 6, 8) == 14 * 300 + 8 * 100 + 6 * 500
    assert costs.alignment_flops(10, 2) == 10 * (300 + 600 + 2 * 2 * 3 * 7)


def test_an_alignment(make):
    clock = make()
    clock.aligned(10, 2, started=0.0)  # 10 rows of 300 + 600 + 2 * 2 * 300 FLOPs
    assert clock.end_round() == pytest.approx(21.0)


def test_a_client_that_is_no_device_is_refused(make):
    with pytest.raises(ConfigError, match="client '9' takes part, but the fleet has no device of"):
        ask(make(), names=["9"])


class Times:
    """A real time that passes only where somebody waits or the test says so."""

    def __init__(self):
        self.now = 100.0
        self.waits = []

    def wait(self, seconds):
        self.waits.append(seconds)
        self.now += seconds


def test_what_is_played_overlaps_and_is_not_played_twice(make):
    times = Times()
    clock = make(wait=times.wait, now=lambda: times.now)
    times.now += 2.0  # what the exchange really took
    ask(clock, leg(4), started=100.0)
    assert times.waits == [pytest.approx(10.0)]  # the slower of two at the same time, less 2 s
    started = times.now
    times.now += 7.3  # longer than the server of the fleet: 7.2 s
    step(clock, [("0", 0), ("1", 0)], 8, 8, started)
    assert len(times.waits) == 1
    started = times.now
    ask(clock, Leg(backward_rows=4), down=64, started=started)
    assert times.waits[1:] == [pytest.approx(12.0)]
    assert clock.end_round() == pytest.approx(31.2)  # simulated time knows nothing of that
    assert times.now - 100.0 == pytest.approx(31.3)


def test_nothing_waits_unless_it_is_played(make):
    ask(make(now=lambda: pytest.fail("asked for the time")), leg(4))
