"""From text to sequences of tokens: packed, padded, or instructions with masked prompts."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from llm.texts import Document

ROUND_UP = 32
IGNORED = -100  # the label that no model of transformers learns from
PROMPT = "### Question:\nWhat is {about}?\n### Answer:\n"
DATA = ("packed", "padded", "instructions")

Tokens = tuple[list[int], list[int]]  # input ids and labels, equally long


class Sequences(Dataset[dict[str, Tensor]]):
    """Sequences of tokens, each as long as it is, with their labels."""

    def __init__(self, rows: Sequence[Tokens]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one sequence."""
        ids, labels = self.rows[index]
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}


def make_sequences(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, kind: str, length: int
) -> tuple[Sequences, int]:
    """Return a client's sequences, and how many were left out because nothing is learnt from them.

    Parameters
    ----------
    documents : sequence of Document
        The text.
    tokenizer : PreTrainedTokenizerBase
        Whose end-of-text token ends every document.
    kind : {'packed', 'padded', 'instructions'}
        One stream of all documents, cut into sequences of one length; each document's own
        sequences, the last of them shorter; or a question and its answer in each sequence, of
        which the question's labels are masked.
    length : int
        Tokens of the longest sequence.
    """
    if kind not in DATA:
        raise ValueError(f"data={kind!r} is unknown, expected one of {', '.join(DATA)}")
    end = [tokenizer.eos_token_id]
    texts = [tokenizer(document.text)["input_ids"] + end for document in documents]
    rows: list[Tokens]
    if kind == "packed":
        stream = [token for text in texts for token in text]
        whole = len(stream) // length * length
        rows = [(stream[at : at + length],) * 2 for at in range(0, whole, length)]
    elif kind == "padded":
        parts = [text[at : at + length] for text in texts for at in range(0, len(text), length)]
        rows = [(part, part) for part in parts]
    else:
        prompts = [
            tokenizer(PROMPT.format(about=document.about))["input_ids"] for document in documents
        ]
        rows = [
            ((prompt + text)[:length], ([IGNORED] * len(prompt) + text)[:length])
            for prompt, text in zip(prompts, texts, strict=True)
        ]
    # The first token follows none, so its label counts for nothing.
    learnt = [row for row in rows if any(label != IGNORED for label in row[1][1:])]
    return Sequences(learnt), len(rows) - len(learnt)


def padded(rows: list[dict[str, Tensor]], *, most: int, end: int) -> dict[str, Tensor]:
    """Collate sequences of several lengths: padding behind them, whose labels are masked.

    They become as long as the longest, rounded up so that there are few lengths (a batch of a new
    shape is looked at before it is trained on), and `most` at most.

    A causal model needs no attention mask for that: no token looks at what comes after it. So
    none is made, and none crosses the cut.
    """
    longest = max(len(row["labels"]) for row in rows)
    longest = min(-(-longest // ROUND_UP) * ROUND_UP, most)
    ids = torch.full((len(rows), longest), end)
    labels = torch.full((len(rows), longest), IGNORED)
    for index, row in enumerate(rows):
        ids[index, : len(row["input_ids"])] = row["input_ids"]
        labels[index, : len(row["labels"])] = row["labels"]
    return {"input_ids": ids, "labels": labels}


def loader(
    sequences: Sequences, tokenizer: PreTrainedTokenizerBase, length: int
) -> DataLoader[Any]:
    """Return what flsplit takes: the sequences, and how a batch is made of them."""
    collate = partial(padded, most=length, end=tokenizer.eos_token_id)
    return DataLoader(sequences, collate_fn=collate)
