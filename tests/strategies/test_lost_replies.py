"""Clients that don't answer, answer late, or answer something else."""

import random

import pytest
import torch
from flwr.app import Error, Message
from reference import (
    LR,
    MOMENTUM,
    WrappedGrid,
    assert_bit_equal,
    assert_close,
    fresh,
    make_parts,
    noisy_net,
    numbered_batches,
    plain_net,
    run_split,
    weights_of,
    whole_of,
)
from torch.nn import functional
from torch.optim import SGD

from flsplit.account import LeftOut
from flsplit.errors import NotEnoughClientsError
from flsplit.strategies import PSL, SequentialSL, SplitFedV1, SplitFedV2

ALL = [PSL, SplitFedV1, SplitFedV2, SequentialSL]
STEP, FINISH, EVALUATE = "train.step", "train.finish", "evaluate.step"


class FaultyGrid(WrappedGrid):
    """Lets ``fault`` change the replies to one kind of message.

    ``fault(requests, replies, count)`` takes dicts by client name and how many exchanges with
    messages of this kind there were before; it changes ``replies``. ``arrange`` may then change
    the order of what arrives.
    """

    def __init__(self, inner, fault, kind=STEP, arrange=list):
        super().__init__(inner)
        self.fault, self.kind, self.arrange, self.count = fault, kind, arrange, 0

    def send_and_receive(self, messages, *, timeout=None):
        requests = {self._name(m.metadata.dst_node_id): m for m in messages}
        replies = {
            self._name(m.metadata.src_node_id): m
            for m in super().send_and_receive(requests.values(), timeout=timeout)
        }
        if self.kind in {m.metadata.message_type for m in requests.values()}:
            self.fault(requests, replies, self.count)
            self.count += 1
        return self.arrange(replies.values())

    def _name(self, node):
        return str(list(self.get_node_ids()).index(node))


def run_with(fault, strategy_class=PSL, sizes=(8, 8, 8), *, kind=STEP, build=plain_net, **options):
    return run_split(
        strategy_class, build, make_parts(sizes, build),
        wrap=lambda grid: FaultyGrid(grid, fault, kind), **options,
    )  # fmt: skip


def left_out(result):
    return [[(one.client, one.step) for one in entry.left_out] for entry in result.history]


def lose(client, at):
    def fault(requests, replies, count):
        if count in at:
            replies.pop(client, None)

    return fault


# --- lost replies ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy_class", "cache"), [*((one, True) for one in ALL), (SequentialSL, False)]
)
def test_the_others_go_on_as_if_the_lost_client_had_not_been_there(strategy_class, cache):
    options = {"optimizer": MOMENTUM, "build": noisy_net, "cache": cache, "rounds": 1}
    options |= {"share_client_segments": True, "fraction_evaluate": 0.0}
    lost = run_with(lose("2", range(99)), strategy_class, (8, 5, 8), **options)
    alone = run_with(lose("2", ()), strategy_class, (8, 5), **options)
    assert left_out(lost) == [[("2", 0)]]
    assert "no answer" in lost.history[0].left_out[0].reason
    assert_bit_equal(weights_of(lost.arrays), weights_of(alone.arrays))
    assert set(lost.client_segments) == set(alone.client_segments)
    for client, segment in alone.client_segments.items():
        assert_bit_equal(weights_of(lost.client_segments[client]), weights_of(segment))
    for key in ("loss", "accuracy", "steps", "rows"):
        assert lost.history.numbers()[0][key] == alone.history.numbers()[0][key], key


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
def test_a_client_lost_in_the_middle_comes_back_in_the_next_round(cache):
    """By hand: from step 1 of round 1 on the shares are those of the two others."""
    sizes = (8, 12, 20)
    result = run_with(
        lose("1", {1}), sizes=sizes, rounds=2, local_steps=2, cache=cache,
        share_client_segments=True,
    )  # fmt: skip
    assert result.history[0].left_out == [LeftOut("1", 1, result.history[0].left_out[0].reason)]
    assert result.history[1].left_out == []

    models = [fresh(plain_net) for _ in sizes]
    for model in models[1:]:
        model.middle, model.head = models[0].middle, models[0].head
    server = [*models[0].middle.parameters(), *models[0].head.parameters()]
    optimizers = [SGD(m.front.parameters(), lr=LR) for m in models]
    server_optimizer = SGD(server, lr=LR)
    parts = make_parts(sizes)
    streams = [numbered_batches(part, str(i), 4) for i, part in enumerate(parts)]
    # In round 2 client 1 goes on with the batch whose gradient never came.
    for present in ((0, 1, 2), (0, 2), (0, 1, 2), (0, 1, 2)):
        server_optimizer.zero_grad()
        total = sum(sizes[i] for i in present)
        for i in present:
            inputs, labels = parts[i][next(streams[i])]
            optimizers[i].zero_grad()
            loss = functional.cross_entropy(models[i](inputs), labels)
            share = sizes[i] / total
            loss.backward()
            for parameter in server:  # Σ λ_i g_i, one client's g_i after the other
                parameter.summed = getattr(parameter, "summed", 0) + share * parameter.grad
                parameter.grad = None
            optimizers[i].step()
        for parameter in server:
            parameter.grad, parameter.summed = parameter.summed, 0
        server_optimizer.step()
    for index, model in enumerate(models):
        assert_close(whole_of(result, str(index)), model.state_dict(), 1e-6)


