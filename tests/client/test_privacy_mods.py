"""Flower's privacy mods and wrappers on the segments that clients hand over."""

import logging

import numpy as np
import pytest
import torch
from carry.threaded import ThreadedGrid
from client.test_mods import Travelling
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.client import mod as legacy
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
)
from flwr.supercore import differential_privacy
from reference import (
    CUT,
    LR,
    SEED,
    assert_bit_equal,
    fresh,
    make_parts,
    normed_net,
    plain_net,
    split_app,
    weights_of,
)
from tampering import of_client, set_up, train

from flsplit import LocalGrid, SessionSettings
from flsplit.client.live_client import Client
from flsplit.errors import ConfigError, NotEnoughClientsError
from flsplit.flower_internals import CLIPPING_NORM, NORM_BIT
from flsplit.message.types import FINISH
from flsplit.server.aggregate import SegmentAggregator
from flsplit.strategies import CSEFSL, PSL, SequentialSL, SplitFedV1, SplitFedV2

SIZES = [8, 4, 12]
CLIP = 0.038  # of the updates, some are longer and some are not
CARRIERS = {
    "cache": lambda app: LocalGrid(app, 3, progress=False),
    "no cache": lambda app: LocalGrid(app, 3, cache=False, progress=False),
    "Flower": lambda app: Travelling(LocalGrid(app, 3, cache=False, progress=False)),
    "session": lambda app: ThreadedGrid(app, 3),
}


class FedAvgInOrder(FedAvg):
    """Adds up in the order of the clients: Flower asks them in a random one."""

    def aggregate_train(self, server_round, replies):
        in_order = sorted(replies, key=lambda one: one.metadata.src_node_id)
        return super().aggregate_train(server_round, in_order)


def fixed(noise=0.0, **more):
    return DifferentialPrivacyClientSideFixedClipping(FedAvgInOrder(**more), noise, CLIP, 3)


def adaptive(**more):
    wrapped = FedAvgInOrder(**more)
    return DifferentialPrivacyClientSideAdaptiveClipping(
        wrapped, 0.0, 3, initial_clipping_norm=CLIP
    )


def local_dp():
    return LocalDpMod(clipping_norm=CLIP, sensitivity=0.1, epsilon=1.0, delta=1e-5)


@pytest.fixture(autouse=True)
def noise(monkeypatch):
    """Let noise be the same wherever and in whatever order it is drawn."""

    def draw(mean, deviation, shape=()):
        return np.asarray(mean + deviation * np.cos(np.arange(np.prod(shape))).reshape(shape))

    monkeypatch.setattr(np.random, "normal", draw)


@pytest.fixture
def trained(monkeypatch):
    """What clients would have handed over without mods, by round and client."""
    kept, plain = {}, Client.handed_over

    def handed_over(client):
        found = plain(client)
        kept[client.plan.server_round, client.name] = {k: t.clone() for k, t in found.items()}
        return found

    monkeypatch.setattr(Client, "handed_over", handed_over)
    return kept


def split(mods, client_strategy, *, build=plain_net, carrier="cache", method=SplitFedV2, **options):
    model = fresh(build)
    strategy = method(
        model=model, cut=CUT, server_lr=LR, seed=SEED, batch_size=4, device="cpu",
        client_strategy=client_strategy, fraction_evaluate=0.0,
        session=SessionSettings(join_timeout=20.0, grace=2.0), **options,
    )  # fmt: skip
    grid = CARRIERS[carrier](split_app(build, make_parts(SIZES, build), mods=mods))
    result = strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=2, timeout=30.0)
    assert [entry.left_out for entry in result.history] == [[], []]
    return result


def by_flower(mods, strategy, trained, build=plain_net):
    """Let Flower itself clip and average models that consist of the client segments alone."""
    app, names = ClientApp(mods=mods), [name for name, _ in fresh(build).front.named_parameters()]

    @app.train()
    def replay(message, context):
        server_round = message.content["config"]["server-round"]
        client = str(context.node_config["partition-id"])
        own = trained[server_round, client]
        arrays = ArrayRecord({name: own[f"{CUT}.{name}"] for name in names})
        metrics = MetricRecord({"num-examples": SIZES[int(client)]})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    first = fresh(build).front.state_dict()
    arrays = ArrayRecord({name: first[name] for name in names})
    result = strategy.start(LocalGrid(app, 3, progress=False), arrays, num_rounds=2)
    weights = {f"{CUT}.{name}": one for name, one in weights_of(result.arrays).items()}
    return weights, result


