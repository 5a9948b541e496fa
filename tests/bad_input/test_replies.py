"""Replies that are not what was asked for: the client is left out, and nothing else changes.

Every reply below must leave behind what no reply at all leaves behind.
"""

from functools import cache, partial

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from reference import assert_bit_equal, make_parts, plain_net, weights_of
from tampering import answer_error, lose, of_client, set_up, train

from flsplit.errors import NotEnoughClientsError
from flsplit.message.arrays import RAW, to_array, to_record
from flsplit.message.round_plan import MOST_BATCHES
from flsplit.message.types import EVALUATE, FINISH, LOCAL, SHAPE, STEP
from flsplit.strategies import FSLSAGE, PSL, SequentialSL, SplitFedV1, SplitFedV2

PARTS = make_parts([8, 12, 8])
TESTS = make_parts([6, 4, 5])


# --- edits -----------------------------------------------------------------------------------


def field(record: str, key: str, value):
    """Set a field of the reply."""

    def edit(request, reply):
        reply.content[record][key] = value
        return reply

    return edit


def without_field(record: str, key: str):
    def edit(request, reply):
        del reply.content[record][key]
        return reply

    return edit


def with_record(key: str, record):
    def edit(request, reply):
        if key in reply.content:
            del reply.content[key]
        reply.content[key] = record
        return reply

    return edit


def without_record(key: str):
    def edit(request, reply):
        del reply.content[key]
        return reply

    return edit


def tensor(key: str, change):
    """Replace a tensor of the reply by what ``change`` makes of it."""

    def edit(request, reply):
        array = reply.content[key]["0"]
        found = torch.frombuffer(bytearray(array.data), dtype=getattr(torch, array.dtype))
        reply.content[key]["0"] = to_array(change(found.reshape(array.shape)))
        return reply

    return edit


def array(key: str, **changed):
    """Replace parts of an array of the reply: dtype, shape, stype or data."""

    def edit(request, reply):
        old = reply.content[key]["0"]
        fields = {"dtype": old.dtype, "shape": old.shape, "stype": old.stype, "data": old.data}
        reply.content[key]["0"] = Array(**(fields | changed))
        return reply

    return edit


def extra_array(key: str):
    def edit(request, reply):
        reply.content[key]["1"] = to_array(torch.zeros(2))
        return reply

    return edit


def with_nan(values):
    values = values.clone()
    values[-1, -1] = torch.nan
    return values


def with_infinity(values):
    return with_nan(values).nan_to_num(nan=-torch.inf)


def empty_content(request, reply):
    reply.content = RecordDict()
    return reply


NPY = Array(torch.zeros(4, 6).numpy())

ANY_REPLY = {
    "no answer": (lose, "no answer within"),
    "error": (answer_error, "the dog ate it"),
    "nothing in it": (empty_content, "record 'reply' is missing"),
    "another client": (field("reply", "client", "0"), "client is '0', expected '1'"),
    "nobody's": (without_field("reply", "client"), "field 'client' is missing"),
    "another round": (field("reply", "server-round", 2), "server-round is 2, expected 1"),
    "round as text": (field("reply", "server-round", "1"), "'server-round' is '1' (str), expected"),
    "reply of another type": (
        with_record("reply", MetricRecord({"server-round": 1})),
        "record 'reply' is a MetricRecord, expected a ConfigRecord",
    ),
    "no metrics": (without_record("metrics"), "record 'metrics' is missing"),
    "time before time": (field("metrics", "seconds", -1.0), "'seconds' is -1.0, expected at least"),
    "no time": (field("metrics", "seconds", float("nan")), "'seconds' is nan"),
}

