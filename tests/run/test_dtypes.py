"""Models in other dtypes than float32: one client trains as the model in one piece does."""

import copy
from functools import partial

import pytest
import torch
from reference import half_base_net
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from flsplit import LocalGrid, client_app
from flsplit.errors import ConfigError, ProtocolError
from flsplit.strategies import PSL, SplitFedV1, SplitFedV2

LR = 0.1


class Magnitude(nn.Module):
    def forward(self, x):
        return x.abs()


def plain(dtype):
    return lambda: nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)
    ).to(dtype)


def complex_net():
    middle = [nn.Linear(6, 8, dtype=torch.complex64), nn.Linear(8, 8, dtype=torch.complex64)]
    return nn.Sequential(middle[0], nn.Identity(), middle[1], Magnitude(), nn.Linear(8, 2))


class Narrowing(nn.Module):
    """Takes the mean off in float64: in float32 nothing would be left of what is there."""

    def forward(self, x):
        return (x - x.mean(1, keepdim=True)).float()


def narrowing_net():
    first = nn.Linear(6, 8).double()
    with torch.no_grad():
        first.bias += 1e9
    return nn.Sequential(first, nn.Identity(), Narrowing(), nn.Linear(8, 2))


class Scaled(nn.Module):
    """Computes in the dtype that comes, in which float16 rounds otherwise than float32."""

    def forward(self, x):
        return (x * 3 / 7 + x.square()).float()


class UnderAutocast(nn.Linear):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


class LikeItsInput(nn.Linear):
    """Returns the dtype that it is given, as norms of language models do."""

    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


class Half(nn.Module):
    def forward(self, x):
        return x.half()


class HalfInTraining(nn.Module):
    def forward(self, x):
        return x.half() if self.training else x


def rounded_after(first, then=nn.Identity):
    return lambda: nn.Sequential(first(6, 8), then(), Scaled(), nn.Linear(8, 2))


class AsksForDtype(nn.Sequential):
    def forward(self, x):
        first, same, scaled, last = self
        return last(scaled(same(first(x.float())).to(x.dtype)))


MODELS = {
    "lora": (partial(half_base_net, 6), torch.float16),
    "bfloat16": (plain(torch.bfloat16), torch.bfloat16),
    "float64": (plain(torch.float64), torch.float64),
    "complex64": (complex_net, torch.complex64),
    "float64 first": (narrowing_net, torch.float64),
}
ROUNDED = {
    "float16 inside": (rounded_after(nn.Linear, Half), torch.float32),
    "float16 in training": (rounded_after(nn.Linear, HalfInTraining), torch.float32),
    "autocast inside": (rounded_after(UnderAutocast), torch.float32),
    "inputs' dtype": (rounded_after(LikeItsInput), torch.float16),
    "asks for it": (lambda: AsksForDtype(*rounded_after(nn.Linear)()), torch.float16),
}
MODELS |= ROUNDED
TRAINED = {"lora": "2.a", "float64 first": "3.weight"} | dict.fromkeys(ROUNDED, "3.weight")


def loss_in_float32(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits.float(), labels)


def trained_in_one_piece(build, x, y, steps):
    """Return the state dict after ``steps`` steps; batches of one row have one order only."""
    torch.manual_seed(0)
    model = build()
    start = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_in_float32(model(x), y).backward()
        optimizer.step()
    return start, model.state_dict()


@pytest.mark.parametrize(
    ("strategy", "cache"),
    [(SplitFedV1, True), (SplitFedV1, False), (SplitFedV2, True), (PSL, False)],
)
@pytest.mark.parametrize("kind", MODELS)
def test_one_client_is_the_model_in_one_piece(kind, strategy, cache):
    build, dtype = MODELS[kind]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 6, generator=generator).to(dtype)  # one row: no order of a sum differs
    y = torch.tensor([1])
    start, expected = trained_in_one_piece(build, x, y, steps=3)
    app = client_app(model=build, cut="1", data=lambda context: TensorDataset(x, y))
    method = strategy(
        model=build(), cut="1", server_lr=LR, batch_size=1, loss=loss_in_float32,
        fraction_evaluate=0.0, share_client_segments=strategy is PSL,
    )  # fmt: skip
    given = []
    result = method.start(
        LocalGrid(app, 1, cache=cache), start, num_rounds=3,
        evaluate_fn=None if strategy is PSL else lambda server_round, arrays: given.append(arrays),
    )  # fmt: skip
    found = result.arrays.to_torch_state_dict()
    for segment in result.client_segments.values():  # PSL's, which has no whole model
        found = segment.to_torch_state_dict() | found
    assert list(found) == list(expected)
    model = build()
    model.load_state_dict(found)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.dtype == expected[name].dtype
    trained = TRAINED.get(kind, "2.weight")
    assert not torch.equal(start[trained], expected[trained])
    for arrays in given[-1:]:
        last = arrays.to_torch_state_dict()
        assert all(torch.equal(last[name], found[name]) for name in found)


