"""U-shaped splits: clients have the first and the last layers, and their labels stay with them."""

import pytest
import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import FedAvg
from reference import (
    LR,
    OPTIMIZERS,
    SEED,
    WrappedGrid,
    assert_bit_equal,
    assert_close,
    fresh,
    make_parts,
    noisy_net,
    normed_net,
    numbered_batches,
    plain_net,
    train_in_turn,
    train_together,
    weights_of,
    whole_of,
)
from torch import nn
from torch.nn import functional

from flsplit import LocalGrid, client_app
from flsplit.client_parts import Clip, Noise, Proximal
from flsplit.errors import ConfigError, NotEnoughClientsError
from flsplit.message.arrays import to_tensor
from flsplit.privacy import Record, attack_labels, read_recording
from flsplit.strategies import (
    CSEFSL,
    EPSL,
    FSLSAGE,
    GAPSL,
    PSL,
    SFLGA,
    SGLR,
    CycleSL,
    SequentialSL,
    SplitFedV1,
    SplitFedV2,
)

CUTS = ("front", "middle")
AVERAGED = {"client_strategy": FedAvg(min_available_nodes=1, min_train_nodes=1)}
KEEPS_ALL = {"lgi": "off", "gda": "off", "loss_reduction": "mean", "shares": "examples"}
EXACT = [
    (SplitFedV1, {}),
    (PSL, AVERAGED),
    (SGLR, AVERAGED | {"phi": 0.0, "alpha": 0.0, "shares": "examples"}),
    (GAPSL, AVERAGED | KEEPS_ALL),
]


def train(
    sizes, *, method=PSL, build=plain_net, rounds=2, cache=True, cuts=CUTS, parts=None, wrap=None,
    app_options=None, grid=None, **options,
):  # fmt: skip
    parts = parts or make_parts(sizes, build)
    model = fresh(build)
    app = client_app(
        model=lambda: fresh(build), cut=cuts, device="cpu",
        data=lambda c: (parts[c.node_config["partition-id"]],) * 2, **(app_options or {}),
    )  # fmt: skip
    strategy = method(
        model=model, cut=cuts, batch_size=4, device="cpu", seed=SEED, **{"server_lr": LR} | options
    )
    grid = grid or LocalGrid(app, len(sizes), cache=cache, progress=False)
    result = strategy.start(wrap(grid) if wrap else grid, ArrayRecord(model.state_dict()), rounds)
    return grid, result


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("build", [normed_net, noisy_net])
def test_one_client_is_bit_equal_to_training_the_whole_model(build, optimizer, cache):
    _, result = train(
        (14,), build=build, rounds=3, server_optimizer=optimizer, share_client_segments=True,
        cache=cache, app_options={"optimizer": optimizer},
    )  # fmt: skip
    expected, _ = train_in_turn(build, make_parts([14], build), optimizer=optimizer, rounds=3)
    assert_bit_equal(whole_of(result), expected)


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("sizes", [(12, 12, 12), (4, 8, 12)], ids=["equal", "unequal"])
@pytest.mark.parametrize("method", EXACT, ids=lambda one: one[0].__name__)
def test_clients_averaged_every_step_are_training_on_the_concatenated_batch(method, sizes, cache):
    rounds, (kind, options) = 5, method
    _, result = train(sizes, method=kind, rounds=rounds, local_steps=1, cache=cache, **options)
    expected = train_together(sizes, rounds)
    assert_close(weights_of(result.arrays), expected, 1e-5)


