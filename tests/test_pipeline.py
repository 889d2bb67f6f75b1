import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from sklearn.metrics import roc_auc_score

from streamflow import features, pipeline, procedure, training
from streamflow.contract import CONTRACT, USER_ID
from streamflow.database import Database
from streamflow.dataset import load
from streamflow.errors import ArtifactRefused, RegistryUnavailable, TrainingRefused, UnknownMonth, UnknownVersion
from streamflow.landing import ArchiveUnusable
from streamflow.months import Month
from streamflow.pipeline import Platform
from streamflow.registry import MODEL as MODEL_NAME
from streamflow.registry import PRODUCTION, SCORER_PATH, STAGING
from streamflow.scoring import Scorer, sha256
from streamflow.settings import Settings
from streamflow.simulate import simulate
from streamflow.status import WATCHED, month_statuses, relations
from streamflow.tracing import as_tree, require_whole, trace_version
from streamflow.warehouse import MonthWrite, landing_findings, month_writes, record, snapshot_findings

JANUARY, FEBRUARY, MARCH, APRIL = Month(2024, 1).until(Month(2024, 4))
NOW = datetime(2024, 5, 3, 4, 5, tzinfo=UTC)
USERS = 600
TRAINED = (pipeline.TRAINING_DATASET, pipeline.CHURN_MODEL, pipeline.REGISTERED_VERSION)


@dataclass(frozen=True)
class World:
    """A platform and the simulated months that land in it."""

    platform: Platform
    months: Path

    def land(self, month: Month) -> None:
        self.platform.landing.land(self.months / str(month), month, NOW)

    def data_layers(self, month: Month) -> None:
        landed = self.platform.landing.manifest(month).tables
        for table in CONTRACT.tables:
            if table.name in landed:
                pipeline.load_table(self.platform, table, month, NOW)
                assert all(finding.passed for finding in landing_findings(self.platform.database, table, month))
        for table in CONTRACT.snapshots:
            pipeline.build_snapshot(self.platform, table, month, NOW)
            assert all(finding.passed for finding in snapshot_findings(self.platform.database, table, month))
        for view in CONTRACT.views:
            pipeline.publish_view(self.platform, view, month, NOW)

    def whole_month(self, month: Month) -> pipeline.Registered:
        self.land(month)
        self.data_layers(month)
        pipeline.assemble_dataset(self.platform, month, NOW)
        pipeline.train(self.platform, month, NOW)
        return pipeline.register(self.platform, month, NOW)

    def written(self, month: Month) -> dict[str, MonthWrite]:
        return {one.relation: one for one in month_writes(self.platform.database) if one.month == month}

    def digests(self, month: Month, but: Iterable[str] = ()) -> dict[str, str]:
        return {name: one.digest for name, one in self.written(month).items() if name not in but}

    def online(self) -> dict[str, str]:
        return {view.name: features.online_digest(self.platform.database, view) for view in CONTRACT.views}


