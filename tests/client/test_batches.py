"""What a batch may be: inputs and labels of any nesting, one row per example."""

from collections import OrderedDict, UserDict, namedtuple

import numpy as np
import pytest
import torch
from driving import Drive, RefusedError
from reference import epoch_batches, make_data, plain_net, run_split, split_app
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_sequence
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from flsplit.client.batches import Examples
from flsplit.errors import DataError
from flsplit.strategies import PSL

X, MASK, Y = torch.randn(10, 8), torch.rand(10, 8), torch.arange(10)
ROWS = [7, 2, 5]


class Items(Dataset):
    """Examples that a function makes of their index."""

    def __init__(self, make, length=10):
        self.make, self.length = make, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return self.make(index)


def batch_of(make, **options):
    return Examples(Items(make), "7", "training", **options).batch(ROWS)


def collated(batch, **options):
    """Return inputs and labels of a batch that a collate function has made."""
    return batch_of(lambda index: index, collate=lambda items: batch, **options)


def same(found, expected):
    """Compare nestings, containers too."""
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            same(found[key], expected[key])
    else:
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)


# --- what is taken -----------------------------------------------------------------------------

Boxes = namedtuple("Boxes", "corner size")


@pytest.mark.parametrize(
    ("make", "inputs", "labels"),
    [
        (lambda i: (X[i], Y[i]), X[ROWS], Y[ROWS]),
        (lambda i: [X[i], Y[i]], X[ROWS], Y[ROWS]),
        (lambda i: ((X[i], MASK[i]), Y[i]), [X[ROWS], MASK[ROWS]], Y[ROWS]),
        (lambda i: ({"x": X[i]}, Y[i]), {"x": X[ROWS]}, Y[ROWS]),
        (
            lambda i: ({"x": X[i], "more": (MASK[i], Y[i])}, Y[i]),
            {"x": X[ROWS], "more": [MASK[ROWS], Y[ROWS]]},
            Y[ROWS],
        ),
        (lambda i: {"x": X[i], "label": Y[i]}, {"x": X[ROWS]}, Y[ROWS]),
        (lambda i: {"labels": Y[i], "x": X[i]}, {"x": X[ROWS]}, Y[ROWS]),
        (
            lambda i: {"ids": X[i], "mask": MASK[i], "label": int(i)},
            {"ids": X[ROWS], "mask": MASK[ROWS]},
            torch.tensor(ROWS),
        ),
        (
            lambda i: (X[i], {"class": Y[i], "box": Boxes(X[i], MASK[i])}),
            X[ROWS],
            {"class": Y[ROWS], "box": Boxes(X[ROWS], MASK[ROWS])},
        ),
        (lambda i: (X[i], (Y[i], X[i, 0])), X[ROWS], [Y[ROWS], X[ROWS, 0]]),
        (lambda i: (X[i], X[i]), X[ROWS], X[ROWS]),
        (lambda i: (X[i].numpy(), i), X[ROWS], torch.tensor(ROWS)),
        (lambda i: (X[i], i / 2), X[ROWS], torch.tensor(ROWS, dtype=torch.float64) / 2),
    ],
)
def test_nestings_of_tensors_are_handed_on(make, inputs, labels):
    found = batch_of(make)
    same(found[0], inputs)
    same(found[1], labels)


@pytest.mark.parametrize("kind", [dict, UserDict, OrderedDict])
def test_a_mapping_of_any_kind_is_taken_apart(kind):
    inputs, labels = collated(kind(x=X[ROWS], labels=Y[ROWS]))
    same(inputs, {"x": X[ROWS]})
    same(labels, Y[ROWS])


def test_a_batch_of_a_tensor_data_set_is_its_rows():
    inputs, labels = Examples(TensorDataset(X, Y), "7", "test").batch(ROWS)
    same((inputs, labels), (X[ROWS], Y[ROWS]))


def test_a_packed_sequence_may_be_the_input():
    """Its tensors have other dimensions in front; how many rows it has it says itself."""
    ragged = [X[i, : i + 1] for i in (6, 4, 2)]
    for packed in (pack_sequence(ragged), pack_sequence(ragged[::-1], enforce_sorted=False)):
        inputs, _ = collated((packed, Y[ROWS]))
        assert type(inputs) is PackedSequence
        assert inputs.data is packed.data


def test_inputs_may_hold_more_than_rows():
    """Positions, an adjacency: what has no batch dimension may stand beside what has one."""
    positions = torch.arange(8)
    inputs, _ = collated(({"x": X[ROWS], "positions": positions}, Y[ROWS]))
    assert inputs["positions"] is positions


def test_unpack_goes_before_the_default():
    inputs, labels = collated(
        {"x": X[ROWS], "labels": Y[ROWS]}, unpack=lambda b: [b["labels"], (b["x"], b["labels"])]
    )
    same(inputs, Y[ROWS])
    same(labels, (X[ROWS], Y[ROWS]))


