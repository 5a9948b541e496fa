"""Rounds that lose too many clients midway: done again, as if they had not begun."""

import pytest
import torch
from flwr.app import ArrayRecord, Error, Message
from flwr.serverapp.strategy import FedAdam
from reference import (
    CUT,
    LR,
    MOMENTUM,
    SEED,
    WrappedGrid,
    assert_bit_equal,
    fresh,
    make_parts,
    noisy_net,
    plain_net,
    split_app,
    weights_of,
)
from torch.utils.data import TensorDataset

from flsplit import LocalGrid
from flsplit.errors import NotEnoughClientsError
from flsplit.flower_internals import NODE_AWAY
from flsplit.message.types import LOCAL, STEP
from flsplit.strategies import (
    CSEFSL,
    EPSL,
    FSLSAGE,
    GAPSL,
    PSL,
    SFLGA,
    SGLR,
    CycleSL,
    SequentialSL,
    SplitFedV1,
    SplitFedV2,
)  # fmt: skip

METHODS = [
    CSEFSL, EPSL, FSLSAGE, GAPSL, PSL, SFLGA, SGLR, CycleSL, SequentialSL, SplitFedV1, SplitFedV2,
]  # fmt: skip
SIZES = (8, 8, 12)


class Losing(WrappedGrid):
    """Loses one client's host in the exchanges, counted from 1, of which ``when`` says so."""

    def __init__(self, inner, when, client=1):
        super().__init__(inner)
        self.when, self.node, self.count = when, 2 + client, 0

    def send_and_receive(self, messages, *, timeout=None):
        replies = []
        for message in messages:
            (reply,) = super().send_and_receive([message])
            kind, node = message.metadata.message_type, message.metadata.dst_node_id
            if kind in (STEP, LOCAL) and node == self.node:
                self.count += 1
                if self.when(self.count):
                    reply = Message(Error(NODE_AWAY, "its host was lost"), reply_to=message)
            replies.append(reply)
        return replies


def run(strategy, when=None, parts=None, folder=None, rounds=3, build=noisy_net, **options):
    model = fresh(build)
    settings = {"server_lr": LR, "seed": SEED, "batch_size": 4, "server_optimizer": MOMENTUM}
    made = strategy(model=model, cut=CUT, device="cpu", **(settings | options))
    parts = parts or make_parts(SIZES, build)
    app = split_app(build, parts, parts, optimizer=MOMENTUM)
    grid = LocalGrid(app, len(parts), progress=False, state_dir=folder)
    wrapped = Losing(grid, when) if when else grid
    return made.start(wrapped, ArrayRecord(model.state_dict()), rounds, timeout=0.0)


def numbers(result):
    return [
        {key: one for key, one in entry.items() if key != "redone"}
        for entry in result.history.numbers()
    ]


@pytest.mark.chaos(
    "a round loses too many clients",
    "it is done again, and the run ends as if nothing had happened",
)
@pytest.mark.parametrize("strategy", METHODS)
def test_a_redone_round_leaves_what_one_without_a_loss_leaves(strategy, tmp_path, caplog):
    options = {"min_available_nodes": 3, "local_steps": 2}
    # In the second round, at its last step; local steps are one exchange, and an alignment in the
    # first round is another.
    at = {CSEFSL: 2, FSLSAGE: 3}.get(strategy, 4)
    found = []
    for folder, when in (("lost", lambda count: count == at), ("plain", None)):
        if strategy is SplitFedV2:
            options["client_strategy"] = FedAdam(min_available_nodes=3)  # remembers something
        found.append(run(strategy, when, folder=tmp_path / folder, **options))
    lost, plain = found
    assert_bit_equal(weights_of(lost.arrays), weights_of(plain.arrays))
    assert numbers(lost) == numbers(plain)
    redone = [[(one.client, one.reason) for one in entry.redone] for entry in lost.history]
    assert redone == [[], [("1", "its host was lost")], []]
    assert caplog.text.count("round 2 is done again") == 1


class Following(PSL):
    """Moves what is frozen between rounds."""

    def end_round(self, round_, finished):
        super().end_round(round_, finished)
        with torch.no_grad():
            frozen = [p for p in self.server.module.parameters() if not p.requires_grad]
            frozen[0].mul_(0.9)


def frozen_head_net():
    net = plain_net()
    net.head.requires_grad_(False)
    return net


@pytest.mark.parametrize("at", [2, 4, 6])
def test_what_is_frozen_is_set_back_too(at, tmp_path):
    options = {"build": frozen_head_net, "min_available_nodes": 3, "local_steps": 2, "rounds": 4}
    lost = run(Following, lambda count: count == at, folder=tmp_path / "lost", **options)
    plain = run(Following, folder=tmp_path / "plain", **options)
    assert_bit_equal(weights_of(lost.arrays), weights_of(plain.arrays))
    assert sum(len(entry.redone) for entry in lost.history) == 1


@pytest.mark.chaos(
    "a round loses its clients again and again",
    "the run ends after some attempts",
)
def test_a_round_is_not_begun_for_ever():
    with pytest.raises(NotEnoughClientsError, match=r"round 2: 2 of 3 clients .*\(attempt 3\)"):
        run(PSL, lambda count: count > 3, min_available_nodes=3)


def spoiled(*clients):
    """Return four clients' data of which some have a label that there isn't."""
    parts = make_parts((8, 8, 8, 8), noisy_net)
    for client in clients:
        inputs, labels = parts[client].tensors
        parts[client] = TensorDataset(inputs, torch.full_like(labels, 99))
    return parts


@pytest.mark.parametrize("strategy", METHODS)
def test_one_chosen_client_with_bad_data_does_not_end_the_run(strategy):
    # Of each round one client is chosen: which it is, follows the seed.
    few = {"fraction_train": 0.25, "fraction_evaluate": 0.0, "local_steps": 2}
    if strategy is GAPSL:
        few["min_train_nodes"] = 2  # it compares clients
    result = run(strategy, parts=spoiled(0, 2), rounds=4, **few)
    assert [entry.round for entry in result.history] == [1, 2, 3, 4]
    assert all(entry.rows for entry in result.history)
    out = [one.client for entry in result.history for one in (*entry.redone, *entry.left_out)]
    assert set(out) <= {"0", "2"}
    assert out


def test_bad_data_of_all_are_an_error():
    with pytest.raises(Exception, match="label"):
        run(PSL, parts=spoiled(0, 1, 2, 3), fraction_evaluate=0.0)


def test_it_is_counted_how_often_a_client_is_left_out(tmp_path, caplog):
    options = {"fraction_evaluate": 0.0, "checkpoint_dir": str(tmp_path)}
    first = run(PSL, parts=spoiled(1), rounds=2, **options)
    resumed = run(PSL, parts=spoiled(1), rounds=4, resume=True, **options)
    assert [one.times for entry in first.history for one in entry.left_out] == [1, 2]
    assert [one.times for entry in resumed.history for one in entry.left_out] == [1, 2, 3, 4]
    assert "client '1' is left out of round 4 from step 0 on (4 in this run)" in caplog.text
