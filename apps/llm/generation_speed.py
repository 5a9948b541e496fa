"""Measure how fast a text is written in split, and by the whole model.

    python apps/llm/generation_speed.py --model gpt2-small --tokens 48

Weights are random: what is written means nothing, but both write the same. The split runs in this
one process (``LocalGrid``): there is no network in it, only what the split itself costs.
"""

import argparse
import sys
import time
import tomllib
from pathlib import Path

import torch

APP = Path(__file__).resolve().parent
sys.path.insert(0, str(APP))

from llm.client_app import app  # noqa: E402
from llm.generating import generate  # noqa: E402
from llm.models import add_adapters, cut_name, load_base, load_tokenizer  # noqa: E402

from flsplit import LocalGrid  # noqa: E402
from flsplit.cut import split  # noqa: E402

PROMPT = "Parameters\n----------\n"


def main() -> None:
    """Write the same text in turn, and print the best rate of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gpt2-small")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--times", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    defaults = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    config, cut = (changed := defaults | {"model": given.model}), cut_name(changed)
    torch.manual_seed(0)
    model = add_adapters(load_base(config), config).eval()
    segment, _ = split(model, cut).divide(model.state_dict())
    grid = LocalGrid(app, 1, run_config=config, progress=False)
    (node,) = grid.get_node_ids()
    ids = torch.tensor([load_tokenizer(config)(PROMPT)["input_ids"]])

    def whole() -> list[int]:
        mask = torch.ones_like(ids)
        found = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=given.tokens, do_sample=False,
            use_cache=True,
        )  # fmt: skip
        return found[0].tolist()

    def in_split() -> list[int]:
        return generate(grid, node, model, cut, segment, PROMPT, tokens=given.tokens).ids

    best = {whole: float("inf"), in_split: float("inf")}
    for _ in range(given.times):
        texts = []
        for write in best:
            started = time.perf_counter()
            texts.append(write())
            best[write] = min(best[write], time.perf_counter() - started)
        assert texts[0] == texts[1], "the split writes another text"
    new = len(texts[0]) - ids.shape[1]
    for what, write in (("whole model", whole), ("split", in_split)):
        print(f"{what}: {new / best[write]:.1f} tokens/s")


if __name__ == "__main__":
    main()
