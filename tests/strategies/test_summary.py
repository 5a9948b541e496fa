"""What a strategy logs of itself."""

import logging
from functools import partial

import pytest
from torch import nn

from flsplit.client_parts import Noise
from flsplit.run import make_strategy, strategy_names
from flsplit.run.strategy import own_argument_names
from flsplit.strategies import CSEFSL, EPSL, FSLSAGE, GAPSL, PSL, SGLR


def lines_of(strategy, caplog):
    caplog.set_level(logging.INFO, logger="flwr")
    strategy.summary()
    return [record.getMessage().strip("\t│├└─> ") for record in caplog.records]


def make(cls, **options):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    return cls(model=model, cut="0", local_steps=3, seed=7, **options)


@pytest.mark.parametrize(
    ("cls", "options", "expected"),
    [
        (EPSL, {"server_lr": 0.1, "phi": 0.25}, "phi: 0.25"),
        (SGLR, {"phi": 0.4}, "phi: 0.4"),
        (SGLR, {"alpha": 1.5}, "alpha: 1.5"),
        (GAPSL, {"server_lr": 0.1, "eta": 0.3}, "eta: 0.3"),
        (FSLSAGE, {"server_lr": 0.1, "align_every": 4}, "align_every: 4"),
        (FSLSAGE, {"server_lr": 0.1}, "upload_every: 5"),
        (CSEFSL, {"server_lr": 0.1, "auxiliary": "first-stage"}, "auxiliary: 'first-stage'"),
        (PSL, {"server_lr": 0.1}, "local_steps: 3"),
        (PSL, {"client_parts": (Noise(0.5),)}, "client_parts: Noise(sigma=0.5"),
    ],
)
def test_a_summary_says_what_the_method_was_given(cls, options, expected, caplog):
    lines = lines_of(make(cls, **options), caplog)

    assert any(expected in line for line in lines), lines
    assert "client segment: 16 parameters" in lines
    assert "seed: 7" in lines


@pytest.mark.parametrize("name", strategy_names())
def test_a_summary_names_all_arguments_of_a_method(name, caplog):
    required = {} if name == "sglr" else {"server_lr": 0.1}
    cls = type(make(partial(make_strategy, name), **required))
    text = "\n".join(lines_of(make(cls, **required), caplog))

    for argument in own_argument_names(cls):
        assert f"{argument}: " in text, argument


def test_a_summary_leaves_out_options_at_their_default(caplog):
    lines = lines_of(make(PSL, server_lr=0.1), caplog)

    assert not any("batch_size" in line or "PSL:" in line for line in lines)
