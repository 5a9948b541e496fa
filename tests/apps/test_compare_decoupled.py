"""FSL-SAGE and CSE-FSL in the comparison: what their runs keep, and what is made of it."""

import compare
import pytest
from cosines import by_round, has_cosines
from findings import findings
from jobs import Book, Job
from measured import AFTER, BEFORE, CLIENT_MEMORY, COSINE, WHOLE_MEMORY, series_of
from memory import memory_rows
from methods import find_method, groups
from results import write_results
from studies import STUDIES, studies_in, study_rows
from training import FINAL, Setting
from workers import run_one

from flsplit.run.registry import strategy_names

RATES = {"client_lr": 0.01, "server_lr": 0.01}
OPTIONS = [
    "--methods", "psl", "fsl-sage", "cse-fsl", "fsl-sage{upload_every=1}", "--alpha", "inf",
    "--seeds", "0", "--clients", "2", "--rounds", "2",
    "--rates", "client_lr=0.01", "server_lr=0.01",
]  # fmt: skip


def a_run(megabytes=10, seed=0, accuracy=0.9, **series):
    """Return a run of one round; of its series, values by round."""
    kept = {name: {"rounds": list(v), "values": list(v.values())} for name, v in series.items()}
    return {
        "rates": RATES, "seed": seed, "accuracy": [accuracy], "bytes": [megabytes * 1_000_000],
        "up": 3e6, "down": 2e6, "gradients-down": 0, "rows": 100, "server-seconds": [0.5],
        "auxiliary-bytes": 1500, "series": kept, "clients": [accuracy] * 2, "own": [accuracy] * 2,
        "scores": {}, "weights": "examples, mean",
    }  # fmt: skip


def trained(method, rounds):
    setting = Setting("digits", "", 2, rounds, 5, 16, 200, 40)
    return run_one(Job(method, RATES, "iid", 0, FINAL), setting)


def test_groups_are_expanded():
    methods = compare.parse(["--methods", "fsl-sage", "decoupled"]).methods

    assert methods == ["fsl-sage", "cse-fsl", "splitfed-v1", "splitfed-v2", "fedavg"]
    assert set(groups()["ablations"]).isdisjoint(compare.parse([]).methods)


def test_every_value_of_a_study_is_among_the_ablations():
    values = {method for own in STUDIES.values() for method in own.values()}

    assert values == {*groups()["ablations"], "fsl-sage", "cse-fsl"}


@pytest.mark.parametrize("group", ["all", "decoupled", "ablations"])
def test_all_begin_with_the_same_client_rates(group):
    grids = [find_method(name).grid for name in groups()[group]]

    assert {tuple(grid["client_lr"]) for grid in grids if "client_lr" in grid} == {
        (0.003, 0.01, 0.03)
    }


def test_all_strategies_of_the_registry_are_compared():
    strategies = {find_method(name).strategy for name in groups()["all"]}

    assert strategies == {*strategy_names(), ""}


def test_a_run_keeps_cosines_and_memory():
    run = trained('fsl-sage{align_every=1, align="before_round"}', rounds=3)

    assert list(series_of(run, COSINE)) == [1, 2, 3]
    assert list(series_of(run, BEFORE)) == list(series_of(run, AFTER)) == [2, 3]
    assert all(series_of(run, AFTER)[r] > series_of(run, BEFORE)[r] for r in (2, 3))
    assert list(series_of(run, CLIENT_MEMORY)) == list(series_of(run, WHOLE_MEMORY)) == [1, 2, 3]


def test_alignments_are_server_seconds():
    aligned, never = (trained(f"fsl-sage{{align_every={n}}}", rounds=2) for n in (1, 0))

    assert aligned["server-seconds"][1] > 3 * never["server-seconds"][1]


def test_alignments_begin_with_the_first_round():
    """So the short runs of the tuning have seen one."""
    run = trained("fsl-sage", rounds=2)

    assert list(series_of(run, BEFORE)) == [1]


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("fsl-sage", 8 * 8 * 8 * 10 + 10),
        ("cse-fsl", 8 * 8 * 8 * 10 + 10),
        ("fsl-sage-pooled", 8 * 10 + 10),
        ('fsl-sage{auxiliary="first-stage"}', 8 * 16 * 9 + 16 + 32 + 16 * 10 + 10),
    ],
)
def test_both_sides_have_the_auxiliary_model(method, parameters):
    run = trained(method, rounds=1)

    assert "failed" not in run
    assert run["auxiliary-bytes"] == 4 * parameters


