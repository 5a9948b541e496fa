"""Gradients at the server: each client's at the cut, and all clients' of the server segment."""

from functools import partial

import pytest
import torch
from reference import fresh, noisy_net, normed_net, plain_net
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from flsplit.cut import split
from flsplit.errors import ConfigError, MethodError
from flsplit.run.shares import client_shares
from flsplit.server import gradients
from flsplit.server.client_batch import ClientBatch
from flsplit.server.products import Factors, KeptGradients
from flsplit.server.segment import ServerSegment

CPU = torch.device("cpu")


def pooled_gradients(*args):
    return gradients.pooled_gradients(*args).result()


def separate_gradients(*args):
    return gradients.separate_gradients(*args).result()


def client_gradients(*args, **options):
    return gradients.client_gradients(*args, **options).result()


SIZES = {"0": (2, 10), "1": (5, 70), "2": (3, 20)}  # rows of the batch, examples in all
APART = {
    "separate": separate_gradients,
    "client": client_gradients,
    "client-low-memory": partial(client_gradients, low_memory=True),
}
ALL = {"pooled": pooled_gradients, **APART}
every_way = pytest.mark.parametrize("compute", ALL.values(), ids=ALL)
every_way_apart = pytest.mark.parametrize("compute", APART.values(), ids=APART)


def segment_of(build, lr=0.1):
    module = split(fresh(build), "front").server.train()
    return ServerSegment(
        module, loss=functional.cross_entropy, optimizer=torch.optim.SGD, lr=lr, device=CPU
    )


def batches_of(build):
    shape = (6,) if build is plain_net else (3, 4, 4)  # at the cut
    rng = torch.Generator().manual_seed(0)
    return [
        ClientBatch(
            name,
            torch.randn(rows, *shape, generator=rng),
            torch.randint(3, (rows,), generator=rng),
            examples,
        )
        for name, (rows, examples) in SIZES.items()
    ]


def own_gradients(build, batch):
    """Return loss, logits and gradients of one client's own mean loss, by plain autograd."""
    model = fresh(build).train()
    smashed = batch.smashed.clone().requires_grad_()
    logits = model.head(model.middle(smashed.clone()))  # the first operation may be in place
    loss = functional.cross_entropy(logits, batch.labels)
    loss.backward()
    server = [p.grad for part in (model.middle, model.head) for p in part.parameters()]
    return loss.item(), logits.detach(), server, smashed.grad


@pytest.mark.parametrize("factor", [1, len(SIZES)], ids=["mean", "sum"])
@pytest.mark.parametrize("shares", ["examples", "batch", "equal"])
@every_way
def test_each_client_gets_the_gradient_of_its_own_mean_loss(compute, shares, factor):
    batches = batches_of(plain_net)
    weights = {name: factor * one for name, one in client_shares(batches, shares).items()}
    result = compute(segment_of(plain_net), batches, weights)
    summed = None
    for batch in batches:
        loss, logits, server, cut = own_gradients(plain_net, batch)
        assert result.losses[batch.client] == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(result.logits[batch.client], logits)
        torch.testing.assert_close(result.cut_gradients[batch.client], cut)
        scaled = [weights[batch.client] * g for g in server]
        summed = scaled if summed is None else [a + b for a, b in zip(summed, scaled, strict=True)]
    for found, expected in zip(result.server_gradients, summed, strict=True):
        torch.testing.assert_close(found, expected)
    assert result.rows == 10
    assert result.weights == weights


