"""Options that can't be used are refused when the strategy is made, with name and value."""

from functools import partial

import pytest
import torch
from flwr.serverapp.strategy import FedAvg
from reference import CUT, plain_net
from torch import nn
from torch.nn import functional

from flsplit.errors import ConfigError
from flsplit.run.options import at_round
from flsplit.strategies import PSL, SequentialSL, SplitFedV1

WRONG = {
    "batch_size": (0, -1, 2.5, True, "32", None),
    "evaluate_batch_size": (0, 1.0, "512"),
    "evaluate_batches": (-1, 2.0, "all", True),
    "local_epochs": (-1, 0.5, False),
    "local_steps": (-1, "3"),
    "min_train_nodes": (-1, 1.5),
    "min_evaluate_nodes": (-1, None),
    "min_available_nodes": (0, "two"),
    "seed": (-1, 0.0, "x"),
    "fraction_train": (-0.1, 1.1, "half", True, float("nan")),
    "fraction_evaluate": (2, None),
    "server_lr": (-0.1, "0.1", None, float("nan"), float("inf"), True),
    "client_lr": (-1, "fast", float("inf")),
    "model": (plain_net, "resnet18", None),
    "cut": (1, None),
    "server_optimizer": ("SGD", None),
    "server_scheduler": ("cosine", 3),
    "loss": ("cross_entropy", None),
    "metrics": (["accuracy"], None),
    "drop_last": ("yes", 1, None),
    "shares": ("example", 1, ["equal"]),
    "reduction": ("average", None),
    "server_batchnorm": ("per-client", None),
    "callbacks": (None, 3, ["stopping"]),
    "client_parts": (None, 3, ["clip"]),
    "device": (0, None),
    "client_strategy": ("fedavg", FedAvg),
    "share_client_segments": ("true", 0),
    "weighted_by_key": (1, None),
    "carrier": ("grpc", None),
}


def make(strategy=PSL, **options):
    return strategy(**({"model": plain_net(), "cut": CUT} | options))


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values]
)
def test_a_value_that_cannot_be_used_is_refused_by_name(name, value):
    with pytest.raises(ConfigError) as caught:
        make(**{name: value})
    assert str(caught.value).startswith(name)
    assert "expected" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("batch_size", 0, "batch_size is 0, expected a whole number of at least 1"),
        ("server_lr", "0.1", "server_lr is '0.1', expected a finite number at least 0"),
        ("shares", "equally", "shares is 'equally', expected one of 'examples', 'batch', 'equal'"),
        (
            "client_strategy",
            FedAvg,
            "client_strategy is the class FedAvg itself, expected an object of type Strategy",
        ),
        (
            "loss",
            nn.CrossEntropyLoss,
            "loss is the class CrossEntropyLoss itself, expected an object of it",
        ),
        ("model", plain_net, "model is of type function, expected an object of type Module"),
        (
            "callbacks",
            ["stopping"],
            "callbacks: one of them is 'stopping', expected an object of type Callback",
        ),
    ],
)
def test_an_error_shows_what_came_and_what_was_expected(name, value, said):
    with pytest.raises(ConfigError) as caught:
        make(**{name: value})
    assert str(caught.value) == said


@pytest.mark.parametrize("device", ["gpu", "cuda:99", ""])
def test_a_device_that_is_not_there(device):
    with pytest.raises(ConfigError, match=f"device is '{device}', which can't be used here"):
        make(device=device)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"local_epochs": 0}, "local_epochs and local_steps are both 0"),
        (
            {
                "server_lr": lambda server_round: 0.1,
                "server_scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 1),
            },
            "server_lr is a function and server_scheduler is given",
        ),
        (
            {"client_strategy": FedAvg(), "fraction_train": 0.5},
            "client_strategy chooses the clients: set fraction_train there",
        ),
        (
            {"client_strategy": FedAvg(), "min_train_nodes": 3},
            "client_strategy chooses the clients: set min_train_nodes there",
        ),
        ({"resume": True}, "resume is True, but checkpoint_dir is empty"),
    ],
)
def test_options_that_contradict_each_other(options, said):
    with pytest.raises(ConfigError, match=said):
        make(**options)


def test_an_option_that_does_not_exist_names_the_nearest():
    with pytest.raises(ConfigError, match="PSL has no argument 'serverlr'; did you mean 'server_"):
        make(serverlr=0.1)
    with pytest.raises(ConfigError, match=r"PSL has no argument 'xyzzy' \(it has .*batch_size"):
        make(xyzzy=1)


def test_an_option_of_the_strategy_itself_is_named_as_well():
    expected = "SplitFedV1 has no argument 'server_stratgy'; did you mean 'server_strategy'"
    with pytest.raises(ConfigError, match=expected):
        make(SplitFedV1, server_stratgy=FedAvg())


def test_a_server_strategy_that_is_none():
    with pytest.raises(ConfigError, match="server_strategy is 'fedavg', expected an object of"):
        make(SplitFedV1, server_strategy="fedavg")


def test_sequential_split_learning_has_nothing_to_aggregate():
    with pytest.raises(ConfigError, match="there is nothing for client_strategy to aggregate"):
        make(SequentialSL, client_strategy=FedAvg())


@pytest.mark.parametrize(
    "loss", [nn.MSELoss(reduction="sum"), partial(functional.mse_loss, reduction="sum")]
)
def test_a_loss_that_is_a_sum_is_warned_about(loss, caplog):
    make(loss=loss)
    assert "loss has reduction='sum', where a mean is expected" in caplog.text
    caplog.clear()
    make(loss=nn.MSELoss())
    assert not caplog.text


def test_a_learning_rate_that_does_not_take_the_round():
    with pytest.raises(ConfigError, match=r"server_lr or client_lr is .* can't be called with the"):
        at_round(lambda: 0.1, 1)


def test_whatever_is_good_is_taken():
    strategy = make(
        server_lr=1, client_lr=lambda server_round: 1 / server_round, loss=nn.MSELoss(),
        metrics={}, callbacks=[], client_parts=[], fraction_train=1, fraction_evaluate=0,
        local_epochs=0, local_steps=3, server_optimizer=torch.optim.AdamW, seed=2**40,
        min_train_nodes=0, drop_last=True, device="cpu",
    )  # fmt: skip
    assert strategy.options.local_steps == 3
