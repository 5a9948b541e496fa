"""What clients with auxiliary models hold, as a table."""

from decoupled_methods import AUXILIARY, DECOUPLED, STUDIES
from jobs import Run
from measured import CLIENT_MEMORY, WHOLE_MEMORY
from methods import METHODS
from report import Finals, converged

SHOWN = list(dict.fromkeys([*DECOUPLED, *STUDIES[AUXILIARY].values()]))


def memory_rows(finals: Finals) -> list[dict[str, str]]:
    """Return a row for each method whose ledger has it; q and l play no part in it."""
    rows = []
    for method in SHOWN:
        having = [
            run for run in converged(finals.get(method, [])) if CLIENT_MEMORY in run["series"]
        ]
        if having:
            rows.append({"method": METHODS[method].title} | _sizes(having[0]))
    return rows


def _sizes(run: Run) -> dict[str, str]:
    """Return the columns; they are the same for all seeds."""
    held, whole = (run["series"][name]["values"][-1] for name in (CLIENT_MEMORY, WHOLE_MEMORY))
    return {
        "its auxiliary model, kB": f"{run['auxiliary-bytes'] / 1e3:.1f}",
        "a client holds, kB": f"{held / 1e3:.0f}",
        "training the whole model, kB": f"{whole / 1e3:.0f}",
        "of the whole": f"{100 * held / whole:.0f} %",
    }
