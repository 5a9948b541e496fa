"""Models of transformers, with adapters and with padding: cut, trained and counted."""

import pytest
import torch
from flwr.app import ArrayRecord
from reference import (
    assert_bit_equal,
    assert_close,
    client_then_server_noise,
    epoch_batches,
    weights_of,
)
from torch.nn import functional
from torch.utils.data import default_collate

from flsplit import LocalGrid, ModelLoss, client_app
from flsplit.seeds import derive_seed, seeded
from flsplit.strategies import GAPSL, PSL, SGLR, SplitFedV1, SplitFedV2
from tests.language_models import BERT_CUT, GPT_ADAPTER_BYTES, GPT_CUT, LENGTH, MODELS

METHODS = [PSL, SplitFedV1, SplitFedV2, SGLR, GAPSL]


def new(build, dropout=0.0):
    with seeded(0):
        return build(dropout)


def train(strategy, kind, sizes, *, rounds=2, cache=True, dropout=0.0, **options):
    build, cut, data, share = MODELS[kind]
    parts = [data(size, 7 + index) for index, size in enumerate(sizes)]

    def load(context):
        part = parts[context.node_config["partition-id"]]
        return part, part

    model = new(build, dropout)
    app = client_app(
        model=lambda: new(build, dropout), cut=cut, data=load, share=share, device="cpu"
    )
    settings = {"server_lr": 0.1, "batch_size": 4, "loss": ModelLoss(), "seed": 5}
    method = strategy(model=model, cut=cut, share=share, device="cpu", **(settings | options))
    grid = LocalGrid(app, len(sizes), cache=cache, progress=False)
    return method.start(grid, ArrayRecord(model.state_dict()), rounds)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("strategy", METHODS)
def test_methods_train_them_with_and_without_cache(strategy, kind):
    results = [train(strategy, kind, [8, 7], cache=cache) for cache in (True, False)]
    for entry in results[0].history:
        assert (entry.left_out, entry.rows) == ([], 15)
    assert results[0].history[1].loss < results[0].history[0].loss
    evaluation, words = results[0].history[1].evaluation, 15 * (LENGTH - 1)
    classified = 15 if kind == "bert" else words  # the first word follows none
    right = evaluation["accuracy"] * classified
    assert right == pytest.approx(round(right))
    assert_bit_equal(weights_of(results[0].arrays), weights_of(results[1].arrays))
    assert results[0].history.numbers() == results[1].history.numbers()


def next_word(output, words):
    """What GPT-2 computes itself from labels."""
    return functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), words[:, 1:].flatten())


@pytest.mark.parametrize("strategy", METHODS)
def test_a_loss_of_ones_own_trains_as_the_models_own(strategy):
    sizes = [8, 7] if strategy is PSL else [8, 8]
    own, models = (train(strategy, "gpt", sizes, loss=loss) for loss in (next_word, ModelLoss()))
    losses = [[entry.loss for entry in result.history] for result in (own, models)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert_close(weights_of(own.arrays), weights_of(models.arrays), 1e-6)
    if strategy in (PSL, SGLR, GAPSL):  # clients keep their segments
        first, second = (entry.traffic.logical for entry in own.history)
        assert first["client-segments-down"] > 20 * GPT_ADAPTER_BYTES
        assert second["client-segments-down"] == second["client-segments-up"] == 0


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("kind", "cut"), [("gpt", GPT_CUT), ("bert", BERT_CUT)])
def test_one_client_is_bit_equal_to_training_the_whole_model(kind, cut, dropout, monkeypatch):
    result = train(PSL, kind, [10], dropout=dropout, share_client_segments=True)
    build, _, make, _ = MODELS[kind]
    data, model = make(10, 7), new(build, dropout).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    epochs = epoch_batches(10, "0", 4, seed=5)
    monkeypatch.setattr("reference.CUT", cut)
    for server_round in (1, 2):
        for step, rows in enumerate(next(epochs)):
            batch = default_collate([data[row] for row in rows])
            with client_then_server_noise(
                model,
                derive_seed(5, "client", "0", server_round, step),
                derive_seed(5, "server", server_round, step, "0"),
            ):
                loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    found = weights_of(result.arrays) | weights_of(result.client_segments["0"])
    assert_bit_equal(found, model.state_dict())


@pytest.mark.parametrize("strategy", [SplitFedV1, SplitFedV2])
def test_only_adapters_travel_after_the_first_round(strategy):
    history = train(strategy, "gpt", [8, 8], rounds=3, fraction_evaluate=0.0).history
    for entry in history[1:]:
        assert entry.traffic.logical["client-segments-down"] == 2 * GPT_ADAPTER_BYTES
        assert entry.traffic.logical["client-segments-up"] == 2 * GPT_ADAPTER_BYTES
    assert history[0].traffic.logical["client-segments-down"] > 20 * GPT_ADAPTER_BYTES
