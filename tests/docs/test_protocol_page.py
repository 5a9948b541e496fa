"""docs/protocol.md says what the code sends: every record, field and type."""

import pytest
import torch
from flwr.app import Array, ArrayRecord
from pages import Page

from flsplit import LocalGrid
from flsplit.cut import Crossing, Trace
from flsplit.cut.trace import Spec
from flsplit.errors import ProtocolError
from flsplit.message.arrays import RAW, to_array
from flsplit.message.evaluate import EvaluateReply, EvaluateRequest
from flsplit.message.local_steps import (
    AuxiliaryPlan,
    LocalReply,
    LocalRequest,
)
from flsplit.message.request import Backward, SegmentArrays
from flsplit.message.round_plan import RoundPlan
from flsplit.message.shape import ShapeReply, ShapeRequest
from flsplit.message.steps import FinishReply, FinishRequest, StepReply, StepRequest
from flsplit.message.types import (
    DESCRIBE,
    EVALUATE,
    EVALUATE_TAIL,
    FINISH,
    LOCAL,
    SHAPE,
    STEP,
    TAIL,
)
from flsplit.message.u_shape import (
    EvaluateTailReply,
    EvaluateTailRequest,
    TailReply,
    TailRequest,
)

PAGE = Page("docs/protocol.md")

ROWS = torch.zeros(2, 3)
LABELS = torch.zeros(2, dtype=torch.int64)
WEIGHTS = {"conv.weight": torch.zeros(4)}
OPTIMIZER = {0: {"momentum_buffer": torch.zeros(4), "count": 1}}
SEGMENT = SegmentArrays(0, WEIGHTS)
PLAN = RoundPlan(
    server_round=1, num_rounds=2, cut="conv", segment_version=0, seed=0, lr=0.1, batch_size=2,
    local_epochs=1, local_steps=0, drop_last=False, batch_sizes=(2,),
)  # fmt: skip

AUXILIARY = AuxiliaryPlan(kind="linear", shape=(3,), num_classes=2, version=0, train=False, lr=0.0)
DONE = {
    "client": "0", "server_round": 1, "step": 0, "num_examples": 9, "num_steps": 5, "steps_done": 5,
    "rows": [2, 2, 2, 2, 1], "seconds": 0.1,
}  # fmt: skip

SPEC = Spec((2, 3), torch.float32)
TRACE = Trace((("the inputs", SPEC), ("module front", SPEC)))
CROSSING = Crossing({"1.0": torch.zeros(2, 3, requires_grad=True)}, TRACE, frozenset(["1.0"]))

# Per table: a message with everything in it, and one with as little as there can be.
MESSAGES = {
    f"### `{STEP}`: request": (
        StepRequest(1, 0, Backward(0, ROWS), PLAN, SEGMENT, OPTIMIZER),
        StepRequest(1, 0),
    ),
    f"### `{STEP}`: reply": 2 * (StepReply("0", 1, 0, ROWS, LABELS, 9, 5, 0.1),),
    "## Where several values cross": (
        StepReply("0", 1, 0, CROSSING, LABELS, 9, 5, 0.1, {TRACE.digest: TRACE}),
        StepReply("0", 1, 0, CROSSING, LABELS, 9, 5, 0.1),
    ),
    f"### `{TAIL}`: request": 2 * (TailRequest(1, 0, ROWS),),
    f"### `{TAIL}`: reply": 2 * (TailReply("0", 1, 0, ROWS, 0.1),),
    f"### `{EVALUATE_TAIL}`: request": 2 * (EvaluateTailRequest(1, 0, 2, True, ROWS),),
    f"### `{EVALUATE_TAIL}`: reply": 2 * (EvaluateTailReply("0", 1, 0, 0.5, 2.0, 1, 2, 2, 0.1),),
    f"### `{FINISH}`: request": (
        FinishRequest(1, Backward(0, ROWS), upload_segment=True, upload_optimizer=True),
        FinishRequest(1),
    ),
    f"### `{FINISH}`: reply": (
        FinishReply("0", 1, 9, 0.1, WEIGHTS, OPTIMIZER, clipped=True),
        FinishReply("0", 1, 9, 0.1),
    ),
    f"### `{LOCAL}`: request": (
        LocalRequest(
            server_round=1,
            step=0,
            plan=PLAN,
            auxiliary_plan=AUXILIARY,
            segment=SEGMENT,
            auxiliary=WEIGHTS,
        ),
        LocalRequest(server_round=1, step=0),
    ),
    f"### `{LOCAL}`: reply": (
        LocalReply(
            **DONE, uploads={7: (ROWS, LABELS)}, segment=WEIGHTS, auxiliary=WEIGHTS, clipped=True
        ),
        LocalReply(**DONE, uploads={}),
    ),
    f"### `{SHAPE}`: request": 2 * (ShapeRequest(1, "conv"),),
    f"### `{SHAPE}`: reply": 2 * (ShapeReply("0", 1, (3,), torch.zeros(0, 4, 5), 0.1),),
    f"### `{EVALUATE}`: request": (
        EvaluateRequest(1, 0, 2, 0, SEGMENT),
        EvaluateRequest(1, 0, 2, 0),
    ),
    f"### `{EVALUATE}`: reply": 2 * (EvaluateReply("0", 1, 0, 1, ROWS, LABELS, 0.1),),
}

