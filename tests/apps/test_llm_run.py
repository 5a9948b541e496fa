"""The app for language models by ``flwr run``: what it says at its end, and what it leaves."""

import re

import pytest
import torch
from llm.data import client_data
from llm_runs import config_of, save_tiny
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.flower_processes import REPOSITORY, simulation

APP = REPOSITORY / "apps/llm"
NUM_CLIENTS = 4


@pytest.mark.e2e
def test_a_run_ends_with_its_perplexities_and_leaves_models_that_others_load(tmp_path):
    base = save_tiny("gpt2", tmp_path / "base")
    changes = {
        "model": base, "seq-length": 64, "local-steps": 6, "num-server-rounds": 1, "rank": 2,
        "learning-rate": 0.02, "generate-tokens": 4, "temperature": 0.0,
        "output-dir": str(tmp_path / "out"),
    }  # fmt: skip
    with simulation(tmp_path, NUM_CLIENTS) as flower:
        run = flower.run_app(APP, changes)
    assert run.completed, run.log

    # Behind them come lines of Ray, and an empty one of Flower.
    told = [line.removeprefix("INFO :").strip() for line in run.log.splitlines() if "INFO" in line]
    quality, adapters, model = [one for one in told if one and not one.startswith("(")][-3:]
    said = re.fullmatch(r"held-out perplexity: ([\d.]+) -> ([\d.]+)", quality)
    assert said, run.log
    before, after = map(float, said.groups())
    assert adapters == f"adapters: {tmp_path}/out/adapters"
    assert model == f"model: {tmp_path}/out/model"
    assert after < 0.9 * before

    # Strangers to flsplit load both.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out/model")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model").eval()
    original = AutoModelForCausalLM.from_pretrained(base, tie_word_embeddings=False)
    original.lm_head.weight.data.copy_(original.transformer.wte.weight)
    adapted = PeftModel.from_pretrained(original, tmp_path / "out/adapters").eval()
    ids = torch.tensor([tokenizer("Parameters\n----------\n")["input_ids"]])
    with torch.no_grad():
        assert torch.allclose(adapted(ids).logits, whole(ids).logits, atol=1e-5)

    # What was said of them is so.
    found = config_of(base, seq_length=64)
    assert perplexity_of_all(whole, found) == pytest.approx(after, abs=0.06)
    untrained = AutoModelForCausalLM.from_pretrained(base)
    assert perplexity_of_all(untrained, found) == pytest.approx(before, abs=0.06)


@torch.no_grad()
def perplexity_of_all(model, config):
    """Return exp of a model's mean loss over the tokens of all clients' held-out sequences."""
    model.eval()
    total = number = 0
    for client in range(NUM_CLIENTS):
        held_out = client_data(config, client, NUM_CLIENTS)[1].dataset
        rows = torch.stack([row["input_ids"] for row in held_out])
        for part in rows.split(64):
            loss = model(input_ids=part, labels=part).loss
            total += float(loss) * len(part)
            number += len(part)
    return float(torch.tensor(total / number).exp())
