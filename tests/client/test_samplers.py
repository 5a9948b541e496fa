"""A DataLoader's own sampler says which examples are gone over; the order follows from the seed."""

import logging
import random
import threading

import numpy as np
import pytest
import torch
from driving import Drive, RefusedError
from flwr.app import ArrayRecord
from reference import SEED, epoch_batches, fresh, plain_net, run_split, split_app, weights_of
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from flsplit import LocalGrid
from flsplit.message.shape import ShapeRequest
from flsplit.seeds import derive_seed, seeded
from flsplit.strategies import PSL

DATA = TensorDataset(torch.randn(20, 8), torch.arange(20))  # an example's label is its index
OWN = [3, 5, 7, 11, 13, 17, 19]


class Owned(Sampler):
    """Draws from generators of its own, which would go on from epoch to epoch."""

    def __init__(self, make, draw):
        self.generator, self.draw_from = make(), draw

    def __iter__(self):
        yield from self.draw_from(self.generator)

    def __len__(self):
        return 6


class InPlace(Sampler):
    """Shuffles its list where it lies, with NumPy's global generator."""

    def __init__(self):
        self.indices = list(OWN)

    def __iter__(self):
        np.random.shuffle(self.indices)  # noqa: NPY002
        return iter(self.indices)

    def __len__(self):
        return len(self.indices)


class Wrapping(Sampler):
    def __init__(self, inner):
        self.inner = inner

    def __iter__(self):
        return reversed(list(self.inner))

    def __len__(self):
        return len(self.inner)


def forever():
    return torch.Generator().manual_seed(1)


SAMPLERS = {
    "subset": lambda: SubsetRandomSampler(OWN),
    "subset with a generator": lambda: SubsetRandomSampler(OWN, generator=forever()),
    "weighted": lambda: WeightedRandomSampler(torch.arange(20.0), 9),
    "weighted, once each": lambda: WeightedRandomSampler([1.0] * 20, 9, replacement=False),
    "random with replacement": lambda: RandomSampler(DATA, replacement=True),
    "random, some": lambda: RandomSampler(DATA, num_samples=7),
    "random, more than there are": lambda: RandomSampler(DATA, num_samples=33),
    "sequential": lambda: SequentialSampler(range(7)),
    "list": lambda: list(OWN),
    "range": lambda: range(4, 9),
    "array": lambda: np.array(OWN),
    "tensor": lambda: torch.tensor(OWN),
    "torch's own": lambda: Owned(forever, lambda g: torch.randperm(6, generator=g)),
    "NumPy's own": lambda: Owned(lambda: np.random.default_rng(1), lambda g: g.permutation(6)),
    "NumPy's old own": lambda: Owned(
        lambda: np.random.RandomState(1),
        lambda g: g.permutation(6),
    ),
    "Python's own": lambda: Owned(lambda: random.Random(1), lambda g: g.sample(range(20), 6)),
    "in place": InPlace,
    "wrapping": lambda: Wrapping(SubsetRandomSampler(OWN, generator=forever())),
    "distributed": lambda: DistributedSampler(DATA, num_replicas=3, rank=1, seed=5),
}


def drawn(source, rounds=1, *, cache=True, client=0, num_clients=1, **plan):
    """Return the indices of the examples in each step of each round."""
    app = split_app(plain_net, [source] * num_clients)
    drive = Drive(app, plain_net, cache=cache, client=client, num_clients=num_clients)
    seen = []
    for _ in range(rounds):
        drive.train_round(lambda step, reply: seen.append(reply.labels.tolist()), **plan)
    return seen


def loader(sampler, **options):
    return DataLoader(DATA, sampler=sampler, **options)


def in_batches(indices, size=4):
    return [indices[start : start + size] for start in range(0, len(indices), size)]


@pytest.mark.parametrize(
    "name", ["subset", "weighted", "random with replacement", "random, some", "sequential"]
)
def test_torchs_samplers_yield_what_they_do_after_manual_seed(name):
    found = drawn(loader(SAMPLERS[name]()), rounds=3)
    expected = []
    for epoch in range(3):
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(SEED, "data", "0", epoch))
            expected += in_batches(list(SAMPLERS[name]()))
    assert found == expected


@pytest.mark.parametrize(
    ("name", "permuted"),
    [("torch's own", torch.randperm), ("subset with a generator", torch.randperm)],
)
def test_a_generator_of_the_samplers_own_is_seeded_alike(name, permuted):
    own = OWN if "subset" in name else range(6)
    for epoch, found in enumerate(in_batches(drawn(loader(SAMPLERS[name]()), rounds=2), 2)):
        rng = torch.Generator().manual_seed(derive_seed(SEED, "data", "0", epoch))
        order = permuted(len(own), generator=rng).tolist()
        assert [index for batch in found for index in batch] == [own[i] for i in order]


