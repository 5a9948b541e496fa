"""A ClientApp that can't be loaded where it runs: the run ends soon, and says what was wrong."""

import shutil

import pytest

from flsplit.processes import deployment
from tests.flower_processes import simulation

# Ray's processes unpickle the app, for which they import this module; the server imports it, too.
ONLY_BESIDE_CLIENTS = """import ray

if ray.is_initialized():
    import absent_here
"""
SECONDS = 400.0  # on a busy machine; most of them are Flower's own start and end


@pytest.fixture
def broken_app(quickstart, tmp_path):
    def break_module(name, first_lines):
        app = tmp_path / "broken"
        shutil.copytree(quickstart, app)
        module = app / "quickstart" / name
        module.write_text(first_lines + module.read_text())
        return app

    return break_module


def check(run):
    assert run.status == "finished:failed"
    told = "its ClientApp can't be run: ModuleNotFoundError: No module named 'absent_here'"
    assert told in run.details + run.log
    assert run.log.count("\n") < 1000


@pytest.mark.chaos(
    "a ClientApp that can't be imported, simulated",
    "the run ends with the import error",
)
@pytest.mark.e2e
def test_what_simulated_clients_cannot_import_ends_the_run(broken_app, tmp_path):
    app = broken_app("task.py", ONLY_BESIDE_CLIENTS)
    with simulation(tmp_path, num_supernodes=50) as flower:
        check(flower.run_app(app, timeout=SECONDS))


@pytest.mark.chaos(
    "a ClientApp that can't be imported, deployed",
    "the run ends with the import error",
)
@pytest.mark.e2e
def test_what_supernodes_cannot_import_ends_the_run(broken_app, tmp_path):
    app = broken_app("client_app.py", "import absent_here\n")
    with deployment(tmp_path, 1, tls=False, auth=False) as flower:
        check(flower.run_app(app, timeout=SECONDS))
