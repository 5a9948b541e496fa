"""torchvision is imported when it is asked for, and only then."""

import subprocess
import sys


def run(code):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_models_and_transforms_work():
    code = """
import sys
import flsplit.cut
from flsplit.vision import load_torchvision
print("torchvision" in sys.modules)
torchvision = load_torchvision()
assert load_torchvision() is torchvision
import torchvision.transforms.v2
print(torchvision.models.resnet18 is not None, torchvision.transforms.v2.Resize(4).size)
"""
    assert run(code).splitlines() == ["False", "True [4]"]


def test_a_torchvision_that_imports_is_left_alone(tmp_path):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import torch
from flsplit.vision import load_torchvision
print(load_torchvision().__file__, hasattr(torch.ops.torchvision, "nms"))
"""
    assert run(code) == f"{package / '__init__.py'} False"


def test_other_failures_are_passed_on(tmp_path):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('something else')")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from flsplit.vision import load_torchvision
try:
    load_torchvision()
except RuntimeError as error:
    print(error)
"""
    assert run(code) == "something else"
