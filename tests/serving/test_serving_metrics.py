"""What /metrics says, and that nobody can make it say without bound."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving_world import KNOWN, Platform, eventually, metric, metrics_of, predict

from serving.features import IncompleteFeatures, UnknownUser
from serving.metrics import Metrics
from serving.predictor import Scored
from serving.schemas import Features
from streamflow.contract import CONTRACT
from streamflow.settings import Settings

NOW = datetime(2024, 3, 1, 12, 30, tzinfo=UTC)
FEATURE = "failed_payments_90d"


def _before_and_after(api: httpx.Client, ask: Callable[[], object], name: str, **labels: str) -> tuple[float, float]:
    before = metrics_of(api).get((f"streamflow_{name}", frozenset(labels.items())), 0)
    ask()
    return before, metric(metrics_of(api), name, **labels)


def test_requests_are_counted_by_route_and_status(shared_api: httpx.Client) -> None:
    for ask, labels in (
        (lambda: predict(shared_api), {"route": "/predict", "status": "200"}),
        (lambda: predict(shared_api, "nobody"), {"route": "/predict", "status": "404"}),
        (lambda: shared_api.get(f"/features/{KNOWN}"), {"route": "/features/{user_id}", "status": "200"}),
        (lambda: shared_api.get("/nowhere"), {"route": "unrouted", "status": "404"}),
        (lambda: shared_api.get("/predict"), {"route": "unrouted", "status": "405"}),
    ):
        before, after = _before_and_after(shared_api, ask, "requests_total", **labels)
        assert after == before + 1, labels
        seconds = metric(metrics_of(shared_api), "request_seconds_count", route=labels["route"])
        assert seconds >= after


def test_paths_and_methods_that_are_unknown_make_no_new_series(shared_api: httpx.Client) -> None:
    shared_api.get("/nowhere")
    shared_api.delete("/model")
    before = set(metrics_of(shared_api))
    for number in range(5):
        shared_api.get(f"/nowhere/{number}")
        shared_api.delete("/model", params={"n": number})
        shared_api.get(f"/schema/{number}")
        shared_api.get(f"/features/unknown-{number}")
    added = set(metrics_of(shared_api)) - before
    routes = {dict(labels).get("route") for _, labels in added}
    assert routes <= {"/features/{user_id}", "/schema/{path}"}
    for number in range(5):
        shared_api.get(f"/schema/another-{number}")
    assert set(metrics_of(shared_api)) == before | added


def test_stages_of_a_prediction_are_timed(shared_api: httpx.Client) -> None:
    for stage in ("features", "score"):
        before, after = _before_and_after(shared_api, lambda: predict(shared_api), "stage_seconds_count", stage=stage)
        assert after == before + 1
        assert 0 < metric(metrics_of(shared_api), "stage_seconds_sum", stage=stage) < 60


def test_what_is_asked_for_is_in_flight_itself(shared_api: httpx.Client) -> None:
    metrics = metrics_of(shared_api)
    assert metric(metrics, "requests_in_flight") == 1
    assert metric(metrics, "queue_depth") == 0


def test_the_page_is_prometheus_text(shared_api: httpx.Client) -> None:
    answer = shared_api.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "process_resident_memory_bytes" in answer.text


def test_the_served_version_and_how_long(platform: Platform, api: httpx.Client, artifacts: tuple[bytes, bytes]) -> None:
    metrics = metrics_of(api)
    assert metric(metrics, "model_info", version="1") == 1
    assert metric(metrics, "model_loaded_age_seconds") == 0
    assert metric(metrics, "model_promoted_age_seconds") == (NOW - datetime(2024, 2, 2, tzinfo=UTC)).total_seconds()
    assert metric(metrics, "model_swaps_total", result="taken") == 1
    platform.register(2, artifacts[1])
    platform.mlflow.files["run-2", "scorer.bin"] = b"tampered"
    platform.decide("promote", 2)
    eventually(lambda: api.get("/model").json()["refused"] is not None)
    metrics = metrics_of(api)
    assert metric(metrics, "model_swaps_total", result="ArtifactRefused") == 1
    assert metric(metrics, "model_info", version="1") == 1
    platform.promote(3, artifacts[1])
    eventually(lambda: api.get("/model").json()["version"] == 3)
    metrics = metrics_of(api)
    assert [metric(metrics, "model_info", version=version) for version in "13"] == [0, 1]
    assert metric(metrics, "model_swaps_total", result="taken") == 2


def test_without_a_model_no_version_is_claimed(settings: Settings, serve: Callable[[Settings], httpx.Client]) -> None:
    metrics = metrics_of(serve(settings))
    assert not [labels for name, labels in metrics if name == "streamflow_model_info"]


def _values(metrics: Metrics) -> dict[tuple[str, str], float]:
    """Each value by its name and the values of its labels."""
    return {
        (sample.name.removeprefix("streamflow_"), ",".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(metrics.page().decode())
        for sample in family.samples
    }


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CONTRACT, lambda: NOW)


def _scored(probability: float, as_of: date, outside: tuple[str, ...] = ()) -> Scored:
    return Scored(None, KNOWN, as_of, Features(), probability, NOW, False, outside)  # type: ignore[arg-type]


def test_scores_have_ten_bins_and_features_an_age(metrics: Metrics) -> None:
    scores = [(0.05, date(2024, 2, 29)), (0.1, date(2024, 1, 31)), (0.11, date(2023, 1, 31)), (1.0, date(2024, 3, 1))]
    metrics.answered([_scored(probability, as_of) for probability, as_of in scores], NOW)
    values = _values(metrics)
    tenths = [values["score_bucket", f"{tenths / 10}"] for tenths in range(1, 11)]
    assert tenths == [2, 3, 3, 3, 3, 3, 3, 3, 3, 4]
    ages = [values["feature_age_days_bucket", days] for days in ("7.0", "14.0", "31.0", "366.0", "+Inf")]
    assert ages == [2, 2, 3, 3, 4]
    assert values["feature_age_days_sum", ""] == 1 + 30 + 395


def test_missing_features_are_counted_by_name_but_not_those_of_strangers(metrics: Metrics) -> None:
    metrics.answered(
        [IncompleteFeatures("x", [FEATURE, "of_another_contract"]), UnknownUser("x", [FEATURE, "monthly_fee"])], NOW
    )
    values = {feature: value for (name, feature), value in _values(metrics).items() if name == "missing_features_total"}
    assert {feature for feature, value in values.items() if value} == {FEATURE, "other"}
    assert set(values) == {column.name for column in CONTRACT.features} | {"other"}


def test_values_out_of_range_are_counted_by_feature(metrics: Metrics) -> None:
    unusual = [(FEATURE,), (FEATURE, "of_another_contract"), ()]
    metrics.answered([_scored(0.5, date(2024, 2, 29), outside) for outside in unusual], NOW)
    values = _values(metrics)
    assert values["out_of_range_features_total", FEATURE] == 2
    assert values["out_of_range_features_total", "other"] == 1
    assert ("out_of_range_features_total", "of_another_contract") not in values


def test_a_stage_that_nobody_knows_is_a_mistake_of_ours(metrics: Metrics) -> None:
    with pytest.raises(KeyError):
        metrics.observe("sleeping", 1)


@dataclass
class _Log:
    backlog: int = 3
    spilled_rows: int = 7
    written: int = 100


def test_the_prediction_log_and_the_queue_are_read_when_asked(metrics: Metrics) -> None:
    log, waiting = _Log(), [1, 2]
    metrics.follow_log(log)
    metrics.follow(metrics.queue_depth, lambda: len(waiting))
    assert _values(metrics)["prediction_log_written_total", ""] == 100
    log.backlog, log.spilled_rows, log.written = 0, 1, 110
    waiting.append(3)
    values = _values(metrics)
    assert values["prediction_log_backlog", ""] == 0
    assert values["prediction_log_spilled_rows", ""] == 1
    assert values["prediction_log_written_total", ""] == 110
    assert values["queue_depth", ""] == 3