@pytest.mark.parametrize(
    ("method", "options"),
    [(SequentialSL, {}), (SplitFedV1, {}), (SplitFedV2, {})],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_segments_that_are_handed_on_or_averaged_are_those_of_one_cut(method, options):
    """With one client of no BatchNorm, where the last layers are makes no difference."""
    _, found = train((10,), method=method, rounds=2, **options)
    _, expected = train((10,), method=method, rounds=2, cuts="front", **options)
    assert_close(weights_of(found.arrays), weights_of(expected.arrays), 1e-6)


def test_sequential_clients_are_bit_equal_to_training_in_turn_on_one_model():
    """The reference goes through one batch of each client at a time: so each has one."""
    _, result = train((4, 4, 4), method=SequentialSL, build=normed_net, rounds=3)
    parts = make_parts((4, 4, 4), normed_net)
    model = fresh(normed_net)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    streams = [numbered_batches(part, str(i), 4) for i, part in enumerate(parts)]
    for _ in range(3):
        for part, stream in zip(parts, streams, strict=True):
            rows = next(stream)
            loss = functional.cross_entropy(model(part.tensors[0][rows]), part.tensors[1][rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert_bit_equal(weights_of(result.arrays), model.state_dict())


PLACES = {"0": ("front.0", "middle"), "2": "front.1,middle.0", "default": ("front", "middle")}


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("method", EXACT, ids=lambda one: one[0].__name__)
def test_clients_that_are_cut_at_different_places_are_too(method, cache):
    rounds, (kind, options) = 4, method
    sizes = (4, 8, 12)
    _, found = train(
        sizes, method=kind, rounds=rounds, local_steps=1, cuts=PLACES, cache=cache, **options
    )
    _, expected = train(sizes, method=kind, rounds=rounds, local_steps=1, **options)
    assert_close(weights_of(found.arrays), weights_of(expected.arrays), 1e-5)
    evaluations = [run.history[-1].evaluation for run in (found, expected)]
    assert evaluations[0] == pytest.approx(evaluations[1], rel=1e-5)


def test_clients_of_different_places_are_asked_at_once():
    seen = watched(make_parts((8, 8, 8)), cuts=PLACES, rounds=1, fraction_evaluate=0.0)
    kinds = [kind for kind, _ in seen if kind.startswith("train") and "reply" not in kind]
    assert kinds == ["train.step"] * 3 + ["train.tail"] * 3 + ["train.finish"] * 3


@pytest.mark.parametrize(
    "app_options",
    [{}, {"max_grad_norm": 0.1}, {"autocast": torch.bfloat16}],
    ids=["plain", "clipped", "bfloat16"],
)
def test_what_else_a_client_does_is_the_same_without_a_cache(app_options):
    """Client parts, clipping, low precision, two epochs with ragged batches, and Adam."""
    parts = [Clip(1.0, per="batch"), Noise(0.1), Proximal(0.5)]
    runs = [
        train(
            (7, 10), build=noisy_net, rounds=2, local_epochs=2, cache=cache, client_parts=parts,
            share_client_segments=True, app_options=app_options | {"optimizer": torch.optim.Adam},
        )[1]
        for cache in (True, False)
    ]  # fmt: skip
    for name in "01":
        assert_bit_equal(*(weights_of(run.client_segments[name]) for run in runs))
    assert_bit_equal(*(weights_of(run.arrays) for run in runs))
    assert runs[0].history.numbers() == runs[1].history.numbers()


# --- evaluation ------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("batch_size", [3, 512])
def test_an_evaluation_is_that_of_the_whole_model(batch_size, cache):
    _, result = train(
        (10, 7), method=SplitFedV1, build=noisy_net, rounds=1, cache=cache,
        evaluate_batch_size=batch_size,
    )  # fmt: skip
    model = fresh(noisy_net)
    model.load_state_dict(weights_of(result.arrays))
    inputs, labels = (torch.cat(one) for one in zip(
        *(part.tensors for part in make_parts((10, 7), noisy_net)), strict=True
    ))  # fmt: skip
    outputs = model.eval()(inputs)
    found = result.history[0].evaluation
    assert found["num-examples"] == 17
    assert found["loss"] == pytest.approx(
        functional.cross_entropy(outputs, labels).item(), rel=1e-5
    )
    assert found["accuracy"] == pytest.approx((outputs.argmax(1) == labels).float().mean().item())


def test_some_batches_of_an_evaluation_are_enough():
    _, result = train((10, 3), rounds=1, evaluate_batch_size=4, evaluate_batches=1)
    assert result.history[0].evaluation["num-examples"] == 4 + 3


# --- what goes over the wire -----------------------------------------------------------------


class Watched(WrappedGrid):
    """Remembers all messages."""

    def __init__(self, inner):
        super().__init__(inner)
        self.seen = []

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        answers = list(self.inner.send_and_receive(messages, timeout=timeout))
        kinds = {one.metadata.message_id: one.metadata.message_type for one in messages}
        self.seen += [(one.metadata.message_type, one.content) for one in messages]
        self.seen += [
            (f"{kinds.get(one.metadata.reply_to_message_id, '')}, reply", one.content)
            for one in answers
        ]
        return answers


def watched(parts, **options):
    grids = []

    def wrap(grid):
        grids.append(Watched(grid))
        return grids[0]

    train([len(part) for part in parts], parts=parts, wrap=wrap, local_steps=1, **options)
    return grids[0].seen


def relabelled(parts):
    """Return the same with other labels."""
    return [torch.utils.data.TensorDataset(p.tensors[0], (p.tensors[1] + 1) % 3) for p in parts]


@pytest.mark.parametrize("method", [PSL, SplitFedV1, GAPSL, SGLR], ids=lambda one: one.__name__)
def test_nothing_but_gradients_tells_of_the_labels(method):
    """With other labels all messages of the first step are the same but for two gradients."""
    parts = make_parts((6, 5))
    options = {"method": method, "rounds": 1, "fraction_evaluate": 0.0}
    seen = [watched(one, **options) for one in (parts, relabelled(parts))]
    differ = set()
    for (kind, one), (other_kind, other) in zip(*seen, strict=True):
        assert kind == other_kind
        assert one.keys() == other.keys()
        for name, record in one.items():
            if isinstance(record, MetricRecord):
                assert not any("loss" in key or "accuracy" in key for key in record)
            if name == "labels":
                assert all(to_tensor(a, field="").numel() == 0 for a in record.values())
            elif name in one.array_records:
                for key, array in record.items():
                    pair = to_tensor(array, field=key), to_tensor(other[name][key], field=key)
                    assert pair[0].shape == pair[1].shape
                    if not torch.equal(*pair):
                        differ.add((kind, name))
            elif name in one.config_records:
                assert {**record} | {"experiment": ""} == {**other[name]} | {"experiment": ""}
    assert differ == {
        ("train.tail, reply", "output-gradient"), ("train.finish", "cut-gradient"),
    } | ({("train.finish, reply", "arrays")} if method is SplitFedV1 else set())  # fmt: skip


def test_a_batch_of_an_evaluation_tells_nothing_and_the_last_gives_sums():
    parts = make_parts((8, 8))
    seen = watched(parts, rounds=1, evaluate_batch_size=3)
    replies = [one for kind, one in seen if kind == "evaluate.tail, reply"]
    losses = [one["metrics"]["loss"] for one in replies]
    assert [loss == 0.0 for loss in losses] == [True, True, True, True, False, False]
    assert [one["metrics"]["num-examples"] for one in replies][-2:] == [8, 8]


def test_a_step_takes_one_exchange_more_and_the_ledger_counts_it():
    _, result = train((8, 8), rounds=1, fraction_evaluate=0.0)
    logical = result.history[0].traffic.logical
    assert logical["labels-up"] == 0
    assert logical["activations-up"] == logical["gradients-down-unicast"] == 16 * 6 * 4
    assert logical["outputs-down"] == logical["output-gradients-up"] == 16 * 10 * 4
    parts = make_parts((8, 8))
    seen = watched(parts, rounds=1, fraction_evaluate=0.0)
    kinds = [kind for kind, _ in seen if kind.startswith("train") and "reply" not in kind]
    assert kinds == ["train.step"] * 2 + ["train.tail"] * 2 + ["train.finish"] * 2


def test_training_has_no_loss_to_show():
    _, result = train((8, 8), method=GAPSL, rounds=1)
    entry = result.history[0]
    assert entry.loss is None
    assert entry.accuracy is None
    assert "leader-alignment.loss" not in entry.metrics
    assert entry.evaluation["loss"] > 0


def test_a_recording_has_the_gradient_at_the_second_cut_and_no_labels(tmp_path):
    parts = make_parts((12,))
    train((12,), parts=parts, rounds=1, callbacks=[Record(tmp_path, steps=1)])
    recording = read_recording(tmp_path)
    (step,) = recording.steps
    inputs, labels = parts[0].tensors
    rows = next(numbered_batches(parts[0], "0", 4))
    model = fresh(plain_net)
    outputs = model.middle(model.front(inputs[rows])).detach().requires_grad_()
    functional.cross_entropy(model.head(outputs), labels[rows]).backward()
    assert torch.equal(step.output_gradient, outputs.grad)
    assert step.labels.shape == (4, 0)
    with pytest.raises(ConfigError, match="truth"):
        attack_labels(recording)
    found = attack_labels(recording, lambda step: labels[rows])
    assert found["label-clusters"] == 1.0  # four rows, and nothing but their labels differs much


# --- faults ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [PSL, SplitFedV1, SplitFedV2, SequentialSL, GAPSL])
def test_a_client_with_a_bad_label_is_left_out_and_the_others_go_on(method):
    parts = make_parts((8, 8, 8))
    parts[2].tensors[1][:] = 99
    _, result = train((8, 8, 8), method=method, parts=parts, rounds=1, fraction_evaluate=0.0)
    entry = result.history[0]
    assert [one.client for one in entry.left_out] == ["2"]
    assert "label" in entry.left_out[0].reason
    assert entry.rows == 16


def test_what_the_others_train_is_as_if_the_bad_client_had_never_been_there():
    parts = make_parts((8, 8, 8), normed_net)
    good = train((8, 8), build=normed_net, parts=parts[:2], rounds=1, fraction_evaluate=0.0)[1]
    parts[2].tensors[1][:] = 99
    found = train((8, 8, 8), build=normed_net, parts=parts, rounds=1, fraction_evaluate=0.0)[1]
    assert_bit_equal(weights_of(found.arrays), weights_of(good.arrays))


def test_only_bad_clients_end_the_run():
    parts = make_parts((8,))
    parts[0].tensors[1][:] = 99
    with pytest.raises(NotEnoughClientsError, match="label"):
        train((8,), parts=parts, rounds=1)


@pytest.mark.parametrize("method", [PSL, SequentialSL, SplitFedV1], ids=lambda one: one.__name__)
def test_a_resumed_run_equals_one_without_interruption(method, tmp_path):
    options = {"method": method, "build": noisy_net, "server_optimizer": OPTIMIZERS["momentum"]}
    options["app_options"] = {"optimizer": OPTIMIZERS["momentum"]}
    _, whole = train((8, 8), rounds=3, **options)
    grid, _ = train((8, 8), rounds=2, checkpoint_dir=str(tmp_path), **options)
    _, resumed = train(
        (8, 8), rounds=3, checkpoint_dir=str(tmp_path), resume=True, grid=grid, **options
    )
    assert_bit_equal(weights_of(resumed.arrays), weights_of(whole.arrays))
    assert resumed.history[-1].evaluation == whole.history[-1].evaluation


def test_a_frozen_head_still_lets_the_last_layers_learn():
    def build():
        net = plain_net()
        net.front.requires_grad_(False)
        return net

    _, result = train((8,), build=build, rounds=1, share_client_segments=True)
    before, after = fresh(build).state_dict(), whole_of(result)
    assert torch.equal(before["front.0.weight"], after["front.0.weight"])
    assert not torch.equal(before["head.weight"], after["head.weight"])
    expected, _ = train_in_turn(build, make_parts([8]), optimizer=torch.optim.SGD, rounds=1)
    assert_bit_equal(after, expected)


def test_frozen_last_layers_let_the_first_ones_learn():
    def build():
        net = plain_net()
        net.head.requires_grad_(False)
        return net

    for cache in (True, False):
        _, result = train((8,), build=build, rounds=1, share_client_segments=True, cache=cache)
        expected, _ = train_in_turn(build, make_parts([8]), optimizer=torch.optim.SGD, rounds=1)
        assert_bit_equal(whole_of(result), expected)


class Skip(nn.Module):
    """The last layers use what the first ones made, and a weight of theirs."""

    def __init__(self):
        super().__init__()
        self.front = nn.Sequential(nn.Linear(8, 6), nn.Tanh())
        self.middle = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        first = self.front(x)
        second = torch.tanh(self.middle(first))
        return self.head(second + first + functional.linear(x, self.front[0].weight))


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
def test_the_last_layers_may_use_what_the_first_have_made(cache):
    _, result = train(
        (10,), build=Skip, cuts=("front", "middle"), rounds=2, cache=cache,
        share_client_segments=True,
    )  # fmt: skip
    expected, _ = train_in_turn(Skip, make_parts([10]), optimizer=torch.optim.SGD, rounds=2)
    assert_close(whole_of(result), expected, 1e-6)


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (EPSL, "labels or logits"), (CycleSL, "mixed rows"), (CSEFSL, "by itself"),
        (FSLSAGE, "by itself"),
    ],
)  # fmt: skip
def test_methods_that_need_labels_are_refused(method, why):
    with pytest.raises(ConfigError, match=f"{method.__name__} can't do without them: .*{why}"):
        method(model=plain_net(), cut=CUTS)


def test_sfl_ga_trains():
    _, result = train((8, 8), method=SFLGA, rounds=1, share_client_segments=True)
    own = [weights_of(result.client_segments[name])["front.0.weight"] for name in "01"]
    assert not torch.equal(own[0], fresh(plain_net).front[0].weight)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"loss": functional.mse_loss}, "give the loss to them"),
        ({"metrics": {"f1": nn.Module()}}, "metrics can't be computed here"),
        ({"cut": {"1": CUTS, "default": "front"}}, "all are cut twice"),
        ({"cut": ("front", "middle", "head")}, "two of them"),
    ],
)  # fmt: skip
def test_options_that_need_labels_are_refused(options, what):
    with pytest.raises(ConfigError, match=what):
        PSL(**{"model": plain_net(), "cut": CUTS} | options)


