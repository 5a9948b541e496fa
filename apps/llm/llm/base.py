"""A base model, where none is loaded: the small model learns the server's public text first."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from llm.sequences import make_sequences
from llm.texts import Document, public_texts

BATCH, LENGTH, LEARNING_RATE, WARM_UP = 16, 64, 2e-3, 20


def train_base(model: nn.Module, tokenizer: PreTrainedTokenizerBase, steps: int, seed: int) -> None:
    """Train all weights of a model on the server's text, before it is cut and adapted."""
    documents = [Document("", text) for text in public_texts()]
    sequences, _ = make_sequences(documents, tokenizer, "packed", LENGTH)
    rows = torch.tensor([ids for ids, _ in sequences.rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    drawn = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(steps):
        rate = min((step + 1) / WARM_UP, 1.0) * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate
        batch = rows[torch.randint(len(rows), (BATCH,), generator=drawn)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def perplexity(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> float:
    """Return exp of the mean loss over all tokens that have a label.

    Parameters
    ----------
    model : nn.Module
        A causal language model.
    batches : iterable of dict
        ``input_ids`` and ``labels``, each ``(b, T)``.
    """
    model.eval()
    total, tokens = 0.0, 0
    for batch in batches:
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1).float()
        labels = batch["labels"][:, 1:].flatten()
        total += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        tokens += int((labels != -100).sum())
    model.train()
    return math.exp(total / tokens)