TENSORS = {
    "no smashed data": (without_record("smashed-data"), "record 'smashed-data' is missing"),
    "no labels": (without_record("labels"), "record 'labels' is missing"),
    "labels of another type": (
        with_record("labels", ConfigRecord({"0": 1})),
        "record 'labels' is a ConfigRecord, expected a ArrayRecord",
    ),
    "two arrays": (extra_array("smashed-data"), "'smashed-data' holds 2 arrays, expected one"),
    "no array": (with_record("labels", ArrayRecord()), "'labels' holds 0 arrays, expected one"),
    "unknown dtype": (array("smashed-data", dtype="float31"), "smashed-data: dtype is 'float31'"),
    "another dtype": (array("smashed-data", dtype="float64"), "smashed-data: 96 bytes came"),
    "another shape": (array("smashed-data", shape=(4, 7)), "float32 of shape (4, 7) takes 112"),
    "negative shape": (array("smashed-data", shape=(-4, -6)), "shape is (-4, -6), expected sizes"),
    "huge shape": (array("labels", shape=(0, 2**62)), "labels: shape is (0, "),
    "bytes missing": (array("labels", data=b"\0" * 31), "labels: 31 bytes came"),
    "not readable": (array("labels", stype="numpy.ndarray"), "labels: not a readable array"),
    "unknown serialisation": (array("labels", stype="pickle"), "labels: not a readable array"),
    "numpy, of another shape than it says": (
        array("smashed-data", stype=NPY.stype, data=NPY.data, shape=(4, 7)),
        "the data is float32 of shape (4, 6), but the array says float32 of shape (4, 7)",
    ),
    "numpy, of another dtype than it says": (
        array("smashed-data", stype=NPY.stype, data=NPY.data, dtype="float99"),
        "but the array says float99",
    ),
    "whole numbers": (
        tensor("smashed-data", lambda t: t.long()),
        "smashed-data: dtype is torch.int64, expected floating point",
    ),
    "no rows": (tensor("smashed-data", lambda t: t[:0]), "smashed-data: shape is (0, 6), expected"),
    "a scalar": (tensor("smashed-data", lambda t: t.sum()), "smashed-data: shape is ()"),
    "a label less": (
        tensor("labels", lambda t: t[1:]),
        "labels: shape is (3,), expected 4 rows as in the smashed data (4, 6)",
    ),
    "one label": (tensor("labels", lambda t: t[0]), "labels: shape is (), expected 4 rows"),
    "NaN": (tensor("smashed-data", with_nan), "values that are NaN or infinite"),
    "infinity": (tensor("smashed-data", with_infinity), "values that are NaN or infinite"),
    "1e20": (tensor("smashed-data", lambda t: t + 1e20), "values whose squares overflow"),
}

MISFITS = {
    "rows of another shape": (
        tensor("smashed-data", lambda t: t[:, :5]),
        "can't take smashed data of shape (4, 5)",
    ),
    "float labels": (
        tensor("labels", lambda t: t.float()),
        "with labels of shape (4,) and dtype torch.float32",
    ),
    "labels of another shape": (
        tensor("labels", lambda t: t.repeat(2, 1).T),
        "with labels of shape (4, 2) and dtype torch.int64",
    ),
}

COUNTS = {
    "another step": (field("reply", "step", 0), "step is 0, expected 1"),
    "no step": (without_field("reply", "step"), "field 'step' is missing"),
    "no examples": (
        field("metrics", "num-examples", 0),
        "'num-examples' is 0, expected at least 1",
    ),
    "half a step": (
        field("metrics", "num-steps", 2.5),
        "'num-steps' is 2.5 (float), expected a int",
    ),
    "more steps than at first": (
        field("metrics", "num-steps", 4),
        "num-steps is 4, expected 3",
    ),
}

SEGMENTS = {
    "no segment": (without_record("arrays"), "the client segment was asked for"),
    "a segment of another type": (with_record("arrays", MetricRecord({"a": 1})), "MetricRecord"),
    "a tensor less": (without_field("arrays", "front.0.bias"), "missing front.0.bias"),
    "a tensor more": (
        field("arrays", "head.bias", Array(torch.zeros(3).numpy())),
        "unexpected head.bias",
    ),
    "a tensor of another shape": (
        field("arrays", "front.0.bias", Array(torch.zeros(5).numpy())),
        "'front.0.bias' came with shape (5,), expected (6,)",
    ),
    "a segment with NaN": (
        field("arrays", "front.0.bias", Array(torch.full((6,), torch.nan).numpy())),
        "'front.0.bias' has values that are NaN or infinite",
    ),
}

