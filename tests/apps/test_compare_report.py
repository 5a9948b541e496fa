"""The comparison's numbers, from runs written down by hand."""

import pytest
from findings import findings, strength, summary
from jobs import TUNING_SEEDS, Book, Job, tuning_jobs
from report import by_accuracy, client_rows, table, tuning_rows
from training import DECIDING, FINAL, SCREENING, Setting
from tuning import Choice, choose, grid_for, parse_grid

from flsplit.errors import ConfigError

SETTING = Setting("digits", "", 2, 5, 1, 16, 200, 40)
RATES = {"client_lr": 0.01, "server_lr": 0.1}


def a_run(*accuracy, seed=0, rows=100, **more):
    rounds = len(accuracy)
    return {
        "rates": RATES, "seed": seed, "accuracy": list(accuracy), "rows": rows,
        "bytes": [10_000_000 * (r + 1) for r in range(rounds)], "up": 3e6, "down": 2e6,
        "gradients-down": 10 * rows, "server-seconds": [0.5] * rounds, "scores": {},
        "clients": [0.5, accuracy[-1]], "own": [0.9, 0.7], "weights": "examples, mean",
    } | more  # fmt: skip


def runs_of(*accuracies, **more):
    return [a_run(one, seed=seed, **more) for seed, one in enumerate(accuracies)]


def test_a_row():
    runs = [a_run(0.2, 0.8, 0.9, 1.0), a_run(0.1, 0.7, 0.8, 0.9, seed=1)]

    (row,) = table({"psl": runs}, 85.0)

    assert row["method"] == "PSL"
    assert row["accuracy, %"] == "85.0 ± 7.1"  # 90 and 80; their sample deviation is √50
    assert row["worst client, %"] == "50.0 ± 0.0"
    assert row["own kind, %"] == "80.0 ± 0.0"
    assert row["rounds to 85 %"] == "3.5 ± 0.7"
    assert row["MB to 85 %"] == "35.0 ± 7.1"
    assert row["server CPU s to 85 %"] == "1.75 ± 0.35"
    assert row["learning rates"] == "client 0.01, server 0.1"
    assert row["shares, losses"] == "examples, mean"


def test_runs_that_fall_short_are_told():
    runs = [a_run(0.9, 0.9, 0.9), a_run(0.5, 0.5, 0.5), {"rates": RATES, "failed": "NaN"}]

    (row,) = table({"psl": runs}, 85.0)

    assert row["accuracy, %"] == "70.0 ± 28.3 (1 of 3 diverged)"
    assert row["rounds to 85 %"] == "1.0 (1 of 3)"


def test_a_method_that_always_diverges_comes_last():
    finals = {"epsl": [{"rates": RATES, "failed": "NaN"}], "psl": [a_run(0.1)]}

    assert by_accuracy(finals) == ["psl", "epsl"]
    assert table(finals, 85.0)[1]["accuracy, %"] == "diverged"


def test_methods_stand_against_one_with_a_verdict():
    finals = {"psl": runs_of(0.5, 0.6, 0.7), "gapsl": runs_of(0.52, 0.62, 0.72)}

    rows = {row["method"]: row for row in table(finals, 85.0, "psl")}

    assert rows["GAPSL"]["against PSL, points"] == "+2.0 ± 0.0: above"
    assert rows["PSL"]["against PSL, points"] == "-"
    assert list(rows["GAPSL"]) == list(rows["PSL"])


def test_a_papers_numbers_stand_beside():
    finals = {"psl": runs_of(0.5), "cyclesl": runs_of(0.5)}

    rows = table(finals, 85.0, paper={"psl": 47.3})

    assert [row["the paper, %"] for row in rows] == ["47.3", "-"]


def test_clients_are_told_one_by_one():
    (row,) = client_rows({"psl": [a_run(0.6), a_run(0.8, seed=1)]})

    assert row == {"method": "PSL", "client 0, %": "50 / 90", "client 1, %": "70 / 70"}


