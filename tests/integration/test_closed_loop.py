"""Months that land while nobody looks: what the sensors request, run as the daemon would, until nothing is due."""

import shutil
from contextlib import contextmanager
from datetime import UTC, datetime
from unittest import mock
from uuid import uuid4

import pytest
from dagster import (
    AssetKey,
    DagsterInstance,
    DagsterRun,
    DagsterRunStatus,
    RunRequest,
    SkipReason,
    build_sensor_context,
    evaluate_automation_conditions,
)

from streamflow import loop, monitoring, pipeline, scores, stack
from streamflow.contract import CONTRACT
from streamflow.errors import TrainingRefused
from streamflow.landing import LandingZone
from streamflow.months import Month
from streamflow.pipeline import Platform
from streamflow.settings import Settings
from streamflow.simulate import Scenario, simulate
from streamflow.status import month_statuses
from streamflow_dagster import runner
from streamflow_dagster.definitions import defs
from streamflow_dagster.defs import automation
from streamflow_dagster.defs.resources import PlatformResource

JANUARY, FEBRUARY, MARCH, APRIL = Month.parse_range("2024-01..2024-04")
NOW = datetime(2024, 5, 1, tzinfo=UTC)
USERS = 2500
TABLES = [table.name for table in CONTRACT.tables]


@pytest.fixture(scope="module")
def platform(tmp_path_factory, database, quick_training_file):
    """The concept of churn changes in February and then stays; March has no labels yet."""
    home = tmp_path_factory.mktemp("loop")
    world = Scenario(concept_drift_from=FEBRUARY, season=0.0)
    simulate(home / "data", [JANUARY, FEBRUARY, MARCH, APRIL], users=USERS, scenario=world)
    settings = Settings(
        home=home,
        database_url=database.url,
        owner_database_url=database.owner_url,
        training_file=quick_training_file,
        policy="auto",
        actor="tester",
    )
    with mock.patch.dict("os.environ", stack.environment(settings, database)):
        pipeline.prepare(Platform(settings, database))
        yield Platform(settings, database)


@pytest.fixture(scope="module")
def dagster(platform):
    with runner.instance() as opened:
        yield opened


@pytest.fixture(scope="module")
def daemon(platform, dagster):
    return Daemon(platform, dagster)


class Daemon:
    """Evaluates the sensors at the time ``now`` and runs what they request, in this process; knows run ``keys``."""

    def __init__(self, platform: Platform, instance: DagsterInstance) -> None:
        self.instance = instance
        self.platform = platform
        self.now = NOW
        self.keys: list[str] = []
        self.runs: list[tuple[str, set[str]]] = []

    def evaluate(self, sensor) -> RunRequest | SkipReason:
        given, time = self.platform, self.now

        class Core(PlatformResource):
            @contextmanager
            def yield_for_execution(self, context):
                yield self

            @property
            def platform(self):
                return given

            def now(self):
                return time

        with build_sensor_context(instance=self.instance, resources={"core": Core()}) as context:
            return sensor(context)

    def work(self) -> list[tuple[str, set[str]]]:
        """Until no sensor requests anything that it had not requested before; the runs as month and assets."""
        begun = len(self.runs)
        while any(self._tick(sensor) for sensor in (automation.landed_months, automation.retraining)):
            pass
        return self.runs[begun:]

    def follow(self, state) -> set[tuple[str, str]]:
        """Make what the automation conditions ask for since ``state``, until they ask for nothing more."""
        made: set[tuple[str, str]] = set()
        while True:
            state = evaluate_automation_conditions(defs, self.instance, cursor=state.cursor)
            requested = {
                (partition, name)
                for name in DATA | REPORTED | MODEL
                for partition in (state.get_requested_partitions(AssetKey(name)) or ())
            }
            if not requested:
                return made
            made |= requested
            for month in {partition for partition, _ in requested}:
                names = [name for partition, name in requested if partition == month]
                done = runner.run_assets(self.instance, Month.parse(month), names, progress=lambda _: None)
                assert done.succeeded

    def _tick(self, sensor) -> bool:
        request = self.evaluate(sensor)
        if isinstance(request, SkipReason) or request.run_key in self.keys:
            return False
        self.keys.append(request.run_key)
        job = defs.resolve_job_def(request.job_name or sensor.jobs[0].name)
        done = job.execute_in_process(
            instance=self.instance,
            partition_key=request.partition_key,
            asset_selection=request.asset_selection,
            run_config={**runner.QUIET, **request.run_config},
            tags={**request.tags, automation.RUN_KEY: request.run_key},
            raise_on_error=False,
            run_id=str(uuid4()),
        )
        made = {event.asset_key.to_user_string() for event in done.get_asset_materialization_events()}
        self.runs.append((request.partition_key, made))
        return True


