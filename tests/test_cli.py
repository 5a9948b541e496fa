import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn
from typer.testing import CliRunner

from flsplit.cli import app

FLEET = Path(__file__).resolve().parents[1] / "docs" / "fleet.toml"
MODEL = ["--model", "resnet18", "--classes", "7", "--input", "3x64x64"]
EPSL = [*MODEL, "--strategy", "epsl"]


def small_model(num_classes=3):
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, num_classes))


def token_model(num_classes=3):
    return nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(28, num_classes))


def nothing():
    return 5


@pytest.fixture
def flsplit():
    def call(*arguments, code=0):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == code, result.output
        return result

    return call


def test_profile(flsplit):
    lines = flsplit("profile", "resnet18", "--classes", 7, "--input", "3x64x64").stdout.splitlines()
    assert lines[2].split()[:2] == ["conv1", "9,536"]
    assert lines[-1].split()[:3] == ["fc", "11,180,103", "296.099"]


def test_the_package_is_the_command():
    command = [sys.executable, "-m", "flsplit", "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Usage: flsplit [OPTIONS] COMMAND" in said


def test_profile_as_json(flsplit):
    output = flsplit("profile", "resnet18", "--classes", 7, "--input", "3x64x64", "--json").stdout
    rows = json.loads(output)
    assert [row["cut"] for row in rows][:3] == ["conv1", "maxpool", "layer1.0"]
    assert rows[5]["cut"] == "layer2.1"
    assert rows[5]["params"] == 683_072
    assert rows[5]["flops_forward"] == 161_873_920
    assert rows[5]["activation_elements"] == 8_192
    assert rows[5]["gradient_bytes"] == 4 * 8_192


def test_profile_of_a_function(flsplit, tmp_path):
    picture = tmp_path / "profile.png"
    output = flsplit(
        "profile", "test_cli:small_model", "--input", 4, "--classes", 2, "--all", "--measure",
        "--json", "--picture", picture,
    ).stdout  # fmt: skip
    rows = json.loads(output)
    assert [row["cut"] for row in rows] == ["0", "1", "2", "3"]
    assert rows[-1]["activation_elements"] == 2
    assert all(row["forward_s"] > 0 for row in rows)
    assert picture.stat().st_size > 0


def test_plan(flsplit, tmp_path):
    output = flsplit(
        "plan", FLEET, *EPSL, "--strategy-args", "{phi = 0.5}", "--picture", tmp_path / "a.png"
    ).stdout
    assert "cut after " in output
    assert "server backward" in output
    assert "random subchannels" in output
    table = "{phi = 0.5, batch-size = 64, local-steps = 1}"
    assert f"strategy = \"epsl\"\nstrategy-args = '{table}'" in output
    assert (tmp_path / "a.png").stat().st_size > 0


@pytest.mark.parametrize("strategy", ["psl", "sequential-sl", "fsl-sage"])
def test_plan_as_json(flsplit, strategy):
    output = flsplit("plan", FLEET, *MODEL, "--strategy", strategy, "--json").stdout
    plan = json.loads(output)
    assert sum(plan["stages_s"].values()) == pytest.approx(plan["round_s"])
    assert all(seconds >= plan["round_s"] for seconds in plan["ablations_s"].values())
    assert len(plan["devices"]) == 5
    if plan["cut"] is not None:
        assert plan["cuts_s"][plan["cut"]] == pytest.approx(plan["round_s"])


def test_plan_says_which_cuts_are_excluded(flsplit, tmp_path):
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(FLEET.read_text().replace("2 GiB", "80 MB"))
    output = flsplit("plan", fleet, *EPSL).stdout
    assert "excluded: layer2.0 needs" in output


def test_plan_takes_sizes_from_either_place(flsplit):
    arguments = "{batch-size = 3, local-steps = 2}"
    for more in ((), ("--batch-size", 3, "--steps", 2)):
        output = flsplit("plan", FLEET, *EPSL, "--strategy-args", arguments, *more, "--json").stdout
        plan = json.loads(output)
        assert (plan["batch_size"], plan["steps"]) == (3, 2)


def test_plan_for_50_devices(flsplit, tmp_path):
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(
        FLEET.read_text().replace("count = 5", "count = 50").replace("= 20\n", "= 200\n")
    )
    plan = json.loads(flsplit("plan", fleet, *EPSL, "--json").stdout)
    assert len(plan["devices"]) == 50


def test_samples_may_be_indices(flsplit):
    arguments = ("test_cli:token_model", "--input", "7:int64", "--all", "--measure")
    places = json.loads(flsplit("profile", *arguments, "--json").stdout)

    sizes = [(place["params"], place["activation_elements"]) for place in places]
    assert sizes == [(36, 28), (36, 28), (36 + 28 * 3 + 3, 3)]
    tokens = ["--model", "test_cli:token_model", "--input", "7:int64", "--strategy", "psl"]
    plan = flsplit("plan", FLEET, *tokens).stdout
    assert "cut after" in plan


def masked_model():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

        def forward(self, ids, mask):
            weights = mask / mask.sum().item() if mask.any() else mask
            return {"logits": self.head((self.embed(ids) * weights[..., None]).sum(1))}

    return Masked()


@pytest.mark.parametrize("inputs", ["ids=7:int64,mask=7", "7:int64,7"])
def test_inputs_may_be_several(flsplit, inputs):
    """The mask crosses with the embedding of 7 words in 4 numbers, and 2 numbers come out."""
    arguments = ("test_cli:masked_model", "--input", inputs, "--share", "mask", "--measure")
    places = json.loads(flsplit("profile", *arguments, "--json").stdout)
    sizes = [(one["activation_bytes"], one["gradient_bytes"]) for one in places]
    assert sizes == [(4 * 7 * 4 + 4 * 7, 4 * 7 * 4), (4 * 2, 4 * 2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["profile", "test_cli:masked_model", "--input", "ids=7:int64,7"], "a name of its own"),
        (["profile", "test_cli:masked_model", "--input", "7:int64,7"], "inputs with share=(…)"),
        (["profile", "resnet18", "--input", "3:number"], "'number' is no dtype of torch"),
        (["profile", "resnet19"], "torchvision has no model 'resnet19'"),
        (["profile", "resnet18", "--input", "big"], "input 'big' is no shape"),
        (["profile", "no_such_module:f"], "can't be imported"),
        (["profile", "test_cli:nothing"], "returned int, expected a torch.nn.Module"),
        (["profile", "test_cli:small_model", "--input", "5"], "can't be profiled"),
        (["plan", "none.toml", *EPSL], "none.toml can't be read"),
        (["plan", FLEET, *MODEL, "--strategy", "gaps"], "there is no strategy 'gaps'"),
        (["plan", FLEET, *EPSL, "--strategy-args", "{phi = 2}"], "phi is 2, expected a finite"),
        (
            ["plan", FLEET, *MODEL, "--strategy", "psl", "--strategy-args", "{phi = 0.5}"],
            "strategy 'psl' has no argument 'phi'",
        ),
        (["plan", FLEET, *EPSL, "--batch-size", "0"], "batch_size is 0"),
        (
            ["plan", FLEET, *EPSL, "--batch-size", "10", "--strategy-args", "{batch-size = 3}"],
            "--batch-size is 10, but strategy-args say 3",
        ),
        (
            ["plan", FLEET, *EPSL, "--steps", "1", "--strategy-args", "{local_steps = 2}"],
            "--steps is 1, but strategy-args say 2",
        ),
        (
            ["plan", FLEET, *MODEL, "--strategy", "fedavg", "--second-cut", "layer4"],
            "--second-cut is 'layer4', but fedavg cuts nothing",
        ),
        (
            ["plan", FLEET, *EPSL, "--strategy-args", '{cut = "layer1"}'],
            "strategy-args have a cut, but a plan chooses it",
        ),
    ],
)
def test_bad_input(flsplit, arguments, message):
    result = flsplit(*arguments, code=1)
    assert message in result.stderr
    assert "Traceback" not in result.output
