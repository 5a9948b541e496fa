"""What Ray says of the machines of a cluster, and what follows for a session."""

from types import SimpleNamespace

import pytest

from flsplit.carry.ray_cluster import cluster_address, count_places


def cluster(*nodes):
    """Return a stand-in for ray: a node is its address and resources, or None if it is down."""
    told = [
        {"Alive": bool(resources), "NodeManagerAddress": address, "Resources": resources or {}}
        for address, resources in nodes
    ]
    return SimpleNamespace(
        nodes=lambda: told, util=SimpleNamespace(get_node_ip_address=lambda: nodes[0][0])
    )


@pytest.mark.parametrize(
    ("needed", "expected"),
    [
        ({"CPU": 1.0}, 8),
        ({"CPU": 2.0}, 3),  # 1 + 2: no process lies on two machines
        ({"CPU": 0.5}, 16),
        ({"CPU": 1.0, "GPU": 0.5}, 2),
        ({"CPU": 1.0, "GPU": 0.0}, 8),
        ({"CPU": 6.0}, 0),
        ({}, 0),
    ],
)
def test_places_are_counted_machine_by_machine(needed, expected):
    ray = cluster(
        ("10.0.0.1", {"CPU": 3.0}), ("10.0.0.2", {"CPU": 5.0, "GPU": 1.0}), ("10.0.0.3", None)
    )
    assert count_places(ray, needed) == expected


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([("10.0.0.1", {"CPU": 1.0})], ""),
        ([("10.0.0.1", {"CPU": 1.0}), ("10.0.0.1", {"CPU": 1.0})], ""),
        ([("10.0.0.1", {"CPU": 1.0}), ("10.0.0.2", None)], ""),
        ([("10.0.0.1", {"CPU": 1.0}), ("10.0.0.2", {"CPU": 1.0})], "10.0.0.1"),
    ],
)
def test_a_session_is_advertised_where_other_machines_reach_it(nodes, expected):
    assert cluster_address(cluster(*nodes)) == expected
