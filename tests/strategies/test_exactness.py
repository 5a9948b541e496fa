"""What split learning computes is what training the whole model computes."""

import copy

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from reference import (
    LR,
    MOMENTUM,
    OPTIMIZERS,
    SEED,
    assert_bit_equal,
    assert_close,
    average,
    epoch_batches,
    fresh,
    make_parts,
    noisy_net,
    normed_net,
    numbered_batches,
    plain_net,
    run_split,
    train_in_turn,
    weights_of,
    whole_of,
    whole_step,
)
from torch.nn import functional
from torch.optim import SGD
from torch.utils.data import Dataset

from flsplit import LocalGrid
from flsplit.seeds import derive_seed
from flsplit.strategies import PSL, SequentialSL, SplitFedV1, SplitFedV2


class Losses(list):
    """A loss that remembers its values."""

    def __call__(self, logits, labels):
        loss = functional.cross_entropy(logits, labels)
        if logits.requires_grad:
            self.append(loss.item())
        return loss


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_one_client_is_bit_equal_to_training_the_whole_model(optimizer, cache):
    parts, losses = make_parts([14], noisy_net), Losses()
    result = run_split(
        PSL, noisy_net, parts, optimizer=optimizer, rounds=3, local_epochs=1, loss=losses,
        share_client_segments=True, cache=cache,
    )  # fmt: skip
    weights, expected = train_in_turn(noisy_net, parts, optimizer=optimizer, rounds=3)
    assert losses == [loss for one_round in expected for loss in one_round]
    assert_bit_equal(whole_of(result), weights)
    for entry, of_round in zip(result.history, expected, strict=True):
        mean = sum(loss * rows for loss, rows in zip(of_round, [4, 4, 4, 2], strict=True)) / 14
        assert entry.loss == pytest.approx(mean, rel=1e-12)
        assert (entry.steps, entry.rows) == (4, 14)


def test_training_learns_what_there_is_to_learn():
    parts = make_parts([60, 60])
    result = run_split(
        PSL, plain_net, parts, tests=parts, optimizer=MOMENTUM, rounds=6, batch_size=10
    )
    evaluations = [entry.evaluation for entry in result.history]
    assert evaluations[-1]["accuracy"] > 0.9
    assert evaluations[-1]["loss"] < 0.5 * evaluations[0]["loss"]


class Augmented(Dataset):
    """Examples that a transform shifts at random, with torch's global generator."""

    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        inputs, label = self.examples[index]
        return inputs + torch.rand(()), label


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
def test_random_transforms_of_the_data_are_drawn_once_per_step(cache):
    parts = [Augmented(one) for one in make_parts([8], noisy_net)]
    result = run_split(
        PSL, noisy_net, parts, optimizer=MOMENTUM, share_client_segments=True, cache=cache
    )
    weights, _ = train_in_turn(noisy_net, parts, optimizer=MOMENTUM, rounds=2)
    assert_bit_equal(whole_of(result), weights)


def test_client_and_server_learning_rates_are_their_own():
    parts = make_parts([8])
    result = run_split(PSL, plain_net, parts, server_lr=0.1, client_lr=0.0, rounds=1,
                       share_client_segments=True)  # fmt: skip
    before, after = fresh(plain_net).state_dict(), whole_of(result)
    for name in before:
        assert torch.equal(before[name], after[name]) == name.startswith("front"), name


@pytest.mark.parametrize("sizes", [(12, 12, 12, 12), (4, 8, 12, 20)], ids=["equal", "unequal"])
def test_clients_averaged_every_step_train_on_the_concatenated_batch(sizes):
    rounds, parts = 6, make_parts(sizes)
    result = run_split(
        PSL, plain_net, parts, optimizer=MOMENTUM, rounds=rounds, local_steps=1,
        client_strategy=FedAvg(),
    )  # fmt: skip

    model = fresh(plain_net)
    optimizer = MOMENTUM(model.parameters(), lr=LR)
    streams = [numbered_batches(part, str(i), 4) for i, part in enumerate(parts)]
    for entry in result.history:
        rows = [part[next(stream)] for part, stream in zip(parts, streams, strict=True)]
        inputs = torch.cat([inputs for inputs, _ in rows])
        labels = torch.cat([labels for _, labels in rows])
        of_each = functional.cross_entropy(model(inputs), labels, reduction="none")
        weight = torch.tensor(sizes).repeat_interleave(4) / (4 * sum(sizes))
        optimizer.zero_grad()
        (of_each * weight).sum().backward()
        optimizer.step()
        assert entry.loss == pytest.approx(of_each.mean().item(), rel=1e-5)
    assert_close(weights_of(result.arrays), model.state_dict())


# --- SplitFed V1 is FedAvg -------------------------------------------------------------------


