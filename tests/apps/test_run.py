"""`apps/run.py` and the processes that tests start with it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.flower_processes import (
    REPOSITORY,
    FlowerHome,
    ProcessTree,
    deployment,
    flower_home,
    make_node_key,
    simulation,
    wait_until,
)
from tests.flower_processes import tree as tree_module

RUN = REPOSITORY / "apps" / "run.py"

PYPROJECT = """
[project]
name = "tiny"
version = "1.0.0"
description = "Asks every client for its partition."
license = "Apache-2.0"
dependencies = ["flwr>=1.41"]
[tool.uv]
exclude-dependencies = ["flwr"]
[tool.flwr.app]
publisher = "tests"
[tool.flwr.app.components]
serverapp = "tiny.app:server"
clientapp = "tiny.app:client"
[tool.flwr.app.config]
end = "completed"
text = ""
number = 0.0
num-nodes = 2
"""

APP = """
import os
import sys
import time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()

@client.query()
def query(message, context):
    if context.run_config["end"] == "never":
        time.sleep(600)
    partition = context.node_config["partition-id"]
    me = ConfigRecord({"partition": partition, "process": os.getpid()})
    return Message(RecordDict({"me": me}), reply_to=message)

@server.main()
def main(grid, context):
    while len(nodes := list(grid.get_node_ids())) < context.run_config["num-nodes"]:
        time.sleep(0.1)
    ask = [Message(RecordDict(), dst_node_id=node, message_type="query") for node in nodes]
    print("ASKING", context.run_config["text"], context.run_config["number"])
    found = [r.content["me"] for r in grid.send_and_receive(ask) if r.has_content()]
    print("ANSWERED", sorted(me["partition"] for me in found))
    print("PROCESSES", len({me["process"] for me in found}))
    print("PYTHON", sys.executable)
    if context.run_config["end"] == "failed":
        raise RuntimeError("as it was asked to")
    time.sleep(1)  # what is printed last can be lost
"""


@pytest.fixture
def app(tmp_path):
    folder = tmp_path / "tiny-app"
    (folder / "tiny").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "tiny" / "__init__.py").touch()
    (folder / "tiny" / "app.py").write_text(APP)
    return folder


@pytest.fixture
def script(tmp_path):
    """Start ``apps/run.py`` from another folder; whatever it leaves behind fails the test."""
    tree = ProcessTree()

    def start(app, *arguments, **env):
        options = ["--flwr-home", tmp_path / "home", *arguments]
        return subprocess.Popen(
            [sys.executable, str(RUN), *map(str, [app, *options])],
            cwd=tmp_path,
            env={**os.environ, **tree.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # In the background of a shell script, the tests are started with SIGINT ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    start.tree = tree
    yield start
    left_over = tree.find()
    tree.stop(grace=0)
    assert left_over == []


def scratch_folder(tree):
    """Return where Ray puts its sockets; the guard knows it, to remove it."""
    (guard,) = tree.find(tree_module.__file__)
    command = subprocess.check_output(["ps", "-ww", "-o", "command=", "-p", str(guard)], text=True)
    folder = Path(command.split()[-1])
    assert folder.is_dir()
    return folder


# --- processes ---------------------------------------------------------------------------------

STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
# A child without the mark, in a session of its own; and one whose parent is gone.
idle = [sys.executable, "-c", "import time; time.sleep(600)"]
subprocess.Popen(idle, env={}, start_new_session=True)
subprocess.run(["sh", "-c", "sleep 600 & exit"], env={"PATH": os.environ["PATH"]})
print("up", flush=True)
time.sleep(600)
"""