def land(platform, month, *tables):
    """Land the month's files, or those of some tables only."""
    folder = platform.settings.home / "data" / str(month)
    if tables:
        part = platform.settings.home / f"part-{uuid4()}"
        part.mkdir()
        for table in tables:
            shutil.copy(folder / f"{table}.csv", part)
        folder = part
    return LandingZone(platform.settings.home).land(folder, month, NOW)


def correct(platform, month, *, by=1):
    """Land the month again with one failed payment more, which takes the place of the one before."""
    file = platform.settings.home / "data" / str(month) / "payments_agg_90d.csv"
    header, *rows = file.read_text().splitlines()
    user, failed = rows[0].split(",")
    file.write_text("\n".join([header, f"{user},{int(failed) + by}", *rows[1:]]) + "\n")
    assert land(platform, month).changed


MODEL = {"churn_model", "registered_model_version"}
REPORTED = {"churn_scores", "drift_report", "performance_report"}
DATA = {spec.key.to_user_string() for spec in defs.resolve_all_asset_specs()} - MODEL - REPORTED


@pytest.fixture(scope="module")
def two_months(platform, daemon):
    """January and February land together."""
    land(platform, JANUARY)
    land(platform, FEBRUARY)
    return daemon.work()


def test_months_that_arrive_together_are_done_in_order_each_thing_once(two_months):
    assert two_months == [
        ("2024-01", DATA),
        ("2024-01", MODEL),
        ("2024-01", REPORTED),
        ("2024-02", DATA | REPORTED),
        ("2024-02", MODEL),
    ]


def test_the_second_month_is_scored_by_what_the_first_put_into_production(platform, two_months):
    assert [scores.load(platform.database, month).version for month in (JANUARY, FEBRUARY)] == [1, 1]


@pytest.mark.parametrize(
    ("asset", "plots"),
    [
        ("churn_scores", ["Scores"]),
        ("drift_report", ["Drift", "Features that drift"]),
        ("performance_report", ["Performance"]),
        ("churn_model", ["ROC curve", "Reliability", "Segments"]),
    ],
)
def test_each_asset_has_the_plots_that_matter_in_its_page(asset, plots, dagster, two_months):
    event = dagster.get_latest_materialization_event(AssetKey(asset)).asset_materialization
    values = [str(value.value) for value in event.metadata.values()]
    found = [value for value in values if "data:image/png;base64,iVBOR" in value]
    assert [value[2 : value.index("]")] for value in found] == plots


def test_decay_is_noticed_and_the_model_of_the_new_concept_goes_to_production(platform, two_months):
    january, february = monitoring.performance_history(platform.database)
    assert not january.decayed
    assert january.held_out.metrics["auc"].value > 0.7
    assert february.worse_than_promised.found
    assert february.version == 1
    entries = platform.ledger.entries()
    assert [(entry.action, entry.version, entry.by) for entry in entries] == [
        ("promote", 1, "policy"),
        ("promote", 2, "policy"),
    ]
    first, second = platform.ledger.versions()
    assert (first.lineage["cause"], second.lineage["cause"]) == ("no_model:2024-01", "decay:2024-02:version 1")
    assert second.lineage["window"] == ["2024-02"]
    found = loop.known(platform.database).begun
    assert [(one.cause, one.version, one.promoted, one.helped) for one in found] == [
        ("no_model:2024-01", 1, True, True),
        ("decay:2024-02:version 1", 2, True, True),
    ]


