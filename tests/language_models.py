"""Small language models with random weights, as people have them: nothing is downloaded."""

import torch
from torch import nn
from torch.utils.data import Dataset

from flsplit.vision import load_torchvision

load_torchvision()  # transformers imports it, also where its wheel doesn't fit

from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

WORDS, LENGTH, LABELS, WIDTH, RANK = 50, 8, 3, 16, 2

GPT_CUT, BERT_CUT = "base_model.model.transformer.h.0", "bert.encoder.layer.0"
GPT_ADAPTER_BYTES = 4 * (RANK * WIDTH + 3 * WIDTH * RANK)
"""Of one layer's attention, whose three projections are one matrix."""


def gpt(dropout: float = 0.0) -> nn.Module:
    """A GPT-2 of three layers with LoRA: only the adapters are trained."""
    config = GPT2Config(
        vocab_size=WORDS, n_positions=16, n_embd=WIDTH, n_layer=3, n_head=2, resid_pdrop=dropout,
        embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    lora = LoraConfig(r=RANK, lora_alpha=4, target_modules=["c_attn"], fan_in_fan_out=True)
    return get_peft_model(GPT2LMHeadModel(config), lora)


def bert(dropout: float = 0.0) -> nn.Module:
    """A BERT of three layers that classifies sentences."""
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=16, num_labels=LABELS,
            hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        )
    )  # fmt: skip


class Text(Dataset):
    """Words in a row; their labels are the words themselves."""

    def __init__(self, size: int, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.words = torch.randint(1, WORDS, (size, LENGTH), generator=rng)

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, row):
        return {"input_ids": self.words[row], "labels": self.words[row]}


class Sentences(Dataset):
    """Words with padding behind them, and a class."""

    def __init__(self, size: int, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        lengths = torch.randint(3, LENGTH + 1, (size, 1), generator=rng)
        self.mask = (torch.arange(LENGTH) < lengths).long()
        self.words = torch.randint(1, WORDS, (size, LENGTH), generator=rng) * self.mask
        self.labels = self.words.sum(1) % LABELS

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row):
        return {
            "input_ids": self.words[row],
            "attention_mask": self.mask[row],
            "labels": self.labels[row],
        }


MODELS = {
    "gpt": (gpt, GPT_CUT, Text, ()),
    "bert": (bert, BERT_CUT, Sentences, ("attention_mask",)),
}
"""What builds one, its cut, its data, and the inputs that are shared."""
