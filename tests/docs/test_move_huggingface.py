"""docs/moving/huggingface.md: a BERT of transformers with peft's adapters."""

import pytest
from moving import Moved, ran_locally

from flsplit import FlsplitError
from flsplit.vision import load_torchvision

load_torchvision()  # transformers imports it
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

PROJECT = Moved.on("docs/moving/huggingface.md")


def accuracies(ran):
    net = ran.task.get_model()
    peft.set_peft_model_state_dict(net, ran.saved)
    loaders = [ran.task.load_data(i, 2, 16)[1] for i in range(2)]
    return [ran.task.test(net, loader, "cpu")[1] for loader in loaders]


def test_the_project_learns(tmp_path):
    with ran_locally(PROJECT.before, tmp_path) as ran:
        assert min(accuracies(ran)) > 0.8


def test_so_it_does_when_it_is_split_and_only_adapters_travel(tmp_path):
    with ran_locally(PROJECT.after, tmp_path) as ran:
        assert min(accuracies(ran)) > 0.8
        model = ran.task.get_model()
        history = ran.result.history

    layer = [p for name, p in model.named_parameters() if "layer.0" in name and p.requires_grad]
    adapters = 4 * sum(p.numel() for p in layer)
    assert adapters == 2048
    whole = 4 * sum(p.numel() for name, p in model.named_parameters() if _is_clients(name))
    down = [entry.traffic.logical["client-segments-down"] for entry in history]
    up = [entry.traffic.logical["client-segments-up"] for entry in history]
    assert up == [2 * adapters] * 3
    assert down[1:] == [2 * adapters] * 2
    # Evaluated is what was averaged: adapters again, beside the whole segment.
    assert down[0] == 2 * whole + 2 * adapters


def test_the_mask_is_asked_for(tmp_path):
    files = {
        name: text.replace('share=["attention_mask"],', "") for name, text in PROJECT.after.items()
    }

    with pytest.raises(FlsplitError, match="attention_mask"), ran_locally(files, tmp_path):
        pass


def _is_clients(name):
    return "embeddings" in name or "layer.0" in name