@pytest.mark.parametrize(
    ("gapsl", "verdict"),
    [
        ((0.60, 0.61, 0.62), "agrees"),
        ((0.40, 0.39, 0.38), "disagrees"),
        ((0.40, 0.70, 0.50), "not told apart"),
        ((0.500, 0.501, 0.502), "no difference that matters"),
        ((0.60, 0.61), "too few seeds"),  # "agrees" until there were intervals
    ],
)
def test_verdicts_on_a_papers_claim(gapsl, verdict):
    finals = {"psl": runs_of(*[0.5] * len(gapsl)), "gapsl": runs_of(*gapsl)}

    (found,) = findings({"dirichlet:alpha=0.1": finals}, 85.0)

    assert found.verdict == verdict
    assert not findings({"iid": finals}, 85.0)  # it is of skewed labels


def test_every_variant_that_was_asked_for_is_judged():
    finals = {"psl": runs_of(0.5), "gapsl": runs_of(0.5), "gapsl{eta=-1}": runs_of(0.5)}

    found = findings({"dirichlet:alpha=0.1": finals}, 85.0)

    assert [one.measured.split(" 50")[0] for one in found] == ["GAPSL", "GAPSL, eta -1"]


@pytest.mark.parametrize(
    ("epsl", "verdict"),
    [
        ((0.89, 0.891, 0.889), "agrees"),
        ((0.85, 0.851, 0.849), "disagrees"),
        ((0.80, 0.95, 0.88), "not told apart"),
        ((0.89,), "too few seeds"),
    ],
)
def test_epsl_on_iid_data(epsl, verdict):
    psl, epsl = runs_of(*[0.9] * len(epsl), rows=160), runs_of(*epsl, rows=88)

    accuracy, cost = findings({"iid": {"psl": psl, "epsl": epsl}}, 85.0)

    assert (accuracy.verdict, cost.verdict) == (verdict, "agrees")
    assert cost.measured == "0.55 of PSL's rows, 0.55 of its gradient bytes down"


def test_the_summary_names_the_best_of_all_that_were_run():
    """A variant that is better than all others was left out, once."""
    finals = {"psl": runs_of(0.5), 'fsl-sage{align="before_round"}': runs_of(0.9)}

    assert "most accurate is FSL-SAGE, align before_round with 90.0 %" in summary(finals, "psl")


def test_what_seeds_can_find_is_told():
    finals = {"psl": runs_of(0.5, 0.5, 0.5), "gapsl": runs_of(0.52, 0.53, 0.54)}

    told = strength(finals, "psl")

    assert "1 of 1 methods were told apart from PSL" in told
    assert "vary by 1.0 points" in told
    # ncp = 2 / (1 / √3), 2 degrees of freedom: scipy.stats.nct.sf(4.3027, 2, 3.4641) = 0.470
    assert "found in 47 % of cases with these 3 seeds, and in 80 % with 5 seeds" in told


# --- tuning -------------------------------------------------------------------------------------

GRID = {"client_lr": [0.01, 0.03], "server_lr": [0.1]}


def searched(best, grid=GRID, *, diverges=()):
    """Tune on a surface whose accuracy falls with the distance from ``best``; return what ran."""
    ran = {SCREENING: [], DECIDING: []}

    def score(stage):
        def of(point):
            if point not in ran[stage]:
                return None
            if point["client_lr"] in diverges:
                return []
            return [50 - abs(point["client_lr"] - best)] * len(TUNING_SEEDS[stage])

        return of

    for _ in range(50):
        came = choose(grid, score(SCREENING), score(DECIDING))
        if isinstance(came, Choice):
            return came, ran
        stage, points = came
        assert points
        ran[stage] += points
    raise AssertionError("it never ends")


def test_a_best_point_inside_is_taken_and_nothing_more_is_tried():
    choice, ran = searched(0.03, {"client_lr": [0.01, 0.03, 0.1], "server_lr": [0.1]})

    assert choice.rates == {"client_lr": 0.03, "server_lr": 0.1}
    assert len(ran[SCREENING]) == len(ran[DECIDING]) == 3
    assert choice.ends == ()
    assert choice.scores == [50.0, 50.0]
    assert choice.lead == pytest.approx([0.02, 0.02])


@pytest.mark.parametrize(("best", "taken"), [(0.09, 0.09), (0.0033, 0.0033), (0.27, 0.27)])
def test_the_grid_is_widened_where_the_best_is_at_its_end(best, taken):
    choice, _ = searched(best)

    assert choice.rates["client_lr"] == taken
    assert choice.ends == ()


