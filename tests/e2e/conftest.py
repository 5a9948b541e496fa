"""What the end-to-end tests share."""

import sys

import pytest

from tests.e2e.gates import Gates
from tests.e2e.local_quickstart import QUICKSTART
from tests.e2e.strangers import ENTRY_POINTS, METHODS
from tests.packages import installed


@pytest.fixture
def quickstart(monkeypatch):
    """Make the app's modules importable, as Flower does."""
    monkeypatch.syspath_prepend(str(QUICKSTART))
    yield QUICKSTART
    for name in [name for name in sys.modules if name.split(".")[0] == "quickstart"]:
        del sys.modules[name]


@pytest.fixture
def gates(tmp_path):
    """Give a copy of the quickstart that can be held at chosen places."""
    return Gates(tmp_path)


@pytest.fixture
def package(tmp_path):
    """Install a stranger's methods; give the folder."""
    with installed(tmp_path / "site", "stranger", METHODS, ENTRY_POINTS) as folder:
        yield folder
