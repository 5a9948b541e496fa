"""Reading the pages: their code blocks, the files they show, their tables."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"\*\*`([^`]+)`\*\*\n\n\Z")  # a file's name, just above its block
_HUNK = re.compile(r"^@@ .*@@$")


@dataclass(frozen=True)
class Block:
    """A fenced code block: its language, its text, the file it shows, and where it begins."""

    language: str
    text: str
    file: str
    line: int


class Page:
    """One of the repository's Markdown files."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.text = (REPOSITORY / path).read_text()

    def blocks(self, language: str = "") -> list[Block]:
        found = []
        for match in _BLOCK.finditer(self.text):
            name = _FILE.search(self.text[: match.start()])
            line = self.text.count("\n", 0, match.start()) + 2
            found.append(Block(match[1], match[2], name[1] if name else "", line))
        return [one for one in found if language in ("", one.language)]

    def files(self) -> dict[str, str]:
        """The files that the page shows complete."""
        return {one.file: one.text for one in self.blocks() if one.file}

    def snippets(self) -> list[Block]:
        """The Python blocks that are no files, to run one after the other."""
        return [one for one in self.blocks("python") if not one.file]

    def section(self, heading: str) -> str:
        """The text below a heading, up to the next one of any level."""
        _, found, rest = f"\n{self.text}".partition(f"\n{heading}\n")
        assert found, f"{self.path} has no heading {heading!r}"
        return re.split(r"^#", rest, maxsplit=1, flags=re.MULTILINE)[0]

    def table(self, heading: str) -> list[dict[str, str]]:
        """The rows of the first table below a heading, by column; backticks are removed."""
        rows = []
        for line in self.section(heading).splitlines():
            if line.startswith("|"):
                rows.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
            elif rows:
                break
        if not rows:
            return []
        return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def apply_diff(diff: str, files: dict[str, str]) -> dict[str, str]:
    """Apply a unified diff; every hunk must fit in exactly one place."""
    changed, name = dict(files), ""
    hunks: list[tuple[str, list[str]]] = []
    for line in diff.splitlines():
        if line.startswith("+++ "):
            name = line[4:]
        elif _HUNK.match(line):
            hunks.append((name, []))
        elif not line.startswith("--- "):
            hunks[-1][1].append(line or " ")
    for name, lines in hunks:
        old = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
        new = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
        assert changed[name].count(old) == 1, f"a hunk does not fit {name}:\n{old}"
        changed[name] = changed[name].replace(old, new)
    return changed


def write_files(files: dict[str, str], folder: Path) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Let what lies in a folder be imported inside the block, and be forgotten after it."""
    packages = {path.name for path in folder.iterdir() if path.is_dir()}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
            del sys.modules[name]
