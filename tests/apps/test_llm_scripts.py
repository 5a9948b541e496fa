"""The scripts beside the app for language models: they measure, and they notice what is wrong."""

import pytest
import torch
from llm_runs import config_of, save_tiny, script


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny("gpt2", tmp_path_factory.mktemp("gpt2"))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_check_of_a_gpu_finds_equal_losses_on_the_cpu(tiny, precision):
    check = script("gpu_check")
    work = check.language_model(tiny, precision, 3, "cpu")
    expected, _ = check.unsplit(work, "cpu")
    assert check.split(work)[0] == expected
    assert len(set(expected)) == 3


def test_the_check_of_a_gpu_fails_where_losses_differ(tiny, monkeypatch, capsys):
    check = script("gpu_check")
    work = check.language_model(tiny, "float32", 2, "cpu")
    monkeypatch.setattr(check, "workloads", lambda *_: [lambda: work])
    arguments = ["--model", tiny, "--steps", "2", "--device", "cpu"]
    assert check.main(arguments) == 0
    right = check.unsplit
    monkeypatch.setattr(check, "unsplit", lambda *given: ([9.0, 9.0], right(*given)[1]))
    assert check.main(arguments) == 1
    assert "split training differs from unsplit" in capsys.readouterr().out


def test_methods_are_tested_on_each_clients_own_model(tiny):
    methods = script("compare_llm")
    config = config_of(tiny, rank=0)
    model = methods.load_base(config)
    loaders = [methods.client_data(config, client, 2)[1] for client in range(2)]
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = {name: torch.zeros_like(tensor) for name, tensor in own.items()}
    both = methods.tested(model, {"client-0": own, "client-1": own}, loaders)
    assert both == pytest.approx(methods.tested(model, {"": own}, loaders), rel=1e-6)
    assert methods.tested(model, {"": other}, loaders) == pytest.approx(257, rel=1e-3)  # no idea


def test_fedavg_of_one_client_is_plain_fine_tuning(tiny):
    methods = script("compare_llm")
    config = config_of(tiny)
    torch.manual_seed(0)
    model = methods.add_adapters(methods.load_base(config), config)
    twin = methods.add_adapters(methods.load_base(config), config)
    twin.load_state_dict(model.state_dict())
    loader = methods.client_data(config, 0, 1)[0]
    found = methods.fedavg(model, config, [loader], [loader])

    optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=0.01)
    batches, rounds = methods.batches_of(loader, 0, config["batch-size"]), 2
    for _ in range(rounds * config["local-steps"]):
        batch = next(batches)
        loss = methods.next_token(twin(input_ids=batch["input_ids"]), batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, parameter in twin.named_parameters():
        assert torch.equal(dict(model.named_parameters())[name], parameter), name
    trained = sum(p.numel() for p in twin.parameters() if p.requires_grad)
    assert [point["bytes"] for point in found["curve"]] == [2 * 4 * trained, 2 * 4 * trained * 2]
    tokens = config["local-steps"] * config["batch-size"] * config["seq-length"]
    assert found["up"] == found["down"] == 4 * trained / tokens
