"""A checkpoint folder belongs to one run: strangers and second ones are refused, by name."""

import json
from collections import OrderedDict
from functools import partial

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp.strategy import FedAdam, FedAvg
from reference import CUT, fresh, make_parts, plain_net, run_split, split_app
from torch import nn
from torch.nn import functional
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from flsplit import History, LocalGrid
from flsplit.carry.session import SessionSettings
from flsplit.errors import ConfigError
from flsplit.run import EarlyStopping
from flsplit.run.history_file import HistoryFile
from flsplit.run.run_identity import describe, differences, identity_of
from flsplit.storage import BrokenFileError, FolderLock, StorageError
from flsplit.strategies import CSEFSL, EPSL, PSL, SplitFedV2

PARTS = make_parts((4, 4))


def run(folder, rounds=1, cls=PSL, **options):
    options = {"checkpoint_dir": str(folder), "fraction_evaluate": 0.0} | options
    return run_split(cls, plain_net, PARTS, rounds=rounds, **options)


def identity(cls=PSL, build=plain_net, **options):
    strategy = cls(**({"model": fresh(build), "cut": CUT, "device": "cpu"} | options))
    strategy.begin(ArrayRecord(fresh(build).state_dict()))
    return identity_of(strategy)


def dropping(p):
    def build():
        front = nn.Sequential(nn.Linear(8, 6), nn.Dropout(p))
        return nn.Sequential(OrderedDict(front=front, head=nn.Linear(6, 3)))

    return build


def frozen():
    net = plain_net()
    net.front[0].weight.requires_grad_(False)
    return net


def decaying(factor):
    return lambda server_round: factor**server_round


def weighted(*weights):
    return nn.CrossEntropyLoss(torch.tensor(weights))


class Top:
    """As a metric of torchmetrics looks."""

    def __init__(self, k):
        self.k = k

    def update(self, logits, labels):
        pass

    compute = to = update


