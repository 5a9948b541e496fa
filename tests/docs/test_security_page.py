"""What docs/security.md says, as far as no other test does."""

import ast
import io
import pickle
import socket
import threading

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, Message, RecordDict

from flsplit.errors import ProtocolError
from flsplit.flower_internals import ensure_task_identity
from flsplit.message.arrays import to_tensor
from flsplit.wire import Envelope, HostStream, SessionServer
from tests.flower_processes import REPOSITORY

SECRET = "labels of patient 7"


class Tap:
    """A proxy that writes down what goes through."""

    def __init__(self, port):
        self.seen = bytearray()
        self._port, self._listener = port, socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        inner, _ = self._listener.accept()
        outer = socket.create_connection(("127.0.0.1", self._port))
        for ends in ((inner, outer), (outer, inner)):
            threading.Thread(target=self._pass, args=ends, daemon=True).start()

    def _pass(self, source, sink):
        with sink:
            while piece := source.recv(2**16):
                self.seen += piece
                sink.sendall(piece)


@pytest.mark.parametrize("tls", [True, False])
def test_somebody_on_the_path_reads_messages_and_tokens_without_tls_only(tls):
    ensure_task_identity(run_id=1)
    with SessionServer(tls=tls) as server:
        tap, token = Tap(server.port), server.invite("a")
        with HostStream.dial(tap.address, token, server.certificate_pem, {}) as stream:
            server.receive(5)
            content = RecordDict({"it": ConfigRecord({"text": SECRET})})
            server.send("a", Envelope("", 1, 0), Message(content, 7, "query"))
            assert next(iter(stream))[1].content["it"]["text"] == SECRET
    assert (SECRET.encode() in tap.seen) is not tls
    assert (token.encode() in tap.seen) is not tls
    assert tap.seen


def test_nothing_that_is_installed_reads_a_pickle():
    files = [*(REPOSITORY / "flsplit").rglob("*.py"), *(REPOSITORY / "strategies").rglob("*.py")]
    assert len(files) > 100
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {one.name for one in node.names} | {getattr(node, "module", "")}
                assert names.isdisjoint({"pickle", "cloudpickle", "dill", "joblib"}), file
            if isinstance(node, ast.Attribute) and node.attr in ("load", "loads"):
                assert ast.unparse(node.value) not in ("torch", "np", "pickle"), file


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("it was unpickled",)


def test_an_array_of_pickled_objects_is_refused():
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "|O", "fortran_order": False, "shape": (1,)}
    )
    array = Array("object", (1,), "numpy.ndarray", file.getvalue() + pickle.dumps([Bomb()]))
    with pytest.raises(ProtocolError, match="labels: not a readable array"):
        to_tensor(array, field="labels")
