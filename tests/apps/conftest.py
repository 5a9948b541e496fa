"""The apps' modules are importable as they are where they run."""

import sys
from pathlib import Path

APPS = Path(__file__).resolve().parents[2] / "apps"

sys.path[:0] = [str(APPS / app) for app in ("quickstart", "compare", "llm", "privacy")]
