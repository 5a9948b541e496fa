"""Requests that a client can't do: it says why, and goes on as if they hadn't come."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from reference import CUT, assert_bit_equal, fresh, make_data, noisy_net, split_app
from torch.utils.data import TensorDataset

from flsplit import LocalGrid
from flsplit.message.arrays import to_array
from flsplit.message.evaluate import EvaluateReply, EvaluateRequest
from flsplit.message.request import Backward, SegmentArrays
from flsplit.message.round_plan import RoundPlan
from flsplit.message.steps import FinishReply, FinishRequest, StepReply, StepRequest
from flsplit.message.types import EVALUATE, FINISH, STEP

PLAN = RoundPlan(
    server_round=1, num_rounds=2, cut=CUT, segment_version=0, seed=0, lr=0.1, batch_size=4,
    local_epochs=1, local_steps=0, drop_last=False,
)  # fmt: skip
SHAPE = (4, 3, 4, 4)  # of a batch's smashed data
TYPES = {StepRequest: STEP, FinishRequest: FINISH, EvaluateRequest: EVALUATE}
PARSE = {
    STEP: StepReply.from_content,
    FINISH: FinishReply.from_content,
    EVALUATE: EvaluateReply.from_content,
}


def segment() -> SegmentArrays:
    state = fresh(noisy_net).state_dict()
    return SegmentArrays(0, {k: v for k, v in state.items() if k.startswith(CUT)})


def begin() -> StepRequest:
    return StepRequest(1, 0, plan=PLAN, segment=segment())


def gradient(step: int, value: float = 0.1, shape=SHAPE) -> Backward:
    return Backward(step, torch.full(shape, value))


class OneClient:
    """A client with 12 examples for training (3 steps) and 4 for testing."""

    def __init__(self, keep: bool) -> None:
        data, test = (make_data(size, seed=1, shape=(1, 6, 6)) for size in (12, 4))
        app = split_app(noisy_net, [data], [test])
        self.grid = LocalGrid(app, 1, cache=keep, progress=False)
        (self.node,) = self.grid.get_node_ids()

    def send(self, message_type: str, content: RecordDict) -> Message:
        message = Message(content, self.node, message_type, group_id="1")
        (reply,) = self.grid.send_and_receive([message])
        return reply

    def ask(self, request):
        message_type = TYPES[type(request)]
        return PARSE[message_type](self.send(message_type, request.to_content()).content)

    def refusal(self, message_type: str, content: RecordDict) -> str:
        reply = self.send(message_type, content)
        assert reply.has_error()
        return reply.error.reason

    def epoch(self, disturb=lambda: None) -> list[torch.Tensor]:
        """Do an epoch, disturbed before its second request, and return all that comes of it."""
        first = self.ask(begin())
        disturb()
        second = self.ask(StepRequest(1, 1, gradient(0)))
        third = self.ask(StepRequest(1, 2, gradient(1)))
        end = self.ask(FinishRequest(1, gradient(2), upload_segment=True, upload_optimizer=True))
        return [first.smashed, second.smashed, third.smashed, *end.segment.values()]


@pytest.fixture(params=[True, False], ids=["cache", "no cache"])
def client(request):
    return OneClient(request.param)


@pytest.fixture
def undisturbed():
    return undisturbed_epoch()


@cache
def undisturbed_epoch():
    return OneClient(keep=True).epoch()


def edited(request, edit) -> RecordDict:
    content = request.to_content()
    edit(content)
    return content


def optimizer_of(index: str):
    def edit(content):
        content["optimizer"] = ArrayRecord({f"{index}/momentum_buffer": to_array(torch.zeros(1))})
        content["optimizer-numbers"] = ConfigRecord()

    return edit


def drop(*keys):
    def edit(content):
        for key in keys:
            del content[key]

    return edit


def put(record, key, value):
    def edit(content):
        content[record][key] = value

    return edit


def place(record, value):
    def edit(content):
        del content[record]
        content[record] = value

    return edit


STEP_0 = StepRequest(1, 1, gradient(0))
"""The request that is due."""

REQUESTS = {
    "gradient of another step": (
        replace(STEP_0, backward=gradient(1)),
        "ProtocolError: gradient of step 1 came, client '0' awaits 0",
    ),
    "gradient of another shape": (
        replace(STEP_0, backward=gradient(0, shape=(3, 3, 4, 4))),
        "cut-gradient has shape (3, 3, 4, 4), the smashed data of step 0 (4, 3, 4, 4)",
    ),
    "gradient with NaN": (
        replace(STEP_0, backward=gradient(0, torch.nan)),
        "NonFiniteError: cut-layer gradient of step 0 is NaN or infinite (client '0', round 1)",
    ),
    "a step too far": (StepRequest(1, 1), "step is 1, expected 0 of 3 (client '0', round 1)"),
    "a step beyond the last": (StepRequest(1, 7), "step is 7, expected 0 of 3"),
    "another round": (
        StepRequest(2, 1, gradient(0)),
        "server-round is 2, client '0' is in round 1",
    ),
    "the end of another round": (
        FinishRequest(2, gradient(0)),
        "server-round is 2, client '0' is in round 1",
    ),
    "the end with a gradient of another step": (
        FinishRequest(1, gradient(2)),
        "gradient of step 2 came, client '0' awaits 0",
    ),
    "a test batch beyond the last": (
        EvaluateRequest(1, 3, 4, 0),
        "test batch 3 asked for, client '0' has 1",
    ),
    "evaluation of another segment": (
        EvaluateRequest(1, 0, 4, 5),
        "StateLostError: client '0' holds segment 0, the server expects 5",
    ),
}

MALFORMED = {
    "empty": (STEP, RecordDict(), "record 'step' is missing; the message holds []"),
    "no step": (STEP, edited(STEP_0, drop("step")), "record 'step' is missing"),
    "step of another type": (
        STEP,
        edited(STEP_0, place("step", MetricRecord({"step": 1}))),
        "record 'step' is a MetricRecord, expected a ConfigRecord",
    ),
    "step below zero": (STEP, edited(STEP_0, put("step", "step", -1)), "'step' is -1, expected at"),
    "step as text": (STEP, edited(STEP_0, put("step", "step", "1")), "'step' is '1' (str), expec"),
    "round 0": (
        STEP,
        edited(STEP_0, put("step", "server-round", 0)),
        "'server-round' is 0, ex",
    ),
    "update as number": (
        STEP,
        edited(STEP_0, put("backward", "update", 1)),
        "field 'update' is 1 (int), expected a bool",
    ),
    "update without a gradient": (
        STEP,
        edited(STEP_0, drop("cut-gradient")),
        "record 'cut-gradient' is missing",
    ),
    "two gradients": (
        STEP,
        edited(STEP_0, put("cut-gradient", "1", to_array(torch.zeros(1)))),
        "record 'cut-gradient' holds 2 arrays, expected one",
    ),
    "gradient with bytes missing": (
        STEP,
        edited(
            STEP_0, put("cut-gradient", "0", Array("float32", (4, 3, 4, 4), "flsplit.raw", b"123"))
        ),
        "cut-gradient: 3 bytes came, but float32 of shape (4, 3, 4, 4) takes 768",
    ),
    "segment without a version": (
        STEP,
        edited(begin(), drop("segment")),
        "record 'segment' is missing",
    ),
    "plan without a field": (
        STEP,
        edited(begin(), lambda content: content["config"].pop("seed")),
        "field 'seed' is missing",
    ),
    "plan with a negative learning rate": (
        STEP,
        edited(begin(), put("config", "lr", -0.1)),
        "'lr' is -0.1, expected at least 0",
    ),
    "plan with another cut": (
        STEP,
        edited(begin(), put("config", "cut", "middle")),
        "SegmentMismatchError: the server cuts the model at 'middle', client '0' at 'front'",
    ),
    "optimizer without numbers": (
        STEP,
        edited(begin(), lambda content: content.update({"optimizer": ArrayRecord()})),
        "record 'optimizer-numbers' is missing",
    ),
    "optimizer of a name": (
        STEP,
        edited(begin(), optimizer_of("front.0.weight")),
        "key is 'front.0.weight/momentum_buffer', expected '<index>/<name>'",
    ),
    "end without a flag": (
        FINISH,
        edited(FinishRequest(1), lambda content: content["finish"].pop("upload-segment")),
        "field 'upload-segment' is missing",
    ),
    "evaluation in batches of nothing": (
        EVALUATE,
        edited(EvaluateRequest(1, 0, 1, 0), put("config", "batch-size", 0)),
        "'batch-size' is 0, expected at least 1",
    ),
}


@pytest.mark.parametrize(("wrong", "reason"), REQUESTS.values(), ids=list(REQUESTS))
def test_a_request_that_does_not_fit_changes_nothing(client, wrong, reason, undisturbed):
    def disturb():
        assert reason in client.refusal(TYPES[type(wrong)], wrong.to_content())

    assert_same(client.epoch(disturb), undisturbed)


@pytest.mark.parametrize(("kind", "content", "reason"), MALFORMED.values(), ids=list(MALFORMED))
def test_a_malformed_request_changes_nothing(client, kind, content, reason, undisturbed):
    def disturb():
        assert reason in client.refusal(kind, content)

    assert_same(client.epoch(disturb), undisturbed)


def test_asked_twice_for_a_step_the_client_computes_it_twice_alike(client, undisturbed):
    """BatchNorm's buffers move once."""
    assert_same(client.epoch(lambda: client.ask(StepRequest(1, 0))), undisturbed)