def test_a_loss_of_ones_own_is_the_clients():
    def smooth(logits, labels):
        return functional.cross_entropy(logits, labels, label_smoothing=0.2)

    found = train((8,), app_options={"loss": smooth}, rounds=1, share_client_segments=True)[1]
    expected = train((8,), cuts="front", loss=smooth, rounds=1, share_client_segments=True)[1]
    assert_close(whole_of(found), whole_of(expected), 1e-6)


def test_a_client_that_sends_labels_is_left_out():
    class Telling(WrappedGrid):
        def send_and_receive(self, messages, *, timeout=None):
            answers = list(self.inner.send_and_receive(messages, timeout=timeout))
            for one in answers:
                if one.content.get("labels") is not None:
                    labels = ArrayRecord({"0": torch.ones(4, dtype=torch.int64)}).values()
                    one.content["labels"] = ArrayRecord({"0": next(iter(labels))})
            return answers

    with pytest.raises(NotEnoughClientsError, match="keeps its labels"):
        train((8,), rounds=1, wrap=Telling)


def test_a_client_of_one_cut_is_no_client_of_two():
    parts = make_parts((8,))
    model = fresh(plain_net)
    app = client_app(model=lambda: fresh(plain_net), cut="front", data=lambda c: parts[0])
    grid = LocalGrid(app, 1, progress=False)
    strategy = PSL(model=model, cut=CUTS, device="cpu")
    with pytest.raises(NotEnoughClientsError, match="cuts the model at 'front,middle'"):
        strategy.start(grid, ArrayRecord(model.state_dict()), 1)
