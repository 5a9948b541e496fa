"""A Flower app in a temporary folder, made of a ClientApp and a ServerApp of this package."""

import json
from collections.abc import Mapping
from pathlib import Path

from flsplit.bench.figures import BenchError
from flsplit.processes import FinishedRun

RunConfig = Mapping[str, bool | int | float | str]
"""The keys of a run config and their defaults."""

_PYPROJECT = """\
[project]
name = "flsplit-bench"
version = "1.0.0"
description = "Measures carriers."
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

# Flower looks for a plain assignment in the source before it loads an app.
_SOURCE = "from {module} import {function}\n\napp = {function}()\n"


def write_app(folder: Path, client: str, server: str, config: RunConfig) -> Path:
    """Write an app whose ClientApp and ServerApp are what two functions return.

    Parameters
    ----------
    folder : Path
        Where to; it is made.
    client, server : str
        The functions, as ``module:function``.
    config : mapping
        The run config's keys and their defaults.
    """
    package = folder / "flsplit_bench"
    package.mkdir(parents=True)
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in config.items()]
    (folder / "pyproject.toml").write_text(_PYPROJECT + "".join(lines))
    (package / "__init__.py").touch()
    for name, found in (("client_app", client), ("server_app", server)):
        module, _, function = found.partition(":")
        source = _SOURCE.format(module=module, function=function)
        (package / f"{name}.py").write_text(source)
    return folder


def check_completed(finished: FinishedRun, what: str) -> None:
    """Raise BenchError with the end of the log if a run did not complete."""
    if not finished.completed:
        tail = "\n".join(finished.log.splitlines()[-60:])
        raise BenchError(f"{what}: the run is {finished.status} {finished.details}\n{tail}")
