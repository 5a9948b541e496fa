"""docs/moving/language-model.md: a GPT from scratch, whose tied weights are untied."""

import pytest
from moving import Moved, ran_locally

from flsplit import CutError

PROJECT = Moved.on("docs/moving/language-model.md")


@pytest.mark.parametrize("files", [PROJECT.before, PROJECT.after], ids=["before", "after"])
def test_both_projects_learn_to_spell(files, tmp_path):
    with ran_locally(files, tmp_path) as ran:
        net = ran.task.GPT()
        net.load_state_dict(ran.saved)
        _, test_loader = ran.task.load_data(0, 2, 16)
        _, perplexity = ran.task.test(net, test_loader, "cpu")

    assert perplexity < 4


def test_bytes_and_loss_are_as_the_page_says(tmp_path):
    with ran_locally(PROJECT.after, tmp_path, num_server_rounds=1, local_epochs=1) as ran:
        (entry,) = ran.result.history
        net = ran.task.GPT()
        net.load_state_dict(ran.saved)
        loaders = [ran.task.load_data(i, 2, 16) for i in range(2)]
        characters = 32 * sum(len(train.dataset) for train, _ in loaders)
        sizes = [len(test.dataset) for _, test in loaders]
        losses = [ran.task.test(net, test, "cpu")[0] for _, test in loaders]

    logical = entry.traffic.logical
    assert logical["activations-up"] == logical["gradients-down-unicast"] == 192 * characters
    assert logical["labels-up"] == 8 * characters
    mean = sum(n * loss for n, loss in zip(sizes, losses, strict=True)) / sum(sizes)
    assert entry.evaluation["loss"] == pytest.approx(mean, rel=1e-5)  # float32, other batches


def test_tied_weights_are_named(tmp_path):
    task = {"writer/task.py": PROJECT.before["writer/task.py"]}

    tied = "tokens.weight = head.weight"
    with pytest.raises(CutError, match=tied), ran_locally(PROJECT.after | task, tmp_path):
        pass
