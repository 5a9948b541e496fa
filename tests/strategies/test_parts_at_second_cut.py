"""Client parts at a U-shaped split's second cut: compressed, clipped and noisy, by hand."""

import logging

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
    weights_of,
    whole_of,
)
from torch import nn

from flsplit import LocalGrid, client_app
from flsplit.client_parts import (
    ClientPart,
    Clip,
    Difference,
    HalfPrecision,
    Int8,
    LabelNoise,
    LowRank,
    Noise,
    TopK,
)
from flsplit.errors import ConfigError
from flsplit.strategies import PSL, SplitFedV2

CUTS = ("front", "middle")
PARTS = make_parts([12, 10])
DOWN, UP = "outputs", "output-gradient"
RECORDS = {DOWN: "outputs-down", UP: "output-gradients-up"}


class Wire(WrappedGrid):
    """Keeps the contents that crossed in training, by record."""

    def __init__(self, inner):
        super().__init__(inner)
        self.bytes = dict.fromkeys(RECORDS, 0)

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        replies = list(self.inner.send_and_receive(messages, timeout=timeout))
        for one in (*messages, *replies):
            if one.metadata.message_type == "train.tail":
                for name in RECORDS.keys() & one.content.keys():
                    self.bytes[name] += sum(len(a.data) for a in one.content[name].values())
        return replies


def run(
    parts, *, cls=PSL, rounds=2, cache=True, wrap=None, data=PARTS, own=(), cut=CUTS, **options
):
    model = fresh(plain_net)
    app = client_app(
        model=lambda: fresh(plain_net), cut=cut, device="cpu", client_parts=own,
        data=lambda c: (data[c.node_config["partition-id"]],) * 2,
    )  # fmt: skip
    shared = {"share_client_segments": True} if cls is PSL else {}
    strategy = cls(
        model=model, cut=cut, device="cpu", seed=SEED, server_lr=LR, client_parts=parts,
        **({"batch_size": 4} | shared | options),
    )  # fmt: skip
    grid = LocalGrid(app, len(data), cache=cache, progress=False)
    return strategy.start(wrap(grid) if wrap else grid, ArrayRecord(model.state_dict()), rounds)


def there_and_back(part, tensor):
    return part.unpack(part.pack(tensor.detach(), {}), {})


def test_one_step_by_hand():
    """What the last layers see is what came; they learn from their own gradient, exactly."""
    data = PARTS[:1]
    parts = [Clip(0.05, place=UP), Int8(DOWN, feedback=False), TopK(0.5, UP)]
    found = whole_of(run(parts, data=data, rounds=1, batch_size=12))
    model = fresh(plain_net)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    inputs, labels = data[0].tensors
    (rows,) = next(epoch_batches(12, "0", 12))
    outputs = model.middle(model.front(inputs[rows]))
    leaf = there_and_back(parts[1], outputs).requires_grad_()
    nn.functional.cross_entropy(model.head(leaf), labels[rows]).backward()
    lengths = leaf.grad.flatten(1).norm(dim=1)
    assert (lengths > 0.05).any()
    clipped = leaf.grad * (0.05 / lengths.clamp(min=0.05))[:, None]
    outputs.backward(there_and_back(parts[2], clipped))
    optimizer.step()
    assert_close(found, model.state_dict(), 1e-6)


def test_a_compression_that_loses_nothing_changes_nothing():
    found = run([TopK(1.0, DOWN), TopK(1.0, UP)])
    assert_bit_equal(whole_of(found), whole_of(run([])))


