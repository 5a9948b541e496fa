"""Clients by name: who is there, in which order, and who gets what."""

import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

from flsplit.account import RoundEntry
from flsplit.carry.choose import FlowerCarrier
from flsplit.carry.refusals import BrokenAppError
from flsplit.errors import NotEnoughClientsError
from flsplit.flower_internals import ensure_task_identity, set_message_id
from flsplit.message.evaluate import EvaluateRequest
from flsplit.message.request import Backward, SegmentArrays
from flsplit.message.round_plan import RoundPlan
from flsplit.message.steps import FinishReply, FinishRequest, StepReply, StepRequest
from flsplit.message.types import DESCRIBE
from flsplit.server import directory
from flsplit.server.clients import Clients

PLAN = RoundPlan(
    server_round=1, num_rounds=1, cut="c", segment_version=3, seed=0, lr=0.1, batch_size=2,
    local_epochs=1, local_steps=0, drop_last=False,
)  # fmt: skip
SEGMENT = SegmentArrays(3, {"w": torch.ones(5)})


class Script(Grid):
    """A grid of nodes that describe themselves and otherwise answer what the test says."""

    def __init__(self, names, answer=None):
        self.names = dict(names)  # by node id
        self.answer = answer or (lambda name, message: content_of(name, message))
        self.sent = []
        self.timeouts = []
        ensure_task_identity(run_id=1)

    def get_node_ids(self):
        return list(self.names)

    def send_and_receive(self, messages, *, timeout=None):
        self.timeouts.append(timeout)
        replies = []
        for message in messages:
            name = self.names[message.metadata.dst_node_id]
            self.sent.append((name, message))
            if message.metadata.message_type == DESCRIBE:
                content = RecordDict({"reply": ConfigRecord({"client": name})})
            else:
                content = self.answer(name, message)
            if content is not None:
                replies.append(Message(content, reply_to=message))
        return reversed(replies)  # the order of arrival says nothing

    def asked(self, message_type):
        return [name for name, one in self.sent if one.metadata.message_type == message_type]

    def run(self):
        raise NotImplementedError

    set_run = create_message = push_messages = pull_messages = run


def content_of(name, message):
    request = StepRequest.from_content(message.content)
    reply = StepReply(
        name, request.server_round, request.step, torch.zeros(2, 4), torch.tensor([0, 1]), 9, 3, 0.5
    )
    return reply.to_content()


def make(names, answer=None, timeout=5):
    grid = Script(names, answer)
    clients = Clients(FlowerCarrier(grid), timeout)
    clients.directory.discover()
    return clients, grid


def exchange(clients, requests):
    entry = RoundEntry(1)
    return clients.exchange(requests, entry), entry


# --- who is there ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ["0", "1", "2", "9", "10", "11", "100"],
        ["a", "b", "b1", "b2", "b10", "c"],
        ["1", "2", "site-1", "site-2", "site-10"],
        ["01", "1", "02", "2"],
        ["node-5", "node-50", "x"],
    ],
)
def test_clients_have_a_fixed_order_whatever_their_node_ids(names):
    rng = torch.Generator().manual_seed(0)
    for _ in range(5):
        order = torch.randperm(len(names), generator=rng).tolist()
        clients, _ = make({1000 - index * 7: names[index] for index in order})
        assert clients.directory.discover() == names


def test_a_node_is_asked_for_its_name_once():
    clients, grid = make({7: "a", 8: "b"})
    for _ in range(3):
        clients.directory.discover()
    assert sorted(grid.asked(DESCRIBE)) == ["a", "b"]
    assert set(clients.directory.node_of) == {"a", "b"}


def test_nodes_come_and_go():
    clients, grid = make({7: "a", 8: "b"})
    grid.names[9] = "c"
    assert clients.directory.discover() == ["a", "b", "c"]
    del grid.names[8]
    assert clients.directory.discover() == ["a", "c"]
    grid.names[5] = "b"  # back, with another node id
    assert clients.directory.discover() == ["a", "b", "c"]
    replies, _ = exchange(clients, {"b": StepRequest(1, 0)})
    assert replies["b"].client == "b"
    assert grid.sent[-1][1].metadata.dst_node_id == 5


def test_the_superlink_answers_for_a_node_that_is_away():
    clients, grid = make({7: "a", 8: "b"})

    def send_and_receive(messages, *, timeout=None):
        replies = []
        for number, message in enumerate(messages):
            set_message_id(message, f"id-{number}")
            reply = Message(content_of("a", message), reply_to=message)
            if message.metadata.dst_node_id == 8:
                reply = Message(Error(5, "the node is away"), reply_to=message)
                reply.metadata.__dict__["_src_node_id"] = 1
            replies.append(reply)
        return replies

    grid.send_and_receive = send_and_receive
    replies, entry = exchange(clients, {"a": StepRequest(1, 0), "b": StepRequest(1, 0)})
    assert list(replies) == ["a"]
    assert [(one.client, one.reason) for one in entry.left_out] == [("b", "the node is away")]


