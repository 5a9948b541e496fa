"""Nodes that can't take part: why in one line, and asked again ever less often."""

import pytest
from flwr.app import Error

from flsplit.carry import refusals
from flsplit.carry.refusals import BrokenAppError, Refusals, brief, is_broken
from flsplit.errors import ProtocolError

# As Flower's engine hands on what Ray raises where a module is missing beside the actor.
FROM_RAY = (
    "<class 'ray.exceptions.RayTaskError(RaySystemError)'>:<'\x1b[36mray::ClientAppActor.run()"
    "\x1b[39m (pid=6095, ip=192.0.2.2)\n  At least one of the input arguments for this task could "
    "not be computed:\nray.exceptions.RaySystemError: System error: No module named 'absent'\n"
    "traceback: Traceback (most recent call last):\n          ^^^^^^\n"
    '  File "/apps/quickstart/task.py", line 3, in <module>\n    import absent\n'
    "ModuleNotFoundError: No module named 'absent''>"
)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            Error(0, FROM_RAY),
            "ModuleNotFoundError: No module named 'absent' (/apps/quickstart/task.py, line 3)",
        ),
        (
            Error(2, "<class 'ModuleNotFoundError'>:<'No module named 'absent''>"),
            "ModuleNotFoundError: No module named 'absent'",
        ),
        (
            Error(2, "<class 'SyntaxError'>:<'invalid syntax\n(client_app.py, line 1)'>"),
            "SyntaxError: invalid syntax (client_app.py, line 1)",
        ),
        (Error(1, "could not load"), "could not load"),
        (Error(8, None), "no reason given"),
        (Error(2, "x" * 10_000), "x" * 500 + "… (10000 characters)"),
    ],
)
def test_a_reason_is_one_short_line(error, expected):
    assert brief(error) == expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Error(0, FROM_RAY), True),
        (Error(1, "An exception was raised when attempting to load `ClientApp`"), True),
        (Error(2, "<class 'ValueError'>:<'no handler'>"), True),
        (Error(2, "DialError: cannot open a session stream"), False),  # flsplit's own answer
        (Error(2, "ConfigError: about <class 'x'>:<'y'>"), False),
        (Error(3, "Message Unavailable"), False),
        (Error(5, "node unavailable"), False),
        (Error(8, "the process was killed"), True),
    ],
)
def test_an_app_that_cannot_run_is_told_from_one_that_answers(error, expected):
    assert is_broken(error) is expected


def test_a_node_is_asked_again_after_ever_longer_pauses(monkeypatch, caplog):
    now = 0.0
    monkeypatch.setattr(refusals.time, "monotonic", lambda: now)
    kept, asked = Refusals(), []
    for second in range(2000):
        now = float(second)
        if kept.due([7]):
            asked.append(second)
            kept.note(7, Error(2, "DialError: no route"))
    assert asked == [0, 1, 3, 7, 15, 31, 63, 127, 255, 511, 811, 1111, 1411, 1711]
    assert caplog.messages == ["node 7 is left out: DialError: no route"]
    kept.note(7, Error(2, "DialError: another reason"))
    assert caplog.messages[1:] == ["node 7 is left out: DialError: another reason"]
    kept.ask_at_once()
    assert kept.due([9, 7]) == [7, 9]


def test_what_is_kept_is_bounded_by_the_nodes_that_are_connected():
    kept = Refusals()
    for node in range(1000):
        kept.note(node, Error(2, f"DialError: from port {node}"))
    assert len(kept.told()) < 300
    kept.keep_only({3, 4})
    assert kept.told() == "node 3: DialError: from port 3; node 4: DialError: from port 4"
    kept.forget(3)
    assert len(kept) == 1
    assert kept.due([3, 4]) == [3]


def test_nodes_with_the_same_reason_are_told_together():
    kept = Refusals()
    for node in (1, 2, 3):
        kept.note(node, Error(0, FROM_RAY))
    assert kept.all_broken()
    error = kept.broken_app()
    assert isinstance(error, BrokenAppError)
    assert "node 1 and 2 more: its ClientApp can't be run: ModuleNotFoundError" in str(error)
    kept.note(4, ProtocolError("a reply without a name"))
    assert not kept.all_broken()
