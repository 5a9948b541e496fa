"""Clients that are cut at different places train what the whole model would."""

import pytest
import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAvg
from reference import (
    LR,
    MOMENTUM,
    OPTIMIZERS,
    SEED,
    assert_bit_equal,
    assert_close,
    fresh,
    make_parts,
    normed_net,
    numbered_batches,
    plain_net,
    train_in_turn,
    train_together,
    weights_of,
)
from torch.nn import functional

from flsplit import LocalGrid, client_app
from flsplit.cut.client_cuts import cut_of, default_cut
from flsplit.errors import ConfigError, MethodError, NotEnoughClientsError
from flsplit.seeds import generator
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
)

CUTS = {"0": "front.0", "2": "middle", "default": "front"}

AVERAGED = {"client_strategy": FedAvg(min_available_nodes=1, min_train_nodes=1)}
KEEPS_ALL = {"lgi": "off", "gda": "off", "loss_reduction": "mean", "shares": "examples"}
EXACT = [
    (SplitFedV1, {}),
    (PSL, AVERAGED),
    (SGLR, AVERAGED | {"phi": 0.0, "alpha": 0.0, "shares": "examples"}),
    (GAPSL, AVERAGED | KEEPS_ALL),
]


def train(
    cuts,
    sizes,
    *,
    method=SplitFedV1,
    build=plain_net,
    rounds=2,
    cache=True,
    app_cuts=None,
    grid=None,
    app_options=None,
    **options,
):
    parts = make_parts(sizes, build)
    model = fresh(build)
    app = client_app(
        model=lambda: fresh(build), cut=app_cuts or cuts, device="cpu",
        data=lambda c: (parts[c.node_config["partition-id"]],) * 2, **(app_options or {}),
    )  # fmt: skip
    strategy = method(
        model=model, cut=cuts, batch_size=4, device="cpu", seed=SEED, **{"server_lr": LR} | options
    )
    grid = grid or LocalGrid(app, len(sizes), cache=cache, progress=False)
    return grid, strategy.start(grid, ArrayRecord(model.state_dict()), rounds)


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("sizes", [(12, 12, 12), (4, 8, 12)], ids=["equal", "unequal"])
@pytest.mark.parametrize("method", EXACT, ids=lambda one: one[0].__name__)
def test_three_cuts_averaged_every_step_are_training_on_the_concatenated_batch(
    method, sizes, cache
):
    """FedAvg weighs by examples, as the mean loss of all clients does here."""
    rounds, (kind, options) = 5, method
    _, result = train(
        CUTS, sizes, method=kind, rounds=rounds, local_steps=1, cache=cache, **options
    )
    expected = train_together(sizes, rounds)
    assert_close(weights_of(result.arrays), expected, 1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("cut", ["front.0", "front", "middle"])
def test_one_client_of_psl_is_bit_equal_to_training_the_whole_model(cut, optimizer):
    _, result = train(
        {"0": cut, "*-x": "front.0", "*-y": "middle", "default": "front"}, (14,), method=PSL,
        build=normed_net, rounds=3, server_optimizer=optimizer, share_client_segments=True,
        app_options={"optimizer": optimizer},
    )  # fmt: skip
    expected, _ = train_in_turn(
        normed_net, make_parts([14], normed_net), optimizer=optimizer, rounds=3
    )
    own = weights_of(result.client_segments["0"])
    assert_bit_equal(weights_of(result.arrays) | own, expected)


def grads(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


LEFT = {"0": ("front.1", "middle", "head"), "1": ("middle", "head"), "2": ("head",)}
"""What the clients of CUTS leave to the server."""


@pytest.mark.parametrize("method", [PSL, SplitFedV2], ids=lambda one: one.__name__)
def test_a_layer_has_a_version_of_the_server_and_one_of_each_client_that_keeps_it(method):
    """PSL: the server steps with the mean over clients that leave a layer to it; V2 in turn."""
    sizes, rounds = (4, 8, 12), 3
    _, result = train(
        CUTS, sizes, method=method, rounds=rounds, local_steps=1, share_client_segments=True
    )
    parts = make_parts(sizes)
    streams = [numbered_batches(part, str(i), 4) for i, part in enumerate(parts)]
    server = fresh(plain_net)
    clients = [fresh(plain_net) for _ in sizes]
    for round_ in range(1, rounds + 1):
        rows = [next(stream) for stream in streams]
        if method is PSL:
            turns = [[0, 1, 2]]
        else:
            draw = generator(SEED, "interleave", round_, 0)
            turns = [[i] for i in torch.randperm(3, generator=draw).tolist()]
        for turn in turns:
            found = {}
            for i in turn:
                own = clients[i]
                with torch.no_grad():  # each runs its own first layers, then the server's
                    for name, p in own.named_parameters():
                        if name.startswith(LEFT[str(i)]):
                            p.copy_(server.get_parameter(name))
                loss = functional.cross_entropy(
                    own(parts[i].tensors[0][rows[i]]), parts[i].tensors[1][rows[i]]
                )
                found[i] = grads(loss, own)
            with torch.no_grad():
                for name, p in server.named_parameters():
                    left = [i for i in turn if name.startswith(LEFT[str(i)])]
                    for i in left:
                        share = sizes[i] / sum(sizes[j] for j in left)
                        p -= LR * share * found[i][name]
                for i in turn:
                    for name, p in clients[i].named_parameters():
                        if not name.startswith(LEFT[str(i)]):
                            p -= LR * found[i][name]
        if method is SplitFedV2:
            with torch.no_grad():
                for name in dict(server.named_parameters()):
                    versions = [
                        (server if name.startswith(LEFT[str(i)]) else one).get_parameter(name)
                        for i, one in enumerate(clients)
                    ]
                    mean = sum(n / sum(sizes) * v for n, v in zip(sizes, versions, strict=True))
                    for one in (server, *clients):
                        one.get_parameter(name).copy_(mean)
    expected = server.state_dict()
    if method is PSL:
        expected = {n: p for n, p in expected.items() if n.startswith(LEFT["0"])}
        for i, one in enumerate(clients):
            own = {n: p for n, p in one.state_dict().items() if not n.startswith(LEFT[str(i)])}
            assert_close(weights_of(result.client_segments[str(i)]), own, 1e-6)
    assert_close(weights_of(result.arrays), expected, 1e-6)


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


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (EPSL, "all clients together"), (CycleSL, "all clients together"),
        (SFLGA, "all clients together"), (SequentialSL, "hands one client segment on"),
        (CSEFSL, "auxiliary model"), (FSLSAGE, "auxiliary model"),
    ],
)  # fmt: skip
def test_other_methods_say_that_they_need_one_cut(method, why):
    with pytest.raises(
        ConfigError, match=f"{method.__name__} needs one cut for all clients: .*{why}"
    ):
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


