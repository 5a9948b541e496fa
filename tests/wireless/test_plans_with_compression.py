"""Bytes of a plan with compression are those that a run on a LocalGrid counts."""

import json

import pytest
import torch
from reference import make_parts, plain_net
from typer.testing import CliRunner

from flsplit import LocalGrid, client_app
from flsplit.cli import app as command
from flsplit.client_parts import Difference, HalfPrecision, Int8, LabelNoise, LowRank, TopK
from flsplit.strategies import CSEFSL, EPSL, PSL, SFLGA, SequentialSL
from flsplit.wireless.phases import Training, Where, Work
from flsplit.wireless.profile import profile_model

CLIENTS, ROWS, STEPS = 2, 4, 3
UP, DOWN = ("activations-up", "output-gradients-up"), ("outputs-down", "gradients-down-unicast")
OTHERS = {"hand over up", "hand over down", "aggregation up", "aggregation down"}
EVERYWHERE = [
    Int8(),
    TopK(0.3, "cut-gradient"),
    LowRank(2, "outputs"),
    HalfPrecision("output-gradient"),
]


def amounts(strategy, cut):
    profile = profile_model(plain_net(), (8,))
    if "," in cut:
        profile = profile.cut_twice("middle")
    training = Training(batch_size=ROWS, steps=STEPS)
    work = Work(profile, profile.place(cut), CLIENTS, training)
    sent = dict.fromkeys((Where.UPLINK, Where.DOWNLINK, Where.BROADCAST), 0.0)
    for phase in strategy.planned().phases(work):
        for stage in phase.stages:
            if stage.where in sent and stage.name not in OTHERS:
                devices = 1 if stage.where is Where.BROADCAST else CLIENTS
                sent[stage.where] += phase.repeat * devices * stage.amount / 8
    return sent


@pytest.mark.parametrize(
    ("cls", "parts", "options"),
    [
        (PSL, [], {}),
        (PSL, [Int8(), HalfPrecision("cut-gradient")], {}),
        (PSL, [LowRank(3), TopK(0.2, "cut-gradient")], {}),
        (PSL, [Difference(), Int8("cut-gradient")], {}),
        (PSL, EVERYWHERE, {"cut": "front,middle"}),
        (SequentialSL, EVERYWHERE, {"cut": "front,middle"}),
        (EPSL, [TopK(0.3)], {"phi": 0.5}),
        (EPSL, [Int8("cut-gradient")], {"phi": 0.5}),
        (SFLGA, [LabelNoise(1.0)], {}),
        (CSEFSL, [Int8()], {"upload_every": 1}),
    ],
)  # fmt: skip
def test_bytes_are_those_of_a_run(cls, parts, options):
    options = {"cut": "front"} | options
    cut = options["cut"]
    data = make_parts([ROWS * STEPS] * CLIENTS)
    app = client_app(
        model=plain_net, cut=cut, device="cpu", data=lambda c: data[c.node_config["partition-id"]]
    )
    strategy = cls(
        model=plain_net(), device="cpu", batch_size=ROWS, local_steps=STEPS,
        client_parts=parts, fraction_evaluate=0.0, **options,
    )  # fmt: skip
    grid = LocalGrid(app, CLIENTS, progress=False)
    result = strategy.start(grid, plain_net().state_dict(), 1)
    counted = result.history[0].traffic.logical
    planned = amounts(strategy, cut)
    assert planned[Where.UPLINK] == pytest.approx(sum(counted[one] for one in UP), rel=1e-12)
    assert planned[Where.DOWNLINK] == pytest.approx(sum(counted[one] for one in DOWN), rel=1e-12)
    assert planned[Where.BROADCAST] == pytest.approx(counted["gradients-down-broadcast"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "part", [Int8(), HalfPrecision(dtype="bfloat16"), TopK(0.13), LowRank(3), Difference()]
)
def test_bytes_of_a_batch_are_those_of_its_pieces(part, dtype):
    for rows, shape in ((1, (5,)), (2, (3, 7)), (6, (2, 2, 2))):
        tensor = torch.randn(rows, *shape).to(dtype)
        pieces = part.pack(tensor, {}, torch.arange(rows)).pieces.values()
        assert part.nbytes(rows, tensor[0].numel(), dtype) == sum(one.nbytes for one in pieces)


def test_the_command_plans_with_what_is_sent(tmp_path):
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(
        '[server]\ncompute = "1 GFLOP/s"\n[[devices]]\nname = "0"\ncompute = "1 GFLOP/s"\n'
        'uplink = "8 kbit/s"\ndownlink = "8 kbit/s"\n'
    )
    plain = ["plan", str(fleet), "--model", "reference:plain_net", "--input", "8"]
    found = {}
    for args in ("{}", '{client-parts = [{name = "half"}]}'):
        more = ["--strategy", "psl", "--batch-size", "100", "--strategy-args", args, "--json"]
        result = CliRunner().invoke(command, [*plain, *more])
        assert result.exit_code == 0, result.output
        stages = json.loads(result.stdout)["stages_s"]
        found[args] = stages["uplink"], stages["unicast"]
    (up, down), (half, whole) = found.values()
    assert (half, whole) == (up / 2, down)
