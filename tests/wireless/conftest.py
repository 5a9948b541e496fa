"""A tiny model and fleet whose rounds can be worked out by hand, and drawn ones."""

import numpy as np
import pytest
import torch

from flsplit.vision import load_torchvision
from flsplit.wireless import Device, Fleet, ModelProfile, Place, Radio, Server, profile_model


def place(cut, client_params, client_flops, elements, *, params=50, flops=400, saved_bytes=0):
    return Place(
        cut=cut,
        client_params=client_params,
        server_params=params - client_params,
        client_flops_forward=client_flops,
        server_flops_forward=flops - client_flops,
        activation_shape=(elements,),
        activation_elements=elements,
        element_bytes=4,
        saved_bytes=saved_bytes,
        through=cut,
    )


@pytest.fixture
def tiny_profile():
    """50 parameters and 400 FLOPs; the last layer has 50 FLOPs forward, so 100 backward."""
    return ModelProfile(
        model="tiny",
        sample=torch.empty(3, device="meta"),
        places=(place("first", 10, 100, 4), place("second", 30, 350, 2)),
        end=place("third", 50, 400, 1),
    )


@pytest.fixture
def linked_fleet():
    """Two devices on measured links."""
    return Fleet(
        devices=(
            Device(name="0", compute_flops=100.0, uplink_bps=64.0, downlink_bps=128.0),
            Device(name="1", compute_flops=200.0, uplink_bps=128.0, downlink_bps=256.0),
        ),
        server=Server(compute_flops=1000.0),
    )


@pytest.fixture(scope="session")
def resnet18():
    return profile_model(load_torchvision().models.resnet18(num_classes=7), (3, 64, 64), "resnet18")


def draw_fleet(num_devices, seed, *, subchannels=None, total_power_w=5.0, server_flops=1.6e11):
    rng = np.random.default_rng([seed, num_devices])
    return Fleet(
        devices=tuple(
            Device(
                name=str(index),
                compute_flops=rng.uniform(16e9, 25.6e9),
                distance_m=rng.uniform(20.0, 200.0),
                power_w=1.5,
            )
            for index in range(num_devices)
        ),
        server=Server(compute_flops=server_flops),
        radio=Radio(
            num_subchannels=subchannels or 4 * num_devices,
            subchannel_hz=10e6,
            antenna_gain=10.0,
            total_power_w=total_power_w,
            path_loss="mmwave-28ghz",
        ),
        seed=seed,
    )


@pytest.fixture(scope="session")
def drawn_fleet():
    return draw_fleet
