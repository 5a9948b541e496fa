"""What the app for language models gives: adapters, whole models, and texts."""

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from llm.generating import FirstBlocks, LastBlocks, generate
from llm.models import build_model, cut_name, load_base, load_tokenizer
from llm.output import save_model
from llm_runs import config_of, context_of, local_grid, new_model, save_tiny
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from flsplit import split


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def tiny(request, tmp_path_factory):
    return save_tiny(request.param, tmp_path_factory.mktemp(request.param))


def adapted(config):
    """Return a model whose adapters do something."""
    model, drawn = new_model(config), torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2, generator=drawn)
    return model.eval()


IDS = torch.tensor([[72, 101, 108, 108, 111, 32, 119, 111]])


def test_adapters_load_into_peft_and_the_model_into_transformers(tiny, tmp_path):
    config = config_of(tiny)
    model = adapted(config)
    expected = model(IDS).logits.detach()
    written = save_model(model, model.state_dict(), load_tokenizer(config), tmp_path)

    peft = PeftModel.from_pretrained(load_base(config), written["adapters"]).eval()
    assert torch.equal(peft(IDS).logits, expected)
    merged = AutoModelForCausalLM.from_pretrained(written["model"]).eval()
    # B A x is added to W x in the one, and B A to W in the other
    assert torch.allclose(merged(IDS).logits, expected, atol=1e-5)
    assert AutoTokenizer.from_pretrained(written["model"]).decode([39]) == "H"


@pytest.mark.parametrize(("cut", "prompt"), [(1, "numpy.mean"), (3, "x")])
def test_split_generation_equals_generate_token_for_token(tiny, cut, prompt):
    config = config_of(tiny, cut=cut)
    model, tokenizer = adapted(config), load_tokenizer(config)
    name = cut_name(config)
    segment, others = split(model, name).divide(model.state_dict())
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    expected = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
        use_cache=True,
    )[0].tolist()  # fmt: skip

    server = new_model(config)  # its first blocks are others: they must make no difference
    for parameter in server.parameters():
        parameter.data.normal_()
    server.load_state_dict(others, strict=False)
    grid = local_grid(config, 2)
    node = list(grid.get_node_ids())[1]
    found = generate(grid, node, server, name, segment, prompt, tokens=12)

    assert found.ids == expected
    assert found.text == tokenizer.decode(expected)
    assert found.num_new == len(expected) - ids.shape[1]


def test_each_side_computes_one_position_per_token(tiny):
    config = config_of(tiny)
    model, cut = adapted(config), cut_name(config)
    first, last = FirstBlocks(model, cut), LastBlocks(adapted(config), cut)
    for position in range(IDS.shape[1]):
        smashed = first.smash(IDS[:, position : position + 1])
        assert smashed.shape == (1, 1, 16)
        logits = last.logits(smashed)

    whole = model(IDS).logits[:, -1].detach()
    assert torch.allclose(logits, whole, atol=1e-5)  # other kernels for other sizes


def test_a_client_without_a_text_says_what_it_lacks(tiny):
    config = config_of(tiny)
    grid = local_grid(config, 1)
    (node,) = grid.get_node_ids()
    content = RecordDict({"config": ConfigRecord({})})
    (answer,) = grid.send_and_receive([Message(content, node, "query.generate")])
    assert "has begun no text" in answer.error.reason


def test_a_client_holds_one_block_more_than_it_computes(tiny):
    config = config_of(tiny, cut=1)
    model = build_model(context_of(config))
    blocks = {
        name.split(".")[4]
        for name, _ in model.named_modules()
        if ".h." in name or ".layers." in name
    }
    assert blocks == {"0", "1"}


def test_a_text_longer_than_the_models_positions_is_refused(tiny):
    config = config_of(tiny)
    model, name = adapted(config), cut_name(config)
    segment, _ = split(model, name).divide(model.state_dict())
    grid = local_grid(config, 1)
    (node,) = grid.get_node_ids()
    with pytest.raises(RuntimeError, match="4 tokens, and 61 are to follow: the model has 64"):
        generate(grid, node, model, name, segment, "four", tokens=61)
    assert generate(grid, node, model, name, segment, "", tokens=2).num_new <= 2
