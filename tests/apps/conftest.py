"""The apps' packages are importable as they are where Flower runs them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "apps" / "quickstart"))