def test_sharing_by_batch_is_the_mean_over_the_concatenated_rows():
    batches = batches_of(plain_net)
    result = pooled_gradients(segment_of(plain_net), batches, client_shares(batches, "batch"))
    model = fresh(plain_net)
    smashed = torch.cat([batch.smashed for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    functional.cross_entropy(model.head(model.middle(smashed)), labels).backward()
    expected = [p.grad for part in (model.middle, model.head) for p in part.parameters()]
    for found, gradient in zip(result.server_gradients, expected, strict=True):
        torch.testing.assert_close(found, gradient)


def test_pooled_batchnorm_sees_all_rows_at_once():
    batches, segment = batches_of(normed_net), segment_of(normed_net)
    weights = client_shares(batches, "examples")
    result = pooled_gradients(segment, batches, weights)

    model = fresh(normed_net).train()
    smashed = torch.cat([batch.smashed for batch in batches]).requires_grad_()
    logits = model.head(model.middle(smashed.clone())).split([len(b) for b in batches])
    losses = [functional.cross_entropy(z, b.labels) for z, b in zip(logits, batches, strict=True)]
    sum(weights[b.client] * loss for b, loss in zip(batches, losses, strict=True)).backward()
    cuts = smashed.grad.split([len(batch) for batch in batches])
    for batch, cut in zip(batches, cuts, strict=True):
        torch.testing.assert_close(result.cut_gradients[batch.client], cut / weights[batch.client])
    for name, tensor in segment.arrays().items():
        torch.testing.assert_close(tensor, model.state_dict()[name])
    assert segment.arrays()["middle.3.num_batches_tracked"] == 1


@every_way_apart
def test_batchnorm_apart_sees_one_client_after_the_other(compute):
    batches, segment = batches_of(normed_net), segment_of(normed_net)
    result = compute(segment, batches, client_shares(batches, "examples"))
    model = fresh(normed_net).train()
    for batch in batches:
        loss, logits, _, cut = own_gradients(normed_net, batch)
        assert result.losses[batch.client] == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(result.logits[batch.client], logits)
        torch.testing.assert_close(result.cut_gradients[batch.client], cut)
        model.middle(batch.smashed.clone())
    for name, tensor in segment.arrays().items():
        torch.testing.assert_close(tensor, model.state_dict()[name])
    assert segment.arrays()["middle.3.num_batches_tracked"] == 3


@every_way_apart
def test_pooled_batchnorm_and_batchnorm_apart_differ(compute):
    """Else the two tests above would say little."""
    batches = batches_of(normed_net)
    weights = client_shares(batches, "equal")
    pooled = pooled_gradients(segment_of(normed_net), batches, weights)
    apart = compute(segment_of(normed_net), batches, weights)
    assert not torch.allclose(pooled.cut_gradients["0"], apart.cut_gradients["0"], atol=1e-3)


def test_each_clients_gradients_are_there_where_they_are_asked_for():
    batches = batches_of(plain_net)
    weights = client_shares(batches, "examples")
    assert pooled_gradients(segment_of(plain_net), batches, weights).clients is None
    assert separate_gradients(segment_of(plain_net), batches, weights).clients is None
    kept = client_gradients(segment_of(plain_net), batches, weights).clients
    assert kept.clients == list(SIZES)
    for batch in batches:
        _, _, expected, _ = own_gradients(plain_net, batch)
        for found, gradient in zip(kept.of(batch.client), expected, strict=True):
            torch.testing.assert_close(found, gradient)


@every_way
def test_computing_changes_neither_weights_nor_what_it_was_given(compute):
    """The segment's first operation, a ReLU in place, would else eat the smashed data."""
    batches, segment = batches_of(noisy_net), segment_of(noisy_net)
    smashed = [batch.smashed.clone() for batch in batches]
    weights = [p.detach().clone() for p in segment.parameters]
    assert compute(segment, batches, client_shares(batches, "equal")).server_gradients
    for batch, before in zip(batches, smashed, strict=True):
        assert torch.equal(batch.smashed, before)
    for parameter, before in zip(segment.parameters, weights, strict=True):
        assert torch.equal(parameter, before)
        assert parameter.grad is None


class Constant(nn.Module):
    """Answers the same to everything."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.bias.expand(len(x), 3)


def ignoring_net():
    net = plain_net()
    net.head = Constant()
    return net


@every_way
def test_a_loss_that_does_not_depend_on_the_smashed_data_gives_zeros(compute):
    batches, segment = batches_of(plain_net), segment_of(ignoring_net)
    result = compute(segment, batches, client_shares(batches, "equal"))
    for batch in batches:
        assert torch.equal(result.cut_gradients[batch.client], torch.zeros_like(batch.smashed))
    assert [g is None for g in result.server_gradients].count(False) == 1
    before = [p.detach().clone() for p in segment.parameters]
    segment.step(result.server_gradients)
    moved = [not torch.equal(p, old) for p, old in zip(segment.parameters, before, strict=True)]
    assert moved.count(True) == 1


class Reentrant(nn.Linear):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=True)


def test_a_checkpoint_that_torch_cannot_differentiate_so_is_named():
    def build():
        net = plain_net()
        net.middle = Reentrant(6, 10)
        return net

    batches = batches_of(plain_net)
    with pytest.raises(ConfigError, match=r"use_reentrant=True, .*: pass use_reentrant=False"):
        pooled_gradients(segment_of(build), batches, client_shares(batches, "equal"))


# --- each client's own, compared and combined ------------------------------------------------

WIDTH = 48  # with so few rows, factors are the cheaper for a layer of this size


class Twice(nn.Module):
    """A layer that is called twice, and another whose weight is used beside its calls, too."""

    def __init__(self):
        super().__init__()
        self.called_twice = nn.Linear(WIDTH, WIDTH)
        self.used_beside = nn.Linear(WIDTH, WIDTH)
        self.only_beside = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = self.called_twice(self.called_twice(x).tanh())
        x = functional.linear(self.used_beside(x), self.used_beside.weight)
        return functional.linear(x, self.only_beside.weight)


class Tokens(nn.Module):
    """A layer that gets three dimensions."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return self.layer(x.unsqueeze(1).expand(-1, 2, -1)).mean(1)


class OfConstants(nn.Module):
    """Layers whose input needs no gradient, and one that is called without a graph."""

    def __init__(self):
        super().__init__()
        self.register_buffer("queries", torch.randn(2, WIDTH))
        self.with_bias = nn.Linear(WIDTH, WIDTH)
        self.without_bias = nn.Linear(WIDTH, WIDTH, bias=False)
        self.without_graph = nn.Linear(WIDTH, WIDTH)
        self.both = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        with torch.no_grad():
            gate = self.without_graph(x).sigmoid()
        constants = self.with_bias(self.queries) + self.without_bias(self.queries)
        return self.both(gate * x) + (constants + self.both(self.queries)).tanh().mean(0)


NETS = {
    "in-place": lambda: [nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True), nn.BatchNorm1d(WIDTH)],
    "used twice": lambda: [Twice()],
    "three dimensions": lambda: [Tokens()],
    "frozen": lambda: [nn.Linear(WIDTH, WIDTH).requires_grad_(False), nn.Linear(WIDTH, WIDTH)],
    "attention": lambda: [nn.TransformerEncoderLayer(WIDTH, 2, 64, 0.0, batch_first=True)],
    "constants": lambda: [OfConstants()],
    "small": lambda: [nn.Linear(WIDTH, 2), nn.Linear(2, WIDTH)],
}


def wide_segment_of(net):
    torch.manual_seed(0)
    module = nn.Sequential(*NETS[net](), nn.Linear(WIDTH, 3)).double().train()
    return ServerSegment(
        module, loss=functional.cross_entropy, optimizer=torch.optim.SGD, lr=0.1, device=CPU
    )


def wide_batches():
    rng = torch.Generator().manual_seed(1)
    return [
        ClientBatch(
            str(client),
            torch.randn(rows, WIDTH, generator=rng, dtype=torch.float64),
            torch.randint(3, (rows,), generator=rng),
            rows,
        )
        for client, rows in enumerate((2, 4, 3))
    ]


@pytest.mark.parametrize("low_memory", [False, True], ids=["kept", "low-memory"])
@pytest.mark.parametrize("net", NETS)
def test_products_and_combinations_are_those_of_plain_autograd(net, low_memory):
    weights = {"0": 0.2, "1": 0.5, "2": 0.3}
    batches, plain = wide_batches(), wide_segment_of(net)
    apart = separate_gradients(wide_segment_of(net), batches, weights)
    found = client_gradients(wide_segment_of(net), batches, weights, low_memory=low_memory)

    own = {}
    for batch in batches:
        leaf = batch.smashed.clone().requires_grad_()
        loss = functional.cross_entropy(plain.module(leaf), batch.labels)
        *own[batch.client], cut = torch.autograd.grad(
            loss, [*plain.parameters, leaf], allow_unused=True
        )
        assert found.losses[batch.client] == pytest.approx(loss.item())
        torch.testing.assert_close(found.cut_gradients[batch.client], cut)
        torch.testing.assert_close(apart.cut_gradients[batch.client], cut)
        if not low_memory:
            assert_close(found.clients.of(batch.client), own[batch.client])

    vectors = torch.stack(
        [torch.cat([g.flatten() for g in one if g is not None]) for one in own.values()]
    )
    torch.testing.assert_close(found.clients.gram(), vectors @ vectors.T)
    expected = [
        None
        if layer[0] is None
        else sum(w * g for w, g in zip(weights.values(), layer, strict=True))
        for layer in zip(*own.values(), strict=True)
    ]
    assert_close(found.clients.combine(list(weights.values())), expected)
    assert_close(apart.server_gradients, expected)


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


def test_large_linear_layers_are_kept_as_factors_and_small_ones_are_not():
    found = client_gradients(wide_segment_of("in-place"), wide_batches(), {})
    for one in found.clients._gradients:
        kinds = [type(gradient) for gradient in one]
        assert kinds[0] is Factors  # weight of 48 x 48
        assert Factors not in kinds[1:]  # bias, BatchNorm, and a head of 48 x 3


def test_a_client_that_counts_nothing_adds_nothing():
    factors = Factors(torch.ones(1, 2), torch.full((1, 3), 2.0))
    kept = KeptGradients(["a", "b"], [[factors]] * 2)
    (combined,) = kept.combine([0.0, 0.5])
    torch.testing.assert_close(combined, torch.ones(2, 3))
    assert kept.combine([0.0, 0.0]) == [None]
    (named,) = kept.combine({"b": 0.5, "a": 0.0})
    assert torch.equal(named, combined)
    for wrong in ([0.5], {"a": 0.5}, {"a": 0.5, "c": 0.5}):
        with pytest.raises(MethodError, match=r"expected one for each of \['a', 'b'\]"):
            kept.combine(wrong)


def test_layers_are_as_they_were_afterwards():
    segment, smashed = wide_segment_of("in-place"), wide_batches()[1].smashed
    before = segment.module(smashed)
    client_gradients(segment, wide_batches(), {})
    assert all("forward" not in vars(module) for module in segment.module.modules())
    assert segment.module(smashed).grad_fn is not None
    torch.testing.assert_close(segment.module(smashed), before)


def test_inner_products_are_float64_however_large_the_layers():
    """Over more than one block; float32 would be off by 1e-7 of the norm, and lose small angles."""
    rng = torch.Generator().manual_seed(0)
    first = torch.randn(70_000, generator=rng)
    second = first + 1e-4 * torch.randn(70_000, generator=rng)
    layers = [[v[:3].clone(), None, v[3:].view(-1, 1).clone()] for v in (first, second)]
    expected = torch.stack([first, second]).double()
    torch.testing.assert_close(
        KeptGradients(["a", "b"], layers).gram(), expected @ expected.T, rtol=1e-13, atol=0
    )
