"""Scores and reports of odd months, over a real database, feature store and registry: each ends in a clear state."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pytest

from streamflow import loop, monitoring, pipeline, scores
from streamflow.contract import CONTRACT, USER_ID
from streamflow.database import Database
from streamflow.errors import ConfigurationError, StreamFlowError, TrainingRefused, UnknownMonth, UnknownVersion
from streamflow.landing import LandingRefused
from streamflow.months import Month
from streamflow.pipeline import Platform
from streamflow.settings import Settings
from streamflow.simulate import Scenario, simulate
from streamflow.warehouse import month_write

JANUARY, FEBRUARY, MARCH, APRIL, MAY, JUNE = Month.parse_range("2024-01..2024-06")
NOW = datetime(2024, 7, 3, tzinfo=UTC)
USERS = 1000
USAGE = ("watch_hours_30d", "avg_session_mins_7d", "unique_devices_30d", "skips_7d", "rebuffer_events_7d")


@dataclass(frozen=True)
class World:
    platform: Platform
    months: Path

    def edit(self, month: Month, table: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
        """Change a month's file before it lands."""
        file = self.months / str(month) / f"{table}.csv"
        rows = pd.read_csv(file, dtype=str, keep_default_na=False)
        change(rows).to_csv(file, index=False)

    def bring_in(self, month: Month) -> None:
        """Land a month and make its data layers, and its dataset if it has labels."""
        self.platform.landing.land(self.months / str(month), month, NOW)
        landed = self.platform.landing.manifest(month).tables
        for table in CONTRACT.tables:
            if table.name in landed:
                pipeline.load_table(self.platform, table, month, NOW)
        for snapshot in CONTRACT.snapshots:
            pipeline.build_snapshot(self.platform, snapshot, month, NOW)
        if "labels" in landed:
            pipeline.assemble_dataset(self.platform, month, NOW)


@pytest.fixture(scope="module")
def world(
    new_database: Callable[[], Database], tmp_path_factory: pytest.TempPathFactory, quick_training_file: Path
) -> World:
    """A world in which nothing changes, with January's model in Production."""
    folder = tmp_path_factory.mktemp("months")
    months = list(JANUARY.until(JUNE))
    simulate(folder, months, users=USERS, scenario=Scenario(season=0.0))
    settings = Settings(home=tmp_path_factory.mktemp("home"), actor="tester", training_file=quick_training_file)
    platform = Platform(settings, new_database())
    pipeline.prepare(platform)
    made = World(platform, folder)
    made.bring_in(JANUARY)
    assert monitoring.score_month(platform, JANUARY, NOW) is None
    with pytest.raises(UnknownMonth, match="churn_scores holds nothing for 2024-01"):
        monitoring.report_drift(platform, JANUARY, NOW)
    for view in CONTRACT.views:
        pipeline.publish_view(platform, view, JANUARY, NOW)
    pipeline.train(platform, JANUARY, NOW, estimator="logistic_regression", service="churn_v1")
    assert pipeline.register(platform, JANUARY, NOW).decision.promote
    monitoring.score_month(platform, JANUARY, NOW)
    return made


def score_of(platform: Platform, month: Month) -> pd.DataFrame:
    return scores.load(platform.database, month).frame


def test_every_customer_is_scored_to_the_last_bit_as_the_version_scores_its_dataset(world: World) -> None:
    from streamflow import procedure

    platform = world.platform
    version = platform.ledger.version(1)
    data = pipeline.training_dataset(platform, version.dataset_digest)
    expected = procedure.score(pipeline.scorer_of(platform, version), data.frame)
    frame = score_of(platform, JANUARY)
    assert frame[USER_ID].tolist() == data.frame[USER_ID].tolist()
    assert frame["probability"].tolist() == expected.tolist()
    assert frame["decision"].tolist() == (expected >= version.threshold).tolist()


def test_the_month_that_was_learned_from_does_not_drift_and_is_judged_on_held_out_customers(world: World) -> None:
    drift = monitoring.report_drift(world.platform, JANUARY, NOW)
    assert drift.content.reference_month == "2024-01"
    assert drift.content.report.significant == ()
    assert {one.psi for one in drift.content.report.features} == {0.0}
    assert "<html" in drift.page.read_text()[:500].lower()
    report = monitoring.report_performance(world.platform, JANUARY, NOW).report
    assert (report.everyone, report.drop, report.decayed) == (None, None, False)
    promised = world.platform.ledger.version(1).evidence.metrics["auc"]
    assert report.held_out.metrics["auc"].value == pytest.approx(promised.value, abs=1e-12)


def test_a_month_that_does_not_drift_is_no_news_for_the_decision_to_train_again(world: World) -> None:
    monitoring.report_drift(world.platform, JANUARY, NOW)
    decision = loop.decision(world.platform, JANUARY)
    assert (decision.retrain, decision.alarms) == (False, ())
    assert decision.reason == "nothing calls for another model than version 1"


def test_a_report_that_says_the_same_is_kept_once(world: World) -> None:
    first = monitoring.report_drift(world.platform, JANUARY, NOW).write
    again = monitoring.report_drift(world.platform, JANUARY, NOW).write
    assert first.digest == again.digest
    with world.platform.database.connect() as connection:
        query = "SELECT count(*) FROM streamflow.reports WHERE kind = 'drift_report' AND month = '2024-01'"
        assert connection.execute(query).fetchone() == (1,)


