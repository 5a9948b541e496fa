"""What the planning scripts have in common: a model, methods, and devices in a cell."""

import math
from functools import cache
from typing import Any

import numpy as np
from torch import nn

from flsplit.run import SplitStrategy
from flsplit.strategies import EPSL
from flsplit.vision import load_torchvision
from flsplit.wireless import Device, Method, ModelProfile, Phase, Work, profile_model
from flsplit.wireless.phases import parallel_steps, server_passes


class PaperEPSL(EPSL):
    """EPSL as we understand the paper's count: rows are merged, and all go forward only once."""

    @classmethod
    def phases(cls, work: Work, *, phi: float = 0.5, **arguments: Any) -> tuple[Phase, ...]:
        """Return what a round sends and computes."""
        rows = work.training.batch_size
        shared = math.ceil(phi * rows - 1e-9)
        back_rows = shared + work.num_devices * (rows - shared)
        server = server_passes(work, backward_rows=back_rows, logit_rows=work.rows)
        return parallel_steps(work, shared_rows=shared, server=server)


@cache
def model() -> nn.Module:
    """Return a ResNet-18 for 7 classes."""
    found: nn.Module = load_torchvision().models.resnet18(num_classes=7)
    return found


def resnet18() -> ModelProfile:
    """Return its profile at 3x64x64."""
    return profile_model(model(), (3, 64, 64), "resnet18")


def method(kind: type[SplitStrategy], name: str, **arguments: Any) -> Method:
    """Return a strategy for that model as the planner takes it."""
    return kind(model=model(), cut="layer1", device="cpu", **arguments).planned(name, arguments)


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
