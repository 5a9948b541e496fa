"""A cut that doesn't exist, and client and server that were not cut alike."""

from collections import OrderedDict

import pytest
import torch
from flwr.app import ArrayRecord
from reference import (
    CUT,
    LR,
    assert_bit_equal,
    fresh,
    make_parts,
    normed_net,
    plain_net,
    split_app,
    weights_of,
)
from tampering import initial_server_weights, server_weights, set_up, train
from torch import nn

from flsplit import CutError, LocalGrid, client_app
from flsplit.errors import ConfigError, NotEnoughClientsError, SegmentMismatchError
from flsplit.strategies import PSL, SFLGA, SplitFedV1, SplitFedV2

PARTS = make_parts([8, 8])


def wide_net() -> nn.Sequential:
    """plain_net, but with smashed data of 7 instead of 6."""
    return nn.Sequential(
        OrderedDict(
            front=nn.Sequential(nn.Linear(8, 7), nn.Tanh()),
            middle=nn.Sequential(nn.Linear(7, 10), nn.Tanh()),
            head=nn.Linear(10, 3),
        )
    )


class Halving(nn.Module):
    def forward(self, x):
        return x[:, ::2]


def halving_net() -> nn.Sequential:
    """The client segment has plain_net's parameters, but smashed data of 3."""
    return nn.Sequential(
        OrderedDict(front=nn.Sequential(nn.Linear(8, 6), Halving()), head=nn.Linear(3, 3))
    )


def counting_net() -> nn.Sequential:
    class Count(nn.Module):
        def forward(self, x):
            return (x > 0).long()

    return nn.Sequential(
        OrderedDict(front=nn.Sequential(nn.Linear(8, 6), Count()), head=nn.Linear(6, 3))
    )


def test_a_cut_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(CutError, match=r"'fornt'") as caught:
        PSL(model=plain_net(), cut="fornt")
    for name in ("front", "front.0", "middle"):
        assert repr(name) in str(caught.value)


def test_a_client_with_a_cut_that_does_not_exist_says_which_do():
    app = client_app(model=plain_net, cut="fornt", data=lambda _: PARTS[0], device="cpu")
    with pytest.raises(NotEnoughClientsError, match=r"client '0'.*'fornt'.*'front'"):
        train(set_up(PARTS, client={"app": app}))


def test_client_and_server_cut_at_different_places():
    app = client_app(model=plain_net, cut="middle", data=lambda _: PARTS[0], device="cpu")
    run = set_up(PARTS, client={"app": app})
    with pytest.raises(NotEnoughClientsError, match="at 'front', client '0' at 'middle'"):
        train(run)
    for name, tensor in initial_server_weights(run).items():
        assert torch.equal(server_weights(run[0])[name], tensor)


def test_client_and_server_models_of_different_shapes_name_both():
    with pytest.raises(NotEnoughClientsError) as caught:
        train(set_up(PARTS, client={"model": wide_net}))
    said = str(caught.value)
    assert "round 1" in said
    assert "'front.0.weight' came with shape (6, 8), expected (7, 8)" in said
    assert "client '0'" in said
    assert "client '1'" in said


def test_client_and_server_models_of_different_names_name_them():
    def renamed():
        return nn.Sequential(OrderedDict(front=nn.Linear(8, 6), head=nn.Linear(6, 3)))

    with pytest.raises(NotEnoughClientsError, match=r"missing front\.weight.*unexpected front\.0"):
        train(set_up(PARTS, client={"model": renamed}))


@pytest.mark.parametrize("strategy", [PSL, SplitFedV1, SplitFedV2])
def test_smashed_data_that_the_server_segment_cannot_take(strategy):
    run = set_up(PARTS, strategy, client={"model": halving_net})
    with pytest.raises(SegmentMismatchError, match=r"^round 1, step 0: client.* '\d'") as caught:
        train(run)
    assert "3)" in str(caught.value)  # the shape that came
    for name, tensor in initial_server_weights(run).items():
        assert torch.equal(server_weights(run[0])[name], tensor)


def test_a_client_whose_smashed_data_do_not_fit_is_left_out():
    builds = {"0": plain_net, "1": halving_net}

    def build(context):
        return builds[str(context.node_config["partition-id"])]()

    run = set_up(PARTS, client={"model": build})
    (left,) = train(run).history[0].left_out
    assert (left.client, left.step) == ("1", 0)
    assert "can't take smashed data of shape (4, 3)" in left.reason


def test_rows_that_fit_but_cannot_be_concatenated_with_those_of_most():
    """A method that mixes the clients' rows leaves their client out, others compute it alone."""

    class Narrow(nn.Module):
        def forward(self, x):
            return x[:, :, :3]

    def build(context=None):
        narrow = context and context.node_config["partition-id"] == 2
        front = nn.Sequential(nn.Conv2d(1, 3, 3), Narrow() if narrow else nn.Identity())
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
        return nn.Sequential(OrderedDict(front=front, head=head))

    parts = make_parts([8, 8, 8], normed_net)
    pooled = train(set_up(parts, SFLGA, build=build)).history[0].left_out
    assert [one.client for one in pooled] == ["2"]
    assert "a row has shape (3, 3, 4), those of most clients have (3, 4, 4)" in pooled[0].reason
    assert "a method that computes clients one by one" in pooled[0].reason
    for more in ({}, {"server_batchnorm": "per_client"}):
        entry = train(set_up(parts, build=build, **more)).history[0]
        assert (entry.left_out, entry.rows) == ([], 24)