@pytest.mark.parametrize("strategy_class", [SplitFedV1, SplitFedV2])
def test_what_never_arrived_at_the_rounds_end_is_not_averaged(strategy_class):
    rounds = {"rounds": 1, "optimizer": MOMENTUM, "fraction_evaluate": 0.0}
    lost = run_with(lose("2", {0}), strategy_class, kind=FINISH, **rounds)
    assert left_out(lost) == [[("2", 2)]]
    if strategy_class is SplitFedV1:  # only here clients don't share a server segment
        alone = run_with(lose("2", ()), strategy_class, (8, 8), **rounds)
        assert_bit_equal(weights_of(lost.arrays), weights_of(alone.arrays))


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
def test_a_turn_that_was_lost_leaves_no_trace_in_the_client(cache):
    """What the last client hands over is lost: it evaluates what the others handed on."""
    parts, tests = make_parts((8, 8)), make_parts((5, 7))
    result = run_split(
        SequentialSL, plain_net, parts, tests=tests, rounds=1, optimizer=MOMENTUM, cache=cache,
        wrap=lambda grid: FaultyGrid(grid, lose("1", {1}), FINISH),
    )  # fmt: skip
    assert [one.client for one in result.history[0].left_out] == ["1"]
    model = fresh(plain_net)
    model.load_state_dict(weights_of(result.arrays))
    losses = [functional.cross_entropy(model(x), y, reduction="sum") for x, y in
              (test.tensors for test in tests)]  # fmt: skip
    assert result.history[0].evaluation["loss"] == pytest.approx(
        (sum(losses) / 12).item(), rel=1e-6
    )


def test_a_client_lost_in_evaluation_is_named_and_the_others_count():
    parts, tests = make_parts((4, 4)), make_parts((3, 5))
    result = run_split(
        PSL, plain_net, parts, tests=tests, rounds=1,
        wrap=lambda grid: FaultyGrid(grid, lose("1", {0}), EVALUATE),
    )  # fmt: skip
    assert result.history[0].evaluation["num-examples"] == 3
    assert [one.client for one in result.history[0].left_out] == ["1"]


# --- order of arrival ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy_class", "order"),
    [(PSL, "shuffled"), (SplitFedV1, "reversed"), (SplitFedV2, "shuffled")],
)
def test_the_order_of_arrival_does_not_change_a_bit(strategy_class, order):
    rng = random.Random(1)
    arrange = {
        "reversed": lambda replies: list(replies)[::-1],
        "shuffled": lambda replies: rng.sample(list(replies), len(replies)),
    }[order]
    parts, tests = make_parts((7, 12, 5), noisy_net), make_parts((3, 9, 2), noisy_net)
    as_sent, rearranged = (
        run_split(
            strategy_class, noisy_net, parts, tests=tests, optimizer=MOMENTUM,
            wrap=lambda grid, how=how: FaultyGrid(grid, lambda *_: None, STEP, how),
        )
        for how in (list, arrange)
    )  # fmt: skip
    assert as_sent.history.numbers() == rearranged.history.numbers()
    assert_bit_equal(weights_of(as_sent.arrays), weights_of(rearranged.arrays))


@pytest.mark.parametrize("first", [True, False])
def test_a_reply_that_comes_an_exchange_too_late_is_not_taken_for_another(first):
    """Client 1's reply to step 0 arrives among the replies to step 1."""
    kept = []

    class Late(FaultyGrid):
        def send_and_receive(self, messages, *, timeout=None):
            replies = super().send_and_receive(messages, timeout=timeout)
            if self.count == 2 and kept:
                replies = [kept.pop(), *replies] if first else [*replies, kept.pop()]
            return replies

    def hold_back(requests, replies, count):
        if count == 0:
            kept.append(replies.pop("1"))

    options = {"rounds": 1, "share_client_segments": True}
    late = run_split(PSL, plain_net, make_parts((8, 8, 8)),
                     wrap=lambda grid: Late(grid, hold_back), **options)  # fmt: skip
    lost = run_with(lose("1", {0}), **options)
    assert not kept
    assert late.history.numbers() == lost.history.numbers()
    assert_bit_equal(weights_of(late.arrays), weights_of(lost.arrays))


