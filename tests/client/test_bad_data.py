"""What a client's data can have wrong: the error says which client, and what."""

import pytest
import torch
from reference import make_data, make_parts, normed_net, plain_net
from tampering import initial_server_weights, server_weights, set_up, train
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from flsplit.client.batches import Examples
from flsplit.errors import DataError, NonFiniteError, NotEnoughClientsError
from flsplit.strategies import PSL, SequentialSL, SplitFedV1, SplitFedV2

STRATEGIES = [PSL, SequentialSL, SplitFedV1, SplitFedV2]


def assert_server_untouched(run):
    found = server_weights(run[0])
    for name, tensor in initial_server_weights(run).items():
        assert torch.equal(found[name], tensor), name


def assert_finite(arrays):
    for name, array in arrays.items():
        assert torch.from_numpy(array.numpy().copy()).isfinite().all(), name


# --- labels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_label_out_of_range(strategy):
    (bad,) = make_parts([4], normed_net)
    bad.tensors[1][2] = 3
    run = set_up([bad], strategy, build=normed_net)
    expected = r"^round 1, step 0: client '0': label 3 is out of range: .* 3 classes, 0 to 2"
    with pytest.raises(DataError, match=expected):
        train(run)
    assert_server_untouched(run)  # BatchNorm's buffers, too


def test_a_negative_label_in_a_later_round():
    (part,) = make_parts([4])
    steps = []

    def loss(logits, labels):
        steps.append(labels)
        if len(steps) == 1:
            part.tensors[1][0] = -7
        return nn.functional.cross_entropy(logits, labels)

    with pytest.raises(DataError, match=r"^round 2, step 0: client '0': label -7 is out of"):
        train(set_up([part], loss=loss), rounds=3)


def test_the_index_for_labels_to_ignore_is_none_to_complain_about():
    (part,) = make_parts([4])
    part.tensors[1][0] = -100
    assert train(set_up([part])).history[0].rows == 4


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_float_labels_with_cross_entropy(strategy):
    inputs, labels = make_data(4, seed=1).tensors
    run = set_up([TensorDataset(inputs, labels.float())], strategy)
    expected = r"^round 1, step 0: client '0': the loss can't take logits of shape \(4, 3\)"
    with pytest.raises(DataError, match=expected + r".*labels of shape \(4,\) and dtype torch\.fl"):
        train(run)
    assert_server_untouched(run)


def test_a_label_out_of_range_in_the_test_data():
    train_set, test_set = make_parts([4, 4])
    test_set.tensors[1][1] = 9
    run = set_up([train_set], client={"tests": [test_set]})
    expected = r"^evaluation of round 1, client '0': label 9 is out of range"
    with pytest.raises(DataError, match=expected):
        train(run)


# --- amounts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_empty_partition_is_left_out_and_named(strategy):
    parts = make_parts([8, 0, 8])
    result = train(set_up(parts, strategy), rounds=2)
    for entry in result.history:
        (left,) = entry.left_out
        assert (left.client, left.step) == ("1", 0)
        assert "client '1' has no training examples: its partition is empty" in left.reason
        assert entry.rows == 16


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_when_all_partitions_are_empty_the_run_ends_and_says_so(strategy):
    run = set_up(make_parts([0, 0]), strategy)
    with pytest.raises(NotEnoughClientsError) as caught:
        train(run)
    assert "round 1: 0 of 2 clients are left" in str(caught.value)
    for name in ("0", "1"):
        assert f"client {name!r} has no training examples" in str(caught.value)
    assert_server_untouched(run)


def test_a_partition_smaller_than_a_batch_with_drop_last():
    parts = make_parts([8, 3])
    result = train(set_up(parts, drop_last=True))
    (left,) = result.history[0].left_out
    assert left.client == "1"
    assert "client '1' has 3 examples, fewer than batch-size = 4, and drop-last" in left.reason