OPTIMIZERS = {
    "no optimizer": (without_record("optimizer"), "the optimizer's state was asked for"),
    "optimizer of nothing": (
        field("optimizer", "front.bias", to_array(torch.zeros(1))),
        "key is 'front.bias', expected '<index>/<name>'",
    ),
    "optimizer that breaks the next client's": (
        field("optimizer", "0/momentum_buffer", to_array(torch.full((6, 5), torch.nan))),
        "optimizer: [0]['momentum_buffer'] is NaN or infinite",
    ),
}


def cases(*tables, only=None):
    every = {name: case for table in tables for name, case in table.items()}
    return [pytest.param(*every[name], id=name) for name in only or every]


# What the end of a round and an evaluation have in common with a step is tried with a few.
HEADS = ["no answer", "error", "nothing in it", "another client", "another round", "no time"]
VALUES = [
    "no labels",
    "two arrays",
    "bytes missing",
    "whole numbers",
    "no rows",
    "one label",
    "NaN",
]


# --- a step ----------------------------------------------------------------------------------


def run(message_type, edit, strategy=PSL, step=None, **start):
    edited = of_client("1", message_type, edit, step=step)
    return train(set_up(PARTS, strategy, client={"tests": TESTS}, edit=edited), **start)


def numbers(result):
    """Return the ledger without the reasons why clients were left out."""
    found = result.history.numbers()
    for entry in found:
        entry["left-out"] = [(one["client"], one["step"]) for one in entry["left-out"]]
    return found


def assert_only_left_out(result, baseline, reason):
    left = result.history[0].left_out[0]
    assert left.client == "1"
    assert reason in left.reason
    assert_bit_equal(weights_of(result.arrays), weights_of(baseline.arrays))
    assert numbers(result) == numbers(baseline)


@pytest.fixture
def silent_step():
    return silent(STEP, step=1)


@cache
def silent(message_type, strategy=PSL, step=None):
    """Train while one client doesn't answer; once, but in a test, with its number of threads."""
    return run(message_type, lose, strategy, step)


def test_a_client_that_does_not_answer_leaves_the_others_to_go_on(silent_step):
    (entry,) = silent_step.history
    (left,) = entry.left_out
    assert (left.client, left.step) == ("1", 1)
    assert left.reason == "no answer within 3600 s"
    assert entry.rows == 4 + 8 + 8
    assert entry.steps == 2
    assert entry.evaluation["num-examples"] == 15  # by then it answers again


@pytest.mark.chaos(
    "a step's reply with values out of range (labels, NaN, 1e20, rows)",
    "its client is left out with the reason, the others go on",
)
@pytest.mark.parametrize(("edit", "reason"), cases(ANY_REPLY, TENSORS, COUNTS))
def test_a_reply_to_a_step_that_cannot_be_used(edit, reason, silent_step):
    assert_only_left_out(run(STEP, edit, step=1), silent_step, reason)


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("strategy", [PSL, SplitFedV1, SequentialSL])
@pytest.mark.parametrize(("edit", "reason"), cases(MISFITS))
def test_a_reply_that_does_not_fit_the_server_segment(edit, reason, strategy, step):
    assert_misfit_left_out(run(STEP, edit, strategy, step), silent(STEP, strategy, step), reason)


@pytest.mark.chaos(
    "an upload that doesn't fit",
    "its client is left out with the reason, the others go on",
)
@pytest.mark.parametrize(("edit", "reason"), cases(MISFITS))
def test_an_upload_that_does_not_fit_the_server_segment(edit, reason):
    assert_misfit_left_out(run(LOCAL, edit, FSLSAGE), silent(LOCAL, FSLSAGE), reason)


