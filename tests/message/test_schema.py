"""Every message: what is written is read again, and what is malformed is named."""

from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from functools import partial

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import SGD, Adam, AdamW

from flsplit.errors import ProtocolError
from flsplit.message.arrays import to_array
from flsplit.message.evaluate import EvaluateReply, EvaluateRequest
from flsplit.message.optimizer_state import (
    get_state,
    set_state,
    state_from_records,
    state_to_records,
)
from flsplit.message.request import Backward, SegmentArrays
from flsplit.message.round_plan import RoundPlan
from flsplit.message.steps import FinishReply, FinishRequest, StepReply, StepRequest
from flsplit.optimizers import UserOptimizer

PLAN = RoundPlan(
    server_round=2, num_rounds=5, cut="features.3", segment_version=7, seed=2**63 - 1, lr=0.05,
    batch_size=32, local_epochs=1, local_steps=0, drop_last=True,
)  # fmt: skip
SEGMENT = SegmentArrays(
    7, {"w": torch.randn(2, 3), "bn.num_batches_tracked": torch.tensor(3), "none": torch.zeros(0)}
)
OPTIMIZER = {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3)}, 12: {"n": 2, "x": 0.5}}
SMASHED = torch.randn(4, 3, 2, 2, dtype=torch.bfloat16)
LABELS = torch.tensor([0, 5, -100, 2])

MESSAGES = {
    "first step": StepRequest(2, 0, plan=PLAN, segment=SEGMENT, optimizer=OPTIMIZER),
    "first step of one who holds the segment": StepRequest(2, 0, plan=PLAN),
    "step": StepRequest(2, 3, Backward(2, SMASHED)),
    "step without an update": StepRequest(2, 3, Backward(2, None)),
    "step's reply": StepReply("clinic 7", 2, 3, SMASHED, LABELS, 100, 4, 0.25),
    "reply with float labels": StepReply("0", 1, 0, SMASHED, torch.randn(4, 2), 1, 1, 0.0),
    "end": FinishRequest(2, Backward(3, torch.zeros(0, 3)), True, True),
    "end that asks for nothing": FinishRequest(9),
    "end's reply": FinishReply("ä/ö", 2, 100, 0.5, SEGMENT.tensors, OPTIMIZER),
    "end's reply of an SGD without momentum": FinishReply("0", 2, 100, 0.5, SEGMENT.tensors, {}),
    "end's reply of a client that clips": FinishReply(
        "0", 2, 100, 0.5, SEGMENT.tensors, OPTIMIZER, clipped=False
    ),
    "end's reply with nothing": FinishReply("0", 2, 100, 0.5),
    "evaluation": EvaluateRequest(2, 3, 512, 7, SEGMENT),
    "evaluation of one who holds the segment": EvaluateRequest(0, 0, 1, 0),
    "evaluation's reply": EvaluateReply("0", 2, 3, 4, SMASHED, LABELS, 0.5),
    "evaluation's reply without test data": EvaluateReply(
        "0", 2, 0, 0, torch.empty(0), torch.empty(0, dtype=torch.int64), 0.0
    ),
}
TYPES = [StepRequest, StepReply, FinishRequest, FinishReply, EvaluateRequest, EvaluateReply]


def assert_same(found, expected, where=""):
    """Compare messages, tensors bit for bit."""
    assert type(found) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), where
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}[{key!r}]")
    elif is_dataclass(expected):
        for one in fields(expected):
            name = one.name
            assert_same(getattr(found, name), getattr(expected, name), f"{where}.{name}")
    else:
        assert found == expected, where


# --- round trips -----------------------------------------------------------------------------


@pytest.mark.parametrize("message", MESSAGES.values(), ids=list(MESSAGES))
def test_what_is_written_is_read_again(message):
    assert_same(type(message).from_content(message.to_content()), message)


def test_every_type_of_message_is_among_them():
    assert {type(message) for message in MESSAGES.values()} == set(TYPES)


def test_what_stays_on_the_server_does_not_travel():
    sent = StepRequest(1, 1, Backward(0, torch.ones(4, 2), shared_rows=3))
    assert StepRequest.from_content(sent.to_content()).backward.shared_rows == 0
    sent = FinishRequest(1, upload_segment=True, like=SegmentArrays(0, {"w": torch.ones(1)}))
    content = sent.to_content()
    assert FinishRequest.from_content(content).like is None
    assert list(content) == ["finish"]


