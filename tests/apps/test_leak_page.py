"""The page of accuracy against leakage, from runs written down by hand."""

import json
from dataclasses import asdict

import pytest
from leak import Size
from leak_page import Numbers, write_page
from privacy import main, read
from rows import DEFENCES, METHODS, QUICK, ROWS, U_DEFENCES

from flsplit.client_parts import describe_parts

PICTURES = [[[0, 128], [255, 0]]] * 8


def a_run(seed, **more):
    return {
        "accuracy": 0.9 + 0.01 * seed, "up": 8e6, "down": 8e6, "epsilon": None, "mse": 0.01,
        "explained": 0.8, "ssim": 0.7, "cross-entropy": 0.1 + 0.01 * seed, "floor": 0.05,
        "dcor-unbiased": 0.9, "mutual-information": 1.5, "membership": 0.9,
        "label-clusters": 0.5, "label-guess": 0.13, "pictures": PICTURES, "originals": PICTURES,
    } | more  # fmt: skip


def runs_of(*rows, seeds=(0, 1, 2), **more):
    return {
        (row, "conv1", seed): a_run(seed, **more.get(row, {})) for row in rows for seed in seeds
    }


PHIS = [row for row in ROWS if row.startswith("sglr")]


def test_a_line_of_the_table(tmp_path):
    runs = runs_of("psl", "int8", int8={"up": 2e6, "down": 2e6, "label-clusters": None})
    write_page(tmp_path / "page.md", runs, Size())
    text = (tmp_path / "page.md").read_text()
    cells = "91.0 ± 1.0 | 8.0 | 8.0 | 0.800 ± 0.000 | 0.700 ± 0.000 | 0.1100 ± 0.0100 | 0.90 | 1.50"
    assert f"| PSL | {cells} | 0.90 ± 0.00 | 0.50 ± 0.00 |  | 3 |" in text
    assert "| int8 both ways | 91.0 ± 1.0 | 2.0 | 2.0 |" in text
    assert "| 0.90 ± 0.00 | - |  | 3 |" in text
    assert "int8 both ways (`conv1`): 0.250 of the bytes, accuracy +0.0 points" in text
    assert "Not all φ were run" in text
    assert (tmp_path / "page-conv1.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("last", "said"),
    [
        (0.2, "φ = 1 leaks less than φ = 0: cross-entropy +0.1000 ± 0.0000 (+100.0 %"),
        (0.09, "φ = 1 leaks more than φ = 0: cross-entropy -0.0100 ± 0.0000 (-10.0 %"),
    ],
)
def test_whether_averaging_leaks_less(tmp_path, last, said):
    runs = runs_of("psl", *PHIS, **{row: {"cross-entropy": 0.1} for row in PHIS})
    for seed in range(3):
        runs[PHIS[-1], "conv1", seed]["cross-entropy"] = last
    write_page(tmp_path / "page.md", runs, Size())
    text = (tmp_path / "page.md").read_text()
    assert said in text
    assert "| the paper | 0.2153 | 0.2142 | 0.2166 | 0.2296 | 0.2759 |" in text
    assert "can't be told apart" not in text


def test_labels_of_a_u_shape(tmp_path):
    labels = {"u-shape": {"label-simulated": 0.9}, "u-int8": {"label-simulated": 0.8, "up": 2e6}}
    labels["u-both"] = {"label-simulated": 0.15, "accuracy": 0.2, "label-clusters": 1.0}
    write_page(tmp_path / "page.md", runs_of("psl", *labels, **labels), Size())
    text = (tmp_path / "page.md").read_text()
    assert "at the second cut (64 numbers a row) finds 0.50 ± 0.00 of them" in text
    assert "(SDAR), which looks at no gradient, 0.90 ± 0.00; guessing finds 0.13 ± 0.00" in text
    first = "91.0 ± 1.0 | {} | 8.0 | 0.800 ± 0.000 | 0.50 ± 0.00 | {} ± 0.00 | 3 |"
    assert f"| no defence | {first.format('8.0', '0.90')}" in text
    assert f"| int8 everywhere | {first.format('2.0', '0.80')}" in text
    assert "stops SDAR (0.15), and learning, too (20.0 %); where little is learned, noise" in text
    assert "leaves 1.00 to clustering" in text
    assert text.count("int8 everywhere") == 1  # it has a table of its own


def test_gaps_are_of_the_same_seeds():
    numbers = Numbers(
        {
            ("psl", "conv1", 0): a_run(0, explained=0.5),
            ("psl", "conv1", 1): a_run(1, explained=0.9),
            ("int8", "conv1", 1): a_run(1, explained=0.8),
            ("int8", "conv1", 0): a_run(0, explained=0.3),
        }
    )
    assert numbers.gap("int8", "psl", "conv1", "explained")[0] == pytest.approx(-0.15)
    assert numbers.gap("int8", "psl", "conv1", "explained")[1] == pytest.approx(0.0707, abs=1e-3)


def test_no_defence_without_the_undefended_run(capsys):
    with pytest.raises(SystemExit):
        main(["--data-dir", "x", "--rows", "int8"])
    assert "no defence counts without the same run undefended" in capsys.readouterr().err


def test_finished_runs_are_read_again(tmp_path):
    line = {"key": ["psl", "conv1", 0], "size": asdict(Size()), "found": a_run(0)}
    other = line | {"size": asdict(Size(rounds=1))}
    (tmp_path / "runs.jsonl").write_text(f"{json.dumps(line)}\n{json.dumps(other)}\n")
    assert read(tmp_path / "runs.jsonl", Size()) == {("psl", "conv1", 0): a_run(0)}


def test_every_row_can_be_made():
    assert set(QUICK) <= set(ROWS) == set(METHODS) | set(DEFENCES) | set(U_DEFENCES)
    for row in ROWS.values():
        describe_parts(row.parts())
