"""The fleet that a comparison simulates the time of, and the time of FedAvg on it."""

import hashlib
from pathlib import Path

from torch import nn

from flsplit.errors import ConfigError
from flsplit.wireless import Problem, Training, load_fleet, optimise, profile_model
from flsplit.wireless.unsplit import FEDAVG


def check_fleet(fleet: str, clients: int) -> None:
    """Raise ConfigError if the file is no fleet of so many devices."""
    count = load_fleet(Path(fleet)).num_devices
    if count != clients:
        raise ConfigError(
            f"--fleet: {fleet} has {count} devices, expected {clients}, one per client"
        )


def digest(fleet: str) -> str:
    """Return what tells a fleet file from others, whatever it is called."""
    return hashlib.sha256(Path(fleet).read_bytes()).hexdigest()[:12]


def fedavg_seconds(
    fleet: str, model: nn.Module, inputs: tuple[int, ...], training: Training
) -> float:
    """Return how long a round of FedAvg takes (s), as `flsplit plan` has it.

    Nothing is split, so there is no clock that the run could be given.
    """
    profile = profile_model(model, inputs)
    problem = Problem(load_fleet(Path(fleet)), profile, FEDAVG, training)
    return optimise(problem).seconds