@pytest.mark.parametrize("cut", ["front", "middle"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_batch_of_one_in_front_of_batchnorm(strategy, cut):
    """After the pooling no position is left beside the batch: one row has no variance."""

    def build():
        return nn.Sequential(front_and_middle(), nn.Linear(5, 3))

    def front_and_middle():
        part = nn.Sequential()
        part.add_module("front", nn.Linear(8, 5))
        part.add_module("middle", nn.Sequential(nn.BatchNorm1d(5), nn.ReLU()))
        return part

    run = set_up(make_parts([5]), strategy, build=build, cut=f"0.{cut}")  # batches of 4 and 1
    if cut == "front":
        expected = r"^round 1, step 1: client '0': BatchNorm in the server segment can't train on"
        with pytest.raises(DataError, match=expected):
            train(run)
    else:
        expected = r"client '0': BatchNorm can't train on a batch of one.*drop-last"
        with pytest.raises(NotEnoughClientsError, match=expected):
            train(run)


def test_drop_last_helps_against_a_batch_of_one():
    def build():
        return nn.Sequential(
            *[nn.Linear(8, 5), nn.BatchNorm1d(5), nn.Linear(5, 5), nn.BatchNorm1d(5)],
            nn.Linear(5, 3),
        )

    run = set_up(make_parts([5]), build=build, cut="1", drop_last=True)
    assert train(run).history[0].rows == 4


# --- values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_values_that_are_not_finite_leave_their_client_out(strategy):
    parts = make_parts([8, 8, 8], normed_net)
    parts[1].tensors[0][:, 0, 2, 2] = torch.nan
    result = train(set_up(parts, strategy, build=normed_net))
    (left,) = result.history[0].left_out
    assert (left.client, left.step) == ("1", 0)
    expected = "NonFiniteError: smashed data of step 0 is NaN or infinite (client '1', round 1)"
    assert left.reason == expected
    assert result.history[0].rows == 16
    assert_finite(result.arrays)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_infinite_values_behind_a_tanh_leave_their_client_out(strategy):
    """The smashed data are finite then, but the gradient before the tanh is 0 times infinity."""
    parts = make_parts([8, 8])
    parts[1].tensors[0][:, 3] = torch.inf
    result = train(set_up(parts, strategy))
    (left,) = result.history[0].left_out
    assert left.client == "1"
    assert "gradient of the client segment in step 0 is NaN or infinite" in left.reason
    assert_finite(result.arrays)


def test_the_batchnorm_of_a_client_with_one_broken_batch_stays_as_it_was():
    """The forward pass that met the NaN never happened: neither mean nor counter moved."""
    (part,) = make_parts([4], normed_net)
    part.tensors[0][0] = torch.nan
    healthy = make_parts([4, 4], normed_net)[1]
    for cache in (True, False):
        run = set_up([part, healthy], build=normed_net, client={"tests": [healthy, healthy]})
        run[1]._cohort._cache = run[1]._cohort._cache if cache else None
        entry = train(run).history[0]
        assert [left.client for left in entry.left_out] == ["0"]
        assert entry.evaluation["num-examples"] == 8
        assert entry.evaluation["loss"] == entry.evaluation["loss"]  # NaN is not


def test_all_clients_with_nan_end_the_run():
    parts = make_parts([4])
    parts[0].tensors[0][0] = torch.nan
    run = set_up(parts)
    with pytest.raises(NotEnoughClientsError, match=r"NonFiniteError.*client '0', round 1"):
        train(run)
    assert_server_untouched(run)


def test_test_data_with_nan_leave_their_client_out_of_the_evaluation():
    parts, tests = make_parts([4, 4]), make_parts([6, 6])
    tests[0].tensors[0][0] = torch.nan
    entry = train(set_up(parts, client={"tests": tests})).history[0]
    (left,) = entry.left_out
    assert left.client == "0"
    assert "NaN or infinite" in left.reason
    assert entry.evaluation["num-examples"] == 6


# --- kinds -----------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self):
        yield from range(3)


class Raising(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        raise KeyError(f"no image number {index}")


class Dicts(Raising):
    def __getitem__(self, index):
        return {"img": torch.zeros(8), "label": 1}


class Names(Raising):
    def __getitem__(self, index):
        return torch.zeros(8), "cat"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (Stream(), "DataError: data returned Stream, expected a map-style torch Dataset"),
        (None, "DataError: data returned NoneType, expected"),
        (Dicts(), "DataError: the inputs of a batch are a dict with ['img'], and the model of"),
        (Names(), "DataError: labels[0] of a batch is str 'cat', expected a tensor: turn text"),
        (Raising(), "DataError: example 2 can't be read: KeyError: 'no image number 2' (training"),
        (DataLoader(Dicts()), "DataError: the inputs of a batch are a dict with ['img']"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_data_of_another_kind_leave_their_client_out(data, said):
    result = train(set_up([make_data(4, seed=0), data]))
    left = result.history[0].left_out[0]
    assert (left.client, left.step) == ("1", 0)
    assert left.reason.startswith(said)
    assert result.history[0].rows == 4


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused_by_name(layout):
    rows = [torch.zeros(2, 4), torch.zeros(3, 4)]
    batch = torch.nested.nested_tensor(rows, layout=layout), torch.zeros(2)
    examples = Examples(rows, "0", "training", collate=lambda items: batch)
    with pytest.raises(DataError, match=r"inputs of a batch is a nested tensor.*pad its rows"):
        examples.batch([0, 1])


def test_fewer_labels_than_inputs():
    def unpack(batch):
        return batch[0], batch[1][1:]

    run = set_up(make_parts([4]), client={"unpack": unpack})
    expected = r"labels: shape is \(3,\), expected 4 rows: .* \(training data of client '0'\)"
    with pytest.raises(NotEnoughClientsError, match=expected):
        train(run)
    assert_server_untouched(run)


# --- divergence ------------------------------------------------------------------------------


def test_a_learning_rate_far_too_high_on_the_server():
    run = set_up(make_parts([8, 8]), server_lr=1e38, client_lr=0.0)
    with pytest.raises(NonFiniteError, match=r"client '\d'.*\(round 2, step 0\).*smaller lear"):
        train(run, rounds=2)


def test_a_learning_rate_far_too_high_on_the_client():
    (part,) = make_parts([8], normed_net)
    run = set_up([part], server_lr=0.1, client_lr=3e38, build=normed_net, batch_size=2)
    with pytest.raises(NotEnoughClientsError, match=r"NonFiniteError: .*client '0', round \d"):
        train(run, rounds=3)
    assert all(bool(t.isfinite().all()) for t in server_weights(run[0]).values())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_changes_no_weight(strategy, value):
    calls, before = [], {}

    def loss(logits, labels):
        calls.append(len(labels))
        factor = value if len(calls) == 3 else 1.0
        return nn.functional.cross_entropy(logits, labels) * factor

    def learners():
        return {
            (index, name): tensor.clone()
            for index, segment in enumerate(run[0].server_segments())
            for name, tensor in segment.module.named_parameters()
        }

    class Watching(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            before.update(learners())

    (part,) = make_parts([12], normed_net)
    run = set_up([part], strategy, build=normed_net, loss=loss, server_optimizer=Watching)
    with pytest.raises(NonFiniteError, match=r"loss of client '0' is NaN.*round 1, step 2"):
        train(run)
    assert len(before) == len(learners()) > 0
    for name, tensor in learners().items():
        assert torch.equal(tensor, before[name]), name


def test_a_gradient_of_the_server_that_is_not_finite():
    class Explode(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.inf

    class Exploding(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x.detach() * Explode.apply(self.weight) + x

    def build():
        net = plain_net()
        net.add_module("scale", Exploding())
        return net

    run = set_up(make_parts([4, 4]), build=build)
    expected = r"gradient of the server segment is NaN.*round 1, step 0, clients '0', '1'"
    with pytest.raises(NonFiniteError, match=expected):
        train(run)
    assert_server_untouched(run)


def test_only_the_client_is_left_out_whose_rows_make_a_gradient_of_the_server_infinite():
    class Explode(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, factor):
            ctx.factor = factor
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * ctx.factor, None

    class Exploding(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))

        def forward(self, x):
            factor = torch.where(x.detach().max() > 5, torch.inf, 1.0)
            return x.detach() * Explode.apply(self.weight, factor) + x

    class Shift(nn.Module):
        def forward(self, x):
            return x + 9

    def build(context=None):
        net = plain_net()
        net.middle.insert(0, Exploding())
        if context and context.node_config["partition-id"] == 1:
            net.front.append(Shift())
        return net

    entry = train(set_up(make_parts([4, 4, 4]), build=build)).history[0]
    (left,) = entry.left_out
    assert (left.client, left.step, entry.rows) == ("1", 0, 8)
    assert "gradient of the server segment is NaN" in left.reason
    assert "round 1, step 0, clients '1')" in left.reason


def test_a_gradient_inside_the_client_segment_that_is_not_finite_changes_no_weight():
    """The gradient that the server sends is finite; within the client segment it overflows."""

    def build():
        net = plain_net()
        net.front.add_module("scale", Scale())
        return net

    run = set_up(make_parts([8, 8]), client={"model": build}, build=build)
    Scale.overflows = True
    try:
        with pytest.raises(NotEnoughClientsError) as caught:
            train(run)
    finally:
        Scale.overflows = False
    for name in ("0", "1"):
        expected = f"gradient of the client segment in step 0 is NaN or infinite (client {name!r}"
        assert expected in str(caught.value)


class Scale(nn.Module):
    overflows = False

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * (torch.inf if Scale.overflows else 1.0)

    def forward(self, x):
        return self.Function.apply(x)


# --- losses ----------------------------------------------------------------------------------


def detached(logits, labels):
    return nn.functional.cross_entropy(logits, labels).detach()


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (nn.CrossEntropyLoss(reduction="none"), r"returned shape \(4,\), expected a scalar"),
        (lambda *_: 0.5, r"returned 0\.5, expected a scalar tensor"),
        (detached, "detached from the logits"),
    ],
)
def test_a_loss_that_is_no_scalar_to_differentiate(loss, said):
    with pytest.raises(ValueError, match=rf"^round 1, step 0: client '0': the loss .*{said}"):
        train(set_up(make_parts([4]), loss=loss))
