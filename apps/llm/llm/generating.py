"""Split generation: the client embeds and picks tokens, the server computes the other blocks.

An exchange is a token: logits come down, the smashed data of the token picked goes up. Both sides
keep the keys and values of their blocks, so each computes one position per token. They live in the
client's process: it needs a carrier that keeps that, a session or a ``LocalGrid``.
"""

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedTokenizerBase

from flsplit.message.arrays import from_record, to_record
from llm.models import build_model, cut_name, load_tokenizer

GENERATE = "query.generate"


class _ReachedError(Exception):
    """The cut layer has returned."""

    def __init__(self, smashed: Tensor) -> None:
        self.smashed = smashed


class FirstBlocks:
    """A client's part of a model that generates.

    Parameters
    ----------
    model : nn.Module
        The model, or one with the same first blocks.
    cut : str
        The last block of the client's.
    """

    def __init__(self, model: nn.Module, cut: str) -> None:
        self._model, self._cut = model.eval(), model.get_submodule(cut)
        self._cache = DynamicCache(config=model.config)

    @torch.no_grad()
    def smash(self, ids: Tensor) -> Tensor:
        """Return the smashed data ``(1, n, ...)`` of further tokens ``(1, n)``."""

        def stop(_module: nn.Module, _inputs: Any, output: Any) -> None:
            raise _ReachedError(output if isinstance(output, Tensor) else output[0])

        hook = self._cut.register_forward_hook(stop)
        try:
            _forward(self._model, ids, self._cache)
        except _ReachedError as reached:
            return reached.smashed
        finally:
            hook.remove()
        raise AssertionError("the cut layer was not called")


