"""One gate looks at what ``data()`` returns, and says what came and what was expected."""

import random
from collections import UserDict, namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from driving import Drive, RefusedError
from reference import epoch_batches, make_data, plain_net, split_app
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from flsplit import client_app

DATA = make_data(12, seed=3)
X, Y = DATA.tensors
LOADER = DataLoader(DATA, batch_size=4)
ITEMS = [DATA[index] for index in range(12)]
FIRST = next(epoch_batches(12, "0", 4))[0]  # which examples are in the first batch


def app_of(value, **options):
    return client_app(model=plain_net, cut="front", data=lambda _: value, device="cpu", **options)


class Stream(IterableDataset):
    def __iter__(self):
        yield from ITEMS


class LongStream(Stream):
    def __len__(self):
        return 12


class Unmeasured(Dataset):
    def __getitem__(self, index):
        return ITEMS[index]


class Measured(Unmeasured):
    """The least that a data set is."""

    def __len__(self):
        return 12


class Broken(Measured):
    def __len__(self):
        raise FileNotFoundError("no index.json")


class HuggingFace:
    """As their data sets are: no torch Dataset, and batches at once."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return ITEMS[index]

    def __getitems__(self, indices):
        return [ITEMS[index] for index in indices]


class Frame:
    """As pandas' are."""

    def __array__(self):
        return X.numpy()

    def __getitem__(self, column):
        raise KeyError(column)

    def __len__(self):
        return 12


def examples():
    yield from ITEMS


async def later():
    return DATA


REFUSED = {
    "(train, val, test)": (lambda: (DATA, DATA, DATA), "a tuple of 3 (TensorDataset, Tensor"),
    "[train, test]": (lambda: [DATA, DATA], "a list of 2 (TensorDataset, TensorDataset)"),
    "[loader, loader]": (lambda: [LOADER, LOADER], "a list of 2 (DataLoader, DataLoader)"),
    "[hf, hf]": (lambda: [HuggingFace()] * 2, "a list of 2 (HuggingFace, HuggingFace)"),
    "(X, y)": (lambda: (X, Y), "a tuple of 2 (Tensor, Tensor)"),
    "[X, y]": (lambda: [X, Y], "a list of 2 (Tensor, Tensor)"),
    "(X, y) arrays": (lambda: (X.numpy(), Y.numpy()), "a tuple of 2 (ndarray, ndarray)"),
    "((X, y), (X, y))": (lambda: ((X, Y), (X, Y)), "a tuple of 2 (tuple, tuple)"),
    "four arrays": (lambda: (X, X, Y, Y), "a tuple of 4 (Tensor, Tensor, Tensor, Tensor)"),
    "X": (lambda: X, "Tensor, expected"),
    "array": (lambda: X.numpy(), "ndarray, expected"),
    "frame": (Frame, "Frame, expected"),
    "lists of numbers": (lambda: (X.tolist(), Y.tolist()), "a tuple of 2 (list, list)"),
    "(train, dict)": (lambda: (LOADER, {"n": 12}), "a tuple of 2 (DataLoader, dict)"),
    "(train, number)": (lambda: (LOADER, 12), "a tuple of 2 (DataLoader, int)"),
    "(None, test)": (lambda: (None, DATA), "a tuple of 2 (NoneType, TensorDataset)"),
    "(loader, loader, dict)": (lambda: (LOADER, LOADER, {}), "a tuple of 3 (DataLoader, DataL"),
    "dict": (lambda: {"train": DATA, "test": DATA}, "a dict ('train': TensorDataset, 'test': T"),
    "user's dict": (lambda: UserDict(train=DATA), "a UserDict ('train': TensorDataset)"),
    "None": (lambda: None, "NoneType"),
    "iterator": (lambda: iter(LOADER), "_SingleProcessDataLoaderIter"),
    "generator": (examples, "generator"),
    "zip": (lambda: zip(X, Y, strict=True), "zip"),
    "stream": (Stream, "Stream, expected"),
    "stream with a length": (LongStream, "LongStream, expected"),
    "loader of a stream": (lambda: DataLoader(Stream()), "a DataLoader over Stream, expected"),
    "(train, stream)": (lambda: (DATA, Stream()), "a tuple of 2 (TensorDataset, Stream)"),
    "without a length": (Unmeasured, "Unmeasured, expected"),
    "loader without a length": (lambda: DataLoader(Unmeasured(), sampler=[0]), "a DataLoader over"),
    "str": (lambda: "data/train.csv", "str, expected"),
    "bytes": (lambda: b"data", "bytes, expected"),
    "number": (lambda: 12, "int, expected"),
    "empty list": (list, "an empty list, expected"),
    "empty tuple": (tuple, "an empty tuple, expected"),
    "empty dict": (dict, "an empty dict, expected"),
    "one data set in a tuple": (lambda: (DATA,), "a tuple of 1 (TensorDataset)"),
    "class": (lambda: TensorDataset, "the class TensorDataset, expected"),
    "function": (lambda: examples, "function, expected"),
    "module": (plain_net, "Sequential, expected"),
    "range": (lambda: range(12), "range, expected"),
    "set": (lambda: {1, 2}, "set, expected"),
    "labels alone": (lambda: [0, 1, 2], "a list of 3 (int, int, int)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_data_is_refused_in_one_sentence(name):
    make, came = REFUSED[name]
    with pytest.raises(RefusedError) as caught:
        Drive(app_of(make()), plain_net).begin()
    said = str(caught.value)
    assert said.startswith(f"DataError: data returned {came}")
    assert ", expected a map-style torch Dataset, a DataLoader over one, or a pair (train" in said


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("(X, y)", "TensorDataset(inputs, labels)"),
        ("[X, y]", "TensorDataset(inputs, labels)"),
        ("((X, y), (X, y))", "TensorDataset(inputs, labels)"),
        ("array", "TensorDataset(inputs, labels)"),
        ("[train, test]", "a pair is a tuple"),
        ("dict", "return (sets['train'], sets['test'])"),
        ("iterator", "return what it was made of"),
        ("stream", "Stream is an IterableDataset"),
        ("loader of a stream", "Stream is an IterableDataset"),
        ("stream with a length", "LongStream is an IterableDataset"),
        ("without a length", "Unmeasured has no __len__"),
        ("class", "TensorDataset is a class"),
        ("lists of numbers", "an example is a pair"),
    ],
)
def test_what_nearly_is_data_gets_a_hint(name, hint):
    with pytest.raises(RefusedError) as caught:
        Drive(app_of(REFUSED[name][0]()), plain_net).begin()
    assert hint in str(caught.value)


