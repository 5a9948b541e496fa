"""Whatever one client answers, the others stay who they are and do the steps that they have."""

from functools import cache

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from reference import make_parts
from tampering import set_up, train

from flsplit.message.arrays import to_array
from flsplit.message.types import DESCRIBE, EVALUATE, FINISH, LOCAL, STEP
from flsplit.strategies import CSEFSL, PSL, SequentialSL, SplitFedV1

PARTS = make_parts([8, 12, 8])
TESTS = make_parts([6, 4, 5])
METHODS = [PSL, CSEFSL, SequentialSL, SplitFedV1]
LIAR = 3  # its node: client "1"

WORDS = st.sampled_from(["0", "1", "2", "7", "", "x" * 200, "StateLostError", "\n"])
NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 4, 5, 12, 13, 10**6, 2**31, 2**62, 2**63 - 1])
FLOATS = st.sampled_from([-1.0, 0.0, 1e20, 1e300, float("nan"), float("inf")])
VALUES = {
    ConfigRecord: WORDS | NUMBERS | FLOATS | st.booleans() | st.binary(max_size=2),
    MetricRecord: NUMBERS | FLOATS | st.lists(NUMBERS, min_size=1, max_size=3),
}
TENSORS = st.sampled_from(
    [
        torch.zeros(0), torch.zeros(4), torch.zeros(4, 6), torch.full((4, 6), 1e20),
        torch.zeros(4, 5), torch.zeros(400, 6), torch.zeros(4, dtype=torch.int64),
        torch.full((4,), 99), torch.full((4,), -100), torch.full((4, 6), torch.nan),
    ]
)  # fmt: skip


class Lies:
    """Answers of client "1" that a test draws."""

    def __init__(self, draw, num_lies):
        self.draw, self.left = draw, num_lies
        self.heard = {}  # by client, what it was asked

    def __call__(self, request, reply):
        node = request.metadata.dst_node_id
        config = {
            name: {key: one for key, one in record.items() if key != "experiment"}
            if isinstance(record, ConfigRecord)
            else {key: array.shape for key, array in record.items()}
            for name, record in request.content.items()
        }
        kind = request.metadata.message_type
        if node != LIAR:
            self.heard.setdefault(node - 2, []).append((kind, config))
        elif self.left and self.draw(st.booleans()):
            self.left -= 1
            return self.lie(request, reply)
        return reply

    def lie(self, request, reply):
        if reply.has_error() or self.draw(st.integers(0, 9)) == 0:
            code = self.draw(st.sampled_from([0, 2, 7, 200]))
            return Message(Error(code, self.draw(WORDS)), reply_to=request)
        name = self.draw(st.sampled_from(sorted(reply.content)))
        record = reply.content[name]
        if not record or self.draw(st.integers(0, 9)) == 0:
            del reply.content[name]
            return reply
        key = self.draw(st.sampled_from(sorted(record)))
        if isinstance(record, ArrayRecord):
            tensor = to_array(self.draw(TENSORS))
            shape = self.draw(st.sampled_from([tensor.shape, (2**40,), (0, 2**39), (1,) * 64]))
            record[key] = Array(tensor.dtype, shape, tensor.stype, tensor.data)
        else:
            record[key] = self.draw(VALUES[type(record)])
            if key == "client" and request.metadata.message_type == DESCRIBE:
                # Of two who claim a name at the same time nobody knows who is right.
                assume(record[key] != "2")
        return reply


def run(strategy, lies):
    few = {"client": {"tests": TESTS}, "edit": lies, "evaluate_batch_size": 4}
    return train(set_up(PARTS, strategy, **few), rounds=2, timeout=1)


@cache
def told(strategy):
    """Return what the others are asked where nobody lies."""
    lies = Lies(None, 0)
    run(strategy, lies)
    return lies.heard


@pytest.mark.chaos(
    "any answer of one client",
    "the others do the same steps",
)
@pytest.mark.parametrize("strategy", METHODS)
@settings(
    max_examples=5, deadline=None, phases=[Phase.generate]
)  # a failure says all that was drawn
@given(data=st.data())
def test_no_answer_changes_who_the_others_are_and_what_they_do(strategy, data):
    expected = told(strategy)
    lies = Lies(data.draw, 4)
    result = run(strategy, lies)
    assert [entry.round for entry in result.history] == [1, 2]
    for entry in result.history:
        assert {"0", "2"} <= set(entry.participants)
        assert {"0", "2"}.isdisjoint(one.client for one in (*entry.left_out, *entry.redone))
        assert {"0", "2"}.isdisjoint(entry.restarted)
    # Step by step: the same rounds, steps, plans and batches; only gradients may differ.
    if strategy is not SequentialSL:
        assert lies.heard == expected
    else:  # a segment that was handed on has a number
        for client, heard in expected.items():
            assert [kind for kind, _ in lies.heard[client]] == [kind for kind, _ in heard]
    assert {STEP, FINISH, EVALUATE, LOCAL} & {kind for kind, _ in expected[0]}
