"""One SuperNode, and how to disturb it."""

import os
import signal

from flsplit.processes.flower_process import FlowerProcess
from flsplit.processes.waiting import START_TIMEOUT, free_ports, wait_until


class SuperNode(FlowerProcess):
    """A SuperNode, the ClientApp processes that it starts, and how to disturb them.

    ``node_id`` is Flower's id of the node, once it was online.
    """

    node_id = 0
    _killed = False

    def start(self, wait: bool = True) -> None:
        """Start the process; unless told otherwise, wait until the SuperLink has taken it in."""
        super().start()
        if wait:
            self.wait_online()

    def wait_online(self) -> None:
        """Wait until the SuperLink has taken it in.

        After a kill the SuperLink refuses the same key until it has noticed, which takes as long as
        a heartbeat lasts: up to 60 s. Until then the process ends, and is started again.
        """

        def ask() -> bool:
            try:
                online = self.wait_for_log(r"SuperNode ID: (\d+)")
            except RuntimeError as error:
                refused = self._killed and "Failed to activate SuperNode" in str(error)
                taken = "address already in use" in str(error)
                if not (refused or taken):
                    raise
                if taken:  # by somebody else, since the port was found free
                    self.command[self.command.index("--port") + 1] = str(free_ports(1)[0])
                self.start(wait=False)
                return False
            self.node_id = int(online[1])
            self._killed = False
            return True

        wait_until(ask, f"{self.name} to be taken in by the SuperLink", START_TIMEOUT, poll=1.0)

    def client_apps(self) -> list[int]:
        """Return the ids of its living ClientApp processes."""
        return self.tree.find("flwr-clientapp")

    def wait_for_client_app(self) -> int:
        """Wait until it has a living ClientApp process, and return that one's id."""
        return wait_until(self.client_apps, f"a ClientApp of {self.name}", START_TIMEOUT)[0]

    def kill_client_app(self) -> int:
        """End its ClientApp process with ``SIGKILL``, waiting for it if need be; return the id."""
        pid = self.wait_for_client_app()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: pid not in self.client_apps(), f"the end of {pid}", 10)
        return pid

    def pause_client_app(self) -> int:
        """Halt its ClientApp process (``SIGSTOP``); return the id, for ``SIGCONT``."""
        pid = self.wait_for_client_app()
        os.kill(pid, signal.SIGSTOP)
        return pid

    def kill(self) -> None:
        """End it and its ClientApps at once."""
        super().kill()
        self._killed = True

    def restart(self) -> None:
        """Stop it, start it anew, and wait until it is back; after :meth:`kill`, use `start`."""
        self.stop()
        self.start()
