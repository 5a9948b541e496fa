"""The history as a file, in Flower's Result, and as a picture."""

import json
import math

import matplotlib.image
import pytest
from matplotlib.figure import Figure
from reference import MOMENTUM, WrappedGrid, make_parts, plain_net, run_split

from flsplit import History, draw_histories
from flsplit.account import BrokenHistoryError, LeftOut, RoundEntry
from flsplit.errors import ConfigError, FlsplitError
from flsplit.strategies import PSL, SplitFedV1


@pytest.fixture(scope="module")
def result():
    parts = make_parts((6, 9))
    return run_split(PSL, plain_net, parts, tests=parts, optimizer=MOMENTUM, rounds=3)


def test_a_history_reads_back_as_it_was_written(result, tmp_path):
    history = result.history
    history[1].left_out.append(LeftOut("1", 2, "client '1': \"gone\"\nfar away"))
    history[1].metrics["angle"] = 0.1 + 0.2
    read = History.load(history.save(tmp_path / "history.jsonl"))
    assert read.numbers() == history.numbers()
    assert [entry.to_json() for entry in read] == [entry.to_json() for entry in history]
    assert [entry.traffic.wire for entry in read] == [entry.traffic.wire for entry in history]
    history[1].left_out.clear()
    history[1].metrics.clear()


def test_a_history_file_has_one_json_object_a_line(result, tmp_path):
    lines = result.history.save(tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2, 3]


def test_a_round_without_training_or_evaluation_can_be_written(tmp_path):
    read = History.load(History([RoundEntry(1)]).save(tmp_path / "history.jsonl"))
    assert (read[0].loss, read[0].accuracy, read[0].evaluation) == (None, None, {})


def test_numbers_leave_out_times_and_wire_bytes(result):
    for numbers in result.history.numbers():
        names = numbers.keys() - {"simulated-seconds"}
        assert not [name for name in names if "seconds" in name or "wire" in name]
        assert {"loss", "accuracy", "evaluation", "logical-bytes", "left-out"} <= numbers.keys()


def test_series_totals_and_best(result):
    history = result.history
    rounds, values = history.series("accuracy")
    assert rounds == [1, 2, 3]
    assert values == [entry.evaluation["accuracy"] for entry in history]
    assert history.best("accuracy") == max(values)
    assert math.isnan(History([RoundEntry(1)]).best("accuracy"))
    # Per round 15 rows of 6 floats up and down and a label; segments of 54 floats at first.
    per_round = 15 * (6 * 4 * 2 + 8)
    segments = 2 * 54 * 4
    assert history.bytes_so_far() == [segments + per_round * n for n in (1, 2, 3)]


def test_flowers_result_holds_the_ledger_as_metric_records(result):
    assert list(result.train_metrics_clientapp) == [1, 2, 3]
    for server_round, entry in enumerate(result.history, start=1):
        record = result.train_metrics_clientapp[server_round]
        assert record["train-loss"] == entry.loss
        assert record["train-accuracy"] == entry.accuracy
        assert (record["steps"], record["rows"], record["num-left-out"]) == (3, 15, 0)
        assert record["logical-bytes-activations-up"] == 15 * 6 * 4
        assert record["seconds"] == entry.seconds
        evaluation = result.evaluate_metrics_clientapp[server_round]
        assert dict(evaluation) == entry.evaluation
        assert evaluation["num-examples"] == 15