def test_padding_that_differs_from_batch_to_batch():
    def collate(items):
        inputs = pad_sequence([x for x, _ in items], batch_first=True)
        return {"ids": inputs, "mask": inputs != 0, "labels": torch.tensor([y for _, y in items])}

    def make(index):
        return X[index, : index + 1], index

    inputs, labels = batch_of(make, collate=collate)
    assert inputs["ids"].shape == (3, 8)
    assert torch.equal(inputs["mask"].sum(1), torch.tensor([8, 3, 6]))
    assert labels.tolist() == ROWS


# --- through a model ---------------------------------------------------------------------------


class TakesTwo(nn.Module):
    """The plain net's layers; its front takes inputs and, where it is given, a mask."""

    def __init__(self):
        super().__init__()
        net = plain_net()
        self.front, self.middle, self.head = net.front, net.middle, net.head

    def forward(self, x, mask=None):
        return self.head(self.middle(self.front(x if mask is None else x * mask)))


@pytest.mark.parametrize(
    "make",
    [
        lambda i: {"x": X[i], "mask": MASK[i], "label": i % 3},
        lambda i: ({"mask": MASK[i], "x": X[i]}, i % 3),
        lambda i: ((X[i], MASK[i]), i % 3),
    ],
    ids=["a dict", "keywords", "positions"],
)
@pytest.mark.parametrize("cache", [True, False])
def test_the_model_gets_keywords_of_a_dict_and_positions_of_a_tuple(make, cache):
    app = split_app(TakesTwo, [Items(make)], tests=[Items(make, 3)])
    drive = Drive(app, TakesTwo, cache=cache)
    whole = TensorDataset(X * MASK, Y % 3)
    app = split_app(plain_net, [whole], tests=[Subset(whole, range(3))])
    expected = Drive(app, plain_net)
    reply, plain = drive.begin(), expected.begin()
    assert torch.equal(reply.smashed, plain.smashed)
    assert torch.equal(reply.labels, plain.labels)
    gradient = torch.ones_like(plain.smashed)
    assert torch.equal(drive.step(1, gradient).smashed, expected.step(1, gradient).smashed)
    assert torch.equal(drive.evaluate().smashed, expected.evaluate().smashed)


def test_a_model_that_takes_no_such_argument_is_told_of_unpack():
    app = split_app(plain_net, [Items(lambda i: {"img": X[i], "label": i % 3})])
    with pytest.raises(RefusedError) as caught:
        Drive(app, plain_net).begin()
    said = str(caught.value)
    assert said.startswith("DataError: the inputs of a batch are a dict with ['img']")
    assert "unpack=lambda batch" in said
    assert "client '0'" in said


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (X[ROWS], "a batch is Tensor, expected (inputs, labels); say how to take it apart, e.g."),
        ((X[ROWS], MASK[ROWS], Y[ROWS]), "a batch is a tuple of 3 (Tensor, Tensor, Tensor), exp"),
        ([X[ROWS]], "a batch is a list of 1 (Tensor), expected (inputs, labels)"),
        ({"x": X[ROWS], "y": Y[ROWS]}, "a batch is a dict with ['x', 'y'], expected (inputs, lab"),
        ({"labels": Y[ROWS]}, "a batch is a dict with ['labels'], expected (inputs, labels)"),
        (
            {"x": X[ROWS], "label": Y[ROWS], "labels": Y[ROWS]},
            "a batch is a dict with ['label', 'labels', 'x'], expected",
        ),
        (None, "a batch is NoneType, expected (inputs, labels)"),
        ((X[ROWS], ["cat", "dog", "cat"]), "labels[0] of a batch is str 'cat', expected a tensor"),
        ((X[ROWS], None), "labels of a batch is None, expected a tensor"),
        ((X[ROWS], Y[ROWS].numpy()), "labels of a batch is ndarray array([7, 2, 5]), expected a"),
        (({"x": X[ROWS], "name": ["a"]}, Y[ROWS]), "inputs['name'][0] of a batch is str 'a'"),
        (({"x": X[ROWS], "types": None}, Y[ROWS]), "inputs['types'] of a batch is None, expected"),
        (((X[ROWS], 3), Y[ROWS]), "inputs[1] of a batch is int 3, expected a tensor"),
        ((X[ROWS].numpy(), Y[ROWS]), "inputs of a batch is ndarray"),
        ((X[ROWS], Boxes(Y[ROWS], object)), "labels.size of a batch is type"),
        ((X[ROWS], {}), "the labels of a batch hold nothing ({}), expected tensors"),
        (
            ((), Y[ROWS]),
            "the inputs of a batch hold nothing (()), expected tensors",
        ),
    ],
)
def test_a_batch_of_something_else_is_refused_by_place_and_kind(batch, said):
    with pytest.raises(DataError) as caught:
        collated(batch)
    assert str(caught.value).startswith(said)
    assert str(caught.value).endswith("(training data of client '7')")


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ((X[ROWS], Y[:2]), "labels: shape is (2,), expected 3 rows: the first dimension"),
        ((X[ROWS], Y[3]), "labels: shape is (), expected 3 rows"),
        ((X[:2], Y[ROWS]), "inputs: shape is (2, 8), expected 3 rows"),
        ((X[ROWS].T, Y[ROWS]), "inputs: shape is (8, 3), expected 3 rows"),
        ((X[ROWS], torch.zeros(5, 3)), "labels: shape is (5, 3), expected 3 rows"),
        ((X[ROWS], {"a": Y[ROWS], "b": Y}), "labels['b']: shape is (10,), expected 3 rows"),
        (({"x": X.T, "y": X}, Y[ROWS]), "inputs['x']: shape is (8, 10), expected 3 rows"),
        ((pack_sequence([X[0], X[1, :3]]), Y[ROWS]), "inputs: shape is (2,), expected 3 rows"),
        ((torch.tensor(2.0), Y[ROWS]), "inputs: shape is (), expected 3 rows"),
    ],
)
def test_another_number_of_rows_is_refused_with_a_word_on_the_batch_dimension(batch, said):
    with pytest.raises(DataError) as caught:
        collated(batch)
    assert str(caught.value).startswith(said)
    assert "the first dimension must be that of the batch" in str(caught.value)


