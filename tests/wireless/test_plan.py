"""What a plan says, on the tiny model."""

from dataclasses import replace

import numpy as np
import pytest
from torch import nn

from flsplit.strategies import make_strategy
from flsplit.wireless import Problem, Training, format_plan, make_plan, method_of
from flsplit.wireless.rounds import FSLSAGE, METHODS


@pytest.fixture
def plan_of(linked_fleet, tiny_profile):
    def make(method, fleet=linked_fleet, **training):
        return make_plan(Problem(fleet, tiny_profile, method, Training(**training)))

    return make


@pytest.mark.parametrize("name", [name for name in METHODS if name != "fedavg"])
def test_what_is_to_be_pasted_trains_as_planned(name, plan_of):
    plan = plan_of(method_of(name), batch_size=16, steps=3)
    strategy = make_strategy(
        name,
        plan.strategy_args,
        model=nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)),
        cut="0",
        batch_size=32,  # the quickstart passes its own key batch-size so
    )
    assert (strategy.options.batch_size, strategy.options.local_steps) == (16, 3)


def test_arguments_to_paste(plan_of):
    plan = plan_of(method_of("epsl", 0.25), batch_size=4)
    assert plan.strategy_args == "{phi = 0.25, batch-size = 4, local-steps = 1}"
    sage = FSLSAGE(upload_interval=2, align_interval=3, align_epochs=4, buffer_rows=64)
    assert plan_of(sage, steps=6).strategy_args == (
        '{auxiliary = "linear", upload-every = 2, align-every = 3, align-epochs = 4, '
        "buffer-size = 64, batch-size = 64, local-steps = 6}"
    )


def test_ablations_are_all_combinations(plan_of, drawn_fleet):
    plan = plan_of(method_of("psl"), drawn_fleet(3, 0), batch_size=4)
    assert list(plan.ablations) == [
        "random subchannels",
        "even power",
        "random subchannels, even power",
        "fixed cut (the middle)",
        "random cut",
        "random subchannels, random cut",
        "even power, random cut",
        "random everything",
    ]
    assert min(plan.ablations.values()) >= plan.solution.seconds * (1 - 1e-6)


def test_without_a_radio_only_the_cut_is_compared(plan_of):
    """Round after "first" 31.2 s; "second", the middle of two, takes device 0 longer."""
    plan = plan_of(method_of("psl"), batch_size=4)
    assert list(plan.ablations) == ["fixed cut (the middle)", "random cut"]
    assert plan.solution.seconds == pytest.approx(31.2)
    # forward 14 and backward 28 s on device 0, 256 bits up 4 s and down 2 s; the server 1.2 s
    assert plan.ablations["fixed cut (the middle)"] == pytest.approx(14 + 4 + 1.2 + 2 + 28)


def test_small_powers_are_not_printed_as_zero(plan_of, drawn_fleet):
    plan = plan_of(method_of("psl"), drawn_fleet(3, 0), batch_size=4)
    allocation = replace(plan.solution.allocation, power_w=np.full(12, 2.345e-6))
    text = format_plan(replace(plan, solution=replace(plan.solution, allocation=allocation)))
    share = [1e3 * 2.345e-6 * (allocation.owner == device).sum() for device in range(3)]
    assert all(f"{power:.4g} mW" in text for power in share)
    assert " 0 mW" not in text
    assert " 0.0 mW" not in text