def test_what_has_landed_already_or_is_asked_for_again_requests_nothing(platform, daemon, dagster, two_months):
    assert not land(platform, JANUARY).changed
    assert daemon.work() == []
    daemon.keys.clear()  # as after the loss of all cursors
    assert daemon.work() == []
    assert evaluate_automation_conditions(defs, dagster, cursor=None).total_requested == 0
    assert "every landed month is done" in daemon.evaluate(automation.landed_months).skip_message
    assert "nothing calls for another model than version 2" in daemon.evaluate(automation.retraining).skip_message


def test_nothing_is_requested_while_the_command_line_is_at_work(platform, daemon, two_months):
    with loop.at_work(platform.database) as ours:
        assert ours
        for sensor in (automation.landed_months, automation.retraining):
            assert daemon.evaluate(sensor).skip_message == automation.BUSY


def test_a_run_that_ends_while_a_sensor_looks_is_not_asked_for_again(daemon, dagster, two_months, monkeypatch):
    tags = {automation.PARTITION: str(FEBRUARY)}
    run = DagsterRun("training", status=DagsterRunStatus.STARTED, tags=tags)
    dagster.add_run(run)

    def due(*_):
        dagster.report_run_canceled(run)
        return loop.Step(FEBRUARY, tuple(MODEL), "as it was before the run ended", "a cause")

    monkeypatch.setattr(loop, "due", due)
    said = f"2024-02 is being worked on by run {run.run_id}"
    assert daemon.evaluate(automation.retraining).skip_message == said


def causes(platform):
    return [one.cause for one in loop.known(platform.database).situation(FEBRUARY).past]


def test_a_cause_is_trained_for_once(platform, two_months):
    cause = "decay:2024-02:version 1"
    with (
        pytest.raises(TrainingRefused, match=rf"{cause} already; nothing is trained twice"),
        loop.retraining(platform, FEBRUARY, cause, "again", by="tester", now=NOW),
    ):
        pytest.fail("it was trained for again")
    assert loop.attempt(platform.database, cause) == 2


def test_a_training_that_was_killed_is_begun_again_some_times_and_one_that_failed_is_not(platform, two_months):
    class Killed(BaseException):
        """As far as the record is concerned: nothing runs after it."""

    for attempt in (1, 2, 3):
        assert loop.attempt(platform.database, "killed") == attempt
        assert "killed" not in causes(platform)
        with pytest.raises(Killed), loop.retraining(platform, FEBRUARY, "killed", "why", by="tester", now=NOW):
            raise Killed
    assert "killed" in causes(platform)
    with (
        pytest.raises(ValueError, match="no luck"),
        loop.retraining(platform, FEBRUARY, "failed", "why", by="tester", now=NOW),
    ):
        raise ValueError("no luck")
    assert "failed" in causes(platform)
    with platform.database.connect() as connection:
        row = connection.execute(
            "SELECT attempts, failure FROM streamflow.retrainings WHERE cause = 'failed'"
        ).fetchone()
    assert row == (1, "ValueError: no luck")


def test_a_month_without_labels_is_scored_and_checked_for_drift(platform, daemon, two_months):
    land(platform, MARCH, *(name for name in TABLES if name != "labels"))
    labelled = {"labels", "training_dataset", "performance_report"}
    assert daemon.work() == [("2024-03", (DATA | REPORTED) - labelled)]
    assert scores.load(platform.database, MARCH).version == 2
    assert [one.month for one in monitoring.drift_history(platform.database)] == ["2024-01", "2024-02", "2024-03"]


def test_its_labels_are_followed_by_evaluation_and_a_month_of_no_change_trains_nothing(platform, daemon, two_months):
    land(platform, MARCH, "labels")
    assert daemon.work() == [("2024-03", {"labels", "training_dataset", "performance_report"})]
    march = monitoring.performance_history(platform.database)[-1]
    assert (march.month, march.version, march.decayed) == ("2024-03", 2, False)
    assert len(platform.ledger.versions()) == 2


