"""Optimizers of users' own, on both sides, are what they are in plain training."""

import copy
import logging
import types
from functools import partial
from itertools import cycle

import pytest
import torch
from flwr.app import ArrayRecord
from reference import (
    CUT,
    LR,
    SEED,
    assert_bit_equal,
    epoch_batches,
    fresh,
    make_parts,
    plain_net,
    run_split,
    split_app,
    weights_of,
    whole_of,
    whole_step,
)
from torch import nn
from torch.optim import LBFGS, SGD, Optimizer, SparseAdam
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import TensorDataset

from flsplit import LocalGrid
from flsplit.errors import ConfigError, ProtocolError
from flsplit.message.optimizer_state import get_state, state_from_records, state_to_records
from flsplit.optimizers import UserOptimizer
from flsplit.strategies import PSL, SequentialSL, SplitFedV1, SplitFedV2


class Counting(Optimizer):
    """Steps ever smaller, by a counter and a nested value in its group."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "k": 0, "seen": {"norms": []}})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            group["weight_sum"] = group.get("weight_sum", 0.0) + group["k"] ** 0.5
            for p in group["params"]:
                p.add_(p.grad, alpha=-group["lr"] / group["weight_sum"])
            group["seen"]["norms"] = [*group["seen"]["norms"], p.grad.norm()][-2:]


class Remembering(Optimizer):
    """Keeps nested values per parameter, in other dtypes than the parameter's."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"sums": {"grad": torch.zeros_like(p, dtype=torch.float64), 1: [None]}}
                    state |= {"phase": "even", "none": None, "pair": (torch.tensor(0), True)}
                count, flag = state["pair"]
                assert flag is True
                assert state["none"] is None
                assert state["sums"][1] == [None]
                assert state["phase"] == ("odd" if count % 2 else "even")
                state["sums"]["grad"] = state["sums"]["grad"] + p.grad.double() / 3
                state["pair"] = (count + 1, True)
                state["phase"] = "even" if count % 2 else "odd"
                p.add_(state["sums"]["grad"].to(p.dtype), alpha=-group["lr"])


def grouped(parameters, lr):
    """The first layer at a tenth of the rate, with its own decay; its factory refuses 0."""
    assert lr > 0
    first, *rest = parameters
    return SGD(
        [{"params": [first], "lr": lr * 0.1, "weight_decay": lr / 7}, {"params": rest}],
        lr=lr, momentum=0.9,
    )  # fmt: skip


def fixed(parameters, lr):
    """One group whose rate the plan does not change."""
    first, *rest = parameters
    return SGD([{"params": [first], "lr": 0.03}, {"params": rest}], lr=lr)


MADE_UP = {"counting": Counting, "remembering": Remembering}
FACTORIES = {**MADE_UP, "grouped": grouped, "fixed": fixed}


def falling(server_round):
    return LR / server_round


def trained_plainly(build, part, factory, *, rounds, lr=lambda _: LR, batch_size=4):
    """Train the whole model, with an optimizer for each side of the cut."""
    model = fresh(build)
    sides = [
        [p for n, p in model.named_parameters() if n.startswith("front") is client]
        for client in (True, False)
    ]
    optimizers = [factory(side, lr=lr(1)) for side in sides]
    stream = epoch_batches(len(part), "0", batch_size)
    for server_round in range(1, rounds + 1):
        for own, side in zip(optimizers, sides, strict=True):
            for group, new in zip(
                own.param_groups, factory(side, lr=lr(server_round)).param_groups, strict=True
            ):
                group["lr"], decay = new["lr"], new.get("weight_decay", 0)
                if decay:
                    group["weight_decay"] = decay
        for step, indices in enumerate(next(stream)):
            whole_step(
                model, optimizers, part, indices, name="0", server_round=server_round, step=step
            )
    return dict(model.state_dict())


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_one_client_is_plain_training(factory, cache):
    (part,) = make_parts([10])
    result = run_split(
        PSL,
        plain_net,
        [part],
        optimizer=factory,
        rounds=3,
        cache=cache,
        server_lr=falling,
        share_client_segments=True,
    )
    expected = trained_plainly(plain_net, part, factory, rounds=3, lr=falling)
    assert_bit_equal(whole_of(result), expected)


