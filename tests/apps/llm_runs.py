"""Runs of the app for language models with a tiny model, that lies in a folder as from a hub."""

import importlib.util
import tomllib

import torch
from flwr.app import Context, RecordDict
from llm.client_app import app
from llm.models import add_adapters, load_base
from llm.server_app import strategy_of, whole_models
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from flsplit import LocalGrid
from tests.flower_processes import REPOSITORY

FAMILIES = {
    "gpt2": GPT2Config(
        vocab_size=257, n_positions=64, n_embd=16, n_layer=4, n_head=2, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=256, eos_token_id=256,
    ),
    "llama": LlamaConfig(
        vocab_size=257, max_position_embeddings=64, hidden_size=16, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=24, bos_token_id=256,
        eos_token_id=256,
    ),
}  # fmt: skip


def bytewise_tokenizer():
    """A token for every byte, and one for the end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: at for at, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def save_tiny(family, folder):
    """Write a model with random weights, and a tokenizer, as ``save_pretrained`` does."""
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(FAMILIES[family]).save_pretrained(folder)
    bytewise_tokenizer().save_pretrained(folder)
    return str(folder)


def config_of(model, **changes):
    """Return the app's run config with a small run's numbers."""
    project = tomllib.loads((REPOSITORY / "apps/llm/pyproject.toml").read_text())
    defaults = project["tool"]["flwr"]["app"]["config"]
    small = {
        "model": model, "seq-length": 16, "batch-size": 4, "num-server-rounds": 2,
        "local-steps": 3, "rank": 2, "learning-rate": 0.01,
    }  # fmt: skip
    changed = {key.replace("_", "-"): value for key, value in changes.items()}
    assert {*small, *changed} <= {*defaults}
    return defaults | small | changed


def context_of(config, client=0, num_clients=1):
    """Return a client's context."""
    node = {"partition-id": client, "num-partitions": num_clients}
    return Context(1, 1, node, RecordDict(), config)


def new_model(config):
    """Return the whole model as the server begins with it."""
    torch.manual_seed(int(config["seed"]))
    return add_adapters(load_base(config), config)


def local_grid(config, num_clients):
    return LocalGrid(app, num_clients, run_config=config, progress=False)


def trained(config, num_clients):
    """Train by LocalGrid; return the result, and whole models' weights."""
    model = new_model(config)
    result = strategy_of(config, model).start(
        local_grid(config, num_clients),
        model.state_dict(),
        num_rounds=int(config["num-server-rounds"]),
    )
    return result, whole_models(result)


def script(name):
    """Return one of the scripts beside the app, as a module."""
    path = REPOSITORY / "apps/llm" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"llm_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
