"""On a GPU split learning computes what it computes on the processor.

Without a GPU the tests run on the processor alone, which says that they are right, and no more.
"""

import pytest
import torch
from flwr.app import ArrayRecord
from reference import (
    MOMENTUM,
    OPTIMIZERS,
    assert_bit_equal,
    assert_close,
    fresh,
    make_parts,
    noisy_net,
    normed_net,
    plain_net,
    run_split,
    split_app,
    train_in_turn,
    weights_of,
    whole_of,
)
from torch import nn
from torch.nn import functional

from flsplit import LocalGrid
from flsplit.client_parts import (
    Clip,
    Difference,
    HalfPrecision,
    Int8,
    LabelNoise,
    LowRank,
    Noise,
    NoPeek,
    Proximal,
    Shuffle,
    TopK,
)
from flsplit.privacy import Hijack
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

GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))
DEVICES = ["cpu", GPU]
METHODS = [
    (PSL, {}),
    (SequentialSL, {}),
    (SplitFedV1, {}),
    (SplitFedV2, {}),
    (SGLR, {"phi": 0.5, "alpha": 0.5}),
    (EPSL, {"phi": 0.5}),
    (EPSL, {"phi": 0.5, "aggregation": "shared_delta"}),
    (GAPSL, {}),
    (GAPSL, {"low_memory": True}),
    (FSLSAGE, {"align_every": 1, "align_epochs": 3, "upload_every": 2}),
    (CSEFSL, {"upload_every": 2}),
    (CycleSL, {}),
    (SFLGA, {}),
]


@pytest.fixture(autouse=True)
def _in_one_order(monkeypatch):
    """Let a GPU add in the same order every time, and in float32."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    was = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32
    torch.use_deterministic_algorithms(mode=True)
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.use_deterministic_algorithms(mode=was[0])
    torch.backends.cudnn.allow_tf32 = was[1]


def run_on(server: str, client: str, method, build, parts, **options):
    """Train with the server on one device and the clients on another."""
    return run_split(
        method, build, parts, app_options={"device": client}, device=server,
        share_client_segments=True, **options,
    )  # fmt: skip


def everything(result) -> list[dict[str, torch.Tensor]]:
    """Return the model, and the segments of clients that keep their own."""
    return [weights_of(result.arrays), *map(weights_of, result.client_segments.values())]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_one_client_is_bit_equal_to_training_the_whole_model(optimizer, cache, device):
    parts = make_parts([14], noisy_net)
    result = run_on(
        device, device, PSL, noisy_net, parts, optimizer=optimizer, rounds=3, local_epochs=1,
        cache=cache,
    )  # fmt: skip
    weights, _ = train_in_turn(noisy_net, parts, optimizer=optimizer, rounds=3, device=device)
    assert_bit_equal(whole_of(result), weights)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("method", "own"), METHODS)
def test_a_method_learns_the_same_on_every_device(method, own, device):
    parts = make_parts([12, 12, 12], normed_net)
    options = {"rounds": 2, "local_steps": 3, "optimizer": MOMENTUM} | own
    expected = everything(run_on("cpu", "cpu", method, normed_net, parts, **options))
    for server, client in ((device, device), (device, "cpu"), ("cpu", device)):
        found = everything(run_on(server, client, method, normed_net, parts, **options))
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, 2e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("method", "own"), METHODS)
def test_random_numbers_are_the_same_in_every_run(method, own, device):
    parts = make_parts([12, 12, 12], noisy_net)
    options = {"rounds": 2, "local_steps": 3, "optimizer": MOMENTUM} | own
    torch.manual_seed(1)
    once = everything(run_on(device, device, method, noisy_net, parts, **options))
    drawn = torch.randn(3, device=device)
    torch.manual_seed(1)
    torch.testing.assert_close(drawn, torch.randn(3, device=device), rtol=0, atol=0)
    torch.manual_seed(2)
    again = everything(run_on(device, device, method, noisy_net, parts, cache=False, **options))
    for one, other in zip(once, again, strict=True):
        assert_bit_equal(one, other)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", [PSL, FSLSAGE, CycleSL])
def test_a_run_resumed_is_a_run_uninterrupted(tmp_path, method, device):
    adam, parts = OPTIMIZERS["adam"], make_parts([12, 12], noisy_net)
    app = split_app(noisy_net, parts, optimizer=adam, device=device)

    def run(folder, rounds: int, *, resume: bool = False):
        strategy = method(
            model=fresh(noisy_net), cut="front", server_lr=0.05, batch_size=4, local_steps=2,
            server_optimizer=adam, device=device, seed=2, checkpoint_dir=str(tmp_path / folder),
            resume=resume,
        )  # fmt: skip
        grid = LocalGrid(app, 2, progress=False, state_dir=tmp_path / folder / "clients")
        return strategy.start(grid, ArrayRecord(fresh(noisy_net).state_dict()), num_rounds=rounds)

    run("broken", 2)
    resumed, whole = run("broken", 4, resume=True), run("whole", 4)
    for one, other in zip(everything(resumed), everything(whole), strict=True):
        assert_bit_equal(one, other)
    assert resumed.history.numbers() == whole.history.numbers()


CLIENT_PARTS = [
    Clip(1.0),
    Clip(1.0, per="batch", place="gradients"),
    Noise(0.1),
    Noise(0.1, place="gradients"),
    Proximal(0.1),
    NoPeek(0.5),
    Shuffle(),
    LabelNoise(0.5),
    LabelNoise(0.5, marvell=False),
    Int8(),
    Int8("cut-gradient"),
    Int8(feedback="example"),
    HalfPrecision(dtype="bfloat16"),
    TopK(0.3, feedback=True),
    TopK(0.3, "cut-gradient"),
    LowRank(2),
    Difference(),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "part", CLIENT_PARTS, ids=[f"{i}-{part.name}" for i, part in enumerate(CLIENT_PARTS)]
)
def test_a_client_part_computes_where_its_client_does(part, device):
    parts = make_parts([12, 12], normed_net)
    options = {"rounds": 2, "local_steps": 3, "client_parts": [part]}
    expected = everything(run_on("cpu", "cpu", PSL, normed_net, parts, **options))
    for server, cache in ((device, True), (device, False), ("cpu", False)):
        found = run_on(server, device, PSL, normed_net, parts, cache=cache, **options)
        for one, other in zip(everything(found), expected, strict=True):
            # A number that is rounded otherwise may fall on the other side of a step.
            assert_close(one, other, 1e-2 if part.name in ("int8", "top-k") else 2e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", [FSLSAGE, SFLGA])
def test_client_parts_compute_there_together(method, device):
    parts = make_parts([12, 12], noisy_net)
    client_parts = [Clip(1.0), Noise(0.1), Int8(), Proximal(0.1)]
    options = {"rounds": 2, "local_steps": 2, "client_parts": client_parts}
    once = run_on(device, device, method, noisy_net, parts, **options)
    again = run_on(device, device, method, noisy_net, parts, cache=False, **options)
    for one, other in zip(everything(once), everything(again), strict=True):
        assert_bit_equal(one, other)


class Winding(nn.Module):
    """Dropout before the cut, and a way through forward that the data choose."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 6)
        self.front = nn.Tanh()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        h = self.first(x)
        if h[0].sum() > h[1].sum():
            h = functional.dropout(h * 2, 0.3, self.training)
        return self.head(functional.dropout(self.front(h), 0.3, self.training))


