"""CIFAR-10 as torchvision keeps it, and what is said where it is missing."""

import hashlib
import pickle

import numpy as np
import pytest
from experiment import find_experiment

from flsplit.cut import split
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
    parts = split(found.model(), found.cut)

    for half, convolutions in ((parts.client, 4), (parts.server, 9)):
        assert [one.ndim for one in half.state_dict().values()].count(4) == convolutions
    assert found.model()(found.train[0][:2]).shape == (2, 10)


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