@pytest.fixture(scope="module")
def months(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """January to April; March has no labels, in April the usage of one customer is missing."""
    folder = tmp_path_factory.mktemp("months")
    simulate(folder, [JANUARY, FEBRUARY, MARCH, APRIL], users=USERS)
    (folder / str(MARCH) / "labels.csv").unlink()
    usage = folder / str(APRIL) / "usage_agg_30d.csv"
    header, _, *rest = usage.read_text().splitlines(keepends=True)
    usage.write_text("".join([header, *rest]))
    return folder


@pytest.fixture(scope="module")
def new_world(
    new_database: Callable[[], Database], tmp_path_factory: pytest.TempPathFactory, quick_training_file: Path
) -> Callable[[Path], World]:
    def make(months: Path) -> World:
        settings = Settings(home=tmp_path_factory.mktemp("home"), actor="tester", training_file=quick_training_file)
        platform = Platform(settings, new_database())
        pipeline.prepare(platform)
        return World(platform, months)

    return make


@pytest.fixture(scope="module")
def world(new_world: Callable[[Path], World], months: Path) -> World:
    """January, then February, through the whole graph."""
    made = new_world(months)
    made.whole_month(JANUARY)
    made.whole_month(FEBRUARY)
    return made


def csv(world: World, month: Month, table: str) -> pd.DataFrame:
    return (
        pd.read_csv(world.months / str(month) / f"{table}.csv", float_precision="round_trip")
        .set_index(USER_ID)
        .sort_index()
    )


def rows(world: World, query: str, *given: object) -> list[tuple[object, ...]]:
    with world.platform.database.connect() as connection:
        return connection.execute(query, given).fetchall()


# --- from files to a version --------------------------------------------------------------------------------------


def test_prepare_is_repeatable(world: World) -> None:
    assert pipeline.prepare(world.platform) == []


def test_every_relation_holds_the_month(world: World) -> None:
    written = world.written(JANUARY)

    assert set(written) == set(relations()) - set(WATCHED)
    assert {one.rows for one in written.values()} == {USERS}
    assert {one.revision for one in written.values()} == {1}
    assert {one.written_at for one in written.values()} == {NOW}
    graph = relations()
    for name, one in written.items():
        assert one.sources == {source: written[source].as_source for source in graph[name]}


def test_tables_hold_the_landed_values(world: World) -> None:
    manifest = world.platform.landing.manifest(JANUARY)
    for name, revision in manifest.current.items():
        assert world.written(JANUARY)[name].digest == revision.sha256

    wanted = csv(world, JANUARY, "usage_agg_30d")["watch_hours_30d"]
    query = "SELECT user_id, watch_hours_30d FROM streamflow.usage_agg_30d WHERE month = '2024-01' ORDER BY 1"
    assert rows(world, query) == list(wanted.items())


def test_an_empty_flag_is_false_in_table_and_snapshot(world: World) -> None:
    given = csv(world, JANUARY, "subscriptions")["plan_stream_tv"]
    assert given.isna().any()
    for relation, period in (
        ("subscriptions", "month = '2024-01'"),
        ("subscriptions_profile_snapshots", "as_of = '2024-01-31'"),
    ):
        query = f"SELECT count(*) FILTER (WHERE plan_stream_tv), count(plan_stream_tv) FROM streamflow.{relation}"
        assert rows(world, f"{query} WHERE {period}") == [(int((given == True).sum()), USERS)]  # noqa: E712


def test_the_online_store_has_the_newest_month_of_each_customer(world: World) -> None:
    january, february = (csv(world, month, "payments_agg_90d") for month in (JANUARY, FEBRUARY))
    newest = {**january["failed_payments_90d"], **february["failed_payments_90d"]}
    stored = rows(world, "SELECT user_id, failed_payments_90d, event_timestamp FROM online.payments_agg_90d_fv")

    assert len(stored) == len(newest) > USERS
    for user_id, payments, event_time in stored:
        assert payments == newest[user_id]
        assert event_time == (FEBRUARY if user_id in february.index else JANUARY).event_time


def test_the_dataset_joins_features_and_labels_of_the_month(world: World) -> None:
    written = world.written(JANUARY)
    dataset = load(world.platform.datasets / f"{written['training_dataset'].digest}.parquet")

    frame = dataset.frame.set_index(USER_ID)
    assert frame.index.tolist() == csv(world, JANUARY, "users").index.tolist()
    for table, column in (
        ("subscriptions", "monthly_fee"),
        ("usage_agg_30d", "skips_7d"),
        ("support_agg_90d", "ticket_avg_resolution_hrs_90d"),
        ("labels", "churn_label"),
    ):
        assert frame[column].tolist() == csv(world, JANUARY, table)[column].tolist(), column

    facts = written["training_dataset"].facts
    assert (facts["dropped"], facts["possible_leaks"]) == (0, {})
    assert facts["churn_rate"] == pytest.approx(frame["churn_label"].mean())
    assert facts["files"] == {name: written[name].as_source for name in (table.name for table in CONTRACT.tables)}


def test_the_model_is_traced_to_the_bytes_it_came_from(world: World) -> None:
    written = world.written(JANUARY)
    model = written["churn_model"]
    lineage = model.facts["lineage"]

    assert lineage["month"] == "2024-01"
    assert lineage["dataset"] == {"digest": written["training_dataset"].digest, "rows": USERS}
    assert lineage["sources"] == written["training_dataset"].sources
    for name, source in lineage["files"].items():
        assert source["digest"] == world.platform.landing.manifest(JANUARY).current[name].sha256
    assert lineage["code_version"] == pipeline.code_version()
    assert lineage["libraries"] == pipeline.libraries()


def test_the_run_carries_metrics_scorer_and_evidence(world: World, tmp_path: Path) -> None:
    import mlflow

    registry = world.platform.registry
    facts = world.written(JANUARY)["churn_model"].facts
    client = mlflow.MlflowClient(registry.uri, registry.uri)
    run = client.get_run(facts["run_id"])

    lineage = facts["lineage"]
    assert run.data.params["estimator"] == lineage["estimator"]
    assert run.data.params["as_of"] == "2024-01-31"
    assert run.data.params["window"] == "2024-01"
    assert run.data.params["config_digest"] == world.platform.training_config.digest
    auc = facts["evidence"]["metrics"]["auc"]
    assert run.data.metrics["auc"] == auc["value"] > 0.6
    assert (run.data.metrics["auc_low"], run.data.metrics["auc_high"]) == (auc["low"], auc["high"])
    assert run.data.metrics["training_rows"] + run.data.metrics["validation_rows"] == USERS
    assert run.data.metrics["seconds_fit"] > 0
    assert run.data.tags["launched_by"] == "tester"
    assert run.data.tags["dataset_digest"] == world.written(JANUARY)["training_dataset"].digest
    folder = Path(client.download_artifacts(run.info.run_id, "", str(tmp_path)))
    assert {path.name for path in folder.iterdir()} >= {
        *("roc.png", "precision_recall.png", "reliability.png", "confusion_matrix.png", "lift.png", "scores.png"),
        *("segments.png", "value.png", "importances.png", "importances.csv", "candidates.csv", "model_card.html"),
        *("predictions_sample.csv", "feature_schema.json", "lineage.json", "evidence.json", "training_config.json"),
    }
    assert sha256(registry.scorer(run.info.run_id)) == facts["artifact_sha256"]
    candidates = pd.read_csv(folder / "candidates.csv")
    config = world.platform.training_config
    assert candidates[["estimator", "service"]].values.tolist() == [
        [estimator, service] for estimator in config.candidates for service in ("churn_v1", "churn_v2")
    ]
    (chosen,) = candidates[candidates["chosen"]].to_dict("records")
    assert (chosen["estimator"], chosen["service"]) == (lineage["estimator"], lineage["service"])


def test_the_model_loads_for_anyone_and_decides_by_its_threshold(world: World) -> None:
    import mlflow

    version = world.platform.ledger.version(1)
    dataset = load(world.platform.datasets / f"{version.dataset_digest}.parquet")
    mlflow.set_tracking_uri(world.platform.registry.uri)
    mlflow.set_registry_uri(world.platform.registry.uri)
    loaded = mlflow.pyfunc.load_model(f"models:/{MODEL_NAME}/Production")

    names = CONTRACT.service(version.service).names
    assert [column.name for column in loaded.metadata.get_input_schema()] == names
    said = np.asarray(loaded.predict(dataset.frame[names]), dtype=bool)
    probabilities = procedure.score(pipeline.scorer_of(world.platform, version), dataset.frame)
    assert (said == (probabilities >= version.threshold)).all()
    assert 0 < said.sum() < USERS
    assert version.threshold != 0.5


def test_the_month_before_is_validated_forward_in_time_once_this_one_exists(world: World) -> None:
    import mlflow

    client = mlflow.MlflowClient(world.platform.registry.uri, world.platform.registry.uri)
    first, second = world.platform.ledger.versions()[:2]
    february = load(world.platform.datasets / f"{second.dataset_digest}.parquet")
    validated = procedure.forward(
        pipeline.scorer_of(world.platform, first),
        february,
        JANUARY,
        first.threshold,
        world.platform.training_config,
    )
    logged = client.get_run(first.run_id).data.metrics
    assert logged["forward_auc"] == validated.metrics["auc"].value
    assert "forward_auc" not in client.get_run(second.run_id).data.metrics
    assert (validated.trained_on, validated.month, validated.users) == (JANUARY, FEBRUARY, february.holdout.sum())

    card, later = (world.platform.registry.page(one.run_id, pipeline.MODEL_CARD) for one in (first, second))
    assert f"On the {validated.users:,} held-out users of 2024-02 it reaches an AUC of" in card
    assert "no later month with labels is there yet" in later
    assert f"Version {first.version}." in card  # what was decided of it is still there


def test_the_model_card_says_what_was_decided(world: World) -> None:
    version = world.platform.ledger.version(1)
    card = world.platform.registry.page(version.run_id, pipeline.MODEL_CARD)
    assert "nothing is in Production and every gate passed" in card
    assert f"{version.evidence.users:,} held-out users" in card
    assert version.predictions_digest not in card  # its digests are short; lineage.json has them whole
    assert version.dataset_digest[:12] in card


def test_the_first_version_is_promoted_by_policy_and_the_second_waits(world: World) -> None:
    ledger = world.platform.ledger
    first, second = ledger.versions()

    assert [(one.version, one.as_of) for one in (first, second)] == [(1, JANUARY.as_of), (2, FEBRUARY.as_of)]
    assert first.artifact_path == SCORER_PATH
    assert (first.service, first.threshold) == (first.lineage["service"], first.lineage["threshold"])
    promoted, judged = ledger.entries()
    assert (promoted.action, promoted.version, promoted.by) == ("promote", 1, "policy")
    assert all(gate.passed for gate in promoted.gates)
    assert (judged.version, judged.previous, judged.by) == (2, 1, "policy")
    assert judged.action == ("wait" if all(gate.passed for gate in judged.gates) else "refuse")
    assert {"better_than_production", "no_segment_gets_worse"} <= {gate.name for gate in judged.gates}
    assert {number: one.stage for number, one in world.platform.registry.versions().items()} == {
        1: PRODUCTION,
        2: STAGING,
    }
    assert world.written(FEBRUARY)["registered_model_version"].facts["version"] == 2
    assert [month.missing for month in month_statuses(world.platform)][:2] == [WATCHED, WATCHED]


def test_the_registered_scorer_gives_the_registered_predictions(world: World) -> None:
    version = world.platform.ledger.version(1)
    dataset = load(world.platform.datasets / f"{version.dataset_digest}.parquet")
    scorer = Scorer.from_bytes(world.platform.registry.scorer(version.run_id))

    probabilities = procedure.score(scorer, dataset.frame)
    users = dataset.frame[USER_ID].tolist()
    assert procedure.predictions_digest(users, probabilities) == version.predictions_digest
    assert procedure.predictions_digest(users[::-1], probabilities[::-1]) == version.predictions_digest
    probabilities[0] = np.nextafter(probabilities[0], 1)
    assert procedure.predictions_digest(users, probabilities) != version.predictions_digest


def test_versions_are_compared_on_the_newer_of_their_months(world: World) -> None:
    first, second = world.platform.ledger.versions()[:2]
    february = load(world.platform.datasets / f"{second.dataset_digest}.parquet")
    labels = february.labels[february.holdout]
    one, two = (
        roc_auc_score(labels, procedure.score(pipeline.scorer_of(world.platform, version), february.holdout_rows))
        for version in (first, second)
    )
    forth = pipeline.compare_versions(world.platform, second, first)
    back = pipeline.compare_versions(world.platform, first, second)
    assert forth.users == back.users == february.holdout.sum()
    assert forth.auc.value == pytest.approx(two - one)
    assert back.auc.value == pytest.approx(one - two)


# --- the order of months and repetitions --------------------------------------------------------------------------


def test_months_in_another_order_and_twice_come_out_the_same(
    world: World, new_world: Callable[[Path], World], months: Path
) -> None:
    other = new_world(months)
    for month in (FEBRUARY, JANUARY):
        other.whole_month(month)
    for month in (FEBRUARY, JANUARY):
        other.data_layers(month)
        pipeline.assemble_dataset(other.platform, month, NOW + timedelta(days=1))
    # February's first model had no January to learn from.
    pipeline.train(other.platform, FEBRUARY, NOW + timedelta(days=1))
    pipeline.register(other.platform, FEBRUARY, NOW + timedelta(days=1))

    for month in (JANUARY, FEBRUARY):
        assert other.digests(month) == world.digests(month)
    assert other.online() == world.online()
    assert [one.as_of for one in other.platform.ledger.versions()] == [FEBRUARY.as_of, JANUARY.as_of, FEBRUARY.as_of]


def test_training_again_gives_the_same_predictions_and_registering_again_changes_nothing(world: World) -> None:
    platform, before = world.platform, world.digests(JANUARY)
    entries, versions = platform.ledger.entries(), platform.ledger.versions()
    staged = platform.registry.versions()

    again = pipeline.register(platform, JANUARY, NOW)
    assert again.version.version == 1
    assert not again.decision.promote
    assert (platform.ledger.entries(), platform.ledger.versions()) == (entries, versions)
    assert platform.registry.versions() == staged

    pipeline.train(platform, JANUARY, NOW)
    third = pipeline.register(platform, JANUARY, NOW).version
    assert third.predictions_digest == versions[0].predictions_digest
    assert third.artifact_sha256 == versions[0].artifact_sha256
    assert (third.version, third.run_id) != (versions[0].version, versions[0].run_id)
    assert world.digests(JANUARY) == before


def test_a_registration_that_fails_leaves_no_version_behind(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    platform = world.platform
    pipeline.train(platform, FEBRUARY, NOW)
    before = platform.registry.versions()

    def full(_: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(platform.ledger, "register", full)
        with pytest.raises(OSError, match="No space left"):
            pipeline.register(platform, FEBRUARY, NOW)
    assert platform.registry.versions() == before
    assert world.written(FEBRUARY)["registered_model_version"].facts["version"] in before

    made = pipeline.register(platform, FEBRUARY, NOW).version
    assert platform.ledger.version(made.version) == made
    assert set(platform.registry.versions()) == {*before, made.version}


@pytest.mark.parametrize("away", ["register", "set_stage", "put_page"])
def test_mlflow_away_in_the_middle_of_a_registration_is_finished_by_the_next(
    world: World, monkeypatch: pytest.MonkeyPatch, away: str
) -> None:
    platform = world.platform
    pipeline.train(platform, FEBRUARY, NOW, estimator="logistic_regression")
    versions, entries = platform.ledger.versions(), platform.ledger.entries()

    def unavailable(*_: object, **__: object) -> None:
        raise RegistryUnavailable("MLflow does not answer")

    with monkeypatch.context() as broken:
        broken.setattr(platform.registry, away, unavailable)
        with pytest.raises(RegistryUnavailable):
            pipeline.register(platform, FEBRUARY, NOW)
    if away == "register":
        assert (platform.ledger.versions(), platform.ledger.entries()) == (versions, entries)
    assert platform.ledger.production() == 1

    registered = pipeline.register(platform, FEBRUARY, NOW)
    assert len(platform.ledger.versions()) == len(versions) + 1
    assert set(platform.registry.versions()) >= {registered.version.version}
    assert [one.version for one in platform.ledger.entries()[len(entries) :]] == [registered.version.version]
    card = platform.registry.page(registered.version.run_id, pipeline.MODEL_CARD)
    assert f"--version {registered.version.version}" in card


def test_a_version_that_a_killed_registration_left_in_mlflow_is_taken_up(world: World) -> None:
    platform = world.platform
    run_id = pipeline.train(platform, FEBRUARY, NOW, estimator="logistic_regression").run_id
    left_behind = platform.registry.register(run_id, tags={}, description="")
    known = set(platform.registry.versions())

    assert pipeline.register(platform, FEBRUARY, NOW).version.version == left_behind
    assert set(platform.registry.versions()) == known


def test_two_registrations_of_one_run_at_once_make_one_version(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    platform = world.platform
    pipeline.train(platform, FEBRUARY, NOW, estimator="logistic_regression")
    looked_up = platform.ledger.version_of_run
    made: list[pipeline.Registered] = []

    def after_the_other(run_id: str) -> Any:
        monkeypatch.setattr(platform.ledger, "version_of_run", looked_up)
        made.append(pipeline.register(platform, FEBRUARY, NOW))

    monkeypatch.setattr(platform.ledger, "version_of_run", after_the_other)
    second = pipeline.register(platform, FEBRUARY, NOW)
    assert second.version == made[0].version
    assert second.version.version in platform.registry.versions()


def test_a_month_before_that_cannot_be_validated_is_told_and_stops_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = world.platform

    def gone(*_: object) -> None:
        raise ArtifactRefused("the scorer is not the one registered")

    monkeypatch.setattr(pipeline, "scorer_of", gone)
    trained = pipeline.train(platform, FEBRUARY, NOW, estimator="logistic_regression")
    assert trained.not_validated == ("the scorer is not the one registered",)
    assert world.written(FEBRUARY)["churn_model"].facts["run_id"] == trained.run_id


def test_a_decision_is_put_on_the_card(world: World) -> None:
    platform = world.platform
    version = platform.ledger.version(2)
    entry = platform.ledger.promote(
        2,
        by="ada",
        reason="a reason of hers",
        now=NOW,
        policy=platform.policy,
        compare=lambda candidate, production: pipeline.compare_versions(platform, candidate, production),
        override=True,
    )
    pipeline.explain(platform, entry)
    assert "promote by ada on 2024-05-03 04:05 UTC: a reason of hers" in platform.registry.page(
        version.run_id, pipeline.MODEL_CARD
    )
    platform.ledger.rollback(1, by="ada", reason="back", now=NOW, policy=platform.policy)


def test_a_scorer_that_was_exchanged_in_mlflow_is_not_registered(world: World) -> None:
    platform = world.platform
    run_id = pipeline.train(platform, FEBRUARY, NOW, estimator="logistic_regression").run_id
    before = platform.registry.versions()
    platform.registry.put_page(run_id, SCORER_PATH, "another scorer")
    with pytest.raises(ArtifactRefused, match=f"MLflow's scorer of run {run_id} has SHA-256"):
        pipeline.register(platform, FEBRUARY, NOW)
    assert platform.registry.versions() == before


# --- months with gaps ---------------------------------------------------------------------------------------------


def test_a_month_without_labels_goes_online_and_trains_nothing(world: World) -> None:
    world.land(MARCH)
    with pytest.raises(UnknownMonth, match=r"2024-03 has landed without labels\.csv; land it with `streamflow land`"):
        pipeline.load_table(world.platform, CONTRACT.label_table, MARCH, NOW)
    world.data_layers(MARCH)
    with pytest.raises(UnknownMonth, match="labels holds nothing for 2024-03; land the month"):
        pipeline.assemble_dataset(world.platform, MARCH, NOW)
    for step in (pipeline.train, pipeline.register):
        with pytest.raises(UnknownMonth, match="holds nothing for 2024-03"):
            step(world.platform, MARCH, NOW)

    assert set(world.written(MARCH)) == set(relations()) - {"labels", *TRAINED, *WATCHED}
    (status,) = [month for month in month_statuses(world.platform) if month.month == "2024-03"]
    assert status.missing == ("churn_scores", "drift_report")


def test_a_customer_without_features_trains_nothing_and_is_counted(world: World) -> None:
    world.land(APRIL)
    world.data_layers(APRIL)
    written = pipeline.assemble_dataset(world.platform, APRIL, NOW)

    (missing,) = set(csv(world, APRIL, "users").index) - set(csv(world, APRIL, "usage_agg_30d").index)
    assert (written.rows, written.facts["dropped"]) == (USERS - 1, 1)
    assert missing not in load(world.platform.datasets / f"{written.digest}.parquet").frame[USER_ID].tolist()
    assert world.written(APRIL)["usage_agg_30d_snapshots"].rows == USERS
    assert world.written(APRIL)["usage_agg_30d_snapshots"].facts["missing"] == 1
    for relation in ("streamflow.usage_agg_30d_snapshots", "online.usage_agg_30d_fv"):
        key = "as_of = '2024-04-30'" if relation.startswith("streamflow") else "true"
        assert rows(world, f"SELECT skips_7d FROM {relation} WHERE user_id = %s AND {key}", missing) == [(None,)]


def test_a_month_that_has_not_landed_is_said(world: World) -> None:
    with pytest.raises(UnknownMonth, match="2025-01"):
        pipeline.load_table(world.platform, CONTRACT.tables[0], Month(2025, 1), NOW)


def test_a_dataset_that_was_damaged_is_not_trained_on(world: World) -> None:
    file = world.platform.datasets / f"{world.written(FEBRUARY)['training_dataset'].digest}.parquet"
    kept = file.read_bytes()
    try:
        file.write_bytes(kept[: len(kept) // 2])
        with pytest.raises(TrainingRefused, match="materialize training_dataset again"):
            pipeline.train(world.platform, FEBRUARY, NOW)
    finally:
        file.write_bytes(kept)


def test_a_month_that_landed_when_a_column_meant_something_else_is_not_trained_on(world: World) -> None:
    subscriptions = CONTRACT.table("subscriptions")
    columns = tuple(
        replace(column, unit="cents/month") if column.name == "monthly_fee" else column
        for column in subscriptions.columns
    )
    tables = tuple(replace(table, columns=columns) if table is subscriptions else table for table in CONTRACT.tables)
    since = World(replace(world.platform, contract=replace(CONTRACT, tables=tables)), world.months)
    before = world.digests(FEBRUARY)

    since.data_layers(FEBRUARY)
    with pytest.raises(TrainingRefused, match=r"subscriptions\.csv of 2024-02 landed .* contract: monthly_fee"):
        pipeline.assemble_dataset(since.platform, FEBRUARY, NOW)
    assert world.digests(FEBRUARY) == before


# --- rebuilding ---------------------------------------------------------------------------------------------------


def test_a_version_is_rebuilt_identically_also_after_its_month_was_corrected(world: World, tmp_path: Path) -> None:
    platform = world.platform
    rebuilt = pipeline.rebuild(platform, 1)
    assert rebuilt == pipeline.Rebuilt(
        1, same_dataset=True, same_predictions=True, largest_difference=0.0, changed_since={}
    )

    corrected = tmp_path / "corrected"
    corrected.mkdir()
    for file in (world.months / str(JANUARY)).iterdir():
        (corrected / file.name).write_bytes(file.read_bytes())
    payments = csv(world, JANUARY, "payments_agg_90d")
    (payments + 1).to_csv(corrected / "payments_agg_90d.csv")
    before = world.digests(JANUARY)
    platform.landing.land(corrected, JANUARY, NOW)
    world.data_layers(JANUARY)
    pipeline.assemble_dataset(platform, JANUARY, NOW)

    changed = {name for name, digest in world.digests(JANUARY).items() if digest != before[name]}
    snapshot = "payments_agg_90d_snapshots"
    assert changed == {"payments_agg_90d", snapshot, "payments_agg_90d_fv", "training_dataset"}
    assert {world.written(JANUARY)[name].revision for name in changed} == {2}
    assert pipeline.rebuild(platform, 1).identical


def test_a_rebuild_from_a_damaged_archive_is_refused(world: World) -> None:
    lineage = world.platform.ledger.version(2).lineage
    digest = lineage["files"]["usage_agg_30d"]["digest"]
    file = world.platform.settings.home / "archive" / "sha256" / digest[:2] / digest
    kept = file.read_bytes()
    file.chmod(0o644)
    try:
        file.write_bytes(kept.replace(b"1", b"2", 1))
        with pytest.raises(ArchiveUnusable, match=digest):
            pipeline.rebuild(world.platform, 2)
        file.unlink()
        with pytest.raises(ArchiveUnusable, match=digest):
            pipeline.rebuild(world.platform, 2)
    finally:
        file.write_bytes(kept)
    assert pipeline.rebuild(world.platform, 2).identical


def test_an_unknown_version_cannot_be_rebuilt(world: World) -> None:
    with pytest.raises(UnknownVersion, match="there is no version 99"):
        pipeline.rebuild(world.platform, 99)


def test_a_rebuild_that_differs_says_what_has_changed_since(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "code_version", lambda: "elsewhere")
    fit = training.fit

    def fit_fewer(rows: pd.DataFrame, *given: Any, **named: Any) -> training.TrainedModel:
        return fit(rows[1:], *given, **named)

    monkeypatch.setattr(training, "fit", fit_fewer)
    rebuilt = pipeline.rebuild(world.platform, 2)
    assert (rebuilt.same_dataset, rebuilt.same_predictions, rebuilt.identical) == (True, False, False)
    assert 0 < rebuilt.largest_difference < 1
    assert "elsewhere now" in rebuilt.explanation


def test_a_rebuild_follows_the_configuration_of_then(world: World, tmp_path: Path) -> None:
    settings = world.platform.settings
    other = tmp_path / "training.toml"
    text = settings.training_file.read_text()
    other.write_text(text.replace("seed = 42", "seed = 43"))
    changed = Platform(settings.model_copy(update={"training_file": other}), world.platform.database)
    assert changed.training_config.digest != world.platform.training_config.digest
    assert pipeline.rebuild(changed, 2).identical


# --- several months -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recent(new_world: Callable[[Path], World], months: Path) -> World:
    """January's dataset, and February's model that must learn from both."""
    made = new_world(months)
    file = made.platform.settings.home / "training.toml"
    text = made.platform.settings.training_file.read_text()
    file.write_text(re.sub(r"(?m)^names = .*$", 'names = ["recent"]', re.sub(r'    "(?!gradient)\w+",\n', "", text)))
    settings = made.platform.settings.model_copy(update={"training_file": file})
    made = World(Platform(settings, made.platform.database), months)
    for month in (JANUARY, FEBRUARY):
        made.land(month)
        made.data_layers(month)
        pipeline.assemble_dataset(made.platform, month, NOW)
    pipeline.train(made.platform, FEBRUARY, NOW)
    pipeline.register(made.platform, FEBRUARY, NOW)
    return made


def test_every_month_that_could_be_learned_from_is_recorded(recent: World) -> None:
    january, february = recent.written(JANUARY)["training_dataset"], recent.written(FEBRUARY)["training_dataset"]
    model = recent.written(FEBRUARY)["churn_model"]
    assert model.sources == {
        "training_dataset": february.as_source,
        "training_dataset 2024-01": january.as_source,
    }
    lineage = recent.platform.ledger.version(1).lineage
    assert (lineage["window"], lineage["window_name"]) == (["2024-01", "2024-02"], "recent")
    assert lineage["dataset"] == {"digest": february.digest, "rows": USERS}
    assert lineage["earlier"] == [
        {
            "month": "2024-01",
            "label_month": "2024-01",
            "dataset": {"digest": january.digest, "rows": USERS},
            "sources": january.sources,
            "files": january.facts["files"],
        }
    ]
    held_out = sum(load(recent.platform.datasets / f"{february.digest}.parquet").holdout)
    assert model.facts["evidence"]["users"] == held_out
    assert recent.platform.registry.versions()[1].run_id == model.facts["run_id"]


def test_a_version_of_several_months_is_traced_to_all_their_files(recent: World) -> None:
    trace = trace_version(recent.platform, 1)
    require_whole(trace)
    landed = {
        (str(month), f"{name}.csv", revision.sha256)
        for month in (JANUARY, FEBRUARY)
        for name, revision in recent.platform.landing.manifest(month).current.items()
    }
    assert {(file.month, file.file, file.sha256) for file in trace.files} == landed
    assert len(landed) == 2 * len(CONTRACT.tables)
    assert [one.month for one in (trace.dataset, *trace.earlier)] == ["2024-02", "2024-01"]
    assert (trace.training.window, trace.training.window_name) == (("2024-01", "2024-02"), "recent")
    console = Console(width=400)
    with console.capture() as captured:
        console.print(as_tree(trace))
    lines = captured.get().splitlines()
    assert sum(".csv" in line for line in lines) == 2 * len(CONTRACT.tables)
    datasets = [line.split()[2:4] for line in lines if line.startswith("├── dataset ")]
    assert datasets == [[trace.dataset.digest[:12], "2024-02"], [trace.earlier[0].digest[:12], "2024-01"]]  # type: ignore[index]


def test_a_version_of_several_months_is_rebuilt_identically_whatever_happened_to_them(
    recent: World, tmp_path: Path
) -> None:
    platform = recent.platform
    assert pipeline.rebuild(platform, 1).identical

    corrected = shutil.copytree(recent.months / str(JANUARY), tmp_path / "corrected")
    (~csv(recent, JANUARY, "labels").astype(bool)).to_csv(corrected / "labels.csv")
    before = [one.stale for one in month_statuses(platform)]
    platform.landing.land(corrected, JANUARY, NOW)
    recent.data_layers(JANUARY)
    pipeline.assemble_dataset(platform, JANUARY, NOW)
    after = {one.month: one.stale for one in month_statuses(platform)}
    assert before == [(), ()]
    assert after == {"2024-01": (), "2024-02": ("churn_model", "registered_model_version")}

    assert pipeline.rebuild(platform, 1).identical
    file = platform.datasets / f"{trace_version(platform, 1).earlier[0].digest}.parquet"
    kept = file.read_bytes()
    try:
        file.unlink()
        (said,) = trace_version(platform, 1).broken
        assert said.startswith(f"{file}, the dataset of 2024-01, one of those of version 1, is gone")
    finally:
        file.write_bytes(kept)
    pipeline.train(platform, FEBRUARY, NOW)
    assert [one.stale for one in month_statuses(platform)] == [(), ("registered_model_version",)]


def test_an_earlier_dataset_that_cannot_be_read_is_named(recent: World) -> None:
    file = recent.platform.datasets / f"{recent.written(JANUARY)['training_dataset'].digest}.parquet"
    before, kept = recent.written(FEBRUARY), file.read_bytes()
    try:
        file.write_bytes(kept[:100])
        with pytest.raises(TrainingRefused) as refused:
            pipeline.train(recent.platform, FEBRUARY, NOW)
    finally:
        file.write_bytes(kept)
    assert str(refused.value).startswith(f"2024-02 may learn from 2024-01 too, but {file} is no training dataset")
    assert str(refused.value).endswith("materialize training_dataset again for 2024-01")
    assert recent.written(FEBRUARY) == before


# --- the published months -----------------------------------------------------------------------------------------


def test_the_real_january_has_its_published_figures(
    real_data: Path, new_world: Callable[[Path], World], tmp_path: Path
) -> None:
    (tmp_path / str(JANUARY)).symlink_to(real_data / "month_000")
    world = new_world(tmp_path)
    registered = world.whole_month(JANUARY)

    assert {one.rows for one in world.written(JANUARY).values()} == {7_043}
    for relation, period in (
        ("subscriptions", "month = '2024-01'"),
        ("subscriptions_profile_snapshots", "as_of = '2024-01-31'"),
    ):
        query = f"SELECT count(*) FROM streamflow.{relation} WHERE plan_stream_tv AND {period}"
        assert rows(world, query) == [(2_707,)]
    assert rows(world, "SELECT monthly_fee FROM online.subs_profile_fv WHERE user_id = '7590-VHVEG'") == [(29.85,)]
    assert registered.version.metrics["auc"] >= 0.83
    assert registered.decision.promote


def test_a_month_written_anew_while_its_dataset_is_made_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    retrieve = features.historical_features

    def retrieve_and_correct(*given: Any) -> Any:
        frame = retrieve(*given)
        with world.platform.database.connect() as connection:
            connection.execute(
                "UPDATE streamflow.month_writes SET digest = 'other' WHERE relation = 'labels' AND month = '2024-02'"
            )
        return frame

    before = world.written(FEBRUARY)
    monkeypatch.setattr(features, "historical_features", retrieve_and_correct)
    with pytest.raises(TrainingRefused, match="2024-02 was written anew while its dataset was being made"):
        pipeline.assemble_dataset(world.platform, FEBRUARY, NOW)
    with world.platform.database.connect() as connection:
        record(connection, before["labels"])
    assert world.written(FEBRUARY) == before