CASES = {
    "fixed": (lambda: [fixedclipping_mod], fixed),
    "fixed, with noise": (lambda: [fixedclipping_mod], lambda **more: fixed(1.0, **more)),
    "adaptive": (lambda: [adaptiveclipping_mod], adaptive),
    "local": (lambda: [local_dp()], FedAvgInOrder),
    "both": (lambda: [local_dp(), fixedclipping_mod], fixed),
}


@pytest.mark.parametrize("build", [plain_net, normed_net])
@pytest.mark.parametrize("case", CASES)
def test_segments_are_clipped_as_flower_clips_whole_models(case, build, trained):
    mods, wrap = CASES[case]
    ours, flowers = wrap(), wrap(fraction_evaluate=0.0)
    found = split(mods(), ours, build=build)
    expected, result = by_flower(mods(), flowers, trained, build)
    weights = weights_of(found.arrays)
    assert_bit_equal({name: weights[name] for name in expected}, expected)
    assert getattr(ours, "clipping_norm", 0) == getattr(flowers, "clipping_norm", 0)
    bits = [one.get(NORM_BIT) for one in result.train_metrics_clientapp.values()]
    assert [one.get(NORM_BIT) for one in found.train_metrics_clientapp.values()] == bits
    assert (bits == [None, None]) == (case != "adaptive")
    if case == "adaptive" and build is plain_net:
        assert all(0.0 < bit < 1.0 for bit in bits)


def test_numbers_by_hand(trained):
    """The mean of three updates, of which those that are longer are scaled to ``CLIP``."""
    strategy = fixed()
    found = weights_of(split([fixedclipping_mod], strategy).arrays)
    at = fresh(plain_net).state_dict()
    at = {name: at[name].double() for name in trained[1, "0"]}
    lengths = []
    for server_round in (1, 2):
        updates = []
        for client in "012":
            own = {k: t.double() - at[k] for k, t in trained[server_round, client].items()}
            length = sum(one.square().sum() for one in own.values()).sqrt()
            lengths.append(length.item())
            updates.append({k: one * min(1, CLIP / lengths[-1]) for k, one in own.items()})
        at = {
            name: one + sum(n * u[name] for n, u in zip(SIZES, updates, strict=True)) / sum(SIZES)
            for name, one in at.items()
        }
    assert min(lengths) < CLIP < max(lengths)
    for name, one in at.items():
        torch.testing.assert_close(found[name].double(), one, rtol=1e-6, atol=1e-7)  # of float32


@pytest.mark.parametrize("carrier", list(CARRIERS)[1:])
def test_every_carrier_gives_the_same_numbers(carrier):
    mods, wrap = CASES["adaptive"]
    there = split(mods(), wrap(), build=normed_net, carrier=carrier)
    here = split(mods(), wrap(), build=normed_net)
    assert_bit_equal(weights_of(there.arrays), weights_of(here.arrays))


def run(
    method=SplitFedV2, mods=None, *, build=plain_net, rounds=1, edit=None, timeout=60.0, **options
):
    client = {"mods": mods}
    parts = make_parts(SIZES, build)
    return train(
        set_up(parts, method, build=build, client=client, edit=edit, **options),
        rounds,
        timeout=timeout,
    )


def changed(one, other):
    """The names of the weights that differ between two results."""
    one, other = weights_of(one.arrays), weights_of(other.arrays)
    return {name for name in one if not torch.equal(one[name], other[name])}


def test_buffers_and_the_server_segment_stay_as_they_are():
    plain = run(build=normed_net, client_strategy=FedAvg())
    clipped = run(mods=[fixedclipping_mod], build=normed_net, client_strategy=fixed())
    parameters = {f"{CUT}.{name}" for name, _ in fresh(normed_net).front.named_parameters()}
    assert changed(plain, clipped) == parameters


class Scaled(torch.nn.Linear):
    """In bfloat16, with a scale of no dimension and a frozen bias."""

    def __init__(self):
        super().__init__(8, 6)
        self.scale = torch.nn.Parameter(torch.tensor(1.0))
        self.bias.requires_grad_(False)
        self.weight.data = self.weight.data.bfloat16()

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.float(), self.bias) * self.scale


