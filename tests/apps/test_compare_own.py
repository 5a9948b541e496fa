"""Somebody else's model and data in the comparison: one file, an app's folder, what is refused."""

import json
from pathlib import Path

import compare
import numpy as np
import pytest
import torch
from dealing import deal, names, parts_of
from everyone import Everyone
from experiment import Experiment
from sources import find_experiment
from torch.utils.data import TensorDataset

from flsplit.errors import ConfigError

HERE = Path(__file__).parent / "compared"
QUICKSTART = str(Path(compare.__file__).parents[1] / "quickstart")
TINY = [
    "--seeds", "0", "--clients", "3", "--rounds", "2", "--local-steps", "3", "--batch-size", "8",
    "--workers", "0", "--rates", "client_lr=0.05", "server_lr=0.05",
]  # fmt: skip


def compared(out, *arguments):
    assert compare.main([*TINY, "--out", str(out), *arguments]) == 0
    runs = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    return runs, (out / "results.md").read_text(), (out / "index.html").read_text()


def refused(capsys, out, *arguments):
    """Return what is said; nothing may have been run."""
    try:
        status = compare.main([*TINY, "--out", str(out), *arguments])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert not (out / "runs.jsonl").exists()
    return capsys.readouterr().err


@pytest.mark.parametrize("name", ["images", "text"])
def test_a_file_is_short(name):
    assert len((HERE / f"{name}.py").read_text().splitlines()) <= 40


def test_arrays_go_through_the_whole_comparison(tmp_path):
    methods = ["psl", "fedavg", "gapsl{eta=-1}", "fsl-sage{upload_every=1}"]
    where = [
        "--dataset",
        str(HERE / "images.py"),
        "--partition",
        "iid",
        "shard:num_shards_per_partition=2",
    ]
    runs, text, page = compared(tmp_path, *where, "--methods", *methods)

    assert [(run["method"], run["partition"]) for run in runs] == [
        (method, partition) for partition in where[3:] for method in methods
    ]
    for title in ("PSL", "FedAvg", "GAPSL, eta -1", "FSL-SAGE, upload_every 1"):  # all asked for
        assert text.count(f"| {title} | ") >= 4  # in the table and each client's, twice
        assert page.count(title) >= 4
    assert "| f1 |" in text
    assert all(0 < run["scores"]["f1"] < 1 for run in runs)
    assert "A note on bright rows." in text
    assert "A note on bright rows." in page
    assert (tmp_path / "images-shard-num-shards-per-partition-2.png").exists()


def test_a_model_with_two_inputs_goes_through(tmp_path):
    methods = ["psl", "sglr", "fedavg"]
    runs, *_ = compared(tmp_path, "--dataset", str(HERE / "signals.py"), "--methods", *methods)
    assert [run["method"] for run in runs] == methods


def test_a_text_classifier_goes_through_with_its_own_columns_and_grid(tmp_path):
    grid = [one for one in TINY if not one.startswith(("--rates", "client", "server"))]
    arguments = ["--dataset", str(HERE / "text.py"), "--methods", "psl", "cse-fsl"]
    natural = ["--partition", "natural-id:partition_by=speaker", "--clients", "2"]
    assert compare.main([*grid, *arguments, *natural, "--rounds", "1", "--out", str(tmp_path)]) == 0
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]

    tried = {run["rates"]["client_lr"] for run in runs if run["method"] == "psl"}
    assert {0.001, 0.01} <= tried
    (final,) = [r for r in runs if r["method"] == "psl" and r["kind"] == "final"]
    assert len(final["clients"]) == 2


def test_an_ordinary_app_goes_through(tmp_path):
    runs, text, _ = compared(
        tmp_path, "--dataset", QUICKSTART, "--methods", "psl", "fedavg", "--against", "fedavg"
    )

    assert {run["partition"] for run in runs} == {"own"}
    assert "as the app deals them" in text
    assert "against FedAvg, points" in text
    assert all(len(run["clients"]) == 3 for run in runs)


def test_explanations_of_one_data_set_are_on_its_page_only(tmp_path):
    _, text, page = compared(tmp_path, "--methods", "psl", "fedavg", "--alpha", "inf")

    for one in (text, page):
        assert "MNIST, 10" not in one
        assert "bright rows" not in one


# --- who holds what -----------------------------------------------------------------------------


def test_partitioners_are_those_of_flwr_datasets():
    known = names()

    assert {"iid", "dirichlet", "pathological", "shard", "natural-id", "inner-dirichlet"} <= set(
        known
    )
    assert known["dirichlet"].__module__.startswith("flwr_datasets")


