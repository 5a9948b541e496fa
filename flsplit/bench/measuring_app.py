"""Apps that measure: run in a real deployment or simulation, they write down what they found."""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from flsplit.bench.figures import BenchError
from flsplit.processes import FinishedRun, deployment, simulation

Measure = Callable[[Mapping[str, Any]], Any]
"""Runs the app with a run config; returns what its ServerApp has written to ``output``."""

_PYPROJECT = """\
[project]
name = "flsplit-bench"
version = "1.0.0"
description = "Measures."
license = "Apache-2.0"
dependencies = ["flwr>=1.41"]

[tool.uv]
exclude-dependencies = ["flwr"]

[tool.flwr.app]
publisher = "flsplit"

[tool.flwr.app.components]
serverapp = "flsplit_bench.server_app:app"
clientapp = "flsplit_bench.client_app:app"

[tool.flwr.app.config]
"""


@contextmanager
def measuring(
    setting: str, clients: int, module: ModuleType, timeout: float = 900.0
) -> Iterator[Measure]:
    """Start Flower, and yield what runs an app there.

    ``module`` has the functions ``client_app`` and ``server_app``, and ``CONFIG``: the keys of the
    run config and their defaults, ``clients`` and ``output`` among them.
    """
    with tempfile.TemporaryDirectory(prefix="flsplit-bench-") as temporary:
        folder = Path(temporary)
        app = _write_app(folder / "app", module)
        start: Any = deployment if setting == "deployed" else simulation
        with start(folder / "flower", clients) as flower:

            def measure(config: Mapping[str, Any]) -> Any:
                output = folder / "measured.json"
                config = {"clients": clients, "output": str(output), **config}
                finished: FinishedRun = flower.run_app(app, run_config=config, timeout=timeout)
                if not finished.completed:
                    tail = "\n".join(finished.log.splitlines()[-60:])
                    raise BenchError(f"the run is {finished.status} {finished.details}\n{tail}")
                return json.loads(output.read_text())

            yield measure


def _write_app(folder: Path, module: ModuleType) -> Path:
    package = folder / "flsplit_bench"
    package.mkdir(parents=True)
    config = [f"{key} = {json.dumps(value)}\n" for key, value in module.CONFIG.items()]
    (folder / "pyproject.toml").write_text(_PYPROJECT + "".join(config))
    (package / "__init__.py").touch()
    for name in ("client_app", "server_app"):
        # Flower looks for a plain assignment in the source before it loads an app.
        source = f"from {module.__name__} import {name}\n\napp = {name}()\n"
        (package / f"{name}.py").write_text(source)
    return folder
