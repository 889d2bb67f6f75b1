"""`streamflow up`: the whole platform in the foreground, and the main job beside it."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from streamflow import embedded, online_redis, stack
from streamflow.api_keys import request_headers
from streamflow.contract import USER_ID
from streamflow.database import Database
from streamflow.errors import StreamFlowError
from streamflow.landing import LandingRefused, folders_in
from streamflow.months import Month
from streamflow.pipeline import Platform
from streamflow.settings import PREFIX, Settings
from streamflow.simulate import simulate

SAMPLE_MONTHS = 2
SAMPLE_USERS = 7_000
READY_TIMEOUT_S = 120
TRIED_USERS = 5
POLL_S = 0.2


def bring_up(settings: Settings, *, data: Path | None, first_month: Month, once: bool, console: Console) -> int:
    """Start everything, land and materialize what is new, say where things are; returns the exit code.

    Without ``once`` it stays until Ctrl-C or SIGTERM. Raises StreamFlowError, with nothing left running, when a port is
    taken, there is no data to land, or a service dies. A month that is refused or fails does not stop the others; with
    ``once`` the exit code is 1 then.
    """
    started = time.monotonic()
    if data is not None:
        folders_in(data, first_month)
    for name in embedded.stop_leftovers(settings.home):
        console.print(f"stopped {name}, left over from a run that was killed")
    for port, what, variable in (
        (settings.api_port, "API", "API_PORT"),
        (settings.dagster_port, "Dagster", "DAGSTER_PORT"),
        (settings.mlflow_port, "MLflow", "MLFLOW_PORT"),
        (settings.code_port, "Dagster's code server", "CODE_PORT"),
    ):
        embedded.require_free_port(settings.host, port, what, f"{PREFIX}{variable}")
    if settings.online_redis_url:
        online_redis.require(settings.online_redis_url)
    with embedded.postgres(settings) as database:
        owner = {stack.OWNER_ADDRESS: database.owner_url}
        if failed := streamflow(["migrate"], {**stack.environment(settings, database), **owner}):
            return failed
        commands = {name: stack.command(name, settings, database) for name in stack.SERVICES}
        job = _Job(settings, database, data, first_month, once, console, started)
        return embedded.run_group(commands, job=job.run, home=settings.home, once=once)


def streamflow(arguments: list[str], environment: Mapping[str, str]) -> int:
    """Run a `streamflow` command in a process of its own, on this screen; returns its exit code."""
    command = [sys.executable, "-m", "streamflow", *arguments]
    with subprocess.Popen(command, env={**os.environ, **environment}) as process:
        try:
            while process.poll() is None:
                time.sleep(POLL_S)
        finally:
            process.terminate()
        return int(process.returncode)


@dataclass(frozen=True)
class _Job:
    """The main job: land, materialize, check one prediction, print the summary."""

    settings: Settings
    database: Database
    data: Path | None
    first_month: Month
    once: bool
    console: Console
    started: float

    @property
    def platform(self) -> Platform:
        return Platform(self.settings, self.database)

    def run(self) -> int:
        refused = self._land()
        failed = self._materialize()
        if (refused or failed) and self.once:
            return 1
        self._summarize(self._checked_prediction())
        return 0

    def _land(self) -> int:
        """Land what there is; returns how many months were refused."""
        zone = self.platform.landing
        folder = self.data
        if folder is None and not zone.months():
            folder = self.settings.home / "simulated"
            months = list(self.first_month.until(self.first_month.shift(SAMPLE_MONTHS - 1)))
            simulate(folder, months, users=SAMPLE_USERS)
        refused = 0
        for path, month in folders_in(folder, self.first_month) if folder else ():
            try:
                landed = zone.land(path, month, datetime.now(UTC))
            except LandingRefused as refusal:
                refused += 1
                self.console.print(str(refusal), markup=False)
            else:
                self.console.print(f"{month} {'landed' if landed.changed else 'had landed already'}")
        return refused

    def _materialize(self) -> int:
        return streamflow(["run"], stack.environment(self.settings, self.database))

    def _checked_prediction(self) -> str:
        """What there is to try, after it has been tried; raises StreamFlowError when the service does not answer."""
        production = self.platform.ledger.production()
        api = stack.Addresses.of(self.settings).api
        if production is None:
            embedded.wait_until_ready(f"{api}/health", "the API", READY_TIMEOUT_S)
            return "Nothing is in Production yet: see `streamflow models`, then `streamflow promote`."
        embedded.wait_until_ready(f"{api}/ready", "the API", READY_TIMEOUT_S)
        user_id, answer = self._first_answer(api)
        if answer.is_error:
            raise StreamFlowError(f"the API refuses to predict {user_id}: {answer.text}")
        said = answer.json()
        return (
            f"{user_id} churns with probability {said['probability']:.3f} by version {said['model_version']}, "
            f"features as of {said['features_as_of']}. Try it:\n\n"
            f"  curl -s {api}/predict -H 'Content-Type: application/json' -d '{{\"{USER_ID}\": \"{user_id}\"}}'"
        )

    def _first_answer(self, api: str) -> tuple[str, httpx.Response]:
        """The first of some customers of the newest months that the API answers, or its last refusal."""
        zone, users = self.platform.landing, self.platform.contract.tables[0].name
        for month in reversed(zone.months()):
            for user_id in zone.read(month, users)[USER_ID][:TRIED_USERS].to_pylist():
                answer = httpx.post(
                    f"{api}/predict",
                    json={USER_ID: user_id},
                    headers=request_headers(self.settings),
                    timeout=10,
                    trust_env=False,
                )
                if answer.is_success:
                    return user_id, answer
        return user_id, answer

    def _summarize(self, prediction: str) -> None:
        addresses = stack.Addresses.of(self.settings)
        seconds = time.monotonic() - self.started
        table = Table(box=None, show_header=False, padding=(0, 2))
        table.add_row("Dagster UI", addresses.dagster)
        table.add_row("MLflow UI", addresses.mlflow)
        table.add_row("API", f"{addresses.api}/schema")
        table.add_row("State and logs", str(self.settings.home))
        self.console.print(f"\nStreamFlow is up after {seconds:.0f} s.\n")
        self.console.print(table)
        self.console.print(f"\n{prediction}", markup=False)
        self.console.print("" if self.once else "\nCtrl-C stops everything.")
