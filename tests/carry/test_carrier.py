"""What a run asks of any carrier."""

import sys
from pathlib import Path

from flwr.app import Message, RecordDict
from reference import WrappedGrid, make_parts, plain_net, split_app
from threaded import ThreadedGrid

import flsplit
from flsplit import LocalGrid, SessionSettings
from flsplit.carry.choose import FlowerCarrier, open_carrier
from flsplit.carry.session import SessionGrid


def local_grid():
    return LocalGrid(split_app(plain_net, make_parts([8])), 1, progress=False)


def opened(grid, name="auto"):
    with open_carrier(grid, name, SessionSettings(), 5.0, experiment="e", state_dir="") as carrier:
        return carrier


def test_what_carriers_say_of_themselves():
    flower = ThreadedGrid(split_app(plain_net, make_parts([8])), 1)
    local = local_grid()
    found = [opened(flower, "flower"), opened(flower, "session"), opened(local)]
    assert [type(one) for one in found] == [FlowerCarrier, SessionGrid, LocalGrid]
    assert [one.in_process for one in found] == [False, False, True]
    assert [one.works_ahead for one in found] == [False, True, False]
    flower.join()


def test_a_carrier_is_used_as_it_is():
    wrapped = WrappedGrid(local_grid())
    for name in ("auto", "session", "flower"):
        assert opened(wrapped, name) is wrapped


def test_answers_are_received_later_by_id():
    grid = local_grid()
    node = grid.get_node_ids()[0]
    ids = grid.push_messages([Message(RecordDict(), node, "query.describe") for _ in range(2)])
    second, first = grid.receive([ids[1]]), grid.receive([ids[0]])
    for answers, one in ((first, ids[0]), (second, ids[1])):
        assert [answer.metadata.reply_to_message_id for answer in answers] == [one]
    assert grid.receive(ids) == []


def test_localgrid_adds_three_calls_of_its_own_to_a_message():
    grid = local_grid()
    messages = [Message(RecordDict(), grid.get_node_ids()[0], "query.describe")]
    grid.send_and_receive(messages)
    folder, calls = str(Path(flsplit.__file__).parent / "carry"), []

    def note(frame, event, arg):
        if event == "call" and frame.f_code.co_filename.startswith(folder):
            calls.append(frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        grid.send_and_receive(messages)
    finally:
        sys.setprofile(before)
    assert calls == ["send_and_receive", "push_messages", "answer"]
