"""The page about moving over: the app before, the diff, the app after."""

from importlib import import_module

import pytest
import torch
from flwr.app import Context, RecordDict
from pages import Page, apply_diff, importable, write_files

from flsplit import LocalGrid

PAGE = Page("docs/move-over.md")
BEFORE = PAGE.files()
AFTER = apply_diff("".join(block.text for block in PAGE.blocks("diff")), BEFORE)


def run(files, folder, num_rounds=3):
    """Run an app over LocalGrid; return its result as printed, and the model that it saved."""
    config = {
        "num-server-rounds": num_rounds,
        "learning-rate": 0.1,
        "fraction-evaluate": 1.0,
        "batch-size": 32,
        "local-epochs": 2,
        "output": str(folder / "model.pt"),
    }
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)
    write_files(files, folder)
    torch.manual_seed(0)
    with importable(folder):
        client = import_module("pytorchexample.client_app").app
        server = import_module("pytorchexample.server_app").app
        task = import_module("pytorchexample.task")
        server(LocalGrid(client, num_clients=2, run_config=config), context)
        net = task.Net()
        net.load_state_dict(torch.load(config["output"], weights_only=True))
        test_loaders = [task.load_data(i, 2, 32)[1] for i in range(2)]
        return net, [task.test(net, loader, "cpu")[1] for loader in test_loaders]


@pytest.mark.parametrize("files", [BEFORE, AFTER], ids=["before", "after"])
def test_both_apps_train(files, tmp_path):
    _, accuracies = run(files, tmp_path)

    assert min(accuracies) > 0.5


def test_the_diff_leaves_no_trace_of_what_went():
    client, server = AFTER["pytorchexample/client_app.py"], AFTER["pytorchexample/server_app.py"]

    assert "app.train" not in client
    assert "FedAvg" not in server
    assert AFTER["pytorchexample/task.py"] == BEFORE["pytorchexample/task.py"]
    assert len(client.splitlines()) < len(BEFORE["pytorchexample/client_app.py"].splitlines())


def test_the_app_works_without_its_own_loops(tmp_path):
    task = AFTER["pytorchexample/task.py"]
    files = AFTER | {"pytorchexample/task.py": task[: task.index("\n\ndef train(")]}
    write_files(files, tmp_path)

    with importable(tmp_path):
        import_module("pytorchexample.client_app")
        import_module("pytorchexample.server_app")
