"""What docs/moving/ says in tables, and that links in all pages lead somewhere."""

import re

import pytest
from moving import Moved
from pages import REPOSITORY, Page

PAGES = sorted(path.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.glob("docs/**/*.md"))
MOVING = [path for path in PAGES if path.startswith("docs/moving/")]

_CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?://|mailto:)([^)#\s]*)(#[^)\s]*)?\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


@pytest.mark.parametrize("path", MOVING)
def test_files_are_as_long_as_the_table_says(path):
    project = Moved.on(path)
    rows = {row["file"]: row["lines"] for row in Page(path).table(Page(path).text.splitlines()[0])}

    for name in project.before:
        said = rows[name.rpartition("/")[2]]
        if project.before[name] == project.after[name]:
            assert said.startswith("the same")
        else:
            before, after = project.lines(name)
            assert said.partition(";")[0] == f"{before} → {after}"


def test_all_are_in_the_overview_and_the_index():
    for page in ("docs/index.md", "docs/move-over.md"):
        linked = {f"docs/{target}" for target, _ in _LINK.findall(Page(page).text)}
        assert linked >= set(MOVING)


@pytest.mark.parametrize("path", ["README.md", "CONTRIBUTING.md", *PAGES])
def test_links_lead_somewhere(path):
    here = REPOSITORY / path
    for target, anchor in _LINK.findall(_CODE.sub("", here.read_text())):
        there = (here.parent / target).resolve() if target else here
        assert there.exists(), f"{path} links to {target}"
        if anchor and there.suffix == ".md":
            assert anchor[1:] in anchors(there.read_text()), f"{path} links to {target}{anchor}"


def anchors(text):
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = _HEADING.findall(_CODE.sub("", text))
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}