def scaled_net():
    net = plain_net()
    net.front[0] = Scaled()
    return net


@pytest.mark.parametrize("mods", [[fixedclipping_mod], [local_dp()]])
def test_every_dtype_and_a_scalar_are_edited_and_what_is_frozen_is_not(mods, trained):
    strategy = fixed() if mods == [fixedclipping_mod] else FedAvg()
    seen = {}

    def look(request, reply):
        seen.update(reply.content["arrays"].to_torch_state_dict())
        return reply

    edit = of_client("0", FINISH, look)
    run(mods=mods, build=scaled_net, client_strategy=strategy, edit=edit, server_lr=0.5)
    start = fresh(scaled_net).state_dict()
    own = {name: one.double() - start[name].double() for name, one in trained[1, "0"].items()}
    assert seen.keys() == own.keys() == {"front.0.weight", "front.0.scale"}
    length = sum(one.square().sum() for one in own.values()).sqrt()
    factor = CLIP / length
    assert factor < 0.5
    sigma = 0.0 if mods == [fixedclipping_mod] else 0.1 * np.sqrt(2 * np.log(1.25 / 1e-5))
    expected = start["front.0.scale"].double() + own["front.0.scale"] * factor + sigma
    assert seen["front.0.scale"].shape == ()
    torch.testing.assert_close(seen["front.0.scale"].double(), expected, rtol=1e-6, atol=1e-7)
    found = seen["front.0.weight"]
    noise = sigma * torch.cos(torch.arange(48.0)).double().reshape(6, 8)
    expected = start["front.0.weight"].double() + own["front.0.weight"] * factor + noise
    assert torch.equal(found.bfloat16().to(found), found)
    # bfloat16 has eight bits
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-6)


def test_local_steps_and_turns_hand_over_edited_segments(trained):
    """The auxiliary model of the one, and the order of the other, are as they were."""
    for method in (CSEFSL, SequentialSL):
        trained.clear()
        seen = {}

        def look(request, reply, seen=seen):
            if reply.has_content() and "arrays" in reply.content:
                seen[str(reply.content["reply"]["client"])] = weights_of(reply.content["arrays"])
            return reply

        run(method, [local_dp()], edit=look)
        name = f"{CUT}.0.weight"
        assert seen.keys() == set("012")
        for client, arrays in seen.items():
            assert (arrays[name] - trained[1, client][name]).abs().max() > 0.1


def test_a_client_that_keeps_its_segment_is_clipped_from_what_the_server_knows(trained):
    """Not from what it had at the round's beginning, which nobody else has seen."""
    mod = LocalDpMod(clipping_norm=CLIP, sensitivity=0.0, epsilon=1.0, delta=1e-5)
    result = run(PSL, [mod], rounds=3, share_client_segments=True)
    start = fresh(plain_net).state_dict()
    for client, record in result.client_segments.items():
        update = {name: one - start[name] for name, one in weights_of(record).items()}
        length = sum(one.double().square().sum() for one in update.values()).sqrt()
        assert length.item() == pytest.approx(CLIP, rel=1e-5)
        assert trained[3, client]


@pytest.fixture
def said():
    texts: list[str] = []
    handler, logger = logging.Handler(logging.WARNING), logging.getLogger("flwr")
    handler.emit = lambda record: texts.append(record.getMessage())
    logger.addHandler(handler)
    yield lambda word: [text for text in texts if word in text]
    logger.removeHandler(handler)


@pytest.mark.chaos(
    "a privacy mod that covers the hand-over only",
    "what it doesn't cover is said once",
)
def test_what_a_mod_does_not_cover_is_said_once(said):
    run(mods=[local_dp()], rounds=2)
    (text,) = said("LocalDpMod: only")
    for word in ("smashed data", "labels", "buffers", "optimizer states", "auxiliary models"):
        assert word in text


def test_where_nothing_is_handed_over_the_mod_is_named(said):
    with_mod = run(PSL, [local_dp()], rounds=2)
    (text,) = said("LocalDpMod")
    assert "no client segment is handed over" in text
    assert "smashed data" in text
    assert changed(with_mod, run(PSL, rounds=2)) == set()


