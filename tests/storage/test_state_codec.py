"""State comes back from its codec as it went in."""

import json
from typing import NamedTuple

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from reference import make_parts, plain_net, run_split, split_app

from flsplit import LocalGrid
from flsplit.errors import ConfigError
from flsplit.run import Callback
from flsplit.storage import BrokenFileError, from_records, load_records, save_records, to_records
from flsplit.strategies import PSL


class Pair(NamedTuple):
    a: int
    b: tuple


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ([[1], (2,), [3, (4.5, None)]],) * 2,
        ((),) * 2,
        ({"tuple": ["tuple", ("list", [])], 3: {}},) * 2,
        (Pair(1, (True, "x")), (1, (True, "x"))),
        (torch.Size([2, 3]), (2, 3)),
    ],
)
def test_a_list_is_a_list_again_and_a_tuple_a_tuple(value, read, tmp_path):
    save_records(tmp_path / "r", to_records({"value": value}))
    found = from_records(load_records(tmp_path / "r"))["value"]
    assert found == read
    assert type(found) is type(read)


def test_tensors_lie_in_tuples_too():
    found = from_records(to_records({"pair": (torch.ones(2), [torch.zeros(1)])}))["pair"]
    assert isinstance(found, tuple)
    assert torch.equal(found[0], torch.ones(2))
    assert torch.equal(found[1][0], torch.zeros(1))


def test_what_it_does_not_write_is_not_read():
    tree = json.dumps(["dict", [["a", ["set", [1]]]]])
    records = RecordDict({"tensors": ArrayRecord(), "tree": ConfigRecord({"json": tree})})
    with pytest.raises(BrokenFileError, match="a state has 'set', expected"):
        from_records(records)
    with pytest.raises(ConfigError, match="state/a/0 is set, which can't be stored"):
        to_records({"a": ({1},)})


class Log(Callback):
    """As in docs/strategies.md."""

    def __init__(self):
        self.lines = []

    def on_round_end(self, round_):
        self.lines.append((round_.entry.round, round_.metric("train-loss")))

    def state_dict(self):
        return {"lines": self.lines}

    def load_state_dict(self, state):
        self.lines = state["lines"]


def test_a_resumed_callback_has_what_one_has_that_never_stopped(tmp_path):
    parts = make_parts((4, 4))

    def run(rounds, name, **options):
        log = Log()
        grid = LocalGrid(split_app(plain_net, parts), 2, state_dir=tmp_path / name, progress=False)
        options |= {"callbacks": [log], "wrap": lambda _: grid}
        run_split(PSL, plain_net, parts, rounds=rounds, **options)
        return log.lines

    run(2, "clients", checkpoint_dir=str(tmp_path / "run"))
    resumed = run(3, "clients", checkpoint_dir=str(tmp_path / "run"), resume=True)
    assert resumed == run(3, "others")
