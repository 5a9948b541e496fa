"""What the server hears of an exception at a client."""

import json
import re

import pytest

from flsplit.errors import DataError
from flsplit.message.raised import reason_of


def load(key):
    return {"train": 1}[key]


def parse(text):
    return json.loads(text)


def refuse(text):
    raise DataError(text)


@pytest.mark.parametrize(
    ("function", "argument", "said"),
    [
        (load, "test", r"KeyError: 'test' \(test_raised\.py, line \d+, in load\)"),
        (parse, "{", r"JSONDecodeError: .* \(test_raised\.py, line \d+, in parse\)"),
        (refuse, "no examples", "DataError: no examples"),
    ],
    ids=["own", "in a library", "flsplit's"],
)
def test_it_is_told_where_in_the_users_code_it_was(function, argument, said):
    with pytest.raises(Exception, match=r".") as caught:
        function(argument)
    reason = reason_of(caught.value)
    assert re.fullmatch(said, reason), reason