def test_who_was_left_out_is_counted_in_flowers_result():
    class Losing(WrappedGrid):
        def send_and_receive(self, messages, *, timeout=None):
            replies = list(super().send_and_receive(messages, timeout=timeout))
            return [r for r in replies if "labels" not in r.content or r.metadata.src_node_id != 2]

    parts = make_parts((4, 4))
    result = run_split(PSL, plain_net, parts, rounds=1, wrap=Losing, fraction_evaluate=0.0)
    assert result.train_metrics_clientapp[1]["num-left-out"] == 1


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_histories_are_drawn(result, tmp_path, suffix):
    other = run_split(SplitFedV1, plain_net, make_parts((6, 9)), rounds=1).history
    histories = {"PSL": result.history, "SplitFed V1": other, "nothing yet": History()}
    path = draw_histories(histories, tmp_path / f"accuracy.{suffix}")
    signature = {"png": b"\x89PNG\r\n\x1a\n", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert path.read_bytes().startswith(signature)
    if suffix == "png":
        image = matplotlib.image.imread(path)
        assert image.shape[:2] == (480, 1200)
        assert image[..., :3].std() > 0.05, "the picture is blank"


def test_simulated_time_is_drawn_where_it_is_known(result, tmp_path):
    on_a_fleet = History.load(result.history.save(tmp_path / "history.jsonl"))
    for entry in on_a_fleet:
        entry.simulated_seconds = 50.0
    assert on_a_fleet.simulated_so_far() == [50.0, 100.0, 150.0]
    on_a_fleet[1].simulated_seconds = None
    assert on_a_fleet.simulated_so_far() == [50.0, None, None]
    on_a_fleet[1].simulated_seconds = 80.0
    histories = {"PSL": result.history, "PSL on a fleet": on_a_fleet}
    svg = draw_histories(histories, tmp_path / "three.svg").read_text()
    assert "<!-- simulated minutes -->" in svg
    svg = draw_histories({"PSL": result.history}, tmp_path / "two.svg").read_text()
    assert "simulated" not in svg


def test_a_history_of_before_there_were_fleets_is_read(result, tmp_path):
    path = result.history.save(tmp_path / "history.jsonl")
    path.write_text(path.read_text().replace('"simulated-seconds": null, ', ""))
    assert "simulated" not in path.read_text()
    assert History.load(path).numbers() == result.history.numbers()


def test_numbers_that_are_not_finite_are_null_in_the_file(result, tmp_path):
    history = History.load(result.history.save(tmp_path / "history.jsonl"))
    history[0].evaluation["loss"] = math.nan
    history[0].metrics["ratio"] = math.inf
    path = history.save(tmp_path / "diverged.jsonl")

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    first = json.loads(path.read_text().splitlines()[0], parse_constant=refuse)
    assert (first["evaluation"]["loss"], first["metrics"]["ratio"]) == (None, None)
    loaded = History.load(path)
    assert math.isnan(loaded[0].evaluation["loss"])
    assert math.isnan(loaded[0].metrics["ratio"])
    assert loaded[1].numbers() == history[1].numbers()


def test_a_metric_is_drawn_against_rounds_and_bytes(result, tmp_path):
    svg = draw_histories({"PSL": result.history}, tmp_path / "loss.svg", metric="loss").read_text()
    for text in ("round", "test loss", "kB sent for training (logical)", "PSL"):
        assert f"<!-- {text} -->" in svg


def test_training_has_series_and_pictures_too(result, tmp_path):
    history = result.history
    assert history.series("train-loss") == ([1, 2, 3], [entry.loss for entry in history])
    draw_histories({"PSL": history}, tmp_path / "x.svg", metric="train-accuracy")
    assert "<!-- train accuracy -->" in (tmp_path / "x.svg").read_text()


def test_a_metric_that_no_round_has_is_refused_by_name(result, tmp_path):
    history, path = result.history, tmp_path / "nothing.png"
    there = r"no round has a metric 'acuracy' \(there are accuracy, loss, num-examples, train-acc"
    for look in (history.series, history.best):
        with pytest.raises(ConfigError, match=f"{there}.*did you mean 'accuracy'"):
            look("acuracy")
    with pytest.raises(ConfigError, match=there):
        draw_histories({"PSL": history, "nothing yet": History()}, path, metric="acuracy")
    with pytest.raises(ConfigError, match="histories is empty"):
        draw_histories({}, path)
    assert not path.exists()


def test_a_metric_may_be_there_in_some_histories_only(result, tmp_path):
    other = History([RoundEntry(1, loss=1.0, evaluation={"loss": 1.0})])
    assert draw_histories({"PSL": result.history, "other": other}, tmp_path / "x.png").exists()


def test_a_picture_of_runs_without_evaluation_says_so(tmp_path, caplog):
    history = History([RoundEntry(1, loss=1.0)])
    assert history.series("accuracy") == ([], [])
    draw_histories({"PSL": history}, tmp_path / "x.png")
    assert "no round was evaluated, so none has 'accuracy'" in caplog.text
    assert "train-loss" in caplog.text
    caplog.clear()
    draw_histories({"PSL": history}, tmp_path / "x.png", metric="train-loss")
    assert not caplog.text


@pytest.mark.parametrize("many", [1, 11, 45])
def test_curves_differ_and_the_legend_covers_none(many, tmp_path, monkeypatch):
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *a, **k: drawn.append(figure) or save(figure, *a, **k)
    )
    entries = [RoundEntry(r, evaluation={"accuracy": r / 9}) for r in (1, 2)]
    names = [f"a method, variant {number}" for number in range(many)]
    draw_histories(dict.fromkeys(names, History(entries)), tmp_path / "x.png")
    (figure,) = drawn
    looks = {
        (line.get_color(), line.get_linestyle(), line.get_marker())
        for line in figure.axes[0].get_lines()
    }
    assert len(looks) == many
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names
    place = legend.get_window_extent()
    assert not [axes for axes in figure.axes if axes.get_tightbbox().overlaps(place)]
    assert 0 <= place.x0 < place.x1 <= figure.bbox.width
    assert 0 <= place.y0 < place.y1 <= figure.bbox.height
    assert figure.axes[0].get_window_extent().height > 0.5 * 4 * figure.dpi


