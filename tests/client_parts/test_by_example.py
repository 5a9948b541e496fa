"""What is kept of single examples: by a plain twin that has a dict of them."""

import pytest
import torch
from flwr.app import ArrayRecord
from reference import (
    LR,
    SEED,
    WrappedGrid,
    assert_bit_equal,
    assert_close,
    epoch_batches,
    fresh,
    make_parts,
    plain_net,
    run_split,
    whole_of,
)
from torch import nn
from torch.utils.data import DataLoader

from flsplit import LocalGrid, client_app
from flsplit.client_parts import Difference, Int8, LowRank, Shuffle, TopK, make_part
from flsplit.client_parts.by_example import keep, kept
from flsplit.errors import ConfigError
from flsplit.strategies import PSL

PARTS = make_parts([12])
LOST = TopK(0.3, feedback="example")


class Twin:
    """One example after the other: what arrives, and what is kept of it."""

    def __init__(self, part):
        self.part, self.kept = part, {}
        self.differs = isinstance(part, Difference)
        self.plain = Int8(feedback=False) if self.differs else TopK(part.share)

    def arrives(self, tensor, rows):
        """Return what arrives of ``(b, ...)``."""
        return torch.stack([self._one(*pair) for pair in zip(tensor, rows, strict=True)])

    def _one(self, row, example):
        before = self.kept.get(example, torch.zeros_like(row))
        meant = (row - before if self.differs else row + before)[None]
        found = self.plain.unpack(self.plain.pack(meant, {}), {})[0]
        self.kept[example] = before + found if self.differs else meant[0] - found
        return self.kept[example] if self.differs else found


@pytest.mark.parametrize("part", [LOST, Difference()], ids=lambda one: one.name)
@pytest.mark.parametrize("shuffled", [True, False])
def test_an_example_is_followed_wherever_it_stands(part, shuffled):
    """Three epochs in ragged batches give the same for every example, in whatever order."""
    rng = torch.Generator().manual_seed(0)
    data, drift = torch.randn(2, 7, 3, 5, generator=rng)
    here, there, twin = {}, {}, Twin(part)
    for epoch in range(3):
        order = torch.randperm(7, generator=rng) if shuffled else torch.arange(7)
        came = torch.empty_like(data)
        for rows in order.split(3):
            now = data[rows] + 0.1 * epoch * drift[rows]
            came[rows] = part.unpack(part.pack(now, here, rows), there)
        expected = twin.arrives(data + 0.1 * epoch * drift, range(7))
        assert torch.equal(came, expected)
    if isinstance(part, Difference):
        assert sorted(here) == sorted(there) == ["base", "rows", "times"]
        assert all(torch.equal(here[name], there[name]) for name in here)
    else:
        assert not there  # only who sends remembers


def test_the_same_again_is_a_difference_of_nothing():
    part, here, there = Difference(), {}, {}
    data = torch.arange(256.0).mul(0.5).sub(3).repeat(4, 1)  # of 256 steps: it arrives exactly
    data[1] *= 2
    assert torch.equal(part.unpack(part.pack(data, here, torch.arange(4)), there), data)
    order = torch.tensor([2, 0, 3, 1])
    packed = part.pack(data[order], here, order)
    assert not any(packed.pieces[name].any() for name in ("steps", "low", "step"))
    assert packed.pieces["rows"].tolist() == order.tolist()
    assert packed.pieces["times"].tolist() == [1] * 4
    assert torch.equal(part.unpack(packed, there), data[order])


