"""Two real daemons on one instance, with a code server that executes: a month is worked off once, whatever is lost."""

import os
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from dagster import AssetKey, DagsterInstance, DagsterRunStatus

from streamflow import loop, pipeline, scores, stack
from streamflow.landing import LandingZone
from streamflow.months import Month
from streamflow.pipeline import Platform
from streamflow.relations import relations
from streamflow.settings import PROJECT_ROOT, Settings
from streamflow.simulate import Scenario, simulate
from streamflow.status import month_statuses
from streamflow_dagster.defs.automation import RUN_KEY

JANUARY = Month(2024, 1)
NOW = datetime(2024, 2, 3, tzinfo=UTC)
USERS = 2500
PATIENCE_S = 100
STOP_S = 20

QUICK_GRAPH = """
from streamflow_dagster.definitions import defs

for sensor in defs.sensors:
    sensor._min_interval = 1
"""
"""The graph, with sensors that look as often as a daemon lets them."""
QUICK_QUEUE = """
run_coordinator:
  module: dagster.core.run_coordinator
  class: QueuedRunCoordinator
  config: {dequeue_interval_seconds: 1}
"""
AT_WORK, WAITS = "this daemon is at work", "another daemon is at work on this database; this one waits until it is gone"


@dataclass(frozen=True)
class Service:
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def said(self) -> str:
        return self.log.read_text()


@contextmanager
def started(command, log):
    environment = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT), "PYTHONUNBUFFERED": "1", **command.environment}
    with log.open("w") as file:
        process = subprocess.Popen(
            command.argv, env=environment, stdout=file, stderr=file, cwd=log.parent, start_new_session=True
        )
    try:
        yield Service(process, log)
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        finally:
            with suppress(ProcessLookupError):  # the runs that it has started too
                os.killpg(process.pid, signal.SIGKILL)


def eventually(condition: Callable[[], object], *services: Service):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail("\n".join(f"{one.log}:\n{one.said[-3000:]}" for one in services))
        time.sleep(0.2)


@pytest.fixture(scope="module")
def platform(tmp_path_factory, database, quick_training_file):
    """January has landed, and its model may go to Production by itself."""
    home = tmp_path_factory.mktemp("daemons")
    simulate(home / "data", [JANUARY], users=USERS, scenario=Scenario(season=0.0))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = Settings(
        home=home,
        database_url=database.url,
        owner_database_url=database.owner_url,
        training_file=quick_training_file,
        policy="auto",
        actor="tester",
        code_port=port,
    )
    platform = Platform(settings, database)
    pipeline.prepare(platform)
    LandingZone(home).land(home / "data" / str(JANUARY), JANUARY, NOW)
    return platform


@pytest.fixture(scope="module")
def commands(platform):
    """What `streamflow up` starts, but for the intervals."""
    settings, home = platform.settings, platform.settings.home
    code, daemon = (stack.command(name, settings, platform.database) for name in ("code", "daemon"))
    graph, configuration = home / "quick_graph.py", home / "dagster" / "dagster.yaml"
    graph.write_text(QUICK_GRAPH)
    configuration.write_text(configuration.read_text() + QUICK_QUEUE)
    ours = {"--module-name": "--python-file", "streamflow_dagster.definitions": str(graph)}
    return replace(code, argv=tuple(ours.get(argument, argument) for argument in code.argv)), daemon


@pytest.fixture(scope="module")
def daemons(platform, commands):
    """Both daemons, started at once beside the code server."""
    (code, daemon), settings = commands, platform.settings
    with ExitStack() as running:
        server = running.enter_context(started(code, settings.home / "code.log"))

        def answers():
            with socket.socket() as probe:
                return probe.connect_ex((settings.host, settings.code_port)) == 0

        eventually(answers, server)
        yield [running.enter_context(started(daemon, settings.home / f"{name}.log")) for name in ("one", "two")]


@pytest.fixture(scope="module")
def instance(commands, daemons):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in commands[1].environment.items():
            patch.setenv(name, value)
        with DagsterInstance.get() as opened:
            yield opened


@pytest.fixture(scope="module")
def worked_off(platform, daemons, instance):
    def done():
        idle = all(run.is_finished for run in instance.get_runs())
        return idle and platform.ledger.production() is not None and loop.due(platform) is None

    eventually(done, *daemons)


def runs(instance):
    """How often each thing was requested, and with what outcome."""
    return Counter((run.tags.get(RUN_KEY, "no key").partition(":")[0], run.status) for run in instance.get_runs())


ONE_RUN_EACH = {
    ("month 2024-01", DagsterRunStatus.SUCCESS): 1,
    ("no_model", DagsterRunStatus.SUCCESS): 1,
    ("scores 2024-01", DagsterRunStatus.SUCCESS): 1,
}


def test_one_is_at_work_and_the_other_says_that_it_waits(daemons):
    eventually(lambda: all("streamflow daemon: " in one.said for one in daemons), *daemons)
    assert sorted((AT_WORK in one.said, WAITS in one.said) for one in daemons) == [(False, True), (True, False)]


def test_a_month_that_lands_is_worked_off_once_and_whole(platform, instance, worked_off):
    assert runs(instance) == ONE_RUN_EACH
    made = {name: len(instance.fetch_materializations(AssetKey(name), limit=9).records) for name in relations()}
    assert made == dict.fromkeys(relations(), 1)
    assert [(one.action, one.version) for one in platform.ledger.entries()] == [("promote", 1)]
    (january,) = month_statuses(platform)
    assert (january.state, january.missing, january.stale) == ("complete", (), ())
    assert len(scores.load(platform.database, JANUARY).frame) == USERS


def test_when_the_one_is_killed_and_all_cursors_are_lost_the_other_goes_on_and_asks_for_nothing(
    platform, daemons, instance, worked_off
):
    one, other = sorted(daemons, key=lambda service: WAITS in service.said)
    one.process.kill()
    instance.schedule_storage.wipe()
    looked = (
        "Checking for new runs for sensor: landed_months",
        "Checking for new runs for sensor: retraining",
        "Finished auto-materialization tick for corrections",
    )
    eventually(lambda: min(other.said.count(tick) for tick in looked) >= 2, other)
    assert AT_WORK in other.said
    assert runs(instance) == ONE_RUN_EACH
    assert [one.state for one in month_statuses(platform)] == ["complete"]


def test_one_whose_lock_is_lost_begins_again(platform, daemons, worked_off):
    """As after a restart of PostgreSQL: another might have taken it."""
    other = next(service for service in daemons if service.process.poll() is None)
    with platform.database.connect() as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted "
            "AND (classid::bigint << 32) | objid::bigint = hashtextextended('streamflow daemon', 0)"
        )
    eventually(lambda: other.said.count(AT_WORK) == 2, other)
    assert "the connection that keeps other daemons off is lost" in other.said
    assert other.process.poll() is None
