"""Who hosts a session's clients: hosts that come and go, and the clients on them."""

from dataclasses import dataclass, field

from flsplit.carry.session.host import OWN_CLIENT, Hello
from flsplit.flower_internals import SERVER_NODE_ID
from flsplit.log import logger

_FIRST_ID = SERVER_NODE_ID + 1


@dataclass(frozen=True)
class Seat:
    """Where a client is served."""

    host: str  # the host's name in the session: Flower's id of its node
    client: str  # the client's name in envelopes


@dataclass
class Roster:
    """The hosts that are connected and which clients each of them serves.

    In a deployment a host serves the client of its own node, under the node's id. In a
    simulation any host can serve any partition: the partitions, with ids of their own, are
    dealt out evenly, and when a host is lost, its partitions move to the others. Which of the two
    it is, and how many partitions there are, Flower tells the server; no host is asked.
    """

    simulated: bool = False  # whether the nodes are simulated
    epochs: dict[str, int] = field(default_factory=dict)  # the epoch of each connected host
    num_partitions: int = 0  # how many clients the simulation has; 0 in a deployment
    peers: int = 0  # how many hosts a simulation can have at the same time; 0 in a deployment
    _hosted: dict[int, str] = field(default_factory=dict)

    def join(self, host: str, epoch: int, hello: Hello) -> None:
        """Count a host in."""
        self.epochs[host] = epoch
        if self.simulated:
            self.peers = max(self.peers, hello.peers)

    def leave(self, host: str) -> None:
        """Count a host out."""
        self.epochs.pop(host, None)

    def seat_all(self) -> None:
        """Give every client that has no host one, the least busy first."""
        if not self.epochs:
            self._hosted = {}
            return
        if not self.simulated:
            self._hosted = {int(host): host for host in self.epochs}
            return
        load = dict.fromkeys(sorted(self.epochs), 0)
        for host in self._hosted.values():
            if host in load:
                load[host] += 1
        for node_id in range(_FIRST_ID, _FIRST_ID + self.num_partitions):
            if self._hosted.get(node_id) not in self.epochs:
                host = min(load, key=lambda name: load[name])
                if node_id in self._hosted:
                    logger.info("client %d moves to another host", node_id - _FIRST_ID)
                self._hosted[node_id] = host
                load[host] += 1

    def node_ids(self) -> list[int]:
        """Return the ids of the clients that have a host."""
        return sorted(node for node, host in self._hosted.items() if host in self.epochs)

    def seat(self, node_id: int) -> Seat | None:
        """Return where a client is served, None if nowhere now."""
        host = self._hosted.get(node_id)
        if host is None or host not in self.epochs:
            return None
        return Seat(host, str(node_id - _FIRST_ID) if self.simulated else OWN_CLIENT)
