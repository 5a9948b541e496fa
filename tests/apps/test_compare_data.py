"""CIFAR-10 as torchvision keeps it, and what is said where it is missing."""

import hashlib
import pickle
import re
from collections import OrderedDict
from dataclasses import replace

import compare
import numpy as np
import pytest
import torch
from everyone import Everyone
from sources import find_experiment
from torch import nn
from training import FINAL, Setting, train

from flsplit.errors import ConfigError
from flsplit.vision import load_torchvision

CIFAR10 = load_torchvision().datasets.CIFAR10


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """Return a folder with a CIFAR-10 of two images per file."""
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return name, hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch(name):
        data = rng.integers(0, 256, (2, 3 * 32 * 32), dtype=np.uint8)
        return write(name, {"data": data, "labels": [3, 7]})

    names = [name for name, _ in CIFAR10.train_list]
    monkeypatch.setattr(CIFAR10, "train_list", [batch(name) for name in names])
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch")])
    _, digest = write("batches.meta", {"label_names": list("abcdefghij")})
    meta = {"filename": "batches.meta", "key": "label_names", "md5": digest}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return tmp_path


def test_cifar10_is_read(cifar10):
    found = find_experiment("cifar10", str(cifar10))
    (images, labels), (test_images, test_labels) = found.train, found.test

    assert images.shape == (10, 3, 32, 32)
    assert test_images.shape == (2, 3, 32, 32)
    assert images.min() >= -1
    assert images.max() <= 1
    assert labels.tolist() == [3, 7] * 5
    assert test_labels.tolist() == [3, 7]
    assert found.model()(images).shape == (10, 10)


def test_the_papers_network_is_cut_after_four_convolutions(cifar10):
    found = find_experiment("gapsl-cifar10", str(cifar10))
    with torch.device("meta"):
        model = found.model()
        logits = model(torch.zeros(2, 3, 32, 32))
    stages = list(dict(model.named_children())["features"].named_children())
    places = [int(name) for name, one in stages if isinstance(one, torch.nn.Conv2d)]

    assert found.cut == "features.8"
    assert [place <= 8 for place in places] == [True] * 4 + [False] * 9
    assert logits.shape == (2, 10)


def small_vgg():
    """A network whose layers up to the cut have VGG-16's names."""
    features = [nn.Conv2d(3, 4, 3, stride=4), *(nn.ReLU() for _ in range(9))]
    return nn.Sequential(
        OrderedDict(features=nn.Sequential(*features), flat=nn.Flatten(), head=nn.Linear(256, 10))
    )


def test_the_papers_setting_is_a_preset_with_its_numbers_beside(cifar10, tmp_path, monkeypatch):
    """As far as ten images go: everything that the command line says goes before the preset."""
    monkeypatch.setattr("presets.vgg16", small_vgg)
    small = ["--clients", "2", "--batch-size", "2", "--rounds", "1", "--methods", "psl", "fedavg"]
    arguments = [*small, "--alpha", "0.9", "inf", "--seeds", "0", "--workers", "0", "--out"]
    data = ["--preset", "gapsl-cifar10", "--data-dir", str(cifar10)]
    whole = compare.parse([*data, "--subset", "9"])
    assert compare.main([*data, *arguments, str(tmp_path / "out")]) == 0

    assert (whole.clients, whole.batch_size, whole.rounds) == (10, 128, 70)
    assert whole.methods == ["psl", "gapsl", "sfl", "epsl", "sequential-sl"]
    assert whole.partition == ["dirichlet:alpha=0.1"]
    assert (whole.rates, whole.shares) == ({"client_lr": [0.005], "server_lr": [0.01]}, "equal")
    text = (tmp_path / "out" / "results.md").read_text()
    assert "arXiv 2603.18540" in text
    rows = re.findall(r"^\| (PSL|FedAvg) \|.*\| (\S+) \|$", text, re.MULTILINE)
    assert ("PSL", "81.3") in rows  # Table III, α = 0.9
    assert ("PSL", "84.3") in rows  # Table I, IID
    assert ("FedAvg", "-") in rows
    assert not any((tmp_path / "out" / "checkpoints").iterdir())  # they go when a run is done


def test_a_round_of_the_preset_goes_through_all_data_once(cifar10):
    options = compare.parse(
        ["--preset", "gapsl-cifar10", "--data-dir", str(cifar10), "--subset", "50000"]
    )

    assert options.local_steps == 35  # 45000 examples, 10 clients, mini-batches of 128


def test_a_run_that_was_interrupted_goes_on_from_its_last_round(tmp_path, monkeypatch):
    setting = Setting("digits", "", 3, 3, 2, 16, checkpoints=str(tmp_path))
    job = ("psl", {"client_lr": 0.05, "server_lr": 0.05}, "iid", 0, FINAL)
    calls = []

    def compute(metric):
        calls.append(metric)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole_compute(metric)

    whole_compute = Everyone.compute
    monkeypatch.setattr(Everyone, "compute", compute)
    with pytest.raises(KeyboardInterrupt):
        train(setting, *job)
    assert any(tmp_path.iterdir())
    found = train(setting, *job)
    plain = train(replace(setting, checkpoints=""), *job)

    assert len(calls) == 3 + 1 + 3  # the last round of three is all that was left
    assert [found[name] for name in ("accuracy", "clients", "own", "bytes", "rows")] == [
        plain[name] for name in ("accuracy", "clients", "own", "bytes", "rows")
    ]
    assert not any(tmp_path.iterdir())


def test_the_model_fits_the_digits():
    found = find_experiment("digits", "")
    assert found.model()(found.test[0]).shape == (397, 10)


@pytest.mark.parametrize(
    ("dataset", "kind"),
    [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST"), ("gapsl-cifar10", "CIFAR10")],
)
def test_missing_data_is_named(dataset, kind, tmp_path):
    with pytest.raises(ConfigError, match=f"has no {kind}"):
        find_experiment(dataset, str(tmp_path))
    with pytest.raises(ConfigError, match="is no folder"):
        find_experiment(dataset, str(tmp_path / "nowhere"))