# How the page writes fields whose names depend on the model.
NAMES = {"conv.weight": "*parameter or buffer*", "0/momentum_buffer": "*index/name*"}
NAMES |= {"0/count": "*index/name*", "7": "*step*"}
NAMES |= {"0:1.0": "0:*value*", TRACE.digest: "*digest*"}


def kind(value):
    if isinstance(value, Array):
        return "raw array" if value.stype == RAW else "array"
    if isinstance(value, list):
        return f"list of {type(value[0]).__name__ if value else 'int'}"
    return type(value).__name__


def sent(content):
    """What a message holds, as rows of a table: record, type, field, value."""
    return {
        (name, type(record).__name__, NAMES.get(field, field), kind(value))
        for name, record in content.items()
        for field, value in record.items()
    }


def written(rows):
    """The rows of a table; the optimizer's state is written in a shorter way."""
    kinds = {("optimizer", "array"): "raw array", ("optimizer-numbers", "plain value"): "int"}
    return {
        (r["record"], r["type"], r["field"], kinds.get((r["record"], r["value"]), r["value"]))
        for r in rows
    }


@pytest.mark.parametrize("heading", MESSAGES)
def test_tables_agree_with_the_messages(heading):
    full, least = (message.to_content() for message in MESSAGES[heading])
    rows = PAGE.table(heading)
    if not heading.startswith("###"):  # what else is in a step's reply stands in its own table
        for content in (full, least):
            for name in ("reply", "metrics", "labels"):
                del content[name]

    assert written(rows) == sent(full)
    assert written(row for row in rows if row["there"] == "always") == sent(least)


@pytest.mark.parametrize("heading", MESSAGES)
def test_what_is_optional_is_optional_and_the_rest_is_not(heading):
    full, least = MESSAGES[heading]

    type(least).from_content(least.to_content())
    always = {row["record"] for row in PAGE.table(heading) if row["there"] == "always"}
    for name in always:
        content = full.to_content()
        del content[name]
        known = name if heading.startswith("###") else "smashed-data"
        with pytest.raises(ProtocolError, match=known):
            type(full).from_content(content)


class Recording(LocalGrid):
    """Keeps the contents of all messages, by type."""

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        replies = list(super().send_and_receive(messages, timeout=timeout))
        self.seen = getattr(self, "seen", [])
        for message, reply in zip(messages, replies, strict=True):
            kind_of = message.metadata.message_type
            self.seen += [(kind_of, "request", message), (kind_of, "reply", reply)]
        return replies


@pytest.fixture
def run_of_two_rounds(program):
    from digits.client_app import app
    from digits.task import CUT, build_model

    from flsplit.strategies import SequentialSL

    model = build_model()
    grid = Recording(app, num_clients=2)
    strategy = SequentialSL(model=model, cut=CUT, local_steps=3)
    strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=2)
    return grid.seen


