"""Somebody's text classifier on a data set of Hugging Face: token ids, and a mask as long."""

import datasets
import torch
from torch import nn
from torch.optim import Adam

WORDS, LENGTH = 50, 12


def texts(count, seed):
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=rng)
    ids = torch.randint(0, WORDS - 4, (count, LENGTH), generator=rng)
    ids[:, 0] = WORDS - 4 + labels  # the first word says it
    columns = {"ids": ids.tolist(), "topic": labels.tolist(), "speaker": (labels % 2).tolist()}
    return datasets.Dataset.from_dict(columns).with_format("torch")


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, 8)
        self.places = nn.Parameter(torch.randn(LENGTH, 8))

    def forward(self, ids):
        return (self.words(ids) * self.places).flatten(1)


def experiment():
    return {
        "model": lambda: nn.Sequential(Encoder(), nn.Linear(8 * LENGTH, 4)),
        "cut": "0",
        "train": texts(300, 0),
        "test": texts(50, 1),
        "unpack": lambda batch: (batch["ids"], batch["topic"]),
        "optimizer": Adam,
        "grid": {"client_lr": [0.001, 0.01], "server_lr": [0.01]},
    }
