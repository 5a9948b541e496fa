"""Runs that can't begin, or go on, and clients that fail as a whole."""

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from reference import WrappedGrid, assert_bit_equal, make_parts, plain_net, weights_of
from tampering import of_client, set_up, train

from flsplit.errors import ConfigError, NotEnoughClientsError
from flsplit.message.types import DESCRIBE, STEP
from flsplit.strategies import PSL, SequentialSL, SplitFedV1, SplitFedV2

PARTS = make_parts([8, 8])


# --- nodes -----------------------------------------------------------------------------------


class NobodyThere(WrappedGrid):
    def get_node_ids(self):
        return []


def test_no_nodes_within_the_timeout():
    strategy, grid, arrays = set_up(PARTS)
    with pytest.raises(NotEnoughClientsError, match="0 clients are connected after 0 s, expected"):
        train((strategy, NobodyThere(grid), arrays), timeout=0)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"num_rounds": 0}, "num_rounds is 0, expected at least 1"),
        ({"num_rounds": "3"}, "num_rounds is '3', expected an object of type int"),
        ({"grid": ClientApp()}, "grid is of type ClientApp, expected an object of type Grid"),
    ],
)
def test_what_a_run_cannot_start_with(arguments, expected):
    strategy, grid, arrays = set_up(PARTS)
    with pytest.raises(ConfigError, match=expected):
        strategy.start(**({"grid": grid, "initial_arrays": arrays} | arguments))


def test_fewer_nodes_than_min_available_nodes():
    run = set_up(PARTS, min_available_nodes=3)
    with pytest.raises(NotEnoughClientsError, match=r"2 clients are .* least 3 .*min_available"):
        train(run, timeout=0)


def test_fewer_nodes_than_a_client_strategy_waits_for():
    """Flower's FedAvg wants two clients by default and would wait for ever."""
    run = set_up(PARTS[:1], client_strategy=FedAvg())
    with pytest.raises(NotEnoughClientsError, match=r"1 clients are connected after 0 s.*least 2"):
        train(run, timeout=0)


def test_fewer_nodes_than_a_server_strategy_waits_for():
    run = set_up(PARTS[:1], SplitFedV1, server_strategy=FedAvg())
    with pytest.raises(NotEnoughClientsError, match=r"FedAvg needs 2 clients.*there are 1"):
        train(run, timeout=0)


def test_nodes_of_an_app_that_knows_nothing_of_flsplit_are_named_with_the_reason():
    run = set_up(PARTS, client={"app": ClientApp()})
    expected = r"0 clients are connected.*; node \d+ and 1 more: .*describe"
    with pytest.raises(NotEnoughClientsError, match=expected):
        train(run, timeout=0)


def test_a_node_that_describes_itself_wrongly_is_not_used():
    def edit(request, reply):
        described = request.metadata.message_type == DESCRIBE
        if described and reply.content["reply"]["client"] == "1":
            reply.content["reply"] = ConfigRecord({"client": 1})
        return reply

    result = train(set_up(PARTS, edit=edit))
    assert result.history[0].participants == ["0"]


def test_two_nodes_with_the_same_name():
    def edit(request, reply):
        if request.metadata.message_type == DESCRIBE:
            reply.content["reply"]["client"] = "hospital"
        return reply

    run = set_up(PARTS, edit=edit, min_available_nodes=2)
    expected = r"1 clients.*least 2.*two nodes call themselves client 'hospital'.*client-name"
    with pytest.raises(NotEnoughClientsError, match=expected):
        train(run, timeout=0)


