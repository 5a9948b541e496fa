"""The comparison of methods on language, from results that are made up: nothing is trained."""

import json
import math
from argparse import Namespace
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from llm_runs import script

METHODS, TABLE = script("compare_llm"), script("methods_table")


@pytest.fixture
def given(tmp_path):
    return Namespace(
        seeds=[0, 1, 2], methods=["psl"], rates=[0.01, 0.001, 0.003], data="packed", rounds=2,
        steps=3, out=tmp_path, memory_models=["gpt2-40m"],
    )  # fmt: skip


def keep(given, losses, seed=0, method="psl", **more):
    """Write results with these losses of training text, by rate."""
    comparison = METHODS.Comparison(given)
    for rate, loss in losses.items():
        METHODS.write(comparison.path(method, seed, rate), {"trained-loss": loss} | more)
    return comparison


def test_the_rate_with_the_least_loss_is_taken_for_all_seeds(given):
    comparison = keep(given, {})
    assert comparison.missing("psl") == [(0, 0.001), (0, 0.003), (0, 0.01)]
    keep(given, {0.001: 5.0, 0.003: 4.0})
    assert comparison.missing("psl") == [(0, 0.01)]
    keep(given, {0.01: 4.5})
    assert comparison.tuned("psl") == ([0.001, 0.003, 0.01], 0.003, False)
    assert comparison.missing("psl") == [(1, 0.003), (2, 0.003)]
    keep(given, {0.003: 4.0}, seed=2)
    assert comparison.missing("psl") == [(1, 0.003)]


@pytest.mark.parametrize(
    ("losses", "first", "second"),
    [
        # 0.01 · 0.01 / 0.003 and 0.033 · 0.033 / 0.01, in two digits; downwards alike
        ({0.001: 5.0, 0.003: 4.0, 0.01: 3.0}, 0.033, 0.11),
        ({0.001: 3.0, 0.003: 4.0, 0.01: 5.0}, 0.00033, 0.00011),
    ],
)
def test_a_grid_goes_on_where_the_best_rate_is_at_its_end(given, losses, first, second):
    comparison = keep(given, losses)
    assert comparison.missing("psl") == [(0, first)]
    keep(given, {first: 2.0})
    assert comparison.missing("psl") == [(0, second)]
    keep(given, {second: 2.5})
    assert comparison.tuned("psl")[1:] == (first, False)
    keep(given, {second: 1.5})  # widened twice: it stays at the end, and is marked
    assert comparison.tuned("psl") == (sorted([*losses, first, second]), second, True)


def test_a_rate_that_diverges_is_never_the_best(given):
    comparison = keep(given, {0.001: 5.0, 0.003: 4.0})
    keep(given, {0.01: math.inf}, failed="the loss is NaN")
    assert comparison.tuned("psl")[1:] == (0.003, False)


