"""Bad input through Dagster as it runs it: a failed step says in its first line what to do, and Production stays.

What is refused before Dagster hears of it is in test_landing.py, odd months that are no failure in test_monitoring.py,
lost cursors and months that wait in test_closed_loop.py.
"""

import shutil
from contextlib import contextmanager
from datetime import UTC, datetime
from unittest import mock
from uuid import uuid4

import pandas as pd
import pytest
from dagster import AssetKey, RunRequest, SkipReason, build_sensor_context

from streamflow import monitoring, pipeline, scores, stack
from streamflow.contract import CONTRACT, USER_ID
from streamflow.landing import LandingRefused, LandingZone
from streamflow.months import Month
from streamflow.pipeline import Platform
from streamflow.settings import Settings
from streamflow.simulate import Scenario, simulate
from streamflow.status import TRAINED, WATCHED, month_statuses, needs_labels, relations
from streamflow_dagster import runner
from streamflow_dagster.definitions import defs
from streamflow_dagster.defs import automation
from streamflow_dagster.defs.failing import TickFailed
from streamflow_dagster.defs.resources import PlatformResource

JANUARY, FEBRUARY, MARCH, APRIL, MAY, JUNE = Month.parse_range("2024-01..2024-06")
NOW = datetime(2024, 7, 3, tzinfo=UTC)
USERS = 800
FAILURE = "dagster._core.definitions.events.Failure: "
SENSORS = (automation.landed_months, automation.retraining, automation.registry_stages)


@pytest.fixture(scope="module")
def platform(tmp_path_factory, database, quick_training_file):
    """A world in which nothing changes; of models only the first is promoted without a person."""
    home = tmp_path_factory.mktemp("failures")
    simulate(home / "data", list(JANUARY.until(JUNE)), users=USERS, scenario=Scenario(season=0.0))
    settings = Settings(
        home=home,
        database_url=database.url,
        owner_database_url=database.owner_url,
        training_file=quick_training_file,
        policy="manual",
        actor="tester",
    )
    with mock.patch.dict("os.environ", stack.environment(settings, database)):
        pipeline.prepare(Platform(settings, database))
        yield Platform(settings, database)


@pytest.fixture(scope="module")
def dagster(platform):
    with runner.instance() as opened:
        land(platform, JANUARY)
        assert failed(opened, JANUARY, *(name for name in relations() if name not in WATCHED)) == {}
        assert failed(opened, JANUARY, *WATCHED) == {}
        yield opened


@pytest.fixture(autouse=True)
def _production_is_untouched(platform, dagster):
    """January's model is in Production before and after, in the ledger and, if it is there, in MLflow; and scores."""
    yield
    assert platform.ledger.production() == 1
    assert [entry.version for entry in platform.ledger.entries() if entry.action == "promote"] == [1]
    stages = {number: one.stage for number, one in platform.registry.versions().items()}
    assert [number for number, stage in stages.items() if stage == "Production"] == ([1] if 1 in stages else [])
    assert pipeline.scorer_of(platform, platform.ledger.version(1))


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


@contextmanager
def edited(platform, month, table, change):
    """While another file is there."""
    file = platform.settings.home / "data" / str(month) / f"{table}.csv"
    kept = file.read_bytes()
    rows = pd.read_csv(file, dtype=str, keep_default_na=False)
    change(rows).to_csv(file, index=False)
    yield
    file.write_bytes(kept)


def failed(dagster, month, *assets, cause=None):
    """The first line that the UI shows of each failed step, once its own class is taken off; by step."""
    training = {"ops": {"churn_model": {"config": {"cause": cause, "reason": "why"}}}} if cause else {}
    done = defs.resolve_job_def("whole_month").execute_in_process(
        instance=dagster,
        partition_key=str(month),
        asset_selection=[AssetKey(name) for name in assets],
        run_config={**runner.QUIET, **training},
        raise_on_error=False,
        run_id=str(uuid4()),
    )
    lines = {}
    for event in done.all_events:
        if event.is_step_failure:
            line = event.step_failure_data.error.message.partition("\n")[0]
            assert line.startswith(FAILURE), line
            lines[event.step_key] = line.removeprefix(FAILURE)
    assert done.success == (not lines)
    return lines


def ticked(platform, dagster, sensor):
    """What a sensor answers, with the settings as they are now."""

    class Core(PlatformResource):
        @contextmanager
        def yield_for_execution(self, context):
            yield self

        @property
        def platform(self):
            return Platform(platform.settings, platform.database)

        def now(self):
            return NOW

    with build_sensor_context(instance=dagster, resources={"core": Core()}) as context:
        return sensor(context)


def state_of(platform, month):
    return {one.month: one.state for one in month_statuses(platform)}.get(str(month))


WITHOUT_LABELS = [name for name in relations() if not needs_labels(name)]
"""What is made of a month that has none."""


