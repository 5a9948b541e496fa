"""The machines of a simulation: Ray's nodes, where Flower's engine runs the clients' processes."""

import sys
from typing import Any

from flsplit.carry.polling import polling

START_SECONDS = 120.0
"""How long Flower's engine, a thread beside the ServerApp, has to start Ray."""


def running_ray(timeout: float = 0.0) -> Any:
    """Return the module ``ray`` once this process is connected to a cluster; None if it is not."""
    for _ in polling(timeout, every=0.1):
        ray = sys.modules.get("ray")
        # Another thread may be in the middle of importing it.
        if getattr(ray, "is_initialized", bool)():
            return ray
    return None


def living_nodes(ray: Any) -> list[dict[str, Any]]:
    """Return what Ray says of each machine that is up."""
    return [node for node in ray.nodes() if node["Alive"]]


def count_places(ray: Any, needed: dict[str, float]) -> int:
    """Return how many processes that need so much of each resource fit, machine by machine."""
    return sum(
        min(
            (
                int(node["Resources"].get(name, 0) / amount)
                for name, amount in needed.items()
                if amount > 0
            ),
            default=0,
        )
        for node in living_nodes(ray)
    )


def cluster_address(ray: Any) -> str:
    """Return this machine's address in a cluster of several, empty in a cluster of one."""
    if len({node["NodeManagerAddress"] for node in living_nodes(ray)}) < 2:
        return ""
    return str(ray.util.get_node_ip_address())
