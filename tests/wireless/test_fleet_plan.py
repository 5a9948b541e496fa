"""What a plan says, on the tiny model."""

import re
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
from torch import nn

from flsplit.errors import ConfigError
from flsplit.run import make_strategy, strategy_names
from flsplit.run.registry import plan_method
from flsplit.wireless import Problem, Server, Training, format_plan, make_plan
from flsplit.wireless.pictures import draw_round


@pytest.fixture
def plan_of(linked_fleet, tiny_profile):
    def make(name, args="{}", fleet=linked_fleet, **training):
        model = nn.Sequential(OrderedDict(first=nn.Linear(4, 8), second=nn.Linear(8, 3)))
        method, how = plan_method(name, args, model, tiny_profile, Training(**training))
        return make_plan(Problem(fleet, tiny_profile, method, how))

    return make


@pytest.mark.parametrize("name", strategy_names())
def test_what_is_to_be_pasted_trains_as_planned(name, plan_of):
    plan = plan_of(name, batch_size=16, steps=3)
    strategy = make_strategy(
        name,
        plan.strategy_args,
        model=nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)),
        cut="0",
        batch_size=32,  # the quickstart passes its own key batch-size so
    )
    assert (strategy.options.batch_size, strategy.options.local_steps) == (16, 3)


def test_arguments_to_paste(plan_of):
    plan = plan_of("epsl", "{phi = 0.25}", batch_size=4)
    assert plan.strategy_args == "{phi = 0.25, batch-size = 4, local-steps = 1}"
    given = (
        '{auxiliary = "linear", upload-every = 2, align-every = 3, align-epochs = 4, '
        "buffer-size = 64, "
    )
    plan = plan_of("fsl-sage", given + "local_steps = 6}")
    assert plan.strategy_args == given + "local-steps = 6, batch-size = 64}"
    parts = '{client-parts = ["clip", {name = "noise", sigma = 0.25}]'
    pasted = parts + ", batch-size = 64, local-steps = 1}"
    assert plan_of("psl", parts + "}").strategy_args == pasted
    assert plan_of("psl", pasted).strategy_args == pasted


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("gapls", "{}", "there is no strategy 'gapls'; did you mean 'gapsl'"),
        ("psl", "{phi = 0.5}", "strategy 'psl' has no argument 'phi'"),
        ("epsl", "{phi = 2}", "phi is 2, expected a finite number at least 0 and at most 1"),
        ("epsl", "phi = 2", "not TOML"),
        ("fsl-sage", "{buffer-size = 16}", "buffer_size is 16, smaller than a batch"),
        ("psl", "{local-steps = 0}", "steps is 0, expected at least 1"),
        ("fedavg", "{phi = 0.5}", "fedavg takes no strategy-args"),
    ],
)
def test_what_is_no_method_is_refused(name, args, message, plan_of):
    with pytest.raises(ConfigError, match=message):
        plan_of(name, args)


def test_notes(plan_of):
    second = '(server forward has the second pass of aggregation = "replay")'
    assert second in format_plan(plan_of("epsl"))
    assert second not in format_plan(plan_of("epsl", '{aggregation = "shared_delta"}'))
    assert second not in format_plan(plan_of("epsl", "{phi = 0.0}"))
    counted = "(auxiliary models are counted as linear ones)"
    assert counted in format_plan(plan_of("cse-fsl", '{auxiliary = "first-stage"}'))
    assert counted not in format_plan(plan_of("cse-fsl"))
    assert "there is no cut" in format_plan(plan_of("fedavg"))


def test_ablations_are_all_combinations(plan_of, drawn_fleet):
    plan = plan_of("psl", fleet=drawn_fleet(3, 0), batch_size=4)
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
    plan = plan_of("psl", batch_size=4)
    assert list(plan.ablations) == ["fixed cut (the middle)", "random cut"]
    assert plan.solution.seconds == pytest.approx(31.2)
    # forward 14 and backward 28 s on device 0, 256 bits up 4 s and down 2 s; the server 1.2 s
    assert plan.ablations["fixed cut (the middle)"] == pytest.approx(14 + 4 + 1.2 + 2 + 28)


def test_small_powers_are_not_printed_as_zero(plan_of, drawn_fleet):
    plan = plan_of("psl", fleet=drawn_fleet(3, 0), batch_size=4)
    allocation = replace(plan.solution.allocation, power_w=np.full(12, 2.345e-6))
    text = format_plan(replace(plan, solution=replace(plan.solution, allocation=allocation)))
    share = [1e3 * 2.345e-6 * (allocation.owner == device).sum() for device in range(3)]
    assert all(f"{power:.4g} mW" in text for power in share)
    assert " 0 mW" not in text
    assert " 0.0 mW" not in text


@pytest.mark.parametrize("steps", [1, 2])
def test_a_picture_of_one_step_says_so(steps, plan_of, tmp_path):
    path = draw_round(plan_of("splitfed-v1", batch_size=4, steps=steps), tmp_path / "round.svg")
    assert ("one step of 2" in path.read_text()) is (steps == 2)


def test_slow_links_and_short_rounds_can_be_read(plan_of, linked_fleet):
    text = format_plan(plan_of("psl", batch_size=4))
    assert "64.00 bit/s  128.00 bit/s" in text
    quick = [
        replace(one, compute_flops=1e9, uplink_bps=64e6, downlink_bps=64e6)
        for one in linked_fleet.devices
    ]
    fleet = replace(linked_fleet, devices=tuple(quick), server=Server(compute_flops=1e9))
    text = format_plan(plan_of("psl", fleet=fleet, batch_size=4))  # "second": 256 bits up, down
    assert re.search(r"uplink +4\.0000 µs", text)
    assert "64.00 Mbit/s" in text
