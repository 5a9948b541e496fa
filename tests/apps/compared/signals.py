"""Somebody else's data set of dicts: two inputs, of which one is needed after the cut, too."""

import torch
from signal_model import Net
from torch.utils.data import Dataset


class Signals(Dataset):
    def __init__(self, size, seed):
        rng = torch.Generator().manual_seed(seed)
        self.label = torch.randint(3, (size,), generator=rng)
        self.wave = torch.randn(size, 1, 16, generator=rng) + self.label.view(-1, 1, 1)
        self.rate = torch.rand(size, 1, generator=rng)

    def __len__(self):
        return len(self.label)

    def __getitem__(self, row):
        return {"wave": self.wave[row], "rate": self.rate[row], "label": self.label[row]}


def experiment():
    return {
        "model": Net,
        "cut": "front",
        "train": Signals(120, 0),
        "test": Signals(30, 1),
        "share": ["rate"],
    }
