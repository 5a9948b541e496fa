"""Models of transformers, with adapters of peft, for ``make zoo``: small, with random weights."""

import torch
from zoo_cases import Case

from flsplit.vision import load_torchvision

RNG = torch.Generator().manual_seed(0)
IDS = torch.randint(5, 90, (2, 9), generator=RNG)
MASK = torch.ones_like(IDS)
MASK[0, 6:] = 0
BATCH, SHARED = {"input_ids": IDS, "attention_mask": MASK}, ("attention_mask",)
LABELLED, BOTH = {**BATCH, "labels": IDS}, (*SHARED, "labels")
CLASSIFIED = {**BATCH, "labels": torch.tensor([1, 2])}
PIXELS = {"pixel_values": torch.randn(2, 3, 32, 32, generator=RNG)}

SIZE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
        "intermediate_size": 32}  # fmt: skip
WORDS = {**SIZE, "vocab_size": 100}
HEADS = {**WORDS, "num_key_value_heads": 2}
GPT2 = {"n_layer": 3, "n_head": 2, "n_embd": 16, "vocab_size": 100, "n_positions": 32,
        "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
COUPLED = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
           "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
           "vocab_size": 100, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
           "decoder_start_token_id": 0}  # fmt: skip
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 100,
      "decoder_start_token_id": 0, "pad_token_id": 0}  # fmt: skip


def frozen(build, name):
    """Return a builder of the same model in which one parameter, by name, isn't trained."""

    def builder():
        model = build()
        model.get_parameter(name).requires_grad_(False)
        return model

    return builder


def checkpointed(build):
    """Return a builder of the same model, which computes its layers again in the backward."""

    def builder():
        model = build()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    return builder


