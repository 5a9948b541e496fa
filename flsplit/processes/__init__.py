"""Starting Flower: SuperLinks, SuperNodes, simulations and runs as processes that end for sure.

Everything runs with a Flower home, ports and certificates of its own, and is stopped when the
context is left, or the starter dies.

    with simulation(folder, num_supernodes=10) as flower:
        finished = flower.run_app(app_dir, {"num-server-rounds": 2})
    assert finished.completed, finished.log

    with deployment(folder, num_supernodes=2) as flower:
        run = flower.start_app(app_dir)
        run.wait_for_log("Round 1")
        flower.supernodes[0].kill_client_app()
        assert run.finish(timeout=120).completed
"""

from flsplit.log import without_colours
from flsplit.processes.federation import Federation, deployment, simulation, simulation_config
from flsplit.processes.flower_process import FlowerProcess
from flsplit.processes.flower_run import FinishedRun, FlowerRun
from flsplit.processes.home import FlowerHome
from flsplit.processes.supernode import SuperNode
from flsplit.processes.tree import ProcessTree
from flsplit.processes.waiting import free_ports, wait_until

__all__ = [
    "Federation",
    "FinishedRun",
    "FlowerHome",
    "FlowerProcess",
    "FlowerRun",
    "ProcessTree",
    "SuperNode",
    "deployment",
    "free_ports",
    "simulation",
    "simulation_config",
    "wait_until",
    "without_colours",
]