CHANGES = {  # two runs, and what tells them apart
    "learning rate": ({"server_lr": 0.1}, {"server_lr": 0.2}, "server_lr"),
    "client's rate": ({}, {"client_lr": 0.01}, "client_lr"),
    "rate's closure": ({"server_lr": decaying(0.9)}, {"server_lr": decaying(0.8)},
                       "server_lr.factor"),
    "rate's code": ({"server_lr": lambda r: 0.1 / r}, {"server_lr": lambda r: 0.1 * r},
                    "server_lr"),
    "batch size": ({}, {"batch_size": 8}, "batch_size"),
    "local steps": ({}, {"local_steps": 8}, "local_steps"),
    "shares": ({}, {"shares": "equal"}, "shares"),
    "momentum": ({"server_optimizer": partial(SGD, momentum=0.5)},
                 {"server_optimizer": partial(SGD, momentum=0.9)}, "server_optimizer.momentum"),
    "decay by a lambda": (
        {"server_optimizer": lambda p, lr: SGD(p, lr, weight_decay=0.1)},
        {"server_optimizer": lambda p, lr: SGD(p, lr, weight_decay=0.2)},
        "server_optimizer.weight_decay",
    ),
    "scheduler": ({"server_scheduler": partial(StepLR, step_size=1)},
                  {"server_scheduler": partial(StepLR, step_size=2)},
                  "server_scheduler.step_size"),
    "loss": ({}, {"loss": functional.multi_margin_loss}, "loss"),
    "loss's setting": ({"loss": partial(functional.cross_entropy, label_smoothing=0.1)},
                       {"loss": partial(functional.cross_entropy, label_smoothing=0.2)},
                       "loss.label_smoothing"),
    "loss's weights": ({"loss": weighted(1.0, 2.0, 3.0)}, {"loss": weighted(1.0, 2.0, 4.0)},
                       "loss.weight"),
    "metric": ({"metrics": {"top": Top(1)}}, {"metrics": {"top": Top(2)}}, "metrics.top.k"),
    "cut": ({}, {"cut": "middle"}, "cut"),
    "layer": ({"build": dropping(0.1)}, {"build": dropping(0.2)}, "model.front.1"),
    "frozen": ({}, {"build": frozen}, "model.front.0.weight"),
    "method's own": ({"cls": EPSL, "phi": 0.5}, {"cls": EPSL, "phi": 0.25}, "phi"),
    "Flower strategy's": ({"client_strategy": FedAdam(eta=0.1)},
                          {"client_strategy": FedAdam(eta=0.2)}, "client_strategy.eta"),
    "method": ({}, {"cls": SplitFedV2}, "strategy"),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_what_changes_numbers_is_named(what):
    one, other, name = CHANGES[what]
    found = differences(identity(**one), identity(**other))
    assert f"with {name} " in found
    assert differences(identity(**one), identity(**one)) == ""


@pytest.mark.parametrize(
    "allowed",
    [
        {"carrier": "flower"},
        {"session": SessionSettings(step_timeout=1.0)},
        {"callbacks": [EarlyStopping()]},
        {"min_available_nodes": 2},
        {"share_client_segments": True},
        {"checkpoint_dir": "/elsewhere", "resume": True},
        {"example": torch.zeros(1, 8)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_changes_no_numbers_may_change(allowed):
    assert differences(identity(), identity(**allowed)) == ""


def test_how_a_decoupled_method_overlaps_may_change():
    assert not differences(identity(CSEFSL), identity(CSEFSL, overlap=False))
    assert not differences(
        identity(client_strategy=FedAvg()), identity(client_strategy=FedAvg(min_available_nodes=9))
    )


def test_a_long_list_of_differences_is_cut():
    found = differences({str(i): 0 for i in range(12)}, {})
    assert found.count("this one has none") == 8
    assert found.endswith("and 4 more differences")


def test_a_function_is_known_by_what_it_looks_up():
    source = "def loss(out, y): return helper(out) * SCALE\ndef helper(out): return out + {}\n"

    def described(scale, added):
        names = {"SCALE": scale, "__name__": "users"}
        exec(source.format(added), names)
        return describe("loss", names["loss"])

    assert differences(described(1.0, 2), described(1.0, 2)) == ""
    assert differences(described(1.0, 2), described(1.5, 2)) == (
        "with loss.SCALE 1.0, this one has 1.5"
    )
    assert differences(described(1.0, 2), described(1.0, 3)).startswith(
        "with loss.helper 'helper #"
    )


def test_what_refers_to_itself_is_described():
    def again(n):
        return again(n - 1)

    assert list(describe("f", again)) == ["f", "f.again"]
    nested = []
    nested.append(nested)
    assert describe("x", nested)["x"] == "list"


def test_a_run_that_completed_no_round_is_begun_anew(tmp_path):
    with pytest.raises(ConfigError, match="no round was completed there; start without resume"):
        run(tmp_path, rounds=2, resume=True)


def test_a_train_config_is_part_of_a_run(tmp_path):
    run(tmp_path, start={"train_config": ConfigRecord({"lr": 0.5})})
    with pytest.raises(ConfigError, match=r"with train_config.lr 0.5, this one has none$"):
        run(tmp_path, rounds=2, resume=True)


@pytest.mark.chaos(
    "a run begins in another one's checkpoint folder",
    "it is refused, and told what differs",
)
def test_a_run_of_another_kind_does_not_begin_in_a_used_folder(tmp_path):
    run(tmp_path)
    kept = (tmp_path / "server" / "round-1.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"has the checkpoints of a run .*with server_lr 0.05, "):
        run(tmp_path, server_lr=0.01)
    assert (tmp_path / "server" / "round-1.safetensors").read_bytes() == kept


def test_the_same_run_begun_again_sets_the_first_one_aside(tmp_path, caplog):
    """Its files of later rounds were taken for the new run's, which were removed."""
    run(tmp_path, rounds=3)
    first = json.loads((tmp_path / "run.json").read_text())["experiment"]
    run(tmp_path)
    resumed = run(tmp_path, rounds=2, resume=True)
    assert [entry.round for entry in resumed.history] == [1, 2]
    names = sorted(path.name for path in (tmp_path / "earlier" / first).iterdir())
    assert names == ["flsplit.lock", "history.jsonl", "run.json", "server"]
    assert "up to round 3; they are now in" in caplog.text
    # It can still be gone on with.
    again = run(tmp_path / "earlier" / first, rounds=4, resume=True)
    assert [entry.round for entry in again.history] == [1, 2, 3, 4]


def test_checkpoints_of_nobody_are_left_alone(tmp_path):
    run(tmp_path)
    (tmp_path / "run.json").unlink()
    for resume in (False, True):
        with pytest.raises(StorageError, match="but of which run can't be read"):
            run(tmp_path, resume=resume)


@pytest.mark.chaos(
    "two runs in one checkpoint folder",
    "the second is refused",
)
def test_two_runs_in_one_folder_at_once_are_refused(tmp_path):
    lock = FolderLock(tmp_path)
    assert lock.take()
    with pytest.raises(ConfigError, match=f"checkpoint_dir {tmp_path} is in use by another run"):
        run(tmp_path)
    lock.release()
    run(tmp_path)
    assert lock.take()  # the run has let go of it


@pytest.mark.chaos(
    "two runs in one state folder",
    "the second is refused",
)
def test_two_grids_in_one_state_dir_at_once_are_refused(tmp_path):
    def grid():
        return LocalGrid(split_app(plain_net, PARTS), 2, state_dir=tmp_path, progress=False)

    class Second(EarlyStopping):
        def on_round_end(self, round_):
            with pytest.raises(ConfigError, match=f"state_dir {tmp_path} is in use"):
                run_split(PSL, plain_net, PARTS, wrap=lambda _: grid())
            return False

    run_split(PSL, plain_net, PARTS, rounds=1, callbacks=[Second()], wrap=lambda _: grid())
    run_split(PSL, plain_net, PARTS, rounds=1, wrap=lambda _: grid())


def test_a_checkpoint_does_not_grow_with_the_rounds_and_the_ledger_only_gains_lines(tmp_path):
    result = run(tmp_path, rounds=12)
    sizes = {path.stat().st_size for path in (tmp_path / "server").iterdir()}
    assert max(sizes) - min(sizes) < 16  # digits of numbers
    history = History.load(tmp_path / "history.jsonl")
    assert history.numbers() == result.history.numbers()


def test_a_history_file_goes_on_where_a_checkpoint_says(tmp_path):
    file, entries = HistoryFile(tmp_path / "h.jsonl"), run(tmp_path / "run", rounds=3).history
    file.add(entries[0])
    end = file.add(entries[1])
    file.add(entries[2])
    again = HistoryFile(tmp_path / "h.jsonl")
    assert again.read(end).numbers() == History(entries[:2]).numbers()
    again.add(entries[2])
    assert len((tmp_path / "h.jsonl").read_text().splitlines()) == 3
    (tmp_path / "h.jsonl").write_text("{}")
    with pytest.raises(BrokenFileError, match="its first"):
        again.read(end)
