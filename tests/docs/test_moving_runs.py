"""The README's program and a project of docs/moving/ under Flower itself."""

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


def assert_it_learns(flower, path):
    """Run the U-Net's project, as its page leaves it."""
    folder, output = write_files(PROJECT.after, path / "app"), str(path / "net.pt")
    run = flower.run_app(folder, {"output": output})
    assert run.completed, run.log
    assert "2 clients served by" in run.log  # over a session
    assert intersection(folder, output) > 0.6


@pytest.mark.e2e
@pytest.mark.long
def test_both_run_in_a_simulation(program, tmp_path):
    with simulation(tmp_path, 2) as flower:
        finished = flower.run_app(program)
        assert finished.completed, finished.log
        assert "round 1/3" in finished.log
        assert_it_learns(flower, tmp_path)


@pytest.mark.e2e
@pytest.mark.long
def test_the_unet_runs_by_its_page_in_a_deployment(tmp_path):
    with deployment(tmp_path, 2) as flower:
        assert_it_learns(flower, tmp_path)