def test_asked_to_begin_twice_the_client_begins_anew(client, undisturbed):
    assert_same(client.epoch(lambda: client.ask(begin())), undisturbed)


def assert_same(found, expected):
    assert_bit_equal(dict(enumerate(found)), dict(enumerate(expected)))


@pytest.mark.parametrize(
    "request_",
    [StepRequest(1, 0), StepRequest(1, 1, gradient(0)), FinishRequest(1, upload_segment=True)],
    ids=["step", "gradient", "end"],
)
def test_a_client_that_is_in_no_round_says_that_its_state_is_lost(client, request_):
    """Nor does it hand over the random weights that its model was made with."""
    reason = client.refusal(TYPES[type(request_)], request_.to_content())
    assert reason.startswith("StateLostError: client '0' is in no round")


@pytest.mark.parametrize("request_", [replace(begin(), segment=None), EvaluateRequest(1, 0, 4, 0)])
def test_a_new_client_without_a_segment_asks_for_it(client, request_):
    reason = client.refusal(TYPES[type(request_)], request_.to_content())
    assert reason.startswith("StateLostError: client '0' holds segment none")


def test_a_gradient_after_the_end_of_the_round(client):
    client.epoch()
    reason = client.refusal(FINISH, FinishRequest(1, gradient(2)).to_content())
    assert "gradient of step 2 came, client '0' awaits none" in reason
    reason = client.refusal(STEP, StepRequest(1, 3).to_content())
    assert "step is 3, expected 3 of 3" in reason


