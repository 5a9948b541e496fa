"""What a plan says, on the tiny model."""

import pytest
from torch import nn

from flsplit.strategies import make_strategy
from flsplit.wireless import Problem, Training, make_plan, method_of
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
