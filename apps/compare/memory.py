"""What clients with auxiliary models hold, as a table."""

from jobs import Run
from measured import CLIENT_MEMORY, WHOLE_MEMORY, series_of
from methods import DECOUPLED, find_method
from report import Finals, converged
from studies import AUXILIARY, STUDIES

SHOWN = list(dict.fromkeys([*DECOUPLED, *STUDIES[AUXILIARY].values()]))


def memory_rows(finals: Finals) -> list[dict[str, str]]:
    """Return a row for each method whose ledger has it; q and l play no part in it."""
    rows = []
    for method in SHOWN:
        runs = converged(finals.get(method, []))
        if runs and series_of(runs[0], CLIENT_MEMORY):
            rows.append({"method": find_method(method).title} | _sizes(runs[0]))
    return rows


def _sizes(run: Run) -> dict[str, str]:
    """Return the columns; all rounds and seeds have the same."""
    held, whole = (max(series_of(run, name).values()) for name in (CLIENT_MEMORY, WHOLE_MEMORY))
    return {
        "its auxiliary model, kB": f"{run['auxiliary-bytes'] / 1e3:.1f}",
        "a client holds, kB": f"{held / 1e3:.0f}",
        "training the whole model, kB": f"{whole / 1e3:.0f}",
        "of the whole": f"{100 * held / whole:.0f} %",
    }
