"""Strategies and client parts of another package, found by name in a run config."""

import pytest
from flwr.app import ArrayRecord
from reference import CUT, fresh, make_parts, plain_net, split_app

from flsplit import LocalGrid
from flsplit.errors import ConfigError
from flsplit.run import ParallelStrategy, make_strategy
from tests.packages import installed

STRANGER = '''
from flsplit.client_parts import ClientPart
from flsplit.run import ParallelStrategy
from flsplit.strategies import PSL


class Timid(PSL):
    """PSL whose server takes small steps."""

    def __init__(self, courage: float = 0.5, **options):
        super().__init__(**options)
        self.courage, self.taken = courage, 0

    def step(self, step):
        found = step.gradients()
        self.taken += 1
        step.update([None if g is None else g * self.courage for g in found.server_gradients])
        step.reply(found.cut_gradients)
        step.record({"steps-taken": self.taken})


class Cyclic(ParallelStrategy):
    """The server learns from everybody's rows, mixed, before it says anything."""

    def __init__(self, courage: float = 0.5, *, half_batch=16, **options):
        super().__init__(**options)
        self.courage, self.half_batch = courage, half_batch

    def step(self, step):
        for rows in step.shuffled_rows(2 * self.half_batch):
            step.update(step.gradients(rows), lr_factor=self.courage)
        step.reply(step.gradients(per_client=True).cut_gradients)


class Halve(ClientPart):
    """Halves the cut-layer gradient, or takes another part of it."""

    name = "halve"

    def __init__(self, factor: float = 0.5):
        self.factor = factor

    def cut_gradient(self, where, gradient):
        return gradient * self.factor
'''
ENTRY_POINTS = """
[flsplit.strategies]
timid = stranger_split:Timid
cyclic = stranger_split:Cyclic
[flsplit.client_parts]
halve = stranger_split:Halve
not-a-part = stranger_split:Timid
"""


@pytest.fixture
def stranger(tmp_path):
    with installed(tmp_path, "stranger_split", STRANGER, ENTRY_POINTS):
        yield


def make(name, args="{}", **options):
    return make_strategy(name, args, model=fresh(plain_net), cut=CUT, device="cpu", **options)


def run(strategy):
    app = split_app(plain_net, make_parts((8, 8)))
    return strategy.start(
        LocalGrid(app, 2, progress=False), ArrayRecord(fresh(plain_net).state_dict()), 1
    )


def test_a_strangers_strategy_and_part_take_parameters_of_their_own(stranger):
    timid = make("timid", "{courage = 0.25, batch-size = 4}")
    assert timid.courage == 0.25
    one = run(timid)
    assert one.history[0].metrics["steps-taken"] == 1.5
    # Plain SGD: a factor is as good as another learning rate.
    rated = run(make("psl", "{batch-size = 4, server-lr = 0.0025, client-lr = 0.01}"))
    assert one.history[0].loss == pytest.approx(rated.history[0].loss, rel=1e-6)
    halved = run(make("psl", '{batch-size = 4, client-parts = [{name = "halve", factor = 0.25}]}'))
    rated = run(make("psl", "{batch-size = 4, client-lr = 0.0025}"))
    assert halved.history[0].loss == pytest.approx(rated.history[0].loss, rel=1e-6)


def test_a_strangers_method_built_on_the_step_alone(stranger):
    rates = "client-lr = 0.1, batch-size = 4"
    cyclic = make("cyclic", f"{{courage = 0.25, half-batch = 2, server-lr = 0.2, {rates}}}")
    assert isinstance(cyclic, ParallelStrategy)
    assert (cyclic.courage, cyclic.half_batch) == (0.25, 2)
    # A quarter of 0.2 is 0.05, also in floating point: the same to the last bit.
    found = run(cyclic).history.numbers()
    other = make("cyclesl", f"{{server-batch-size = 4, server-lr = 0.05, {rates}}}")
    assert found == run(other).history.numbers()
    bold = make("cyclic", f"{{courage = 1, half-batch = 2, server-lr = 0.2, {rates}}}")
    assert found != run(bold).history.numbers()
    with pytest.raises(ConfigError, match="'cyclic' has no argument 'rules'"):
        make("cyclic", "{rules = []}")


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ('{rules = ["split-lr"]}', "strategy 'psl' has no argument 'rules'"),
        ('{server-pass = "replay"}', "strategy 'psl' has no argument 'server_pass'"),
        ('{client-parts = ["clap"]}', "there is no client part 'clap'"),
        ('{client-parts = [{factor = 0.5}]}', "client part is {'factor': 0.5}, expected a name"),
        ('{client-parts = "halve"}', "client-parts is 'halve', expected a list as"),
        ('{client-parts = [{name = "halve", facto = 1}]}', "facto"),
        ('{client-parts = ["not-a-part"]}', "not-a-part"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_refused_with_the_reason(stranger, args, why):
    with pytest.raises(ConfigError, match=why):
        make("psl", args)


def test_every_preset_is_found_by_name():
    for name, args in {
        "sglr": "{phi = 0.5, alpha = 1.0, client-lr = 0.1}",
        "epsl": "{phi = 0.5, aggregation = 'shared_delta'}",
        "gapsl": "{eta = -1.0, low-memory = true}",
        "cyclesl": "{server-epochs = 2, server-batch-size = 8}",
        "sfl-ga": "{}",
    }.items():
        assert isinstance(make(name, args), ParallelStrategy)