@pytest.mark.parametrize(
    ("factory", "strategy"),
    zip(FACTORIES.values(), cycle([SequentialSL, SplitFedV1, SplitFedV2]), strict=False),
)
def test_a_cache_changes_nothing(factory, strategy):
    parts = make_parts([8, 6])
    with_cache, without = (
        run_split(strategy, plain_net, parts, optimizer=factory, cache=cache, server_lr=falling)
        for cache in (True, False)
    )
    assert_bit_equal(weights_of(without.arrays), weights_of(with_cache.arrays))


@pytest.mark.parametrize(
    ("factory", "strategy"),
    zip(FACTORIES.values(), cycle([SequentialSL, SplitFedV1]), strict=False),
)
def test_a_resumed_run_is_an_uninterrupted_one(factory, strategy, tmp_path):
    parts = make_parts([8, 6])

    def run(rounds, folder, **options):
        model = fresh(plain_net)
        method = strategy(
            model=model, cut=CUT, server_lr=falling, server_optimizer=factory, batch_size=4,
            seed=SEED, device="cpu", checkpoint_dir=str(folder / "server"), **options,
        )  # fmt: skip
        app = split_app(plain_net, parts, optimizer=factory)
        grid = LocalGrid(app, len(parts), progress=False, state_dir=folder / "clients")
        return method.start(grid, ArrayRecord(model.state_dict()), num_rounds=rounds)

    whole = run(3, tmp_path / "a")
    run(2, tmp_path / "b")
    resumed = run(3, tmp_path / "b", resume=True)
    assert_bit_equal(weights_of(resumed.arrays), weights_of(whole.arrays))


@pytest.mark.parametrize("factory", MADE_UP.values(), ids=MADE_UP)
def test_a_state_travels_whole(factory):
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    other = copy.deepcopy(module)
    first = UserOptimizer("optimizer", factory, module.named_parameters(), 0.1)
    second = UserOptimizer("optimizer", factory, other.named_parameters(), 0.1)
    for round_ in range(3):
        for own, by in ((module, first), (other, second)):
            by.zero_grad()
            own(torch.ones(1, 3) * round_).square().sum().backward()
            by.step()
        second = UserOptimizer("optimizer", factory, other.named_parameters(), 0.1)
        second.load(state_from_records(*state_to_records(get_state(first))))
    assert_bit_equal(dict(other.state_dict()), dict(module.state_dict()))
    second.load({})  # of another run
    assert second.state() == {}


def made(factory, lr=0.1):
    module = nn.Linear(3, 2)
    return UserOptimizer("optimizer", factory, module.named_parameters(), lr), module


class Demanding(SGD):
    def step(self, closure):
        return super().step(closure)


def with_scheduler(parameters, lr):
    optimizer = SGD(parameters, lr=lr)
    StepLR(optimizer, 1)
    return optimizer


class Undivided(SGD):
    def state_dict(self):
        return {"fast": {}, "param_groups": self.param_groups}


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (partial(SGD, momentun=0.9), "optimizer can't be made: TypeError.*momentun"),
        (lambda _parameters, lr: lr, "optimizer returned 0.1, expected a torch optimizer"),
        (LBFGS, "optimizer is LBFGS"),
        (Demanding, "optimizer is Demanding, .* closure"),
        (with_scheduler, "optimizer makes a scheduler for its SGD, .* server_scheduler"),
        (Undivided, r"optimizer: the state_dict\(\) of Undivided has 'fast', .* a dict 'state'"),
        (
            lambda parameters, lr: SGD([*parameters, nn.Parameter(torch.zeros(1))], lr=lr),
            "optimizer made an optimizer with 1 parameter.* not called with",
        ),
    ],
)
@pytest.mark.parametrize("side", ["client", "server"])
def test_what_is_no_use_is_refused(side, factory, message):
    if side == "server":
        with pytest.raises(ConfigError, match=message.replace("0.1", "0.05")):
            run_split(PSL, plain_net, make_parts([8]), optimizer=SGD, server_optimizer=factory)
    else:
        with pytest.raises(ConfigError, match=message):
            made(factory)