@pytest.mark.parametrize(
    "partition", ["iid", "dirichlet:alpha=0.3", "pathological:num_classes_per_partition=2"]
)
def test_every_example_is_dealt_once_and_seeds_deal_anew(partition):
    experiment = find_experiment("digits", "")
    whole = TensorDataset(*experiment.train)
    indices = np.random.default_rng(0).permutation(1400)[:700]
    one, other = (deal(experiment, whole, indices, partition, 5, seed, 8) for seed in (0, 1))

    dealt = np.concatenate(one).tolist()
    assert len(dealt) == len(set(dealt))
    if not partition.startswith("pathological"):  # may leave out classes that nobody got
        assert set(dealt) == set(indices.tolist())
    if partition != "iid":  # whose examples are shuffled before
        assert [part.tolist() for part in one] != [part.tolist() for part in other]
    if partition.startswith("pathological"):
        assert all(len(whole.tensors[1][part].unique()) == 2 for part in one)


def test_parts_share_no_example():
    parts = parts_of("digits", "", 5, "dirichlet:alpha=0.3", 0, 0, 0, 16)
    sets = [one.tensors[0] for one in (*parts.train, parts.validation)]
    places = sorted(map(tuple, torch.cat(sets).flatten(1).tolist()))

    train, _ = find_experiment("digits", "").train
    assert places == sorted(map(tuple, train.flatten(1).tolist()))
    assert len(parts.validation) == 140
    assert len(parts.test) == 397
    counts = torch.bincount(parts.train[2].tensors[1], minlength=10)
    assert parts.shares[2].tolist() == pytest.approx((counts / counts.sum()).tolist())


# --- every client's accuracy --------------------------------------------------------------------


def test_accuracies_of_each_client():
    shares = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    metric = Everyone(shares, models=2)
    sure = torch.eye(2) * 9
    labels = torch.tensor([0, 0, 0, 1])
    for said in ([0, 0, 1, 1], [1, 1, 1, 1]):  # of client 0: 2 of 3 and 1 of 1; of client 1: 0, 1
        metric.update(sure[said[:2]], labels[:2])
        metric.batches -= 1  # its second batch comes after everybody's first
        metric.update(sure[said[2:]], labels[2:])
    found = metric.compute()

    assert found["global"].tolist() == [3 / 4, 1 / 4]
    assert found["own"].tolist() == pytest.approx([2 / 3, 0.75])


def test_one_model_serves_all_clients():
    metric = Everyone(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), models=1)
    metric.update(torch.eye(2)[[0, 0]], torch.tensor([0, 1]))

    assert metric.compute()["global"].tolist() == [0.5, 0.5]
    assert metric.compute()["own"].tolist() == [1.0, 0.0]


def test_the_metric_keeps_clients_in_their_order(tmp_path):
    """Ten clients and more: with names sorted as texts, client 10 would come before client 2."""
    runs, *_ = compared(
        tmp_path, "--methods", "psl", "--clients", "11", "--rounds", "2", "--local-steps", "10",
        "--partition", "pathological:num_classes_per_partition=1",
    )  # fmt: skip

    # A client that has seen one class is better on that than on the others; whoever is taken for
    # another would be judged on a class that it has never seen.
    assert all(
        own >= everybody for own, everybody in zip(runs[0]["own"], runs[0]["clients"], strict=True)
    )


# --- what is refused, before anything is run ----------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--methods", "gapsle"], "no 'gapsle'; did you mean 'gapsl'?"),
        (["--methods", "gapsl{etta=1}"], "did you mean 'eta'"),
        (["--methods", "fedavg{mu=1}"], "fedavg takes no options"),
        (["--dataset", "minst"], "no 'minst'; did you mean 'mnist'?"),
        (["--dataset", "mnist", "--data-dir", "/nowhere"], "is no folder"),
        (["--preset", "gapsl-cifar"], "did you mean 'gapsl-cifar10'?"),
        (["--partition", "dirichlett:alpha=1"], "did you mean 'dirichlet'?"),
        (["--partition", "dirichlet:alfa=1"], "alfa"),
        (["--partition", "dirichlet"], "alpha"),
        (["--partition", "natural-id:partition_by=label"], "makes 10 parts, expected 3"),
        (["--partition", "dirichlet:alpha"], "name:key=value"),
        (["--rates", "klient_lr=0.1"], "client_lr"),
        (["--rates", "client_lr=0"], "above 0"),
        (["--rates", "client_lr=0.1"], "expected client_lr and server_lr"),
        (["--seeds", "0", "0"], "--seeds names 0 twice"),
        (["--seeds", "1001"], "1001 is a seed of the tuning"),
        (["--alpha", "0.1", "0.1"], "--alpha names 0.1 twice"),
        (["--batch-size", "900"], "--batch-size"),
        (["--against", "psll", "--methods", "psl", "fedavg"], "did you mean 'psl'?"),
        (["--dataset", QUICKSTART, "--partition", "iid"], "deals its data out itself"),
    ],
)
def test_bad_options(arguments, says, tmp_path, capsys):
    assert says in refused(capsys, tmp_path, *arguments)


