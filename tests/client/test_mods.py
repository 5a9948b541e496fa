"""Flower mods on a split ClientApp: they read what travels, and put something else in its place."""

import copy
import pickle

import numpy as np
import pytest
import torch
from carry.threaded import ThreadedGrid
from flwr.app import Array, ArrayRecord, Message
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from reference import (
    CUT,
    LR,
    SEED,
    WrappedGrid,
    assert_bit_equal,
    fresh,
    make_parts,
    plain_net,
    weights_of,
)
from reference import split_app as app_of

from flsplit import LocalGrid, SessionSettings
from flsplit.message.arrays import RAW, RawArray, to_array, to_tensor
from flsplit.message.steps import StepRequest
from flsplit.message.types import STEP
from flsplit.strategies import PSL, SplitFedV1

PARTS = make_parts([8, 8])
INSIDE = 0.1  # what smashed data are clipped to; tanh goes up to 1


class Travelling(WrappedGrid):
    """Takes every message apart and puts it together again, as Flower's own carrier does."""

    def send_and_receive(self, messages, *, timeout=None):
        sent = [travelled(message) for message in messages]
        return [travelled(reply) for reply in self.inner.send_and_receive(sent, timeout=timeout)]


def travelled(message):
    objects = get_all_nested_objects(message)
    contents = {name: one.deflate() for name, one in objects.items()}
    back = inflate_object_from_contents(message.object_id, contents)
    assert isinstance(back, Message)
    return back


CARRIERS = {
    "cache": lambda app: LocalGrid(app, 2, progress=False),
    "no cache": lambda app: LocalGrid(app, 2, cache=False, progress=False),
    "Flower": lambda app: Travelling(LocalGrid(app, 2, cache=False, progress=False)),
    "session": lambda app: ThreadedGrid(app, 2),
}
CARRIER = pytest.mark.parametrize("carrier", CARRIERS)


def train(carrier, mods, strategy=SplitFedV1, **options):
    model = fresh(plain_net)
    grid = CARRIERS[carrier](app_of(plain_net, PARTS, mods=mods, **options))
    split = strategy(
        model=model, cut=CUT, server_lr=LR, seed=SEED, batch_size=4, device="cpu",
        session=SessionSettings(join_timeout=20.0, grace=2.0),
    )  # fmt: skip
    result = split.start(grid, ArrayRecord(model.state_dict()), num_rounds=2, timeout=30.0)
    assert [entry.left_out for entry in result.history] == [[], []]
    return result


@pytest.fixture
def came(monkeypatch):
    """The smashed data that the server got."""
    seen, check = [], StepRequest.check

    def watch(request, reply):
        check(request, reply)
        seen.append(reply.smashed)

    monkeypatch.setattr(StepRequest, "check", watch)
    return seen


@CARRIER
def test_a_mod_reads_smashed_data_and_gradients(carrier):
    seen = []

    def reading(message, context, call_next):
        gradient = message.content.get("cut-gradient")
        reply = call_next(message, context)
        if message.metadata.message_type == STEP:
            seen.append(reply.content["smashed-data"]["0"].numpy())
            if gradient is not None:
                seen.append(gradient["0"].numpy())
        return reply

    found = train(carrier, [reading])
    assert {(one.dtype, one.shape) for one in seen} == {(np.dtype("float32"), (4, 6))}
    assert len(seen) == 2 * 2 * 2 + 2 * 2  # smashed data of 2 steps, one gradient: a round, client
    assert all(np.abs(one).max() > 0 for one in seen)
    assert_bit_equal(weights_of(found.arrays), weights_of(train(carrier, None).arrays))


@CARRIER
def test_a_mod_puts_clipped_smashed_data_in_their_place(carrier, came):
    def clipping(message, context, call_next):
        reply = call_next(message, context)
        if message.metadata.message_type == STEP:
            arrays = reply.content["smashed-data"]
            arrays["0"] = Array(np.clip(arrays["0"].numpy(), -INSIDE, INSIDE))
        return reply

    train(carrier, [clipping])
    assert len(came) == 2 * 2 * 2
    for smashed in came:
        assert smashed.abs().max() == np.float32(INSIDE)


def test_bfloat16_is_read_as_float32_and_travels_as_it_is(came):
    seen, dtypes = [], []

    def reading(message, context, call_next):
        reply = call_next(message, context)
        if message.metadata.message_type == STEP:
            array = reply.content["smashed-data"]["0"]
            seen.append(torch.from_numpy(array.numpy()))
            dtypes.append(array.dtype)
        return reply

    train("cache", [reading], PSL, autocast=torch.bfloat16)
    assert set(dtypes) == {"bfloat16"}
    assert len(seen) == len(came) == 8
    assert all(torch.equal(one, other.float()) for one, other in zip(seen, came, strict=True))


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))]
)
def test_a_raw_array_can_be_copied_and_pickled(copied):
    array = to_array(torch.arange(6.0).reshape(2, 3))
    found = copied(array)
    assert type(found) is RawArray
    assert (found.dtype, found.shape, found.stype) == ("float32", (2, 3), RAW)
    assert found.numpy().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert torch.equal(to_tensor(found, field="x"), torch.arange(6.0).reshape(2, 3))


def test_what_a_mod_reads_is_its_own_copy():
    array = to_array(torch.zeros(3))
    array.numpy()[:] = 1
    assert array.numpy().tolist() == [0, 0, 0]
