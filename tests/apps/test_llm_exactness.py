"""Split fine-tuning of language models equals the unsplit one."""

import pytest
import torch
from llm import texts
from llm.data import client_data
from llm_runs import config_of, new_model, save_tiny, trained
from reference import assert_bit_equal, assert_close, epoch_batches
from torch.optim import AdamW


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def tiny(request, tmp_path_factory):
    return save_tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(autouse=True)
def _little_text(monkeypatch):
    monkeypatch.setattr(texts, "docstrings", lambda package: OWN[package])


OWN = {
    package: [
        texts.Document(f"{package}.{index}", f"{package} does {what} " * (2 + index % 3))
        for index, what in enumerate(("add", "take the mean", "nothing", "sort", "plot lines") * 2)
    ]
    for package in texts.PACKAGES
}


def fine_tuned(config, client, num_clients, model, optimizer, epochs, steps):
    """Take a client's local steps on the whole model, as one would without a split."""
    sequences = (loader := client_data(config, client, num_clients)[0]).dataset
    for _ in range(steps):
        rows = next(epochs)
        batch = loader.collate_fn([sequences[row] for row in rows])
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


def batches_of(config, client, num_clients):
    """Yield the mini-batches that a client draws, epoch after epoch."""
    number = len(client_data(config, client, num_clients)[0].dataset)
    for epoch in epoch_batches(number, str(client), config["batch-size"], config["seed"]):
        yield from epoch


def optimizer_of(model, config):
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=config["learning-rate"])


@pytest.mark.parametrize(
    "changes",
    [
        {"data": "packed"},
        {"data": "padded", "cut": 2, "checkpointing": True},
        {"data": "instructions", "precision": "bf16"},
        {"data": "packed", "rank": 0},
        {"data": "instructions", "label-private": True},
        {"data": "padded", "adapt": "server", "train-head": False},
        {"data": "packed", "adapt": "client"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_one_client_of_psl_is_bit_equal_to_fine_tuning_the_whole_model(tiny, changes):
    config = config_of(tiny, strategy="psl", seq_length=48, **changes)
    result, weights = trained(config, 1)
    assert result.history[-1].left_out == []
    assert bool(result.history[-1].traffic.logical["labels-up"]) != config["label-private"]

    model = new_model(config).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    steps = config["num-server-rounds"] * config["local-steps"]
    epochs = batches_of(config, 0, 1)
    fine_tuned(config, 0, 1, model, optimizer_of(model, config), epochs, steps)

    # Flower's arrays can't hold bfloat16, but float32 holds the same numbers.
    found = {name: weights["client-0"][name].to(one) for name, one in model.state_dict().items()}
    assert_bit_equal(found, model.state_dict())
    assert any(not torch.equal(before[name], one) for name, one in model.state_dict().items())


@pytest.mark.parametrize("private", [False, True])
def test_splitfed_v1_is_fedavg_of_the_adapters(tiny, private):
    config = config_of(
        tiny, strategy="splitfed-v1", data="padded", seq_length=48, label_private=private
    )
    result, weights = trained(config, 3)
    assert result.history[-1].left_out == []

    averaged = new_model(config)
    clients = [new_model(config).train() for _ in range(3)]
    optimizers = [optimizer_of(model, config) for model in clients]
    epochs = [batches_of(config, client, 3) for client in range(3)]
    sizes = [len(client_data(config, client, 3)[0].dataset) for client in range(3)]
    assert len(set(sizes)) > 1
    for _ in range(config["num-server-rounds"]):
        for client, model in enumerate(clients):
            model.load_state_dict(averaged.state_dict())
            steps = config["local-steps"]
            fine_tuned(config, client, 3, model, optimizers[client], epochs[client], steps)
        states = [model.state_dict() for model in clients]
        adapters = {
            name: sum(n * state[name] for n, state in zip(sizes, states, strict=True)) / sum(sizes)
            for name in states[0]
            if "lora" in name or "modules_to_save" in name
        }
        averaged.load_state_dict({**averaged.state_dict(), **adapters})

    # float32; Adam's first steps divide by gradients as small as rounding errors
    assert_close(weights[""], averaged.state_dict(), 1e-5)


def test_only_adapters_travel_after_the_first_round(tiny):
    config = config_of(tiny, strategy="splitfed-v2")
    first, second = (entry.traffic.logical for entry in trained(config, 2)[0].history)

    adapters = [
        p for name, p in new_model(config).named_parameters() if ".0." in name and "lora" in name
    ]
    size = 2 * sum(p.numel() * p.element_size() for p in adapters)
    assert second["client-segments-down"] == second["client-segments-up"] == size
    assert first["client-segments-down"] > size