def test_a_month_with_no_labels_ever_says_where_labels_are_missing(platform, dagster):
    land(platform, FEBRUARY, *(table.name for table in CONTRACT.tables if table.name != "labels"))
    assert failed(dagster, FEBRUARY, *WITHOUT_LABELS) == {}
    assert state_of(platform, FEBRUARY) == "unlabelled"
    said = {name: failed(dagster, FEBRUARY, name)[name] for name in relations() if name not in WITHOUT_LABELS}
    training_dataset = (
        "training_dataset holds nothing for 2024-02; land the month and materialize training_dataset first"
    )
    assert said == {
        "labels": "2024-02 has landed without labels.csv; land it with `streamflow land`",
        "training_dataset": "labels holds nothing for 2024-02; land the month and materialize labels first",
        "performance_report": training_dataset,
        "churn_model": training_dataset,
        "registered_model_version": (
            "churn_model holds nothing for 2024-02; land the month and materialize churn_model first"
        ),
    }
    waits = ticked(platform, dagster, automation.landed_months)
    assert waits.skip_message == "every landed month is done; 2024-02 waits for labels.csv"


def test_labels_of_customers_that_do_not_exist_are_refused_when_they_come_late(platform, dagster):
    stranger = {USER_ID: "0000-NOONE"}
    with (
        edited(platform, FEBRUARY, "labels", lambda rows: pd.concat([rows, rows[:1].assign(**stranger)])),
        pytest.raises(
            LandingRefused, match=r"(?s)1 problem; nothing was changed\..*line 802.*'0000-NOONE' is not a user"
        ),
    ):
        land(platform, FEBRUARY, "labels")
    assert state_of(platform, FEBRUARY) == "unlabelled"


def test_a_month_that_has_not_landed_says_how_to_land_it(dagster):
    assert failed(dagster, JUNE, "users") == {
        "users": "2024-06 has not landed; run: streamflow land FOLDER --month 2024-06"
    }
    for asset, source in (
        ("users_snapshots", "users"),
        ("subs_profile_fv", "subscriptions_profile_snapshots"),
        ("churn_scores", "users_snapshots"),
        ("drift_report", "churn_scores"),
    ):
        said = f"{source} holds nothing for 2024-06; land the month and materialize {source} first"
        assert failed(dagster, JUNE, asset) == {asset: said}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda rows: rows.drop(columns="watch_hours_30d"), "watch_hours_30d"),
        (lambda rows: rows.assign(watch_hours_30d=""), "800 problems; nothing was changed."),
        (lambda rows: rows[:0], "usage_agg_30d.csv"),
    ],
)
def test_a_feature_that_is_entirely_missing_is_refused_when_it_lands(platform, dagster, change, says):
    with edited(platform, MARCH, "usage_agg_30d", change), pytest.raises(LandingRefused, match=says):
        land(platform, MARCH)
    assert state_of(platform, MARCH) is None


def test_a_feature_that_turned_constant_is_large_drift_and_its_model_is_held_against_the_gates(platform, dagster):
    with edited(platform, MARCH, "usage_agg_30d", lambda rows: rows.assign(watch_hours_30d="12.5")):
        land(platform, MARCH)
    assert failed(dagster, MARCH, *(name for name in relations() if name not in TRAINED)) == {}
    assert monitoring.drift_history(platform.database)[-1].report.drifted("large") == ("watch_hours_30d",)
    asked = ticked(platform, dagster, automation.retraining)
    assert asked.tags["streamflow/reason"] == "large drift in 2024-03 of watch_hours_30d"
    assert failed(dagster, MARCH, *TRAINED) == {}
    assert [entry.action for entry in platform.ledger.entries()] == ["promote", "refuse"]