def test_sglr_averages_the_gradients_of_clients_that_are_cut_at_one_place():
    """Two clients at the first cut share a gradient, the third keeps its own."""
    told = {}

    class Watched(SGLR):
        def step(self, step):
            super().step(step)
            told.update(step._told)

    for phi in (0.0, 1.0):
        train(
            {"2": "middle", "default": "front"}, (4, 4, 4), method=Watched, phi=phi, alpha=0.0,
            rounds=1, fraction_evaluate=0.0,
        )  # fmt: skip
        if phi == 0.0:
            alone = {name: one.gradient for name, one in told.items()}
    mean = (alone["0"] + alone["1"]) / 2
    torch.testing.assert_close(told["0"].gradient, mean)
    torch.testing.assert_close(told["1"].gradient, mean)
    torch.testing.assert_close(told["2"].gradient, alone["2"])
    assert told["2"].gradient.shape == (4, 10)


@pytest.mark.parametrize("method", [PSL, SGLR, GAPSL, SplitFedV2])
def test_a_run_of_one_server_segment_is_resumed_with_its_cuts(method, tmp_path):
    options = {"checkpoint_dir": str(tmp_path), "share_client_segments": True}
    options |= {"method": method, "build": normed_net, "server_optimizer": MOMENTUM}
    cuts = {"1": "middle.3", "default": "front"}
    _, whole = train(cuts, (8, 8, 8), rounds=3, **(options | {"checkpoint_dir": ""}))
    grid, _ = train(cuts, (8, 8, 8), rounds=2, **options)
    _, resumed = train(cuts, (8, 8, 8), rounds=3, resume=True, grid=grid, **options)
    assert_bit_equal(weights_of(resumed.arrays), weights_of(whole.arrays))
    assert resumed.history[-1].evaluation == whole.history[-1].evaluation