def test_a_step_without_an_update_is_not_a_gradient_of_zeros():
    skipped = StepRequest(1, 1, Backward(0, None)).to_content()
    zeros = StepRequest(1, 1, Backward(0, torch.zeros(4, 2))).to_content()
    assert "cut-gradient" not in skipped
    assert StepRequest.from_content(zeros).backward.gradient.tolist() == [[0, 0]] * 4


def test_smashed_data_and_gradients_travel_without_a_header():
    content = MESSAGES["step's reply"].to_content()
    assert len(content["smashed-data"]["0"].data) == SMASHED.numel() * 2
    content = MESSAGES["step"].to_content()
    assert len(content["cut-gradient"]["0"].data) == SMASHED.numel() * 2


# --- malformed -------------------------------------------------------------------------------


def wrong_value(value):
    """Return a value of another type than ``value``."""
    return "wrong" if not isinstance(value, str) else 5


OPTIONAL = {
    StepRequest: ("config", "arrays", "optimizer", "backward"),
    FinishRequest: ("backward",),
    FinishReply: ("arrays", "optimizer", "clipping"),
    EvaluateRequest: ("arrays",),
}
REQUIRED = [
    (name, key)
    for name, message in MESSAGES.items()
    for key in message.to_content()
    if key not in OPTIONAL.get(type(message), ())
]


@pytest.mark.parametrize(("name", "key"), REQUIRED)
def test_a_record_that_is_missing_is_named(name, key):
    content = MESSAGES[name].to_content()
    del content[key]

    with pytest.raises(ProtocolError, match=f"record '{key}' is missing; the message holds"):
        type(MESSAGES[name]).from_content(content)


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name, one in MESSAGES.items() for key in one.to_content()]
)
def test_a_record_of_another_type_is_named(name, key):
    content = MESSAGES[name].to_content()
    other = MetricRecord({"x": 1}) if not isinstance(content[key], MetricRecord) else ConfigRecord()
    expected = type(content[key]).__name__
    del content[key]
    content[key] = other
    said = f"record '{key}' is a {type(other).__name__}, expected a {expected}"
    with pytest.raises(ProtocolError, match=said):
        type(MESSAGES[name]).from_content(content)


FIELDS = [
    (name, record, field)
    for name, message in MESSAGES.items()
    for record, content in message.to_content().items()
    if isinstance(content, ConfigRecord | MetricRecord) and record != "optimizer-numbers"
    for field in content
    if not (isinstance(message, EvaluateReply) and field == "num-examples")  # for people to read
]


@pytest.mark.parametrize(("name", "record", "field"), FIELDS)
def test_a_field_that_is_missing_or_of_another_type_is_named(name, record, field):
    message = MESSAGES[name]
    content = message.to_content()
    value = content[record][field]
    if isinstance(content[record], ConfigRecord):
        content[record][field] = wrong_value(value)
    else:
        content[record][field] = [value]
    with pytest.raises(ProtocolError, match=f"field '{field}' is .*, expected a"):
        type(message).from_content(content)
    del content[record][field]
    with pytest.raises(ProtocolError, match=f"field '{field}' is missing; there are"):
        type(message).from_content(content)


# --- anything at all -------------------------------------------------------------------------

_RECORDS = sorted({key for message in MESSAGES.values() for key in message.to_content()} | {"x"})
_FIELDS = sorted({field for _, _, field in FIELDS})
_scalars = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.integers(-1, 9), st.floats(), st.booleans(),
    st.text(max_size=5), st.binary(max_size=5), st.lists(st.integers(0, 9), max_size=2),
)  # fmt: skip
_numbers = st.one_of(st.integers(-1, 9), st.floats(), st.lists(st.floats(), max_size=2))
_arrays = st.builds(
    Array,
    st.sampled_from(["float32", "int64", "bfloat16", "nonsense"]),
    st.lists(st.integers(-1, 3), max_size=3).map(tuple),
    st.sampled_from(["flsplit.raw", "numpy.ndarray", "?"]),
    st.binary(max_size=24),
)
_keys = st.one_of(
    st.sampled_from(["0", "0/step", "w", "1/x", "/", "٣/x", "9" * 30 + "/x"]), st.text(max_size=9)
)
_records = st.one_of(
    st.dictionaries(st.sampled_from(_FIELDS), _scalars, max_size=9).map(ConfigRecord),
    st.dictionaries(st.sampled_from(_FIELDS), _numbers, max_size=5).map(MetricRecord),
    st.dictionaries(_keys, _arrays, max_size=2).map(ArrayRecord),
)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(TYPES), st.dictionaries(st.sampled_from(_RECORDS), _records, max_size=8))
def test_whatever_comes_nothing_else_than_a_protocol_error_is_raised(kind, content):
    with suppress(ProtocolError):
        assert isinstance(kind.from_content(RecordDict(content)), kind)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(list(MESSAGES)), st.data())