@pytest.fixture
def decoupled_run_of_two_rounds(program):
    from digits.client_app import app
    from digits.task import CUT, build_model

    from flsplit.strategies import FSLSAGE

    model = build_model()
    grid = Recording(app, num_clients=2)
    options = {"align_every": 1, "align_epochs": 1, "local_steps": 3, "align": "in_round"}
    strategy = FSLSAGE(model=model, cut=CUT, **options)
    strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=2)
    return grid.seen


@pytest.fixture
def run_that_keeps_labels(program):
    from digits.client_app import build_model, load_partition

    from flsplit import client_app
    from flsplit.strategies import PSL

    model, cut = build_model(), ("stage1", "stage2")
    app = client_app(model=build_model, cut=cut, data=load_partition)
    grid = Recording(app, num_clients=2)
    strategy = PSL(model=model, cut=cut, local_steps=3)
    strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=1)
    return grid.seen


def test_a_real_run_sends_nothing_else(
    run_of_two_rounds, decoupled_run_of_two_rounds, run_that_keeps_labels
):
    seen = run_of_two_rounds + decoupled_run_of_two_rounds + run_that_keeps_labels
    for message_type, side, message in seen:
        rows = PAGE.table(f"### `{message_type}`: {side}")
        found = {(name, field) for name, _, field, _ in sent(message.content)}
        known = {(row["record"], row["field"]) for row in rows}
        by_name = {name for name, field in known if field.startswith("*")}
        assert {(n, f) for n, f in found if n not in by_name} <= known
        assert {n for n, _ in found} <= {n for n, _ in known}


def test_all_message_types_are_on_the_page(
    run_of_two_rounds, decoupled_run_of_two_rounds, run_that_keeps_labels
):
    listed = {row["message type"] for row in PAGE.table("# The protocol")}

    assert listed == {DESCRIBE, SHAPE, STEP, TAIL, FINISH, LOCAL, EVALUATE, EVALUATE_TAIL}
    seen = run_of_two_rounds + decoupled_run_of_two_rounds + run_that_keeps_labels
    assert listed == {message_type for message_type, _, _ in seen}


def test_t_batches_cost_t_plus_one_exchanges(run_of_two_rounds):
    types = [kind_of for kind_of, side, _ in run_of_two_rounds if side == "request"]

    num_clients, num_rounds, num_batches = 2, 2, 3
    training = types.count(STEP) + types.count(FINISH)
    assert training == num_clients * num_rounds * (num_batches + 1)


def test_a_decoupled_round_costs_one_exchange_and_one_more_to_align_in_it(
    decoupled_run_of_two_rounds,
):
    types = [kind_of for kind_of, side, _ in decoupled_run_of_two_rounds if side == "request"]

    num_clients, num_rounds = 2, 2
    assert types.count(LOCAL) == num_clients * num_rounds * 2
    assert types.count(SHAPE) == 1


def test_raw_arrays_are_as_written():
    table = {row["field"]: row["value"] for row in PAGE.table("## Arrays")}

    array = to_array(torch.tensor([[1, 2], [3, 4]], dtype=torch.int16).T)

    assert array.stype == table["stype"]
    assert array.shape == (2, 2)
    assert array.data == bytes([1, 0, 3, 0, 2, 0, 4, 0])  # C order, little-endian


@pytest.mark.filterwarnings("ignore")  # of dtypes that can't be sent anyway
def test_the_dtypes_of_raw_arrays_are_all_on_the_page():
    table = {row["field"]: row["value"] for row in PAGE.table("## Arrays")}
    listed = set(table["dtype"].removeprefix("one of ").split(", "))

    sendable = set()
    for name in dir(torch):
        dtype = getattr(torch, name)
        if isinstance(dtype, torch.dtype):
            try:
                sendable.add(to_array(torch.empty(0, dtype=dtype)).dtype)
            except (ProtocolError, RuntimeError, NotImplementedError):
                continue
    assert listed == sendable
