"""What a method remembers from round to round and a checkpoint would lose is noticed."""

from collections import deque

import numpy as np
import pytest
import torch
from reference import make_parts, plain_net, run_split

from flsplit.errors import ConfigError, NotEnoughClientsError
from flsplit.run import EarlyStopping, KeepBest, PrintMetrics
from flsplit.strategies import PSL

REMEMBERED = {
    "number": lambda count: count,
    "tensor": lambda count: torch.full((2,), float(count)),
    "array": lambda count: np.full(2, float(count)),
    "large array": lambda count: np.arange(5000) == 2000 + count,
    "large tensor": lambda count: torch.arange(5000) == 2000 + count,
    "NumPy number": lambda count: np.float64(count),
    "queue": lambda count: deque([count], maxlen=3),
    "arrays": lambda count: {"0": [np.full(2, float(count))]},
}


def remembering(make):
    """Return a method that remembers what ``make`` returns, from step to step."""

    class Remembering(PSL):
        def __init__(self, **options):
            super().__init__(**options)
            self.own = make(0)

        def step(self, step):
            self.own = make(step.round)
            super().step(step)

    return Remembering


@pytest.mark.parametrize("kind", REMEMBERED)
def test_what_changes_and_is_not_stored_is_refused(kind, tmp_path):
    cls = remembering(REMEMBERED[kind])
    with pytest.raises(ConfigError, match=r"Remembering remembers 'own' from round to round"):
        run_split(cls, plain_net, make_parts((4, 4)), checkpoint_dir=str(tmp_path))


@pytest.mark.parametrize("kind", REMEMBERED)
def test_what_stays_is_no_state(kind, tmp_path):
    value = REMEMBERED[kind](0)

    class Fixed(PSL):
        def __init__(self, **options):
            super().__init__(**options)
            self.own = value

    result = run_split(Fixed, plain_net, make_parts((4, 4)), checkpoint_dir=str(tmp_path))
    assert len(result.history) == 2


@pytest.mark.parametrize("layer", ["front", "middle"])
def test_a_buffer_that_changes_and_is_not_stored_is_refused(layer):
    """No example is given: the first batch of a client shows it, also where it is the server's."""

    class Steps(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.zeros(()), persistent=False)

        def forward(self, x):
            self.steps += 1
            return x + self.steps

    def build():
        net = plain_net()
        net.get_submodule(layer).append(Steps())
        return net

    with pytest.raises(NotEnoughClientsError, match=rf"changes '{layer}.2.steps'.*persistent"):
        run_split(PSL, build, make_parts((4,)))


@pytest.mark.parametrize("others", [[PrintMetrics()], [KeepBest("loss")]])
def test_a_callback_takes_up_its_own_state_wherever_it_stands(others, tmp_path):
    """One that is new begins anew, and does not read what another has left."""
    parts, folder = make_parts((4, 4)), {"checkpoint_dir": str(tmp_path)}
    first = EarlyStopping("train-loss", patience=2, mode="max")  # the first round's is the largest
    run_split(PSL, plain_net, parts, rounds=2, callbacks=[first], **folder)
    assert first.best_round == 1
    again = EarlyStopping("train-loss", patience=2, mode="max")
    callbacks = [*others, again]
    result = run_split(
        PSL, plain_net, parts, tests=parts, rounds=9, callbacks=callbacks, resume=True, **folder
    )
    assert (again.best, again.best_round) == (first.best, 1)
    assert len(result.history) == 3  # two rounds after the best one, of which one had been done
