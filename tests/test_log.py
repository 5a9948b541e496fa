"""What can be repeated at will fills no log."""

import logging

import pytest

from flsplit import log
from flsplit.log import RareLog


@pytest.mark.chaos(
    "a flood of bad messages",
    "the log says so a few times a minute",
)
def test_of_a_flood_a_few_lines_a_minute_are_logged(monkeypatch, caplog):
    now = 0.0
    monkeypatch.setattr(log.time, "monotonic", lambda: now)
    rare = RareLog(logging.getLogger("flsplit.test"), per_minute=2)
    for number in range(5):
        rare.warning("stranger %d", number)
    assert caplog.messages == ["stranger 0", "stranger 1"]
    now = 60.0
    rare.warning("stranger %d", 5)
    assert caplog.messages[2:] == ["3 more like these were kept back", "stranger 5"]
    now = 130.0
    rare.warning("stranger %d", 6)
    assert caplog.messages[4:] == ["stranger 6"]