@pytest.mark.parametrize("cut", ["1", {"nobody": "0", "default": "1"}], ids=["one", "different"])
def test_a_client_under_autocast_is_one_whose_smashed_data_are_rounded(cut):
    def build(rounds=False):
        first = UnderAutocast if rounds else nn.Linear
        return nn.Sequential(first(6, 8), nn.Identity(), nn.Linear(8, 8), Scaled(), nn.Linear(8, 2))

    x, y = torch.randn(1, 6, generator=torch.Generator().manual_seed(1)), torch.tensor([1])
    start, _ = trained_in_one_piece(build, x, y, steps=0)
    found = []
    for inside in (True, False):
        app = client_app(
            model=partial(build, inside), cut=cut, data=lambda _: TensorDataset(x, y),
            autocast=None if inside else torch.bfloat16,
        )  # fmt: skip
        method = PSL(model=build(), cut=cut, server_lr=LR, batch_size=1, fraction_evaluate=0.0)
        result = method.start(LocalGrid(app, 1), start, num_rounds=2)
        assert result.history[0].traffic.logical["activations-up"] == 8 * 2
        found.append(result.arrays.to_torch_state_dict())
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name
    assert not torch.equal(found[0]["2.weight"], start["2.weight"])


def test_a_later_cut_has_a_dtype_of_its_own():
    build, _ = MODELS["float16 inside"]
    x, y = torch.randn(1, 6, generator=torch.Generator().manual_seed(1)), torch.tensor([1])
    start, expected = trained_in_one_piece(build, x, y, steps=2)
    cut = {"nobody": "0", "default": "1"}
    app = client_app(model=build, cut=cut, data=lambda _: TensorDataset(x, y))
    method = PSL(
        model=build(), cut=cut, server_lr=LR, batch_size=1, loss=loss_in_float32,
        fraction_evaluate=0.0,
    )  # fmt: skip
    found = method.start(LocalGrid(app, 1), start, num_rounds=2).arrays.to_torch_state_dict()
    assert torch.equal(found["3.weight"], expected["3.weight"])


def test_smashed_data_keep_their_dtype():
    seen = []

    class Looking(nn.Module):
        def forward(self, x):
            if torch.initial_seed():  # 0 while the model is looked at
                seen.append(x.dtype)
            return x

    def build():
        return nn.Sequential(*half_base_net(6)[:2], Looking(), *half_base_net(6)[2:])

    model, part = build(), TensorDataset(torch.randn(16, 6).half(), torch.zeros(16).long())
    app = client_app(model=build, cut="1", data=lambda _: part, device="cpu")
    method = PSL(model=model, cut="1", loss=loss_in_float32, device="cpu", fraction_evaluate=0.0)
    entry = method.start(LocalGrid(app, 2), model.state_dict(), num_rounds=1).history[0]
    assert set(seen) == {torch.float16}
    assert entry.traffic.logical["activations-up"] == 2 * 16 * 8 * 2
    assert entry.traffic.logical["gradients-down-unicast"] == 2 * 16 * 8 * 2


def test_client_segments_of_bfloat16_come_back():
    build, dtype = MODELS["bfloat16"]
    x, y = torch.randn(4, 6).to(dtype), torch.tensor([0, 1, 1, 0])
    start = build().state_dict()
    app = client_app(model=build, cut="1", data=lambda context: TensorDataset(x, y))
    method = PSL(
        model=build(),
        cut="1",
        server_lr=LR,
        batch_size=2,
        loss=loss_in_float32,
        share_client_segments=True,
    )
    result = method.start(LocalGrid(app, 2), start, num_rounds=1)
    own = result.client_segments["0"].to_torch_state_dict()
    assert own["0.weight"].dtype == torch.float32
    assert torch.equal(own["0.weight"], own["0.weight"].bfloat16().float())


