"""What the pages say in tables is what the code has; their snippets run."""

from dataclasses import MISSING, fields
from inspect import signature

import pytest
from pages import Page

from flsplit import SessionSettings, client_app
from flsplit.account import RoundEntry
from flsplit.account.ledger import CATEGORIES
from flsplit.run import EarlyStopping, KeepBest, PrintMetrics, SplitOptions

PAGES = [
    "README.md",
    "docs/strategies.md",
    "docs/client-parts.md",
    "docs/leakage.md",
    "docs/decoupled.md",
    "docs/carriers.md",
    "docs/ledger.md",
]


@pytest.mark.parametrize("path", PAGES)
def test_snippets_run(path, program):
    namespace = {"__name__": "snippets"}
    for block in Page(path).snippets():
        # Line numbers in a traceback are those of the page.
        code = compile("\n" * (block.line - 1) + block.text, path, "exec")
        exec(code, namespace)


def test_all_options_are_on_the_page():
    rows = {row["option"]: row["default"] for row in Page("docs/strategies.md").table("## Options")}

    assert list(rows) == [one.name for one in fields(SplitOptions)]
    for one in fields(SplitOptions):
        if one.default is MISSING and one.default_factory is MISSING:
            assert rows[one.name] == "required"
        elif one.default is None or isinstance(one.default, (str, int, float)):
            assert rows[one.name] == repr(one.default)


def test_settings_of_sessions_are_as_written():
    table = Page("docs/carriers.md").table("## Sessions")

    assert {row["setting"]: row["default"] for row in table} == {
        one.name: repr(one.default) for one in fields(SessionSettings)
    }


def test_all_categories_are_on_the_page():
    rows = Page("docs/ledger.md").table("## Bytes")

    assert [row["category"] for row in rows] == list(CATEGORIES)


def test_all_keys_of_the_history_file_are_on_the_page():
    rows = Page("docs/ledger.md").table("## The file")

    assert {row["key"] for row in rows} == RoundEntry(1).to_json().keys()


def test_all_options_of_client_app_are_on_the_page():
    rows = Page("docs/strategies.md").table("## Options of `client_app`")
    parameters = signature(client_app).parameters.values()

    assert [row["option"] for row in rows] == [one.name for one in parameters]
    for row, one in zip(rows, parameters, strict=True):
        assert (row["default"] == "required") == (one.default is one.empty)


def test_callbacks_are_as_written():
    rows = Page("docs/strategies.md").table("## Callbacks")

    assert [row["callback"] for row in rows] == [
        shown(EarlyStopping), shown(KeepBest), shown(PrintMetrics),
    ]  # fmt: skip


def shown(cls):
    arguments = signature(cls).parameters.values()
    return f"{cls.__name__}({', '.join(f'{a.name}={a.default!r}' for a in arguments)})".replace(
        "'", '"'
    )