@pytest.mark.parametrize(
    ("method", "uploads"),
    [("fsl-sage", 1), ("fsl-sage{upload_every=1}", 5), ("fsl-sage{upload_every=10}", 1)],
)
def test_q_says_what_goes_up(method, uploads):
    assert trained(method, rounds=1)["rows"] == 2 * uploads * 16


def test_cosines_are_means_over_seeds():
    runs = [a_run(**{BEFORE: {6: 0.2}}), a_run(seed=1, **{BEFORE: {6: 0.4, 11: 0.6}})]

    assert by_round(runs, BEFORE) == pytest.approx({6: 0.3, 11: 0.6})


def test_runs_without_cosines_have_no_picture():
    old = {name: value for name, value in a_run().items() if name != "series"}

    assert not has_cosines({"splitfed-v2": [old]})
    assert has_cosines({"splitfed-v2": [old], "cse-fsl": [a_run(**{COSINE: {1: 0.5}})]})


def test_what_a_client_holds():
    run = a_run(**{CLIENT_MEMORY: {1: 100_000}, WHOLE_MEMORY: {1: 400_000}})

    (row,) = memory_rows({"fsl-sage": [run], "fsl-sage{upload_every=1}": [run], "psl": [a_run()]})

    assert list(row.values()) == ["FSL-SAGE", "1.5", "100", "400", "25 %"]


def test_a_study_has_its_values_in_order():
    finals = {"psl": [a_run()], "fsl-sage": [a_run(20)], "fsl-sage{upload_every=1}": [a_run(30)]}

    ((title, values),) = studies_in(finals).items()
    rows = study_rows(title, values, 85.0)

    assert [(row[title], row["MB to 85 %"]) for row in rows] == [("q=1", "30.0"), ("q=5", "20.0")]


def test_one_value_is_no_study():
    assert not studies_in({"fsl-sage{upload_every=1}": [a_run()], "cse-fsl": [a_run()]})


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ((10, 12, 11), (20, 24, 22), "agrees"),
        ((20, 24, 22), (10, 12, 11), "disagrees"),
        ((10, 12, 11), (9, 14, 11), "not told apart"),
        ((100, 120, 110), (101, 121, 111), "no difference that matters"),
        ((10, 12), (20, 24), "too few seeds"),
        ((10, None, 11), (20, 24, 22), "too few seeds"),
        ((20, 24, 22), (None, None, None), "agrees"),
        ((None, None, None), (20, 24, 22), "disagrees"),
        ((None, None, None), (None, None, None), "too few seeds"),
    ],
)
def test_fewer_bytes(ours, theirs, verdict):
    def runs(each):
        return [
            a_run(megabytes or 1, seed, accuracy=0.9 if megabytes else 0.5)
            for seed, megabytes in enumerate(each)
        ]

    (found,) = findings({"iid": {"fsl-sage": runs(ours), "fedavg": runs(theirs)}}, 85.0)

    assert found.verdict == verdict
    assert ("2 of 3" in found.measured) == ((*ours, *theirs).count(None) == 1)


def test_how_many_times_is_told_beside_the_papers():
    (found,) = findings({"iid": {"fsl-sage": [a_run(10)], "fedavg": [a_run(25)]}}, 85.0)

    assert "2.5 times FSL-SAGE's (in the paper 5.7)" in found.measured


def test_all_of_it_is_written(tmp_path):
    options = compare.parse([*OPTIONS, "--out", str(tmp_path)])
    book = Book(tmp_path, compare.setting_of(options), {}, options.rates)
    series = {COSINE: {1: 0.5}, CLIENT_MEMORY: {1: 100_000}, WHOLE_MEMORY: {1: 400_000}}
    for method in options.methods:
        found = a_run(**(series if method != "psl" else {}))
        book.add(Job(method, RATES, "iid", 0, FINAL), found)

    write_results(options, book)

    text, page = ((tmp_path / name).read_text() for name in ("results.md", "index.html"))
    for name in ("digits-iid.png", "digits-iid-cosines.png", "digits-iid-studies.png"):
        assert f"]({name})" in text
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert page.count("<figure>") == 3 + 1 + 1  # accuracies, rounds, bytes; cosines; q
    assert page.count("<table>") == 1 + 1 + 1 + 1  # methods; clients; what a client holds; q
    assert "4 ways to train together" in page
    assert text.count("| FSL-SAGE, upload_every 1 |") == 2  # in the table and each client's
