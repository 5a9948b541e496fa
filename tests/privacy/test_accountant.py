"""ε by hand and by the accountant's own composition; what is refused."""

import math

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from flsplit.client_parts import Clip, Int8, Noise, NoPeek
from flsplit.errors import ConfigError
from flsplit.privacy import epsilon, gaussian_epsilon

accounting = pytest.importorskip("dp_accounting")


def exact(ratio, delta):
    """Balle and Wang 2018, theorem 8: δ(ε) = Φ(1/2r - εr) - e^ε Φ(-1/2r - εr)."""

    def too_much(eps):
        low = norm.logcdf(-0.5 / ratio - eps * ratio)
        return norm.cdf(0.5 / ratio - eps * ratio) - math.exp(eps + low) - delta

    return brentq(too_much, 0, 500)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0, 4.0])
def test_epsilon_of_one_mechanism(ratio):
    found = gaussian_epsilon(ratio, 1e-5)
    assert found >= exact(ratio, 1e-5) - 1e-9  # it rounds up
    assert found == pytest.approx(exact(ratio, 1e-5), rel=1e-3)


def test_epsilon_of_several_is_the_accountants():
    """30 epochs of σ = 20 and C = 1 are 30 mechanisms of ratio 10."""
    accountant = accounting.pld.PLDAccountant()
    accountant.compose(
        accounting.SelfComposedDpEvent(accounting.GaussianDpEvent(noise_multiplier=10.0), 30)
    )
    parts = [Clip(1.0), Noise(20.0)]
    found = epsilon(parts, releases=30, delta=1e-5, adjacency="example")
    assert found == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-3)
    # Of a client with batches of 25 each step is 5 times as sensitive.
    both = epsilon([Clip(1.0), Noise(100.0)], releases=30, delta=1e-5, batch_size=25)
    assert both == pytest.approx(found, rel=1e-9)
    # Two values that are clipped apart are two mechanisms; a batch that is clipped as one is one.
    two = epsilon(parts, releases=15, delta=1e-5, adjacency="example", values=2)
    assert two == pytest.approx(found, rel=1e-9)
    one = epsilon([Clip(1.0, per="batch"), Noise(20.0)], releases=30, delta=1e-5)
    assert one == pytest.approx(found, rel=1e-9)


def test_the_example_in_the_documentation():
    """16 rows of sensitivity 2 in 20 steps: a ratio of 100 / (2 √320)."""
    found = epsilon([Clip(1.0), Noise(100.0)], releases=20, delta=1e-5, batch_size=16)
    assert found == pytest.approx(exact(100 / (2 * math.sqrt(320)), 1e-5), rel=1e-3)
    assert f"{found:.3f}" == "1.374"


def test_what_follows_the_noise_changes_nothing():
    plain = epsilon([Clip(1.0), Noise(9.0)], releases=1, delta=1e-5, adjacency="example")
    more = [NoPeek(0.1), Clip(1.0), Noise(9.0), Int8()]
    assert epsilon(more, releases=1, delta=1e-5, adjacency="example") == plain
    assert epsilon([Clip(1.0), Noise(0.0)], releases=1, delta=1e-5, batch_size=1) == math.inf


@pytest.mark.parametrize(
    ("parts", "options", "error"),
    [
        ([Noise(1.0)], {}, "given noise but not clipped"),
        ([Noise(1.0), Clip(1.0)], {}, "given noise but not clipped"),
        ([Clip(1.0, place="cut-gradient"), Noise(1.0)], {}, "given noise but not clipped"),
        ([Clip(1.0)], {}, "no client part adds noise"),
        ([Clip(1.0), Noise(1.0)], {}, "batch_size is missing"),
        ([Clip(1.0), Noise(1.0)], {"adjacency": "user"}, "adjacency is 'user'"),
        ([Clip(1.0), Noise(1.0)], {"batch_size": 1, "delta": 0.0}, "delta is 0.0"),
        ([Clip(1.0), Noise(1.0)], {"releases": 0}, "releases is 0"),
        ([Clip(1.0, per="batch"), Noise(1.0)], {"adjacency": "example"}, "clipping per sample"),
    ],
)
def test_what_is_refused(parts, options, error):
    with pytest.raises(ConfigError, match=error):
        epsilon(parts, **({"releases": 1, "delta": 1e-5} | options))
