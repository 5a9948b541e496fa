"""The comparison's numbers, from runs written down by hand."""

import math

import pytest
import torch
from findings import findings, tried
from jobs import Book, Job, tuning_jobs
from report import by_accuracy, table
from task import load, partition
from training import Setting

SETTING = Setting("digits", "", 2, 5, 1, 16, 200, 40)
RATES = {"server_lr": 0.1, "client_lr": 0.01}


def a_run(*accuracy, seed=0, rows=100, **more):
    rounds = len(accuracy)
    return {
        "rates": RATES, "seed": seed, "accuracy": list(accuracy), "rows": rows,
        "bytes": [10_000_000 * (r + 1) for r in range(rounds)], "up": 3e6, "down": 2e6,
        "gradients-down": 10 * rows, "server-seconds": [0.5] * rounds,
    } | more  # fmt: skip


def test_a_row():
    runs = [a_run(0.2, 0.8, 0.9, 1.0), a_run(0.1, 0.7, 0.8, 0.9, seed=1)]

    (row,) = table({"psl": runs}, 85.0)

    assert row["method"] == "PSL"
    assert row["accuracy, %"] == "85.0 ± 7.1"  # 90 and 80; their sample deviation is √50
    assert row["rounds to 85 %"] == "3.5 ± 0.7"
    assert row["MB to 85 %"] == "35.0 ± 7.1"
    assert row["server CPU s to 85 %"] == "1.75 ± 0.35"
    assert row["learning rates"] == "server 0.1, client 0.01"


def test_runs_that_fall_short_are_told():
    runs = [a_run(0.9, 0.9, 0.9), a_run(0.5, 0.5, 0.5), {"rates": RATES, "failed": "NaN"}]

    (row,) = table({"psl": runs}, 85.0)

    assert row["accuracy, %"] == "70.0 ± 28.3 (1 of 3 diverged)"
    assert row["rounds to 85 %"] == "1.0 (1 of 3)"


def test_a_method_that_always_diverges_comes_last():
    finals = {"epsl-1": [{"rates": RATES, "failed": "NaN"}], "psl": [a_run(0.1)]}

    assert by_accuracy(finals) == ["psl", "epsl-1"]
    assert table(finals, 85.0)[1]["accuracy, %"] == "diverged"


def test_a_rate_at_the_end_is_marked():
    run = a_run(0.5, rates={"server_lr": 0.3, "client_lr": 0.01})

    (row,) = table({"psl": [run]}, 85.0)

    assert row["learning rates"] == "server 0.3*, client 0.01"


@pytest.mark.parametrize(
    ("accuracies", "verdict"),
    [((0.6, 0.7), "agrees"), ((0.4, 0.3), "disagrees"), ((0.4, 0.7), "not told apart")],
)
def test_verdicts(accuracies, verdict):
    psl = [a_run(0.5, seed=seed) for seed in (0, 1)]
    gapsl = [a_run(accuracy, seed=seed) for seed, accuracy in enumerate(accuracies)]

    (found,) = findings({0.1: {"psl": psl, "gapsl-eta0": gapsl}}, 85.0)

    assert found.verdict == verdict
    assert ("docs/comparison.md" in tried(found.expected, [found])) == (verdict != "agrees")


def test_epsl_on_iid_data():
    psl, epsl = [a_run(0.9, rows=160)], [a_run(0.89, rows=88)]

    accuracy, cost = findings({math.inf: {"psl": psl, "epsl-0.5": epsl}}, 85.0)

    assert accuracy.verdict == cost.verdict == "agrees"
    assert cost.measured == "0.55 of PSL's rows, 0.55 of its gradient bytes down"


def test_the_best_point_is_taken(tmp_path):
    book = Book(tmp_path / "runs.jsonl", SETTING)
    jobs = tuning_jobs("psl", 0.1, 0)
    for job, accuracy in zip(jobs, (0.1, 0.5, 0.9, 0.9, 0.3, 0.2), strict=True):
        assert book.tuned("psl", 0.1, 0) is None
        book.add(job, {"accuracy": [accuracy]})

    assert book.tuned("psl", 0.1, 0) == jobs[2].rates


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    book = Book(tmp_path / "runs.jsonl", SETTING)
    first, second = tuning_jobs("psl", 0.1, 0)[:2]
    book.add(first, {"accuracy": [0.5]})
    with book.path.open("a") as file:
        file.write('{"method": "ps')

    again = Book(book.path, SETTING)
    again.add(second, {"accuracy": [0.6]})

    assert Book(book.path, SETTING).missing([first, second]) == []


def test_runs_of_another_setting_do_not_count(tmp_path):
    job = Job("psl", RATES, 0.1, 0, tuning=False)
    Book(tmp_path / "runs.jsonl", SETTING).add(job, {"accuracy": [0.5]})
    other = Setting("digits", "", 3, 5, 1, 16, 200, 40)

    assert Book(tmp_path / "runs.jsonl", other).missing([job]) == [job]


@pytest.mark.parametrize("alpha", [0.1, math.inf])
def test_parts_share_no_example(alpha):
    parts = partition("digits", "", 5, alpha, 0, 1400, 397, 16)
    sets = [one.tensors[0] for part in (parts.train, parts.validation) for one in part]
    images = torch.cat(sets).flatten(1)
    places = sorted(map(tuple, images.tolist()))

    assert len(places) == 1400
    assert places == sorted(map(tuple, load("digits", "")[0].flatten(1).tolist()))
    assert sum(map(len, parts.test)) == 397