def test_parameters_that_are_left_out_are_named_once_and_stay(caplog):
    def half(parameters, lr):
        return SGD(parameters[:1], lr=lr)

    result = run_split(PSL, plain_net, make_parts([8, 8]), optimizer=half, cache=False)
    for text in ("optimizer leaves out front.0.bias:", "server_optimizer leaves out middle.0.bias"):
        assert sum(text in r.message for r in caplog.records if r.message.startswith(text)) == 1
    start = fresh(plain_net).state_dict()
    assert torch.equal(weights_of(result.arrays)["middle.0.bias"], start["middle.0.bias"])
    assert not torch.equal(weights_of(result.arrays)["middle.0.weight"], start["middle.0.weight"])


class Odd(SGD):
    """Keeps what can't travel."""

    def step(self, closure=None):
        super().step(closure)
        self.param_groups[0]["odd"] = object()


def test_what_can_not_be_kept_is_refused_by_name():
    optimizer, module = made(Odd)
    module(torch.ones(1, 3)).sum().backward()
    with pytest.raises(ConfigError, match=r"Odd keeps <object.* as \['odd'\] of a group"):
        optimizer.step()


class Grows(SGD):
    def step(self, closure=None):
        super().step(closure)
        self.add_param_group({"params": self.param_groups[0]["params"].pop()})


class Shares(SGD):
    """Keeps what is of no parameter."""

    kept = None

    def step(self, closure=None):
        super().step(closure)
        self.state["global"] = self.kept


class SharesNothingYet(Shares):
    kept = types.MappingProxyType({})


class Counts(SGD):
    """Steps ever smaller, by a number of its own."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        self.steps = 0

    def step(self, closure=None):
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.grad /= self.steps
        super().step(closure)


class Averages(SGD):
    """Keeps a tensor for each parameter beside its state, changed in place."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        self.means = {p: torch.zeros_like(p) for p in self.param_groups[0]["params"]}

    def step(self, closure=None):
        for p, mean in self.means.items():
            mean.lerp_(p.grad, 0.5)
        super().step(closure)


class Wraps(Optimizer):
    """Lets another one step, whose state nobody else sees."""

    def __init__(self, params, lr, momentum=0.9):
        super().__init__(params, {"lr": lr})
        self.inner = SGD(self.param_groups, lr=lr, momentum=momentum)
        self.param_groups = self.inner.param_groups

    def step(self, closure=None):
        self.inner.step(closure)


class Draws(SGD):
    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        self.noise = torch.Generator()

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.grad += torch.randn(p.shape, generator=self.noise)
        super().step(closure)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (Grows, "Grows had 1 parameter group.* before a step and has 2 after it"),
        (Shares, r"Shares keeps None as state\['global'\], expected"),
        (
            SharesNothingYet,
            r"SharesNothingYet keeps mappingproxy\({}\) as state\['global'\], expected",
        ),
        (Counts, "a step of Counts changes its attribute 'steps', expected all that it remembers"),
        (Averages, "a step of Averages changes its attribute 'means'"),
        (Wraps, "a step of Wraps changes its attribute 'inner'"),
        (Draws, "a step of Draws changes its attribute 'noise'"),
    ],
)
def test_what_is_remembered_elsewhere_is_refused_at_the_first_step(factory, message):
    optimizer, module = made(factory)
    module(torch.ones(1, 3)).sum().backward()
    with pytest.raises(ConfigError, match=f"optimizer: {message}"):
        optimizer.step()


