"""What a user of the app for language models can get wrong, and what is left out and said."""

import logging

import pytest
import torch
from llm.data import load_partition
from llm.models import cut_name, load_base, num_client_blocks
from llm.sequences import IGNORED, Sequences, loader, make_sequences
from llm.server_app import describe, held_out_of, prepared_model, strategy_of
from llm.texts import Document, docstrings, documents_of, public_texts
from llm.tokenizing import VOCABULARY, trained_tokenizer
from llm_runs import FAMILIES, bytewise_tokenizer, config_of, context_of, new_model, save_tiny
from transformers import AutoModelForCausalLM, GPT2Config

TEXTS = [Document("one", "a" * 40), Document("two", "b" * 7)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny("gpt2", tmp_path_factory.mktemp("gpt2"))


@pytest.mark.parametrize(
    ("cut", "nearest"),
    [
        (0, "1 (transformer.h.0), 2 (transformer.h.1)"),
        (4, "3 (transformer.h.2)"),
        (9, "3 (transformer.h.2)"),
        ("transformer.h.1.mlp", "1 (transformer.h.0), 2 (transformer.h.1), 3 (transformer.h.2)"),
        ("transformer.wte", "1 (transformer.h.0), 2 (transformer.h.1)"),
    ],
)
def test_a_cut_that_is_no_block_is_refused_with_the_nearest_ones(tiny, cut, nearest):
    with pytest.raises(ValueError, match="is no block") as caught:
        num_client_blocks(config_of(tiny, cut=cut))
    assert f"1 to 3, or the last one's name; the nearest: {nearest}" in str(caught.value)


def test_a_block_has_a_number_and_a_name(tiny):
    by_number, by_name = (cut_name(config_of(tiny, cut=cut)) for cut in (2, "transformer.h.1"))
    assert by_number == by_name == "base_model.model.transformer.h.1"
    assert cut_name(config_of(tiny, rank=0)) == "transformer.h.0"


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    config = GPT2Config(vocab_size=200, n_positions=64, n_embd=8, n_layer=2, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    bytewise_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="writes 257 tokens, the model has embeddings for 200"):
        load_base(config_of(str(tmp_path)))


def test_sequences_beyond_the_models_positions_are_refused(tiny):
    with pytest.raises(ValueError, match="which has 64 positions: expected 2"):
        load_base(config_of(tiny, seq_length=65))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cut": 9}, "cut='9' is no block"),
        ({"rank": -1}, "rank=-1, expected"),
        ({"data": "x"}, "data='x' is unknown"),
        ({"strategy": "x"}, "there is no strategy 'x'"),
        ({"strategy_args": "{upload = 3}"}, "has no argument 'upload'"),
        ({"strategy": "fsl-sage", "label_private": True}, "can't do without them"),
        ({"adapt": "client", "train_head": False}, "leave the server nothing to train, expected"),
        ({"num_server_rounds": 0}, "num-server-rounds=0, expected 1 or more"),
        ({"temperature": -0.5}, "temperature=-0.5, expected 0 or more"),
        ({"prompt": "a" * 300}, "prompt has [0-9]+ tokens and generate-tokens=48 are to follow"),
        (
            {"model": "llama-small", "strategy": "fsl-sage"},
            "FSLSAGE's auxiliary models take smashed data that is one tensor, but 3 values cross "
            "at 'base_model.model.model.layers.0' .*: expected a cut where one crosses, or a "
            "method without auxiliary models",
        ),
    ],
    ids=lambda one: "-".join(one) if isinstance(one, dict) else "",
)
def test_what_is_wrong_is_said_before_the_base_is_trained(changes, said, monkeypatch):
    monkeypatch.setattr("llm.server_app.train_base", lambda *_: pytest.fail("it was trained"))
    with pytest.raises(ValueError, match=said):
        prepared_model(config_of(**({"model": "gpt2-small"} | changes)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_a_tokenizer_is_refused(family, tmp_path):
    AutoModelForCausalLM.from_config(FAMILIES[family]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"model='{tmp_path}' comes without a tokenizer"):
        load_base(config_of(str(tmp_path)))


def test_a_model_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    place = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"model='{place}' is none of gpt2-small, llama-small"):
        load_base(config_of(place))


def test_held_out_text_that_is_all_prompt_is_refused(tiny):
    config = config_of(tiny, data="instructions", seq_length=8)
    with pytest.raises(ValueError, match="seq-length=8 leaves no sequence of data='instructions'"):
        held_out_of(config, 1)


def test_unknown_values_are_refused_with_those_that_there_are(tiny):
    for key, known in (("precision", "float32, bf16"), ("adapt", "both, client, server")):
        with pytest.raises(ValueError, match=f"{key}='x' is unknown, expected one of {known}"):
            new_model(config_of(tiny, **{key: "x"}))
    with pytest.raises(ValueError, match="packed, padded, instructions"):
        load_partition(context_of(config_of(tiny, data="x")))


@pytest.mark.parametrize(("adapt", "side"), [("server", "client"), ("client", "server")])
def test_a_side_that_trains_nothing_is_said(tiny, adapt, side, caplog):
    config = config_of(tiny, adapt=adapt, train_head=False)
    logger = logging.getLogger("flwr")
    logger.addHandler(caplog.handler)
    try:
        describe(strategy_of(config, new_model(config)).parts)
    finally:
        logger.removeHandler(caplog.handler)
    (line,) = {line for line in caplog.messages if line.startswith(side)}
    assert line.endswith("of which none is trained")


def test_sequences_that_are_all_prompt_are_left_out_and_counted():
    tokenizer = bytewise_tokenizer()
    long = Document("x" * 60, "short answer")
    found, left_out = make_sequences([long, *TEXTS], tokenizer, "instructions", 64)
    assert (len(found), left_out) == (2, 1)
    ids, labels = found.rows[1]
    prompt = labels.count(IGNORED)
    assert tokenizer.decode(ids[:prompt]) == "### Question:\nWhat is two?\n### Answer:\n"
    assert (
        labels[prompt:]
        == ids[prompt:]
        == tokenizer("b" * 7)["input_ids"] + [tokenizer.eos_token_id]
    )


def test_packed_and_padded_sequences_hold_the_same_tokens():
    tokenizer = bytewise_tokenizer()
    packed, _ = make_sequences(TEXTS, tokenizer, "packed", 16)
    padded, _ = make_sequences(TEXTS, tokenizer, "padded", 16)
    assert [len(ids) for ids, _ in packed.rows] == [16, 16, 16]
    assert [len(ids) for ids, _ in padded.rows] == [16, 16, 9, 8]
    stream = [token for ids, _ in padded.rows for token in ids]
    assert stream[:48] == [token for ids, _ in packed.rows for token in ids]


def test_padding_follows_the_longest_sequence_and_has_no_labels():
    tokenizer = bytewise_tokenizer()
    load = loader(Sequences([([1, 2], [1, 2]), ([3] * 40, [3] * 40)]), tokenizer, 48)
    batch = load.collate_fn([load.dataset[0], load.dataset[1]])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 48)
    assert batch["labels"][0].tolist() == [1, 2, *[IGNORED] * 46]
    assert load.collate_fn([load.dataset[0]])["labels"].shape == (1, 32)
    assert torch.equal(batch["input_ids"][1, :40], torch.full((40,), 3))


def test_the_text_is_there_and_clients_share_it_out():
    assert sum(map(len, public_texts())) > 300_000
    parts = [documents_of(client, 6) for client in range(6)]
    texts = [document.text for train, held_out in parts for document in (*train, *held_out)]
    assert len(texts) == len(set(texts))
    assert all(len(train) > 5 * len(held_out) > 0 for train, held_out in parts)
    assert {one.text for one in docstrings("numpy")} <= set(texts)


def test_the_small_models_tokenizer_writes_every_text():
    tokenizer = trained_tokenizer()
    assert len(tokenizer) == VOCABULARY
    for text in ("def f(x):\n    return x", "Größe ≥ 1 😀"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_last_layer_begins_as_the_embedding_where_they_were_tied(tiny):
    tied, alone = AutoModelForCausalLM.from_pretrained(tiny), load_base(config_of(tiny))
    embedding = tied.get_input_embeddings().weight
    assert tied.get_output_embeddings().weight is embedding
    assert torch.equal(alone.get_output_embeddings().weight, embedding)
    assert alone.get_output_embeddings().weight is not alone.get_input_embeddings().weight