@pytest.mark.parametrize(
    ("part", "bytes_of_row"),
    # of a row of n numbers in a batch of b: by hand
    [
        (Int8(DOWN), lambda n, b: n + 8),
        (HalfPrecision(UP), lambda n, b: 2 * n),
        (TopK(0.5, UP), lambda n, b: 4 * round(n / 2) + -(-n // 8)),
        (LowRank(2, DOWN), lambda n, b: 4 * 2 * (b + n) / b),
    ],
    ids=lambda one: one.name if isinstance(one, ClientPart) else "",
)
def test_bytes_shrink_and_are_counted(part, bytes_of_row):
    wires = []

    def wrap(grid):
        wires.append(Wire(grid))
        return wires[-1]

    data = make_parts([12, 8])  # batches of 4 alone
    found, plain = (run(parts, wrap=wrap, rounds=1, data=data) for parts in ([part], []))
    n = fresh(plain_net).middle(torch.zeros(1, 6)).numel()
    for place, category in RECORDS.items():
        counted, before = (one.history[0].traffic.logical[category] for one in (found, plain))
        assert [counted, before] == [wire.bytes[place] for wire in wires]
        assert before == 20 * 4 * n
        assert counted == (20 * bytes_of_row(n, 4) if place == part.place else before)
    rest = found.history[0].traffic.logical
    assert rest["activations-up"] == plain.history[0].traffic.logical["activations-up"]
    assert rest["evaluation-down"] == plain.history[0].traffic.logical["evaluation-down"] > 0


@pytest.mark.parametrize("cls", [PSL, SplitFedV2])
def test_a_client_that_is_built_anew_computes_the_same(cls):
    parts = [
        Noise(0.1), Int8(), Int8("cut-gradient"),
        Noise(0.01, UP), TopK(0.3, DOWN, feedback=True), TopK(0.3, UP, feedback=True),
    ]  # fmt: skip
    cached, anew = (run(parts, cls=cls, rounds=3, cache=one) for one in (True, False))
    assert_bit_equal(weights_of(anew.arrays), weights_of(cached.arrays))
    assert anew.history.numbers() == cached.history.numbers()
    without = run([*parts[:-1], TopK(0.3, UP)], cls=cls, rounds=3)
    assert without.history[-1].evaluation != cached.history[-1].evaluation  # it is remembered


def test_a_resumed_run_goes_on_with_what_was_remembered(tmp_path):
    parts = [TopK(0.3, DOWN, feedback=True), Int8(UP)]

    def start(rounds, name, *, resume=False):
        app = client_app(
            model=lambda: fresh(plain_net), cut=CUTS, device="cpu",
            data=lambda c: (PARTS[c.node_config["partition-id"]],) * 2,
        )  # fmt: skip
        strategy = SplitFedV2(
            model=fresh(plain_net), cut=CUTS, device="cpu", seed=SEED, server_lr=LR, batch_size=4,
            client_parts=parts, checkpoint_dir=str(tmp_path / name / "server"), resume=resume,
        )  # fmt: skip
        grid = LocalGrid(app, 2, progress=False, state_dir=tmp_path / name / "clients")
        return strategy.start(grid, ArrayRecord(fresh(plain_net).state_dict()), rounds)

    whole = start(4, "a")
    start(2, "b")
    resumed = start(4, "b", resume=True)
    assert_bit_equal(weights_of(resumed.arrays), weights_of(whole.arrays))


class Seen(ClientPart):
    """Notes what a client's step shows to a part at the second cut."""

    name = "seen"
    seen: list = []  # noqa: RUF012

    def output_gradient(self, where, gradient):
        Seen.seen.append((where.client, where.step, where.labels, gradient.shape))
        return gradient * 0


def test_a_part_of_ones_own_is_told_the_labels():
    Seen.seen.clear()
    before = fresh(plain_net).state_dict()
    found = whole_of(run([Seen()], own=[Seen], rounds=1, data=PARTS[:1], local_steps=1))
    (client, step, labels, shape) = Seen.seen[0]
    (rows, *_) = next(epoch_batches(12, "0", 4))
    assert (client, step) == ("0", 0)
    assert torch.equal(labels, PARTS[0].tensors[1][rows])
    assert shape[0] == 4
    moved = {name for name in before if not torch.equal(found[name], before[name])}
    assert moved == {name for name in before if name.startswith("head")}  # nothing went up


def test_noise_hides_labels_in_what_goes_up():
    """Two classes: the directions of gradients tell them, until noise is added."""
    two = make_parts([64])
    two[0].tensors[1].remainder_(2)
    gradients = []

    class Looks(WrappedGrid):
        def send_and_receive(self, messages, *, timeout=None):
            replies = list(self.inner.send_and_receive(list(messages), timeout=timeout))
            for one in replies:
                if UP in one.content:
                    (array,) = one.content[UP].values()
                    gradients.append(torch.from_numpy(array.numpy().copy()))
            return replies

    found = []
    for parts in ([], [LabelNoise(16.0, place=UP)]):
        gradients.clear()
        run(parts, wrap=Looks, data=two, rounds=1, batch_size=64)
        directions = torch.nn.functional.normalize(gradients[0].flatten(1))
        (rows,) = next(epoch_batches(64, "0", 64))
        labels = two[0].tensors[1][rows]
        mean = directions[labels == 0].mean(0) - directions[labels == 1].mean(0)
        found.append(float(((directions @ mean > 0) == (labels == 0)).float().mean()))
    assert found[0] > 0.95
    assert found[1] < 0.8


@pytest.mark.parametrize("part", [Int8(DOWN), TopK(0.1, UP), Clip(1.0, place=UP), Noise(1.0, UP)])
def test_a_second_cut_that_is_not_there_is_refused(part):
    with pytest.raises(ConfigError, match=f"'{part.name}': place is '{part.place}'.*cut once"):
        run([part], cut="front")


@pytest.mark.parametrize("cls", [Int8, HalfPrecision, TopK, LowRank, Clip, Noise, LabelNoise])
def test_other_places_are_refused(cls):
    first = {Noise: {"sigma": 1.0}, LabelNoise: {"power": 1.0}}.get(cls, {})
    with pytest.raises(ConfigError, match=r"place is 'outside', expected '.*'output-gradient'"):
        cls(**first, place="outside")
    with pytest.raises(TypeError):
        Difference(place=UP)


@pytest.mark.parametrize(
    ("parts", "warned"),
    [
        ([Int8()], ["'int8' stands at the first cut alone (place='smashed')"]),
        ([TopK(0.1, "cut-gradient"), Int8(), Noise(0.1, UP)], ["'top-k' stands at the first"]),
        ([Clip(1.0), Noise(0.1)], ["'clip' stands at", "'noise' stands at"]),
        ([Int8(), HalfPrecision(UP)], []),
        ([Noise(0.1, "cut-gradient"), Clip(1.0, "batch", "gradients")], []),
        ([LabelNoise(1.0)], ["the clients have the labels: place='output-gradient' hides"]),
    ],
)
def test_what_the_second_cut_goes_without_is_said_once(parts, warned, caplog):
    with caplog.at_level(logging.WARNING, logger="flsplit"):
        run(parts, rounds=2, local_steps=1)
    messages = [one.getMessage() for one in caplog.records if "client part" in one.getMessage()]
    assert len(messages) == len(warned)
    for message, expected in zip(messages, warned, strict=True):
        assert expected in message
