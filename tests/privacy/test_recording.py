"""What a recording holds, by hand; attacks that replay it; the command."""

import json

import pytest
import torch
from flwr.serverapp.strategy import FedAvg
from reference import (
    assert_bit_equal,
    epoch_batches,
    fresh,
    make_data,
    make_parts,
    plain_net,
    run_split,
    weights_of,
)
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from typer.testing import CliRunner

from flsplit.cli import app
from flsplit.client_parts import Clip, Noise
from flsplit.errors import ConfigError
from flsplit.privacy import (
    Record,
    attack_inputs,
    attack_labels,
    check_undefended,
    read_recording,
)
from flsplit.storage import StorageError
from flsplit.strategies import FSLSAGE, PSL, SequentialSL, SplitFedV2

PARTS = make_parts([12, 8])


def recorded(
    folder, cls=SplitFedV2, parts=PARTS, rounds=2, record=None, build=plain_net, **options
):
    options = {"callbacks": [Record(folder, **(record or {}))]} | options
    return run_split(cls, build, parts, rounds=rounds, **options)


def test_what_is_recorded_is_what_crossed(tmp_path):
    recorded(tmp_path, parts=PARTS[:1], rounds=1, record={"steps": 1})
    (step,) = read_recording(tmp_path).steps
    inputs, labels = PARTS[0].tensors
    rows = next(epoch_batches(12, "0", 4))[0]
    model = fresh(plain_net)
    smashed = model.front(inputs[rows]).detach().requires_grad_()
    functional.cross_entropy(model.head(model.middle(smashed)), labels[rows]).backward()
    assert (step.client, step.round, step.step) == ("0", 1, 0)
    assert torch.equal(step.smashed, smashed)
    assert torch.equal(step.gradient, smashed.grad)
    assert torch.equal(step.labels, labels[rows])


def test_nothing_that_is_recorded_changes_the_run(tmp_path):
    plain = recorded(tmp_path, callbacks=[])
    found = recorded(tmp_path)
    assert_bit_equal(weights_of(found.arrays), weights_of(plain.arrays))


def test_segments_that_are_handed_over_are_kept(tmp_path):
    result = recorded(tmp_path, PSL, share_client_segments=True, rounds=2)
    found = read_recording(tmp_path).segments
    for client, record in result.client_segments.items():
        assert_bit_equal(found[client], weights_of(record))


def test_it_is_bounded(tmp_path):
    recorded(tmp_path / "a", rounds=3, record={"steps": 2, "every": 2})
    steps = read_recording(tmp_path / "a").steps
    assert {(one.round, one.step) for one in steps} == {(1, 0), (1, 1), (2, 0), (2, 1)}
    # A step has 4 rows of 6 floats, twice, and 4 labels of 8 bytes.
    recorded(tmp_path / "b", rounds=3, record={"most_bytes": 3 * (4 * 6 * 4 * 2 + 4 * 8)})
    assert len(read_recording(tmp_path / "b").steps) == 3


def test_uploads_of_local_steps_are_recorded(tmp_path):
    recorded(tmp_path, FSLSAGE, upload_every=1)
    steps = read_recording(tmp_path).steps
    assert len([one for one in steps if one.client == "0"]) >= 3
    assert all(one.smashed.shape[1:] == (6,) and one.labels is not None for one in steps)


def test_another_run_does_not_write_between(tmp_path):
    recorded(tmp_path, rounds=1)
    with pytest.raises(ConfigError, match="holds a recording of another run"):
        recorded(tmp_path, rounds=1)


def test_attacks_on_a_recording(tmp_path):
    recorded(tmp_path, client_parts=[Noise(0.01)])
    recording = read_recording(tmp_path)
    assert json.loads(recording.client_parts)[0]["name"] == "noise"
    found = attack_labels(recording)
    assert found["label-clusters"] >= found["label-guess"]
    own = make_data(60, 7).tensors[0]
    found = attack_inputs(
        recording, plain_net(), own, lambda client: PARTS[int(client)].tensors[0], epochs=3
    )
    assert 0.3 < found["reconstruction-explained"] < 1  # 6 numbers for 8
    with pytest.raises(ConfigError, match="12 of 12 private inputs are among the attacker's own"):
        attack_inputs(recording, plain_net(), PARTS[0].tensors[0], lambda _: PARTS[0].tensors[0])


