"""What is imported, and when."""

import subprocess
import sys

CODE = """
import sys
from flsplit.cli import app
from flsplit.run import make_strategy
from flsplit.wireless import Problem, Training, load_fleet, make_plan, profile_model
from torch import nn

model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
profile = profile_model(model, (1, 8, 8))
for name in ("epsl", "fsl-sage"):
    method = make_strategy(name, model=model, cut="0").planned()
    make_plan(Problem(load_fleet("docs/fleet.toml"), profile, method, Training()))
print(sorted({"scipy", "matplotlib", "ray"} & sys.modules.keys()))
"""


def test_plans_are_made_without_what_takes_long_to_import():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_command_line_answers_without_torch():
    code = """
import sys
import flsplit.cli
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False", done.stderr


def test_names_that_are_imported_late_are_there():
    code = """
import flsplit
assert {*flsplit.__all__, "__version__"} <= set(dir(flsplit))
print([name for name in flsplit.__all__ if getattr(flsplit, name).__name__ != name])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