def test_a_failing_batch_leaves_the_buffers_as_they_were(client, undisturbed):
    """The second batch can't be computed at first; BatchNorm must not have seen it."""
    inputs, labels = make_data(12, seed=1, shape=(1, 6, 6)).tensors
    broken = inputs.clone()
    data = TensorDataset(broken, labels)
    good = OneClient(keep=client.grid._cohort._cache is not None)
    good.grid._cohort._app = split_app(noisy_net, [data])
    first = good.ask(begin())
    broken[:] = torch.nan
    reason = good.refusal(STEP, StepRequest(1, 1, gradient(0)).to_content())
    if good.grid._cohort._cache is None:  # it computes the first batch anew
        assert "smashed data of step 0 is NaN" in reason
        broken[:] = inputs
        second = good.ask(StepRequest(1, 1, gradient(0)))
    else:
        assert "smashed data of step 1 is NaN" in reason
        broken[:] = inputs
        second = good.ask(StepRequest(1, 1))
    assert_same([first.smashed, second.smashed], undisturbed[:2])
    good.ask(StepRequest(1, 2, gradient(1)))
    end = good.ask(FinishRequest(1, gradient(2), upload_segment=True, upload_optimizer=True))
    assert_same([*end.segment.values()], undisturbed[3:])


def test_a_message_that_the_app_knows_nothing_about(client):
    reason = client.refusal("train.dance", RecordDict())
    assert "dance" in reason
