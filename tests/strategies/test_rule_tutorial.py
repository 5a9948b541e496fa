"""docs/new-rule.md, run from top to bottom."""

import re
import tomllib
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "new-rule.md"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_the_page_runs():
    namespace = {"__name__": "tutorial"}
    for block in blocks("python"):
        exec(compile(block, str(PAGE), "exec"), namespace)
    assert "SFLGA" in namespace


def test_its_entry_point_is_toml():
    (block,) = blocks("toml")
    groups = tomllib.loads(block)["project"]["entry-points"]
    assert list(groups) == ["flsplit.rules"]
