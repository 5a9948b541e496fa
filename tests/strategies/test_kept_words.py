"""Language models whose labels, which are the text itself, stay with the clients."""

import pytest
import torch
from flwr.app import ArrayRecord
from reference import assert_bit_equal, assert_close, epoch_batches, weights_of
from torch.utils.data import default_collate

from flsplit import LocalGrid, ModelLoss, client_app
from flsplit.seeds import seeded
from flsplit.strategies import GAPSL, PSL, SGLR, SplitFedV1, SplitFedV2
from tests.language_models import Sentences, Text, bert, gpt

LORA = tuple(f"base_model.model.transformer.h.{n}" for n in (0, 1))
"""The last layers are a block with adapters and the head, whose weight is the embedding's."""
MODELS = {
    "lora": (gpt, LORA, Text, ()),
    "tied": (lambda: gpt().unload(), ("transformer.h.0", "transformer.h.1"), Text, ()),
    "bert": (
        bert, ("bert.encoder.layer.0", "bert.encoder.layer.1"), Sentences, ("attention_mask",),
    ),
}  # fmt: skip


def new(kind):
    with seeded(0):
        model = MODELS[kind][0]()
    return model.requires_grad_() if kind == "tied" else model


def train(strategy, kind, sizes, *, cache=True, **options):
    _, cut, data, share = MODELS[kind]
    parts = [data(size, 7 + index) for index, size in enumerate(sizes)]
    app = client_app(
        model=lambda: new(kind), cut=cut, share=share, device="cpu", loss=ModelLoss(),
        data=lambda context: (parts[context.node_config["partition-id"]],) * 2,
    )  # fmt: skip
    model = new(kind)
    settings = {"server_lr": 0.1, "batch_size": 4, "seed": 5}
    method = strategy(model=model, cut=cut, share=share, device="cpu", **(settings | options))
    grid = LocalGrid(app, len(sizes), cache=cache, progress=False)
    return method.start(grid, ArrayRecord(model.state_dict()), 2)


def train_whole(kind, size):
    """Train the uncut model on one client's data."""
    data, model = MODELS[kind][2](size, 7), new(kind).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    epochs = epoch_batches(size, "0", 4, seed=5)
    for _ in range(2):
        for rows in next(epochs):
            loss = model(**default_collate([data[row] for row in rows])).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("kind", MODELS)
def test_one_client_is_bit_equal_to_training_the_whole_model(kind, cache):
    result = train(PSL, kind, [10], share_client_segments=True, cache=cache)
    found = weights_of(result.arrays) | weights_of(result.client_segments["0"])
    assert_bit_equal(found, train_whole(kind, 10))
    assert result.history[0].traffic.logical["labels-up"] == 0


@pytest.mark.parametrize("strategy", [PSL, SplitFedV1, SplitFedV2, SGLR, GAPSL])
def test_methods_train_adapters(strategy):
    result = train(strategy, "lora", [8, 7])
    assert [(entry.left_out, entry.rows) for entry in result.history] == [([], 15), ([], 15)]
    first, second = (entry.evaluation["loss"] for entry in result.history)
    assert second < first


def test_splitfed_of_one_client_is_the_whole_model():
    assert_close(weights_of(train(SplitFedV1, "lora", [10]).arrays), train_whole("lora", 10), 1e-6)
