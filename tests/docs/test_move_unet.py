"""docs/moving/unet.md: a U-Net, cut where a skip connection crosses."""

import pytest
from moving import Moved, ran_locally

PROJECT = Moved.on("docs/moving/unet.md")


@pytest.mark.parametrize("files", [PROJECT.before, PROJECT.after], ids=["before", "after"])
def test_both_projects_learn_to_segment(files, tmp_path):
    with ran_locally(files, tmp_path) as ran:
        net = ran.task.UNet()
        net.load_state_dict(ran.saved)
        _, test_loader = ran.task.load_data(0, 2, 8)
        _, iou = ran.task.test(net, test_loader, "cpu")

    assert iou > 0.6


def test_the_ledger_has_the_metric_and_the_bytes_that_the_page_names(tmp_path):
    with ran_locally(PROJECT.after, tmp_path, num_server_rounds=1, local_epochs=1) as ran:
        (entry,) = ran.result.history
        weights = sum(p.numel() for p in ran.task.UNet().parameters())

    images = 2 * 64
    assert 0 < entry.evaluation["iou"] < entry.evaluation["accuracy"] < 1
    assert entry.traffic.logical["activations-up"] == images * 48 * 1024
    assert entry.traffic.logical["gradients-down-unicast"] == images * 48 * 1024
    assert entry.traffic.logical["labels-up"] == images * 8 * 1024
    assert 4 * weights // 1024 == 115
    assert PROJECT.before["segmentation/task.py"] == PROJECT.after["segmentation/task.py"]