def test_whatever_is_done_to_a_message_nothing_else_than_a_protocol_error_is_raised(name, data):
    """Closer to the real thing: one record of a good message is replaced or broken."""
    message = MESSAGES[name]
    content = message.to_content()
    key = data.draw(st.sampled_from(list(content)))
    old = content[key]
    if isinstance(old, ArrayRecord):
        old[data.draw(st.one_of(st.sampled_from([*old, "0"]), _keys))] = data.draw(_arrays)
    elif isinstance(old, ConfigRecord):
        old[data.draw(st.sampled_from([*old, "x"]))] = data.draw(_scalars)
    else:
        old[data.draw(st.sampled_from([*old, "x"]))] = data.draw(_numbers)
    with suppress(ProtocolError):
        assert isinstance(type(message).from_content(content), type(message))


# --- the plan --------------------------------------------------------------------------------


def test_a_plan_survives_its_record():
    assert RoundPlan.from_config(PLAN.to_config()) == PLAN
    other = replace(PLAN, seed=0, lr=0.0, local_epochs=0, local_steps=3, drop_last=False, cut="")
    assert RoundPlan.from_config(other.to_config()) == other


def test_a_whole_number_passes_for_a_learning_rate():
    config = PLAN.to_config()
    config["lr"] = 1
    assert RoundPlan.from_config(config).lr == 1.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("server-round", 0),
        ("num-rounds", 0),
        ("segment-version", -1),
        ("seed", -1),
        ("lr", -0.01),
        ("lr", float("nan")),
        ("batch-size", 0),
        ("local-epochs", -1),
        ("local-steps", -1),
    ],
)
def test_a_plan_with_a_number_too_small_is_refused(field, value):
    config = PLAN.to_config()
    config[field] = value
    with pytest.raises(ProtocolError, match=f"field '{field}' is {value}, expected at least"):
        RoundPlan.from_config(config)


# --- an optimizer's state --------------------------------------------------------------------

OPTIMIZERS = {
    "SGD": SGD,
    "momentum": partial(SGD, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": Adam,
    "AMSGrad": partial(Adam, amsgrad=True),
    "AdamW": partial(AdamW, weight_decay=0.1),
}


def step(module, optimizer, count):
    for index in range(count):
        inputs = torch.linspace(-1, index + 1, 12).view(4, 3)
        optimizer.zero_grad()
        module(inputs).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_an_optimizer_goes_on_from_its_state_bit_for_bit(build):
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2)
    optimizer = UserOptimizer("optimizer", build, module.named_parameters(), 0.1)
    step(module, optimizer, 3)

    other = torch.nn.Linear(3, 2)
    other.load_state_dict(module.state_dict())
    successor = UserOptimizer("optimizer", build, other.named_parameters(), 0.1)
    arrays, numbers = state_to_records(get_state(optimizer))
    set_state(successor, state_from_records(arrays, numbers))

    for pair in ((module, optimizer), (other, successor)):
        step(*pair, 3)
    assert_same(dict(other.state_dict()), dict(module.state_dict()))


def test_the_hyper_parameters_stay_as_they_are():
    module = torch.nn.Linear(3, 2)
    first = partial(Adam, betas=(0.5, 0.9))
    optimizer = UserOptimizer("optimizer", first, module.named_parameters(), 0.1)
    step(module, optimizer, 1)
    successor = UserOptimizer("optimizer", Adam, module.named_parameters(), 0.7)
    set_state(successor, state_from_records(*state_to_records(get_state(optimizer))))
    group = successor.torch.param_groups[0]
    assert (group["lr"], group["betas"]) == (0.7, (0.9, 0.999))


def test_a_segment_without_parameters_has_no_state():
    assert get_state(None) == {}
    set_state(None, {})


@pytest.mark.parametrize(
    "key", ["step", "/step", "a/step", "-1/step", "1.5/step", "9" * 5000 + "/step"]
)
def test_a_key_of_no_parameter_is_refused(key):
    arrays = ArrayRecord({key: to_array(torch.zeros(1))})
    with pytest.raises(ProtocolError, match=r"key is .*, expected '<index>/<name>'"):
        state_from_records(arrays, ConfigRecord())