def test_a_report_of_another_version_of_this_program_is_named_and_made_anew(world: World) -> None:
    platform = world.platform
    monitoring.report_performance(platform, JANUARY, NOW)
    with platform.database.connect() as connection:
        connection.execute(
            "INSERT INTO streamflow.reports (kind, month, model_version, digest, content, made_at) "
            "VALUES ('performance_report', '2024-01', 1, 'old', '{}', '2024-07-01')"
        )
    with pytest.raises(ConfigurationError, match=r"of 2024-01 was made by another version .*streamflow run 2024-01$"):
        monitoring.performance_history(platform.database)
    monitoring.report_performance(platform, JANUARY, NOW)
    assert [one.month for one in monitoring.performance_history(platform.database)] == ["2024-01"]


def test_a_month_with_a_tenth_of_the_customers_does_not_alarm(world: World) -> None:
    kept = set(pd.read_csv(world.months / str(FEBRUARY) / "users.csv")[USER_ID][: USERS // 10])
    for table in CONTRACT.tables:
        world.edit(FEBRUARY, table.name, lambda rows: rows[rows[USER_ID].isin(kept)])
    world.bring_in(FEBRUARY)
    scoring = monitoring.score_month(world.platform, FEBRUARY, NOW)
    assert scoring is not None
    assert scoring.write.rows == USERS // 10
    report = monitoring.report_drift(world.platform, FEBRUARY, NOW).content.report
    assert (report.current_users, report.significant) == (USERS // 10, ())
    performance = monitoring.report_performance(world.platform, FEBRUARY, NOW).report
    assert not performance.decayed


def test_a_drift_report_names_what_the_month_that_it_is_held_against_held(world: World) -> None:
    written = monitoring.report_drift(world.platform, FEBRUARY, NOW).write
    with world.platform.database.connect() as connection:
        january = {
            table.snapshot: month_write(connection, str(table.snapshot), JANUARY) for table in CONTRACT.snapshots
        }
    own = {"churn_scores", *january}
    assert set(written.sources) == own | {f"{snapshot} 2024-01" for snapshot in january}
    assert all(written.sources[f"{name} 2024-01"] == write.as_source for name, write in january.items())
    assert set(monitoring.report_drift(world.platform, JANUARY, NOW).write.sources) == own


def test_a_feature_that_turned_constant_is_found(world: World) -> None:
    world.edit(MARCH, "usage_agg_30d", lambda rows: rows.assign(watch_hours_30d="12.5"))
    world.bring_in(MARCH)
    monitoring.score_month(world.platform, MARCH, NOW)
    report = monitoring.report_drift(world.platform, MARCH, NOW).content.report
    assert report.drifted("large") == ("watch_hours_30d",)
    assert len(score_of(world.platform, MARCH)) == USERS


def test_features_that_are_missing_leave_customers_unscored_and_are_found(world: World) -> None:
    """Of nine in ten customers there is no usage, and nobody takes another value for theirs."""
    world.edit(APRIL, "usage_agg_30d", lambda rows: rows[: USERS // 10])
    world.bring_in(APRIL)
    scoring = monitoring.score_month(world.platform, APRIL, NOW)
    assert scoring is not None
    written = scoring.write
    assert (written.rows, written.facts["unscored"]["customers"]) == (USERS // 10, USERS - USERS // 10)
    assert len(written.facts["unscored"]["such_as"]) == 10
    report = monitoring.report_drift(world.platform, APRIL, NOW).content.report
    usage = [one for one in report.features if one.name in USAGE]
    assert {one.current_missing for one in usage} == {0.9}
    assert {one.about for one in usage} == {"missing"}
    assert set(report.drifted("large")) == {one.name for one in usage}


def test_labels_of_customers_that_do_not_exist_are_refused_when_they_land(world: World) -> None:
    world.edit(MAY, "labels", lambda rows: pd.concat([rows, rows[:1].assign(user_id="0000-NOONE")]))
    with pytest.raises(LandingRefused, match="0000-NOONE"):
        world.bring_in(MAY)
    assert MAY not in world.platform.landing.months()


def test_a_month_without_labels_is_scored_and_cannot_be_judged(world: World) -> None:
    (world.months / str(JUNE) / "labels.csv").unlink()
    world.bring_in(JUNE)
    scoring = monitoring.score_month(world.platform, JUNE, NOW)
    assert scoring is not None
    assert scoring.write.facts["version"] == 1
    monitoring.report_drift(world.platform, JUNE, NOW)
    with pytest.raises(UnknownMonth, match="training_dataset holds nothing for 2024-06"):
        monitoring.report_performance(world.platform, JUNE, NOW)


def test_a_person_can_have_a_month_scored_by_another_version(world: World) -> None:
    with pytest.raises(UnknownVersion):
        monitoring.score_month(world.platform, MARCH, NOW, version=9)
    assert scores.load(world.platform.database, MARCH).version == 1


def test_what_was_learned_from_being_gone_is_said_and_changes_nothing(world: World) -> None:
    version = world.platform.ledger.version(1)
    dataset = world.platform.datasets / f"{version.dataset_digest}.parquet"
    before = monitoring.reports(world.platform.database, monitoring.PERFORMANCE_REPORT)
    held = dataset.read_bytes()
    dataset.unlink()
    try:
        with pytest.raises(TrainingRefused, match="materialize training_dataset again"):
            monitoring.report_performance(world.platform, MARCH, NOW)
    finally:
        dataset.write_bytes(held)
    with world.platform.database.connect() as connection:
        connection.execute("DELETE FROM streamflow.users_snapshots WHERE as_of = %s", (JANUARY.as_of,))
        connection.execute("DELETE FROM streamflow.subscriptions_profile_snapshots WHERE as_of = %s", (JANUARY.as_of,))
    with pytest.raises(StreamFlowError, match="holds nothing for 2024-01; land the month and materialize"):
        monitoring.report_drift(world.platform, MARCH, NOW)
    assert monitoring.reports(world.platform.database, monitoring.PERFORMANCE_REPORT) == before
    assert world.platform.ledger.production() == 1
