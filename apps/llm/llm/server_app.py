"""The server: trains the other blocks, and says what the model was worth before and after."""

import copy
import itertools
import logging
import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader

from flsplit import FlsplitError, SessionSettings, split
from flsplit.carry.choose import open_carrier
from flsplit.carry.polling import polling
from flsplit.cut import Split
from flsplit.run import SplitResult, SplitStrategy, make_strategy
from llm.auxiliary import auxiliary_like, next_token
from llm.base import perplexity, train_base
from llm.checking import check
from llm.data import client_data
from llm.generating import generate
from llm.models import (
    DECOUPLED,
    RunConfig,
    add_adapters,
    begins_random,
    cut_name,
    load_base,
    load_tokenizer,
)
from llm.output import output_folder, save_model

logger = logging.getLogger("flwr")
app = ServerApp()

Weights = dict[str, Tensor]


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Make the base, fine-tune it with the clients, generate with one of them, and save."""
    config, folder = context.run_config, output_folder(context)
    if (threads := int(config["torch-threads"])) > 0:
        torch.set_num_threads(threads)
    base = checked_base(config)
    held_out = held_out_of(config, number_of(grid))
    model = adapted(base, config)
    strategy = checked_strategy(config, model)
    describe(strategy.parts)
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = perplexity(model, itertools.chain.from_iterable(held_out))

    rounds = int(config["num-server-rounds"])
    result = strategy.start(grid, model.state_dict(), num_rounds=rounds)
    result.history.save(folder / "history.jsonl")
    trained, tokenizer, written = whole_models(result), load_tokenizer(config), []
    model.cpu()  # on a GPU a part of it is there now
    for name, state in trained.items():
        written += save_model(model, state, tokenizer, folder / name).items()

    try:
        show_texts(grid, context, model, {"before": initial, "after": next(iter(trained.values()))})
    except (FlsplitError, RuntimeError) as error:  # what was trained is worth more than a text
        logger.warning("no text: %s", error)
    found = result.history[-1].evaluation.get("loss")
    again = itertools.chain.from_iterable(held_out)
    after = perplexity(model, again) if found is None else math.exp(found)
    logger.info("held-out perplexity: %.1f -> %.1f", before, after)
    for what, where in written:
        logger.info("%s: %s", what, where)


def number_of(grid: Grid) -> int:
    """Return how many clients there are; wait for a first one."""
    for _ in polling(600.0):
        if found := len(list(grid.get_node_ids())):
            return found
    raise RuntimeError("no client is connected after 600 s")


def prepared_model(config: RunConfig) -> nn.Module:
    """Return the base with its adapters; a small one has learnt the server's text before."""
    return adapted(checked_base(config), config)


def checked_base(config: RunConfig) -> nn.Module:
    """Return the base as it is loaded or drawn; refuse a run config that can't be followed."""
    torch.manual_seed(int(config["seed"]))
    base = load_base(config)
    if begins_random(config):
        with torch.random.fork_rng(devices=[]):  # adapters are drawn when the base has learnt
            checked_strategy(config, add_adapters(copy.deepcopy(base), config))
    return base


def adapted(base: nn.Module, config: RunConfig) -> nn.Module:
    """Return the base with its adapters, in a small one after ``base-steps``."""
    steps = int(config["base-steps"])
    if begins_random(config) and steps:
        started = time.perf_counter()
        train_base(base, load_tokenizer(config), steps, int(config["seed"]))
        logger.info(
            "base: %d steps on the server's own text, %.0f s", steps, time.perf_counter() - started
        )
    return add_adapters(base, config)


def describe(halves: Split) -> None:
    """Say how much is trained on which side."""
    for side, segment in (("client", halves.client), ("server", halves.server)):
        trained = sum(p.numel() for p in segment.parameters() if p.requires_grad)
        logger.info(
            "%s segment: %d parameters, of which %s trained",
            side, sum(p.numel() for p in segment.parameters()), trained or "none is",
        )  # fmt: skip


def held_out_of(config: RunConfig, num_clients: int) -> list[DataLoader[Any]]:
    """Return the text that clients hold out, which is public here.

    Raises
    ------
    ValueError
        If there is none with a label.
    """
    loaders = [client_data(config, client, num_clients)[1] for client in range(num_clients)]
    if not any(len(loader.dataset) for loader in loaders):
        raise ValueError(
            f"seq-length={config['seq-length']} leaves no sequence of data={config['data']!r} "
            "with a label that is not masked, expected a longer one"
        )
    return loaders


def checked_strategy(config: RunConfig, model: nn.Module) -> SplitStrategy:
    """Return the strategy, or refuse what could not be trained."""
    strategy = strategy_of(config, model)
    check(config, strategy)
    return strategy


def strategy_of(config: RunConfig, model: nn.Module) -> SplitStrategy:
    """Return the strategy that the run config names, with its options."""
    name = str(config["strategy"])
    own: dict[str, Any] = {}
    if not bool(config["label-private"]):  # else clients have it, in client_app
        own["loss"] = next_token
    if name in DECOUPLED:
        own["auxiliary"] = auxiliary_like(model, int(config["auxiliary-blocks"]))
    return make_strategy(
        name,
        str(config["strategy-args"]),
        model=model,
        cut=cut_name(config),
        server_optimizer=AdamW,
        server_lr=float(config["learning-rate"]),
        batch_size=int(config["batch-size"]),
        local_steps=int(config["local-steps"]),
        evaluate_batch_size=64,
        seed=int(config["seed"]),
        carrier=str(config["carrier"]),
        session=SessionSettings.from_run_config(config),
        share_client_segments=True,  # where they stay apart, each client's model is saved
        **own,
    )


def whole_models(result: SplitResult) -> dict[str, Weights]:
    """Return the whole model's weights; where clients keep their segments, by client."""
    shared = result.arrays.to_torch_state_dict()
    own = {
        f"client-{name}": {**shared, **segment.to_torch_state_dict()}
        for name, segment in result.client_segments.items()
    }
    return own or {"": shared}


def show_texts(
    grid: Grid, context: Context, model: nn.Module, weights: Mapping[str, Weights]
) -> None:
    """Let the first client write a text together with the server, with each of some weights."""
    config, cut = context.run_config, cut_name(context.run_config)
    if not (tokens := int(config["generate-tokens"])):
        return
    if bool(config["label-private"]):
        logger.info("no text is generated: that needs the last layer at the server")
        return
    if config["carrier"] == "flower":
        logger.info("no text is generated: that needs a session, which keeps clients' processes")
        return
    settings = SessionSettings.from_run_config(config)
    with open_carrier(grid, "session", settings, 600.0, experiment="texts", state_dir="") as open_:
        node = next(iter(open_.get_node_ids()))
        for when, state in weights.items():
            model.load_state_dict(state)
            segment, _ = split(model, cut).divide(state)
            started = time.perf_counter()
            found = generate(
                open_, node, model, cut, segment, str(config["prompt"]), tokens=tokens,
                temperature=float(config["temperature"]), seed=int(config["seed"]),
            )  # fmt: skip
            rate = found.num_new / (time.perf_counter() - started)
            logger.info("text %s, %.1f tokens/s:\n%s", when, rate, found.text)