def assert_misfit_left_out(result, baseline, reason):
    """As above, but the bytes did come."""
    left = result.history[0].left_out[0]
    assert left.client == "1"
    assert reason in left.reason
    assert_bit_equal(weights_of(result.arrays), weights_of(baseline.arrays))
    found, expected = numbers(result), numbers(baseline)
    for entry in found + expected:
        del entry["logical-bytes"]
    assert found == expected


@pytest.mark.parametrize("strategy", [PSL, FSLSAGE])
def test_a_client_can_not_take_more_local_steps_than_it_was_told(strategy):
    kind = STEP if strategy is PSL else LOCAL
    edit = of_client("1", kind, field("metrics", "num-steps", 10**9))
    result = train(set_up(PARTS, strategy, edit=edit, local_steps=2))
    (left,) = result.history[0].left_out
    assert left.reason == "reply: num-steps is 1000000000, expected 2"


def test_a_client_left_out_of_a_round_takes_part_in_the_next():
    result = run(STEP, lose, step=1, rounds=2)
    assert [len(entry.left_out) for entry in result.history] == [1, 1]
    result = run(STEP, lose_once(), step=1, rounds=2)
    assert [len(entry.left_out) for entry in result.history] == [1, 0]
    assert result.history[1].rows == 28


def lose_once():
    lost = []

    def edit(request, reply):
        lost.append(reply)
        return None if len(lost) == 1 else reply

    return edit


def test_the_reason_is_in_the_error_when_nobody_is_left():
    strategy, grid, arrays = set_up(PARTS[:1], edit=lambda *_: None)
    grid.edit = lambda request, reply: None if request.metadata.message_type == STEP else reply
    expected = r"round 1: 0 of 1 clients are left.*client '0': no answer within 9 s"
    with pytest.raises(NotEnoughClientsError, match=expected):
        train((strategy, grid, arrays), timeout=9)


def test_fewer_clients_than_min_available_nodes_end_the_run():
    edit = of_client("1", STEP, answer_error, step=1)
    expected = r"round 1: 2 of 3 clients are left, expected 3 or more .*client '1': the dog ate it"
    with pytest.raises(NotEnoughClientsError, match=expected):
        train(set_up(PARTS, edit=edit, min_available_nodes=3))


# --- the end of a round ----------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [SplitFedV1, SplitFedV2, SequentialSL])
@pytest.mark.parametrize(("edit", "reason"), cases(SEGMENTS))
def test_a_segment_that_cannot_be_used(edit, reason, strategy):
    assert_only_left_out(run(FINISH, edit, strategy), silent(FINISH, strategy), reason)


@pytest.mark.parametrize(("edit", "reason"), cases(ANY_REPLY, only=HEADS))
def test_an_end_of_a_round_that_cannot_be_used(edit, reason):
    assert_only_left_out(run(FINISH, edit, SplitFedV2), silent(FINISH, SplitFedV2), reason)


@pytest.mark.parametrize(("edit", "reason"), cases(OPTIMIZERS))
def test_an_optimizer_that_cannot_be_handed_on(edit, reason):
    result, baseline = run(FINISH, edit, SequentialSL), silent(FINISH, SequentialSL)
    assert_only_left_out(result, baseline, reason)


def test_an_infinite_buffer_that_the_client_was_given_may_come_back():
    """A mask of -inf is no broken weight."""

    class Masked(torch.nn.Tanh):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, -torch.inf]))

        def forward(self, x):
            return super().forward(x) * self.mask.exp()

    def build():
        net = plain_net()
        net.front[1] = Masked()
        return net

    result = train(set_up(PARTS, SplitFedV2, build=build))
    assert "front.1.mask" in result.arrays
    assert result.history[0].left_out == []


# --- evaluation ------------------------------------------------------------------------------


