"""Strategies by name, those of other packages included."""

import pytest
from flwr.serverapp.strategy import FedAvg
from reference import CUT, make_parts, plain_net
from tampering import set_up, train

from flsplit.errors import ConfigError
from flsplit.run import make_strategy, strategy_names
from flsplit.strategies import PSL, SequentialSL, SplitFedV1, SplitFedV2
from tests.packages import installed

OWN = {
    "psl": PSL,
    "splitfed-v1": SplitFedV1,
    "splitfed-v2": SplitFedV2,
    "sequential-sl": SequentialSL,
}

STRANGER = '''
from flsplit.strategies import PSL


class Lazy(PSL):
    """PSL with a server that only learns in every n-th step."""

    def __init__(self, patience: int = 2, *, mood="calm", **options):
        super().__init__(**options)
        self.patience, self.mood = patience, mood

    def step(self, step):
        found = step.gradients()
        step.update(found, lr_factor=0.0 if step.index % self.patience else 1.0)
        step.reply(found.cut_gradients)


def not_a_strategy():
    """No class at all."""
'''


def make(name, strategy_args="{}", **options):
    return make_strategy(name, strategy_args, model=plain_net(), cut=CUT, **options)


ENTRY_POINTS = """
[flsplit.strategies]
lazy = lazy_split:Lazy
lazy-function = lazy_split:not_a_strategy
lazy-module = lazy_split
"""


@pytest.fixture
def stranger(tmp_path):
    with installed(tmp_path, "lazy_split", STRANGER, ENTRY_POINTS):
        yield


# --- by name ---------------------------------------------------------------------------------


def test_the_own_strategies_are_there_by_name():
    assert set(OWN) <= set(strategy_names())
    for name, cls in OWN.items():
        assert type(make(name)) is cls


def test_arguments_come_from_the_table_before_those_of_the_call():
    strategy = make("psl", "{batch-size = 7, client_lr = 0.5}", batch_size=3, seed=9)
    options = strategy.options
    assert (options.batch_size, options.client_lr, options.seed) == (7, 0.5, 9)


def test_no_arguments_are_an_empty_table():
    assert make("psl", "").options.batch_size == make("psl", "{}").options.batch_size == 32


def test_an_argument_of_the_strategy_itself():
    strategy = make("splitfed-v1", server_strategy=FedAvg())
    assert strategy.server_aggregator is not None


def test_a_strategy_in_capitals_is_nearest_to_its_name():
    with pytest.raises(ConfigError, match="no strategy 'PSL'; did you mean 'psl'"):
        make_strategy("PSL")


def test_an_unknown_strategy_names_the_nearest_and_all_others():
    with pytest.raises(ConfigError, match="no strategy 'splitfed'; did you mean 'splitfed") as no:
        make("splitfed")
    for name in OWN:
        assert name in str(no.value)
    with pytest.raises(ConfigError, match=r"there is no strategy 'xyzzy' \(there are "):
        make("xyzzy")
    with pytest.raises(ConfigError, match="there is no strategy 5"):
        make(5)


def test_an_unknown_argument_names_the_nearest():
    expected = r"strategy 'psl' has no argument 'batchsize'; did you mean 'batch_size'\?"
    with pytest.raises(ConfigError, match=expected):
        make("psl", "{batchsize = 3}")
    with pytest.raises(ConfigError, match="strategy 'psl' has no argument 'server_strategy'"):
        make("psl", server_strategy=FedAvg())


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("{batch_size: 3}", "not TOML"),
        ("{batch_size = 3", "not TOML"),
        ("batch_size = 3", "not TOML"),
        ("True", "not TOML"),
        ("3", r"strategy-args is '3', expected a table as '\{phi = 0\.5\}'"),
        ("[1, 2]", "expected a table"),
        ("'{}'", "expected a table"),
        ("{}\nbatch_size = 3", "expected a table"),
        (3, "strategy-args is 3, expected a table"),
    ],
)
def test_arguments_that_are_no_table(table, said):
    with pytest.raises(ConfigError, match=said):
        make("psl", table)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("{batch-size = 2.5}", "batch_size is 2.5, expected a whole number"),
        ("{server-lr = '0.1'}", "server_lr is '0.1', expected a finite number"),
        ("{drop-last = 'no'}", "drop_last is 'no', expected an object of type bool"),
        ("{loss = 'mse'}", "loss is 'mse', expected something to call"),
        ("{model = 'resnet18'}", "model is 'resnet18', expected an object of type Module"),
        ("{client-strategy = {name = 'fedavg'}}", "client_strategy is of type dict, expected"),
    ],
)
def test_an_argument_of_the_wrong_type(table, said):
    options = {"model": plain_net(), "cut": CUT}
    with pytest.raises(ConfigError) as caught:
        make_strategy("psl", table, **options)
    assert str(caught.value).startswith(said)


# --- of another package ----------------------------------------------------------------------


@pytest.mark.usefixtures("stranger")
def test_a_strategy_of_another_package_is_found_by_name():
    assert {"lazy", "psl"} <= set(strategy_names())
    strategy = make("lazy", "{patience = 3, mood = 'brave', batch-size = 5}", seed=4)
    assert type(strategy).__name__ == "Lazy"
    assert (strategy.patience, strategy.mood) == (3, "brave")
    assert (strategy.options.batch_size, strategy.options.seed) == (5, 4)
    assert make("lazy").patience == 2


@pytest.mark.usefixtures("stranger")
def test_a_strategy_of_another_package_trains():
    cls = type(make("lazy"))
    parts = make_parts([8, 8])
    lazy = train(set_up(parts, cls, patience=2, client_lr=0.0))
    once = train(set_up(parts, PSL, local_steps=1, client_lr=0.0))
    assert lazy.history[0].steps == 2
    for name, array in once.arrays.items():
        assert (lazy.arrays[name].numpy() == array.numpy()).all()


@pytest.mark.usefixtures("stranger")
def test_a_mistake_in_its_arguments_names_its_own():
    with pytest.raises(ConfigError, match=r"'lazy' has no argument 'patient'; did you mean 'patie"):
        make("lazy", "{patient = 3}")
    with pytest.raises(ConfigError, match=r"it has patience, mood, .*batch_size"):
        make("lazy", "{xyzzy = 3}")
    with pytest.raises(ConfigError, match="did you mean 'patience'"):
        type(make("lazy"))(model=plain_net(), cut=CUT, patienc=3)


@pytest.mark.usefixtures("stranger")
@pytest.mark.parametrize("name", ["lazy-function", "lazy-module"])
def test_an_entry_point_that_is_no_strategy(name):
    with pytest.raises(ConfigError, match=f"strategy '{name}' is <.*, expected a subclass of Spl"):
        make(name)


def test_without_the_package_its_strategy_is_unknown():
    with pytest.raises(ConfigError, match="there is no strategy 'lazy'"):
        make("lazy")