def by_hand(part, *, at_second_cut=False, epochs=3, batch_size=5):
    """Return the weights after some epochs of one client with a part."""
    model, twin = fresh(plain_net), Twin(part)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    inputs, labels = PARTS[0].tensors
    for _, batches in zip(range(epochs), epoch_batches(12, "0", batch_size), strict=False):
        for rows in batches:
            optimizer.zero_grad()
            own = model.front(inputs[rows])
            if at_second_cut:
                own = model.middle(own)
            sent = own if at_second_cut else twin.arrives(own.detach(), rows)
            leaf = sent.detach().requires_grad_()
            out = model.head(leaf if at_second_cut else model.middle(leaf))
            nn.functional.cross_entropy(out, labels[rows]).backward()
            own.backward(twin.arrives(leaf.grad, rows) if at_second_cut else leaf.grad)
            optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("part", [LOST, Difference()], ids=lambda one: one.name)
def test_three_epochs_by_hand(part, cache):
    found = run_split(
        PSL, plain_net, PARTS, client_parts=[part], rounds=3, local_epochs=1, batch_size=5,
        share_client_segments=True, cache=cache,
    )  # fmt: skip
    assert_close(whole_of(found), by_hand(part), 1e-6)


@pytest.mark.parametrize("cache", [True, False])
def test_three_epochs_at_the_second_cut_by_hand(cache):
    cut, up = ("front", "middle"), TopK(0.3, "output-gradient", feedback="example")
    app = client_app(model=lambda: fresh(plain_net), cut=cut, device="cpu", data=lambda _: PARTS[0])
    model = fresh(plain_net)
    strategy = PSL(
        model=model, cut=cut, device="cpu", seed=SEED, server_lr=LR, client_parts=[up],
        batch_size=5, local_epochs=1, share_client_segments=True, fraction_evaluate=0.0,
    )  # fmt: skip
    grid = LocalGrid(app, 1, cache=cache, progress=False)
    found = strategy.start(grid, ArrayRecord(model.state_dict()), 3)
    assert_close(whole_of(found), by_hand(up, at_second_cut=True), 1e-6)


@pytest.mark.parametrize("part", [LOST, Difference()], ids=lambda one: one.name)
def test_rows_in_a_secret_order_are_known_all_the_same(part):
    """The mean over a batch doesn't ask for the order, and neither does what is kept."""
    options = {"rounds": 3, "share_client_segments": True, "batch_size": 5, "local_epochs": 1}
    found, plain = (
        run_split(PSL, plain_net, PARTS, client_parts=parts, **options)
        for parts in ([Shuffle(), part], [part])
    )
    assert_close(whole_of(found), whole_of(plain), 1e-6)


def test_differences_tell_the_server_which_example_a_row_is():
    """As docs/security.md says; what is fed back at the client doesn't."""

    class Wire(WrappedGrid):
        def send_and_receive(self, messages, *, timeout=None):
            replies = list(self.inner.send_and_receive(messages, timeout=timeout))
            for one in replies:
                for name, array in one.content.array_records.get("smashed-data", {}).items():
                    pieces.setdefault(name.partition("|")[2], []).append(array.numpy())
            return replies

    for part, known in ((Difference(), {"low", "rows", "step", "steps", "times"}), (LOST, None)):
        pieces = {}
        options = {"client_parts": [Shuffle(), part], "rounds": 1, "fraction_evaluate": 0.0}
        run_split(PSL, plain_net, PARTS, wrap=Wire, **options)
        assert {*pieces} == (known or {"bits", "numbers"})
        if known:
            batches = next(epoch_batches(12, "0", 4))
            assert [sorted(rows) for rows in pieces["rows"]] == [sorted(rows) for rows in batches]
            assert [rows.tolist() for rows in pieces["rows"]] != batches  # shuffled they are


@pytest.mark.parametrize("part", [LOST, Difference()], ids=lambda one: one.name)
def test_an_example_may_be_twice_in_a_batch(part):
    here, there = {}, {}
    data = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([5, 2, 5])
    part.unpack(part.pack(data, here, rows), there)
    assert here["rows"].tolist() == [5, 2]
    last, _ = kept(here, torch.tensor([5]), (4,))
    twin = Twin(part)
    twin.arrives(data[2:], [5])
    assert torch.equal(last[0], twin.kept[5])
    loader = DataLoader(PARTS[0], sampler=[0, 1, 1, 2, 3, 3, 3, 4])
    found = run_split(PSL, plain_net, [loader], client_parts=[part], batch_size=8)
    assert [entry.left_out for entry in found.history] == [[], []]


