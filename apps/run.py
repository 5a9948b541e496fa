"""Run a Flower app on a SuperLink of its own, and tell by the exit code whether it worked.

    python apps/run.py apps/quickstart --num-supernodes 10 --run-config 'num-server-rounds=3'

``flwr run`` leaves a SuperLink running in the background, takes whatever SuperLink answers on its
port, even one of another environment, and its ``--stream`` ends with 0 when the run has failed.
This script starts a SuperLink on free ports and with a Flower home of its own, streams the run,
asks for its final status, and stops every process that came of it, Ray's too: at the end, on
Ctrl-C, and even when the script itself is killed. Tests and benchmarks start their processes with
the same classes, those of ``flsplit.processes``.
"""

import argparse
import contextlib
import datetime
import os
import shutil
import signal
import sys
from pathlib import Path

from flsplit.processes import FlowerHome, FlowerRun, simulation_config, without_colours

HOMES = Path(__file__).resolve().parents[1] / ".flwr-home"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Run a Flower app in a simulation, on a SuperLink of its own.",
        epilog="Exits with 0 only if the run completed.",
    )
    parser.add_argument("app", type=Path, help="the app's folder")
    parser.add_argument(
        "--num-supernodes", type=int, default=10, metavar="N", help="simulated clients (10)"
    )
    parser.add_argument(
        "--run-config",
        action="append",
        default=[],
        metavar="'KEY=VALUE …'",
        help="changes to the app's configuration, or a TOML file with them",
    )
    parser.add_argument(
        "--federation-config",
        action="append",
        default=[],
        metavar="'KEY=VALUE …'",
        help="more about the simulation, for instance 'client-resources-num-cpus=2'",
    )
    parser.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="give up after so long (never)"
    )
    parser.add_argument(
        "--flwr-home",
        type=Path,
        metavar="FOLDER",
        help=f"the run's Flower home (a new folder in {HOMES.name}, removed after success)",
    )
    parser.add_argument(
        "--install-dependencies",
        action="store_true",
        help="let Flower install what the app's pyproject.toml lists, as flwr run does",
    )
    options = parser.parse_args(arguments)
    options.app = options.app.expanduser().resolve()
    if not (options.app / "pyproject.toml").is_file():
        parser.error(f"{options.app} is not the folder of a Flower app: it has no pyproject.toml")
    if options.num_supernodes < 1:
        parser.error(f"--num-supernodes must be at least 1, got {options.num_supernodes}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the app that the command line names; return the exit code."""
    options = _parse(arguments)

    def terminate(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, terminate)

    def echo(line: str) -> None:
        sys.stdout.write(line if sys.stdout.isatty() else without_colours(line))
        sys.stdout.flush()

    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    home_path: Path = (options.flwr_home or HOMES / f"{now}-{os.getpid()}").resolve()
    logs = f"logs are in {home_path / 'logs'}"
    env = (
        {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "0"}
        if options.install_dependencies
        else {}
    )
    try:
        with FlowerHome(home_path, env) as home:
            home.start_simulation_superlink()
            run = FlowerRun(
                home,
                options.app,
                options.run_config,
                [simulation_config(options.num_supernodes), *options.federation_config],
                echo,
            )
            finished = run.finish(options.timeout)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        code = 130
    except (RuntimeError, TimeoutError) as error:
        print(f"error: {error}\n{logs}", file=sys.stderr)
        return 1
    else:
        if not finished.completed:
            if finished.run_id is None:
                print("error: the run was not started", file=sys.stderr)
            else:
                what = f"run {finished.run_id} is {finished.status}: {finished.details}"
                print(f"error: {what}", file=sys.stderr)
            print(logs, file=sys.stderr)
            return 1
        print(f"run {finished.run_id} completed in {finished.seconds:.1f} s")
        code = 0
    if options.flwr_home is None:
        _tidy(home_path)
    return code


def _tidy(home: Path) -> None:
    """Remove what Flower has left in a home; what an app has written there stays."""
    for name in ("apps", "runtime-envs", "logs"):
        shutil.rmtree(home / name, ignore_errors=True)
    for name in ("config.toml", "source"):
        (home / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        home.rmdir()


if __name__ == "__main__":
    sys.exit(main())
