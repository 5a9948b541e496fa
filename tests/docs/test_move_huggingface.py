"""docs/moving/huggingface.md: a BERT of transformers with peft's adapters."""

import pytest
import torch
from moving import Moved, ran_locally
from pages import Page

from flsplit import FlsplitError
from flsplit.vision import load_torchvision

load_torchvision()  # transformers imports it
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

PAGE = Page("docs/moving/huggingface.md")
PROJECT = Moved.on(PAGE.path)


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


def with_labels_at_home(files):
    cuts = PAGE.text.partition("`CUT = (")[2].partition(")`")[0]
    files = dict(files)
    for name, old, new in (
        ("task", 'CUT = "base_model.model.bert.encoder.layer.0"', f"CUT = ({cuts})"),
        ("server_app", "        loss=ModelLoss(),\n", ""),
        (
            "client_app",
            "from flsplit import client_app",
            "from flsplit import ModelLoss, client_app",
        ),
        ("client_app", "    cut=CUT,\n", "    cut=CUT,\n    loss=ModelLoss(),\n"),
    ):
        path = f"sentiment/{name}.py"
        assert files[path].count(old) == 1
        files[path] = files[path].replace(old, new)
    return files


def test_labels_may_stay_at_home(tmp_path):
    saved, sent = [], []
    none = "hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, vocab_size"
    plain = {name: text.replace("vocab_size", none) for name, text in PROJECT.after.items()}
    for name, files in (("one", plain), ("two", with_labels_at_home(plain))):
        with ran_locally(files, tmp_path / name, 1, num_server_rounds=1) as ran:
            saved.append(ran.saved)
            sent.append(ran.result.history[0].traffic.logical["labels-up"])
    assert sent[0] > 0 == sent[1]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


def _is_clients(name):
    return "embeddings" in name or "layer.0" in name