def test_waiting_for_more_clients_than_there_are():
    clients, _ = make({7: "a"}, timeout=0)
    assert clients.directory.wait_for(1) == ["a"]
    with pytest.raises(NotEnoughClientsError, match=r"1 clients are connected after 0 s.*least 2"):
        clients.directory.wait_for(2)


def test_in_this_process_nobody_is_waited_for():
    carrier = FlowerCarrier(Script({7: "a"}))
    carrier.in_process = True
    with pytest.raises(NotEnoughClientsError, match=r"1 clients are connected after 0 s.*least 2"):
        Clients(carrier, timeout=3600).directory.wait_for(2)


def test_waiting_until_a_client_has_come(caplog):
    caplog.set_level("INFO")
    clients, grid = make({7: "a"})
    ask = grid.get_node_ids

    def come_late():
        grid.names[8] = "b"
        grid.get_node_ids = ask
        return [7]

    grid.get_node_ids = come_late
    assert clients.directory.wait_for(2) == ["a", "b"]
    assert caplog.messages == ["waiting for 2 clients, 1 are connected"]


BROKEN = "<class 'ModuleNotFoundError'>:<'No module named 'absent''>"


def broken_at(grid, nodes):
    """Let nodes answer as Flower does for an app that can't be loaded; return who is asked."""
    answers, asked = grid.send_and_receive, []

    def send_and_receive(messages, *, timeout=None):
        messages = list(messages)
        asked.append([one.metadata.dst_node_id for one in messages])
        fine = [one for one in messages if one.metadata.dst_node_id not in nodes]
        failed = [one for one in messages if one.metadata.dst_node_id in nodes]
        errors = [Message(Error(2, BROKEN), reply_to=one) for one in failed]
        return [*answers(fine, timeout=timeout), *errors]

    grid.send_and_receive = send_and_receive
    return asked


@pytest.mark.parametrize("simulated", [True, False])
def test_an_app_that_no_node_can_run_ends_the_run(simulated, monkeypatch):
    monkeypatch.setattr(directory, "_PATIENCE", 0.2)
    grid = Script({node: str(node) for node in range(100, 200)})
    asked = broken_at(grid, set(grid.names))
    clients = Clients(FlowerCarrier(grid, simulated=simulated), timeout=60)
    with pytest.raises(BrokenAppError, match=r"node 100 and \d+ more: .*No module named 'absent'"):
        clients.directory.wait_for(2)
    assert asked[0] == list(range(100, 108))  # and not all hundred
    assert len(asked) == (1 if simulated else 2)


def test_one_node_that_cannot_run_the_app_ends_nothing(monkeypatch, caplog):
    grid = Script({7: "a", 8: "b", 9: "c"})
    asked = broken_at(grid, {7})
    clients = Clients(FlowerCarrier(grid), timeout=60)
    assert clients.directory.wait_for(2) == ["b", "c"]
    assert clients.directory.discover() == ["b", "c"]
    assert asked == [[7, 8, 9]]  # it is asked again later
    assert len(caplog.messages) == 1


# --- an exchange -----------------------------------------------------------------------------


def test_replies_come_back_by_name_in_the_fixed_order():
    clients, grid = make({4: "10", 9: "2", 6: "1"})
    replies, entry = exchange(clients, {name: StepRequest(1, 0) for name in ("10", "1", "2")})
    assert list(replies) == ["1", "2", "10"]
    assert all(reply.client == name for name, reply in replies.items())
    assert entry.left_out == []
    assert entry.client_seconds == 1.5
    assert set(grid.timeouts) == {5}


def test_a_client_that_is_gone_by_now_is_left_out():
    clients, grid = make({4: "a", 5: "b"})
    del grid.names[5]
    clients.directory.discover()
    replies, entry = exchange(clients, {"a": StepRequest(1, 2), "b": StepRequest(1, 2)})
    assert list(replies) == ["a"]
    (left,) = entry.left_out
    assert (left.client, left.step) == ("b", 2)
    assert left.reason == "its node is not connected any more"


def test_nothing_to_ask_sends_nothing():
    clients, grid = make({4: "a"})
    before = len(grid.sent)
    assert exchange(clients, {})[0] == {}
    assert len(grid.sent) == before


def test_a_message_says_its_round_and_type():
    clients, grid = make({4: "a"})
    exchange(clients, {"a": StepRequest(7, 0)})
    metadata = grid.sent[-1][1].metadata
    assert (metadata.message_type, metadata.group_id) == ("train.step", "7")


def test_who_does_not_answer_well_is_left_out_and_the_rest_goes_on():
    def answer(name, message):
        content = content_of(name, message)
        if name == "silent":
            return None
        if name == "broken":
            return Error(0, "OSError: disk full")
        if name == "someone":
            content["reply"]["client"] = "else"
        return content

    clients, _ = make({1: "silent", 2: "broken", 3: "someone", 4: "well"}, answer)
    requests = {name: StepRequest(1, 2) for name in ("silent", "broken", "someone", "well")}
    replies, entry = exchange(clients, requests)
    assert list(replies) == ["well"]
    assert {one.client: (one.step, one.reason) for one in entry.left_out} == {
        "silent": (2, "no answer within 5 s"),
        "broken": (2, "OSError: disk full"),
        "someone": (2, "reply: client is 'else', expected 'someone'"),
    }


