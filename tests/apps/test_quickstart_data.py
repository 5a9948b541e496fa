"""Which client of the quickstart app holds what."""

import gzip
import hashlib
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from quickstart import data
from quickstart.data import load_partition, load_test_set
from quickstart.images import DATASETS, NUM_CLASSES
from quickstart.task import CUT, build_model

NUM_CLIENTS = 10
APP = Path(data.__file__).parents[1]


def context(partition_id=0, num_partitions=NUM_CLIENTS, **run_config):
    defaults = {"dataset": "digits", "data-dir": "", "seed": 0, "alpha": 1.0}
    return SimpleNamespace(
        node_config={"partition-id": partition_id, "num-partitions": num_partitions},
        run_config=defaults | {key.replace("_", "-"): value for key, value in run_config.items()},
    )


def fingerprint(dataset):
    images, labels = dataset.tensors
    return hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()


def all_parts(num_partitions=NUM_CLIENTS, **run_config):
    return [load_partition(context(i, num_partitions, **run_config)) for i in range(num_partitions)]


def rows(dataset):
    """The examples, each as something that can be sorted and compared."""
    return sorted((int(label), image.numpy().tobytes()) for image, label in dataset)


@pytest.mark.parametrize("num_partitions", [1, 3, 10, 50])
def test_the_clients_together_hold_every_example_once(num_partitions):
    whole = data._load("digits", "", 0)
    parts = all_parts(num_partitions)

    train = sorted(row for part, _ in parts for row in rows(part))
    test = sorted(row for _, part in parts for row in rows(part))

    assert train == rows(data._examples(whole.train_images, whole.train_labels))
    assert test == rows(load_test_set(context()))
    assert len(train) + len(test) == 1797
    # The indices, too: two examples may look the same.
    dealt = data._deal_by_label("digits", "", 0, num_partitions, 1.0)
    assert sorted(torch.cat(dealt).tolist()) == list(range(1437))
    dealt = data._deal_evenly(360, num_partitions, 0)
    assert sorted(torch.cat(dealt).tolist()) == list(range(360))


def test_no_training_example_is_a_test_example():
    whole = data._load("digits", "", 0)
    train = {image.numpy().tobytes() for image in whole.train_images}
    # No two of the 1797 digits are equal, so a shared image would be a shared example.
    assert len(train) == 1437
    assert not train & {image.numpy().tobytes() for image in whole.test_images}


@pytest.mark.parametrize("alpha", [0.01, 0.1, 1.0, 100.0])
def test_no_client_is_without_data(alpha):
    parts = all_parts(alpha=alpha)
    assert min(len(train) for train, _ in parts) >= data.MIN_EXAMPLES
    assert {len(test) for _, test in parts} == {36}


def test_clients_hold_different_examples():
    parts = all_parts()
    assert len({fingerprint(train) for train, _ in parts}) == NUM_CLIENTS
    assert len({fingerprint(test) for _, test in parts}) == NUM_CLIENTS


def test_a_small_alpha_makes_labels_differ_more():
    def labels_per_client(alpha):
        return sum(len(train.tensors[1].unique()) for train, _ in all_parts(alpha=alpha))

    assert labels_per_client(0.1) < labels_per_client(1.0) < labels_per_client(100.0)


def test_another_seed_is_another_split():
    assert fingerprint(load_partition(context(seed=0))[0]) != fingerprint(
        load_partition(context(seed=1))[0]
    )
    assert fingerprint(load_test_set(context(seed=0))) != fingerprint(
        load_test_set(context(seed=1))
    )


def test_the_same_seed_is_the_same_split_in_another_process():
    here = [fingerprint(part) for part in load_partition(context(3))]
    script = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(APP)!r}]
from test_quickstart_data import context, fingerprint, load_partition
# Other clients first: what a process served before must not matter.
load_partition(context(7)), load_partition(context(0, 5, seed=9))
print(*[fingerprint(part) for part in load_partition(context(3))])
"""
    there = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.split() == here


def test_loading_digits_needs_no_network_and_writes_nothing(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for cached in (data._load, data._deal_by_label, data._deal_evenly):
        cached.cache_clear()

    all_parts()

    assert list(tmp_path.iterdir()) == []


def test_a_server_that_loads_the_client_app_imports_no_library_of_data():
    script = f"""
