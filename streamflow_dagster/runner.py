"""Materializes months from the command line: one run each, recorded in Dagster like those from its UI."""

import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import uuid4

import psutil
from dagster import (
    AssetKey,
    DagsterEventType,
    DagsterInstance,
    DagsterRunStatus,
    ExecuteInProcessResult,
    JobDefinition,
    RunsFilter,
)

from streamflow.months import Month
from streamflow.pipeline import CHURN_MODEL

QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
STATEMENT_TIMEOUT_MS = 60_000
POOL_RECYCLE_S = 3_600
MAX_CONNECTIONS = 10
PROGRESS_INTERVAL_S = 0.3
PROCESS_TAG = "streamflow/process"
SAME_PROCESS_S = 60.0
"""A process that was created as much later than recorded has another's number; clocks that are set differ by less."""
UNFINISHED = [DagsterRunStatus.NOT_STARTED, DagsterRunStatus.STARTING, DagsterRunStatus.STARTED]

Progress = Callable[[str], None]
"""Told the name of each asset that has been materialized."""


@dataclass(frozen=True)
class MonthRun:
    """How a run of some assets of a month ended: ``failures`` says for each failed asset why."""

    month: Month
    assets: tuple[str, ...]
    run_id: str
    seconds: float
    failures: dict[str, str]

    @property
    def succeeded(self) -> bool:
        """Whether every asset was materialized and every blocking check passed."""
        return not self.failures


@contextmanager
def instance() -> Iterator[DagsterInstance]:
    """Dagster's instance of $DAGSTER_HOME, holding its connections open as the webserver does.

    By default dagster-postgres connects anew for each event, which costs a month's run some 600 connections.
    """
    with DagsterInstance.get() as opened:
        opened.optimize_for_webserver(STATEMENT_TIMEOUT_MS, POOL_RECYCLE_S, MAX_CONNECTIONS)
        end_dead_runs(opened)
        yield opened


def end_dead_runs(opened: DagsterInstance) -> list[str]:
    """Record the failure of this program's runs whose process was killed, and free what they hold; returns their ids.

    A killed run would count as running until run monitoring gives up on it, and a training would wait for its slot.
    """
    ended = []
    for run in opened.get_runs(RunsFilter(statuses=UNFINISHED)):
        process = run.tags.get(PROCESS_TAG)
        if process is not None and _is_dead(process):
            opened.report_run_failed(run, f"its process ended without a word ({process}); run the month again")
            opened.event_log_storage.free_concurrency_slots_for_run(run.run_id)
            ended.append(run.run_id)
    return ended


def _this_process() -> str:
    process = psutil.Process()
    return f"{socket.gethostname()} {process.pid} {process.create_time():.0f}"


def _is_dead(name: str) -> bool:
    """Whether a process of this host is gone; of another host's nothing is known."""
    host, pid, created = name.rsplit(" ", 2)
    if host != socket.gethostname():
        return False
    try:
        process = psutil.Process(int(pid))
        return process.status() == psutil.STATUS_ZOMBIE or process.create_time() > float(created) + SAME_PROCESS_S
    except psutil.NoSuchProcess:
        return True


def run_assets(
    opened: DagsterInstance,
    month: Month,
    assets: Sequence[str],
    *,
    progress: Progress,
    training: Mapping[str, str | None] | None = None,
) -> MonthRun:
    """Materialize assets of one month in one run; a failure is returned, not raised.

    ``training`` is the configuration of the asset churn_model.
    """
    run_id = str(uuid4())
    configured = {CHURN_MODEL: {"config": dict(training)}} if training and CHURN_MODEL in assets else {}
    with _reporting(opened, run_id, progress):
        result = _whole_month().execute_in_process(
            run_config={**QUIET, **({"ops": configured} if configured else {})},
            instance=opened,
            partition_key=str(month),
            asset_selection=[AssetKey(name) for name in assets],
            raise_on_error=False,
            run_id=run_id,
            tags={PROCESS_TAG: _this_process()},
        )
    stats = opened.get_run_stats(run_id)
    seconds = (stats.end_time or 0) - (stats.start_time or 0)
    return MonthRun(month, tuple(assets), run_id, seconds, _failures(result))


@contextmanager
def _reporting(opened: DagsterInstance, run_id: str, progress: Progress) -> Iterator[None]:
    """Tell ``progress`` each finished asset of the run; Dagster's own watcher tells in bursts, seconds late."""
    finished = threading.Event()

    def report() -> None:
        told: set[str] = set()
        last = False
        while not last:
            last = finished.wait(PROGRESS_INTERVAL_S)
            for entry in opened.all_logs(run_id, of_type=DagsterEventType.STEP_SUCCESS):
                if entry.step_key and entry.step_key not in told:
                    told.add(entry.step_key)
                    progress(entry.step_key)

    thread = threading.Thread(target=report, name="progress")
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def _whole_month() -> JobDefinition:
    from streamflow_dagster.definitions import defs

    return defs.resolve_job_def("whole_month")


def _failures(result: ExecuteInProcessResult) -> dict[str, str]:
    failures = {}
    for event in result.all_events:
        if event.is_step_failure:
            said, error = event.step_failure_data.user_failure_data, event.step_failure_data.error
            reason = said.description if said else error.message if error else None
            failures[str(event.step_key)] = (reason or "no reason given").strip()
    if not failures and not result.success:
        failures["run"] = "failed before its first step; its log in the Dagster UI says why"
    return failures