@pytest.mark.parametrize("name", SAMPLERS)
def test_with_and_without_a_cache_and_with_batches_of_any_size(name):
    def flat(**options):
        seen = drawn(loader(SAMPLERS[name]()), rounds=2, **options)
        return [index for batch in seen for index in batch]

    kept = flat()
    assert kept == flat(cache=False)
    assert kept == flat(batch_size=3, cache=False)
    torch.manual_seed(99)
    assert kept == flat(num_clients=2)


@pytest.mark.parametrize("name", SAMPLERS)
def test_its_length_is_the_number_of_examples(name):
    sampler = SAMPLERS[name]()
    reply = Drive(split_app(plain_net, [loader(sampler)]), plain_net).begin()
    assert reply.num_examples == len(sampler)
    assert reply.num_steps == -(-len(sampler) // 4)


@pytest.mark.parametrize(
    "name", [n for n in SAMPLERS if n not in ("sequential", "list", "range", "array", "tensor")]
)
def test_epochs_differ(name):
    seen = drawn(loader(SAMPLERS[name]()), rounds=2)
    half = len(seen) // 2
    assert seen[:half] != seen[half:]


@pytest.mark.parametrize("name", ["subset", "weighted", "Python's own", "in place"])
def test_order_depends_on_seed_and_name(name):
    first = drawn(loader(SAMPLERS[name]()))
    assert first != drawn(loader(SAMPLERS[name]()), seed=SEED + 1)
    assert first != drawn(loader(SAMPLERS[name]()), client=1, num_clients=2)


def test_an_order_that_is_given_is_kept():
    assert drawn(loader(list(OWN)), rounds=2) == in_batches(OWN) * 2


def test_replicas_stay_apart():
    """A distributed sampler's own seed says who has what: all of them draw from the same one."""
    parts = [
        [index for batch in drawn(loader(DistributedSampler(DATA, 2, rank))) for index in batch]
        for rank in range(2)
    ]
    assert sorted(parts[0] + parts[1]) == list(range(20))
    expected = DistributedSampler(DATA, 2, 0)
    expected.set_epoch(1)
    assert drawn(loader(DistributedSampler(DATA, 2, 0)), rounds=2)[3:] == in_batches(list(expected))


def test_local_steps_and_batch_sizes_go_over_a_sampler_too():
    whole = [i for b in drawn(loader(SubsetRandomSampler(OWN)), rounds=2) for i in b]
    parts = drawn(loader(SubsetRandomSampler(OWN)), local_steps=2, batch_sizes=(5, 6))
    assert [len(part) for part in parts] == [5, 6]
    assert parts[0] + parts[1] == whole[:11]
    last = drawn(loader(SubsetRandomSampler(OWN)), drop_last=True, rounds=2)
    assert last == [whole[:4], whole[7:11]]


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(DATA),
        lambda: DataLoader(DATA, shuffle=True),
        lambda: DataLoader(DATA, sampler=RandomSampler(DATA)),
        lambda: DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 4, False)),
    ],
)
def test_torchs_default_samplers_leave_the_order_to_flsplit(make):
    expected = epoch_batches(20, "0", 4)
    assert drawn(make(), rounds=2) == next(expected) + next(expected)


def test_a_batch_sampler_of_torchs_says_what_it_samples():
    source = DataLoader(DATA, batch_sampler=BatchSampler(SubsetRandomSampler(OWN), 2, True))
    assert drawn(source) == drawn(loader(SubsetRandomSampler(OWN)))


def test_only_own_examples_are_read_and_shaped():
    seen = set()

    class Shared(Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, index):
            seen.add(int(index))
            return DATA[index]

    source = DataLoader(Shared(), sampler=SubsetRandomSampler(OWN))
    app = split_app(plain_net, [source], tests=[source])
    drive = Drive(app, plain_net)
    drive.begin()
    drive.evaluate()
    drive._ask(ShapeRequest(1, "front"), "query.shape")
    assert seen == set(OWN)


