"""Recorded rounds of the tiny model against rounds worked out by hand in test_latency."""

import pytest

from flsplit.account import RoundEntry
from flsplit.errors import ConfigError
from flsplit.wireless import simulated_seconds, simulated_times
from flsplit.wireless.rates import link_rates


def entry(*, rows=8, steps=1, **logical):
    """Return a round of two clients with 4 rows of 16 bytes each."""
    found = RoundEntry(1, participants=["0", "1"], steps=steps, rows=rows)
    for category, nbytes in {"activations_up": 128, **logical}.items():
        found.traffic.add(category.replace("_", "-"), nbytes, 0)
    return found


def test_parallel_rounds(tiny_profile, linked_fleet):
    at = (linked_fleet, tiny_profile.places[0], link_rates(linked_fleet))
    psl = entry(gradients_down_unicast=128)
    assert simulated_seconds(psl, *at) == pytest.approx(31.2)
    assert simulated_times([psl, psl], *at) == pytest.approx([31.2, 62.4])
    # 6 rows back-propagated in 3.6 s, 2 rows broadcast and 2 for each client
    epsl = entry(rows=6, gradients_down_broadcast=32, gradients_down_unicast=64)
    assert simulated_seconds(epsl, *at) == pytest.approx(12 + 2.4 + 3.6 + 2 + (2 + 8))


def test_rounds_in_turn(tiny_profile, linked_fleet):
    recorded = entry(
        steps=2, gradients_down_unicast=128, client_segments_up=80, client_segments_down=80
    )
    at = (linked_fleet, tiny_profile.places[0], link_rates(linked_fleet))
    assert simulated_seconds(recorded, *at, in_turn=True) == pytest.approx(54.45)


def test_those_who_took_part_count(tiny_profile, linked_fleet):
    recorded = entry(rows=8)
    recorded.participants = ["1"]
    at = (linked_fleet, tiny_profile.places[0], link_rates(linked_fleet))
    # device 1: 8 rows, 4 + 8 s; then the server and 8 s of its backward pass
    assert simulated_seconds(recorded, *at) == pytest.approx(4 + 8 + 2.4 + 4.8 + 8)
    recorded.participants = []
    assert simulated_seconds(recorded, *at) == 0.0
    recorded.participants = ["9"]
    with pytest.raises(ConfigError, match="client '9' took part in round 1, but the fleet"):
        simulated_seconds(recorded, *at)
