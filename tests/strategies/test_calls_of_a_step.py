"""How long the way of a step is: counted, since times on a busy machine tell little."""

import collections
import sys
from pathlib import Path

from reference import make_parts, plain_net, run_split
from torch.optim import SGD

import flsplit
import flsplit.strategies
from flsplit.strategies import PSL

OURS = tuple(str(Path(one.__file__).resolve().parent) for one in (flsplit, flsplit.strategies))
MOST = 149


def test_a_step_of_one_client_takes_few_calls():
    """Counted from the server's third step to its fourth: by then all is known."""
    codes, steps, before = [], [], sys.getprofile()

    class Noting(SGD):
        def step(self, closure=None):
            steps.append(None)
            if len(steps) == 3:
                sys.setprofile(
                    lambda frame, event, _: event == "call" and codes.append(frame.f_code)
                )
            elif len(steps) == 4:
                sys.setprofile(before)
            return super().step(closure)

    try:
        run_split(
            PSL, plain_net, make_parts((48,)), rounds=1, fraction_evaluate=0.0,
            server_optimizer=Noting,
        )  # fmt: skip
    finally:
        sys.setprofile(before)
    ours = [one for one in codes if str(Path(one.co_filename).resolve()).startswith(OURS)]
    assert 100 < len(ours) <= MOST, collections.Counter(map(str, ours)).most_common()
