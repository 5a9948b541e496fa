"""What the ledger counts is what follows by hand from the shapes."""

import pytest
import torch
from flwr.serverapp.strategy import FedAvg
from reference import (
    MOMENTUM,
    WrappedGrid,
    fresh,
    make_parts,
    noisy_net,
    plain_net,
    run_split,
)
from torch.nn import functional
from torch.optim import SGD, Adam

from flsplit.strategies import PSL, SequentialSL, SplitFedV1, SplitFedV2

FLOAT, LONG = 4, 8
SIZES, TEST_SIZES = (6, 9, 4), (3, 5, 0)  # batches of 4: 2, 3 and 1 steps
ROWS, TEST_ROWS = 19, 8

# The plain net's client segment: a linear layer from 8 to 6.
CUT_WIDTH = 6
SEGMENT = (8 * 6 + 6) * FLOAT


def ledger(strategy_class, **options):
    result = run_split(
        strategy_class, plain_net, make_parts(SIZES), tests=make_parts(TEST_SIZES), rounds=2,
        **options,
    )  # fmt: skip
    return [
        {category: n for category, n in entry.traffic.logical.items() if n}
        for entry in result.history
    ]


def common(rows=ROWS):
    """What every schedule moves in a round over all data, tested on all test data."""
    return {
        "activations-up": rows * CUT_WIDTH * FLOAT,
        "labels-up": rows * LONG,
        "gradients-down-unicast": rows * CUT_WIDTH * FLOAT,
        "evaluation-up": TEST_ROWS * (CUT_WIDTH * FLOAT + LONG),
    }


def test_psl_sends_segments_once_and_gets_none_back():
    assert ledger(PSL) == [common() | {"client-segments-down": 3 * SEGMENT}, common()]


def test_psl_that_shares_segments_sends_them_up_in_the_last_round():
    first, last = ledger(PSL, share_client_segments=True)
    assert first == common() | {"client-segments-down": 3 * SEGMENT}
    assert last == common() | {"client-segments-up": 3 * SEGMENT}


@pytest.mark.parametrize(
    ("strategy_class", "options"),
    [(SplitFedV1, {}), (SplitFedV2, {}), (PSL, {"client_strategy": FedAvg()})],
)
def test_averaged_segments_go_up_and_down_every_round(strategy_class, options):
    """Down to train in round 1, and after every round to evaluate, then to train on."""
    up_and_down = {"client-segments-up": 3 * SEGMENT, "client-segments-down": 3 * SEGMENT}
    assert ledger(strategy_class, **options) == [
        common() | up_and_down | {"client-segments-down": 6 * SEGMENT},
        common() | up_and_down,
    ]


@pytest.mark.parametrize("strategy_class", [SplitFedV1, SplitFedV2])
def test_without_evaluation_averaged_segments_go_down_once_a_round(strategy_class):
    training = {name: n for name, n in common().items() if name != "evaluation-up"}
    up_and_down = {"client-segments-up": 3 * SEGMENT, "client-segments-down": 3 * SEGMENT}
    assert ledger(strategy_class, fraction_evaluate=0.0) == [training | up_and_down] * 2


@pytest.mark.parametrize(
    ("optimizer", "state"),
    [(SGD, 0), (MOMENTUM, SEGMENT), (Adam, 2 * SEGMENT + 2 * FLOAT)],
    ids=["sgd", "momentum", "adam"],
)
def test_sequential_hands_segment_and_optimizer_from_client_to_client(optimizer, state):
    """Adam's state is two moments, and a step count for either parameter."""
    training = {name: n for name, n in common().items() if name != "evaluation-up"}
    handed = training | {"client-segments-up": 3 * SEGMENT, "client-segments-down": 3 * SEGMENT}
    first = handed | {"optimizer-up": 3 * state, "optimizer-down": 2 * state}
    second = handed | {"optimizer-up": 3 * state, "optimizer-down": 3 * state}
    found = ledger(SequentialSL, optimizer=optimizer, fraction_evaluate=0.0)
    assert found == [{k: n for k, n in one.items() if n} for one in (first, second)]