@pytest.mark.parametrize("place", ["inputs", "labels"])
def test_a_sequence_first_layout_is_recognised(place):
    first = torch.zeros(5, 3, 8)
    batch = (first, Y[ROWS]) if place == "inputs" else (X[ROWS], first)
    with pytest.raises(DataError, match=r"here the second seems to be \(batch_first=True"):
        collated(batch)


def test_a_sequence_as_long_as_the_batch_cannot_be_told_apart():
    """Said so that nobody relies on it: the model's own output has to tell."""
    collated((torch.zeros(3, 3, 8), Y[ROWS]))


class BrokenItem(Items):
    def __getitem__(self, index):
        if index == 5:
            raise OSError("truncated file")
        return self.make(index)


class BrokenAtOnce(BrokenItem):
    def __getitems__(self, indices):
        return [self[index] for index in indices]


def test_an_item_that_cannot_be_read_is_named():
    with pytest.raises(DataError) as caught:
        Examples(BrokenItem(lambda i: (X[i], i)), "7", "test").batch(ROWS)
    expected = "example 5 can't be read: OSError: truncated file (test data of client '7')"
    assert str(caught.value) == expected
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(DataError, match=r"^examples \[7, 2, 5\] can't be read: OSError: trunc"):
        Examples(BrokenAtOnce(lambda i: (X[i], i)), "7", "test").batch(ROWS)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda i: (X[i, : i + 1], i), r"each a tuple: RuntimeError: stack expects each tensor"),
        (lambda i: None, r"each a NoneType: TypeError: default_collate: batch must contain"),
        (lambda i: (X[i], object()), r"each a tuple: TypeError: default_collate"),
    ],
)
def test_examples_that_make_no_batch_are_named(make, said):
    expected = rf"^default_collate can't make a batch of examples \[7, 2, 5\], {said}"
    with pytest.raises(DataError, match=expected):
        batch_of(make)


def test_an_error_of_a_collate_function_or_of_unpack_is_said_with_its_name():
    def mine(items):
        return items[0]["nothing"]

    expected = r"^mine can't make a batch of examples \[7, 2, 5\], each a dict: KeyError: 'nothing'"
    with pytest.raises(DataError, match=expected):
        batch_of(lambda i: {}, collate=mine)
    with pytest.raises(
        DataError, match=r"^unpack can't take a batch that is a dict with \['a'\]: "
    ):
        collated({"a": X}, unpack=lambda batch: (batch["img"], batch["label"]))
    with pytest.raises(DataError, match=r"^unpack returned Tensor, expected \(inputs, labels\)"):
        collated((X, Y), unpack=lambda batch: batch[0])


def test_one_client_that_cannot_read_a_batch_does_not_end_the_others_run():
    parts = [make_data(8, seed=1), BrokenItem(lambda i: (X[i], i % 3), 8)]
    entry = run_split(PSL, plain_net, parts, rounds=1).history[0]
    (left,) = entry.left_out
    assert left.client == "1"
    assert left.reason.startswith("DataError: example 5 can't be read: OSError: truncated file")
    assert entry.rows == 8 + 4 * (5 in next(epoch_batches(8, "1", 4))[1])


def test_augmentations_are_seeded_through_any_loader():
    def noisy(index):
        return X[index] + float(np.random.rand()), index  # noqa: NPY002

    def smashed(cache):
        source = DataLoader(Items(noisy), sampler=[1, 2, 3, 4, 5, 6])
        app = split_app(plain_net, [source], tests=[source])
        drive = Drive(app, plain_net, cache=cache)
        first = drive.begin(local_steps=2, lr=0.0)
        second = drive.step(1, torch.zeros_like(first.smashed))
        return first.smashed, second.smashed, drive.evaluate().smashed

    for one, other in zip(smashed(True), smashed(False), strict=True):
        assert torch.equal(one, other)