def test_smashed_data_of_whole_numbers_are_refused_by_the_client():
    with pytest.raises(NotEnoughClientsError, match=r"'front' is torch\.int64, expected floating"):
        train(set_up(PARTS, client={"model": counting_net}))


def test_inputs_that_the_client_segment_cannot_take():
    images = make_parts([8], normed_net)
    with pytest.raises(NotEnoughClientsError, match=r"client '0'.*inputs of shape \(4, 1, 6, 6\)"):
        train(set_up(images))


def test_initial_arrays_of_a_model_with_other_names():
    strategy, grid, _ = set_up(PARTS)
    with pytest.raises(CutError, match="bias"):
        train((strategy, grid, ArrayRecord(nn.Linear(8, 3).state_dict())))


def test_initial_arrays_of_a_model_with_other_shapes():
    strategy, grid, _ = set_up(PARTS)
    other = ArrayRecord(fresh(wide_net).state_dict())
    expected = r"initial_arrays.*'front\.0\.weight' came with shape \(7, 8\), expected \(6, 8\)"
    with pytest.raises(SegmentMismatchError, match=expected):
        train((strategy, grid, other))


def test_initial_arrays_with_another_server_segment():
    def narrow():
        return nn.Sequential(
            OrderedDict(
                front=nn.Sequential(nn.Linear(8, 6), nn.Tanh()),
                middle=nn.Sequential(nn.Linear(6, 10), nn.Tanh()),
                head=nn.Linear(10, 2),
            )
        )

    strategy, grid, _ = set_up(PARTS)
    expected = r"initial_arrays.*'head\.weight' came with shape \(2, 10\), expected \(3, 10\)"
    with pytest.raises(SegmentMismatchError, match=expected):
        train((strategy, grid, ArrayRecord(narrow().state_dict())))


def test_a_state_dict_does_for_initial_arrays_and_a_model_does_not():
    strategy, grid, arrays = set_up(PARTS)
    expected = train((strategy, grid, arrays))
    strategy, grid, _ = set_up(PARTS)
    found = train((strategy, grid, arrays.to_torch_state_dict()))
    assert_bit_equal(weights_of(found.arrays), weights_of(expected.arrays))
    with pytest.raises(ConfigError, match=r"initial_arrays is of type Sequential, .*ArrayRecord"):
        train((strategy, grid, plain_net()))


def test_a_model_instead_of_a_function_that_makes_one():
    with pytest.raises(ConfigError, match="model is a Sequential itself, expected a function"):
        split_app(plain_net(), PARTS)


def test_a_model_function_that_returns_none():
    with pytest.raises(NotEnoughClientsError, match="model returned a NoneType"):
        train(set_up(PARTS, client={"model": lambda: None}))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"data": PARTS[0]}, "data is .* expected a function"),
        ({"optimizer": "SGD"}, "optimizer is 'SGD', expected a function"),
        ({"data": lambda: PARTS[0]}, r"data can't be called as data\(context\): too many"),
        ({"data": lambda node, of: PARTS[0]}, r"as data\(context\): missing .* 'of'"),
        ({"optimizer": lambda weights: None}, r"optimizer\(parameters, lr=…\): .*'lr'"),
        ({"model": nn.Linear}, r"model can't be called as model\(\): missing .* 'in_features'"),
        ({"cut": 1}, "cut is 1, expected the name of a submodule"),
        ({"autocast": "bfloat16"}, "autocast is 'bfloat16', expected a dtype"),
        ({"max_grad_norm": -1.0}, r"max_grad_norm is -1\.0, expected more than 0"),
        ({"max_grad_norm": "1"}, "max_grad_norm is '1', expected more than 0"),
        ({"unpack": "img"}, "unpack is 'img', expected a function"),
    ],
)
def test_client_app_refuses_arguments_of_the_wrong_kind(wrong, said):
    arguments = {"model": plain_net, "cut": CUT, "data": lambda _: PARTS[0]}
    with pytest.raises(ConfigError, match=said):
        client_app(**(arguments | wrong))


def test_a_server_segment_with_all_parameters_frozen():
    model = plain_net()
    for part in (model.middle, model.head):
        part.requires_grad_(False)
    strategy = PSL(model=model, cut=CUT, server_lr=LR)
    grid = LocalGrid(split_app(plain_net, PARTS), 2, progress=False)
    with pytest.raises(ConfigError, match="all parameters of the server segment are frozen"):
        train((strategy, grid, ArrayRecord(model.state_dict())))
