"""Accuracy against leakage against bytes: methods and defences, two cuts, several seeds.

    python apps/privacy/privacy.py --data-dir /path/to/data --out runs/privacy

Finished runs are kept in the output folder and not run again. The page is written anew each time,
of all runs that are there; --page puts it and its pictures elsewhere.
"""

import argparse
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from leak import CUTS, QUICK_SIZE, Size, load, run
from leak_page import write_page
from rows import QUICK, ROWS

Key = tuple[str, str, int]
"""A row's name, the cut, the seed."""


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing and write the page; return the exit status."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    size = QUICK_SIZE if options.quick else Size()
    path = options.out / "runs.jsonl"
    runs = read(path, size)
    wanted = [
        (row, cut, seed) for seed in options.seeds for cut in options.cuts for row in options.rows
    ]
    missing = [key for key in wanted if key not in runs]
    if missing:
        load(options.data_dir)  # says at once if the data is not there
    started = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, context) as executor, path.open("a") as file:
        waiting = {executor.submit(run, *key, size, options.data_dir): key for key in missing}
        for done, future in enumerate(as_completed(waiting), 1):
            key = waiting[future]
            runs[key] = future.result()
            file.write(json.dumps({"key": key, "size": asdict(size), "found": runs[key]}) + "\n")
            file.flush()
            spent = (time.perf_counter() - started) / 60
            left = spent / done * (len(missing) - done)
            said = f"accuracy {runs[key]['accuracy']:.3f}, explained {runs[key]['explained']:.3f}"
            print(
                f"{spent:5.1f} min, about {left:.0f} left: {' '.join(map(str, key))}: {said}",
                flush=True,
            )
    write_page(options.page or options.out / "privacy.md", runs, size)
    return 0


def read(path: Path, size: Size) -> dict[Key, dict[str, Any]]:
    """Return the finished runs of this size."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines]
    return {tuple(one["key"]): one["found"] for one in found if one["size"] == asdict(size)}  # type: ignore[misc]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", required=True, help="where torchvision's MNIST lies")
    parser.add_argument("--out", type=Path, default=Path("runs/privacy"))
    parser.add_argument("--page", type=Path, help="where the page is written, if not to --out")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), metavar="ROW", help="of rows.py")
    parser.add_argument("--cuts", nargs="+", choices=CUTS)
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--workers", type=int, default=2, help="processes; results are the same")
    parser.add_argument("--quick", action="store_true", help="fewer rows, one cut, one seed")
    options = parser.parse_args(arguments)
    options.rows = options.rows or (QUICK if options.quick else list(ROWS))
    options.cuts = options.cuts or (CUTS[:1] if options.quick else list(CUTS))
    options.seeds = options.seeds or ([0] if options.quick else [0, 1, 2])
    if "psl" not in options.rows:
        parser.error("--rows must have psl: no defence counts without the same run undefended")
    return options


if __name__ == "__main__":
    sys.exit(main())