def test_an_async_function_is_none():
    app = client_app(model=plain_net, cut="front", data=lambda _: later(), device="cpu")
    with (
        pytest.warns(RuntimeWarning, match="never awaited"),
        pytest.raises(RefusedError, match="data returned coroutine, expected"),
    ):
        Drive(app, plain_net).begin()


def test_an_error_of_data_itself_is_said_with_its_line():
    app = client_app(model=plain_net, cut="front", data=lambda _: {}["path"], device="cpu")
    where = rf"\({Path(__file__).name}, line \d+, in <lambda>\)"
    told = f"DataError: data raised KeyError: 'path' {where}"
    with pytest.raises(RefusedError, match=told):
        Drive(app, plain_net).begin()


def test_a_length_that_cannot_be_read_is_said():
    with pytest.raises(RefusedError, match=r"DataError: data returned Broken, .*no index\.json"):
        Drive(app_of(Broken()), plain_net).begin()


Pair = namedtuple("Pair", "train test")


@pytest.mark.parametrize(
    ("value", "num_tests"),
    [
        (DATA, 0),
        (LOADER, 0),
        (Measured(), 0),
        (HuggingFace(), 0),
        (ITEMS, 0),
        (Subset(DATA, range(12)), 0),
        (DataLoader(ITEMS), 0),
        ((DATA, make_data(5, seed=0)), 5),
        ((LOADER, DataLoader(make_data(5, seed=0))), 5),
        ((ITEMS, ITEMS[:2]), 2),
        (Pair(DATA, DATA), 12),
        ((DATA, None), 0),
        ((DATA, []), 0),
    ],
)
def test_what_is_data_is_taken(value, num_tests):
    drive = Drive(app_of(value), plain_net)
    reply = drive.begin()
    expected = Drive(split_app(plain_net, [DATA]), plain_net).begin()
    assert torch.equal(reply.smashed, expected.smashed)
    assert reply.num_examples == 12
    assert len(drive.evaluate().labels) == num_tests


def test_unpack_may_make_labels_of_inputs():
    """An autoencoder's data set needs no labels: a list of tensors is one of examples then."""
    app = app_of(list(X), unpack=lambda batch: (batch, batch))
    reply = Drive(app, plain_net).begin()
    assert torch.equal(reply.labels, X[FIRST])


def test_a_loader_may_hold_what_its_collate_function_understands():
    texts = ["a", "bb", "ccc", "dd", "e", "f", "g", "h", "i", "j", "k", "lll"]

    def collate(items):
        lengths = torch.tensor([len(item) for item in items])
        return torch.ones(len(items), 8) * lengths[:, None], lengths - 1

    reply = Drive(app_of(DataLoader(texts, collate_fn=collate)), plain_net).begin()
    assert reply.labels.tolist() == [len(texts[index]) - 1 for index in FIRST]


def test_a_data_function_that_draws_draws_the_same_again():
    def drawn():
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002

    seen = []

    def load(context):
        seen.append(drawn())
        return DATA

    app = client_app(model=plain_net, cut="front", data=load, device="cpu")
    drive = Drive(app, plain_net, cache=False)
    drive.begin(local_steps=1)
    drive.finish()
    assert len(seen) == 2
    assert seen[0] == seen[1]


def test_a_module_list_is_no_list_of_examples():
    with pytest.raises(RefusedError, match="data returned ModuleList"):
        Drive(app_of(nn.ModuleList([plain_net()])), plain_net).begin()