EVALUATIONS = {
    "another batch": (field("reply", "batch", 1), "batch is 1, expected 0"),
    "batches below zero": (field("metrics", "num-batches", -1), "'num-batches' is -1, expected"),
}


@pytest.mark.parametrize(
    ("edit", "reason"), cases(EVALUATIONS) + cases(ANY_REPLY, TENSORS, only=HEADS + VALUES)
)
def test_a_reply_to_an_evaluation_that_cannot_be_used(edit, reason):
    result = run(EVALUATE, edit)
    assert result.history[0].evaluation["num-examples"] == 11
    assert_only_left_out(result, silent(EVALUATE), reason)


@pytest.mark.parametrize(("edit", "reason"), cases(MISFITS))
def test_a_test_batch_that_does_not_fit_the_server_segment(edit, reason):
    result = run(EVALUATE, edit)
    assert result.history[0].evaluation["num-examples"] == 11
    assert_misfit_left_out(result, silent(EVALUATE), reason)


# --- who is there ----------------------------------------------------------------------------


def test_a_segment_may_travel_in_any_serialisation_of_flower():
    """Whoever answers in Flower's own format is understood as well."""

    def npy(request, reply):
        for key in ("smashed-data", "labels"):
            raw = reply.content[key]["0"]
            assert raw.stype == RAW
            values = torch.frombuffer(bytearray(raw.data), dtype=getattr(torch, raw.dtype))
            record = to_record({"0": values.reshape(raw.shape)})
            reply.content[key]["0"] = record["0"]
        return reply

    result, plain = run(STEP, npy), run(STEP, lambda request, reply: reply)
    assert result.history[0].left_out == []
    assert_bit_equal(weights_of(result.arrays), weights_of(plain.arrays))
    assert numbers(result) == numbers(plain)


# --- numbers that make no sense ----------------------------------------------------------------

# Client 1 has 12 training examples, in batches of 4, and 4 test examples.
NONSENSE = {
    "examples from nowhere": (
        field("metrics", "num-examples", 10**6),
        "num-examples is 1000000, expected 12",
    ),
    "more examples than there are": (
        field("metrics", "num-examples", 2**62),
        "'num-examples' is 4611686018427387904, expected at most 1000000000000",
    ),
    "an age of computing": (field("metrics", "seconds", 1e300), "'seconds' is 1e+300, expected at"),
    "an infinite time": (field("metrics", "seconds", float("inf")), "'seconds' is inf, expected"),
}


@pytest.mark.chaos(
    "num-batches, num-examples, seconds that make no sense",
    "their client is left out with the reason, the others go on",
)
@pytest.mark.parametrize(("edit", "reason"), cases(NONSENSE))
def test_numbers_that_make_no_sense(edit, reason, silent_step):
    assert_only_left_out(run(STEP, edit, step=1), silent_step, reason)
    if "num-examples" in reason:  # it would weigh more in an average
        assert_only_left_out(run(FINISH, edit, SplitFedV1), silent(FINISH, SplitFedV1), reason)


def told(steps, examples):
    def edit(request, reply):
        reply.content["metrics"]["num-steps"] = steps
        reply.content["metrics"]["num-examples"] = examples
        return reply

    return edit


@pytest.mark.chaos(
    "a client claims more steps than its data has",
    "it is left out with the reason",
)
@pytest.mark.parametrize("strategy", [PSL, FSLSAGE])
@pytest.mark.parametrize(
    ("steps", "examples", "reason"),
    [
        (4, 12, "num-steps is 4, expected 3 (num-examples is 12, batch-size 4, local-epochs 1)"),
        (10**9, 12, "num-steps is 1000000000, expected 3"),
        (3, 10**6, "num-steps is 3, expected 250000 (num-examples is 1000000"),
        (25 * 10**10, 10**12, "num-steps is 250000000000, expected "),
        (2**62, 2**62, "expected at most 1000000000000"),
    ],
)
def test_a_client_has_as_many_steps_as_its_data(strategy, steps, examples, reason):
    kind = STEP if strategy is PSL else LOCAL
    result = run(kind, told(steps, examples), strategy)
    (left,) = result.history[0].left_out
    assert left.client == "1"
    assert reason in left.reason


