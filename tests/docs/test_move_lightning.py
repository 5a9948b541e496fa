"""docs/moving/lightning.md: a LightningModule, of which only forward is called."""

import pytest
import torch
from moving import Moved, ran_locally

from flsplit.vision import load_torchvision

load_torchvision()  # lightning imports it
pytest.importorskip("lightning")

PROJECT = Moved.on("docs/moving/lightning.md")


@pytest.mark.parametrize("files", [PROJECT.before, PROJECT.after], ids=["before", "after"])
def test_both_projects_learn(files, tmp_path):
    with ran_locally(files, tmp_path) as ran:
        net = ran.task.LitDigits()
        net.load_state_dict(ran.saved)
        _, test_loader = ran.task.load_data(0, 2, 32)
        right = [(net.eval()(x).argmax(1) == y).float() for x, y in test_loader]

    assert torch.cat(right).mean() > 0.8


def test_what_is_not_called_may_go(tmp_path):
    task = PROJECT.after["litdigits/task.py"]
    start, end = task.index("    def training_step"), task.index("def load_data")
    files = PROJECT.after | {"litdigits/task.py": f"{task[:start]}\n\n{task[end:]}"}

    def numbers(files, folder):
        with ran_locally(files, folder, num_server_rounds=1) as ran:
            return ran.result.history.numbers()

    assert numbers(files, tmp_path / "less") == numbers(PROJECT.after, tmp_path / "as shown")


def test_an_autoencoder_gets_its_inputs_as_labels(tmp_path):
    client, server = "litdigits/client_app.py", "litdigits/server_app.py"
    files = PROJECT.after | {
        "litdigits/task.py": PROJECT.after["litdigits/task.py"]
        .replace("nn.Linear(64, 10)", "nn.Linear(64, 64), nn.Unflatten(1, (1, 8, 8))"),
        client: PROJECT.after[client].replace(
            "optimizer=Adam)", "optimizer=Adam, unpack=lambda batch: (batch[0], batch[0]))"
        ),
        server: PROJECT.after[server].replace(
            "client_strategy=", "loss=torch.nn.functional.mse_loss, client_strategy="
        ),
    }  # fmt: skip
    with ran_locally(files, tmp_path) as ran:
        loss = ran.result.history[-1].evaluation["loss"]
        images = torch.stack([image for image, _ in ran.task.load_data(0, 2, 32)[1].dataset])

    assert loss < 0.5 * images.var()
