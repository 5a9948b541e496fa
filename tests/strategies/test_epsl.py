"""EPSL against its twin; φ=0 is PSL; the rows that are really back-propagated."""

from functools import partial

import pytest
import torch
from reference import (
    MOMENTUM,
    WrappedGrid,
    assert_bit_equal,
    make_parts,
    noisy_net,
    normed_net,
    plain_net,
    run_split,
    whole_of,
)
from torch import nn
from torch.nn import functional
from twins.epsl import epsl
from twins.loop import train_twin
from twins.recording import assert_same_steps, assert_same_weights, recorded

from flsplit.errors import ConfigError, DataError, NonFiniteError
from flsplit.run import ClientBatch
from flsplit.strategies import EPSL, PSL

SIZES = (8, 14, 11, 6)  # ragged batches, and clients that drop out: λ is renormalised


@pytest.mark.parametrize("aggregation", ["replay", "shared_delta"])
@pytest.mark.parametrize("phi", [0.25, 0.6, 1.0])
@pytest.mark.parametrize("build", [plain_net, normed_net])
def test_every_step_is_the_twins(build, phi, aggregation):
    parts, case = make_parts(SIZES, build), {"phi": phi, "aggregation": aggregation}
    answers, fronts, server = train_twin(epsl(**case), build, parts, optimizer=MOMENTUM)
    result, steps = recorded(
        EPSL, build, parts, optimizer=MOMENTUM, share_client_segments=True, **case
    )
    assert_same_steps(steps, answers)
    assert_same_weights(result, fronts, server)


@pytest.mark.parametrize("aggregation", ["replay", "shared_delta"])
def test_without_aggregation_it_is_psl_to_the_last_bit(aggregation):
    parts = make_parts(SIZES, noisy_net)
    options = {"optimizer": MOMENTUM, "share_client_segments": True}
    psl = run_split(PSL, noisy_net, parts, **options)
    result = run_split(EPSL, noisy_net, parts, phi=0.0, aggregation=aggregation, **options)
    assert result.history.numbers() == psl.history.numbers()
    for client in map(str, range(len(SIZES))):
        assert_bit_equal(whole_of(result, client), whole_of(psl, client))


@pytest.mark.parametrize("phi", [0.5, 1.0])
def test_with_and_without_cache_the_history_is_the_same(phi):
    parts = make_parts(SIZES, noisy_net)
    runs = [run_split(EPSL, noisy_net, parts, phi=phi, cache=cache) for cache in (True, False)]
    assert runs[0].history.numbers() == runs[1].history.numbers()


COUNTED = []


class Counting(nn.Module):
    """Counts the rows whose gradients come back through it."""

    def forward(self, x):
        if x.requires_grad:
            x.register_hook(lambda gradient: COUNTED.append(len(gradient)))
        return x


def counting_net():
    net = plain_net()
    net.middle = nn.Sequential(Counting(), *net.middle)
    return net


@pytest.mark.parametrize(("phi", "m"), [(0.0, 0), (0.1, 1), (0.3, 3), (0.5, 5), (1.0, 10)])
def test_only_m_plus_c_times_b_minus_m_rows_go_back(phi, m):
    """⌈φ·b⌉ of b = 10 positions; 0.3 · 10 is no more than 3."""
    clients, b, sample = 3, 10, 6 * 4
    parts, options = make_parts([b] * clients), {"rounds": 1, "batch_size": b, "phi": phi}
    # The first run in a process looks at the model, with backward passes of its own.
    run_split(EPSL, counting_net, parts, **options)
    COUNTED.clear()
    result = run_split(EPSL, counting_net, parts, **options)
    assert sum(COUNTED) == result.history[0].rows == m + clients * (b - m)
    logical = result.history[0].traffic.logical
    assert logical["gradients-down-broadcast"] == m * sample
    assert logical["gradients-down-unicast"] == clients * (b - m) * sample


