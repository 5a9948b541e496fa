"""Networks from torchvision, cut, train as they do in one piece; `make zoo` has more of them."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch

from flsplit.cut import split

LABELS = torch.tensor([0, 1, 2, 3])


def images(size):
    torch.manual_seed(2)
    return torch.randn(4, 3, size, size)


@pytest.mark.parametrize(
    ("network", "cut"),
    [
        ("resnet18", "bn1"),
        ("resnet18", "layer4.0"),
        ("mobilenet_v3_small", "features.4.block.1"),
        ("shufflenet_v2_x0_5", "stage2.1"),
    ],
)
def test_a_network_trains_the_same(torchvision_models, assert_same_step, network, cut):
    model = getattr(torchvision_models, network)(num_classes=10)
    assert_same_step(model, cut, images(48), LABELS)


@pytest.mark.parametrize("cut", ["encoder.dropout", "encoder.layers.encoder_layer_1", "encoder"])
def test_vit_trains_the_same(small_vit, assert_same_step, cut):
    assert_same_step(small_vit(), cut, images(32), LABELS)


def test_one_split_serves_every_batch_size(small_vit):
    model = small_vit().eval()
    halves = split(model, "encoder.layers.encoder_layer_0")
    for size in (1, 3):
        batch = images(32)[:size]
        assert torch.equal(halves.server(halves.client(batch)), model(batch))


IN_A_FRESH_PROCESS = """
import pickle, sys, torch
from flsplit.vision import load_torchvision
load_torchvision()
torch.set_num_threads(1)
with open(sys.argv[1], "rb") as file:
    for client, server, batch, expected in pickle.load(file):
        assert torch.equal(server(client(batch)), expected)
        print(len(client.state_dict()), len(server.state_dict()))
"""


def test_segments_survive_pickle_in_a_fresh_process(torchvision_models, small_vit, tmp_path):
    cases, sizes = [], []
    for model, cut in [
        (torchvision_models.resnet18(num_classes=10), "layer3"),
        (small_vit(), "encoder.layers.encoder_layer_1"),
    ]:
        halves = split(model.eval(), cut)
        cases.append((halves.client, halves.server, images(32), model(images(32)).detach()))
        sizes += [len(halves.client.state_dict()), len(halves.server.state_dict())]
    path = tmp_path / "segments"
    path.write_bytes(pickle.dumps(cases))
    command = [sys.executable, "-c", IN_A_FRESH_PROCESS, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [int(size) for size in done.stdout.split()] == sizes


def test_a_deepcopy_is_independent(torchvision_models):
    model = torchvision_models.resnet18(num_classes=10).eval()
    halves = split(model, "layer2")
    expected = halves.server(halves.client(images(32)))
    copied = copy.deepcopy(halves)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(copied.server(copied.client(images(32))), expected)
    assert not torch.equal(halves.server(halves.client(images(32))), expected)