def file_with(tmp_path, **changed):
    text = (HERE / "images.py").read_text()
    for old, new in changed.values():
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "mine.py"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("nn.Linear(4 * 6 * 6, 10)", "nn.Linear(3, 10)", "the model can't take the data"),
        ("4 * 6 * 6, 10)", "4 * 6 * 6, 7)", "labels are 0 to 9, but the model has 7 classes"),
        ('"cut": "1"', '"cut": "convolution"', "convolution"),
        ('"cut": "1",', "", "has no 'cut'"),
        ('"metrics"', '"metric"', "did you mean 'metrics'?"),
        ("def experiment", "def experiments", "has no function experiment()"),
        ("images(60, 1)", "images(60, 1)[0]", "test is a ndarray"),
        ("return pixels, labels", "return pixels, labels[:-1]", "inputs and"),
        ("return pixels, labels", "return pixels, labels + 0.5", "expected whole numbers (N,)"),
    ],
)
def test_a_file_that_does_not_fit(old, new, says, tmp_path, capsys):
    mine = file_with(tmp_path, one=(old, new))
    found = refused(capsys, tmp_path / "out", "--dataset", mine, "--methods", "psl")

    assert says in found


def test_a_method_that_can_not_train_it_is_named_with_the_others(tmp_path, capsys):
    found = refused(
        capsys, tmp_path, "--methods", "psl", "gapsl{k_min=90}", "fsl-sage{buffer_size=2}"
    )

    assert "gapsl{k_min=90}: ConfigError" in found
    assert "fsl-sage{buffer_size=2}: ConfigError" in found
    assert "psl:" not in found.replace("gapsl", "")


def test_what_several_methods_can_not_do_is_said_once(tmp_path, capsys):
    variants = ["gapsl{k_min=90}", "gapsl{k_min=90,server_lr=0.1}"]
    found = refused(capsys, tmp_path, "--methods", *variants)

    assert f"{', '.join(variants)}: ConfigError" in found
    assert found.count("k_min is 90") == 1


def test_other_arguments_in_the_same_folder_are_refused_with_the_difference(tmp_path, capsys):
    compared(tmp_path, "--methods", "psl", "--alpha", "inf")
    before = (tmp_path / "runs.jsonl").read_bytes()
    status = compare.main(
        [*TINY, "--out", str(tmp_path), "--methods", "psl", "--alpha", "inf", "--local-steps", "4"]
    )

    assert status == 2
    assert "local_steps was 3 and is 4" in capsys.readouterr().err
    assert (tmp_path / "runs.jsonl").read_bytes() == before


def test_a_file_that_has_changed_is_another_setting(tmp_path, capsys):
    out = tmp_path / "out"
    mine = file_with(tmp_path)
    compared(out, "--dataset", mine, "--methods", "psl")
    file_with(tmp_path, one=("+= 2.0", "+= 3.0"))
    assert compare.main([*TINY, "--out", str(out), "--dataset", mine, "--methods", "psl"]) == 2

    assert "dataset-digest was" in capsys.readouterr().err


def test_fewer_seeds_than_a_verdict_needs_are_told(tmp_path, capsys):
    _, text, page = compared(
        tmp_path, "--methods", "psl", "fedavg", "--alpha", "inf", "--seeds", "0", "1"
    )

    assert "2 seeds are too few for a verdict, which takes 3" in capsys.readouterr().err
    assert "With 2 seeds there is no verdict: it takes 3." in text
    assert "too few seeds" in page


def test_experiments_may_be_given_as_such():
    assert Experiment(model=list, cut="x").target == 85.0
    with pytest.raises(ConfigError, match=r"no 'nowhere\.py'"):
        find_experiment("nowhere.py", "")