class _Received(nn.Module):
    """In the place of a client's block: gives what came, and counts positions as it would."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.smashed = torch.empty(0)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        cache = next(v for v in (*args, *kwargs.values()) if isinstance(v, Cache))
        nothing = hidden.new_zeros(len(hidden), 1, hidden.shape[1], 1)
        cache.update(nothing, nothing, self.index)
        return self.smashed


class LastBlocks:
    """The server's part of a model that generates.

    Parameters
    ----------
    model : nn.Module
        The model; of its first blocks and of what comes before them only shapes are used.
    cut : str
        The last block of the client's.
    """

    def __init__(self, model: nn.Module, cut: str) -> None:
        self._model = model.eval()
        blocks, _, last = cut.rpartition(".")
        self._blocks = model.get_submodule(blocks)
        self._received = [_Received(index) for index in range(int(last) + 1)]
        self._cache = DynamicCache(config=model.config)

    @torch.no_grad()
    def logits(self, smashed: Tensor) -> Tensor:
        """Return the logits ``(1, vocabulary)`` of what follows the last position."""
        smashed = smashed.to(next(self._model.parameters()).device)
        for one in self._received:
            one.smashed = smashed
        ids = torch.zeros(smashed.shape[:2], dtype=torch.long, device=smashed.device)
        with self._without_first_blocks():
            return _forward(self._model, ids, self._cache).logits[:, -1]

    @contextmanager
    def _without_first_blocks(self) -> Iterator[None]:
        own = list(self._blocks)[: len(self._received)]
        for index, one in enumerate(self._received):
            self._blocks[index] = one
        try:
            yield
        finally:
            for index, one in enumerate(own):
                self._blocks[index] = one


def _forward(model: nn.Module, ids: Tensor, cache: Cache) -> Any:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = signature(type(base).forward).parameters
    name = "cache" if "cache" in names else "past_key_values"  # its old name
    return model(input_ids=ids, use_cache=True, **{name: cache})


# --- the client ------------------------------------------------------------------------------


@dataclass
class _Generation:
    """A text that grows."""

    blocks: FirstBlocks
    tokenizer: PreTrainedTokenizerBase
    ids: Tensor  # (1, n)
    left: int
    temperature: float
    random: torch.Generator

    def pick(self, logits: Tensor) -> Tensor:
        """Return the next token ``(1, 1)``; the most likely one at temperature 0."""
        if self.temperature == 0.0:
            found = logits.argmax(-1, keepdim=True)
        else:
            shares = torch.softmax(logits.float() / self.temperature, -1)
            found = torch.multinomial(shares, 1, generator=self.random)
        self.ids = torch.cat([self.ids, found], 1)
        self.left -= 1
        return found

    @property
    def is_over(self) -> bool:
        return not self.left or int(self.ids[0, -1]) == self.tokenizer.eos_token_id


_generations: dict[str, _Generation] = {}  # by the clients that this process serves


def add_generation(app: ClientApp) -> None:
    """Let a ClientApp answer ``query.generate``."""

    @app.query("generate")
    def generate(message: Message, context: Context) -> Message:
        client = str(context.node_config["partition-id"])
        config = message.content["config"]
        if "prompt" in config:
            _generations[client] = _begin(config, message.content["arrays"], context)
            own = _generations[client]
            content = RecordDict({"smashed-data": to_record({"0": own.blocks.smash(own.ids)})})
        else:
            if client not in _generations:
                raise LookupError(
                    f"client {client} has begun no text: its process is another than before, "
                    "which a session or a LocalGrid keeps"
                )
            own = _generations[client]
            logits = from_record(message.content["logits"], field="logits")["0"]
            token = own.pick(logits)
            content = RecordDict()
            if own.is_over:
                del _generations[client]
                ids = own.ids[0].tolist()
                content["reply"] = ConfigRecord({"text": own.tokenizer.decode(ids), "ids": ids})
            else:
                content["smashed-data"] = to_record({"0": own.blocks.smash(token)})
        return Message(content, reply_to=message)


def _begin(config: ConfigRecord, arrays: ArrayRecord, context: Context) -> _Generation:
    model = build_model(context)
    segment = from_record(arrays, field="arrays")
    if unknown := model.load_state_dict(segment, strict=False).unexpected_keys:
        raise ValueError(f"arrays hold {unknown[0]!r}, which the model has not")
    tokenizer = load_tokenizer(context.run_config)
    ids = tokenizer(str(config["prompt"]))["input_ids"] or [tokenizer.eos_token_id]
    most, tokens = model.config.max_position_embeddings, int(config["tokens"])
    if len(ids) + tokens > most:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, and {tokens} are to follow: the model has {most} "
            "positions"
        )
    return _Generation(
        FirstBlocks(model, cut_name(context.run_config)),
        tokenizer,
        torch.tensor([ids]),
        tokens,
        float(config["temperature"]),
        torch.Generator().manual_seed(int(config["seed"])),
    )


# --- the server ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Generated:
    """A text that was generated, prompt included."""

    text: str
    ids: list[int]
    num_new: int


def generate(
    grid: Grid,
    node: int,
    model: nn.Module,
    cut: str,
    segment: Mapping[str, Tensor],
    prompt: str,
    *,
    tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> Generated:
    """Generate a text together with a client.

    Parameters
    ----------
    grid : Grid
        An open session, or a ``LocalGrid``.
    node : int
        The client's.
    model : nn.Module
        With the server's part of the weights.
    cut : str
        The last block of the client's.
    segment : mapping
        The client's part of the weights.
    prompt : str
        What the client begins with.
    tokens : int
        How many to add at most; the end of a text ends it.
    temperature : float
        0 for the most likely token each time.
    seed : int
        Of what is drawn otherwise.
    """
    blocks = LastBlocks(model, cut)
    settings = {"prompt": prompt, "tokens": tokens, "temperature": temperature, "seed": seed}
    content = RecordDict({"config": ConfigRecord(settings), "arrays": to_record(segment)})
    for num_new in itertools.count():
        (answer,) = grid.send_and_receive([Message(content, node, GENERATE)])
        if answer.has_error():
            raise RuntimeError(f"client of node {node}: {answer.error.reason}")
        if "reply" in answer.content:
            reply = answer.content["reply"]
            return Generated(str(reply["text"]), list(reply["ids"]), num_new)
        smashed = from_record(answer.content["smashed-data"], field="smashed-data")["0"]
        logits = to_record({"0": blocks.logits(smashed).cpu()})
        content = RecordDict({"config": ConfigRecord({}), "logits": logits})
    raise AssertionError  # the client ends it