# --- segments --------------------------------------------------------------------------------


def first(segment=SEGMENT):
    return StepRequest(1, 0, plan=PLAN, segment=segment)


def sent_segments(grid):
    return [
        name
        for name, message in grid.sent
        if message.metadata.message_type == "train.step" and "arrays" in message.content
    ]


def test_a_segment_is_sent_only_to_clients_that_do_not_hold_it():
    clients, grid = make({1: "a", 2: "b"})
    exchange(clients, {"a": first()})
    exchange(clients, {"a": first(), "b": first()})
    assert sent_segments(grid) == ["a", "b"]
    exchange(clients, {"a": first(SegmentArrays(4, SEGMENT.tensors))})
    assert sent_segments(grid) == ["a", "b", "a"]
    assert clients.holds == {"a": 4, "b": 3}


def test_a_client_that_lost_its_state_is_sent_the_segment_again():
    def answer(name, message):
        if "arrays" not in message.content and forgetful:
            return Error(0, "StateLostError: client 'a' holds segment none")
        return content_of(name, message)

    clients, grid = make({1: "a", 2: "b"}, answer)
    forgetful = False
    exchange(clients, {"a": first(), "b": first()})
    forgetful = True
    replies, entry = exchange(clients, {"a": first()})
    assert list(replies) == ["a"]
    assert entry.left_out == []
    assert sent_segments(grid) == ["a", "b", "a"]
    assert entry.traffic.logical["client-segments-down"] == 20
    forgetful = False
    exchange(clients, {"b": first()})
    assert sent_segments(grid) == ["a", "b", "a"]  # the other one still holds it


def test_a_client_that_does_not_take_the_segment_does_not_hold_it():
    clients, grid = make({1: "a"}, lambda name, message: Error(0, "no"))
    for _ in range(2):
        _, entry = exchange(clients, {"a": first()})
        assert entry.left_out[0].reason == "no"
    assert sent_segments(grid) == ["a", "a"]


def test_a_client_that_loses_its_state_within_a_round_is_left_out():
    clients, _ = make({1: "a"}, lambda *_: Error(0, "StateLostError: client 'a' is in no round"))
    _, entry = exchange(clients, {"a": StepRequest(1, 2, Backward(1, None))})
    assert entry.left_out[0].reason == "StateLostError: client 'a' is in no round"


def test_an_evaluation_sends_its_segment_once_too():
    def answer(name, message):
        request = EvaluateRequest.from_content(message.content)
        sent.append(request.segment is not None)
        return Error(0, "no test data")

    sent = []
    clients, _ = make({1: "a"}, answer)
    clients.holds["a"] = 3
    exchange(clients, {"a": EvaluateRequest(1, 0, 4, 3, SEGMENT)})
    clients.holds["a"] = 2
    exchange(clients, {"a": EvaluateRequest(1, 0, 4, 3, SEGMENT)})
    assert sent == [False, True]


# --- what is counted -------------------------------------------------------------------------


def test_bytes_are_counted_from_the_tensors_that_were_sent():
    clients, _ = make({1: "a", 2: "b"})
    backward = Backward(0, torch.zeros(4, 10), shared_rows=3)
    _, entry = exchange(clients, {n: StepRequest(1, 1, backward) for n in ("a", "b")})
    logical, wire = entry.traffic.logical, entry.traffic.wire
    assert logical["activations-up"] == wire["activations-up"] == 2 * 2 * 4 * 4
    assert logical["labels-up"] == 2 * 2 * 8
    assert logical["gradients-down-broadcast"] == 3 * 10 * 4  # once
    assert logical["gradients-down-unicast"] == 2 * 1 * 10 * 4
    assert wire["gradients-down-unicast"] == 2 * 4 * 10 * 4  # a stream has no broadcast
    assert wire["gradients-down-broadcast"] == 0


def test_segments_and_optimizers_are_counted_in_both_directions():
    state = {0: {"momentum_buffer": torch.zeros(7)}}

    def answer(name, message):
        if message.metadata.message_type == "train.finish":
            reply = FinishReply(name, 1, 5, 0.1, {"w": torch.zeros(5)}, state)
            return reply.to_content()
        return content_of(name, message)

    clients, _ = make({1: "a"}, answer)
    request = StepRequest(1, 0, plan=PLAN, segment=SEGMENT, optimizer=state)
    _, entry = exchange(clients, {"a": request})
    assert entry.traffic.logical["client-segments-down"] == 5 * 4
    assert entry.traffic.logical["optimizer-down"] == 7 * 4
    finish = FinishRequest(1, None, upload_segment=True, upload_optimizer=True, like=SEGMENT)
    replies, entry = exchange(clients, {"a": finish})
    assert list(replies) == ["a"]
    assert entry.traffic.logical["client-segments-up"] == 5 * 4
    assert entry.traffic.logical["optimizer-up"] == 7 * 4
