"""The README's program as a package that can be imported, in every test here."""

import pytest
from pages import Page, importable, write_files


@pytest.fixture
def program(tmp_path):
    """The folder with the README's program; its package can be imported."""
    folder = write_files(Page("README.md").files(), tmp_path / "program")
    with importable(folder):
        yield folder
