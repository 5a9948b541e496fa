"""The planner and the clock know U-shaped splits: numbers by hand."""

import pytest
from reference import make_parts, plain_net

from flsplit import LocalGrid, client_app
from flsplit.cut import CutError
from flsplit.strategies import PSL, SequentialSL
from flsplit.wireless.phases import Training, Where, Work
from flsplit.wireless.profile import profile_model


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


def test_a_second_cut_has_places_before_it():
    profile = profile_model(plain_net(), (8,))
    with pytest.raises(CutError, match="lies before the second cut 'front'"):
        profile.cut_twice("front")
