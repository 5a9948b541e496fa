"""What one client holds."""

import logging
from typing import Any

from flwr.app import Context
from torch.utils.data import DataLoader

from llm.models import RunConfig, load_tokenizer
from llm.sequences import loader, make_sequences
from llm.texts import documents_of

logger = logging.getLogger("flwr")


def load_partition(context: Context) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Load a client's sequences for training, and its held-out ones."""
    client = int(context.node_config["partition-id"])
    num_clients = int(context.node_config["num-partitions"])
    train, held_out, left_out = client_data(context.run_config, client, num_clients)
    if left_out:
        logger.info("client %d: %d sequences are all prompt, and left out", client, left_out)
    return train, held_out


def client_data(
    config: RunConfig, client: int, num_clients: int
) -> tuple[DataLoader[Any], DataLoader[Any], int]:
    """Return the two, and how many sequences were left out because nothing is learnt from them."""
    tokenizer, kind, length = load_tokenizer(config), str(config["data"]), int(config["seq-length"])
    loaders, left_out = [], 0
    for documents in documents_of(client, num_clients):
        sequences, without_labels = make_sequences(documents, tokenizer, kind, length)
        loaders.append(loader(sequences, tokenizer, length))
        left_out += without_labels
    return *loaders, left_out  # type: ignore[return-value]
