"""SGLR against its twin, and what its ledger says."""

import pytest
from flwr.app import ArrayRecord, ConfigRecord
from reference import MOMENTUM, make_parts, normed_net, plain_net, run_split, split_app
from torch.optim import SGD
from twins.loop import train_twin
from twins.recording import assert_same_steps, assert_same_weights, recorded
from twins.sglr import sglr

from flsplit import LocalGrid
from flsplit.errors import ConfigError
from flsplit.strategies import EPSL, PSL, SGLR
from flsplit.strategies.sglr import averaged

SIZES = (8, 14, 11, 6)  # 2 to 4 mini-batches of up to 4: ragged ones, and clients that drop out
CASES = [
    {"phi": 0.0, "alpha": 0.0},
    {"phi": 0.5, "alpha": 0.5},
    {"phi": 1.0, "alpha": 1.0},
    {"phi": 0.75, "alpha": 2.0, "phases": (0.0, 0.6)},
    {"phi": 1.0, "alpha": 0.0, "phases": (0.6, 1.0)},
    {"phi": 0.5, "alpha": 0.5, "averaging": "position_sum"},
    {"phi": 0.5, "alpha": 0.5, "averaging": "batch_mean"},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_step_is_the_twins(case):
    parts, options = make_parts(SIZES), {"optimizer": MOMENTUM, "rounds": 2}
    answers, fronts, server = train_twin(sglr(**case), plain_net, parts, **options)
    result, steps = recorded(SGLR, plain_net, parts, share_client_segments=True, **options, **case)
    assert_same_steps(steps, answers, "cut-gradient-averaging.")
    assert_same_weights(result, fronts, server)


def test_batchnorm_sees_all_rows_at_once():
    parts, case = make_parts(SIZES, normed_net), {"phi": 0.5, "alpha": 0.5}
    answers, fronts, server = train_twin(sglr(**case), normed_net, parts, optimizer=SGD)
    result, steps = recorded(SGLR, normed_net, parts, share_client_segments=True, **case)
    assert_same_steps(steps, answers, "cut-gradient-averaging.")
    assert_same_weights(result, fronts, server)


def test_one_client_at_a_time_gives_the_same_where_no_batchnorm_is():
    parts, case = make_parts(SIZES), {"phi": 0.5, "alpha": 0.5}
    answers, fronts, server = train_twin(sglr(**case), plain_net, parts, optimizer=SGD)
    result, steps = recorded(
        SGLR, plain_net, parts, share_client_segments=True, server_batchnorm="per_client", **case
    )
    assert_same_steps(steps, answers, "cut-gradient-averaging.")
    assert_same_weights(result, fronts, server)


def test_without_both_it_is_psl():
    parts = make_parts(SIZES)
    sglr_run = run_split(SGLR, plain_net, parts, phi=0.0, alpha=0.0)
    psl_run = run_split(PSL, plain_net, parts, shares="batch")
    for one, other in zip(sglr_run.history, psl_run.history, strict=True):
        assert one.numbers() | {"metrics": {}} == other.numbers()


def test_with_and_without_cache_the_history_is_the_same():
    runs = [run_split(SGLR, normed_net, make_parts(SIZES, normed_net), cache=c) for c in (1, 0)]
    assert runs[0].history.numbers() == runs[1].history.numbers()


@pytest.mark.parametrize("phi", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("averaging", ["position_mean", "batch_mean"])
def test_the_ledger_has_the_papers_table_6(phi, averaging):
    """(2 - φ) D S(L) + S(L) of D rows: up D, down (1 - φ) D and what is broadcast.

    The paper's S(L) for the broadcast is one sample's size in the reading ``batch_mean``, a
    mini-batch's in the reading ``position_mean``.
    """
    clients, steps, b, sample = 4, 3, 4, 6 * 4  # bytes of one row of smashed data
    parts = make_parts([steps * b] * clients)
    result = run_split(SGLR, plain_net, parts, rounds=1, phi=phi, averaging=averaging)
    logical, rows = result.history[0].traffic.logical, clients * steps * b
    shared = steps * (b if averaging == "position_mean" else 1) if phi else 0
    assert logical["activations-up"] == rows * sample
    assert logical["gradients-down-unicast"] == (1 - phi) * rows * sample
    assert logical["gradients-down-broadcast"] == shared * sample
    down = logical["gradients-down-unicast"] + logical["gradients-down-broadcast"]
    assert logical["activations-up"] + down == ((2 - phi) * rows + shared) * sample


def test_the_servers_rate_follows_the_clients_in_the_step():
    """8 and 4 examples: in the second step one client is alone."""
    result = run_split(SGLR, plain_net, make_parts((8, 4)), rounds=1, phi=0.0, alpha=2.0)
    assert result.history[0].metrics["split-lr.factor"] == (4.0 + 1.0) / 2


def test_client_lr_is_the_rate_of_both():
    options = {"model": plain_net(), "cut": "front"}
    assert SGLR(**options, client_lr=0.2).options.server_lr == 0.2
    assert SGLR(**options, server_lr=0.2).options.server_lr == 0.2
    with pytest.raises(ConfigError, match=r"server_lr is 0\.1 and client_lr 0\.2: SGLR"):
        SGLR(**options, client_lr=0.2, server_lr=0.1)


def test_a_rate_for_the_clients_alone_is_refused():
    strategy = SGLR(model=plain_net(), cut="front", client_lr=lambda t: 0.2 / t, device="cpu")

    def start(**config):
        grid = LocalGrid(split_app(plain_net, make_parts((8, 8))), 2, progress=False)
        arrays = ArrayRecord(plain_net().state_dict())
        return strategy.start(grid, arrays, num_rounds=2, train_config=ConfigRecord(config))

    assert len(start(**{"batch-size": 4}).history) == 2
    with pytest.raises(ConfigError, match=r"lr is 0\.05 and SGLR's client_lr 0\.2.*leave lr out"):
        start(lr=0.05)


def test_papers_can_be_combined():
    """SGLR's averaging is a function: a method of one's own puts it on top of EPSL."""

    class Both(EPSL):
        def step(self, step):
            reply = step.reply

            def averaged_reply(cut_gradients, *, shared_rows):
                active = step.clients[:2]
                shared = averaged(cut_gradients, active, "position_mean")
                rows = shared_rows | {client: len(g) for client, g in shared.items()}
                reply(cut_gradients | shared, shared_rows=rows)

            step.reply = averaged_reply
            super().step(step)

    result = run_split(Both, plain_net, make_parts([8] * 4), rounds=1, phi=0.5)
    logical, sample = result.history[0].traffic.logical, 6 * 4
    # Two steps: two clients share 4 rows; the other two share 2 of them and have 2 of their own.
    assert logical["gradients-down-broadcast"] == 2 * 4 * sample
    assert logical["gradients-down-unicast"] == 2 * 2 * 2 * sample


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda o: SGLR(**o, phi=1.5), "phi is 1.5, expected a finite number at least 0 and at"),
        (lambda o: SGLR(**o, phi="half"), "phi is 'half'"),
        (lambda o: SGLR(**o, alpha=-1), "alpha is -1, expected a finite number at least 0"),
        (lambda o: SGLR(**o, averaging="mean"), "expected one of 'position_mean'"),
        (lambda o: SGLR(**o, phases=(0.6, 0.2)), "expected a start before the end"),
        (lambda o: SGLR(**o, phases=0.6), "expected a pair"),
        (lambda o: SGLR(**o, phases=(0, 2)), "phases, end is 2"),
        (lambda o: SGLR(**o, rules=[]), "SGLR has no argument 'rules'"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_refused_at_construction(make, why):
    with pytest.raises(ConfigError, match=why):
        make({"model": plain_net(), "cut": "front"})