# --- wrong replies ---------------------------------------------------------------------------


def test_swapped_replies_are_noticed_and_both_clients_left_out():
    def swap(requests, replies, count):
        if count == 1:
            first, second = replies["0"].content, replies["1"].content
            replies["0"].content, replies["1"].content = second, first

    swapped = run_with(swap, rounds=1, share_client_segments=True)
    assert left_out(swapped) == [[("0", 1), ("1", 1)]]
    reasons = [one.reason for one in swapped.history[0].left_out]
    assert reasons == [
        "reply: client is '1', expected '0'",
        "reply: client is '0', expected '1'",
    ]
    assert set(swapped.client_segments) == {"2"}


def test_an_old_steps_reply_is_noticed():
    old = {}

    def replay(requests, replies, count):
        if count == 0:
            old["0"] = replies["0"].content
        elif count == 1:
            replies["0"].content = old["0"]

    replayed = run_with(replay, rounds=1)
    assert left_out(replayed) == [[("0", 1)]]
    assert replayed.history[0].left_out[0].reason == "reply: step is 0, expected 1"


def test_an_old_rounds_reply_is_noticed():
    old = {}

    def replay(requests, replies, count):
        if count == 0:
            old["0"] = replies["0"].content
        elif count == 2:  # two steps a round
            replies["0"].content = old["0"]

    replayed = run_with(replay, rounds=2)
    assert left_out(replayed) == [[], [("0", 0)]]
    assert replayed.history[1].left_out[0].reason == "reply: server-round is 1, expected 2"


def test_an_error_is_named_and_the_others_go_on():
    def fail(requests, replies, count):
        if count == 1:
            replies["1"] = Message(Error(0, "OSError: disk full"), reply_to=requests["1"])

    failed = run_with(fail, rounds=2, share_client_segments=True)
    lost = run_with(lose("1", {1}), rounds=2, share_client_segments=True)
    assert left_out(failed) == [[("1", 1)], []]
    assert "OSError: disk full" in failed.history[0].left_out[0].reason
    assert_bit_equal(weights_of(failed.arrays), weights_of(lost.arrays))
    assert set(failed.client_segments) == {"0", "1", "2"}


def test_data_that_fails_in_one_client_leaves_the_others_alone():
    class Broken(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            raise OSError("image 3 is truncated")

    parts = [*make_parts((8, 8)), Broken()]
    result = run_split(PSL, plain_net, parts, rounds=2)
    assert left_out(result) == [[("2", 0)]] * 2
    assert "image 3 is truncated" in result.history[0].left_out[0].reason


# --- too few are left ------------------------------------------------------------------------


@pytest.mark.parametrize("strategy_class", ALL)
def test_a_run_ends_when_too_few_clients_are_left(strategy_class):
    with pytest.raises(
        NotEnoughClientsError,
        match=r"round 1: 2 of 3 clients .*expected 3 or more .*client '1': no answer",
    ):
        run_with(lose("1", range(99)), strategy_class, min_available_nodes=3)


@pytest.mark.parametrize("strategy_class", ALL)
def test_a_run_ends_when_nobody_is_left(strategy_class):
    def lose_all(requests, replies, count):
        replies.clear()

    with pytest.raises(NotEnoughClientsError, match="0 of 3 clients") as caught:
        run_with(lose_all, strategy_class)
    expected = "client '0', client '1', client '2': no answer within 3600 s"
    assert str(caught.value).endswith(expected)


def test_a_run_does_not_begin_with_too_few_clients():
    with pytest.raises(NotEnoughClientsError, match=r"3 clients are connected.*at least 4"):
        run_split(PSL, plain_net, make_parts((4, 4, 4)), min_available_nodes=4,
                  start={"timeout": 0.0})  # fmt: skip


class Leaving(FaultyGrid):
    """From the second step on, clients 0 and 1 are gone; they can't be asked any more."""

    def __init__(self, inner):
        super().__init__(inner, lose("0", range(1, 99)))

    def get_node_ids(self):
        nodes = list(super().get_node_ids())
        return nodes if self.count < 2 else nodes[2:]

    def _name(self, node):
        return str(list(self.inner.get_node_ids()).index(node))


@pytest.mark.parametrize("strategy_class", ALL)
def test_a_round_ends_early_when_clients_disconnect_and_the_next_waits_for_them(
    strategy_class, caplog
):
    with pytest.raises(NotEnoughClientsError, match=r"1 clients are connected.*at least 3"):
        run_split(
            strategy_class, plain_net, make_parts((8, 8, 8)), min_available_nodes=3, wrap=Leaving,
            start={"timeout": 0.0}, fraction_evaluate=0.0,
        )  # fmt: skip
    (early,) = [one for one in caplog.messages if "the round ends early" in one]
    assert "2 of 3 clients are left, expected 3" in early
