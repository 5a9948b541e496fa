from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from planned_methods import planned

from flsplit.cut import CutError
from flsplit.strategies import CSEFSL, EPSL, FSLSAGE, PSL, SequentialSL, SplitFedV1
from flsplit.wireless import Freedom, Optimiser, Problem, Training, optimise, round_seconds
from flsplit.wireless.problem import Excluded
from flsplit.wireless.unsplit import FEDAVG

ABLATIONS = [
    Freedom(subchannels=False),
    Freedom(power=False),
    Freedom(subchannels=False, power=False),
    Freedom(cut="layer2.0"),
    Freedom(subchannels=False, power=False, cut="layer1.0"),
]


@pytest.mark.parametrize("seed", range(6))
def test_descent_never_goes_up_and_beats_every_ablation(seed, drawn_fleet, resnet18):
    """apps/planning/check.py does the same for 100 fleets and every fixed cut."""
    devices = int(np.random.default_rng(seed).integers(5, 10))
    fleet = drawn_fleet(devices, seed, total_power_w=5.0 if seed % 2 else 1e9)
    method = (planned(EPSL, phi=0.5), planned(PSL), planned(SplitFedV1))[seed % 3]
    problem = Problem(fleet, resnet18, method, Training())
    solution = optimise(problem)
    assert all(after <= before for before, after in pairwise(solution.history))
    assert solution.history[-1] == solution.seconds
    phases = problem.phases(solution.place)
    assert round_seconds(phases, fleet, solution.rates) == pytest.approx(solution.seconds)
    for freedom in ABLATIONS:
        assert solution.seconds <= optimise(problem, freedom, seed).seconds * (1 + 1e-6)


def test_a_solution_keeps_to_all_limits(drawn_fleet, resnet18):
    fleet = drawn_fleet(6, 0)
    solution = optimise(Problem(fleet, resnet18, planned(EPSL, phi=0.5), Training()))
    powers = solution.allocation.device_power_w(6)
    assert (powers <= fleet.power_w * (1 + 1e-9)).all()
    assert powers.sum() <= fleet.radio.total_power_w * (1 + 1e-9)
    assert set(solution.allocation.owner) == set(range(6))


@pytest.mark.parametrize("method", [planned(PSL), planned(SequentialSL)])
def test_the_cut_is_enumerated_where_nothing_else_is_chosen(method, linked_fleet, tiny_profile):
    problem = Problem(linked_fleet, tiny_profile, method, Training(batch_size=4))
    solution = optimise(problem)
    by_cut = {
        place.cut: round_seconds(problem.phases(place), linked_fleet, solution.rates)
        for place in tiny_profile.places
    }
    assert solution.allocation is None
    assert solution.seconds == min(by_cut.values()) == by_cut[solution.place.cut]


def test_whole_models_are_not_cut(drawn_fleet, resnet18):
    solution = optimise(Problem(drawn_fleet(5, 0), resnet18, FEDAVG, Training()))
    assert solution.place is resnet18.end


def test_cuts_that_exceed_a_device_s_memory(drawn_fleet, resnet18):
    fleet = drawn_fleet(5, 0)
    small = replace(fleet.devices[2], memory_bytes=70e6)
    fleet = replace(fleet, devices=(*fleet.devices[:2], small, *fleet.devices[3:]))
    problem = Problem(fleet, resnet18, planned(PSL), Training())
    # 64 samples keep 45.1 MB up to maxpool and 66.2 MB up to layer1.0, besides 0.7 MB of segment
    assert [place.cut for place in problem.places] == [
        "conv1",
        "bn1",
        "relu",
        "maxpool",
        "layer1.0",
    ]
    assert {one.devices for one in problem.excluded} == {("2",)}
    assert problem.excluded[0].text().endswith("MB, more than device 2 (70 MB) may use")
    assert optimise(problem).place in problem.places
    with pytest.raises(CutError, match=r"'layer2.0' exceeds a device's memory"):
        optimise(problem, Freedom(cut="layer2.0"))
    with pytest.raises(CutError, match="can't be cut after 'layer9'"):
        optimise(problem, Freedom(cut="layer9"))
    tiny = replace(small, memory_bytes=1e6)
    fleet = replace(fleet, devices=(tiny, *fleet.devices[3:]))
    with pytest.raises(
        CutError, match=r"no cut of resnet18 fits .* than device 2 \(1 MB\) may use"
    ):
        optimise(Problem(fleet, resnet18, planned(PSL), Training()))


def test_auxiliary_models_need_memory_too(linked_fleet, tiny_profile):
    """Cut after "first", a segment takes 2 * 40 bytes.

    FSL-SAGE's auxiliary model has 5 parameters and 4 samples of 16 bytes as its input: 84 bytes.
    """
    small = tuple(replace(device, memory_bytes=163.0) for device in linked_fleet.devices)
    fleet = replace(linked_fleet, devices=small)
    psl, sage, cse = (
        Problem(fleet, tiny_profile, method, Training(batch_size=4))
        for method in (planned(PSL), planned(FSLSAGE), planned(CSEFSL))
    )
    assert [one.place.cut for one in psl.excluded] == ["second"]
    assert [one.needed_bytes for one in sage.excluded] == [164, 2 * 120 + 4 * (3 + 4 * 2)]
    assert sage.excluded[0].text() == "needs 164 B, more than device 0 (163 B), 1 (163 B) may use"
    # there it is trained, so it has gradients
    assert [one.needed_bytes for one in cse.excluded] == [184, 2 * 120 + 4 * (3 * 2 + 4 * 2)]


def test_a_need_that_is_hardly_more_is_told_apart(tiny_profile):
    names = ("0", "1", "2", "3", "4")
    one = Excluded(tiny_profile.end, names, 20004, (20003.0,) * 5)
    assert one.text() == (
        "needs 20004 B, more than device 0 (20003 B), 1 (20003 B), 2 (20003 B) and 2 more may use"
    )


def test_one_optimiser_finds_what_new_ones_find(drawn_fleet, resnet18):
    problem = Problem(drawn_fleet(6, 1), resnet18, planned(EPSL, phi=0.5), Training())
    asked = [(freedom, seed) for freedom in [Freedom(), *ABLATIONS] for seed in (0, 1)]
    alone = [optimise(problem, *one).seconds for one in asked]

    for order in (asked, asked[::-1]):
        optimiser = Optimiser(problem)
        found = {one: optimiser.solve(*one).seconds for one in order}
        assert [found[one] for one in asked] == alone


def test_seeds_draw_other_subchannels(drawn_fleet, resnet18):
    optimiser = Optimiser(Problem(drawn_fleet(6, 1), resnet18, planned(EPSL, phi=0.5), Training()))
    drawn = Freedom(subchannels=False)

    assert optimiser.solve(drawn, 0).seconds != optimiser.solve(drawn, 1).seconds
