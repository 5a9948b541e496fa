"""More pages about moving over: each project trains before its diff, and after it."""

from importlib import import_module

import pytest
import torch
from flwr.app import Context, RecordDict
from pages import Page, apply_diff, importable, write_files

from flsplit import LocalGrid
from flsplit.vision import load_torchvision

load_torchvision()  # transformers imports it, also where its wheel doesn't fit

PAGES = {
    "huggingface": ("reviews", 0.02, 0.9),
    "segmentation": ("squares", 0.01, 0.9),
    "language-model": ("letters", 0.01, 0.5),
    "tabular": ("income", 0.02, 0.9),
}
"""The page's package, a learning rate, and the accuracy that is learnt."""


def files_of(name):
    page = Page(f"docs/move-over-{name}.md")
    before = page.files()
    diff = "".join(block.text for block in page.blocks("diff"))
    return before, before | apply_diff(diff, before)


def run(files, package, lr, folder):
    """Run an app over LocalGrid; return its task module and the model that it saved."""
    config = {
        "num-server-rounds": 3,
        "learning-rate": lr,
        "fraction-evaluate": 1.0,
        "batch-size": 8,
        "local-epochs": 2,
        "output": str(folder / "model.pt"),
    }
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)
    write_files(files, folder)
    torch.manual_seed(0)
    with importable(folder):
        client = import_module(f"{package}.client_app").app
        server = import_module(f"{package}.server_app").app
        task = import_module(f"{package}.task")
        server(LocalGrid(client, num_clients=2, run_config=config), context)
        net = task.build_model()
        net.load_state_dict(torch.load(config["output"], weights_only=True))
        return [task.test(net, task.load_data(i, 2, 8)[1])[1] for i in range(2)]


@pytest.mark.parametrize("moved", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", PAGES)
def test_both_apps_learn(name, moved, tmp_path):
    package, lr, enough = PAGES[name]
    accuracies = run(files_of(name)[moved], package, lr, tmp_path)
    assert min(accuracies) > enough


@pytest.mark.parametrize("name", PAGES)
def test_the_diff_leaves_no_loops_and_no_fedavg(name):
    before, after = files_of(name)
    package, *_ = PAGES[name]
    assert "app.train" not in after[f"{package}/client_app.py"]
    assert "FedAvg" not in after[f"{package}/server_app.py"]
    assert after[f"{package}/task.py"] == before[f"{package}/task.py"]