import sys
sys.path.insert(0, {str(APP)!r})
import quickstart.client_app
print(sorted({{"datasets", "flwr_datasets", "pandas", "scipy", "sklearn"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_images_and_labels_fit_the_model():
    train, test = load_partition(context())
    images, labels = train.tensors
    assert images.shape[1:] == (1, 8, 8)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert (images.min(), images.max()) == (-1.0, 1.0)
    assert build_model(context())(test.tensors[0]).shape == (36, NUM_CLASSES)


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_the_model_fits_every_data_set(name):
    source = DATASETS[name]
    model = build_model(context(dataset=name))
    assert CUT in dict(model.named_modules())
    images = torch.zeros(2, source.channels, source.size, source.size)
    assert model(images).shape == (2, NUM_CLASSES)


def test_an_example_is_classified_the_same_in_any_batch():
    model = build_model(context())
    images = load_test_set(context()).tensors[0][:8]
    torch.testing.assert_close(model(images)[3], model(images[3:4])[0])


# --- what can be wrong -------------------------------------------------------------------------


def test_an_unknown_data_set_is_named_with_the_nearest_first():
    with pytest.raises(ValueError, match="dataset='MNITS' is unknown, expected one of mnist"):
        load_partition(context(dataset="MNITS"))
    with pytest.raises(ValueError, match="expected one of fashion-mnist"):
        build_model(context(dataset="fashion_mnist"))


@pytest.mark.parametrize("data_dir", ["", "data", "./data"])
def test_a_data_dir_must_be_absolute(data_dir):
    with pytest.raises(ValueError, match=f"data-dir='{data_dir}' must be an absolute path"):
        load_partition(context(dataset="mnist", data_dir=data_dir))


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_a_data_dir_without_the_data_is_named(name, tmp_path):
    with pytest.raises(ValueError, match=f"data-dir='{tmp_path}' does not hold {name}"):
        load_partition(context(dataset=name, data_dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("run_config", "num_partitions", "message"),
    [
        ({"alpha": 0.0}, 10, "alpha=0 must be greater than 0"),
        ({"alpha": 0.01}, 100, "100 clients with alpha=0.01 so that each has 2"),
        ({}, 719, "1437 training examples are too few for 719 clients, each of which needs 2"),
    ],
)
def test_what_cannot_be_dealt_out_is_refused(run_config, num_partitions, message):
    with pytest.raises(ValueError, match=message):
        load_partition(context(0, num_partitions, **run_config))


def test_a_node_config_must_say_which_partition():
    lost = SimpleNamespace(node_config={"num-partitions": 2}, run_config=context().run_config)
    with pytest.raises(ValueError, match="the node config lacks partition-id"):
        load_partition(lost)
    with pytest.raises(ValueError, match="partition-id=10 is not among the num-partitions=10"):
        load_partition(context(10))


# --- torchvision -------------------------------------------------------------------------------


def test_mnist_is_read_from_the_data_dir(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for name, count in (("train", 60), ("t10k", 20)):
        images = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8, generator=generator)
        labels = torch.arange(count, dtype=torch.uint8) % 10
        for kind, header, body in (
            ("images-idx3", struct.pack(">4i", 2051, count, 28, 28), images),
            ("labels-idx1", struct.pack(">2i", 2049, count), labels),
        ):
            content = header + body.numpy().tobytes()
            (raw / f"{name}-{kind}-ubyte").write_bytes(content)
            (raw / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))

    parts = all_parts(num_partitions=3, dataset="mnist", data_dir=str(tmp_path))

    assert sum(len(train) for train, _ in parts) == 60
    assert sum(len(test) for _, test in parts) == 20
    assert parts[0][0].tensors[0].shape[1:] == (1, 28, 28)
