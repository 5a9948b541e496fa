"""Settings of papers: what the command line has by default with ``--preset``, and their results."""

from typing import Any

from experiment import Experiment
from partitions import of_alpha
from task import NUM_CLASSES, torchvision_arrays
from torch import nn

from flsplit.vision import load_torchvision

Paper = dict[str, dict[str, float]]
"""A paper's accuracies in percent: by partition, then by method."""

_METHODS = ("gapsl", "sfl", "epsl", "sequential-sl", "psl")
_TABLE = {  # Tables I and III of arXiv 2603.18540, CIFAR-10, 10 clients
    "iid": (86.9, 86.2, 85.8, 85.7, 84.3),
    0.9: (85.0, 84.1, 82.8, 82.7, 81.3),
    0.7: (78.1, 76.6, 74.9, 73.4, 70.3),
    0.5: (73.2, 71.2, 68.0, 66.2, 60.9),
    0.3: (69.3, 65.1, 61.8, 58.9, 53.5),
    0.1: (63.3, 60.7, 59.4, 57.3, 47.3),
}
_NOTES = (
    "The setting is that of GAPSL's paper (arXiv 2603.18540, Section VI): VGG-16 cut after four "
    "convolutions, mini-batches of 128, SGD with momentum 0.9 and the rates 0.005 and 0.01, 10 "
    "clients; rates are the paper's and not tuned. What the paper doesn't say is our choice: η = 0 "
    "and EPSL's φ = 0.5; a head of two linear layers, 512 to 512 to 10, with dropout; no "
    "augmentation, no weight decay; SFL averages once a round; a round has as many steps for every "
    "client as go through all data once, so a client with few examples sees them more often; "
    "clients count alike; a tenth of the training examples is held out."
)


def vgg16() -> nn.Module:
    """Return VGG-16 for images of 32 x 32 pixels, with a small head."""
    model = load_torchvision().models.vgg16(num_classes=NUM_CLASSES)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Sequential(
        nn.Linear(512, 512), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(512, NUM_CLASSES)
    )
    found: nn.Module = model
    return found


def gapsl_cifar10(data_dir: str) -> Experiment:
    """Return CIFAR-10 with VGG-16, as in GAPSL's paper."""
    train, test = (torchvision_arrays("CIFAR10", data_dir, train=part) for part in (True, False))
    return Experiment(
        model=vgg16, cut="features.8", train=train, test=test, target=60.0, notes=_NOTES,
        title="CIFAR-10 with VGG-16, as in GAPSL's paper",
    )  # fmt: skip


PAPERS: dict[str, Paper] = {
    "gapsl-cifar10": {
        alpha if isinstance(alpha, str) else of_alpha(alpha): dict(zip(_METHODS, row, strict=True))
        for alpha, row in _TABLE.items()
    }
}
PRESETS: dict[str, dict[str, Any]] = {
    "gapsl-cifar10": {
        "dataset": "gapsl-cifar10",
        "clients": 10,
        "alpha": [0.1],
        "methods": ["psl", "gapsl", "sfl", "epsl", "sequential-sl"],
        "rounds": 70,
        "local_steps": 0,
        "batch_size": 128,
        "shares": "equal",
        "rates": ["client_lr=0.005", "server_lr=0.01"],
        "checkpoints": True,
        "device": "auto",
    }
}
