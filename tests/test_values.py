"""The script that compares checkouts: it finds what differs, and nothing where nothing does."""

import copy
import math

from tests import values


def test_a_difference_in_the_last_bit_is_found_and_seconds_are_not_compared(capsys):
    method = {
        "weights": "ab12",
        "numbers": [{"round": 1, "loss": 0.1, "metrics": {"ratio": math.nan}}],
        "seconds": 1.0,
    }
    old = {"plain": {"one": method, "other": copy.deepcopy(method)}}
    new = copy.deepcopy(old)
    new["plain"]["one"]["seconds"] = 2.0
    assert values.compare(old, new) == 0

    new["plain"]["one"]["numbers"][0]["loss"] = math.nextafter(0.1, 1.0)
    assert values.compare(old, new) == 1
    assert "/numbers/0/loss: 0.1 became 0.10000000000000002" in capsys.readouterr().out

    del new["plain"]["one"], new["plain"]["other"]
    assert values.compare(old, new) == 1


def test_a_method_that_fails_is_told_and_does_not_end_the_others(monkeypatch, capsys):
    def fail(name, build):
        raise LookupError(name)

    monkeypatch.setattr(values, "train", fail)
    found = values.measure(["psl", "epsl"])

    assert found["dropout"]["epsl"] == {"error": "LookupError: epsl"}
    assert found["plain"].keys() == {"psl", "epsl"}
    assert values.compare(found, found) == 1, "failing alike is not being equal"
