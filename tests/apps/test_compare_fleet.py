"""A comparison on a fleet: how long training would take there."""

import json

import compare
import pytest

ARGUMENTS = [
    "--methods", "psl", "fedavg", "fsl-sage", "--alpha", "inf", "--seeds", "0", "--clients", "2",
    "--rounds", "2", "--local-steps", "2", "--train-size", "200", "--test-size", "40",
    "--target", "1", "--workers", "0", "--grid", "client_lr=0.01", "server_lr=0.03",
]  # fmt: skip


def write_fleet(path, speed):
    path.write_text(
        f"""
        [server]
        compute = "{speed} GFLOP/s"
        [[devices]]
        count = 2
        compute = "{speed} MFLOP/s"
        uplink = "{speed} Mbit/s"
        downlink = "{speed} Mbit/s"
        """
    )
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the output of a comparison without a fleet, then on one, then on one half as fast."""
    out = tmp_path_factory.mktemp("fleet")
    assert compare.main([*ARGUMENTS, "--out", str(out)]) == 0
    for speed in (8, 4):
        fleet = write_fleet(out / f"{speed}.toml", speed)
        assert compare.main([*ARGUMENTS, "--out", str(out), "--fleet", fleet]) == 0
    return out


def runs_in(folder):
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


def finals_in(folder, method):
    return [run for run in runs_in(folder) if run["method"] == method and run["kind"] == "final"]


@pytest.mark.parametrize("method", ["psl", "fedavg", "fsl-sage"])
def test_half_the_speed_takes_twice_the_time_and_changes_nothing_else(folder, method):
    untimed, fast, slow = finals_in(folder, method)

    assert "simulated-seconds" not in untimed
    twice = [2 * seconds for seconds in fast["simulated-seconds"]]
    assert slow["simulated-seconds"] == pytest.approx(twice)
    assert 0 < fast["simulated-seconds"][0] < fast["simulated-seconds"][1]
    assert untimed["accuracy"] == fast["accuracy"] == slow["accuracy"]


def test_rates_are_tuned_once(folder):
    runs = [(run["method"], str(run["rates"]), run["kind"], run["seed"]) for run in runs_in(folder)]
    short = [one for one in runs if one[2] != "final"]

    assert len(short) == len(set(short))
    assert len(runs) - len(short) == 3 * 3


def test_a_round_of_fedavg_takes_longer_than_its_bytes(folder):
    _, run, _ = finals_in(folder, "fedavg")
    one_way_s = 8 * run["up"] / 2 / 2 / 8e6  # of a client and a round, at 8 Mbit/s

    assert run["simulated-seconds"][0] > 2 * one_way_s


def test_table_and_page_have_the_time_where_there_is_a_fleet(folder):
    texts = [(folder / name).read_text() for name in ("results.md", "index.html")]
    assert compare.main([*ARGUMENTS, "--out", str(folder)]) == 0  # writes them anew, runs nothing
    without = [(folder / name).read_text() for name in ("results.md", "index.html")]

    assert all("simulated s to 1 %" in text for text in texts)
    assert "Simulated seconds are what training would take" in texts[1]
    assert not any("simulated s to" in text or "would take on" in text for text in without)


def test_timed_runs_serve_a_comparison_without_a_fleet(tmp_path):
    out = ["--out", str(tmp_path)]
    fleet = write_fleet(tmp_path / "fleet.toml", 8)
    assert compare.main([*ARGUMENTS, *out, "--methods", "psl", "--fleet", fleet]) == 0
    assert compare.main([*ARGUMENTS, *out, "--methods", "psl", "fedavg"]) == 0

    assert len(finals_in(tmp_path, "psl")) == 1  # it was not run again
    assert "simulated s to" not in (tmp_path / "results.md").read_text()


def test_a_fleet_of_another_size_is_refused(tmp_path, capsys):
    fleet = write_fleet(tmp_path / "fleet.toml", 1)
    with pytest.raises(SystemExit):
        compare.main([*ARGUMENTS, "--clients", "3", "--out", str(tmp_path), "--fleet", fleet])

    assert "has 2 devices, expected 3, one per client" in capsys.readouterr().err
