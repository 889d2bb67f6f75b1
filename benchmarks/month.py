"""Times the month from CSV to a promoted model that answers over HTTP, on empty homes, and says where it goes.

    python -m benchmarks.month [--data DIR] [--repeats N]

``--data`` is a month's folder (default: the real sample beside the checkout, else a simulated month). Packages
are warm: one unmeasured pass comes first. Every figure is seconds of wall time as median, minimum and maximum.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import httpx

from benchmarks.months import MONTH, REAL_MONTH, folder_of_a_month
from streamflow import stack
from streamflow.database import Database
from streamflow.embedded import postgres, wait_until_ready
from streamflow.settings import Settings

REPLACED_SYSTEM = {"whole_graph": 96.0, "landing_and_snapshots": 31.0}
"""Seconds that the system being replaced takes for the same, as its operators measured."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=REAL_MONTH)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="streamflow-bench-") as scratch:
        folder = folder_of_a_month(arguments.data, Path(scratch))
        load_before = os.getloadavg()
        passes = [_measured(folder, Path(scratch) / f"home{n}") for n in range(arguments.repeats + 1)][1:]
        report = {
            "data": "the real 2024-01" if arguments.data == REAL_MONTH and REAL_MONTH.is_dir() else str(folder.name),
            "repeats": arguments.repeats,
            "machine": {
                "cores": os.cpu_count(),
                "python": platform.python_version(),
                "load average before": load_before,
                "load average after": os.getloadavg(),
            },
            "seconds": {name: _spread([one[name] for one in passes]) for name in passes[0]},
        }
        report["ratio to the replaced system"] = {
            name: round(report["seconds"][name]["median"] / seconds, 3) for name, seconds in REPLACED_SYSTEM.items()
        }
    print(json.dumps(report, indent=2))


def _measured(folder: Path, home: Path) -> dict[str, float]:
    """One pass on an empty home with its services running, then `up --once` on another empty home."""
    home.mkdir()
    settings = Settings(home=home, api_port=18000, mlflow_port=15000, dagster_port=13000, code_port=14000)
    seconds: dict[str, float] = {}
    with _services(settings) as database:
        started = time.perf_counter()
        seconds["land"] = _command(settings, database, "land", str(folder), "--month", str(MONTH))
        seconds["run"] = _command(settings, database, "run", str(MONTH))
        answering = time.perf_counter()
        _wait_for_prediction(settings, folder)
        seconds["service follows the promotion"] = time.perf_counter() - answering
        seconds["whole_graph"] = time.perf_counter() - started
        steps = _steps(settings, database)
    seconds |= {f"step {name}": took for name, took in steps.items()}
    seconds["run, outside of its steps (start, imports, records)"] = seconds["run"] - sum(steps.values())
    snapshots = [name for name in steps if name.endswith("_snapshots")]
    tables = [name.removesuffix("_snapshots") for name in snapshots]
    landed = [name for name in steps if name in tables or name in ("users", "subscriptions", "labels")]
    seconds["landing_and_snapshots"] = seconds["land"] + sum(steps[name] for name in (*landed, *snapshots))
    shutil.rmtree(home)
    home.mkdir()
    (home / "data").mkdir()
    shutil.copytree(folder, home / "data" / str(MONTH))
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "streamflow", "up", "--once", "--data", str(home / "data")],
        env={**os.environ, **settings.environment(), "STREAMFLOW_HOME": str(home / "up")},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    seconds["up --once on an empty home"] = time.perf_counter() - started
    return seconds


@contextmanager
def _services(settings: Settings) -> Iterator[Database]:
    with postgres(settings) as database, ExitStack() as running:
        _command(settings, database, "migrate")
        for service in ("mlflow", "api"):
            command = stack.command(service, settings, database)
            process = subprocess.Popen(
                command.argv,
                env={**os.environ, **command.environment},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            running.callback(process.wait)
            running.callback(process.terminate)
        addresses = stack.Addresses.of(settings)
        for address, what in ((addresses.mlflow, "MLflow"), (addresses.api, "the API")):
            wait_until_ready(f"{address}/health", what)
        yield database


def _command(settings: Settings, database: Database, *arguments: str) -> float:
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "streamflow", *arguments],
        env={**os.environ, **stack.environment(settings, database), stack.OWNER_ADDRESS: database.owner_url},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - started


def _wait_for_prediction(settings: Settings, folder: Path) -> None:
    api = stack.Addresses.of(settings).api
    user_id = (folder / "users.csv").read_text().splitlines()[1].split(",")[0]
    wait_until_ready(f"{api}/ready", "the API")
    httpx.post(f"{api}/predict", json={"user_id": user_id}, timeout=10).raise_for_status()


def _steps(settings: Settings, database: Database) -> dict[str, float]:
    """How long each asset of the newest run took, by Dagster's own log."""
    from streamflow_dagster import runner

    with mock.patch.dict(os.environ, stack.environment(settings, database)), runner.instance() as instance:
        run_id = instance.get_runs(limit=1)[0].run_id
        return {
            stats.step_key: (stats.end_time or 0) - (stats.start_time or 0)
            for stats in instance.get_run_step_stats(run_id)
        }


def _spread(values: list[float]) -> dict[str, Any]:
    rounded = [round(value, 3) for value in values]
    return {"median": round(statistics.median(values), 3), "minimum": min(rounded), "maximum": max(rounded)}


if __name__ == "__main__":
    main()
