"""A method of somebody else's package is planned; test_same_numbers.py runs it."""

import json
import subprocess
import sys

from tests.flower_processes import REPOSITORY


def test_a_stranger_s_method_is_planned_by_its_own_phases(package):
    def planned(name, arguments="{}"):
        command = [
            sys.executable, "-c", "from flsplit.cli import app; app()", "plan",
            str(REPOSITORY / "docs/fleet.toml"), "--model", "resnet18", "--input", "3x32x32",
            "--strategy", name, "--strategy-args", arguments, "--json",
        ]  # fmt: skip
        path = f"{package}:{REPOSITORY}"
        done = subprocess.run(
            command,
            env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin"},
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        return json.loads(done.stdout)["stages_s"]

    once, thrice = (
        planned("stranger-cycle", "{server-epochs = 1}"),
        planned("stranger-cycle", "{server-epochs = 5}"),
    )
    # (E + 1) passes over the rows, whatever else the plan chooses alike
    assert thrice["server forward"] > 2 * once["server forward"] > 0
