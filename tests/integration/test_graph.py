"""Months through the asset graph as Dagster runs and records them: metadata, checks, a bad month beside good ones."""

import shutil
import socket
import subprocess
from datetime import UTC, datetime
from unittest import mock
from uuid import uuid4

import psutil
import psycopg
import pytest
from dagster import AssetCheckKey, AssetKey, DagsterEventType, DagsterRun, DagsterRunStatus
from dagster._core.definitions.data_version import CachingStaleStatusResolver
from dagster._core.loader import LoadingContextForTest

from streamflow import loop, pipeline, scores, stack
from streamflow.landing import LandingZone
from streamflow.months import Month
from streamflow.pipeline import Platform
from streamflow.settings import Settings
from streamflow.simulate import simulate
from streamflow.status import month_statuses, needs_labels, relations
from streamflow_dagster import runner
from streamflow_dagster.definitions import build_definitions

JANUARY, FEBRUARY, MARCH = Month.parse_range("2024-01..2024-03")
NOW = datetime(2024, 4, 1, tzinfo=UTC)
USERS = 500
VICTIM = "usage_agg_30d"


@pytest.fixture(scope="module")
def platform(tmp_path_factory, database, quick_training_file):
    home = tmp_path_factory.mktemp("graph")
    simulate(home / "data", [JANUARY, FEBRUARY, MARCH], users=USERS)
    settings = Settings(
        home=home,
        database_url=database.url,
        owner_database_url=database.owner_url,
        training_file=quick_training_file,
    )
    with mock.patch.dict("os.environ", stack.environment(settings, database)):
        platform = Platform(settings, database)
        pipeline.prepare(Platform(settings, database))
        yield platform


@pytest.fixture(scope="module")
def dagster(platform):
    with runner.instance() as opened:
        yield opened


def land(platform, month, *, labelled=True):
    folder = platform.settings.home / "data" / str(month)
    if not labelled:
        without = platform.settings.home / "unlabelled" / str(month)
        shutil.copytree(folder, without)
        (without / "labels.csv").unlink()
        folder = without
    return LandingZone(platform.settings.home).land(folder, month, NOW)


def run(platform, dagster, month, training=None):
    """The month as `streamflow run MONTH` runs it: how its main run ended, and the assets that were told of."""
    told = []
    runs = [
        runner.run_assets(dagster, month, step.assets, training=training, progress=told.append)
        for step in loop.whole_months(platform, [month])
    ]
    return runs[0], told


@pytest.fixture(scope="module")
def february(platform, dagster):
    """The second month first, materialized whole."""
    land(platform, FEBRUARY)
    return run(platform, dagster, FEBRUARY)


def metadata(dagster, asset, month):
    record = dagster.get_latest_materialization_event(AssetKey(asset))
    found = [
        entry.asset_materialization
        for entry in dagster.all_logs(record.run_id, of_type=DagsterEventType.ASSET_MATERIALIZATION)
        if entry.asset_materialization.asset_key == AssetKey(asset)
        and entry.asset_materialization.partition == str(month)
    ]
    return {name: value.value for name, value in found[-1].metadata.items()}


def check_states(dagster, asset, check):
    """Outcome by month, the newest last."""
    records = dagster.event_log_storage.get_asset_check_execution_history(
        AssetCheckKey(AssetKey(asset), check), limit=50
    )
    return {record.partition: record.status.value for record in reversed(records)}


def test_a_month_goes_through_the_whole_graph_and_every_asset_is_told(february):
    done, told = february
    assert done.failures == {}
    assert set(told) == set(relations())
    assert told.index("users") < told.index("usage_agg_30d_snapshots") < told.index("usage_agg_30d_fv")


def test_the_first_month_is_scored_by_the_model_that_it_gave_rise_to(platform, february):
    """Scored in vain before its model, reported on after it."""
    _, told = february
    trained, reported = told.index("registered_model_version"), told.index("drift_report")
    assert told.index("churn_scores") < trained < reported
    assert told.count("churn_scores") == 2
    assert told.count("performance_report") == 1
    assert scores.load(platform.database, FEBRUARY).version == 1


