from dataclasses import replace

import numpy as np
import pytest
from exact_assignment import exact
from planned_methods import planned

from flsplit.strategies import EPSL, PSL
from flsplit.wireless import Problem, Training
from flsplit.wireless.latency import RoundTerms
from flsplit.wireless.power import EVEN, WATER
from flsplit.wireless.subchannels import Cell, at_random, greedy, improved


def small(drawn_fleet, resnet18, seed, method=None, subchannels=7, devices=3):
    fleet = drawn_fleet(devices, seed, subchannels=subchannels)
    problem = Problem(fleet, resnet18, method or planned(PSL), Training())
    terms = RoundTerms.of(problem.phases(resnet18.place("layer2.1")), fleet)
    return Cell.of(fleet, WATER), terms


def test_chance_leaves_nobody_out():
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert set(at_random(5, 6, rng)) == set(range(5))


def test_greedy_by_hand(drawn_fleet, resnet18):
    """Without compute and with equal gains, everybody gets as many."""
    _, terms = small(drawn_fleet, resnet18, 0, subchannels=6)
    equal = Cell(np.ones((3, 6)), np.ones((3, 6)), np.ones(3), 1.0, EVEN)
    same = replace(terms, fixed_s=np.ones_like(terms.fixed_s))
    assert sorted(np.bincount(greedy(equal, same))) == [2, 2, 2]
    # a device that computes much longer than anything else takes gets all that others don't need
    late = np.zeros_like(terms.fixed_s)
    late[0, 1] = 1e12
    slow = replace(terms, fixed_s=late)
    assert np.bincount(greedy(equal, slow)).tolist() == [1, 4, 1]


def test_exact_is_the_best_of_all(drawn_fleet, resnet18):
    """Against a look at every assignment."""
    import itertools

    cell, terms = small(drawn_fleet, resnet18, 3, subchannels=5)
    every = (
        np.array(owner)
        for owner in itertools.product(range(3), repeat=5)
        if set(owner) == {0, 1, 2}
    )
    shortest = min(terms.seconds(cell.rates(owner)) for owner in every)
    assert terms.seconds(cell.rates(exact(cell, terms))) == pytest.approx(shortest, rel=1e-9)


def test_gap_of_the_greedy_assignment(drawn_fleet, resnet18):
    """On 20 small instances greedy is within 40 % of the optimum, improved within 5 %."""
    gaps, improved_gaps = [], []
    for seed in range(20):
        method = planned(EPSL, phi=0.5) if seed % 2 else planned(PSL)
        cell, terms = small(drawn_fleet, resnet18, seed, method)
        best = terms.seconds(cell.rates(exact(cell, terms)))
        first = greedy(cell, terms)
        gaps.append(terms.seconds(cell.rates(first)) / best - 1)
        second = improved(cell, terms, first)
        improved_gaps.append(terms.seconds(cell.rates(second)) / best - 1)
    print(f"greedy: mean {np.mean(gaps):.4f}, most {max(gaps):.4f}")
    print(f"improved: mean {np.mean(improved_gaps):.4f}, most {max(improved_gaps):.4f}")
    assert min(gaps + improved_gaps) > -1e-6
    assert max(gaps) < 0.4
    assert max(improved_gaps) < 0.05


def test_improving_many_subchannels_never_makes_it_worse(drawn_fleet, resnet18):
    cell, terms = small(drawn_fleet, resnet18, 0, subchannels=60, devices=15)
    first = greedy(cell, terms)
    second = improved(cell, terms, first)
    assert terms.seconds(cell.rates(second)) <= terms.seconds(cell.rates(first))
    assert set(second) == set(range(15))


def test_exact_refuses_many_subchannels(drawn_fleet, resnet18):
    cell, terms = small(drawn_fleet, resnet18, 0, subchannels=11)
    with pytest.raises(ValueError, match="11 subchannels are too many"):
        exact(cell, terms)
