"""What a carrier is asked before a run goes on over Flower's messages: if it is too slow."""

import pytest
from flwr.app import ConfigRecord
from reference import make_parts, plain_net, run_split

from flsplit.carry.carrier import Carrier
from flsplit.strategies import CSEFSL, PSL, SequentialSL

PARTS = make_parts((8, 8))  # 2 steps a round


@pytest.fixture
def asked(monkeypatch):
    """Return the numbers of exchanges that the carrier was asked about."""
    counts = []

    def check_speed(self, exchange_seconds, exchanges):
        assert exchange_seconds > 0
        counts.append(exchanges)

    monkeypatch.setattr(Carrier, "check_speed", check_speed)
    return counts


@pytest.mark.parametrize(
    ("strategy_class", "at_first", "after_a_round"),
    # Shapes are asked for once: the round that is measured has one exchange more than others.
    [(PSL, 3 * (3 + 1), 2 * 4), (SequentialSL, 3 * (2 * 3 + 1), 2 * 7), (CSEFSL, 3 * 2, 2 * 3)],
)
def test_all_exchanges_of_all_clients_count(strategy_class, at_first, after_a_round, asked):
    run_split(strategy_class, plain_net, PARTS, rounds=3)
    assert asked == [at_first, after_a_round]


def test_evaluation_counts_once_it_is_known(asked):
    start = {"evaluate_config": ConfigRecord({"batch-size": 4})}
    run_split(PSL, plain_net, PARTS, rounds=2, tests=make_parts((20, 8)), start=start)
    assert asked == [2 * (3 + 1), 3 + 5]


def test_without_evaluation(asked):
    run_split(PSL, plain_net, PARTS, rounds=2, fraction_evaluate=0.0)
    assert asked == [2 * 3, 3]


def test_a_resumed_run_is_asked_about_the_rounds_that_are_left(asked, tmp_path):
    options = {"checkpoint_dir": str(tmp_path), "fraction_evaluate": 0.0}
    run_split(PSL, plain_net, PARTS, rounds=2, **options)
    asked.clear()
    run_split(PSL, plain_net, PARTS, rounds=5, resume=True, **options)
    # LocalGrid keeps no state here: clients are asked to begin once more, with the segment.
    assert asked == [3 * 3, 2 * (3 + 1)]