WRAPPERS = [
    lambda: DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.0, CLIP, 3),
    lambda: DifferentialPrivacyServerSideAdaptiveClipping(FedAvg(), 0.0, 3),
    fixed,
    adaptive,
]


@pytest.mark.chaos(
    "a differential-privacy wrapper that covers the client segment only",
    "what it doesn't cover is said once",
)
@pytest.mark.parametrize("make", WRAPPERS)
def test_what_a_wrapper_does_not_cover_is_said_once(make, said):
    mods = {fixed: [fixedclipping_mod], adaptive: [adaptiveclipping_mod]}.get(make)
    run(mods=mods, client_strategy=make(), rounds=2)
    (text,) = said("sees the client segments only")
    for word in ("server segment", "smashed data", "labels", "cut-layer gradients", "buffers"):
        assert word in text


def test_wrappers_of_splitfed_v1_say_what_they_see(said):
    run(SplitFedV1, client_strategy=WRAPPERS[0]())
    (text,) = said("joined models only")
    assert "server segment" not in text
    run(SplitFedV1, client_strategy=FedAvg(), server_strategy=WRAPPERS[0]())
    (text,) = said("sees the server segment's copies only")
    assert "the client segments" in text


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.chaos(
    "a secure-aggregation mod",
    "it is refused by name",
)
@pytest.mark.parametrize("name", ["secagg_mod", "secaggplus_mod"])
def test_secure_aggregation_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name} needs a server that exchanges keys"):
        split_app(plain_net, [], mods=[getattr(legacy, name)])


def test_legacy_mods_that_would_change_nothing_are_refused():
    mods = [legacy.fixedclipping_mod, legacy.adaptiveclipping_mod, legacy.LocalDpMod(1, 1, 1, 1)]
    for mod in mods:
        with pytest.raises(ConfigError, match=r"take \w+ of flwr\.clientapp\.mod"):
            split_app(plain_net, [], mods=[mod])


@pytest.mark.parametrize(
    ("mods", "make", "match"),
    [
        (None, fixed, r"mods=\[fixedclipping_mod\]"),
        ([local_dp()], fixed, r"mods=\[fixedclipping_mod\]"),
        ([fixedclipping_mod], adaptive, r"mods=\[adaptiveclipping_mod\]"),
        ([fixedclipping_mod], FedAvg, "fixedclipping_mod needs a clipping_norm"),
        ([adaptiveclipping_mod], WRAPPERS[0], "adaptiveclipping_mod needs a clipping_norm"),
    ],
)
def test_wrapper_and_mod_must_fit(mods, make, match):
    with pytest.raises(NotEnoughClientsError, match=match):
        run(mods=mods, client_strategy=make())


CUTS = {"0": "front", "*": "middle"}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (SplitFedV1, {"client_strategy": fixed()}),
        (SplitFedV1, {"server_strategy": fixed()}),
        (SplitFedV2, {"client_strategy": fixed(), "cut": CUTS}),
    ],
)
def test_layers_that_no_client_would_clip_are_refused(method, options):
    with pytest.raises(ConfigError, match="whose name has ServerSide"):
        run(method, [fixedclipping_mod], **options)


def test_a_norm_that_is_no_number_is_refused():
    strategy = fixed()
    strategy.clipping_norm = float("inf")
    with pytest.raises(ConfigError, match="clipping_norm is inf, expected a finite number"):
        run(mods=[fixedclipping_mod], client_strategy=strategy)


# --- one client ------------------------------------------------------------------------------


def test_a_norm_bit_that_is_missing_leaves_one_client_out():
    def forget(request, reply):
        del reply.content["clipping"]
        return reply

    edit = of_client("1", FINISH, forget)
    result = run(mods=[adaptiveclipping_mod], client_strategy=adaptive(), edit=edit)
    (left,) = result.history[0].left_out
    assert left.client == "1"
    assert "record 'clipping' is missing" in left.reason


def test_a_norm_bit_that_nobody_asked_for_changes_nothing():
    def add(request, reply):
        reply.content["clipping"] = ConfigRecord({"clipped": True})
        return reply

    result = run(client_strategy=FedAvg(), edit=of_client("1", FINISH, add))
    assert result.history[0].left_out == []
    assert NORM_BIT not in result.train_metrics_clientapp[1]


