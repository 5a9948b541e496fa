"""The apps' modules are importable as they are where they run."""

import logging
import sys
from pathlib import Path

import pytest
import torch

APPS = Path(__file__).resolve().parents[2] / "apps"

sys.path[:0] = [str(APPS / app) for app in ("quickstart", "compare", "llm", "privacy")]


@pytest.fixture(autouse=True, scope="module")
def as_it_was():
    """Undo what scripts do to their own process: they are quiet, and use one thread."""
    logger, threads = logging.getLogger("flwr"), torch.get_num_threads()
    level = logger.level
    yield
    logger.setLevel(level)
    torch.set_num_threads(threads)