def test_buffers_of_the_client_segment_are_counted():
    result = run_split(PSL, noisy_net, make_parts([8], noisy_net), rounds=1)
    segment = fresh(noisy_net).front.state_dict()
    assert result.history[0].traffic.logical["client-segments-down"] == sum(
        tensor.numel() * tensor.element_size() for tensor in segment.values()
    )


def test_nothing_is_on_the_wire_within_one_process():
    result = run_split(PSL, plain_net, make_parts([4]))
    assert set(result.history[0].traffic.wire.values()) == {0}


class SendingGrid(WrappedGrid):
    """Says that it sends what it is given, and notes what passes by."""

    def __init__(self, inner):
        super().__init__(inner)
        self.in_process = False
        self.exchanges = []

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        self.exchanges.append([message.metadata.message_type for message in messages])
        return super().send_and_receive(messages, timeout=timeout)


def watched(strategy_class, sizes=SIZES, rounds=1, **options):
    grids = []

    def wrap(grid):
        grids.append(SendingGrid(grid))
        return grids[0]

    result = run_split(
        strategy_class, plain_net, make_parts(sizes), rounds=rounds, wrap=wrap,
        fraction_evaluate=0.0, carrier="flower", **options,
    )  # fmt: skip
    described, *exchanges = grids[0].exchanges
    assert set(described) == {"query.describe"}
    return result, exchanges


@pytest.mark.parametrize("strategy_class", [PSL, SplitFedV1, SplitFedV2])
def test_a_round_of_t_steps_takes_t_plus_1_exchanges(strategy_class):
    _, exchanges = watched(strategy_class, sizes=(12, 12), rounds=2)
    one_round = [["train.step"] * 2] * 3 + [["train.finish"] * 2]
    assert exchanges == one_round * 2


def test_each_client_gets_one_message_more_than_it_has_steps():
    _, exchanges = watched(PSL)
    assert [sorted(exchange) for exchange in exchanges] == [
        ["train.step"] * 3,  # all begin
        ["train.finish", "train.step", "train.step"],  # the third has had its only batch
        ["train.finish", "train.step"],
        ["train.finish"],
    ]


def test_a_turn_of_t_steps_takes_t_plus_1_exchanges():
    _, exchanges = watched(SequentialSL)
    turns = [[["train.step"]] * steps + [["train.finish"]] for steps in (2, 3, 1)]
    assert exchanges == [exchange for turn in turns for exchange in turn]


def test_local_epochs_and_local_steps_set_the_number_of_exchanges():
    for options, steps in (({"local_epochs": 2}, 4), ({"local_steps": 5}, 5)):
        _, exchanges = watched(PSL, sizes=(8,), **options)
        assert exchanges == [["train.step"]] * steps + [["train.finish"]]


def test_a_carrier_that_sends_has_a_wire_column():
    """Raw tensors travel as they are; segments with NumPy's header on top."""
    result, _ = watched(PSL)
    logical, wire = result.history[0].traffic.logical, result.history[0].traffic.wire
    for category in ("activations-up", "labels-up", "gradients-down-unicast"):
        assert wire[category] == logical[category] > 0
    header = 128
    assert wire["client-segments-down"] == logical["client-segments-down"] + 3 * 2 * header


def test_bfloat16_takes_two_bytes():
    result = run_split(
        PSL, plain_net, make_parts([4]), app_options={"autocast": torch.bfloat16}, rounds=1
    )
    assert result.history[0].traffic.logical["activations-up"] == 4 * CUT_WIDTH * 2


def test_times_are_measured():
    result = run_split(PSL, plain_net, make_parts(SIZES))
    for entry in result.history:
        assert 0 < entry.server_seconds < entry.seconds
        assert 0 < entry.client_seconds < entry.waiting_seconds < entry.seconds


def test_loss_and_accuracy_are_means_over_rows_of_all_clients():
    """With learning rates of 0 the model stays what it is, and so all rows can be scored anew."""
    parts = make_parts(SIZES)
    result = run_split(PSL, plain_net, parts, server_lr=0.0, rounds=1)
    inputs = torch.cat([part.tensors[0] for part in parts])
    labels = torch.cat([part.tensors[1] for part in parts])
    logits = fresh(plain_net)(inputs)
    (entry,) = result.history
    assert entry.loss == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-6)
    assert entry.accuracy == int((logits.argmax(1) == labels).sum()) / ROWS
