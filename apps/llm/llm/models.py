"""The model, a causal language model of transformers, with adapters of peft, and its cut."""

import copy
from collections.abc import Mapping
from functools import lru_cache

import torch
from flwr.app import Context, UserConfigValue
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from llm.tokenizing import VOCABULARY, check_fits, tokenizer_at, trained_tokenizer

RANDOM = {
    "gpt2-small": GPT2Config(
        vocab_size=VOCABULARY, n_positions=256, n_embd=128, n_layer=4, n_head=4, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    ),
    "llama-small": LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=256, hidden_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=352, bos_token_id=0,
        eos_token_id=0,
    ),
    # To measure with; the larger one has the size of GPT-2 medium.
    "gpt2-40m": GPT2Config(n_embd=384, n_layer=12, n_head=6, bos_token_id=0, eos_token_id=0),
    "gpt2-355m": GPT2Config(n_embd=1024, n_layer=24, n_head=16, bos_token_id=0, eos_token_id=0),
}  # fmt: skip
"""Models that begin with random weights, and share a tokenizer."""

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}
DECOUPLED = ("fsl-sage", "cse-fsl")  # whose clients train without waiting for the server
ADAPT = ("both", "client", "server")

RunConfig = Mapping[str, UserConfigValue]


def begins_random(config: RunConfig) -> bool:
    """Tell whether the model is one of those above."""
    return str(config["model"]) in RANDOM


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer."""
    return trained_tokenizer() if begins_random(config) else tokenizer_at(str(config["model"]))


def load_base(config: RunConfig, *, of_client: bool = False) -> nn.Module:
    """Return the model without adapters.

    Parameters
    ----------
    config : mapping
        The run config: ``model``, ``precision``, ``rank``, ``seq-length``, ``checkpointing``.
    of_client : bool
        A client gets its weights from the server, so it loads none, and what is more than one
        block behind the cut it never needs: it has no room for that.

    Raises
    ------
    ValueError
        If the tokenizer or the sequences don't fit it.
    """
    model_config = _config_of(config)
    _check_sequences(config, model_config)
    check_fits(load_tokenizer(config), model_config.vocab_size)
    dtype = PRECISIONS[one_of(config, "precision", PRECISIONS)]
    shorter = of_client and not bool(config["label-private"])  # else it has both ends
    if shorter:
        _shorten(model_config, num_client_blocks(config) + 1)
    if of_client or begins_random(config):
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            str(config["model"]), config=model_config, dtype=dtype
        )
    _untie(model)
    if shorter:
        model.set_output_embeddings(nn.Identity())
    if bool(config["checkpointing"]):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def trains_head(config: RunConfig) -> bool:
    """Tell whether the last layer is trained as a whole, and not left as it is."""
    return int(config["rank"]) == 0 or bool(config["train-head"])


def add_adapters(model: nn.Module, config: RunConfig) -> nn.Module:
    """Return the model with adapters at all linear layers of its blocks; as it is at rank 0.

    With ``train-head``, what is saved with the adapters is a whole last layer, too: text of
    another kind has its words in other numbers, and low ranks can't say that.
    """
    rank = int(config["rank"])
    if rank < 0:
        raise ValueError(f"rank={rank}, expected that of the adapters, or 0 for none")
    if rank == 0:
        return model
    where = one_of(config, "adapt", ADAPT)
    blocks, num_client = range(model.config.num_hidden_layers), num_client_blocks(config)
    chosen = {"both": blocks, "client": blocks[:num_client], "server": blocks[num_client:]}[where]
    adapted = tuple(f"{_blocks(config)[0]}.{index}." for index in chosen)
    targets = [
        name
        for name, module in model.named_modules()
        if name.startswith(adapted) and isinstance(module, nn.Linear | Conv1D)
    ]
    head = model.get_output_embeddings()  # nothing, where it is a client's model
    whole = [name for name, m in model.named_modules() if m is head and trains_head(config)]
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank,
        target_modules=targets,
        modules_to_save=whole if [*head.parameters()] else None,
    )
    return get_peft_model(model, lora)


def build_model(context: Context) -> nn.Module:
    """Return the model as a client knows it: its own blocks, whose weights come, and one more."""
    return add_adapters(load_base(context.run_config, of_client=True), context.run_config)


# --- where it is cut ---------------------------------------------------------------------------


def cut_name(config: RunConfig) -> str:
    """Return the name of the last block that clients compute, in the model with its adapters.

    With ``label-private`` the last block of all follows it: what comes after that is the clients'.
    """
    blocks, number = _blocks(config)
    path = f"base_model.model.{blocks}" if int(config["rank"]) else blocks
    first = f"{path}.{num_client_blocks(config) - 1}"
    return f"{first},{path}.{number - 1}" if bool(config["label-private"]) else first


def num_client_blocks(config: RunConfig) -> int:
    """Return how many blocks clients compute, from ``cut``: a number, or the last one's name.

    Raises
    ------
    ValueError
        If that is no block, or none is left to the server; the nearest blocks are named.
    """
    name, num_blocks = _blocks(config)
    given = str(config["cut"])
    names = {f"{name}.{index}": index + 1 for index in range(num_blocks)}
    found = names.get(given) or (int(given) if given.lstrip("-").isdecimal() else None)
    if found is not None and 1 <= found < num_blocks:
        return found
    if found is None:
        place = next((n for prefix, n in names.items() if given.startswith(f"{prefix}.")), 1)
    else:
        place = min(max(found, 1), num_blocks)
    near = [n for n in (place - 1, place, place + 1) if 1 <= n < num_blocks]
    raise ValueError(
        f"cut={given!r} is no block after which {config['model']} can be cut, expected how many "
        f"of its {num_blocks} blocks are the clients', 1 to {num_blocks - 1}, or the last one's "
        f"name; the nearest: {', '.join(f'{n} ({name}.{n - 1})' for n in near)}"
    )


def _blocks(config: RunConfig) -> tuple[str, int]:
    return _blocks_of(str(config["model"]))


@lru_cache
def _blocks_of(name: str) -> tuple[str, int]:
    """Return the name of a model's list of blocks, and its length."""
    config = RANDOM.get(name) or config_at(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    number = config.num_hidden_layers
    lists = (
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == number
    )
    return next(lists), number


# --- the run config ----------------------------------------------------------------------------


def one_of(config: RunConfig, key: str, known: Mapping[str, object] | tuple[str, ...]) -> str:
    """Return a run-config value that has to be one of some.

    Raises
    ------
    ValueError
        If it isn't.
    """
    found = str(config[key])
    if found not in known:
        raise ValueError(f"{key}={found!r} is unknown, expected one of {', '.join(known)}")
    return found


def config_at(place: str) -> PretrainedConfig:
    """Return the configuration of a model by its name on a hub, or in a folder.

    Raises
    ------
    ValueError
        If there is none.
    """
    try:
        return AutoConfig.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model={place!r} is none of {', '.join(RANDOM)}, and neither the absolute path of a "
            f"model's folder on this machine nor a name on a hub that can be reached: {error}"
        ) from error


def _config_of(config: RunConfig) -> PretrainedConfig:
    name = str(config["model"])
    found = copy.deepcopy(RANDOM[name]) if name in RANDOM else config_at(name)
    # Training needs no keys and values. But without them models look whether positions are those of
    # packed sequences, which the server then has to know; auxiliary models take one tensor only.
    found.use_cache = config["strategy"] in DECOUPLED
    return found


def _untie(model: nn.Module) -> None:
    """Give the last layer weights of its own.

    Two machines can't train one tensor, and a frozen one would go to the clients a second time.
    """
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False


def _shorten(config: PretrainedConfig, num_blocks: int) -> None:
    """Let a model have its first blocks only."""
    config.num_hidden_layers = num_blocks
    if kinds := getattr(config, "layer_types", None):  # where blocks differ
        config.layer_types = kinds[:num_blocks]


def _check_sequences(config: RunConfig, model_config: PretrainedConfig) -> None:
    length, most = int(config["seq-length"]), model_config.max_position_embeddings
    if not 2 <= length <= most:
        raise ValueError(
            f"seq-length={length} doesn't fit {config['model']}, which has {most} positions: "
            f"expected 2 to {most}"
        )
