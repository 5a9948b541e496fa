"""The model: a small convolutional network, whole. flsplit cuts it in two."""

from collections import OrderedDict

from flwr.app import Context, UserConfig
from torch import nn

from quickstart.images import NUM_CLASSES, find_dataset

CUT = "conv1"  # the last stage that the clients compute
LAST = "hidden"  # the last that the server computes, if labels are to stay with the clients


def cut_of(config: UserConfig) -> str | tuple[str, str]:
    """Return where the network is cut; only ``label-private`` of the run config is read."""
    return (CUT, LAST) if config["label-private"] else CUT


def build_model(context: Context) -> nn.Module:
    """Build the network for the data set that the run config names.

    Parameters
    ----------
    context : Context
        A ServerApp's or a ClientApp's; only ``dataset`` of its run config is read.

    Returns
    -------
    nn.Module
        The whole network, cut nowhere yet.
    """
    images = find_dataset(str(context.run_config["dataset"]))
    large = images.size > 8  # digits are small enough to be halved once only
    size = images.size // 8 if large else images.size // 2
    return nn.Sequential(
        OrderedDict(
            conv1=_stage(images.channels, 16, halve=large),
            conv2=_stage(16, 32, halve=True),
            conv3=_stage(32, 64, halve=large),
            flatten=nn.Flatten(),
            hidden=nn.Sequential(nn.Linear(64 * size * size, 128), nn.ReLU()),
            head=nn.Linear(128, NUM_CLASSES),
        )
    )


def _stage(in_channels: int, out_channels: int, *, halve: bool) -> nn.Module:
    # GroupNorm and not BatchNorm: an example's result does not depend on who shares its batch, so
    # the cut network computes what the whole one would, with any number of clients.
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
        nn.GroupNorm(num_groups=8, num_channels=out_channels),
        nn.ReLU(),
        nn.MaxPool2d(2) if halve else nn.Identity(),
    )
