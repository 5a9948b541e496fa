"""Who a node may be: what one says of itself changes nothing for the others."""

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid
from hypothesis import given, settings
from hypothesis import strategies as st

from flsplit.carry.choose import FlowerCarrier
from flsplit.flower_internals import ensure_task_identity
from flsplit.message.raised import MAX_REASON, shortened
from flsplit.server.directory import MAX_NAME, AwayError, Directory, raise_error


class Nodes(Grid):
    """Nodes that say of themselves what a test wants."""

    def __init__(self, said):
        self.said = dict(said)  # by node id
        ensure_task_identity(run_id=1)

    def get_node_ids(self):
        return list(self.said)

    def send_and_receive(self, messages, *, timeout=None):
        replies = []
        for message in messages:
            said = self.said[message.metadata.dst_node_id]
            if isinstance(said, Error):
                replies.append(Message(said, reply_to=message))
            else:
                content = RecordDict({"reply": ConfigRecord({"client": said})})
                replies.append(Message(content, reply_to=message))
        return reversed(replies)

    def run(self):
        raise NotImplementedError

    set_run = create_message = push_messages = pull_messages = run


def directory(said):
    nodes = Nodes(said)
    return Directory(FlowerCarrier(nodes), timeout=1.0), nodes


@pytest.mark.chaos(
    "a twin joins",
    "it is not used, and the log says why",
)
def test_of_two_nodes_of_one_name_the_first_is_used(caplog):
    who, nodes = directory({7: "a", 8: "b"})
    who.discover()
    nodes.said |= {5: "a"}
    assert who.discover() == ["a", "b"]
    assert who.node_of == {"a": 7, "b": 8}
    assert "node 5 is left out: two nodes call themselves client 'a'; give each" in caplog.text
    del nodes.said[7]
    assert (who.discover(), who.node_of["a"]) == (["a", "b"], 5)
    nodes.said[7] = "a"  # who had the name first has it whenever it is there
    assert (who.discover(), who.node_of["a"]) == (["a", "b"], 7)


def test_twins_from_the_start_cost_one_of_them_its_place():
    who, nodes = directory({9: "a", 8: "b", 7: "a"})
    assert who.discover() == ["a", "b"]
    assert who.node_of["a"] == 7  # whatever came first
    nodes.said[9] = "c"  # its operator has mended it
    assert who.discover() == ["a", "b", "c"]


@pytest.mark.chaos(
    "a node changes its name",
    "it is left out",
)
def test_a_client_cannot_become_another():
    who, nodes = directory({7: "a", 8: "b"})
    who.discover()
    nodes.said = {}
    who.discover()
    nodes.said = {8: "a"}
    assert who.discover() == []
    assert "it calls itself client 'a', and was client 'b'" in who._refusals()


@pytest.mark.chaos(
    "a name of 5000 digits, or none",
    "its node is left out with the reason",
)
@pytest.mark.parametrize(
    "name", ["", "1" * 5000, "x" * (MAX_NAME + 1), "a\nWARNING", "\x1b[2J", "\udc80"]
)
def test_a_name_that_is_no_name_costs_its_node_its_place(name):
    who, _ = directory({7: "a", 8: name, 9: "c"})
    assert who.discover() == ["a", "c"]
    assert "expected 1 to 100 that can be printed" in who._refusals()
    assert len(who._refusals()) < 300


def test_a_long_name_may_be_used():
    assert directory({7: "9" * MAX_NAME, 8: "b"})[0].discover() == ["9" * MAX_NAME, "b"]


@pytest.mark.parametrize("code", [0, 5])
def test_a_reason_is_kept_to_its_beginning(code):
    message = Message(RecordDict(), 7, "query")
    reply = Message(Error(code, "x\n" * 10**6), reply_to=message)
    with pytest.raises(Exception) as caught:  # noqa: PT011
        raise_error(reply)
    assert isinstance(caught.value, AwayError) is (code == 5)
    assert str(caught.value) == "x " * (MAX_REASON // 2) + "… (2000000 characters)"
    assert shortened("as it is") == "as it is"


WORDS = st.sampled_from(["a", "b", "c", "0", "", 1, True, b"a", Error(5, "away")]) | st.text(
    max_size=3
)


@pytest.mark.chaos(
    "any answer to describe",
    "no other client's name is taken",
)
@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(WORDS | st.none(), st.booleans()), max_size=6), st.sampled_from([1, 9]))
def test_nothing_that_a_node_says_takes_another_s_name(told, liar):
    who, nodes = directory({7: "a", 8: "b"})
    who.discover()
    for said, away in told:  # None: the liar is not connected; away: client b isn't
        nodes.said = {7: "a"}
        if not away:
            nodes.said[8] = "b"
        if said is not None:
            nodes.said[liar] = said
        names = who.discover()
        assert who.node_of["a"] == 7
        assert away or who.node_of["b"] == 8
        assert set(who.node_of.values()) <= set(nodes.said)
        assert sorted(names) == sorted(who.node_of)
