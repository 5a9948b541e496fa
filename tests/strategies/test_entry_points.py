"""Rules, passes and strategies of another package, found by name in a run config."""

import sys
import textwrap

import pytest
from flwr.app import ArrayRecord
from reference import CUT, fresh, make_parts, plain_net, split_app

from flsplit import LocalGrid
from flsplit.errors import ConfigError
from flsplit.run import make_strategy
from flsplit.server.passes import PerClient, Replay
from flsplit.strategies import PSL, rule_names
from flsplit.strategies.rules import CutGradientAveraging, SplitLr

STRANGER = '''
from flsplit.server.rules import GradientRule
from flsplit.strategies import PSL


class Shrink(GradientRule):
    """Makes the server's gradient smaller, the more the longer the run."""

    def __init__(self, factor, *, half_life=1.0):
        self.factor, self.half_life, self.steps = factor, half_life, 0

    def __call__(self, context, result):
        self.steps += 1
        result.server_gradients = [
            None if g is None else g * self.factor for g in result.server_gradients
        ]
        result.metrics["shrink.steps"] = float(self.steps)
        return result


class Timid(PSL):
    """PSL whose server takes small steps."""

    def __init__(self, courage: float = 0.5, **options):
        super().__init__(**options | {"rules": [Shrink(courage), *options.get("rules", ())]})
        self.courage = courage
'''
ENTRY_POINTS = """
[flsplit.strategies]
timid = stranger_split:Timid
[flsplit.rules]
shrink = stranger_split:Shrink
not-a-rule = stranger_split:Timid
"""


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A package as pip would leave it."""
    (tmp_path / "stranger_split.py").write_text(textwrap.dedent(STRANGER))
    info = tmp_path / "stranger_split-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger-split\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("stranger_split", None)


def make(name, args="{}", **options):
    return make_strategy(name, args, model=fresh(plain_net), cut=CUT, device="cpu", **options)


def run(strategy):
    app = split_app(plain_net, make_parts((8, 8)))
    return strategy.start(
        LocalGrid(app, 2, progress=False), ArrayRecord(fresh(plain_net).state_dict()), 1
    )


def test_a_strangers_strategy_and_rule_take_parameters_of_their_own(stranger):
    assert "shrink" in rule_names()
    timid = make("timid", "{courage = 0.25, batch-size = 4}")
    shrink = "{name = 'shrink', factor = 0.25, half-life = 3}"
    ruled = make("psl", f"{{rules = [{shrink}], batch-size = 4}}")
    assert timid.courage == 0.25
    assert ruled.rules[0].half_life == 3
    one, other = run(timid), run(ruled)
    assert one.history.numbers() == other.history.numbers()
    assert one.history[0].metrics["shrink.steps"] == 1.5
    assert run(make("psl", "{batch-size = 4}")).history[0].loss != one.history[0].loss


def test_flsplits_own_rules_and_passes_by_name():
    strategy = make(
        "psl",
        '{rules = ["split-lr", {name = "cut-gradient-averaging", phi = 0.25, phases = [0.0, 0.5]}],'
        ' server-pass = {name = "replay", phi = 0.5}}',
    )
    first, second = strategy.rules
    assert isinstance(first, SplitLr)
    assert isinstance(second, CutGradientAveraging)
    assert (second.phi, second.phases) == (0.25, (0.0, 0.5))
    assert isinstance(strategy.server_pass, Replay)
    assert isinstance(make("psl", '{server-pass = "per-client"}').server_pass, PerClient)


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ('{rules = ["split-rl"]}', "there is no rule 'split-rl'; did you mean 'split-lr'"),
        ('{rules = [{name = "split-lr", alfa = 1}]}', "rule 'split-lr' has no argument 'alfa'"),
        ('{rules = [{phi = 0.5}]}', "rule is {'phi': 0.5}, expected a name or a table"),
        ('{rules = "split-lr"}', "rules is 'split-lr', expected a list as"),
        ('{rules = ["shrink"]}', "rule 'shrink': .*missing 1 required positional argument"),
        ('{rules = ["not-a-rule"]}', "rule 'not-a-rule'"),
        ('{rules = ["leader-alignment"]}', "needs inner products .* Pooled doesn't provide"),
        ('{server-pass = "replay"}', "server pass 'replay': .*missing 1 required"),
        ('{server-pass = {name = "replay", phi = 2}}', "phi is 2"),
        ('{server-pass = "split-lr"}', "there is no server pass 'split-lr'"),
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
    }.items():
        assert isinstance(make(name, args), PSL)