class Uncopied(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        return DATA[index]

    def __deepcopy__(self, memo):
        raise AssertionError("large, or an open file")


@pytest.mark.parametrize("wrap", [lambda s: s, Wrapping, lambda s: Wrapping(Wrapping(s))])
def test_no_data_set_is_copied_with_its_sampler(wrap):
    data, base = Uncopied(), Uncopied()
    for source in (data, base):
        sampler = wrap(RandomSampler(source, num_samples=6))
        assert len(drawn(DataLoader(data, sampler=sampler))) == 2


@pytest.mark.parametrize("cache", [True, False])
def test_a_test_loaders_sampler_says_what_is_tested(cache):
    def tested():
        tests = [loader(SubsetRandomSampler(OWN))]
        drive = Drive(split_app(plain_net, [DATA], tests=tests), plain_net, cache=cache)
        drive.begin()
        return [i for batch in range(2) for i in drive.evaluate(batch, 4).labels.tolist()]

    found = tested()
    assert sorted(found) == OWN
    assert found == tested()
    with seeded(derive_seed(0, "test", "0")):
        assert found == list(SubsetRandomSampler(OWN))


def test_a_run_is_the_same_however_its_clients_live():
    class Labels(Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, index):
            return DATA[index][0], index % 3

    def weights(cache):
        parts = [DataLoader(Labels(), sampler=SubsetRandomSampler(range(i, i + 9))) for i in (0, 9)]
        return weights_of(run_split(PSL, plain_net, parts, cache=cache).arrays)

    for name, tensor in weights(True).items():
        assert torch.equal(tensor, weights(False)[name]), name


def test_a_run_that_was_resumed_goes_on_in_the_samplers_order(tmp_path):
    read = []

    class Labels(Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, index):
            read.append(int(index))
            return DATA[index][0], index % 3

    def run(rounds, name, **options):
        source = DataLoader(Labels(), sampler=SubsetRandomSampler(range(9), generator=forever()))
        grid = LocalGrid(
            split_app(plain_net, [source]),
            1,
            state_dir=tmp_path / f"{name}-clients",
            progress=False,
        )
        model = fresh(plain_net)
        folder = str(tmp_path / name)
        PSL(
            model=model, cut="front", batch_size=4, local_steps=2, checkpoint_dir=folder, **options
        ).start(grid, ArrayRecord(model.state_dict()), num_rounds=rounds)

    run(4, "whole")
    whole, read[:] = list(read), []
    run(2, "parts")
    run(4, "parts", resume=True)
    assert read == whole


# --- refused or said ---------------------------------------------------------------------------


class Endless(Sampler):
    def __iter__(self):
        while True:
            yield 0

    def __len__(self):
        return 5


class Short(Endless):
    def __iter__(self):
        yield from range(3)


class Unmeasured(Sampler):
    def __iter__(self):
        yield from range(3)


class Names(Short):
    def __iter__(self):
        yield from ("a", "b", "c", "d", "e")


class Locked(Short):
    def __init__(self):
        self.lock = threading.Lock()


class Batches(Sampler):
    def __iter__(self):
        yield [0, 1]
        yield [2]

    def __len__(self):
        return 2


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: loader(Endless()),
            "client '0': the sampler Endless of the DataLoader yields more indices in epoch 0, its",
        ),
        (
            lambda: loader(Short()),
            "Short of the DataLoader yields 3 indices in epoch 0, its length",
        ),
        (lambda: loader(Names()), "Names of the DataLoader failed in epoch 0, expected whole num"),
        (lambda: loader(Locked()), "Locked of the DataLoader failed .* pickle"),
        (lambda: loader(Unmeasured()), "returned a DataLoader with sampler=Unmeasured, which"),
        (lambda: loader(iter(OWN)), "returned a DataLoader with sampler=list_iterator, which"),
        (
            lambda: DataLoader(DATA, batch_sampler=Batches()),
            "returned a DataLoader with batch_sampler=Batches: how large",
        ),
        (
            lambda: DataLoader(DATA, batch_sampler=[[0, 1], [2]]),
            "returned a DataLoader with batch_sampler=list: how large",
        ),
        (
            lambda: DataLoader(DATA, batch_size=None),
            "returned a DataLoader with batch_size=None: its data set makes batches",
        ),
        (
            lambda: loader([0, 20]),
            r"examples \[0, 20\] can't be read: IndexError: .*client '0'",
        ),
        (lambda: loader([]), "client '0' has no training examples"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(make, said):
    with pytest.raises(RefusedError, match=rf"^DataError: .*{said}"):
        drawn(make())


class Counting(Sampler):
    """Knows its epoch by counting how often it was gone over."""

    def __init__(self):
        self.calls = 0

    def __iter__(self):
        self.calls += 1
        return iter([self.calls, 0])

    def __len__(self):
        return 2


class Told(Counting):
    def set_epoch(self, epoch):
        self.calls = epoch


def test_a_sampler_that_counts_epochs_by_itself_is_named(caplog):
    with caplog.at_level(logging.WARNING, "flwr"):
        assert drawn(loader(Counting()), rounds=3, experiment="a") == [[1, 0]] * 3
        (record,) = [r for r in caplog.records if "Counting" in r.getMessage()]
        assert "changes its 'calls'" in record.getMessage()
        assert "set_epoch" in record.getMessage()
        caplog.clear()
        assert drawn(loader(Told()), rounds=3) == [[1, 0], [2, 0], [3, 0]]
        assert not caplog.records