def transformers_cases():
    load_torchvision()
    import transformers as t

    def model(name, config, options):
        return lambda: getattr(t, name)(getattr(t, f"{config}Config")(**options))

    def gpt2(**more):
        return model("GPT2LMHeadModel", "GPT2", GPT2 | more)

    def causal(name, cuts, *, double=True, **options):
        build = model(f"{name}ForCausalLM", name, options | {"tie_word_embeddings": False})
        return Case(build, cuts, (), LABELLED, BOTH, double=double)

    def encoder(name, cuts, refused=(), **options):
        build = model(f"{name}ForSequenceClassification", name, options)
        return Case(build, cuts, (), CLASSIFIED, BOTH, refused=refused)

    def eager():
        config = t.LlamaConfig(**HEADS)
        return t.LlamaForCausalLM._from_config(config, attn_implementation="eager")

    untied = gpt2(tie_word_embeddings=False)
    bert = model("BertForSequenceClassification", "Bert", WORDS | {"num_labels": 3})
    t5 = frozen(model("T5ForConditionalGeneration", "T5", T5), "shared.weight")
    bart = frozen(model("BartForConditionalGeneration", "Bart", COUPLED), "model.shared.weight")
    vit = SIZE | {"image_size": 32, "patch_size": 8, "num_labels": 3}
    whisper = COUPLED | {"max_source_positions": 20, "num_mel_bins": 8}
    text = WORDS | {"projection_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
    image = SIZE | {"projection_dim": 8, "image_size": 32, "patch_size": 8}
    towers = {"vision_config": image, "text_config": text}
    h0, h1 = "transformer.h.0", "transformer.h.1.mlp"
    block = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    image_layer = "vision_model.encoder.layers.0"
    layer, embedding = "model.layers.0", "model.embed_tokens"
    sounds = {"input_features": torch.randn(2, 8, 40, generator=RNG), "labels": IDS}
    return {
        "gpt2, tied": Case(gpt2(), [h0], (), BATCH, SHARED, refused=(h0,)),
        "gpt2, frozen": Case(frozen(gpt2(), "transformer.wte.weight"), [h0], (), BATCH, SHARED),
        "gpt2": Case(untied, ["transformer.drop", h0, h1], (), BATCH, SHARED),
        "gpt2, mask not shared": Case(untied, [h0], (), BATCH, refused=(h0,)),
        "gpt2, no mask": Case(untied, [h0], (), {"input_ids": IDS}),
        "gpt2, labels": Case(untied, [h0], (), LABELLED, BOTH),
        "gpt2, labels not shared": Case(untied, [h0], (), LABELLED, SHARED, refused=(h0,)),
        "gpt2, checkpoints": Case(checkpointed(untied), [h0], (), LABELLED, BOTH),
        "llama": Case(model("LlamaForCausalLM", "Llama", HEADS),
                      [embedding, layer, "model.layers.1.self_attn"], (), BATCH, SHARED),
        "llama, eager": Case(eager, [layer], (), BATCH, SHARED),
        "mistral": causal("Mistral", [layer], **HEADS, sliding_window=4),
        "qwen2": causal("Qwen2", [layer], **HEADS),
        "gemma2": causal("Gemma2", [layer], **HEADS, head_dim=8, sliding_window=4),
        "mixtral": causal("Mixtral", [layer, "model.layers.1.self_attn"], **HEADS,
                          num_local_experts=4, output_router_logits=True, double=False),
        "opt": causal("OPT", ["model.decoder.layers.0"], vocab_size=100, hidden_size=16,
                      num_hidden_layers=2, ffn_dim=32, num_attention_heads=2,
                      word_embed_proj_dim=16, max_position_embeddings=32),
        "bloom": causal("Bloom", [h0], vocab_size=100, hidden_size=16, n_layer=2, n_head=2),
        "mamba": causal("Mamba", [layer.replace("model", "backbone")], vocab_size=100,
                        hidden_size=16, num_hidden_layers=2, state_size=4),
        "bert": Case(bert, ["bert.embeddings", "bert.encoder.layer.0",
                            "bert.encoder.layer.1.attention"], (), BATCH, SHARED),
        "bert, labels": Case(bert, ["bert.encoder.layer.0"], (), CLASSIFIED, BOTH),
        "bert, checkpoints": Case(checkpointed(bert), ["bert.encoder.layer.1"], (), BATCH, SHARED),
        "bert, tied": Case(model("BertForMaskedLM", "Bert", WORDS), ["bert.encoder.layer.0"], (),
                           LABELLED, BOTH, refused=("bert.encoder.layer.0",)),
        "roberta": encoder("Roberta", ["roberta.encoder.layer.0"], **WORDS, num_labels=3),
        "electra": encoder("Electra", ["electra.encoder.layer.0"], **WORDS, num_labels=3),
        "distilbert": encoder("DistilBert", ["distilbert.transformer.layer.0"], dim=16, n_layers=2,
                              n_heads=2, hidden_dim=32, vocab_size=100, num_labels=3),
        "deberta": encoder("DebertaV2", ["deberta.encoder.layer.0"], **WORDS, num_labels=3),
        "deberta, relative": encoder(
            "DebertaV2", ["deberta.encoder.layer.0"], ["deberta.encoder.layer.0"], **WORDS,
            num_labels=3, relative_attention=True, pos_att_type=["p2c", "c2p"],
        ),
        "albert": encoder("Albert", ["albert.embeddings", f"{block}#1", f"{block}#3"],
                          [f"{block}#1"], **WORDS, embedding_size=8, num_labels=3),
        "vit, transformers": Case(model("ViTForImageClassification", "ViT", vit),
                                  ["vit.embeddings", "vit.layers.0"], (), PIXELS),
        "clip": Case(model("CLIPModel", "CLIP", towers),
                     [image_layer, "text_model.encoder.layers.0"], (), {**PIXELS, **BATCH},
                     (*SHARED, "input_ids")),
        "clip, words not shared": Case(model("CLIPModel", "CLIP", towers), [image_layer], (),
                                       {**PIXELS, **BATCH}, SHARED, refused=(image_layer,)),
        "t5": Case(t5, ["encoder", "encoder.block.0", "encoder.block.1", "decoder.block.0"], (),
                   LABELLED, BOTH),
        "t5, tied": Case(model("T5ForConditionalGeneration", "T5", T5),
                         ["encoder", "encoder.block.1"], (), LABELLED, BOTH,
                         refused=("encoder", "encoder.block.1")),
        "bart": Case(bart, ["model.encoder.layers.0", "model.encoder"], (), LABELLED, BOTH),
        "whisper": Case(model("WhisperForConditionalGeneration", "Whisper", whisper),
                        ["model.encoder.layers.0"], (), sounds, ("labels",)),
    }  # fmt: skip


def adapter_cases():
    load_torchvision()
    import peft
    import transformers as t

    h0 = "base_model.model.transformer.h.0"

    def adapted(kind, build=lambda: t.GPT2LMHeadModel(t.GPT2Config(**GPT2)), **options):
        config = getattr(peft, f"{kind}Config")
        return lambda: peft.get_peft_model(build(), config(**{"task_type": "CAUSAL_LM"} | options))

    low_rank = {"r": 4, "lora_dropout": 0.1, "init_lora_weights": False}
    of_gpt2 = low_rank | {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    lora = adapted("Lora", **of_gpt2)

    def checked():
        model = lora()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    def half():
        model = adapted("Lora", **of_gpt2)()
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
        return model

    def bert():
        return t.BertForSequenceClassification(t.BertConfig(**WORDS, num_labels=3))

    layers = ["base_model.model.bert.encoder.layer.0"]
    classify = low_rank | {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
    return {
        "lora": Case(lora, [h0, f"{h0}.attn.c_attn"], (), BATCH, SHARED),
        "lora, labels": Case(lora, [h0], (), LABELLED, BOTH),
        "lora, checkpoints": Case(checked, [h0], (), LABELLED, BOTH),
        "lora, half base": Case(half, [h0], (), LABELLED, BOTH, double=False),
        "lora, bert": Case(adapted("Lora", bert, **classify), layers, (), CLASSIFIED, BOTH),
        "dora": Case(adapted("Lora", **of_gpt2, use_dora=True), [h0], (), LABELLED, BOTH),
        "ia3": Case(
            adapted("IA3", target_modules=["c_attn", "mlp.c_proj"],
                    feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True),
            [h0], (), LABELLED, BOTH,
        ),
        "prompt": Case(adapted("PromptTuning", num_virtual_tokens=3),
                       ["base_model.transformer.h.0"], (), LABELLED, BOTH),
        "prefix": Case(adapted("PrefixTuning", num_virtual_tokens=3),
                       ["base_model.transformer.h.0"], (), LABELLED, BOTH),
    }  # fmt: skip
