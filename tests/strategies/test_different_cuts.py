"""Clients that are cut at different places train what the whole model would."""

import pytest
import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAvg
from reference import (
    LR,
    SEED,
    assert_bit_equal,
    assert_close,
    fresh,
    make_parts,
    normed_net,
    numbered_batches,
    plain_net,
    weights_of,
)
from torch.nn import functional

from flsplit import LocalGrid, client_app
from flsplit.cut.client_cuts import cut_of, default_cut
from flsplit.errors import ConfigError, NotEnoughClientsError
from flsplit.strategies import EPSL, GAPSL, PSL, SGLR, SplitFedV1, SplitFedV2

CUTS = {"0": "front.0", "2": "middle", "default": "front"}


def train(
    cuts, sizes, *, build=plain_net, rounds=2, cache=True, app_cuts=None, grid=None, **options
):
    parts = make_parts(sizes, build)
    model = fresh(build)
    app = client_app(
        model=lambda: fresh(build), cut=app_cuts or cuts, device="cpu",
        data=lambda c: (parts[c.node_config["partition-id"]],) * 2,
    )  # fmt: skip
    strategy = SplitFedV1(
        model=model, cut=cuts, server_lr=LR, batch_size=4, device="cpu", seed=SEED, **options
    )
    grid = grid or LocalGrid(app, len(sizes), cache=cache, progress=False)
    return grid, strategy.start(grid, ArrayRecord(model.state_dict()), rounds)


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("sizes", [(12, 12, 12), (4, 8, 12)], ids=["equal", "unequal"])
def test_three_cuts_averaged_every_step_are_training_on_the_concatenated_batch(sizes, cache):
    """FedAvg weighs by examples, as the mean loss of all clients does here."""
    rounds = 5
    _, result = train(CUTS, sizes, rounds=rounds, local_steps=1, cache=cache)
    model = fresh(plain_net)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    parts = make_parts(sizes)
    streams = [numbered_batches(part, str(i), 4) for i, part in enumerate(parts)]
    for _ in range(rounds):
        loss = 0.0
        for part, stream, size in zip(parts, streams, sizes, strict=True):
            rows = next(stream)
            outputs = model(part.tensors[0][rows])
            loss += size / sum(sizes) * functional.cross_entropy(outputs, part.tensors[1][rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_close(weights_of(result.arrays), model.state_dict(), 1e-5)


@pytest.mark.parametrize("build", [plain_net, normed_net])
def test_where_a_client_is_cut_makes_no_difference_to_what_is_trained(build):
    """Sums of another order differ in their last bits at most; BatchNorm sees the same rows."""
    for cuts in ({"1": "front", "default": "front"}, {"1": "middle", "default": "front"}):
        _, result = train(cuts, (8, 10), build=build, rounds=3)
        _, expected = train("front", (8, 10), build=build, rounds=3)
        assert_close(weights_of(result.arrays), weights_of(expected.arrays), 1e-5)
        evaluations = [run.history[-1].evaluation for run in (result, expected)]
        assert evaluations[0] == pytest.approx(evaluations[1], rel=1e-5)


def test_one_client_at_its_own_cut_is_bit_equal_to_a_run_with_that_cut():
    _, own = train({"0": "middle", "default": "front"}, (10,), rounds=3)
    _, expected = train("middle", (10,), rounds=3)
    assert_bit_equal(weights_of(own.arrays), weights_of(expected.arrays))


def test_the_ledger_counts_what_each_cut_sends():
    """Smashed data of 6, 6 and 10 floats a row; segments of 54, 54 and 124 parameters."""
    _, result = train(CUTS, (4, 4, 4), rounds=2, fraction_evaluate=0.0)
    logical = result.history[1].traffic.logical
    assert logical["activations-up"] == 4 * 4 * (6 + 6 + 10)
    assert logical["client-segments-up"] == 4 * (54 + 54 + 124)


def test_a_run_is_resumed_with_its_cuts(tmp_path):
    options = {"checkpoint_dir": str(tmp_path), "fraction_evaluate": 0.0}
    _, whole = train(CUTS, (8, 8, 8), rounds=3)
    grid, _ = train(CUTS, (8, 8, 8), rounds=2, **options)
    _, resumed = train(CUTS, (8, 8, 8), rounds=3, resume=True, grid=grid, **options)
    assert_bit_equal(weights_of(resumed.arrays), weights_of(whole.arrays))
    with pytest.raises(ConfigError, match="cut"):
        train(CUTS | {"2": "front"}, (8, 8, 8), rounds=3, resume=True, **options)


@pytest.mark.parametrize("method", [PSL, SGLR, GAPSL, EPSL, SplitFedV2])
def test_other_methods_say_that_they_need_one_cut(method):
    with pytest.raises(ConfigError, match="needs one cut for all clients"):
        method(model=plain_net(), cut=CUTS)


def test_copies_with_different_layers_cannot_be_aggregated_apart():
    with pytest.raises(ConfigError, match="server_strategy is FedAvg, but clients are cut at"):
        SplitFedV1(model=plain_net(), cut=CUTS, server_strategy=FedAvg())


def test_a_bad_client_is_found_where_it_is_cut():
    parts = make_parts((8, 8, 8))
    parts[2].tensors[1][:] = 99
    model = fresh(plain_net)
    app = client_app(
        model=lambda: fresh(plain_net), cut=CUTS, device="cpu",
        data=lambda c: parts[c.node_config["partition-id"]],
    )  # fmt: skip
    strategy = SplitFedV1(model=model, cut=CUTS, device="cpu", fraction_evaluate=0.0)
    grid = LocalGrid(app, 3, progress=False)
    entry = strategy.start(grid, ArrayRecord(model.state_dict()), 1).history[0]
    assert [left.client for left in entry.left_out] == ["2"]
    assert entry.rows == 16


def test_a_client_that_is_cut_elsewhere_is_left_out():
    with pytest.raises(NotEnoughClientsError, match="the server cuts the model at 'middle'"):
        train({"0": "middle", "default": "front"}, (8,), app_cuts="front")


def test_who_is_cut_where():
    cuts = {"weak-*": "a", "strong": "b", "default": "c"}
    assert [cut_of(cuts, name) for name in ("weak-1", "strong", "other")] == ["a", "b", "c"]
    assert cut_of(lambda name: f"layer{len(name)}", "four") == "layer4"
    assert default_cut({"x": "a"}) == "a"
    with pytest.raises(ConfigError, match="there is None for client 'y'"):
        cut_of({"x": "a"}, "y")


@pytest.mark.parametrize("cut", [None, 3, {}, {"a": 1}, ["front"]])
def test_what_is_no_cut_is_refused(cut):
    with pytest.raises(ConfigError, match=r"cut is .*, expected the name of a submodule"):
        PSL(model=plain_net(), cut=cut)
