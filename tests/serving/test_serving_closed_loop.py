"""What /metrics says of months, drift, decay, retraining and promotion."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import get_args

import httpx
import pytest
import serving_world
from loop_world import (
    BEGUN,
    FINDINGS,
    SCORED,
    USERS,
    WRITTEN,
    begin_retraining,
    drift_content,
    judge,
    registered_for,
    report_drift,
    report_performance,
    tell_the_story,
    write_month,
)
from serving_world import NOW, Platform, accept_connections, eventually, metric, metrics_of, predict, running

import serving.closed_loop
from serving.closed_loop import HELD_BACK, MONTHS, LoopState
from serving.closed_loop import metrics_of as families
from serving.months import NEWEST
from streamflow.contract import CONTRACT
from streamflow.database import Database
from streamflow.months import Month
from streamflow.retraining import Kind, Obstacle
from streamflow.settings import Settings
from streamflow.situation import Begun


@pytest.fixture
def story(
    platform: Platform, settings: Settings, artifacts: tuple[bytes, bytes], serve: Callable[[Settings], httpx.Client]
) -> httpx.Client:
    """The service, once it has read what `tell_the_story` tells."""
    tell_the_story(platform, artifacts)
    client = serve(settings)
    eventually(lambda: client.get("/ready").status_code == 200)
    eventually(lambda: metric(metrics_of(client), "closed_loop_read_timestamp_seconds") > 0)
    return client


def _by(metrics: serving_world.Metrics, name: str, label: str) -> dict[str, float]:
    """The values of a metric by one of its labels."""
    return {dict(labels)[label]: value for (found, labels), value in metrics.items() if found == f"streamflow_{name}"}


def test_months_reports_retrainings_and_ledger_are_told(story: httpx.Client) -> None:
    metrics = metrics_of(story)
    assert metric(metrics, "closed_loop_read_timestamp_seconds") == NOW.timestamp()
    months = dict.fromkeys(("2024-01", "2024-02", "2024-03"), 1.0)
    assert _by(metrics, "month_customers", "month") == dict.fromkeys(months, USERS)
    assert _by(metrics, "month_scored_customers", "month") == dict.fromkeys(months, SCORED)
    assert _by(metrics, "month_labelled", "month") == {**months, "2024-03": 0}
    assert _by(metrics, "month_written_timestamp_seconds", "month") == dict.fromkeys(months, WRITTEN.timestamp())
    assert (
        metric(metrics, "month_end_timestamp_seconds", month="2024-02") == datetime(2024, 3, 1, tzinfo=UTC).timestamp()
    )

    assert _by(metrics, "month_auc", "month") == {"2024-01": 0.84, "2024-02": 0.49}
    february = {"month": "2024-02", "version": "1"}
    assert metric(metrics, "month_auc_low", **february) == 0.49 - 0.02
    assert metric(metrics, "month_auc_high", **february) == 0.49 + 0.03
    assert metric(metrics, "month_promised_auc", **february) == 0.84
    assert metric(metrics, "month_promised_auc_low", **february) == 0.84 - 0.02
    assert metric(metrics, "month_promised_auc_high", **february) == 0.84 + 0.03
    decay = {finding: metric(metrics, "month_decay", **february, finding=finding) for finding in FINDINGS}
    assert decay == dict(zip(FINDINGS, (1, 1, 0, 0), strict=True))
    assert _by(metrics, "month_auc_drop", "part") == {"feature_drift": 0.01, "concept_drift": 0.84 - 0.49 - 0.01}

    newest = drift_content("2024-03", 2, {"watch_hours_30d": 60}).report
    assert _by(metrics, "month_drifting_features", "month") == {"2024-02": 1, "2024-03": 1}
    assert metric(metrics, "month_largest_psi", month="2024-03", version="2") == max(one.psi for one in newest.features)
    told = {one.name: one for one in (*newest.features, newest.score)}
    assert set(told) == {*(column.name for column in CONTRACT.features), "score"}
    assert _by(metrics, "drift_psi", "feature") == {name: one.psi for name, one in told.items()}
    assert _by(metrics, "drift_significant", "feature") == {name: one.significant for name, one in told.items()}
    assert _by(metrics, "drift_missing_ratio", "feature") == {name: one.current_missing for name, one in told.items()}
    assert told["watch_hours_30d"].significant
    assert _by(metrics, "drift_psi", "month").keys() == {"2024-03"}

    assert metric(metrics, "retrainings", cause="no_model", result="promoted") == 1
    assert metric(metrics, "retrainings", cause="decay", result="promoted") == 1
    assert metric(metrics, "retrainings", cause="drift", result="no_version") == 0
    assert metric(metrics, "retraining_started_timestamp_seconds") == BEGUN[1].timestamp()
    assert (metric(metrics, "retraining_unfinished"), metric(metrics, "retrainings_in_vain")) == (0, 0)
    promoted = {"promote": 2, "rollback": 0, "wait": 0, "refuse": 0, "threshold": 0, "flag": 0}
    assert _by(metrics, "ledger_decisions", "action") == promoted
    assert metric(metrics, "candidates_waiting") == 0
    assert metric(metrics, "production_data_end_timestamp_seconds") == datetime(2024, 3, 1, tzinfo=UTC).timestamp()
    assert metric(metrics, "production_promoted_timestamp_seconds") == WRITTEN.timestamp()


def test_what_changes_is_told_at_the_next_poll(
    story: httpx.Client, platform: Platform, artifacts: tuple[bytes, bytes]
) -> None:
    report_performance(platform, "2024-02", 2, auc=0.66, promised=0.65, explained=True, reliable=False)
    report_drift(platform, "2024-03", 2)
    later = datetime(2024, 4, 1, tzinfo=UTC)
    begin_retraining(platform, "slide:2024-03:version 2", "2024-03", later)
    eventually(lambda: metric(metrics_of(story), "retraining_unfinished") == 1)
    eventually(lambda: metric(metrics_of(story), "month_drifting_features", month="2024-03", version="2") == 0)
    metrics = metrics_of(story)
    assert _by(metrics, "month_auc", "version") == {"1": 0.84, "2": 0.66}, "only the newest report of a month counts"
    assert _by(metrics, "month_auc_drop", "part") == {}
    assert metric(metrics, "retrainings", cause="slide", result="no_version") == 1
    platform.register(3, artifacts[1], **registered_for("slide:2024-03:version 2", "2024-03"))
    judge(platform, "wait", 3, better=False)
    eventually(lambda: metric(metrics_of(story), "candidates_waiting") == 1)
    metrics = metrics_of(story)
    assert (metric(metrics, "retraining_unfinished"), metric(metrics, "retrainings_in_vain")) == (0, 1)
    assert metric(metrics, "retrainings", cause="slide", result="not_promoted") == 1
    judge(platform, "promote", 3, better=None)
    eventually(lambda: metric(metrics_of(story), "candidates_waiting") == 0)


def _held_back(metrics: serving_world.Metrics) -> dict[tuple[str, str], float]:
    return {
        (dict(labels)["cause"], dict(labels)["obstacle"]): value
        for (name, labels), value in metrics.items()
        if name == "streamflow_retraining_held_back"
    }


def test_a_retraining_that_is_held_back_is_told_with_its_cause_and_obstacle(
    story: httpx.Client, platform: Platform
) -> None:
    told = _held_back(metrics_of(story))
    assert set(told) == {(cause, obstacle) for cause in HELD_BACK for obstacle in get_args(Obstacle)}
    assert set(told.values()) == {0}
    found = ("worse_than_promised", "worse_calibrated")
    report_performance(platform, "2024-02", 2, auc=0.49, promised=0.66, found=found)
    held_back = {("decay", "no_newer_labels"): 1.0}
    eventually(lambda: _held_back(metrics_of(story)) == {**told, **held_back})
    report_performance(platform, "2024-02", 2, auc=0.66, promised=0.66)
    eventually(lambda: _held_back(metrics_of(story)) == told)


def test_labels_that_are_older_than_a_year_are_decided_about(
    platform: Platform, settings: Settings, serve: Callable[[Settings], httpx.Client], artifacts: tuple[bytes, bytes]
) -> None:
    first = Month.parse("2022-01")
    platform.promote(1, artifacts[0], as_of=first.as_of)
    for number in range(NEWEST + 3):
        write_month(platform, str(first.shift(number)), labelled=number == 0)
    report_performance(platform, str(first), 1, auc=0.49, promised=0.7, found=("no_better_than_chance",))
    client = serve(settings)
    eventually(lambda: metric(metrics_of(client), "closed_loop_read_timestamp_seconds") > 0)
    assert _held_back(metrics_of(client))["decay", "no_newer_labels"] == 1


def test_nothing_is_claimed_about_retraining_while_the_policy_cannot_be_used(
    platform: Platform,
    settings: Settings,
    artifacts: tuple[bytes, bytes],
    serve: Callable[[Settings], httpx.Client],
    caplog: pytest.LogCaptureFixture,
) -> None:
    tell_the_story(platform, artifacts)
    policy = settings.home / "policy.toml"
    policy.write_text("mode = 1")
    client = serve(settings.model_copy(update={"policy_file": policy}))
    eventually(lambda: metric(metrics_of(client), "closed_loop_read_timestamp_seconds") > 0)
    assert _held_back(metrics_of(client)) == {}
    assert metric(metrics_of(client), "retrainings", cause="decay", result="promoted") == 1
    begin_retraining(platform, "slide:2024-03:version 2", "2024-03", datetime(2024, 4, 1, tzinfo=UTC))
    eventually(lambda: metric(metrics_of(client), "retraining_unfinished") == 1)
    policy.write_text(settings.policy_file.read_text())
    eventually(lambda: len(_held_back(metrics_of(client))) > 0)
    assert caplog.messages.count("retraining_undecided") == 1


@pytest.mark.parametrize(
    ("decisions", "waiting"),
    [
        ([], 0),
        ([("wait", 1)], 1),
        ([("wait", 1), ("wait", 2)], 2),
        ([("wait", 1), ("refuse", 1)], 0),
        ([("wait", 1), ("promote", 1)], 0),
        ([("wait", 1), ("promote", 2)], 0),
        ([("promote", 1), ("wait", 2), ("threshold", 1)], 1),
        ([("promote", 1), ("wait", 2), ("flag", 2)], 1),
        ([("promote", 1), ("promote", 2), ("wait", 3), ("rollback", 1)], 0),
    ],
)
def test_candidates_wait_until_something_newer_is_decided(
    platform: Platform,
    settings: Settings,
    serve: Callable[[Settings], httpx.Client],
    artifacts: tuple[bytes, bytes],
    decisions: Sequence[tuple[str, int]],
    waiting: int,
) -> None:
    for version in (1, 2, 3):
        platform.register(version, artifacts[0])
    for action, version in decisions:
        if action == "threshold":
            platform.decide(action, version, threshold=0.4)
        else:
            judge(platform, action, version, better=None)
    client = serve(settings)
    eventually(lambda: metric(metrics_of(client), "closed_loop_read_timestamp_seconds") > 0)
    assert metric(metrics_of(client), "candidates_waiting") == waiting


def test_an_empty_platform_claims_nothing(settings: Settings, serve: Callable[[Settings], httpx.Client]) -> None:
    client = serve(settings)
    eventually(lambda: metric(metrics_of(client), "closed_loop_read_timestamp_seconds") > 0)
    metrics = metrics_of(client)
    told = {name.removeprefix("streamflow_") for name, _ in metrics}
    assert not {name for name in told if name.startswith(("month_", "drift_", "production_"))}
    assert set(_by(metrics, "ledger_decisions", "action").values()) == {0}
    assert (metric(metrics, "retraining_unfinished"), metric(metrics, "retrainings_in_vain")) == (0, 0)


def test_the_newest_months_only(
    platform: Platform, settings: Settings, serve: Callable[[Settings], httpx.Client], artifacts: tuple[bytes, bytes]
) -> None:
    platform.promote(1, artifacts[0])
    first = Month.parse("2020-01")
    months = [str(first.shift(number)) for number in range(MONTHS + 3)]
    for month in months:
        write_month(platform, month, scored=False)
        report_performance(platform, month, 1, auc=0.7, promised=0.7)
    client = serve(settings)
    eventually(lambda: metric(metrics_of(client), "closed_loop_read_timestamp_seconds") > 0)
    metrics = metrics_of(client)
    for name in ("month_customers", "month_auc"):
        assert sorted(_by(metrics, name, "month")) == months[3:]
    assert set(_by(metrics, "month_scored_customers", "month").values()) == {0}


def test_what_was_read_stays_while_postgresql_is_away(
    platform: Platform,
    settings: Settings,
    server: Database,
    artifacts: tuple[bytes, bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    tell_the_story(platform, artifacts)
    clock = [NOW]
    with running(settings, lambda: clock[0]) as client:
        eventually(lambda: metric(metrics_of(client), "closed_loop_read_timestamp_seconds") > 0)
        before = metric(metrics_of(client), "month_auc", month="2024-02", version="1")
        accept_connections(platform.database, server, accept=False)
        eventually(lambda: "closed_loop_unread" in caplog.messages)
        clock[0] = datetime(2024, 3, 2, tzinfo=UTC)
        metrics = metrics_of(client)
        assert metric(metrics, "month_auc", month="2024-02", version="1") == before
        assert metric(metrics, "closed_loop_read_timestamp_seconds") == NOW.timestamp()
        unavailable = {"part": "feature_store", "state": "unavailable"}
        eventually(lambda: metric(metrics_of(client), "readiness", **unavailable) == 1)
        accept_connections(platform.database, server, accept=True)
        eventually(lambda: metric(metrics_of(client), "closed_loop_read_timestamp_seconds") == clock[0].timestamp())
        assert caplog.messages.count("closed_loop_unread") == 1


def test_readiness_is_told_by_part(platform: Platform, api: httpx.Client, artifacts: tuple[bytes, bytes]) -> None:
    def state(part: str) -> dict[str, float]:
        names = ("ready", "degraded", "unavailable")
        metrics = metrics_of(api)
        return {name: metric(metrics, "readiness", part=part, state=name) for name in names}

    well = {"ready": 1, "degraded": 0, "unavailable": 0}
    eventually(lambda: state("registry") == well)
    assert state("model") == state("feature_store") == well
    platform.mlflow.status = 500
    eventually(lambda: state("registry") == {**well, "ready": 0, "degraded": 1})
    platform.register(2, artifacts[1])
    platform.mlflow.files["run-2", "scorer.bin"] = b"tampered"
    platform.mlflow.status = 200
    platform.decide("promote", 2)
    eventually(lambda: state("model") == {**well, "ready": 0, "degraded": 1})
    assert predict(api).status_code == 200


def _state(*begun: Begun) -> LoopState:
    return LoopState(NOW, [], [], [], begun, None, {}, None, None, 0)


def _begun(kind: str, *, better: bool | None = None, promoted: bool = False, version: int | None = 1) -> Begun:
    return Begun("2024-02", f"{kind}:2024-02:version 1", NOW, 1, False, version, promoted, better)


@pytest.mark.parametrize(
    ("begun", "in_vain", "unfinished"),
    [
        ([], 0, 0),
        ([_begun("decay", better=False)], 1, 0),
        ([_begun("decay", better=False), _begun("drift", better=False)], 2, 0),
        ([_begun("decay", better=False), _begun("drift", better=True, promoted=True)], 0, 0),
        ([_begun("decay", better=True, promoted=True), _begun("drift", better=False)], 1, 0),
        ([_begun("decay", better=False), _begun("drift", version=None)], 1, 1),
        ([_begun("no_model", better=False)], 0, 0),
        ([_begun("decay", better=False), _begun("slide", promoted=True)], 0, 0),
    ],
)
def test_retrainings_in_vain_are_those_since_one_helped(
    begun: Sequence[Begun], in_vain: float, unfinished: float
) -> None:
    told = {family.name: [sample.value for sample in family.samples] for family in families(_state(*begun))}
    assert told["streamflow_retrainings_in_vain"] == [in_vain]
    assert told["streamflow_retraining_unfinished"] == [unfinished]
    assert sum(told["streamflow_retrainings"]) == len(begun)


def test_causes_that_are_spelt_here_are_the_cores() -> None:
    assert get_args(Kind) == serving.closed_loop.CAUSES
    assert set(serving.closed_loop.HELD_BACK) < set(get_args(Kind))