def test_a_month_with_a_tenth_of_the_customers_is_scored_and_judged_but_too_small_to_learn_from(platform, dagster):
    folder = platform.settings.home / "data" / str(APRIL)
    kept = set(pd.read_csv(folder / "users.csv")[USER_ID][: USERS // 10])
    for table in CONTRACT.tables:
        rows = pd.read_csv(folder / f"{table.name}.csv", dtype=str, keep_default_na=False)
        rows[rows[USER_ID].isin(kept)].to_csv(folder / f"{table.name}.csv", index=False)
    land(platform, APRIL)
    assert failed(dagster, APRIL, *(name for name in relations() if name not in TRAINED)) == {}
    assert failed(dagster, APRIL, *TRAINED) == {
        "churn_model": "only 22 of the 64 users to learn from churned; guards.minimum_positives of training.toml asks "
        "for 30; train on a month with more users, or lower it"
    }


def test_a_policy_with_an_unknown_key_fails_what_needs_it_and_nothing_else(platform, dagster):
    land(platform, MAY)
    bad = platform.settings.home / "policy.toml"
    bad.write_text(platform.settings.policy_file.read_text().replace("[decay]", "[decay]\nsurprise = 1"))
    reason = "Object contains unknown field `surprise` - at `$.decay`; correct the file"
    says = f"the policy file {bad} cannot be used: {reason}"
    told = Platform(platform.settings.model_copy(update={"policy_file": bad}), platform.database)
    with mock.patch.dict("os.environ", {"STREAMFLOW_POLICY_FILE": str(bad)}):
        assert failed(dagster, MAY, *relations()) == {"performance_report": says, "churn_model": says}
        for sensor in SENSORS:
            if sensor is automation.landed_months:  # which needs no policy to ask for the report that is missing
                assert ticked(told, dagster, sensor).asset_selection == [AssetKey("performance_report")]
                continue
            with pytest.raises(TickFailed) as refused:
                ticked(told, dagster, sensor)
            assert str(refused.value) == says
    assert failed(dagster, MAY, "performance_report") == {}
    assert all(isinstance(ticked(platform, dagster, sensor), SkipReason | RunRequest) for sensor in SENSORS)


def test_a_retraining_that_dies_says_so_and_is_recorded_with_what_it_died_of(platform, dagster):
    land(platform, JUNE)
    assert failed(dagster, JUNE, *(name for name in relations() if name not in TRAINED)) == {}
    with mock.patch("streamflow.pipeline.train", side_effect=MemoryError("no room")):
        said = failed(dagster, JUNE, *TRAINED, cause="decay:2024-06:version 1")
    assert said == {
        "churn_model": "unforeseen MemoryError: no room; see the traceback below, then run: streamflow run 2024-06"
    }
    with platform.database.connect() as connection:
        rows = connection.execute("SELECT cause, attempts, failure FROM streamflow.retrainings").fetchall()
    assert rows == [("decay:2024-06:version 1", 1, "MemoryError: no room")]


def test_a_retraining_that_dies_half_way_is_taken_up_where_it_stopped(platform, dagster):
    with mock.patch("streamflow.registry.Registry.register", side_effect=RuntimeError("cut off")):
        said = failed(dagster, JUNE, *TRAINED, cause="slide:2024-06:version 1")
    assert said == {
        "registered_model_version": (
            "unforeseen RuntimeError: cut off; see the traceback below, then run: streamflow run 2024-06"
        )
    }
    asked = ticked(platform, dagster, automation.landed_months)
    assert asked.asset_selection == [AssetKey("registered_model_version")]
    versions = len(platform.ledger.versions())
    assert failed(dagster, JUNE, "registered_model_version") == {}
    newest = platform.ledger.versions()[-1]
    assert (newest.version, newest.lineage["cause"]) == (versions + 1, "slide:2024-06:version 1")


@pytest.fixture
def scorer_in_mlflow(platform):
    """The file of January's scorer where MLflow keeps it, which is put back."""
    run_id = platform.ledger.version(1).run_id
    (file,) = platform.settings.home.glob(f"mlflow/**/{run_id}/**/scorer.bin")
    kept = file.read_bytes()
    yield file
    file.write_bytes(kept)


def test_the_scorer_of_the_reference_being_gone_is_said_and_changes_no_report(platform, dagster, scorer_in_mlflow):
    run_id, before = platform.ledger.version(1).run_id, recorded(platform)
    scorer_in_mlflow.unlink()
    says = f"MLflow has no scorer of run {run_id} any more; restore mlflow/ from a backup"
    assert {name: failed(dagster, MAY, name)[name] for name in WATCHED} == dict.fromkeys(WATCHED, says)
    assert recorded(platform) == before


def test_the_scorer_of_the_reference_being_altered_is_said_and_changes_no_report(platform, dagster, scorer_in_mlflow):
    run_id, before = platform.ledger.version(1).run_id, recorded(platform)
    scorer_in_mlflow.write_bytes(b"altered")
    for name in WATCHED:
        said = failed(dagster, MAY, name)[name]
        assert said.startswith(f"MLflow's scorer of run {run_id} has SHA-256 ")
        assert said.endswith("; restore it from a backup of mlflow/, and find out who changed it")
    assert recorded(platform) == before


def recorded(platform):
    """May's scores and reports."""
    reports = [
        {month: one.digest for month, one in monitoring.reports(platform.database, kind).items()}
        for kind in (monitoring.DRIFT_REPORT, monitoring.PERFORMANCE_REPORT)
    ]
    return scores.load(platform.database, MAY).write.digest, *reports


def test_the_reference_version_deleted_in_mlflow_is_compared_with_all_the_same(platform, dagster):
    """Its run has the scorer, and the ledger its digest; last of all, because the version does not come back."""
    entries = len(platform.ledger.entries())
    with platform.registry._reachable() as client:
        client.transition_model_version_stage("streamflow_churn", "1", "Archived")
        client.delete_model_version("streamflow_churn", "1")
    before = recorded(platform)
    assert failed(dagster, MAY, *WATCHED) == {}
    assert recorded(platform) == before
    told = ticked(platform, dagster, automation.registry_stages).skip_message
    assert told.startswith("flag version 1: deleted in MLflow while in Production; the service goes on")
    assert platform.ledger.production() == 1
    assert len(platform.ledger.entries()) == entries + 1