class AtOnce:
    """A pool that does what it is given when it is given it."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def map(self, function, *lists):
        return map(function, *lists)

    def submit(self, function, *args):
        done = Future()
        done.set_result(function(*args))
        return done


def test_what_was_stopped_goes_on_with_what_is_missing(given, monkeypatch):
    ran = []

    def run(out, config, whole):
        ran.append((config["strategy"], config["seed"], config["learning-rate"], whole))
        return {"trained-loss": abs(config["learning-rate"] - 0.003), "curve": []}

    for name, fake in (("ProcessPoolExecutor", AtOnce), ("run", run), ("prepared", lambda *_: 0)):
        monkeypatch.setattr(METHODS, name, fake)
    comparison = keep(given, {0.001: 5.0, 0.003: 0.0})
    left = comparison.path("psl", 0, 0.01).with_suffix(".part")  # stopped as it was written
    left.write_text('{"trained-')
    comparison.complete(1)
    assert ran == [("psl", 0, 0.01, False), ("psl", 1, 0.003, False), ("psl", 2, 0.003, False)]
    assert json.loads(comparison.path("psl", 0, 0.01).read_text())["curve"] == []
    assert not list(given.out.glob("*.part"))
    ran.clear()
    METHODS.Comparison(given).complete(1)
    assert ran == []


def test_memory_is_measured_once_with_a_short_alignment(given, monkeypatch):
    asked = []

    def measure(config, rounds):
        asked.append((config["strategy-args"], rounds))
        return {"peak": 3 * 2**20, "later": 2**20, "up": 1.0}

    monkeypatch.setattr(METHODS, "measure_split", measure)
    for _ in range(2):
        found = METHODS.memory_of(given, "gpt2-40m", "fsl-sage")
        assert found == {"peak": 3.0, "later": 1.0}
    ((arguments, rounds),) = asked
    assert rounds == 2
    assert "align-epochs = 1," in arguments
    assert arguments.endswith("buffer-size = 64, fraction-evaluate = 0.0}")


def test_bytes_per_token_leave_out_what_is_handed_over_once(monkeypatch):
    def entry(handed, up, down, loss):
        traffic = SimpleNamespace(
            logical={"client-segments-down": handed}, up_bytes=up, down_bytes=down,
            training_bytes=up + down,
        )  # fmt: skip
        return SimpleNamespace(
            traffic=traffic, server_seconds=0.5, evaluation={"loss": loss}, left_out=[],
            metrics={"cosine": 0.25},
        )  # fmt: skip

    # The segment's 800 bytes come down with the first round's adapters, of 200.
    history = [entry(1000, 3000, 2500, math.log(8)), entry(200, 3144, 1700, math.log(4))]
    strategy = SimpleNamespace(start=lambda *_, **__: SimpleNamespace(history=history))
    monkeypatch.setattr(METHODS, "strategy_of", lambda *_: strategy)
    monkeypatch.setattr(METHODS, "whole_models", lambda result: {"": result})
    monkeypatch.setattr(METHODS, "LocalGrid", lambda *_, **__: None)
    config = {
        "num-server-rounds": 2, "local-steps": 3, "batch-size": 4, "seq-length": 16,
        "strategy": "psl",
    }  # fmt: skip
    found, _ = METHODS.in_split(SimpleNamespace(state_dict=dict), config)
    tokens = 4 * 2 * 3 * 4 * 16  # clients, rounds, steps, sequences, positions
    assert tokens == 1536
    assert found["once"] == 800
    assert (found["up"], found["down"]) == (6144 / 1536, 3400 / 1536)
    assert [point["bytes"] for point in found["curve"]] == [4700, 9544]
    assert [point["server-seconds"] for point in found["curve"]] == [0.5, 1.0]
    assert [point["perplexity"] for point in found["curve"]] == pytest.approx([8, 4])
    assert found["cosine"] == 0.25

    history[1].left_out = [SimpleNamespace(client="3")]
    with pytest.raises(RuntimeError, match=r"psl: left out \['3'\]"):
        METHODS.in_split(SimpleNamespace(state_dict=dict), config)


def runs_of(perplexities, **more):
    curve = [{"perplexity": 200.0, "bytes": 1e6, "server-seconds": 1.0}]
    return {
        seed: {
            "before": 300.0, "perplexity": one, "up": 130.4, "down": 99.6, "once": 2e6,
            "curve": [*curve, {"perplexity": one, "bytes": 2.5e6, "server-seconds": 4.0}], **more,
        }
        for seed, one in enumerate(perplexities)
    }  # fmt: skip


@pytest.fixture
def compared():
    """Three methods: differences to psl are 10, 11, 12, and -5, 0, 8."""
    found = {
        "psl": {"rate": 0.003, "at-end": False, "runs": runs_of([100.0, 101.0, 102.0])},
        "worse": {"rate": 0.033, "at-end": True, "runs": runs_of([110.0, 112.0, 114.0])},
        "alike": {"rate": 0.01, "at-end": False, "runs": runs_of([95.0, 101.0, 110.0])},
        "never": {"rate": 0.01, "at-end": True, "runs": {}},
    }
    memory = {"gpt2-40m": {name: {"peak": 828.4, "later": 460.0} for name in found}}
    return found, memory


def test_the_table_says_what_may_be_said(compared, tmp_path):
    found, memory = compared
    text = TABLE.write_table(tmp_path / "table.md", "a setting", found, memory)
    assert (tmp_path / "table.md").read_text() == text
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in text.splitlines()}
    assert {len(rows[name]) for name in ("method", "psl", "worse", "alike")} == {12}
    assert rows["psl"][1:6] == ["0.003", "300.0", "101.0 ± 1.0", "too few seeds", ""]
    assert rows["psl"][6:12] == ["130", "100", "2.5", "2.0", "828, 460", "4.0 |"]
    # Student's 0.975 quantile with two degrees of freedom is 4.303: 4.303 · 1 / √3 = 2.48
    assert rows["worse"][1] == "0.033*"
    assert rows["worse"][5] == "+11.0 ± 2.5: above"
    # mean 1, deviation √(86 / 2) = 6.56: 4.303 · 6.56 / √3 = 16.29
    assert rows["alike"][5] == "+1.0 ± 16.3: not told apart"
    assert rows["never"][1:3] == ["0.01*", "diverged"]
    assert "a setting." in text


def test_two_methods_are_compared_by_the_seeds_that_both_have(compared):
    found, _ = compared
    worse, psl = found["worse"]["runs"], found["psl"]["runs"]
    del worse[1]
    assert TABLE.difference(worse, psl).startswith("+11.0")
    assert TABLE.difference(worse, psl).endswith("too few seeds")


def test_the_picture_has_a_point_for_each_method_that_came_to_an_end(compared, tmp_path):
    found, memory = compared
    TABLE.draw(tmp_path / "one.png", "a setting", found, memory)
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