def start_stubborn(tree):
    process = subprocess.Popen(
        [sys.executable, "-c", STUBBORN],
        env={**os.environ, **tree.env},
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout.readline() == b"up\n"
    wait_until(lambda: len(tree.find()) >= 3, "three processes", 60)
    return process


def test_a_tree_holds_descendants_and_orphans_that_lost_the_mark():
    tree, other = ProcessTree(), ProcessTree()
    process = start_stubborn(tree)
    try:
        assert process.pid in tree.find()
        assert len(tree.find()) == 3
        assert tree.find("sys.executable") == [process.pid]
        assert other.find() == []
    finally:
        tree.stop(grace=0.3)
    assert tree.find() == []
    assert process.wait() == -signal.SIGKILL


def test_a_tree_stops_what_is_paused():
    tree = ProcessTree()
    process = start_stubborn(tree)
    tree.signal(signal.SIGSTOP)
    tree.stop(grace=0.3)
    assert tree.find() == []
    process.wait()


def test_the_caller_is_never_part_of_the_tree(monkeypatch):
    # Started in the caller's session, as by somebody who reuses the environment.
    tree = ProcessTree()
    process = subprocess.Popen(["sleep", "600"], env={**os.environ, **tree.env})
    assert tree.find() == [process.pid]
    tree.stop(grace=0)
    process.wait()


def test_processes_are_found_without_proc(monkeypatch):
    if subprocess.run(["which", "ps"], capture_output=True, check=False).returncode:
        pytest.skip("there is no ps")
    tree = ProcessTree()
    process = start_stubborn(tree)
    monkeypatch.setattr(tree_module, "PROC", Path("/nonexistent"))
    assert process.pid in tree.find()
    tree.stop(grace=0)
    assert tree.find() == []
    process.wait()


def test_everything_ends_when_the_starter_is_killed(tmp_path):
    tree = ProcessTree()
    code = f"""
import sys, time
sys.path.insert(0, {str(REPOSITORY)!r})
from tests.flower_processes import FlowerHome
from pathlib import Path
with FlowerHome(Path({str(tmp_path)!r})) as home:
    home.start("sleeper", ["sleep", "600"])
    print("up", flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, **tree.env}, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"up\n"
    assert len(tree.find("sleep 600")) == 1
    scratch = scratch_folder(tree)

    process.kill()
    process.wait()

    wait_until(lambda: not tree.find(), "the end of everything", 60)
    assert not scratch.exists()


def test_homes_are_separate(tmp_path):
    with FlowerHome(tmp_path / "a") as one, FlowerHome(tmp_path / "b") as two:
        assert one.port != two.port
        assert one.env["FLWR_HOME"] != two.env["FLWR_HOME"]
        assert one.env["RAY_TMPDIR"] != two.env["RAY_TMPDIR"]


def test_a_process_that_ends_early_is_reported_with_its_log(tmp_path):
    with flower_home(tmp_path) as home:
        process = home.start("loser", ["sh", "-c", "echo some reason; exit 3"])
        with pytest.raises(RuntimeError, match=r"loser ended with 3; .*\nsome reason"):
            process.wait_for_log("never said")


def test_a_log_that_says_nothing_runs_into_the_deadline(tmp_path):
    with flower_home(tmp_path) as home:
        process = home.start("sleeper", ["sleep", "600"])
        with pytest.raises(TimeoutError, match=r"waited 0\.2 s for 'word' in the log of sleeper"):
            process.wait_for_log("word", timeout=0.2)


# --- the command line --------------------------------------------------------------------------


def test_a_folder_without_an_app_is_refused(script, tmp_path):
    process = script(tmp_path)
    output, _ = process.communicate()
    assert process.returncode == 2
    assert f"{tmp_path} is not the folder of a Flower app" in output


@pytest.mark.e2e
def test_a_run_that_completes(script, app, tmp_path):
    # With Flower's own installation of dependencies, which must not need the network.
    arguments = ["--num-supernodes", 3, "--run-config", "text='a b' number=0.5"]
    process = script(
        *("tiny-app", *arguments, "--install-dependencies"),
        UV_OFFLINE="1",
        UV_CACHE_DIR=str(tmp_path / "uv-cache"),
        # What the caller's own SuperLink listens on must not matter.
        FLWR_LOCAL_SUPERLINK_HTTP_API_PORT="1",
        FLWR_HOME="/nonexistent",
    )
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "ASKING a b 0.5" in output
    assert "ANSWERED [0, 1, 2]" in output
    assert f"PYTHON {sys.executable}" in output
    assert "No additional application dependencies needed installation" in output
    assert " completed in " in output


@pytest.mark.e2e
def test_a_run_that_fails(script, app, tmp_path):
    process = script(app, "--run-config", "end='failed' num-nodes=1", "--num-supernodes", 1)
    output, _ = process.communicate()
    assert process.returncode == 1, output
    assert "finished:failed" in output
    assert "as it was asked to" in output
    assert f"logs are in {tmp_path / 'home' / 'logs'}" in output
    assert (tmp_path / "home" / "logs" / "superlink.log").exists()


@pytest.mark.e2e
def test_a_run_that_is_refused(script, app):
    process = script(app, "--run-config", "no-such-key=1")
    output, _ = process.communicate()
    assert process.returncode == 1
    assert "Invalid run configuration" in output
    assert "error: the run was not started" in output


@pytest.mark.e2e
@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long), signal.SIGKILL],
)
def test_a_run_that_is_interrupted(script, app, number):
    process = script(app, "--run-config", "end='never'")
    for line in process.stdout:
        if "ASKING" in line:
            break
    wait_until(lambda: script.tree.find("raylet"), "Ray", 180)
    scratch = scratch_folder(script.tree)

    process.send_signal(number)

    code = process.wait(90)
    assert code == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    if number == signal.SIGKILL:
        wait_until(lambda: not script.tree.find(), "the end of everything", 60)
    assert script.tree.find() == []
    assert not scratch.exists()


@pytest.mark.e2e
def test_a_simulation_runs_one_app_after_the_other(app, tmp_path):
    with simulation(tmp_path) as started:
        text = 'it\'s "quoted" = {phi = 0.5}'
        run_config = {"text": text, "number": 1e-3}
        first = started.run_app(app, run_config=run_config)
        assert first.completed, first.log
        assert f"ASKING {text} 0.001" in first.log
        assert first.run_id

        second = started.start_app(app, run_config={"end": "never"})
        with pytest.raises(TimeoutError, match=r"has not ended after 0\.5 s"):
            second.finish(timeout=0.5)
    assert started.home.tree.find() == []


# --- deployments -------------------------------------------------------------------------------


@pytest.mark.e2e
def test_a_deployment_with_tls_and_authentication(app, tmp_path):
    with deployment(tmp_path, num_supernodes=2) as deployed:
        ids = [supernode.node_id for supernode in deployed.supernodes]
        assert len(set(ids)) == 2

        finished = deployed.run_app(app)
        assert finished.completed, finished.log
        assert "ANSWERED [0, 1]" in finished.log
        assert "PROCESSES 2" in finished.log

        # A key that nobody registered is turned away.
        stranger = deployed.supernodes[0]
        known_key = stranger.command[-1]
        stranger.stop()
        other_key, _ = make_node_key(tmp_path / "keys", "stranger")
        stranger.command[-1] = str(other_key)
        with pytest.raises(RuntimeError, match="ended with"):
            stranger.start()
        stranger.command[-1] = known_key

        # The same one comes back under the same id.
        stranger.start()
        assert [supernode.node_id for supernode in deployed.supernodes] == ids

        deployed.start_app(app, {"end": "never"})
        killed = deployed.supernodes[1].kill_client_app()
        assert killed not in deployed.supernodes[1].client_apps()
        deployed.supernodes[0].pause()
    assert deployed.home.tree.find() == []


@pytest.mark.e2e
def test_a_deployment_without_tls(app, tmp_path):
    configs = [{"partition-id": 7, "client-name": "a hospital"}]
    with deployment(tmp_path, 1, tls=False, auth=False, node_configs=configs) as deployed:
        finished = deployed.run_app(app, {"num-nodes": 1})
        assert finished.completed, finished.log
        assert "ANSWERED [7]" in finished.log


def test_authentication_needs_tls(tmp_path):
    with (
        pytest.raises(ValueError, match="needs TLS"),
        deployment(tmp_path, tls=False, auth=True),
    ):
        pass
