"""The tokenizer: the model's own, or one trained on the server's text."""

from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llm.texts import public_texts

END = "<|endoftext|>"
VOCABULARY = 1024  # of the small models


@lru_cache
def trained_tokenizer() -> PreTrainedTokenizerBase:
    """Train a byte-level BPE on the server's text, as GPT-2's is: it writes every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(public_texts(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


@lru_cache
def tokenizer_at(place: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a name on a hub, or in a folder.

    Raises
    ------
    ValueError
        If there is none, or it has no token that ends a text.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise ValueError(f"model={place!r} comes without a tokenizer: {error}") from error
    if not tokenizer("a")["input_ids"]:  # where files are missing, some are made that are empty
        raise ValueError(f"model={place!r} comes without a tokenizer: none writes its text")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of model={place!r} has no end-of-text token")
    return tokenizer


def check_fits(tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> None:
    """Refuse a tokenizer that writes tokens for which the model has no embedding.

    Raises
    ------
    ValueError
        If there is one.
    """
    if len(tokenizer) > num_embeddings:
        raise ValueError(
            f"the tokenizer doesn't fit the model: it writes {len(tokenizer)} tokens, the model "
            f"has embeddings for {num_embeddings}"
        )