def test_a_history_that_is_cut_short_says_where(result, tmp_path):
    path = result.history.save(tmp_path / "history.jsonl")
    path.write_text(path.read_text()[:-40])
    with pytest.raises(
        FlsplitError,
        match=rf"{path} is broken: line 3: no JSON \(Unterminated string .*at character \d+\)$",
    ):
        History.load(path)
    path.write_bytes(b"\xff\n")
    with pytest.raises(BrokenHistoryError, match=r"line 1: .*decode byte 0xff"):
        History.load(path)
    path.write_text("")
    assert History.load(path) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda line: line.clear(), "'round', 'evaluation', 'metrics', 'logical-bytes'.* missing"),
        (lambda line: line.pop("wire-bytes"), "'wire-bytes' missing"),
        (lambda line: line.update(metrics=[]), r"'metrics' is \[\], expected dict"),
        (lambda line: line.update(evaluation={"loss": "x"}), "'evaluation: loss' is 'x', expected"),
        (lambda line: line["logical-bytes"].update({"labels-up": None}), "'logical-bytes: labels-"),
        (lambda line: line.update(round="2"), "'round' is '2', expected int"),
        (lambda line: line.update(loss="x"), "'loss' is 'x', expected int or float or null"),
        (lambda line: line.update(more=1), "'more' is nothing that a round has"),
        (lambda line: line.update({"left-out": [{"client": "1"}]}), "'left-out' has .* missing"),
        (lambda line: line.update(redone=[1]), "'redone' has 1"),
    ],
)
def test_a_line_that_is_no_entry_says_what_is_wrong(result, tmp_path, change, said):
    path = result.history.save(tmp_path / "history.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines[1])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(BrokenHistoryError, match=f"{path} is broken: line 2: {said}"):
        History.load(path)


def test_a_line_that_is_no_object_is_no_entry(tmp_path):
    (tmp_path / "x").write_text("[1]\n")
    with pytest.raises(BrokenHistoryError, match="line 1: it is a list, expected an object"):
        History.load(tmp_path / "x")
