"""Networks from torchvision, cut, train exactly as they do in one piece."""

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


@pytest.mark.parametrize("cut", ["bn1", "layer2", "layer4.0"])
def test_resnet18_trains_the_same(torchvision_models, assert_same_step, cut):
    model = torchvision_models.resnet18(num_classes=10)
    assert_same_step(model, cut, images(64), LABELS)


@pytest.mark.parametrize("cut", ["encoder.dropout", "encoder.layers.encoder_layer_1", "encoder"])
def test_vit_trains_the_same(small_vit, assert_same_step, cut):
    assert_same_step(small_vit(), cut, images(32), LABELS)


def test_vit_b_16_computes_the_same(torchvision_models):
    model = torchvision_models.vit_b_16(image_size=32).eval()
    halves = split(model, "encoder.layers.encoder_layer_5")
    with torch.no_grad():
        assert torch.equal(halves.server(halves.client(images(32))), model(images(32)))


def test_vgg16_computes_the_same_at_a_stage_and_inside_one(torchvision_models):
    model = torchvision_models.vgg16(num_classes=10).eval()
    with torch.no_grad():
        expected = model(images(32))
        for cut in ("features.16", "features.12", "classifier.2"):
            halves = split(model, cut)
            assert torch.equal(halves.server(halves.client(images(32))), expected)


@pytest.mark.parametrize("cut", ["features.4", "features.4.block.1", "features.12.0"])
def test_mobilenet_v3_small_trains_the_same(torchvision_models, assert_same_step, cut):
    model = torchvision_models.mobilenet_v3_small(num_classes=10)
    assert_same_step(model, cut, images(64), LABELS)


@pytest.mark.parametrize(
    ("network", "cut"),
    [
        ("densenet121", "features.transition1"),
        ("efficientnet_b0", "features.2.0.block.1"),
        ("convnext_tiny", "features.3.1"),
        ("swin_t", "features.2.norm"),
        ("shufflenet_v2_x1_0", "stage2.1"),
    ],
)
def test_other_networks_compute_the_same(torchvision_models, network, cut):
    model = getattr(torchvision_models, network)(num_classes=10).eval()
    halves = split(model, cut)
    with torch.no_grad():
        assert torch.equal(halves.server(halves.client(images(64))), model(images(64)))


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