# --- clients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [PSL, SequentialSL, SplitFedV1, SplitFedV2])
@pytest.mark.parametrize("when", ["forward", "second forward", "backward", "second backward"])
def test_a_client_that_raises_is_left_out_with_what_it_raised(strategy, when):
    batches = []  # of client 0 so far; a model is run with the first one more than once

    class Counted(torch.utils.data.TensorDataset):
        def __getitems__(self, rows):
            batches.append(rows)
            return [self[row] for row in rows]

    def fail_if(now):
        if (when == now and batches) or (when == f"second {now}" and len(batches) == 2):
            raise OSError("the disk is on fire")

    class Fail(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            fail_if("forward")
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            fail_if("backward")
            return gradient

    class Failing(torch.nn.Module):
        def forward(self, x):
            return Fail.apply(x)

    def build(context):
        net = plain_net()
        if context.node_config["partition-id"] == 0:
            net.front.add_module("failing", Failing())
        return net

    parts = [Counted(*PARTS[0].tensors), *PARTS[1:]]
    result = train(set_up(parts, strategy, client={"model": build}))
    (left,) = result.history[0].left_out
    step = {"forward": 0, "backward": 0, "second forward": 1, "second backward": 2}[when]
    assert (left.client, left.step) == ("0", step)
    assert left.reason.startswith("OSError: the disk is on fire")
    assert result.history[0].rows == 8 + 4 * step


def test_a_mod_that_raises_leaves_its_client_out():
    def mod(message, context, call_next):
        if message.metadata.message_type == STEP and context.node_config["partition-id"] == 1:
            raise PermissionError("not with me")
        return call_next(message, context)

    result = train(set_up(PARTS, client={"mods": [mod]}))
    (left,) = result.history[0].left_out
    assert left.client == "1"
    assert left.reason.startswith("PermissionError: not with me (test_runs.py, line ")


def test_a_client_that_never_answers_does_not_change_what_the_others_do():
    silent = train(set_up(PARTS, edit=of_client("1", STEP, lambda *_: None)))
    alone = train(set_up(PARTS[:1]))
    assert [left.client for left in silent.history[0].left_out] == ["1"]
    assert_bit_equal(weights_of(silent.arrays), weights_of(alone.arrays))


def test_records_that_nobody_asked_for_cannot_break_the_ledger():
    def edit(request, reply):
        wrong = Array(dtype="float99", shape=(2,), stype="?", data=b"")
        reply.content["arrays"] = ArrayRecord({"x": wrong})
        return reply

    result = train(set_up(PARTS, edit=of_client("1", STEP, edit, step=0)))
    (left,) = result.history[0].left_out
    assert (left.client, left.step) == ("1", 0)
    assert "dtype is 'float99'" in left.reason


def test_an_error_without_a_reason():
    def edit(request, reply):
        return Message(Error(0), reply_to=request)

    result = train(set_up(PARTS, edit=of_client("1", STEP, edit)))
    assert result.history[0].left_out[0].reason == "an error without a reason"


# --- arguments of start ----------------------------------------------------------------------


def test_central_evaluation_of_a_method_that_keeps_client_segments_at_home():
    seen = []
    with pytest.raises(ConfigError, match="PSL keeps a client segment of its own at every client"):
        train(set_up(PARTS), evaluate_fn=lambda *args: seen.append(args))
    assert seen == []


@pytest.mark.parametrize("strategy", [SplitFedV1, SplitFedV2, SequentialSL])
def test_central_evaluation_of_a_method_that_gives_back_a_whole_model(strategy):
    seen = []
    train(set_up(PARTS, strategy), evaluate_fn=lambda number, arrays: seen.append((number, arrays)))
    assert [number for number, _ in seen] == [0, 1]
    for _, arrays in seen:
        plain_net().load_state_dict(arrays.to_torch_state_dict())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"batchsize": 4}, r"train_config has no argument 'batchsize'; did you mean 'batch-s"),
        ({"proximal-mu": 4}, "train_config has no argument 'proximal-mu' .it has lr, batch-size"),
        ({"batch-size": 0}, "train_config: field 'batch-size' is 0, expected at least 1"),
        ({"batch-size": 2.5}, r"train_config: field 'batch-size' is 2\.5 \(float\), expected"),
        ({"lr": "fast"}, r"train_config: field 'lr' is 'fast' \(str\), expected a float"),
        ({"lr": -0.1}, r"train_config: field 'lr' is -0\.1, expected at least 0"),
        ({"lr": float("nan")}, "train_config: field 'lr' is nan"),
        ({"drop-last": 1}, r"train_config: field 'drop-last' is 1 \(int\), expected a bool"),
        ({"local-epochs": 0}, "train_config: local-epochs and local-steps are both 0"),
    ],
)
def test_a_train_config_that_cannot_be_used(config, said):
    with pytest.raises(ConfigError, match=said):
        train(set_up(PARTS), train_config=ConfigRecord(config))


def test_epochs_beside_steps_are_named(caplog):
    config = ConfigRecord({"local-epochs": 3})
    train(set_up(PARTS, local_steps=1), train_config=config, rounds=2)
    said = "train_config: local-epochs=3 is not used: a round has local-steps=1"
    assert caplog.text.count(said) == 1


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"batch_size": 4}, r"evaluate_config has no argument 'batch_size'; did you mean 'batch-s"),
        ({"batch-size": 0}, "evaluate_config: batch-size is 0, expected a whole number of at leas"),
        ({"batch-size": True}, "evaluate_config: batch-size is True, expected a whole number"),
    ],
)
def test_an_evaluate_config_that_cannot_be_used(config, said):
    with pytest.raises(ConfigError, match=said):
        train(set_up(PARTS), evaluate_config=ConfigRecord(config))


def test_the_train_config_goes_before_the_options():
    config = ConfigRecord({"batch-size": 2, "local-steps": 3, "server-round": 7})
    assert train(set_up(PARTS), train_config=config).history[0].rows == 2 * 3 * 2


def test_a_learning_rate_function_that_returns_nonsense():
    run = set_up(PARTS, client_lr=lambda server_round: 0.1 if server_round == 1 else -1)
    with pytest.raises(ConfigError, match="the learning rate of round 2 is -1, expected a finite"):
        train(run, rounds=2)


# --- strategies that aggregate ---------------------------------------------------------------


def test_a_server_strategy_that_chooses_among_those_that_train():
    parts = make_parts([4, 4, 4, 4])
    choosy = FedAvg(fraction_train=0.5)
    run = set_up(parts, SplitFedV1, server_strategy=choosy, client_strategy=FedAvg())
    with pytest.raises(ConfigError, match="server_strategy chose 2 of the 4 clients that train"):
        train(run)


def test_methods_of_flower_that_a_split_round_has_no_use_for():
    strategy, grid, arrays = set_up(PARTS)
    with pytest.raises(ConfigError, match=r"PSL\.configure_train belongs to rounds of one exchan"):
        strategy.configure_train(1, arrays, ConfigRecord(), grid)
    with pytest.raises(ConfigError, match=r"PSL\.aggregate_evaluate belongs to rounds of one"):
        strategy.aggregate_evaluate(1, [])


def test_a_client_strategy_that_sends_messages_of_its_own():
    class Asking(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            list(grid.send_and_receive([Message(RecordDict(), 0, "query")]))
            return super().configure_train(server_round, arrays, config, grid)

    run = set_up(PARTS, client_strategy=Asking())
    with pytest.raises(ConfigError, match="calls its configure_train and aggregate_train only"):
        train(run)