def test_inputs_are_not_attacked_without_a_segment(tmp_path):
    recorded(tmp_path, PSL)
    with pytest.raises(ConfigError, match="no client handed over its segment"):
        attack_inputs(read_recording(tmp_path), plain_net(), PARTS[0].tensors[0], None)


def own_inputs():
    return make_data(60, 7).tensors[0]


def private_inputs(client):
    return PARTS[int(client)].tensors[0]


def test_the_command(tmp_path):
    recorded(tmp_path / "plain", client_strategy=FedAvg())
    recorded(tmp_path / "noisy", client_strategy=FedAvg(), client_parts=[Noise(5.0)])
    task = [
        "--model", "reference:plain_net", "--epochs", "1",
        "--data", f"{__name__}:own_inputs", "--private", f"{__name__}:private_inputs",
    ]  # fmt: skip

    def call(*arguments, code=0):
        result = CliRunner().invoke(app, ["attack", *map(str, arguments)])
        assert result.exit_code == code, result.output
        return result.output

    both = call(tmp_path / "noisy", "--undefended", tmp_path / "plain", "--json", *task)
    numbers = json.loads(both)
    key = "reconstruction-explained"
    assert numbers["run"][key] < numbers["undefended"][key]
    assert "--undefended" in call(tmp_path / "plain")
    recorded(tmp_path / "other", client_strategy=FedAvg(), seed=3)
    refused = call(tmp_path / "noisy", "--undefended", tmp_path / "other", code=1)
    assert "seed is 3, here 2" in " ".join(refused.split())
    assert "holds no recording" in call(tmp_path, code=1)
    assert "--data, --private missing" in call(tmp_path / "plain", "--model", "x:y", code=1)


def test_a_broken_file_is_said(tmp_path):
    recorded(tmp_path, rounds=1)
    path = sorted(tmp_path.glob("round-*/*.safetensors"))[0]
    assert load_file(path).keys() == {"smashed", "gradient", "labels"}
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(StorageError, match="can't be read"):
        read_recording(tmp_path)


def test_the_same_run_without_its_defences_is_taken(tmp_path, caplog):
    recorded(tmp_path / "noisy", client_parts=[Clip(5.0), Noise(0.5)])
    recorded(tmp_path / "clipped", client_parts=[Clip(5.0)])
    recorded(tmp_path / "plain")
    for undefended in ("plain", "clipped"):
        check_undefended(tmp_path / "noisy", tmp_path / undefended)
    assert "have other rounds" not in caplog.text
    recorded(tmp_path / "short", rounds=1)
    check_undefended(tmp_path / "noisy", tmp_path / "short")
    assert "have other rounds or steps (10 and 5 of clients)" in caplog.text
    # One of before recordings said what clients were told.
    path = tmp_path / "plain" / "run.json"
    about = json.loads(path.read_text())
    del about["told"]
    path.write_text(json.dumps(about))
    check_undefended(tmp_path / "noisy", tmp_path / "plain")


def wider():
    """A net of which no more crosses."""
    net = plain_net()
    net.front = nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 6))
    return net


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seed": 1}, r"seed is 1, here 2; labels are others: .*\(client '0', round 1, step 0\)"),
        ({"batch_size": 2}, r"batch-size is 2, here 4; smashed has shape \[2, 6\], here \[4, 6\]"),
        ({"cut": "middle", "app_options": {"cut": "middle"}}, "cut is 'middle', here 'front'"),
        ({"local_steps": 1}, "local-steps is 1, here 0"),
        ({"client_parts": [Clip(1.0)]}, r"client parts are clip .*'norm': 1.0.*, which are not"),
        ({"parts": make_parts([12, 8, 4])}, "clients are .'0', '1', '2'., here .'0', '1'."),
        ({"parts": make_parts([11, 8])}, "labels are others|smashed has shape"),
        ({"cls": PSL}, "segments are handed over here alone: another method"),
        ({"build": wider}, "the model's client segment has other tensors"),
        ({"cls": SequentialSL}, "clients-at-once is 1, here 2"),
        ({"cls": FSLSAGE, "upload_every": 1}, "request is 'LocalRequest', here"),
    ],
)
def test_another_run_is_no_undefended_one(tmp_path, options, said):
    recorded(tmp_path / "noisy", client_parts=[Noise(0.5)])
    recorded(tmp_path / "other", **options)
    with pytest.raises(
        ConfigError, match=f"is not the run of .*noisy without its defences.*{said}"
    ):
        check_undefended(tmp_path / "noisy", tmp_path / "other")
