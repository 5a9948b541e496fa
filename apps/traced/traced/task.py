"""The networks and data of ``flsplit bench train``, with less of the large one at the clients."""

from flwr.app import Context
from torch import nn
from torch.utils.data import TensorDataset

from flsplit.bench import workload

CUT = "client.1"  # after the first convolution and what follows it


def build_model(context: Context) -> nn.Module:
    """Return the whole network."""
    return workload.network(str(context.run_config["network"]))


def load_partition(context: Context) -> TensorDataset:
    """Return a client's training data."""
    first, count = context.node_config["partition-id"], context.node_config["num-partitions"]
    return workload.partition(str(context.run_config["network"]), int(first), int(count))