@pytest.mark.parametrize("method", [PSL, SGLR, GAPSL, SplitFedV2])
def test_cuts_that_are_all_the_same_are_one_cut(method):
    both = []
    for cuts in ("front", {"0": "front", "default": "front"}):
        options = {"method": method, "build": normed_net, "share_client_segments": True}
        _, result = train(cuts, (8, 12), server_optimizer=MOMENTUM, local_steps=2, **options)
        both.append(weights_of(result.arrays))
    assert_bit_equal(*both)


class Bad(torch.nn.Module):
    """A layer of the server that can't take what one client sends."""

    def forward(self, smashed):
        return smashed / (smashed.detach().abs().max() < 50)


@pytest.mark.parametrize("method", [PSL, GAPSL, SplitFedV1, SplitFedV2])
def test_a_bad_client_at_another_cut_is_left_out_alone(method):
    """Its inputs are large, so that its loss is infinite."""

    def build():
        net = plain_net()
        net.front = torch.nn.Sequential(torch.nn.Linear(8, 6))
        net.middle = torch.nn.Sequential(torch.nn.Linear(6, 10), Bad())
        return net

    parts = make_parts((4, 4, 4))
    parts[1].tensors[0].mul_(1e4)
    app = client_app(
        model=lambda: fresh(build), cut=CUTS | {"0": "front.0", "2": "middle.0"}, device="cpu",
        data=lambda c: parts[c.node_config["partition-id"]],
    )  # fmt: skip
    model = fresh(build)
    cut = CUTS | {"0": "front.0", "2": "middle.0"}
    strategy = method(model=model, cut=cut, server_lr=LR, batch_size=4, device="cpu", seed=SEED)
    result = strategy.start(
        LocalGrid(app, 3, progress=False), ArrayRecord(model.state_dict()), num_rounds=1
    )
    assert {one.client for one in result.history[0].left_out} == {"1"}
    assert result.history[0].rows >= 8


class Moving(torch.nn.Module):
    """Puts a new tensor in place of its buffer, and adds it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, inputs):
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * inputs.detach().mean()
        return inputs + self.mean


def test_a_buffer_that_a_layer_replaces_is_one_for_all_cuts():
    def build():
        net = plain_net()
        net.head = torch.nn.Sequential(Moving(), torch.nn.Linear(10, 3))
        return net

    _, result = train(CUTS, (4, 4, 4), method=SplitFedV2, build=build, rounds=1, server_lr=1e-9)
    parts, model = make_parts((4, 4, 4)), fresh(build)
    order = torch.randperm(3, generator=generator(SEED, "interleave", 1, 0)).tolist()
    hidden = {i: model.middle(model.front(parts[i].tensors[0])) for i in order}
    found = weights_of(result.arrays)["head.0.mean"]
    expected = 0.0
    for i in order:
        expected = 0.5 * expected + 0.5 * hidden[i].mean().item()
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_what_several_cuts_cannot_do_is_refused():
    with pytest.raises(ConfigError, match="cut is a function, but one server segment"):
        PSL(model=plain_net(), cut=lambda name: "front")
    with pytest.raises(ConfigError, match="low_memory is True, but cut differs"):
        GAPSL(model=plain_net(), cut=CUTS, low_memory=True)


def test_a_step_that_pools_rows_says_that_cuts_differ():
    class Pooling(PSL):
        def step(self, step):
            step.pooled()

    with pytest.raises(MethodError, match="clients may be cut at different places"):
        train(CUTS, (4, 4, 4), method=Pooling)
