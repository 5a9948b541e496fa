"""A tiny comparison: what it writes, and that nothing is run twice."""

import json
import multiprocessing
import re

import compare
import pytest
import torch
from jobs import Job
from training import FINAL
from workers import Workers, run_one

TITLES = {"PSL", "FedAvg"}
METHODS = ["psl", "fedavg"]
ARGUMENTS = [
    "--methods", *METHODS, "--alpha", "inf", "--seeds", "0", "1", "--clients", "2",
    "--rounds", "2", "--local-steps", "1", "--train-size", "200", "--test-size", "40",
    "--grid", "client_lr=0.01", "server_lr=0.03",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the output of a comparison that was stopped once and then went on."""
    out = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare.Progress, "_tell", interrupt)
        assert compare.main([*ARGUMENTS, "--workers", "1", "--out", str(out)]) == 130
    assert not multiprocessing.active_children()
    assert len(runs_in(out)) == 1  # a rehearsal is not kept
    assert compare.main([*ARGUMENTS, "--out", str(out)]) == 0
    return out


def interrupt(progress, job, run):
    raise KeyboardInterrupt


def runs_in(folder):
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


def test_every_run_is_there_once(folder):
    runs = runs_in(folder)
    keys = [(r["method"], str(r["rates"]), r["seed"], r["kind"]) for r in runs]

    assert len(keys) == len(set(keys))
    finals = [(r["method"], r["seed"]) for r in runs if r["kind"] == FINAL]
    assert sorted(finals) == [(method, seed) for method in sorted(METHODS) for seed in (0, 1)]
    short = {r["seed"] for r in runs if r["kind"] != FINAL}
    assert short == {1000, 1001, 1002}  # tuned with other seeds than those of the results


def test_nothing_is_run_again(folder, monkeypatch):
    def refuse(workers, jobs):
        assert not jobs
        return iter(())

    before = (folder / "runs.jsonl").read_bytes()
    monkeypatch.setattr(Workers, "run", refuse)

    assert compare.main([*ARGUMENTS, "--out", str(folder)]) == 0
    assert (folder / "runs.jsonl").read_bytes() == before


def test_a_run_is_the_same_in_this_process(folder):
    run = next(r for r in runs_in(folder) if r["method"] == "psl" and r["kind"] == FINAL)
    job = Job("psl", run["rates"], "iid", run["seed"], FINAL)
    setting = compare.setting_of(compare.parse(ARGUMENTS))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = run_one(job, setting)
    finally:
        torch.set_num_threads(threads)

    assert {name: run[name] for name in ("accuracy", "bytes", "rows")} == {
        name: found[name] for name in ("accuracy", "bytes", "rows")
    }


def test_the_table_has_all_methods(folder):
    text = (folder / "results.md").read_text()

    rows = re.findall(r"^\| (\w+) \| [0-9.]+ ± [0-9.]+ \|", text, re.MULTILINE)
    assert set(rows) == TITLES
    assert str(folder) not in text
    assert (folder / "digits-iid.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_needs_nothing_else(folder):
    text = (folder / "index.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)

    assert sources
    assert all(one.startswith(("data:image/svg+xml;base64,", "#")) for one in sources)
    assert not re.search(r"<script|<link|@import|url\(|https?://", text)
    assert str(folder) not in text
