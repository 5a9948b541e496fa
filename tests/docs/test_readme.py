"""The program in the README: whole, short, and running."""

import re
from importlib import import_module

import pytest
import torch
from flwr.app import ArrayRecord, Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from pages import REPOSITORY, Page

from flsplit import LocalGrid
from flsplit.run import make_strategy, strategy_names

README = Page("README.md")
MAX_LINES = 60


def test_the_program_is_whole_and_short():
    program = {n: text for n, text in README.files().items() if n.endswith(".py")}

    assert set(program) == {"digits/task.py", "digits/client_app.py", "digits/server_app.py"}
    assert sum(len(text.splitlines()) for text in program.values()) <= MAX_LINES


def test_the_program_is_a_flower_app(program):
    assert isinstance(import_module("digits.client_app").app, ClientApp)
    assert isinstance(import_module("digits.server_app").app, ServerApp)
    # Flower looks for a plain assignment in the source before it loads an app.
    for name in ("client_app", "server_app"):
        assert "\napp = " in (program / "digits" / f"{name}.py").read_text()


def test_the_program_trains(program, capsys):
    client, server = import_module("digits.client_app"), import_module("digits.server_app")
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})

    server.app(LocalGrid(client.app, num_clients=2), context)

    accuracy = float(re.search(r"accuracy (\S+)", capsys.readouterr().out)[1])
    assert accuracy > 0.8


@pytest.mark.parametrize(
    "name", ["psl", "splitfed-v1", "splitfed-v2", "sequential-sl", "sfl-ga", "cyclesl"]
)
def test_every_strategy_of_the_table_runs_the_program(program, name):
    app, task = import_module("digits.client_app").app, import_module("digits.task")
    model = task.build_model()

    strategy = make_strategy(name, model=model, cut=task.CUT, local_steps=1)
    result = strategy.start(LocalGrid(app, num_clients=2), ArrayRecord(model.state_dict()), 1)

    whole = result.arrays.keys() == model.state_dict().keys()
    row = next(
        row for row in README.table("## Strategies") if row["class"] == type(strategy).__name__
    )
    assert row["name in a run config"] == name
    assert row["you get back"] == ("the whole model" if whole else "the server segment")
    assert all(torch.isfinite(v).all() for v in result.arrays.to_torch_state_dict().values())


def test_the_table_lists_all_strategies():
    listed = [row["name in a run config"] for row in README.table("## Strategies")]

    assert sorted(listed) == strategy_names()


def test_the_layout_lists_all_folders():
    modules = (REPOSITORY / "flsplit").glob("*/__init__.py")
    folders = {path.parent.name for path in modules} - {"strategies"}
    listed = set(re.findall(r"^  (\w+)/ ", README.section("## The repository"), re.MULTILINE))

    assert listed == folders


def test_links_between_the_pages_lead_somewhere():
    for path in [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]*)#?[^)]*\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"
