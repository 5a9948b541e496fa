"""Server passes: each client's cut gradient, and the sum of server gradients."""

import pytest
import torch
from reference import fresh, noisy_net, normed_net, plain_net
from torch import nn
from torch.nn import functional

from flsplit.cut import split
from flsplit.server.passes import PER_CLIENT_GRADIENTS, PerClient, Pooled
from flsplit.server.segment import ServerSegment
from flsplit.server.step import ClientBatch, client_shares, loss_weights

CPU = torch.device("cpu")
SIZES = {"0": (2, 10), "1": (5, 70), "2": (3, 20)}  # rows of the batch, examples in all
PASSES = [Pooled(), PerClient(), PerClient(keep_gradients=True)]
PASS_IDS = ["pooled", "per-client", "per-client-kept"]


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


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shares", ["examples", "batch", "equal"])
@pytest.mark.parametrize("server_pass", PASSES, ids=PASS_IDS)
def test_each_client_gets_the_gradient_of_its_own_mean_loss(server_pass, shares, reduction):
    batches = batches_of(plain_net)
    weights = loss_weights(client_shares(batches, shares), reduction)
    result = server_pass(segment_of(plain_net), batches, weights)
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


def test_sharing_by_batch_is_the_mean_over_the_concatenated_rows():
    batches = batches_of(plain_net)
    result = Pooled()(segment_of(plain_net), batches, client_shares(batches, "batch"))
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
    result = Pooled()(segment, batches, weights)

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


def test_per_client_batchnorm_sees_one_client_after_the_other():
    batches, segment = batches_of(normed_net), segment_of(normed_net)
    result = PerClient()(segment, batches, client_shares(batches, "examples"))
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


def test_pooled_and_per_client_batchnorm_differ():
    """Else the two tests above would say little."""
    batches = batches_of(normed_net)
    weights = client_shares(batches, "equal")
    pooled = Pooled()(segment_of(normed_net), batches, weights)
    apart = PerClient()(segment_of(normed_net), batches, weights)
    assert not torch.allclose(pooled.cut_gradients["0"], apart.cut_gradients["0"], atol=1e-3)


@pytest.mark.parametrize("keep", [True, False])
def test_per_client_keeps_gradients_of_each_clients_own_loss_if_asked_to(keep):
    server_pass, batches = PerClient(keep_gradients=keep), batches_of(plain_net)
    result = server_pass(segment_of(plain_net), batches, client_shares(batches, "examples"))
    assert (PER_CLIENT_GRADIENTS in server_pass.provides) == keep
    assert set(result.client_server_gradients) == (set(SIZES) if keep else set())
    for batch in batches if keep else ():
        _, _, expected, _ = own_gradients(plain_net, batch)
        kept = result.client_server_gradients[batch.client]
        for found, gradient in zip(kept, expected, strict=True):
            torch.testing.assert_close(found, gradient)


@pytest.mark.parametrize("server_pass", PASSES, ids=PASS_IDS)
def test_a_pass_changes_neither_weights_nor_what_it_was_given(server_pass):
    """The segment's first operation, a ReLU in place, would else eat the smashed data."""
    batches, segment = batches_of(noisy_net), segment_of(noisy_net)
    smashed = [batch.smashed.clone() for batch in batches]
    weights = [p.detach().clone() for p in segment.parameters]
    server_pass(segment, batches, client_shares(batches, "equal"))
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


@pytest.mark.parametrize("server_pass", PASSES, ids=PASS_IDS)
def test_a_loss_that_does_not_depend_on_the_smashed_data_gives_zeros(server_pass):
    batches, segment = batches_of(plain_net), segment_of(ignoring_net)
    result = server_pass(segment, batches, client_shares(batches, "equal"))
    for batch in batches:
        assert torch.equal(result.cut_gradients[batch.client], torch.zeros_like(batch.smashed))
    assert [g is None for g in result.server_gradients].count(False) == 1
    before = [p.detach().clone() for p in segment.parameters]
    segment.step(result.server_gradients)
    moved = [not torch.equal(p, old) for p, old in zip(segment.parameters, before, strict=True)]
    assert moved.count(True) == 1