def fedavg_app(build, parts, make_optimizer, batch_size=4):
    """An ordinary ClientApp: trains the whole model for an epoch, keeps its optimizer."""
    app, kept = ClientApp(), {}

    @app.train()
    def train(message, context):
        index = int(context.node_config["partition-id"])
        if index not in kept:
            model = build()
            batches = epoch_batches(len(parts[index]), str(index), batch_size)
            kept[index] = model, make_optimizer(model.parameters(), lr=LR), batches
        model, optimizer, batches = kept[index]
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        server_round = int(message.content["config"]["server-round"])
        for step, indices in enumerate(next(batches)):
            whole_step(
                model, [optimizer], parts[index], indices,
                name=str(index), server_round=server_round, step=step,
            )  # fmt: skip
        metrics = MetricRecord({"num-examples": len(parts[index])})
        content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
        return Message(content, reply_to=message)

    return app


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("build", [normed_net, noisy_net])
def test_splitfed_v1_is_flowers_own_fedavg(build, optimizer):
    rounds, sizes = 3, (8, 14, 21)
    parts = make_parts(sizes, build)
    result = run_split(SplitFedV1, build, parts, optimizer=optimizer, rounds=rounds)
    expected = FedAvg(fraction_evaluate=0.0).start(
        grid=LocalGrid(fedavg_app(build, parts, optimizer), len(parts), progress=False),
        initial_arrays=ArrayRecord(fresh(build).state_dict()),
        num_rounds=rounds,
        train_config=ConfigRecord(),
    )
    found, wanted = weights_of(result.arrays), weights_of(expected.arrays)
    counters = [name for name in wanted if name.endswith("num_batches_tracked")]
    assert len(counters) == 2
    for name in counters:
        del wanted[name]  # FedAvg's is a fraction
        assert found.pop(name) == rounds * 6  # 6 steps: the longest epoch
    assert_close(found, wanted)


def test_splitfed_v1_takes_a_strategy_of_its_own_for_the_server_copies():
    parts = make_parts((8, 12), normed_net)
    joined = run_split(SplitFedV1, normed_net, parts, optimizer=MOMENTUM)
    apart = run_split(SplitFedV1, normed_net, parts, optimizer=MOMENTUM, server_strategy=FedAvg())
    assert_bit_equal(weights_of(apart.arrays), weights_of(joined.arrays))


# --- schedules -------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_sequential_with_one_client_is_psl(optimizer):
    parts = make_parts([10], noisy_net)
    options = {"optimizer": optimizer, "rounds": 3}
    sequential = run_split(SequentialSL, noisy_net, parts, **options)
    psl = run_split(PSL, noisy_net, parts, share_client_segments=True, **options)
    assert_bit_equal(weights_of(sequential.arrays), whole_of(psl))
    assert [e.loss for e in sequential.history] == [e.loss for e in psl.history]


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
def test_sequential_trains_one_model_on_one_client_after_the_other(optimizer, cache):
    parts, losses = make_parts((9, 4, 14), noisy_net), Losses()
    result = run_split(
        SequentialSL, noisy_net, parts, optimizer=optimizer, rounds=3, loss=losses, cache=cache
    )
    weights, expected = train_in_turn(noisy_net, parts, optimizer=optimizer, rounds=3)
    assert losses == [loss for one_round in expected for loss in one_round]
    assert_bit_equal(weights_of(result.arrays), weights)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_splitfed_v2_interleaves_the_clients_batches(optimizer):
    rounds, sizes = 3, (9, 4, 14)
    parts = make_parts(sizes, noisy_net)
    result = run_split(SplitFedV2, noisy_net, parts, optimizer=optimizer, rounds=rounds)

    # Three whole models whose layers after the cut are the same objects.
    models = [fresh(noisy_net) for _ in parts]
    for model in models[1:]:
        model.middle, model.head = models[0].middle, models[0].head
    server = [*models[0].middle.parameters(), *models[0].head.parameters()]
    server_optimizer = optimizer(server, lr=LR)
    client_optimizers = [optimizer(model.front.parameters(), lr=LR) for model in models]
    epochs = [epoch_batches(size, str(i), 4) for i, size in enumerate(sizes)]
    for server_round in range(1, rounds + 1):
        batches = [next(epoch) for epoch in epochs]
        for step in range(max(map(len, batches))):
            present = [client for client, own in enumerate(batches) if step < len(own)]
            rng = torch.Generator().manual_seed(derive_seed(SEED, "interleave", server_round, step))
            for index in torch.randperm(len(present), generator=rng).tolist():
                client = present[index]
                whole_step(
                    models[client], [client_optimizers[client], server_optimizer],
                    parts[client], batches[client][step],
                    name=str(client), server_round=server_round, step=step,
                )  # fmt: skip
        fronts = average([model.front.state_dict() for model in models], sizes)
        for model in models:
            model.front.load_state_dict(copy.deepcopy(fronts))
    assert_close(weights_of(result.arrays), models[0].state_dict())


def test_every_client_draws_dropout_of_its_own():
    """Two clients with the same data differ, and so do two steps on the same batch."""
    part = make_parts([4], noisy_net)[0]
    losses = Losses()
    run_split(
        PSL, noisy_net, [part, part], server_lr=0.0, rounds=1, local_steps=2, loss=losses,
        server_batchnorm="per_client",
    )  # fmt: skip
    assert len(set(losses)) == 4


def test_plain_sgd_without_state_works_without_a_cache_too():
    parts = make_parts((5, 8))
    runs = [
        run_split(PSL, plain_net, parts, optimizer=SGD, cache=c, share_client_segments=True)
        for c in (True, False)
    ]
    for client in ("0", "1"):
        assert_bit_equal(whole_of(runs[0], client), whole_of(runs[1], client))
