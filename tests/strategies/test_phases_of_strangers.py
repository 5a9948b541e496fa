"""Methods of another package, planned and timed by the phases that they say themselves."""

import json
import re
from dataclasses import replace

import pytest
from reference import CUT, fresh, make_parts, plain_net, run_split
from typer.testing import CliRunner

from flsplit.cli import app
from flsplit.run import make_strategy
from flsplit.strategies import PSL
from flsplit.wireless import Device, Fleet, Radio, Server
from tests.packages import installed

STRANGER = '''
from torch import nn

from flsplit.strategies import PSL
from flsplit.wireless.phases import parallel_steps, server_passes


class Cyclic(PSL):
    """The server works on all rows several times, and once more for the cut-layer gradients."""

    def __init__(self, server_epochs: int = 1, **options):
        super().__init__(**options)
        self.server_epochs = server_epochs

    def step(self, step):
        for _ in range(self.server_epochs):
            for rows in step.shuffled_rows(3):
                step.update(step.gradients(rows))
        step.reply(step.gradients().cut_gradients)

    @classmethod
    def phases(cls, work, *, server_epochs=1, **arguments):
        rows = (server_epochs + 1) * work.rows
        server = server_passes(work, forward_rows=rows, backward_rows=rows)
        steps = parallel_steps(work, server=server)
        return (*steps, *cls.aggregation_phases(work, **arguments))

    @classmethod
    def plan_note(cls, *, server_epochs=1, **arguments):
        return f"the server has {server_epochs} + 1 passes"

    @classmethod
    def device_memory_bytes(cls, work, **arguments):
        return 1000


class Alone(PSL):
    """Devices that are planned as if each had the band to itself."""

    @classmethod
    def phases(cls, work, **arguments):
        from dataclasses import replace

        return tuple(replace(phase, in_turn=True) for phase in super().phases(work))


def model(num_classes=2):
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, num_classes))
'''
ENTRY_POINTS = """
[flsplit.strategies]
cyclic = stranger_cycle:Cyclic
alone = stranger_cycle:Alone
"""
# A row takes a device 1 s forward (64 FLOPs) and 2 s backward, 1 s up (256 bits) and 2 s down, and
# the server 1 s forward and backward (32 and 64 FLOPs).
LINKS = """
[server]
compute = "96 FLOP/s"

[[devices]]
count = 2
compute = "64 FLOP/s"
memory = "1400 B"
uplink = "256 bit/s"
downlink = "128 bit/s"
"""
# As in test_fleet: a row of the plain net takes the server 1 s.
FLEET = Fleet(
    devices=tuple(
        Device(name=name, compute_flops=96.0, uplink_bps=256.0, downlink_bps=192.0)
        for name in ("0", "1")
    ),
    server=Server(compute_flops=540.0),
)


@pytest.fixture(autouse=True)
def stranger(tmp_path):
    with installed(tmp_path, "stranger_cycle", STRANGER, ENTRY_POINTS):
        yield


def plan(tmp_path, *arguments):
    (tmp_path / "fleet.toml").write_text(LINKS)
    fixed = ["plan", str(tmp_path / "fleet.toml"), "--model", "stranger_cycle:model"]
    result = CliRunner().invoke(app, [*fixed, "--input", "4", "--batch-size", "4", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_stranger_is_planned_by_its_own_phases(tmp_path):
    given = "{server-epochs = 2}"
    arguments = ["--strategy", "cyclic", "--strategy-args", given]
    found = json.loads(plan(tmp_path, *arguments, "--json"))
    assert found["strategy_args"] == "{server-epochs = 2, batch-size = 4, local-steps = 1}"
    assert found["stages_s"] == pytest.approx(
        {
            "client forward": 4.0,
            "uplink": 4.0,
            "server forward": 8.0,  # 3 passes over 8 rows
            "server backward": 16.0,
            "broadcast": 0.0,
            "unicast": 8.0,
            "client backward": 8.0,
        }
    )
    assert found["round_s"] == pytest.approx(48.0)
    # 40 parameters and their gradients, 4 rows of 4 inputs and, from the ReLU on, 8 outputs, 1000
    [excluded] = found["excluded_cuts"]
    assert (excluded["cut"], excluded["needed_bytes"]) == ("1", 2 * 160 + 4 * (16 + 32) + 1000)
    assert "(the server has 2 + 1 passes)" in plan(tmp_path, *arguments)


@pytest.mark.parametrize("answer", [None, [1], (1,)])
def test_phases_that_are_none_are_refused(answer, tmp_path, monkeypatch):
    monkeypatch.setattr(kind_of("cyclic"), "phases", classmethod(lambda cls, work, **_: answer))
    message = f"phases of cyclic are {re.escape(repr(answer))}, expected a tuple of Phase"
    with pytest.raises(AssertionError, match=message):
        plan(tmp_path, "--strategy", "cyclic")


def test_its_rounds_are_drawn(tmp_path):
    picture = tmp_path / "round.png"
    plan(tmp_path, "--strategy", "cyclic", "--picture", str(picture))
    assert picture.read_bytes()[:4] == b"\x89PNG"


def seconds(kind, fleet, **options):
    parts = make_parts((8, 8), plain_net)
    result = run_split(kind, plain_net, parts, fleet=fleet, fraction_evaluate=0.0, **options)
    return [entry.simulated_seconds for entry in result.history]


def kind_of(name):
    return type(make_strategy(name, model=fresh(plain_net), cut=CUT))


def test_its_passes_are_on_the_clock():
    """Two more passes of 1 s over 8 rows, in each of two steps."""
    plain = seconds(PSL, FLEET)
    found = seconds(kind_of("cyclic"), FLEET, server_epochs=2)
    assert found == pytest.approx([one + 2 * 2 * 8 for one in plain])


def test_its_phases_divide_the_band():
    devices = tuple(
        replace(device, distance_m=100.0 + index, power_w=1.0)
        for index, device in enumerate(FLEET.devices)
    )
    radio = Radio(num_subchannels=4, subchannel_hz=10.0, shadowing_db=0.0, fading=False)
    fleet = Fleet(devices=devices, server=FLEET.server, radio=radio)
    assert seconds(kind_of("alone"), fleet)[1] < seconds(PSL, fleet)[1] * 0.99
