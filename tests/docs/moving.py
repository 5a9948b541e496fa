"""Projects that docs/moving/ moves over: before and after their diff, run over LocalGrid."""

import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from flwr.app import Context, RecordDict
from flwr.serverapp.strategy import Strategy
from pages import Page, apply_diff, importable, write_files

from flsplit import LocalGrid
from flsplit.run import SplitStrategy


@dataclass(frozen=True)
class Moved:
    """One page's project, as it was and as the page's diff makes it."""

    before: dict[str, str]
    after: dict[str, str]

    @classmethod
    def on(cls, path: str) -> "Moved":
        page = Page(path)
        diff = "".join(block.text for block in page.blocks("diff"))
        return cls(page.files(), apply_diff(diff, page.files()))

    def lines(self, name: str) -> tuple[int, int]:
        """How many lines a file had, and has; blank ones don't count."""
        return tuple(
            sum(bool(line.strip()) for line in files[name].splitlines())
            for files in (self.before, self.after)
        )


def config_of(files: dict[str, str]) -> dict[str, Any]:
    """A project's run config, with nested tables' names joined by dots as Flower does."""
    app = tomllib.loads(files["pyproject.toml"])["tool"]["flwr"]["app"]
    config: dict[str, Any] = {}
    for key, value in app["config"].items():
        items = value.items() if isinstance(value, dict) else [("", value)]
        config |= {f"{key}.{name}" if name else key: one for name, one in items}
    return config


class Ran(SimpleNamespace):
    """What a project computed: Flower's ``result``, with flsplit's history where it is split."""


@contextmanager
def ran_locally(
    files: dict[str, str], folder: Path, num_clients: int = 2, **changes: Any
) -> Iterator[Ran]:
    """Run a project over LocalGrid; in the block its modules can be imported."""
    write_files(files, folder)
    app = tomllib.loads(files["pyproject.toml"])["tool"]["flwr"]["app"]["components"]
    package = app["clientapp"].partition(".")[0]
    changes = {name.replace("_", "-"): value for name, value in changes.items()}
    config = config_of(files) | changes | {"output": str(folder / "model.pt")}
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)
    torch.manual_seed(0)
    with importable(folder), keeping_results() as results:
        client = import_module(f"{package}.client_app").app
        server = import_module(f"{package}.server_app").app
        server(LocalGrid(client, num_clients, run_config=config), context)
        yield Ran(
            result=results[-1],
            saved=torch.load(config["output"], weights_only=True),
            task=import_module(f"{package}.task"),
            config=config,
        )


@contextmanager
def keeping_results() -> Iterator[list[Any]]:
    """Keep what strategies return to the projects, which throw it away."""
    results: list[Any] = []

    def keep(start: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: results.append(start(*args, **kwargs)) or results[-1]

    with ExitStack() as stack:
        for cls in (Strategy, SplitStrategy):
            stack.enter_context(patch.object(cls, "start", keep(vars(cls)["start"])))
        yield results