class Table(nn.Linear):
    """Has a table in a dtype of its own, as quantised layers do, and looks up a scale in it."""

    def __init__(self, inputs, outputs, dtype):
        super().__init__(inputs, outputs)
        self.register_buffer("table", torch.tensor([0.5, 1, 3]).mul(2).to(dtype))

    def forward(self, x):
        return super().forward(x) * self.table.float()[1]


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint64, torch.float8_e4m3fn])
@pytest.mark.parametrize("strategy", [SplitFedV1, PSL])
def test_buffers_of_dtypes_that_torch_only_stores(dtype, strategy, tmp_path):
    build = lambda: nn.Sequential(Table(6, 8, dtype), nn.Tanh(), Table(8, 2, dtype))  # noqa: E731
    plain = lambda: nn.Sequential(  # noqa: E731
        Table(6, 8, torch.float32), nn.Tanh(), Table(8, 2, torch.float32)
    )
    x, y = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 2
    torch.manual_seed(0)
    start, found = build().state_dict(), []
    for kind, model in (("plain", plain), ("own", build)):
        app = client_app(model=model, cut="1", data=lambda _: TensorDataset(x, y))
        grid = LocalGrid(app, 2, cache=False, state_dir=tmp_path / kind)
        for rounds in (1, 2):
            method = strategy(
                model=model(), cut="1", server_lr=LR, batch_size=4, fraction_evaluate=0.0,
                checkpoint_dir=str(tmp_path / f"{kind}-server"), resume=rounds > 1,
            )  # fmt: skip
            result = method.start(grid, start, num_rounds=rounds)
        found.append(result.arrays.to_torch_state_dict())
    model = build()
    model.load_state_dict(found[1], strict=strategy is SplitFedV1)
    for name, tensor in found[0].items():
        assert torch.equal(model.state_dict()[name].to(tensor.dtype), tensor), name
    assert model[2].table.dtype == dtype


def test_a_dtype_that_can_not_be_sent_is_refused_with_the_tensors_name():
    class Exponents(nn.Linear):
        def __init__(self):
            super().__init__(6, 8)
            self.register_buffer("scales", torch.ones(2).to(torch.complex32))

    build = lambda: nn.Sequential(Exponents(), nn.Tanh(), nn.Linear(8, 2))  # noqa: E731
    app = client_app(model=build, cut="1", data=lambda context: None)
    method = PSL(model=build(), cut="1", server_lr=LR)
    with pytest.raises(ProtocolError, match=r"'0\.scales': a tensor of torch\.complex32 can't be"):
        method.start(LocalGrid(app, 1), build().state_dict())


def test_the_result_starts_another_run():
    build, dtype = MODELS["bfloat16"]
    x, y = torch.randn(1, 6).to(dtype), torch.tensor([1])
    start, expected = trained_in_one_piece(build, x, y, steps=2)
    app = client_app(model=build, cut="1", data=lambda context: TensorDataset(x, y))
    arrays = start
    for _ in range(2):
        method = SplitFedV1(
            model=build(), cut="1", server_lr=LR, batch_size=1, loss=loss_in_float32,
            fraction_evaluate=0.0,
        )  # fmt: skip
        arrays = method.start(LocalGrid(app, 1), arrays, num_rounds=1).arrays
    for name, tensor in arrays.to_torch_state_dict().items():
        assert torch.equal(tensor.bfloat16(), expected[name])


def test_what_is_no_state_dict_is_refused():
    build, _ = MODELS["float64"]
    method = PSL(model=build(), cut="1", server_lr=LR)
    grid = LocalGrid(client_app(model=build, cut="1", data=lambda context: None), 1)
    with pytest.raises(
        ConfigError, match=r"initial_arrays\['0.weight'\] is 3, expected an object of type T"
    ):
        method.start(grid, {"0.weight": 3})
    with pytest.raises(ConfigError, match="initial_arrays is 3, expected an object of type Array"):
        method.start(grid, 3)
