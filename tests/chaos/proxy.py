"""A TCP proxy that delays, halts, resets and swallows what goes through it."""

import socket
import struct
import threading
import time
from contextlib import suppress

_RESET = struct.pack("ii", 1, 0)  # close with RST, not FIN


class Proxy:
    """Forwards connections to ``target``; used as a context manager.

    Attributes
    ----------
    address : str
        Where it listens.
    target : str
        Where it connects to; may be set after the start.
    delay : float
        Seconds by which each piece of data comes later.
    """

    def __init__(self):
        self.target, self.delay = "", 0.0
        self._flows = threading.Event()
        self._flows.set()
        self._swallows = False
        self._sockets = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._flows.set()
        self._listener.close()
        self.reset()

    def halt(self):
        """Keep back what comes, until :meth:`resume`."""
        self._flows.clear()

    def resume(self):
        """Let flow what was kept back."""
        self._flows.set()

    def swallow(self):
        """Take all that comes and pass nothing on: links that are open at one end only."""
        self._swallows = True

    def reset(self):
        """Reset all connections; new ones are served as before."""
        self._swallows = False
        sockets, self._sockets = self._sockets, []
        for one in sockets:
            with suppress(OSError):  # where it is closed already
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                one.shutdown(socket.SHUT_RD)  # wakes the thread that waits for data
            one.close()

    def _accept(self):
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            host, _, port = self.target.rpartition(":")
            far = socket.create_connection((host, int(port)))
            self._sockets += [near, far]
            for pair in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source, sink):
        try:
            while data := source.recv(2**16):
                time.sleep(self.delay)
                self._flows.wait()
                if not self._swallows:
                    sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:  # one of the two is closed: so is the other
            for one in (source, sink):
                one.close()