def test_a_client_with_more_steps_than_anybody_has():
    edit = of_client("1", STEP, told(MOST_BATCHES + 1, 4 * (MOST_BATCHES + 1)))
    (left,) = train(set_up(PARTS, edit=edit)).history[0].left_out
    assert left.reason.startswith("reply: num-steps is 1000001, expected at most 1000000 (num-")


def done_with(steps):
    def edit(request, reply):
        told(steps, 4 * steps)(request, reply)
        reply.content["metrics"]["steps-done"] = steps
        return reply

    return edit


def test_steps_that_are_only_said_to_be_done_cost_the_server_nothing():
    """A list of them would have a million entries."""
    before = partial(FSLSAGE, align="before_round")  # its first request is for all steps
    (left,) = run(LOCAL, done_with(MOST_BATCHES), before).history[0].left_out
    assert left.reason == "field 'rows' has 3 numbers, expected 1000000"


def test_memory_that_nobody_has():
    edit = field("memory", "segment", 2**60)
    (left,) = run(LOCAL, edit, FSLSAGE).history[0].left_out
    assert left.reason.startswith("memory: {'segment': 1152921504606846976")


@pytest.mark.chaos(
    "an error of a megabyte",
    "the history keeps its beginning",
)
def test_a_reason_that_would_fill_the_history():
    edit = field("reply", "client", "x" * 10**6)
    (left,) = run(STEP, edit, step=1).history[0].left_out
    assert len(left.reason) < 2100
    assert left.reason.endswith("… (1000033 characters)")


def always_more(request, reply):
    reply.content["reply"]["batch"] = asked = request.content["config"]["batch"]
    reply.content["metrics"]["num-batches"] = asked + 2
    return reply


ENDLESS = {
    "always one more": (always_more, "num-batches is 3, expected 2"),
    "as many as can be said": (
        field("metrics", "num-batches", 2**62),
        "'num-batches' is 4611686018427387904, expected at most 1000000",
    ),
    "short ones": (
        lambda request, reply: short_test_batch(always_more(request, reply)),
        "smashed-data: test batch 0 of 2 has 1 rows, expected 2 in all but the last",
    ),
}


def short_test_batch(reply):
    for key in ("smashed-data", "labels"):
        tensor(key, lambda t: t[:1])(None, reply)
    return reply


@pytest.mark.chaos(
    "an evaluation that never ends",
    "it ends, its client is left out of it",
)
@pytest.mark.parametrize(("edit", "reason"), cases(ENDLESS))
def test_an_endless_evaluation_ends(edit, reason):
    edited = of_client("1", EVALUATE, edit)
    run = set_up(PARTS, client={"tests": TESTS}, edit=edited, evaluate_batch_size=2)
    result = train(run)
    (left,) = result.history[0].left_out
    assert left.client == "1"
    assert reason in left.reason


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ([2**20, 2**20], "a row has shape (1048576, 1048576), expected at most 268435456 values"),
        ([1] * 17, "field 'shape' has 17 sizes, expected at most 16"),
        ([7], "the server segment can't take smashed data of shape (1, 7)"),
    ],
)
def test_a_row_that_the_first_client_does_not_have(shape, reason):
    """The server builds auxiliary models for all from it."""
    edit = of_client("0", SHAPE, field("smashed-data", "shape", shape))
    result = train(set_up(PARTS, FSLSAGE, edit=edit))
    (left,) = result.history[0].left_out
    assert left.client == "0"
    assert reason in left.reason
    alone = train(set_up(PARTS, FSLSAGE, edit=of_client("0", SHAPE, lose)))
    assert_bit_equal(weights_of(result.arrays), weights_of(alone.arrays))
