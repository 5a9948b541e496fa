"""The table of docs/security.md against what crosses, message by message."""

from collections import defaultdict

import pytest
from pages import Page
from reference import MOMENTUM, WrappedGrid, make_parts, plain_net, run_split

from flsplit import strategies
from flsplit.message.types import EVALUATE, EVALUATE_TAIL

PAGE = Page("docs/security.md")
TABLE = PAGE.table("## Who sees what")
TWO_CUTS = "PSL, two cuts"
KIN = ("SGLR", "EPSL", "GAPSL", "CycleSL", "SFLGA")
COLUMNS = {
    "PSL": "PSL and its kin",
    **dict.fromkeys(KIN, "PSL and its kin"),
    **dict.fromkeys(("SplitFedV1", "SplitFedV2"), "SplitFedV1, SplitFedV2"),
    **{name: name for name in ("SequentialSL", "FSLSAGE", "CSEFSL")},
    TWO_CUTS: TWO_CUTS,
}
PARTS, TESTS = make_parts([12, 8]), make_parts([5, 4])
ARRAYS = {
    *("smashed-data", "labels", "cut-gradient", "arrays", "optimizer", "auxiliary"),
    *("outputs", "output-gradient"),
}


def run(name, wrap, **options):
    options = {"tests": TESTS, "local_steps": 2, "rounds": 3} | options
    if name == TWO_CUTS:
        cut = ("front", "middle")
        return run_split(
            strategies.PSL,
            plain_net,
            PARTS,
            wrap=wrap,
            cut=cut,
            app_options={"cut": cut},
            **options,
        )
    return run_split(getattr(strategies, name), plain_net, PARTS, wrap=wrap, **options)


class Wire(WrappedGrid):
    """Counts the records with arrays that cross, either way, and keeps their bytes."""

    def __init__(self, inner):
        super().__init__(inner)
        self.seen = defaultdict(int)
        self.bytes = []

    def push_messages(self, messages):
        messages = list(messages)
        self._look(messages, "down")
        return self.inner.push_messages(messages)

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        self._look(messages, "down")
        replies = self.inner.send_and_receive(messages, timeout=timeout)
        self._look(replies, "up")
        return replies

    def _look(self, messages, way):
        for message in messages:
            of = "test " if message.metadata.message_type in (EVALUATE, EVALUATE_TAIL) else ""
            for name, record in message.content.array_records.items():
                # Of inputs their shape is told, by an array of no rows.
                self.seen[f"{of}{name} {way}"] += any(array.data for array in record.values())
                self.bytes += [array.data for array in record.values()]


@pytest.mark.parametrize("name", list(COLUMNS))
def test_what_crosses_is_what_the_table_says(name):
    wires = []

    def wrap(grid):
        wires.append(Wire(grid))
        return wires[-1]

    run(name, wrap, optimizer=MOMENTUM)
    (wire,) = wires
    seen = {record for record, number in wire.seen.items() if number}
    said = {row["what"]: row[COLUMNS[name]] for row in TABLE}
    expected = set()
    for what, cell in said.items():
        if cell == "no" or what == "inputs":
            continue
        if what.startswith("test batches"):
            expected |= {"test smashed-data up", "test labels up"}
            if name == TWO_CUTS:
                expected = expected - {"test labels up"} | {"test outputs down"}
        elif what.startswith(("optimizer", "outputs")):
            up = "optimizer" if what.startswith("optimizer") else "output-gradient"
            expected |= {f"{what.split()[0].rstrip(',')} down", f"{up} up"}
        else:
            expected.add(what.partition(":")[0])
    # A test batch may bring the client segment, if the client doesn't hold it.
    assert seen - {"test arrays down"} == expected
    assert {record.split()[-2] for record in seen} <= ARRAYS


@pytest.mark.parametrize("name", list(COLUMNS))
def test_no_input_crosses(name):
    wires = []

    def wrap(grid):
        wires.append(Wire(grid))
        return wires[-1]

    run(name, wrap)
    rows = [row.numpy().tobytes() for part in (*PARTS, *TESTS) for row in part.tensors[0]]
    assert wires[0].bytes
    assert not any(row in data for row in rows for data in wires[0].bytes)


def test_how_often_segments_cross():
    """PSL sends a segment once to each client; SplitFed V2 every round, and the last for tests."""
    found = {}
    for name in ("PSL", "SplitFedV2"):
        wires = []

        def wrap(grid, wires=wires):
            wires.append(Wire(grid))
            return wires[-1]

        run_split(getattr(strategies, name), plain_net, PARTS, rounds=3, wrap=wrap)
        seen = wires[0].seen
        found[name] = seen["arrays down"] + seen["test arrays down"], seen["arrays up"]
    assert found == {"PSL": (2, 0), "SplitFedV2": (8, 6)}
