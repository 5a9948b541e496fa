"""A project of docs/moving/ under Flower itself: before its diff and after, in two places."""

import pytest
import torch
from moving import Moved
from pages import importable, write_files

from tests.flower_processes import deployment, simulation

PROJECT = Moved.on("docs/moving/unet.md")


def intersection(folder, output):
    """Return how well the saved model segments what the first client tests."""
    with importable(folder):
        from segmentation.task import UNet, load_data, test

        net = UNet()
        net.load_state_dict(torch.load(output, weights_only=True))
        return test(net, load_data(0, 2, 8)[1], "cpu")[1]


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("place", "projects"),
    [(simulation, [PROJECT.before, PROJECT.after]), (deployment, [PROJECT.after])],
)
def test_the_unet_runs_by_its_page(place, projects, tmp_path):
    with place(tmp_path, 2) as flower:
        for i, files in enumerate(projects):
            folder, output = write_files(files, tmp_path / f"app-{i}"), str(tmp_path / f"{i}.pt")
            run = flower.run_app(folder, {"output": output})
            assert run.completed, run.log
            assert intersection(folder, output) > 0.6
    assert "serve 2 clients" in run.log  # over a session
