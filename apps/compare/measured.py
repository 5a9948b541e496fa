"""What is kept of a run over flsplit: sums, and numbers of each round."""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from everyone import GLOBAL, OWN

from flsplit.account import History
from flsplit.run import Round, SplitStrategy

# Those of the ledger's metrics that are kept for every round that has them.
COSINE = "auxiliary-cosine"
BEFORE, AFTER = "cosine-before-alignment", "cosine-after-alignment"
CLIENT_MEMORY, WHOLE_MEMORY = "client-memory-bytes", "whole-model-memory-bytes"
SIMULATED = "simulated-seconds"
LAST = 3  # rounds that a run's accuracy is the mean of: a single one is noisy
SERIES = (COSINE, BEFORE, AFTER, CLIENT_MEMORY, WHOLE_MEMORY)


def measured(
    history: History, spent: Mapping[int, float], metrics: Sequence[str]
) -> dict[str, Any]:
    """Return what is kept; ``spent`` are the server's CPU seconds by round."""
    logical = [entry.traffic.logical for entry in history]
    return by_client([entry.evaluation for entry in history], metrics) | {
        "bytes": history.bytes_so_far(),
        "up": sum(_ending(one, "up") for one in logical),
        "down": sum(n for one in logical for name, n in one.items() if "-down" in name),
        "gradients-down": sum(_starting(one, "gradients-down") for one in logical),
        "rows": sum(entry.rows for entry in history),
        "server-seconds": [spent[entry.round] for entry in history],
        "metrics": {k: v for k, v in history[-1].metrics.items() if k.count(".") == 1},
        "series": _series(history),
        **_simulated(history),
    }


def by_client(evaluations: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> dict[str, Any]:
    """Return accuracies: the mean over clients by round, and each client's at the end.

    The end are the last rounds. Further metrics are kept, at the end, under ``scores``.
    """
    last = evaluations[-LAST:]

    def each(kind: str, found: Mapping[str, Any]) -> list[float]:
        return [float(v) for k, v in found.items() if k.startswith(f"each/{kind}/")]

    own = [name for name in last[-1] if name.partition("/")[0] in metrics]
    return {
        "accuracy": [float(np.mean(each(GLOBAL, one))) for one in evaluations],
        "clients": np.mean([each(GLOBAL, one) for one in last], axis=0).tolist(),
        "own": np.mean([each(OWN, one) for one in last], axis=0).tolist(),
        "scores": {name: float(np.mean([one[name] for one in last])) for name in own},
    }


def series_of(run: dict[str, Any], metric: str) -> dict[int, float]:
    """Return a metric by round; nothing where the ledger, or a run of long ago, has none."""
    kept = run.get("series", {}).get(metric, {"rounds": [], "values": []})
    return dict(zip(kept["rounds"], kept["values"], strict=True))


def count_server_cpu(strategy: SplitStrategy) -> dict[int, float]:
    """Return a dictionary that fills with the CPU seconds of each round's server steps.

    Those of alignments are in it, too. The ledger has wall time, which means little where two
    runs share a machine.
    """
    spent: dict[int, float] = defaultdict(float)

    def counted(work: Any) -> Any:
        def wrapper(*given: Any, **named: Any) -> Any:
            (round_,) = (one for one in given if isinstance(one, Round))
            started = time.process_time()
            result = work(*given, **named)
            spent[round_.entry.round] += time.process_time() - started
            return result

        return wrapper

    for name in ("take_step", "before_local_steps", "after_peek"):  # two places of alignments
        if hasattr(strategy, name):
            setattr(strategy, name, counted(getattr(strategy, name)))
    return spent


def _series(history: History) -> dict[str, dict[str, list[float]]]:
    """Return the rounds that have a metric, and its values there, for those that are kept."""
    found = {}
    for metric in SERIES:
        having = [entry for entry in history if metric in entry.metrics]
        if having:
            found[metric] = {
                "rounds": [entry.round for entry in having],
                "values": [entry.metrics[metric] for entry in having],
            }
    return found


def _simulated(history: History) -> dict[str, Any]:
    """Return the seconds at the end of each round, if the run was given a fleet."""
    times = history.simulated_so_far()
    return {} if None in times else {SIMULATED: times}


def _ending(counts: dict[str, int], end: str) -> int:
    return sum(n for k, n in counts.items() if k.endswith(end) and not k.startswith("evaluation"))


def _starting(counts: dict[str, int], start: str) -> int:
    return sum(n for name, n in counts.items() if name.startswith(start))