def test_a_rate_that_is_at_the_end_all_the_same_is_marked():
    choice, ran = searched(1e9)

    assert choice.rates["client_lr"] == max(one["client_lr"] for one in ran[DECIDING])
    assert choice.ends == ("client_lr",)
    (row,) = tuning_rows({"psl": choice}, {"psl": [{"cpu-seconds": 3.0}, {"cpu-seconds": 4.0}]})
    assert row["learning rates"].startswith("client ")
    assert "*, server 0.1" in row["learning rates"]
    assert (row["short runs"], row["CPU s"]) == ("2", "7")


def test_points_that_diverge_are_never_taken():
    choice, _ = searched(0.03, diverges=(0.03, 0.09))

    assert choice.rates["client_lr"] == 0.01


def test_a_grid_can_be_given():
    given = parse_grid("--grid", ["client-lr=0.1,0.2"])

    own = {"client_lr": [0.01], "server_lr": [0.3]}
    assert grid_for(own, given) == {"client_lr": [0.1, 0.2], "server_lr": [0.3]}
    assert grid_for({"lr": [0.5]}, given) == {"lr": [0.1, 0.2]}
    for wrong in ("client_lr", "client_lr=", "client_lr=a", "rate=0.1", "lr=-1"):
        with pytest.raises(ConfigError, match="--grid"):
            parse_grid("--grid", [wrong])


# --- the file of runs ---------------------------------------------------------------------------


def filled(folder):
    book = Book(folder, SETTING, {"client_lr": [0.01, 0.03], "server_lr": [0.1]})
    while not isinstance(jobs := book.tuned("psl", "iid"), Choice):
        for job in jobs:
            level = 0.9 - abs(job.rates["client_lr"] - 0.03) - (job.seed - 1000) / 100
            book.add(job, {"accuracy": [0.0, level, level], "cpu-seconds": 1.0})
    return book


def test_tuning_comes_from_the_file(tmp_path):
    book = filled(tmp_path)

    choice = book.tuned("psl", "iid")
    assert choice.rates == {"client_lr": 0.03, "server_lr": 0.1}
    assert choice.scores == pytest.approx([89.0, 88.0])
    assert len(book.tuning_runs("psl", "iid")) == 3 + 2 * 3  # .01, .03, and further .09
    assert book.finals("psl", "iid", [0]) == []
    assert Book(tmp_path, SETTING, book.grid).tuned("psl", "iid") == choice


def test_rates_that_are_given_are_not_tuned(tmp_path):
    book = Book(tmp_path, SETTING, {}, {"client_lr": [0.5], "server_lr": [0.25]})

    assert book.tuned("psl", "iid").rates == {"client_lr": 0.5, "server_lr": 0.25}
    assert book.tuned("fedavg", "iid").rates == {"lr": 0.5}
    assert book.tuned("sglr", "iid").rates == {"client_lr": 0.5, "alpha": 0.5}


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    book = Book(tmp_path, SETTING)
    first, second = (tuning_jobs("psl", {"client_lr": r}, "iid", SCREENING)[0] for r in (0.1, 0.2))
    book.add(first, {"accuracy": [0.5]})
    with book.path.open("a") as file:
        file.write('{"method": "ps')

    again = Book(tmp_path, SETTING)
    again.add(second, {"accuracy": [0.6]})

    assert Book(tmp_path, SETTING).missing([first, second]) == []


def test_runs_of_another_setting_are_refused_with_the_difference(tmp_path):
    Book(tmp_path, SETTING).add(Job("psl", RATES, "iid", 0, FINAL), {"accuracy": [0.5]})

    with pytest.raises(ConfigError, match="clients was 2 and is 3"):
        Book(tmp_path, Setting("digits", "", 3, 5, 1, 16, 200, 40))
    with pytest.raises(ConfigError, match=r"grid was \{\} and is"):
        Book(tmp_path, SETTING, {"client_lr": [1.0]})


def test_a_folder_of_an_older_version_is_refused(tmp_path):
    (tmp_path / "runs.jsonl").write_text("{}\n")

    with pytest.raises(ConfigError, match="name another folder"):
        Book(tmp_path, SETTING)