def test_metadata_says_rows_digest_revision_duration_and_links(platform, dagster, february):
    table = metadata(dagster, "users", FEBRUARY)
    landed = platform.landing.manifest(FEBRUARY).current["users"]
    assert table["dagster/row_count"] == USERS
    assert table["revision"] == 1
    assert table["digest"] == landed.sha256
    assert table["duration (s)"] >= 0
    assert table["file"].endswith(landed.sha256)
    snapshot = metadata(dagster, "usage_agg_30d_snapshots", FEBRUARY)
    assert snapshot["customers without features"] == 0
    assert set(snapshot["made from"]) == {"users", "usage_agg_30d"}
    model = metadata(dagster, "churn_model", FEBRUARY)
    assert model["ROC curve"].startswith("![ROC curve](data:image/png;base64,iVBOR")
    assert "/runs/" in model["MLflow run"]
    assert model["Reliability"].startswith("![Reliability](data:image/png;base64,iVBOR")
    assert model["model card"] == f"{model['MLflow run']}/artifacts/model_card.html"
    assert "| auc | 0." in model["metrics"]
    assert f"**{model['estimator']}** | {model['feature service']} |" in model["candidates"]
    assert "2024-02 is learned from alone" in model["window"]
    version = metadata(dagster, "registered_model_version", FEBRUARY)
    assert version["version"] == 1
    assert version["promoted"] is True
    assert "| no_decision_flips | passed |" in version["gates"]
    assert version["model card"].endswith("/artifacts/model_card.html")


def test_checks_stand_under_their_month(dagster, february):
    assert check_states(dagster, "users", "row_count_equals_source")["2024-02"] == "SUCCEEDED"
    assert check_states(dagster, "churn_model", "compiled_scorer_agrees")["2024-02"] == "SUCCEEDED"
    leaks = "no_single_feature_separates_the_classes"
    assert check_states(dagster, "training_dataset", leaks)["2024-02"] == "SUCCEEDED"


@pytest.fixture(scope="module")
def bad_january(platform, dagster, database, february):
    """January's usage loses a customer on its way into the warehouse; February's and March's don't."""
    land(platform, JANUARY)
    land(platform, MARCH, labelled=False)
    lost = platform.landing.read(JANUARY, VICTIM)["user_id"][0].as_py()
    with psycopg.connect(database.owner_url) as connection:
        connection.execute(
            f"""
            CREATE FUNCTION streamflow.lose_one() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                RETURN NULL;
            END $$;
            CREATE TRIGGER lose_one BEFORE INSERT ON streamflow.{VICTIM}
            FOR EACH ROW WHEN (NEW.month = '{JANUARY}' AND NEW.user_id = '{lost}')
            EXECUTE FUNCTION streamflow.lose_one();
            """
        )
    outcomes = run(platform, dagster, JANUARY), run(platform, dagster, MARCH)
    with psycopg.connect(database.owner_url) as connection:
        connection.execute("DROP FUNCTION streamflow.lose_one() CASCADE")
    return outcomes


def test_a_failed_check_stops_its_own_downstream_and_says_which(bad_january):
    (done, told), _ = bad_january
    assert list(done.failures) == [VICTIM]
    assert done.failures[VICTIM] == (
        f"row_count_equals_source failed (rows: {USERS - 1}, source rows: {USERS}), so nothing is made of it; land "
        "corrected files if they are wrong, then run: streamflow run 2024-01"
    )
    stopped = {"usage_agg_30d_snapshots", "usage_agg_30d_fv", "training_dataset", "churn_model"}
    assert stopped.isdisjoint(told)
    assert {"users", "payments_agg_90d_snapshots", "payments_agg_90d_fv"} <= set(told)


def test_a_bad_month_does_not_stop_another_and_shows_under_its_own(dagster, bad_january):
    _, (march, _) = bad_january
    assert march.failures == {}
    assert check_states(dagster, VICTIM, "row_count_equals_source") == {
        "2024-01": "FAILED",
        "2024-02": "SUCCEEDED",
        "2024-03": "SUCCEEDED",
    }


def test_a_month_without_labels_has_its_features_online_and_trains_nothing(platform, bad_january):
    _, (march, told) = bad_january
    assert set(told) == {name for name in relations() if not needs_labels(name)}
    states = {one.month: one.state for one in month_statuses(platform)}
    assert states["2024-03"] == "unlabelled"
    assert states["2024-02"] == "complete"
    assert march.succeeded


def test_the_mended_month_and_late_labels_complete_everything(platform, dagster, bad_january):
    folder = platform.settings.home / "data" / str(MARCH)
    only_labels = platform.settings.home / "late"
    only_labels.mkdir()
    shutil.copy(folder / "labels.csv", only_labels)
    assert list(LandingZone(platform.settings.home).land(only_labels, MARCH, NOW).changed) == ["labels"]
    for month in (JANUARY, MARCH):
        done, _ = run(platform, dagster, month)
        assert done.failures == {}
    assert {one.month: one.state for one in month_statuses(platform)} == {
        "2024-01": "complete",
        "2024-02": "stale",
        "2024-03": "complete",
    }
    assert [version.as_of.month for version in platform.ledger.versions()] == [2, 1, 3]
    assert platform.ledger.production() == 1


