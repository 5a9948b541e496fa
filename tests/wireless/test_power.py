import numpy as np
import pytest
from scipy.optimize import minimize

from flsplit.wireless.power import (
    EVEN,
    WATER,
    Basin,
    Deadline,
    carried_bits,
    control_power,
    scaled_budgets,
)


def floors(*watts):
    return 1.0 / np.array([watts], dtype=float)


def test_water_filling_by_hand():
    # floors of 4, 1, 2 W and 3 W of water: the level is (3 + 1 + 2) / 2 = 3 W
    snr, owned = floors(4, 1, 2), np.ones((1, 3), dtype=bool)
    powers = WATER.powers(snr, owned, np.array([3.0]))
    assert powers == pytest.approx(np.array([[0.0, 2.0, 1.0]]))
    bits = np.log2(3.0) + np.log2(1.5)
    assert WATER.bits(snr, owned, np.array([3.0])) == pytest.approx([bits])
    assert carried_bits(snr, powers) == pytest.approx([bits])
    assert Basin(snr, owned).carry(np.array([bits])) == pytest.approx(powers)


def test_the_sum_of_powers_is_that_of_the_powers():
    rng = np.random.default_rng(0)
    for _ in range(50):
        owned = rng.random((4, 9)) < 0.6
        owned[:, 0] = True
        basin = Basin(np.exp(rng.normal(0, 3, (4, 9))), owned)
        bits = rng.exponential(5.0, 4)
        assert basin.carry_together(bits) == pytest.approx(basin.carry(bits).sum())


def test_powers_too_small_to_count_are_no_error():
    owned = np.eye(2, dtype=bool)
    deadline = Deadline(1.0, np.zeros(2), 1.0)
    powers = control_power(np.full((2, 2), 1e-15), owned, np.ones(2), 1.0, 1.0, [deadline])
    assert (powers >= 0).all()


def test_what_is_not_owned_gets_nothing():
    owned = np.array([[True, False, True]])
    powers = WATER.powers(floors(4, 1, 2), owned, np.array([4.0]))  # level (4 + 4 + 2) / 2
    assert powers == pytest.approx(np.array([[1.0, 0.0, 3.0]]))


def test_even_spread_by_hand():
    # 1.5 W on each of floors 1 and 3: log2(2.5) + log2(1.5)
    owned = np.array([[True, True, False]])
    bits = EVEN.bits(floors(1, 3, 9), owned, np.array([3.0]))
    assert bits == pytest.approx([np.log2(2.5) + np.log2(1.5)])


def test_scaled_budgets():
    assert list(scaled_budgets(np.array([1.0, 3.0]), 2.0)) == [0.5, 1.5]
    assert list(scaled_budgets(np.array([1.0, 3.0]), 9.0)) == [1.0, 3.0]


def test_a_deadline_by_hand():
    deadline = Deadline(1.0, np.array([1.0, 3.0]), 8.0)
    assert deadline.seconds(np.array([4.0, 2.0])) == 7.0  # 1 + 8 / 4 and 3 + 8 / 2
    assert list(deadline.needed_bps(5.0)) == [2.0, 4.0]  # 8 bits in 4 and in 2 s
    assert list(deadline.needed_bps(3.0)) == [4.0, np.inf]


def test_control_by_hand():
    """Two devices with floors of 1 W, 1 bit each, at 1 Hz; all together 2 W.

    Without waiting each would get 1 W and carry log2(2) = 1 bit/s, so 1 s. Device 0 has computed
    for 0.5 s: at T = 1.5 s it needs 1 bit/s (1 W), device 1 only 2/3 bit/s.
    """
    snr, owned = np.eye(2), np.eye(2, dtype=bool)
    even = Deadline(1.0, np.zeros(2), 1.0)
    powers = control_power(snr, owned, np.full(2, 5.0), 2.0, 1.0, [even])
    assert powers == pytest.approx(np.eye(2))
    late = Deadline(1.0, np.array([0.5, 0.0]), 1.0)
    powers = control_power(snr, owned, np.array([1.0, 5.0]), 2.0, 1.0, [late])
    assert powers == pytest.approx(np.diag([1.0, 2 ** (2 / 3) - 1]))