def test_batchnorm_counts_a_step_once_and_sees_the_real_rows():
    parts = make_parts([4, 4], normed_net)
    options = {"rounds": 1, "share_client_segments": True, "local_steps": 1}
    epsl_run = whole_of(run_split(EPSL, normed_net, parts, phi=1.0, **options))
    psl_run = whole_of(run_split(PSL, normed_net, parts, **options))
    for key in psl_run:
        if key.startswith("middle") and ("running" in key or "tracked" in key):
            torch.testing.assert_close(epsl_run[key], psl_run[key])


def test_equal_rows_make_aggregation_exact():
    """Where all clients have the same row at a position, the mean activation is everybody's."""
    parts = [make_parts([1])[0]] * 3
    options = {"rounds": 3, "share_client_segments": True, "batch_size": 1}
    psl = whole_of(run_split(PSL, plain_net, parts, **options))
    for key, value in whole_of(run_split(EPSL, plain_net, parts, phi=1.0, **options)).items():
        torch.testing.assert_close(value, psl[key], rtol=1e-5, atol=1e-6)


class Losing(WrappedGrid):
    """Loses a client's answers from its second step on."""

    def send_and_receive(self, messages, *, timeout=None):
        replies = list(super().send_and_receive(messages, timeout=timeout))
        self.exchanges = getattr(self, "exchanges", 0) + 1
        if self.exchanges <= 2:  # describe, first step
            return replies
        return [one for one in replies if one.metadata.src_node_id != 3]


def test_a_client_that_is_lost_renormalises_the_shares():
    parts = make_parts((8, 8, 8))
    recorder_run, steps = recorded(EPSL, plain_net, parts, rounds=1, phi=0.5, wrap=Losing)
    assert recorder_run.history[0].left_out
    lost = recorder_run.history[0].left_out[0].client
    assert {len(step.cut_gradients) for step in steps} == {3, 2}
    for step in steps:
        if lost not in step.cut_gradients:
            assert step.rows == 2 + 2 * 2


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda o: EPSL(**o, phi=-0.1), "phi is -0.1"),
        (lambda o: EPSL(**o, phi=float("nan")), "phi is nan"),
        (lambda o: EPSL(**o, aggregation="sum"), "expected one of 'replay', 'shared_delta'"),
        (lambda o: EPSL(**o, server_pass="replay"), "EPSL has no argument 'server_pass'"),
        (lambda o: EPSL(**o, loss=functional.mse_loss), "the loss is mse_loss; use a classifier's"),
        (lambda o: EPSL(**o, loss=nn.L1Loss()), "the loss is L1Loss"),
        (lambda o: EPSL(**o, loss=nn.BCEWithLogitsLoss()), "the loss is BCEWithLogitsLoss"),
        (lambda o: EPSL(**o, loss=functional.kl_div), "the loss is kl_div"),
        (
            lambda o: EPSL(**o, loss=partial(partial(functional.gaussian_nll_loss), full=True)),
            "the loss is gaussian_nll_loss",
        ),
        (lambda o: EPSL(**o, server_batchnorm="per_client"), "EPSL takes 'pooled' only"),
    ],
)
def test_what_can_not_be_is_refused_at_construction(make, why):
    with pytest.raises(ConfigError, match=why):
        make({"model": plain_net(), "cut": "front"})


def test_a_loss_that_is_no_classifiers_names_client_round_and_step():
    parts = make_parts((4, 4))
    for part in parts:
        part.tensors = (part.tensors[0], functional.one_hot(part.tensors[1], 3).float())
    with pytest.raises(DataError, match=r"round 1, step 0: client '0': EPSL aggregates"):
        run_split(EPSL, plain_net, parts)


def test_a_gradient_that_is_not_finite_leaves_batchnorm_as_it_was():
    from tests.server.one_step import RecordedSegment, make_step

    segment = RecordedSegment(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)))
    before = [one.clone() for one in segment.module.buffers()]
    batches = [ClientBatch("a", torch.randn(4, 3), torch.zeros(4, dtype=torch.int64), 4)]
    step = make_step(segment, batches)
    real = step.forward(step.pooled())
    server_gradients, _ = step.backward(real, torch.full_like(real.outputs, float("nan")))
    with pytest.raises(NonFiniteError):
        step.update(server_gradients)
    assert all(torch.equal(a, b) for a, b in zip(before, segment.module.buffers(), strict=True))