def stale_causes(dagster, asset, month):
    """Of which month of which asset Dagster says that it has changed since."""
    graph = build_definitions().resolve_asset_graph()
    resolver = CachingStaleStatusResolver(dagster, graph, LoadingContextForTest(dagster))
    causes = resolver.get_stale_causes(AssetKey(asset), str(month))
    return {(one.dependency.asset_key.to_user_string(), one.dependency.partition_key) for one in causes}


def test_an_earlier_month_that_arrives_later_makes_a_model_stale_until_it_is_considered(platform, dagster):
    assert stale_causes(dagster, "churn_model", FEBRUARY) == {("training_dataset", "2024-01")}
    assert stale_causes(dagster, "churn_model", JANUARY) == set()
    assert stale_causes(dagster, "churn_model", MARCH) == set()
    assert [one.stale for one in month_statuses(platform)] == [(), ("churn_model", "registered_model_version"), ()]
    assert "| 2024-01 2024-02 2024-03 |" in metadata(dagster, "churn_model", MARCH)["window"]

    done, _ = run(platform, dagster, FEBRUARY)
    assert done.failures == {}
    assert stale_causes(dagster, "churn_model", FEBRUARY) == set()
    assert {one.state for one in month_statuses(platform)} == {"complete"}
    told = metadata(dagster, "churn_model", FEBRUARY)
    assert "| 2024-01 2024-02 |" in told["window"]
    assert set(told["made from"]) == {"training_dataset", "training_dataset 2024-01"}


def test_a_person_can_train_an_estimator_by_name_from_the_launchpad(platform, dagster, february):
    choice = {"estimator": "random_forest_baseline", "service": "churn_v1"}
    done, _ = run(platform, dagster, FEBRUARY, choice)
    assert done.failures == {}
    newest = platform.ledger.versions()[-1]
    assert (newest.lineage["estimator"], newest.service) == ("random_forest_baseline", "churn_v1")
    assert (newest.lineage["estimator_by_name"], newest.threshold) == ("random_forest_baseline", 0.5)


def test_an_unknown_estimator_fails_with_what_there_is(platform, dagster, february):
    done, _ = run(platform, dagster, FEBRUARY, {"estimator": "oracle"})
    assert "there is no estimator 'oracle'; training.toml has logistic_regression" in done.failures["churn_model"]


# --- killed runs ------------------------------------------------------------------------------------------------------


def test_a_run_whose_process_was_killed_is_ended_and_gives_its_slot_back(dagster, february):
    here, this = socket.gethostname(), psutil.Process()
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        born = psutil.Process(sleeper.pid).create_time()
        sleeper.kill()
    alive = f"{here} {this.pid} {this.create_time():.0f}"
    assert dagster.get_run_by_id(february[0].run_id).tags[runner.PROCESS_TAG] == alive
    names = {
        "killed": f"{here} {sleeper.pid} {born:.0f}",
        "other number since": f"{here} {this.pid} {this.create_time() - 120:.0f}",
        "alive": alive,
        "elsewhere": f"another-host {sleeper.pid} {born:.0f}",
        "of the UI": None,
    }
    runs = {}
    for name, process in names.items():
        tags = {} if process is None else {runner.PROCESS_TAG: process}
        runs[name] = DagsterRun("whole_month", str(uuid4()), status=DagsterRunStatus.STARTED, tags=tags)
        dagster.add_run(runs[name])
    slots = dagster.event_log_storage
    assert slots.claim_concurrency_slot("training", runs["killed"].run_id, "churn_model").is_claimed
    assert not slots.claim_concurrency_slot("training", runs["alive"].run_id, "churn_model").is_claimed

    assert set(runner.end_dead_runs(dagster)) == {runs["killed"].run_id, runs["other number since"].run_id}

    status = {name: dagster.get_run_by_id(one.run_id).status.value for name, one in runs.items()}
    assert status == {
        "killed": "FAILURE",
        "other number since": "FAILURE",
        "alive": "STARTED",
        "elsewhere": "STARTED",
        "of the UI": "STARTED",
    }
    assert slots.claim_concurrency_slot("training", runs["alive"].run_id, "churn_model").is_claimed
    slots.free_concurrency_slots_for_run(runs["alive"].run_id)
    assert runner.end_dead_runs(dagster) == []
