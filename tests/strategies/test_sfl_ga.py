"""SFL-GA against its twin; the mean that is broadcast, by hand; where it is PSL; the ledger."""

import pytest
import torch
from reference import (
    MOMENTUM,
    assert_bit_equal,
    make_parts,
    noisy_net,
    normed_net,
    plain_net,
    run_split,
    whole_of,
)
from torch import Tensor
from twins.loop import train_twin
from twins.recording import assert_same_steps, assert_same_weights, recorded
from twins.sfl_ga import sfl_ga

from flsplit.errors import ConfigError
from flsplit.strategies import PSL, SFLGA
from flsplit.strategies.sfl_ga import broadcast_mean

SIZES = (8, 14, 11)  # 2, 4 and 3 mini-batches of up to 4, of which some are ragged
SHARE = {"share_client_segments": True}
SAMPLE = 6 * 4  # bytes of one row of smashed data


@pytest.mark.parametrize("build", [plain_net, normed_net])
def test_every_step_is_the_twins(build):
    parts = make_parts(SIZES, build)
    answers, fronts, server = train_twin(sfl_ga(), build, parts, optimizer=MOMENTUM)
    result, steps = recorded(SFLGA, build, parts, optimizer=MOMENTUM, **SHARE)
    assert len(steps) == 8
    assert_same_steps(steps, answers)
    assert_same_weights(result, fronts, server)


def means(shares, **gradients) -> dict[str, Tensor]:
    tensors = {name: torch.tensor(rows) for name, rows in gradients.items()}
    return broadcast_mean(tensors, dict(zip(gradients, shares, strict=True)))


def test_the_mean_of_equal_batches_is_the_papers():
    found = means((0.25, 0.75), a=[[4.0, 8.0], [0.0, 4.0]], b=[[8.0, 0.0], [4.0, -4.0]])
    assert found["a"].tolist() == found["b"].tolist() == [[7.0, 2.0], [3.0, -2.0]]


def test_the_mean_of_ragged_batches_is_of_what_they_have_per_sample():
    """Per sample: a has 2·[1, 3], b 1·[5], c 4·[2, 1, 0.5, 1.5].

    At position 0 the mean is 1/4·2 + 1/4·5 + 1/2·8, at position 1 that of a and c alone,
    (1/4·6 + 1/2·4) / (3/4), and from position 2 on c's own.
    """
    found = means((0.25, 0.25, 0.5), a=[[1.0], [3.0]], b=[[5.0]], c=[[2.0], [1.0], [0.5], [1.5]])
    first, second = 5.75, 14 / 3
    expected = {
        "a": [[first / 2], [second / 2]],
        "b": [[first]],
        "c": [[first / 4], [second / 4], [0.5], [1.5]],
    }
    assert found.keys() == expected.keys()
    for name, rows in expected.items():
        torch.testing.assert_close(found[name], torch.tensor(rows))


def test_rows_may_have_any_shape():
    found = means((0.5, 0.5), a=[[[2.0, 0.0]]], b=[[[1.0, 1.0]], [[3.0, 5.0]]])
    assert found["a"].tolist() == [[[2.0, 1.0]]]  # (2 + 2·1) / 2, (0 + 2·1) / 2
    assert found["b"].tolist() == [[[1.0, 0.5]], [[3.0, 5.0]]]


def test_all_clients_step_alike_where_batches_are_equal():
    _, steps = recorded(SFLGA, plain_net, make_parts((8, 8, 8)), rounds=1)
    for step in steps:
        first, *others = step.cut_gradients.values()
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("build", [plain_net, noisy_net])
def test_one_client_alone_is_psl_to_the_last_bit(build):
    parts, options = make_parts((12,), build), {"optimizer": MOMENTUM, **SHARE}
    found, psl = (run_split(kind, build, parts, **options) for kind in (SFLGA, PSL))
    assert_bit_equal(whole_of(found), whole_of(psl))
    assert [e.loss for e in found.history] == [e.loss for e in psl.history]


def test_the_mean_is_broadcast_once():
    parts, steps, b = make_parts((12, 12, 12)), 3, 4
    (entry,) = run_split(SFLGA, plain_net, parts, rounds=1).history
    (psl,) = run_split(PSL, plain_net, parts, rounds=1).history
    logical = entry.traffic.logical
    assert logical["activations-up"] == 3 * steps * b * SAMPLE
    assert logical["gradients-down-broadcast"] == steps * b * SAMPLE
    assert logical["gradients-down-unicast"] == 0
    assert psl.traffic.logical["gradients-down-unicast"] == 3 * steps * b * SAMPLE
    assert entry.rows == psl.rows == 36


def test_of_ragged_batches_the_longest_is_broadcast():
    """4, 4, 4 and 2 rows: the client with 14 examples has the longest batch in each step."""
    (entry,) = run_split(SFLGA, plain_net, make_parts(SIZES), rounds=1).history
    assert entry.traffic.logical["gradients-down-broadcast"] == 14 * SAMPLE
    assert entry.traffic.logical["gradients-down-unicast"] == 0
    assert entry.rows == sum(SIZES)


def test_with_and_without_cache_the_history_is_the_same():
    parts = make_parts(SIZES, noisy_net)
    runs = [run_split(SFLGA, noisy_net, parts, cache=cache) for cache in (True, False)]
    assert runs[0].history.numbers() == runs[1].history.numbers()


@pytest.mark.parametrize("name", ["rules", "server_pass", "phi"])
def test_what_it_does_not_have_is_refused(name):
    with pytest.raises(ConfigError, match=f"SFLGA has no argument '{name}'"):
        SFLGA(model=plain_net(), cut="front", **{name: 1})
