"""docs/moving/tabular.md: rows of a table, one logit, a client segment of each client's own."""

import torch
from moving import Moved, ran_locally

PROJECT = Moved.on("docs/moving/tabular.md")


def test_the_project_learns(tmp_path):
    with ran_locally(PROJECT.before, tmp_path) as ran:
        net = ran.task.TumourClassifier()
        net.load_state_dict(ran.saved)
        for client in range(2):
            _, test_loader = ran.task.load_data(client, 2, 32)
            assert ran.task.test(net, test_loader, "cpu")[1] > 0.9


def test_so_it_does_when_it_is_split(tmp_path):
    with ran_locally(PROJECT.after, tmp_path) as ran:
        entry = ran.result.history[-1]
        rows = sum(len(ran.task.load_data(client, 2, 32)[0].dataset) for client in range(2))
        weights = sum(p.numel() for p in ran.task.TumourClassifier().parameters())

    assert entry.evaluation["accuracy"] > 0.9
    logical = entry.traffic.logical
    assert logical["activations-up"] == logical["gradients-down-unicast"] == 256 * rows
    assert logical["labels-up"] == 4 * rows
    assert 4 * weights // 1024 == 16
    assert {name.partition(".")[0] for name in ran.saved} == {"layer2", "output"}


def test_the_loss_may_stay(tmp_path):
    server = "tabular/server_app.py"
    files = PROJECT.after | {
        "tabular/task.py": PROJECT.before["tabular/task.py"],
        server: PROJECT.after[server].replace("BCEWithLogitsLoss", "BCELoss"),
    }

    def history(files, folder):
        with ran_locally(files, folder, num_server_rounds=1) as ran:
            return ran.result.history[-1]

    logits = history(PROJECT.after, tmp_path / "logits")
    probabilities = history(files, tmp_path / "probabilities")
    torch.testing.assert_close(logits.loss, probabilities.loss, rtol=1e-5, atol=0.0)  # float32
    assert "accuracy" not in probabilities.evaluation