def test_what_there_is_no_room_for_is_forgotten_at_both_ends():
    room = 3 * (4 * 5 + 12)  # three examples of five numbers
    part, here, there = Difference(room), {}, {}
    data = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    times = []
    for rows in ([0, 1], [2, 3], [1, 0], [4], [1, 2]):
        packed = part.pack(data[rows], here, torch.tensor(rows))
        times.append(packed.pieces["times"].tolist())
        part.unpack(packed, there)
        assert here["rows"].tolist() == there["rows"].tolist()
        assert len(here["rows"]) <= 3
        assert torch.equal(here["base"], there["base"])
    # After [2, 3] the first is gone, and comes as new; 1 was there, and 2 had to go.
    assert times == [[0, 0], [0, 0], [1, 0], [0], [2, 0]]
    memory = {}
    keep(memory, torch.tensor([0, 1]), data[:2], torch.ones(2, dtype=torch.int32), most_bytes=1)
    assert memory["rows"].tolist() == [1]  # one at least


def test_a_client_that_begins_anew_forgets_no_later_than_its_server():
    part, there = Difference(3 * 32), {}
    data = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    for steps in ([[0, 1], [2]], [[3], [0, 4], [5, 0], [4]]):
        here = {}  # the second time it has lost what it kept
        for rows in steps:
            found = part.unpack(part.pack(data[rows], here, torch.tensor(rows)), there)
            assert_close({"": found}, {"": data[rows]}, 0.02)


def test_room_that_is_scarce_changes_what_is_sent_alone():
    """With room for one example nearly all come as new, as with Int8."""
    options = {"share_client_segments": True, "rounds": 2}
    scarce = run_split(PSL, plain_net, PARTS, client_parts=[Difference(1)], **options)
    plain = run_split(PSL, plain_net, PARTS, client_parts=[Int8(feedback=False)], **options)
    assert_close(whole_of(scarce), whole_of(plain), 1e-3)
    assert not any(entry.left_out for entry in scarce.history)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (
            lambda: TopK(0.1, "cut-gradient", feedback="example"),
            "'top-k': feedback is 'example' at 'cut-gradient', which the server sends",
        ),
        (lambda: LowRank(4, "outputs", feedback="example"), "'low-rank': feedback is 'example'"),
        (lambda: Int8(feedback="each"), "feedback is 'each', expected a bool or 'example'"),
        (lambda: Difference(0), "most_bytes is 0, expected an integer from 1"),
        (lambda: Difference(True), "most_bytes is True"),
        (lambda: Difference().pack(torch.zeros(2, 3), {}), "one for each row: there are 2 rows"),
        (
            lambda: LOST.pack(torch.zeros(2, 3), {}, torch.arange(3)),
            "there are 2 rows and 3 examples",
        ),
    ],
)
def test_what_is_refused(make, error):
    with pytest.raises(ConfigError, match=error):
        make()


def test_they_are_made_by_name():
    part = make_part({"name": "top-k", "share": 0.2, "feedback": "example"})
    assert part.arguments() == {"share": 0.2, "place": "smashed", "feedback": "example"}
    assert make_part({"name": "difference", "most-bytes": 10}).arguments() == {"most_bytes": 10}


def test_feedback_by_example_costs_no_bytes():
    options = {"rounds": 1, "share_client_segments": True}
    found, plain = (
        run_split(PSL, plain_net, PARTS, client_parts=[part], **options)
        for part in (LOST, TopK(0.3))
    )
    assert found.history[0].traffic.logical == plain.history[0].traffic.logical
    assert_bit_equal(whole_of(found), whole_of(plain))  # nothing is kept in the first epoch
