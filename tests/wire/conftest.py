import pytest

from flsplit.wire import SessionServer

from .peers import QUICK, processes


@pytest.fixture
def server():
    with SessionServer(keepalive=QUICK) as server:
        yield server


@pytest.fixture(autouse=True)
def _no_process_left():
    yield
    # At its exit, Python asks its children to end and waits; a stopped one would never answer.
    for process in processes.active_children():
        process.kill()
        process.join()
