"""One tensor crosses the cut whose first dimension isn't the batch: time first, hidden states."""

import pytest
import torch
from reference import (
    CUT,
    MOMENTUM,
    NUM_CLASSES,
    assert_bit_equal,
    assert_close,
    run_split,
    train_in_turn,
    weights_of,
    whole_of,
)
from torch import nn
from torch.utils.data import TensorDataset

from flsplit.cut import Crossing, cuts, split
from flsplit.errors import MethodError, NotEnoughClientsError
from flsplit.strategies import (
    EPSL,
    FSLSAGE,
    GAPSL,
    PSL,
    SFLGA,
    SGLR,
    CycleSL,
    SequentialSL,
    SplitFedV1,
    SplitFedV2,
)

TIMES, FEATURES, HIDDEN = 4, 3, 6


class Recurrent(nn.Module):
    """Signals (b, times, features); the same weights compute the same in every form."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.front = nn.GRU(FEATURES, HIDDEN, batch_first=form != "time first")
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(HIDDEN, NUM_CLASSES))

    def forward(self, x):
        if self.form == "time first":
            return self.head(self.front(x.transpose(0, 1))[0][-1])
        outputs, hidden = self.front(x)
        return self.head(hidden[-1] if self.form == "hidden" else outputs[:, -1])


class Frames(nn.Module):
    """Each time step is a row of its own up to the cut, as frames of a video are."""

    def __init__(self):
        super().__init__()
        self.front = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh())
        self.head = nn.Linear(TIMES * HIDDEN, NUM_CLASSES)

    def forward(self, x):
        return self.head(self.front(x.flatten(0, 1)).view(len(x), -1))


MODELS = {
    "time first": lambda: Recurrent("time first"),
    "hidden": lambda: Recurrent("hidden"),
    "frames": Frames,
}


def signals(size, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(size, TIMES, FEATURES, generator=rng),
        torch.randint(NUM_CLASSES, (size,), generator=rng),
    )


def train(strategy, model, sizes, **more):
    parts = [signals(size, seed) for seed, size in enumerate(sizes)]
    example = torch.randn(2, TIMES, FEATURES)
    return run_split(strategy, MODELS[model], parts, example=example, **more)


@pytest.mark.parametrize("rows", [1, TIMES, 5])
@pytest.mark.parametrize("model", MODELS)
def test_what_crosses_says_what_the_model_says(model, rows):
    """Also where there are as many rows as times."""
    whole = MODELS[model]().eval()
    halves = split(whole, CUT, torch.randn(2, TIMES, FEATURES))
    x = torch.randn(rows, TIMES, FEATURES)
    crossing = halves.client(x)
    assert isinstance(crossing, Crossing)
    assert torch.equal(halves.server(crossing), whole(x))


@pytest.mark.parametrize("rows", [1, 2, TIMES, HIDDEN])
def test_rows_in_front_cross_as_one_tensor_whatever_their_number(rows):
    halves = split(Recurrent("plain"), CUT, torch.randn(2, TIMES, FEATURES))
    assert halves.client(torch.randn(rows, TIMES, FEATURES)).shape == (rows, TIMES, HIDDEN)


@pytest.mark.parametrize("model", MODELS)
def test_one_client_is_bit_equal_to_training_the_whole_model(model):
    result = train(PSL, model, [11], optimizer=MOMENTUM, share_client_segments=True)
    weights, _ = train_in_turn(MODELS[model], [signals(11)], optimizer=MOMENTUM, rounds=2)
    assert_bit_equal(whole_of(result), weights)


@pytest.mark.parametrize("model", ["time first", "hidden"])
@pytest.mark.parametrize("strategy", [PSL, SplitFedV1, SplitFedV2, SequentialSL, GAPSL])
def test_several_clients_train_what_they_train_with_rows_in_front(strategy, model, monkeypatch):
    monkeypatch.setitem(MODELS, "plain", lambda: no_dropout("plain"))
    monkeypatch.setitem(MODELS, model, lambda: no_dropout(model))
    ours, plain = (train(strategy, name, [TIMES, 7, 5]) for name in (model, "plain"))
    assert ours.history[-1].left_out == []
    assert_close(weights_of(ours.arrays), weights_of(plain.arrays), 1e-6)


def no_dropout(form):
    model = Recurrent(form)
    model.head[0].p = 0.0
    return model


@pytest.mark.parametrize("batch_size", [TIMES, 3])
@pytest.mark.parametrize("strategy", [EPSL, CycleSL, SGLR, SFLGA])
def test_methods_that_mix_rows_say_why_they_cannot(strategy, batch_size):
    """Also where there are as many rows as times."""
    with pytest.raises(MethodError, match=r"rows (not )?in front"):
        train(strategy, "time first", [12, 12], batch_size=batch_size)


def test_auxiliary_models_take_rows_in_front():
    with pytest.raises(NotEnoughClientsError, match="its rows not in front"):
        train(FSLSAGE, "time first", [8, 8])


def test_such_places_are_not_listed():
    found = [point.cut for point in cuts(Recurrent("time first"), torch.randn(2, TIMES, FEATURES))]
    assert CUT not in found