class Prepares(SGD):
    """Checks something, and makes a function, at the first step; logs, and has fixed tables."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr, momentum=0.9)
        self.ready, self.update, self.log = False, None, logging.getLogger("prepares")
        self.table, self.module = torch.arange(3), nn.Linear(1, 1)

    def step(self, closure=None):
        self.ready, self.update = True, super().step
        self.log.debug("a step")
        self.update(closure)


OF_TORCH = [one for one in vars(torch.optim).values() if isinstance(one, type)]
TAKEN = [one for one in OF_TORCH if one not in (Optimizer, LBFGS, SparseAdam, torch.optim.Muon)]


@pytest.mark.parametrize(
    "factory",
    [
        *TAKEN,
        *(partial(one, fused=True) for one in (SGD, torch.optim.AdamW, torch.optim.Adagrad)),
        partial(Wraps, momentum=0),
        Prepares,
    ],
)
def test_what_remembers_nothing_elsewhere_steps(factory):
    optimizer, module = made(factory)
    StepLR(optimizer.torch, 1)  # as a server_scheduler is made
    for _ in range(2):
        module(torch.ones(1, 3)).sum().backward()
        optimizer.step()


def test_a_state_of_more_groups_is_refused():
    optimizer, _ = made(SGD)
    with pytest.raises(ProtocolError, match="index is 3, expected less than 3"):
        optimizer.load({3: {"k": 1}})


# --- sparse gradients ------------------------------------------------------------------------


class Bins(nn.Module):
    """Adds rows of an Embedding whose gradients are sparse."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(6, 6, sparse=True)

    def forward(self, values):
        return values + self.rows(values.argmax(1))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(8, 6, sparse=True)

    def forward(self, tokens):
        return self.rows(tokens).mean(1)


def sparse_net():
    net = nn.Sequential()
    net.add_module("front", Tokens())
    net.add_module("middle", Bins())
    net.add_module("head", nn.Linear(6, 3))
    return net


def token_data(count, seed):
    rng = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randint(8, (count, 4), generator=rng), torch.randint(3, (count,), generator=rng)
    )


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("client", [SGD, SparseAdam])
def test_sparse_gradients_of_one_client_are_those_of_plain_training(client, cache):
    part = token_data(10, 0)
    result = run_split(
        PSL, sparse_net, [part], cache=cache, rounds=3, share_client_segments=True,
        server_optimizer=SGD, optimizer=client,
    )  # fmt: skip

    def factory(parameters, lr):
        return (client if len(parameters) == 1 else SGD)(parameters, lr=lr)

    assert_bit_equal(whole_of(result), trained_plainly(sparse_net, part, factory, rounds=3))


@pytest.mark.parametrize("options", [{}, {"server_batchnorm": "per_client"}], ids=["pooled", "one"])
def test_sparse_gradients_of_two_clients(options):
    parts = [token_data(8, 0), token_data(8, 1)]
    dense = lambda: sparse_to_dense(sparse_net())  # noqa: E731
    found, expected = (
        run_split(PSL, build, parts, rounds=2, app_options={"max_grad_norm": 0.01}, **options)
        for build in (sparse_net, dense)
    )
    for name, tensor in weights_of(expected.arrays).items():
        torch.testing.assert_close(weights_of(found.arrays)[name], tensor, rtol=1e-5, atol=1e-6)


def sparse_to_dense(net):
    for module in net.modules():
        if isinstance(module, nn.Embedding):
            module.sparse = False
    return net


def test_an_optimizer_that_takes_no_sparse_gradients_says_so():
    with pytest.raises(ConfigError, match=r"server_optimizer: Adam can't step: .*sparse"):
        run_split(
            PSL, sparse_net, [token_data(8, 0)], server_optimizer=torch.optim.Adam, optimizer=SGD
        )
