"""The text: what is on every machine that can run this app, so that nothing is downloaded.

The server's, which is public, is the reference of the Python language as ``help()`` shows it. The
clients' are the docstrings of four packages that flsplit needs itself, dealt out by package: what
one client has is of one kind, and another than the server's.
"""

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from pydoc_data.topics import topics

PACKAGES = ("numpy", "scipy.signal", "matplotlib", "torch.nn")
CHARACTERS = 200_000  # of each package
SHORTEST = 400  # docstrings below that are mostly names
HELD_OUT_EVERY = 10


@dataclass(frozen=True)
class Document:
    """A docstring, and of what it is one."""

    about: str
    text: str


def public_texts() -> list[str]:
    """Return the server's documents."""
    return [text for _, text in sorted(topics.items())]


def documents_of(client: int, num_clients: int) -> tuple[list[Document], list[Document]]:
    """Return a client's documents for training, and those that are held out.

    Clients take turns with the packages; those of one package share its documents out.
    """
    package = PACKAGES[client % len(PACKAGES)]
    sharing = range(client % len(PACKAGES), num_clients, len(PACKAGES))
    own = docstrings(package)[sharing.index(client) :: len(sharing)]
    held_out = own[::HELD_OUT_EVERY]
    return [one for index, one in enumerate(own) if index % HELD_OUT_EVERY], held_out


@lru_cache
def docstrings(package: str) -> list[Document]:
    """Return a package's docstrings, read and not run, in the order of its files."""
    found: dict[str, Document] = {}  # by their beginning: many are there twice
    size = 0
    for path in _sources(package):
        for document in _docstrings_in(path):
            if found.setdefault(document.text[:SHORTEST], document) is document:
                size += len(document.text)
        if size >= CHARACTERS:
            break
    return list(found.values())


def _sources(package: str) -> Iterator[Path]:
    spec = importlib.util.find_spec(package)
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in sorted(Path(folder).rglob("*.py")):
            if not {"test", "tests"} & set(path.parts):
                yield path


def _docstrings_in(path: Path) -> Iterator[Document]:
    tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node) or ""
            if len(text) >= SHORTEST:
                yield Document(f"{path.stem}.{node.name}", text)