@pytest.mark.parametrize("device", DEVICES)
def test_a_way_that_the_data_choose_draws_as_in_one_piece(device):
    parts = make_parts([40])
    result = run_on(device, device, PSL, Winding, parts, rounds=2, local_epochs=1)
    weights, _ = train_in_turn(Winding, parts, optimizer=torch.optim.SGD, rounds=2, device=device)
    assert_bit_equal(whole_of(result), weights)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cache", [True, False])
def test_labels_that_stay_at_home_are_computed_with_there(device, cache):
    parts = make_parts([14], noisy_net)
    cuts, found = ("front", "middle"), []
    for place in ("cpu", device):
        model = fresh(normed_net)
        strategy = PSL(
            model=model, cut=cuts, server_lr=0.05, batch_size=4, local_epochs=1, device=place,
            share_client_segments=True, server_optimizer=MOMENTUM,
        )  # fmt: skip
        app = split_app(normed_net, parts, cut=cuts, device=place, optimizer=MOMENTUM)
        grid = LocalGrid(app, 1, progress=False, cache=cache)
        found.append(strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=2))
    assert_close(whole_of(found[1]), whole_of(found[0]), 2e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_a_hijacking_server_computes_on_its_device(device):
    parts = make_parts([40, 40])
    attack = Hijack(
        model=plain_net(), cut="front", public=parts[1].tensors[0], server_lr=0.05, batch_size=8,
        pilot=nn.Sequential(nn.Linear(8, 6), nn.Tanh()), warm_up=20, device=device, local_steps=3,
    )  # fmt: skip
    app = split_app(plain_net, parts, device=device)
    attack.start(LocalGrid(app, 2, progress=False), ArrayRecord(plain_net().state_dict()), 1)
    found = attack.reconstruct(torch.tanh(torch.randn(4, 6)))
    assert found.shape == (4, 8)
    assert found.device.type == device


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_mixed_precision(device, precision):
    parts = make_parts([24, 24])
    options = {"rounds": 6, "local_epochs": 1, "batch_size": 8, "optimizer": MOMENTUM}
    result = run_split(
        PSL, plain_net, parts, app_options={"device": device, "autocast": precision},
        device=device, share_client_segments=True, **options,
    )  # fmt: skip
    full = run_on(device, device, PSL, plain_net, parts, **options)
    losses, expected = ([entry.loss for entry in one.history] for one in (result, full))
    assert losses == pytest.approx(expected, rel=0.02)
    assert losses != expected
