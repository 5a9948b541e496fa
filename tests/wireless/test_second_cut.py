"""The planner and the clock know U-shaped splits: numbers by hand."""

import numpy as np
import pytest
from planned_methods import planned
from reference import make_parts, plain_net

from flsplit import LocalGrid, client_app
from flsplit.cut import CutError
from flsplit.strategies import PSL, SequentialSL, SplitFedV1, SplitFedV2
from flsplit.wireless import Freedom, Optimiser, Problem, load_fleet, round_seconds
from flsplit.wireless.latency import RoundTerms, spans, stage_breakdown
from flsplit.wireless.phases import Training, Where, Work
from flsplit.wireless.profile import profile_model
from flsplit.wireless.rates import link_rates


def work():
    """front 8 -> 6, middle 6 -> 10, head 10 -> 3; a batch of 4, 2 steps, 3 devices."""
    profile = profile_model(plain_net(), (8,)).cut_twice("middle")
    place = profile.place("front,middle")
    return Work(profile, place, 3, Training(batch_size=4, steps=2))


def test_a_place_between_two_cuts():
    place = work().place
    assert place.client_params == (8 * 6 + 6) + (10 * 3 + 3)
    assert place.server_params == 6 * 10 + 10
    assert place.client_flops_forward == 2 * 8 * 6
    assert place.server_flops_forward == 2 * 6 * 10
    assert place.tail_flops_forward == 2 * 10 * 3
    assert (place.activation_elements, place.output_elements) == (6, 10)


@pytest.mark.parametrize("method", [PSL, SequentialSL])
def test_the_last_layers_come_between_the_servers_passes(method):
    stages = [stage for phase in method.phases(work()) for stage in phase.stages]
    names = [stage.name for stage in stages]
    at = names.index("server forward")
    assert names[at : at + 5] == [
        "server forward", "outputs", "last layers", "output gradients", "server backward",
    ]  # fmt: skip
    amounts = {stage.name: (stage.where, stage.amount) for stage in stages}
    assert amounts["outputs"] == (Where.DOWNLINK, 4 * 10 * 32)
    assert amounts["last layers"] == (Where.DEVICE, 4 * 3 * 2 * 10 * 3)
    assert amounts["output gradients"] == (Where.UPLINK, 4 * 10 * 32)


FLEET = """
[server]
compute = "1 kFLOP/s"

[[devices]]
name = "0"
compute = "100 FLOP/s"
uplink = "1 kbit/s"
downlink = "1 kbit/s"
"""


def test_the_clock_of_a_run_says_what_the_phases_say(tmp_path):
    """One device, one step of 4 rows: all it does is in turn."""
    (fleet := tmp_path / "fleet.toml").write_text(FLEET)
    (part,) = make_parts((4,))
    model = plain_net()
    app = client_app(model=plain_net, cut=("front", "middle"), data=lambda _: part, device="cpu")
    strategy = PSL(
        model=model, cut=("front", "middle"), batch_size=4, device="cpu", fleet=fleet,
        fraction_evaluate=0.0,
    )  # fmt: skip
    result = strategy.start(LocalGrid(app, 1, progress=False), model.state_dict(), 2)
    device = 4 * (3 * 96 + 3 * 60) / 100
    server = 4 * 3 * 120 / 1000
    links = 2 * 4 * (6 + 10) * 32 / 1000
    assert result.history[1].simulated_seconds == pytest.approx(device + server + links)


THREE = """
[server]
compute = "1 kFLOP/s"

[[devices]]
compute = "100 FLOP/s"
uplink = "1 kbit/s"
downlink = "2 kbit/s"

[[devices]]
count = 2
compute = "300 FLOP/s"
uplink = "500 bit/s"
downlink = "1 kbit/s"
"""


@pytest.mark.parametrize("method", [SplitFedV1, SplitFedV2])
def test_a_plan_is_the_clock_of_the_same_run(method, tmp_path):
    """V2 asks for the last layers of one device after the other, V1 for all at once."""
    (path := tmp_path / "fleet.toml").write_text(THREE)
    parts = make_parts((8, 8, 8))
    model = plain_net()
    app = client_app(
        model=plain_net, cut=("front", "middle"), device="cpu",
        data=lambda context: parts[int(context.node_config["partition-id"])],
    )  # fmt: skip
    strategy = method(
        model=model, cut=("front", "middle"), batch_size=4, local_steps=2, device="cpu",
        fleet=path, fraction_evaluate=0.0,
    )  # fmt: skip
    result = strategy.start(LocalGrid(app, 3, progress=False), model.state_dict(), 2)
    fleet = load_fleet(path)
    problem = Problem(fleet, work().profile, planned(method), work().training)
    phases, rates = problem.phases(work().place), link_rates(fleet)
    clock = pytest.approx(result.history[1].simulated_seconds)
    assert round_seconds(phases, fleet, rates) == clock
    assert sum(stage_breakdown(phases, fleet, rates).values()) == clock
    assert max(span.end_s for span in spans(phases, fleet, rates)) == clock
    assert RoundTerms.of(phases, fleet).seconds(rates) == clock


def test_subchannels_are_shared_where_only_the_last_layers_take_turns(drawn_fleet):
    problem = Problem(drawn_fleet(4, 0), work().profile, planned(SplitFedV2), work().training)
    assert problem.is_allocated
    optimiser = Optimiser(problem)
    best = optimiser.solve()
    assert best.allocation is not None
    phases = problem.phases(best.place)
    assert round_seconds(phases, problem.fleet, best.rates) == pytest.approx(best.seconds)
    assert (np.diff(best.history) <= 0).all()
    for worse in (Freedom(power=False), Freedom(subchannels=False)):
        assert best.seconds <= optimiser.solve(worse).seconds * (1 + 1e-9)


def test_a_second_cut_has_places_before_it():
    profile = profile_model(plain_net(), (8,))
    with pytest.raises(CutError, match="lies before the second cut 'front'"):
        profile.cut_twice("front")