def test_a_corrected_table_is_brought_in_alone_and_the_conditions_make_what_depends_on_it(
    platform, daemon, dagster, two_months
):
    state = evaluate_automation_conditions(defs, dagster)
    correct(platform, MARCH)

    assert daemon.work() == [("2024-03", {"payments_agg_90d"})]
    (march,) = (one for one in month_statuses(platform) if one.month == "2024-03")
    depends = {"payments_agg_90d_snapshots", "payments_agg_90d_fv", "training_dataset", *REPORTED}
    assert set(march.stale) == depends
    assert "the sensor corrections has payments" in daemon.evaluate(automation.landed_months).skip_message

    old = {one.month: one.digest for one in monitoring.reports(platform.database, "drift_report").values()}
    assert daemon.follow(state) == {("2024-03", name) for name in depends}
    assert {one.month: one.state for one in month_statuses(platform)} == dict.fromkeys(
        ("2024-01", "2024-02", "2024-03"), "complete"
    )
    now = {one.month: one.digest for one in monitoring.reports(platform.database, "drift_report").values()}
    assert {month for month in now if now[month] != old[month]} == {MARCH}
    assert scores.load(platform.database, MARCH).version == 2


def test_what_no_condition_had_made_again_in_time_is_asked_for_once(platform, daemon, dagster, two_months, monkeypatch):
    """The cursor of the automation conditions was lost before they looked, or the run that they asked for failed."""
    correct(platform, MARCH)
    assert daemon.work() == [("2024-03", {"payments_agg_90d"})]
    assert "has payments_agg_90d_snapshots" in daemon.evaluate(automation.landed_months).skip_message
    monkeypatch.setattr(daemon, "now", datetime.now(UTC) + automation.OVERDUE)
    overdue = daemon.evaluate(automation.landed_months)
    assert overdue.run_key.startswith("stale 2024-03:")
    failed = DagsterRun("month", status=DagsterRunStatus.FAILURE, tags={automation.RUN_KEY: overdue.run_key})
    dagster.add_run(failed)
    assert "2024-03 failed and waits for a person" in daemon.evaluate(automation.landed_months).skip_message
    dagster.delete_run(failed.run_id)
    depends = {"payments_agg_90d_snapshots", "payments_agg_90d_fv", "training_dataset", *REPORTED}
    assert daemon.work() == [("2024-03", depends)]
    assert daemon.evaluate(automation.landed_months).skip_message == "every landed month is done"


def test_a_correction_that_is_taken_back_is_brought_in_too(platform, daemon, dagster, two_months):
    """What has landed is then what had landed before the correction, and that was asked for once."""
    state = evaluate_automation_conditions(defs, dagster)
    correct(platform, MARCH, by=-1)
    assert daemon.work() == [("2024-03", {"payments_agg_90d"})]
    assert {month for month, _ in daemon.follow(state)} == {"2024-03"}
    assert {one.month: one.state for one in month_statuses(platform)}["2024-03"] == "complete"


def test_a_drift_report_of_another_month_that_was_held_against_a_corrected_one_is_made_again(
    platform, daemon, dagster, two_months
):
    """February was scored by what learned from January, March by what learned from February."""
    state = evaluate_automation_conditions(defs, dagster)
    for _ in ("corrected", "corrected again"):
        correct(platform, JANUARY)
        assert daemon.work() == [("2024-01", {"payments_agg_90d"})]
        assert {month for month, _ in daemon.follow(state)} == {"2024-01"}
        stale = {one.month: one.stale for one in month_statuses(platform)}
        models = ("churn_model", "registered_model_version")
        assert stale == {"2024-01": models, "2024-02": ("drift_report", *models), "2024-03": ()}

        request = daemon.evaluate(automation.landed_months)
        assert request.tags["streamflow/reason"] == (
            "2024-02 is stale, held against 2024-01 as it was before its correction"
        )
        before = drift_of(platform, FEBRUARY)
        assert daemon.work() == [("2024-02", {"drift_report"})]
        assert drift_of(platform, FEBRUARY) != before
        state = evaluate_automation_conditions(defs, dagster)
        assert {one.month: one.stale for one in month_statuses(platform)}["2024-02"] == models


def drift_of(platform, month):
    return monitoring.reports(platform.database, "drift_report")[month].digest


def test_a_month_that_fails_waits_for_a_person_and_holds_up_no_other(platform, daemon, two_months):
    land(platform, APRIL)
    platform.landing.path(APRIL, "users").unlink()
    assert [month for month, _ in daemon.work()] == ["2024-04"]
    assert "2024-04 failed and waits for a person" in daemon.evaluate(automation.landed_months).skip_message
