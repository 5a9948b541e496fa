"""What the planning scripts have in common: a model, and devices in a cell."""

import numpy as np

from flsplit.vision import load_torchvision
from flsplit.wireless import Device, ModelProfile, profile_model


def resnet18() -> ModelProfile:
    """Return the profile of a ResNet-18 for 7 classes at 3x64x64."""
    model = load_torchvision().models.resnet18(num_classes=7)
    return profile_model(model, (3, 64, 64), "resnet18")


def draw_devices(count: int, rng: np.random.Generator) -> tuple[Device, ...]:
    """Return devices of 16 to 25.6 GFLOP/s and 1.5 W, 20 to 200 m away."""
    return tuple(
        Device(
            name=str(index),
            compute_flops=rng.uniform(16e9, 25.6e9),
            distance_m=rng.uniform(20.0, 200.0),
            power_w=1.5,
        )
        for index in range(count)
    )