def instance(seed, *, deadlines=1):
    rng = np.random.default_rng(seed)
    devices = int(rng.integers(2, 5))
    subchannels = int(rng.integers(devices, 9))
    owner = np.concatenate([np.arange(devices), rng.integers(devices, size=subchannels - devices)])
    owned = owner[None] == np.arange(devices)[:, None]
    snr = rng.exponential(size=owned.shape) * 10 ** rng.uniform(0, 2, size=(devices, 1))
    budget = rng.uniform(0.5, 2.0, size=devices)
    total = float(budget.sum() * rng.uniform(0.3, 1.2))
    parts = [
        Deadline(rng.uniform(0.5, 2), rng.uniform(0, 1, size=devices), rng.uniform(1, 10))
        for _ in range(deadlines)
    ]
    return snr, owned, budget, total, parts


def objective(snr, powers, parts):
    rates = carried_bits(snr, powers)
    return sum(part.weight * part.seconds(rates) for part in parts)


def solved_generally(snr, owned, budget, total, parts):
    """Minimise the same with SLSQP: over powers and the parts' times, with exact derivatives."""
    device, channel = np.nonzero(owned)
    gain = snr[device, channel]
    count, kinds = len(device), len(parts)
    membership = (device[None] == np.arange(len(budget))[:, None]).astype(float)
    weights = np.concatenate([np.zeros(count), [part.weight for part in parts]])

    def rates(x):
        return membership @ np.log2(1 + x[:count] * gain)

    def slack(x):
        r = rates(x)
        return np.concatenate(
            [x[count + g] - part.fixed_s - part.bits / r for g, part in enumerate(parts)]
        )

    def slack_gradient(x):
        r = rates(x)
        by_power = membership * (gain / (1 + x[:count] * gain) / np.log(2))
        blocks = []
        for g, part in enumerate(parts):
            times = np.zeros((len(budget), kinds))
            times[:, g] = 1.0
            blocks.append(np.hstack([by_power * (part.bits / r**2)[:, None], times]))
        return np.vstack(blocks)

    limits = np.vstack([membership, np.ones(count)])
    limits = np.hstack([limits, np.zeros((len(limits), kinds))])
    caps = np.append(budget, total)
    start = (scaled_budgets(budget, total) / owned.sum(axis=1))[device]
    first = [part.seconds(membership @ np.log2(1 + start * gain)) for part in parts]
    result = minimize(
        lambda x: weights @ x,
        np.concatenate([start, first]),
        jac=lambda x: weights,
        method="SLSQP",
        bounds=[(0, None)] * count + [(0, None)] * kinds,
        constraints=[
            {"type": "ineq", "fun": slack, "jac": slack_gradient},
            {"type": "ineq", "fun": lambda x: caps - limits @ x, "jac": lambda x: -limits},
        ],
        options={"maxiter": 500, "ftol": 1e-13},
    )
    return float(result.fun)


@pytest.mark.filterwarnings("ignore:divide by zero")  # the solver also tries rates of zero
@pytest.mark.parametrize(("deadlines", "seeds"), [(1, range(200)), (2, range(1000, 1040))])
def test_control_is_what_a_general_solver_finds(deadlines, seeds):
    """Within 1e-6, relative; powers within their budgets."""
    worst = 0.0
    for seed in seeds:
        snr, owned, budget, total, parts = instance(seed, deadlines=deadlines)
        powers = control_power(snr, owned, budget, total, 1.0, parts)
        assert (powers.sum(axis=1) <= budget * (1 + 1e-9)).all()
        assert powers.sum() <= total * (1 + 1e-9)
        assert (powers[~owned] == 0).all()
        ours = objective(snr, powers, parts)
        generally = solved_generally(snr, owned, budget, total, parts)
        worst = max(worst, abs(ours / generally - 1))
    assert worst < 1e-6
