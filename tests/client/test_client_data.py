"""Which examples come in which order, and how a batch becomes inputs and labels."""

import numpy as np
import pytest
import torch
from driving import Drive, RefusedError, some_gradient
from reference import SEED, epoch_batches, make_data, make_parts, plain_net, split_app
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset


def numbered(num_examples):
    """Examples whose label is their index."""
    return TensorDataset(torch.randn(num_examples, 8), torch.arange(num_examples))


def drawn(num_examples, rounds=1, client=0, num_clients=1, cache=True, source=None, **plan):
    """Return the indices of the examples in each step of each round."""
    data = numbered(num_examples) if source is None else source
    drive = Drive(
        split_app(plain_net, [data] * num_clients), plain_net,
        cache=cache, client=client, num_clients=num_clients,
    )  # fmt: skip
    seen = []
    for _ in range(rounds):
        drive.train_round(lambda step, reply: seen.append(reply.labels.tolist()), **plan)
    return seen


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
def test_an_epoch_goes_over_all_examples_in_an_order_of_its_own(cache):
    seen = drawn(10, rounds=2, cache=cache)
    expected = epoch_batches(10, "0", 4)
    assert seen == next(expected) + next(expected)
    assert [len(batch) for batch in seen] == [4, 4, 2] * 2
    for epoch in (seen[:3], seen[3:]):
        assert sorted(index for batch in epoch for index in batch) == list(range(10))
    assert seen[:3] != seen[3:]


def test_order_depends_on_seed_and_name_alone():
    assert drawn(10) == drawn(10, num_clients=5)
    assert drawn(10) != drawn(10, client=1, num_clients=5)
    assert drawn(10) != drawn(10, seed=SEED + 1)
    torch.manual_seed(12345)
    assert drawn(10) == drawn(10, lr=0.3)


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
def test_local_steps_go_on_in_the_epoch_where_the_last_round_stopped(cache):
    seen = drawn(10, rounds=4, local_steps=2, cache=cache)
    expected = epoch_batches(10, "0", 4)
    assert seen == (next(expected) + next(expected) + next(expected))[:8]


def test_local_steps_may_be_more_than_an_epoch():
    expected = epoch_batches(10, "0", 4)
    assert drawn(10, local_steps=5) == (next(expected) + next(expected))[:5]


def test_local_epochs_are_whole_epochs():
    expected = epoch_batches(10, "0", 4)
    assert drawn(10, local_epochs=2) == next(expected) + next(expected)


def test_drop_last_leaves_the_ragged_batch_out():
    seen = drawn(10, rounds=2, drop_last=True)
    expected = epoch_batches(10, "0", 4, drop_last=True)
    assert seen == next(expected) + next(expected)
    assert [len(batch) for batch in seen] == [4, 4, 4, 4]
    assert drawn(8, drop_last=True) == drawn(8)


def test_a_batch_larger_than_the_data_is_all_the_data():
    (batch,) = drawn(3, batch_size=100)
    assert sorted(batch) == [0, 1, 2]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda data: DataLoader(data, batch_size=3, shuffle=False),
        lambda data: DataLoader(data, batch_size=7, shuffle=True, drop_last=True),
        lambda data: Subset(data, range(10)),
        lambda data: [data[index] for index in range(10)],
    ],
    ids=["loader", "shuffling-loader", "subset", "list"],
)
def test_data_sets_and_loaders_give_the_same_batches(wrap):
    """Order and batch size are the server's; a DataLoader only says what and how to collate."""
    assert drawn(10, source=wrap(numbered(10))) == drawn(10)


class Records(Dataset):
    """Examples as Hugging Face's data sets give them."""

    def __init__(self, data):
        self.inputs, self.labels = data.tensors

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return {"img": self.inputs[index], "label": self.labels[index]}


class RecordsAtOnce(Records):
    """The same, batch by batch."""

    def __getitems__(self, indices):
        return [self[index] for index in indices]


@pytest.mark.parametrize("kind", [Records, RecordsAtOnce])
@pytest.mark.parametrize("loader", [False, True], ids=["data set", "loader"])
def test_batches_of_dicts_are_unpacked(kind, loader):
    data = make_data(6, seed=5)
    records = DataLoader(kind(data), batch_size=2) if loader else kind(data)
    app = split_app(plain_net, [records], unpack=lambda batch: (batch["img"], batch["label"]))
    reply = Drive(app, plain_net).begin()
    plain = Drive(split_app(plain_net, [data]), plain_net).begin()
    assert torch.equal(reply.smashed, plain.smashed)
    assert torch.equal(reply.labels, plain.labels)


def test_a_dict_whose_keys_the_model_does_not_take_is_refused_with_a_hint():
    drive = Drive(split_app(plain_net, [Records(make_data(4, seed=0))]), plain_net)
    with pytest.raises(RefusedError, match=r"a dict with \['img'\].*argument 'img'.*unpack="):
        drive.begin()


def test_a_loaders_collate_function_is_used():
    def collate(items):
        inputs, labels = zip(*items, strict=True)
        return torch.stack(inputs) * 0, torch.stack(labels)

    loader = DataLoader(make_data(4, seed=0), collate_fn=collate)
    reply = Drive(split_app(plain_net, [loader]), plain_net).begin()
    assert torch.equal(reply.smashed[0], reply.smashed[3])


class NumPyNoise(Dataset):
    """A transform that draws from NumPy's global generator."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        inputs, label = self.data[index]
        return inputs + float(np.random.rand()), label  # noqa: NPY002


def test_transforms_draw_from_the_seed_and_differ_from_step_to_step():
    def smashed(cache):
        drive = Drive(
            split_app(plain_net, [NumPyNoise(make_parts([1])[0])]), plain_net, cache=cache
        )
        reply = drive.begin(local_steps=2, lr=0.0)
        return reply.smashed, drive.step(1, some_gradient(0, reply)).smashed

    first, again = smashed(cache=True), smashed(cache=False)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])