def test_the_error_of_a_mod_is_that_client_s_reason():
    class Refusing(LocalDpMod):
        def __call__(self, message, context, call_next):
            if context.node_config["partition-id"] == 1:
                message.content["more"] = ArrayRecord()
            return super().__call__(message, context, call_next)

    result = run(mods=[Refusing(1.0, 0.0, 1.0, 1e-5)])
    (left,) = result.history[0].left_out
    assert left.client == "1"
    assert "LocalDpMod expects exactly one ArrayRecord, but found 2" in left.reason


def test_a_client_whose_segment_did_not_change_is_left_out():
    class Still(SplitFedV2):
        def begin_round(self, round_):
            round_.overrides["1"] = {"lr": 0.0}

    result = run(Still, [fixedclipping_mod], client_strategy=fixed())
    (left,) = result.history[0].left_out
    assert left.client == "1"
    assert "fixedclipping_mod can't clip what has not changed" in left.reason


@pytest.mark.parametrize("make", WRAPPERS[:2])
def test_a_segment_that_did_not_change_does_not_end_the_others_run(make, said):
    """Flower's wrappers divide by the length of an update."""

    def give_back(request, reply):
        arrays = fresh(plain_net).front.state_dict()
        reply.content["arrays"] = ArrayRecord({f"{CUT}.{k}": Array(t) for k, t in arrays.items()})
        return reply

    result = run(client_strategy=make(), edit=of_client("1", FINISH, give_back))
    assert said("client '1' isn't aggregated")
    assert changed(result, run(client_strategy=make())) == {"front.0.weight", "front.0.bias"}


def test_a_client_that_holds_no_start_is_given_the_segment_again(tmp_path):
    """Its state was kept without mods."""
    parts, results = make_parts(SIZES), []
    for rounds, mods, options in ((1, None, {}), (2, [local_dp()], {"resume": True})):
        strategy, _, arrays = set_up(
            parts, PSL, share_client_segments=True, checkpoint_dir=str(tmp_path), **options
        )
        app = split_app(plain_net, parts, mods=mods)
        grid = LocalGrid(app, 3, state_dir=tmp_path / "here", progress=False)
        results.append(strategy.start(grid, arrays, num_rounds=rounds))
    assert results[1].history[1].restarted == ["0", "1", "2"]
    assert results[1].history[1].left_out == []


def test_a_wrapper_does_not_hide_how_many_clients_its_strategy_waits_for():
    with pytest.raises(
        NotEnoughClientsError, match="3 clients are connected after 0 s, expected at least 4"
    ):
        run(mods=[fixedclipping_mod], client_strategy=fixed(min_available_nodes=4), timeout=0.0)


def test_a_resumed_run_goes_on_with_the_norm_that_has_adapted(tmp_path):
    def part(rounds, name, **options):
        inner = FedAdam(eta=0.01)
        wrapped = DifferentialPrivacyClientSideAdaptiveClipping(
            inner, 0.0, 3, initial_clipping_norm=CLIP
        )
        folder, parts = tmp_path / name, make_parts(SIZES)
        strategy, _, arrays = set_up(
            parts, SplitFedV2, client_strategy=wrapped, checkpoint_dir=str(folder), **options
        )
        app = split_app(plain_net, parts, mods=[adaptiveclipping_mod])
        grid = LocalGrid(app, 3, state_dir=folder / "here", progress=False)
        result = strategy.start(grid, arrays, num_rounds=rounds)
        return result, wrapped.clipping_norm

    whole, norm = part(3, "whole")
    part(2, "parts")
    resumed, resumed_norm = part(3, "parts", resume=True)
    assert norm == resumed_norm != CLIP
    assert changed(whole, resumed) == set()


def test_what_an_accountant_has_counted_is_kept():
    class Accountant:
        spent = 0

        def state_dict(self):
            return {"spent": self.spent}

        def load_state_dict(self, state):
            self.spent = state["spent"]

    before, after = (SegmentAggregator(fixed(), set()) for _ in range(2))
    before.strategy.accountant, after.strategy.accountant = Accountant(), Accountant()
    before.strategy.accountant.spent = 7
    after.load_state_dict(before.state_dict())
    assert after.strategy.accountant.spent == 7


def test_the_words_between_wrappers_and_mods_are_flower_s():
    assert differential_privacy.KEY_CLIPPING_NORM == CLIPPING_NORM
    assert differential_privacy.KEY_NORM_BIT == NORM_BIT
