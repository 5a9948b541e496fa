"""docs/new-method.md, run from top to bottom; its tables."""

import tomllib
from dataclasses import fields

import pytest
import torch
from flwr.app import ArrayRecord
from pages import Page

from flsplit import LocalGrid, client_app
from flsplit.client_parts import ClientPart, ClientWhere
from flsplit.run import ClientBatch, Step, StepGradients
from flsplit.run.method import SplitMethod

PAGE = Page("docs/new-method.md")


def table(title):
    """The names in the first column of the table below a bold title."""
    lines = PAGE.text.split(f"\n**`{title}`**", 1)[1].split("\n\n")[1].splitlines()
    cells = " ".join(line.split("|")[1] for line in lines[2:])
    return {name.partition("(")[0] for name in cells.split("`")[1::2]}


def public(cls):
    return {name for name in vars(cls) if not name.startswith("_")}


@pytest.fixture(scope="module")
def page():
    """What the page has defined, from top to bottom."""
    namespace = {"__name__": "tutorial"}
    for block in PAGE.snippets():
        # Line numbers in a traceback are those of the page.
        code = compile("\n" * (block.line - 1) + block.text, PAGE.path, "exec")
        exec(code, namespace)
    return namespace


def test_the_page_runs(page):
    assert "OneGradientPlanned" in page


def test_what_its_method_remembers_survives(page, tmp_path):
    def train(num_rounds, **options):
        torch.manual_seed(0)
        model = page["build_model"]()
        app = client_app(
            model=page["build_model"], cut="1", data=page["load_partition"],
            client_parts=[page["KeepLargest"]],
        )  # fmt: skip
        strategy = page["SparseHard"](model=model, cut="1", local_steps=2, **options)
        state_dir = str(tmp_path / "clients") if options else None
        grid = LocalGrid(app, 4, state_dir=state_dir)
        return strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds).history

    folder = str(tmp_path / "server")
    train(1, checkpoint_dir=folder)
    assert train(3, checkpoint_dir=folder, resume=True).numbers() == train(3).numbers()


def test_its_entry_points_are_toml():
    (block,) = PAGE.blocks("toml")
    groups = tomllib.loads(block.text)["project"]["entry-points"]
    assert list(groups) == ["flsplit.strategies", "flsplit.client_parts"]


def test_the_tables_have_all_that_there_is():
    set_in_init = {"batches", "clients", "shares", "lr", "index", "num_steps"}
    set_in_init |= {"round", "num_rounds", "where", "keeps_labels", "weights"}
    assert table("Step") == (public(Step) | set_in_init) - {
        "end",
        "break_off",
    }  # the base class calls them
    own = {one.name for one in fields(StepGradients) if not one.name.startswith("_")}
    assert table("StepGradients") == own | {"server_gradients"}
    assert table("ClientBatch") >= {one.name for one in fields(ClientBatch)}
    hooks = public(ClientPart) - {"name", "needs_round_start", "arguments", "check_state"}
    assert table("ClientPart") == hooks
    assert table("where") >= {one.name for one in fields(ClientWhere)} | {"rng"}


def test_the_names_that_are_taken_are_listed():
    taken = PAGE.text.split("**Names that are taken.**")[1]
    assert all(f"`{name}`" in taken for name in SplitMethod.ATTRIBUTES)
