"""Seeds: the same for ever, independent of each other, and without a trace outside."""

import itertools
import random

import numpy as np
import pytest
import torch

from flsplit.seeds import derive_seed, generator, seeded, set_aside


def draw() -> tuple[float, ...]:
    return (
        torch.rand(1).item(),
        random.random(),
        random.gauss(0, 1),  # keeps a second number for the next call
        float(np.random.rand()),  # noqa: NPY002 - the state that must be restored
        float(np.random.randn()),  # noqa: NPY002
    )


# --- derive_seed -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ((), 4_761_921_975_702_974_394),
        (("client", "3", 1, 0), 3_338_918_008_020_489_009),
        (("data", "0", 7), 1_490_355_525_968_619_968),
        (("Universität ½", -1), 8_769_015_479_011_078_914),
    ],
)
def test_seeds_are_the_same_for_ever(labels, expected):
    """Another value would change every run that anybody ever wrote down."""
    assert derive_seed(0, *labels) == expected


def test_a_seed_fits_torch_and_flower():
    seeds = [derive_seed(run, "x", index) for run in range(20) for index in range(100)]
    assert len(set(seeds)) == 2000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert min(seeds) < 2**59  # the whole range is used
    assert max(seeds) > 2**63 - 2**59


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((0, "a"), (1, "a")),
        ((0, "a"), (0, "b")),
        ((0, "a", 1), (0, "a", 2)),
        ((0, "a", 1), (0, "a")),
        ((0, "a", 1, 2), (0, "a", 2, 1)),
        ((0, "a", 1, 11), (0, "a", 11, 1)),
        ((0, 1, 1), (0, 11)),
        ((0, "1", "2"), (0, "12")),
        ((0, "", "a"), (0, "a", "")),
        ((1, "2"), (12,)),
    ],
)
def test_different_labels_give_different_seeds(one, other):
    assert derive_seed(*one) != derive_seed(*other)


def test_a_number_and_its_digits_are_the_same_label():
    assert derive_seed(0, "client", 3) == derive_seed(0, "client", "3")


def test_neighbouring_seeds_give_numbers_that_have_nothing_to_do_with_each_other():
    def numbers(*labels):
        return torch.randn(4000, generator=generator(0, *labels))

    drawn = [numbers("client", "0", index) for index in range(6)] + [numbers("server", "0", 0)]
    for one, other in itertools.combinations(drawn, 2):
        assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.08


def test_a_generator_draws_the_same_again():
    first = torch.randn(5, generator=generator(3, "x"))
    assert torch.equal(first, torch.randn(5, generator=generator(3, "x")))
    assert not torch.equal(first, torch.randn(5, generator=generator(3, "y")))


# --- seeded ----------------------------------------------------------------------------------


def test_inside_all_three_draw_from_the_seed():
    with seeded(5):
        first = draw()
    with seeded(5):
        again = draw()
    with seeded(6):
        other = draw()
    assert first == again
    assert all(one != two for one, two in zip(first, other, strict=True))


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**32, 2**63 - 1])
def test_any_seed_will_do(seed):
    with seeded(seed):
        first = draw()
    with seeded(seed):
        assert draw() == first


@pytest.fixture
def restart():
    """Bring all three generators to a known state; afterwards they are as they were."""

    def bring():
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002

    torch_state, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    yield bring
    torch.set_rng_state(torch_state)
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002


def use_and_fail():
    with seeded(5):
        draw()
        raise KeyError


def test_outside_everything_goes_on_as_if_it_had_not_been(restart):
    restart()
    expected = [draw(), draw()]
    restart()
    found = [draw()]
    with seeded(5):
        draw()
    assert [*found, draw()] == expected


def test_outside_everything_goes_on_after_an_exception_too(restart):
    restart()
    expected = [draw(), draw()]
    restart()
    found = [draw()]
    with pytest.raises(KeyError):
        use_and_fail()
    assert [*found, draw()] == expected


def test_gpus_that_nothing_is_computed_on_are_left_alone(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    with seeded(5):
        draw()
    assert seeds == []


def test_blocks_nest():
    with seeded(1):
        expected = [draw(), draw()]
    with seeded(1):
        found = [draw()]
        with seeded(2):
            draw()
        found.append(draw())
    assert found == expected


def test_blocks_inside_one_that_sets_outer_numbers_aside_leave_no_trace_outside(restart):
    restart()
    expected = [draw(), draw()]
    with seeded(5):
        seeds = draw()
    restart()
    found = [draw()]
    with set_aside():
        for _ in range(2):
            with seeded(5):
                assert draw() == seeds
        with set_aside(), seeded(6):
            draw()
    found.append(draw())
    assert found == expected


def test_a_block_in_a_block_goes_on_also_where_outer_numbers_are_set_aside():
    with seeded(1):
        expected = [draw(), draw()]
    with set_aside(), seeded(1):
        found = [draw()]
        with seeded(2):
            draw()
        found.append(draw())
    assert found == expected
