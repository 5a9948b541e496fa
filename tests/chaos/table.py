"""The table of faults: what was done to a run, what happened, and whether that is right.

A test of a fault is marked ``@pytest.mark.chaos("a host dies", "the others go on …")``: its second
text is what happens if the test passes. ``make chaos`` runs all of them and ends with the table.
"""

from collections import Counter

import pytest

FAULT, EXPECTED = "fault", "expected"


def pytest_configure(config):
    """Describe the marks."""
    config.addinivalue_line("markers", "chaos(fault, happens): a fault, for the table of faults")
    config.addinivalue_line("markers", "long: takes minutes; a make target of its own runs it")


def pytest_addoption(parser):
    """Add the option."""
    parser.addoption("--chaos-table", action="store_true", help="end with the table of faults")


def pytest_collection_modifyitems(items):
    """Hand on what the marks say, also from the workers of xdist."""
    for item in items:
        if mark := item.get_closest_marker("chaos"):
            fault, happens = mark.args
            item.user_properties += [(FAULT, fault), (EXPECTED, happens)]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    """Print the table."""
    if not config.getoption("--chaos-table"):
        return
    rows = Counter()  # a test's variants are one row, unless what happened differs
    for outcome in ("passed", "failed", "skipped", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            said = dict(getattr(report, "user_properties", []))
            if FAULT in said and (report.when == "call" or outcome != "passed"):
                rows[said[FAULT], *_happened(report, outcome, said[EXPECTED])] += 1
    terminalreporter.section("faults")
    head = [("fault", "tries", "what happened", "right?"), 4 * ("---",)]
    for row in [*head, *((one, str(rows[one, *rest]), *rest) for one, *rest in sorted(rows))]:
        terminalreporter.write_line("| " + " | ".join(row) + " |")


def _happened(report, outcome, expected):
    if outcome == "passed":
        return expected, "yes"
    if outcome == "skipped":
        return f"not tried here: {report.longrepr[2]}", "-"
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else str(report.longrepr)).splitlines()[0][:200], "NO"
