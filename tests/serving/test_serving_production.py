"""Which model is served: promotion, rollback, refusal, the cache, and what /ready says meanwhile."""

import asyncio
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from serving_world import (
    FEATURES,
    FURTHER_FEATURES,
    KNOWN,
    Mlflow,
    Platform,
    eventually,
    predict,
    problem,
    train,
    with_a_new_feature,
)

import serving.production
from serving import artifacts as model_cache
from serving.artifacts import KEPT, NOT_CONFIGURED
from serving.production import REFUSED_RETRY_S
from streamflow.contract import CONTRACT
from streamflow.embedded import PLATFORM_ROLE
from streamflow.scoring import Scorer, sha256
from streamflow.settings import Settings
from streamflow.training import ModelSpec

Serve = Callable[[Settings], httpx.Client]
Artifacts = tuple[bytes, bytes]


def _checks(answer: httpx.Response) -> dict[str, tuple[str, str]]:
    return {check["name"]: (check["state"], check["reason"]) for check in answer.json()["checks"]}


def _served_version(api: httpx.Client) -> int:
    version: int = api.get("/model").json()["version"]
    return version


def test_nothing_promoted_is_said_and_then_picked_up(
    platform: Platform, settings: Settings, artifacts: Artifacts, serve: Serve
) -> None:
    api = serve(settings)
    assert api.get("/health").json() == {"status": "alive"}
    eventually(lambda: "streamflow promote" in api.get("/ready").text)
    details = problem(api.get("/ready"), 503, "not-ready")
    assert "model" in details["detail"]
    assert _checks(api.get("/ready"))["feature_store"][0] == "ready"
    assert api.get("/ready").headers["retry-after"] == "2"
    for answer in (predict(api), api.get("/model"), api.get("/features/7590-VHVEG")):
        assert "streamflow promote" in problem(answer, 503, "no-model")["detail"]
        assert int(answer.headers["retry-after"]) > 0
    platform.promote(1, artifacts[0])
    eventually(lambda: predict(api).status_code == 200)
    assert api.get("/ready").json()["status"] == "ready"


def test_only_a_promotion_or_a_rollback_changes_what_is_served(
    api: httpx.Client, platform: Platform, artifacts: Artifacts
) -> None:
    platform.register(2, artifacts[1])
    for action in ("wait", "refuse", "flag"):
        platform.decide(action, 2)
    platform.decide("threshold", 2, threshold=0.9)
    platform.decide("flag", 77)
    time.sleep(5 * serving.production.POLL_S)
    assert (_served_version(api), api.get("/model").json()["threshold"]) == (1, 0.5)


def test_a_threshold_that_was_decided_is_served_without_loading_the_model_again(
    api: httpx.Client, platform: Platform, artifacts: Artifacts, caplog: pytest.LogCaptureFixture
) -> None:
    platform.mlflow.stop()
    caplog.clear()
    before = predict(api).json()
    for threshold, prediction in ((before["probability"], 1), (np.nextafter(before["probability"], 1), 0)):
        platform.decide("threshold", 1, threshold=float(threshold))
        eventually(lambda threshold=threshold: predict(api).json()["threshold"] == threshold, within_s=2)
        answer = predict(api).json()
        assert (answer["prediction"], answer["probability"]) == (prediction, before["probability"])
        assert api.get("/model").json()["threshold"] == threshold
    assert not [record for record in caplog.records if record.getMessage() == "model_served"]
    assert _served_version(api) == 1


def test_a_version_that_comes_back_has_the_threshold_that_was_decided_for_it(
    api: httpx.Client, platform: Platform, artifacts: Artifacts
) -> None:
    platform.decide("threshold", 1, threshold=0.2)
    platform.promote(2, artifacts[1])
    eventually(lambda: _served_version(api) == 2)
    assert api.get("/model").json()["threshold"] == 0.5
    platform.decide("rollback", 1)
    eventually(lambda: _served_version(api) == 1)
    assert api.get("/model").json()["threshold"] == 0.2


def test_model_says_what_is_served(api: httpx.Client, artifacts: Artifacts) -> None:
    assert api.get("/model").json() == {
        "version": 1,
        "run_id": "run-1",
        "service": "churn_v1",
        "as_of": "2024-01-31",
        "threshold": 0.5,
        "promoted_at": "2024-02-02T00:00:00Z",
        "loaded_at": "2024-03-01T12:30:00Z",
        "artifact_sha256": sha256(artifacts[0]),
        "refused": None,
    }


def test_promotion_and_rollback_are_served_without_restart_and_without_a_failed_request(
    api: httpx.Client, platform: Platform, artifacts: Artifacts
) -> None:
    seen: list[tuple[int, int, float]] = []
    done = threading.Event()

    def load() -> None:
        with httpx.Client(base_url=api.base_url) as client:
            while not done.is_set():
                answer = predict(client)
                body = answer.json()
                seen.append((answer.status_code, body["model_version"], body["probability"]))

    load_thread = threading.Thread(target=load)
    load_thread.start()
    try:
        platform.promote(2, artifacts[1])
        eventually(lambda: _served_version(api) == 2)
        platform.decide("rollback", 1)
        eventually(lambda: _served_version(api) == 1)
    finally:
        done.set()
        load_thread.join()
    assert {status for status, _, _ in seen} == {200}
    assert len({(version, probability) for _, version, probability in seen}) == 2


@pytest.mark.parametrize(("name", "calibrated"), [("churn_v2", True), ("churn_v2_protected", False)])
def test_a_version_on_other_features_is_served_without_a_change_of_code(
    api: httpx.Client, platform: Platform, name: str, calibrated: bool
) -> None:
    service = CONTRACT.service(name)
    artifact = train(4, ModelSpec("logistic_regression", service, calibrated, threshold=0.4))
    before = predict(api).json()
    assert list(before["features_used"]) == CONTRACT.service("churn_v1").names
    platform.promote(2, artifact, service=name, threshold=0.4)
    eventually(lambda: _served_version(api) == 2)
    held = FEATURES | FURTHER_FEATURES
    answer = predict(api).json()
    assert answer["features_used"] == {feature: held[feature] for feature in service.names}
    assert list(answer["features_used"]) == service.names
    (probability,) = Scorer.from_bytes(artifact).score([[held[feature] for feature in service.names]]).tolist()
    assert (answer["probability"], answer["prediction"]) == (probability, int(probability >= 0.4))
    assert api.get(f"/features/{KNOWN}").json()["features"] == answer["features_used"]
    assert api.get("/model").json()["service"] == name
    platform.publish("newcomer", contract_type=None)
    assert problem(predict(api, "newcomer"), 422, "incomplete-features")["missing_features"] == ["contract_type"]
    platform.decide("rollback", 1)
    eventually(lambda: _served_version(api) == 1)
    assert {**predict(api).json(), "request_id": "", "timestamp": ""} == {**before, "request_id": "", "timestamp": ""}
    assert predict(api, "newcomer").status_code == 200


def _altered(artifact: bytes) -> bytes:
    return artifact[:-1] + bytes([artifact[-1] ^ 1])


def test_an_artifact_of_another_digest_is_refused_and_the_old_one_goes_on(
    api: httpx.Client, platform: Platform, mlflow: Mlflow, artifacts: Artifacts
) -> None:
    platform.register(2, artifacts[1])
    mlflow.files["run-2", "scorer.bin"] = _altered(artifacts[1])
    platform.decide("promote", 2)
    eventually(lambda: api.get("/model").json()["refused"] is not None)
    refused = api.get("/model").json()["refused"]
    assert refused["version"] == 2
    assert sha256(artifacts[1]) in refused["reason"]
    assert predict(api).json()["model_version"] == 1
    ready = api.get("/ready")
    assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
    assert _checks(ready)["model"] == (
        "degraded",
        f"version 1 is served, not Production's 2: {refused['reason']}",
    )
    platform.decide("rollback", 1)
    eventually(lambda: api.get("/ready").json()["status"] == "ready")
    assert api.get("/model").json()["refused"] is None


@pytest.mark.parametrize(
    ("spoil", "changes", "reason"),
    [
        (lambda artifact: b"not a scorer", {}, "no compiled scorer"),
        (_altered, {}, "checksum"),
        (lambda artifact: artifact, {"service": "churn_v9"}, "churn_v9"),
    ],
)
def test_an_artifact_that_fails_its_own_checks_is_refused(
    platform: Platform,
    settings: Settings,
    artifacts: Artifacts,
    serve: Serve,
    spoil: Callable[[bytes], bytes],
    changes: dict[str, str],
    reason: str,
) -> None:
    platform.promote(1, spoil(artifacts[0]), **changes)
    api = serve(settings)
    eventually(lambda: reason in api.get("/ready").text)
    assert reason in problem(predict(api), 503, "no-model")["detail"]


def test_a_refused_artifact_is_tried_again_later(
    api: httpx.Client, platform: Platform, mlflow: Mlflow, artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert REFUSED_RETRY_S > 5
    monkeypatch.setattr("serving.production.REFUSED_RETRY_S", 1.0)
    platform.register(2, artifacts[1])
    mlflow.files["run-2", "scorer.bin"] = b"half"
    platform.decide("promote", 2)
    eventually(lambda: api.get("/model").json()["refused"] is not None)
    mlflow.files["run-2", "scorer.bin"] = artifacts[1]
    eventually(lambda: _served_version(api) == 2)


def _logged(caplog: pytest.LogCaptureFixture, event: str) -> list[str]:
    return [record.fields["reason"] for record in caplog.records if record.getMessage() == event]  # type: ignore[attr-defined]


def test_online_tables_that_lose_a_feature_are_unavailable(
    api: httpx.Client, platform: Platform, caplog: pytest.LogCaptureFixture
) -> None:
    platform.execute("ALTER TABLE online.payments_agg_90d_fv RENAME COLUMN failed_payments_90d TO elsewhere")
    eventually(lambda: api.get("/ready").status_code == 503)
    says = "PostgreSQL refuses a query (UndefinedColumn); the log says why"
    assert _checks(api.get("/ready"))["feature_store"] == ("unavailable", says)
    assert problem(predict(api), 503, "feature-store-unavailable")["detail"] == says
    for event in ("readiness_changed", "request_unanswered"):
        assert any("failed_payments_90d does not exist" in reason for reason in _logged(caplog, event))
    platform.execute("ALTER TABLE online.payments_agg_90d_fv RENAME COLUMN elsewhere TO failed_payments_90d")
    eventually(lambda: predict(api).status_code == 200)


def test_a_role_that_may_not_read_the_ledger_serves_on_but_is_not_ready(api: httpx.Client, platform: Platform) -> None:
    platform.execute(f"REVOKE SELECT ON streamflow.promotion_ledger FROM {PLATFORM_ROLE}", owner=True)
    eventually(lambda: api.get("/ready").status_code == 503)
    assert "InsufficientPrivilege" in _checks(api.get("/ready"))["feature_store"][1]
    assert predict(api).status_code == 200
    platform.execute(f"GRANT SELECT ON streamflow.promotion_ledger TO {PLATFORM_ROLE}", owner=True)
    eventually(lambda: api.get("/ready").status_code == 200)


def test_a_version_whose_features_are_not_online_is_refused_until_they_are(
    api: httpx.Client, platform: Platform, caplog: pytest.LogCaptureFixture
) -> None:
    platform.promote(2, train(3, contract=with_a_new_feature()))
    eventually(lambda: "UndefinedColumn" in api.get("/ready").text)
    assert (api.get("/ready").status_code, _served_version(api)) == (200, 1)
    assert any("coupons_used does not exist" in reason for reason in _logged(caplog, "model_refused"))
    assert predict(api).status_code == 200
    platform.execute("ALTER TABLE online.payments_agg_90d_fv ADD coupons_used bigint DEFAULT 7")
    eventually(lambda: _served_version(api) == 2)
    assert predict(api).json()["features_used"]["coupons_used"] == 7


def test_a_registry_that_is_away_is_named_without_its_address(
    platform: Platform, settings: Settings, artifacts: Artifacts, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    platform.promote(1, artifacts[0])
    platform.mlflow.stop()
    api = serve(settings)
    says = "MLflow does not answer; the log says why"
    eventually(lambda: says in problem(predict(api), 503, "no-model")["detail"])
    eventually(lambda: _checks(api.get("/ready"))["registry"] == ("degraded", says))
    for event in ("readiness_changed", "model_refused"):
        assert any(f"{says}: " in reason for reason in _logged(caplog, event))


def test_with_the_registry_down_the_service_starts_from_its_cache_and_says_degraded(
    api: httpx.Client, platform: Platform, settings: Settings, mlflow: Mlflow, artifacts: Artifacts, serve: Serve
) -> None:
    mlflow.status = 500
    eventually(lambda: api.get("/ready").json()["status"] == "degraded")
    again = serve(settings)
    eventually(lambda: predict(again).status_code == 200)
    eventually(lambda: "500" in _checks(again.get("/ready"))["registry"][1])
    assert again.get("/ready").json()["status"] == "degraded"
    platform.promote(2, artifacts[1])
    eventually(lambda: api.get("/model").json()["refused"] is not None)
    assert predict(api).json()["model_version"] == 1
    mlflow.status = 200
    eventually(lambda: _served_version(api) == 2)
    eventually(lambda: api.get("/ready").json()["status"] == "ready")


def test_a_damaged_cache_is_not_trusted(
    platform: Platform, settings: Settings, artifacts: Artifacts, mlflow: Mlflow, serve: Serve
) -> None:
    cached = settings.home / "cache" / "models" / sha256(artifacts[0])
    cached.parent.mkdir(parents=True)
    cached.write_bytes(artifacts[1])
    mlflow.status = 500
    platform.promote(1, artifacts[0])
    api = serve(settings)
    eventually(lambda: "MLflow" in problem(predict(api), 503, "no-model")["detail"])
    mlflow.status = 200
    eventually(lambda: predict(api).status_code == 200)
    assert cached.read_bytes() == artifacts[0]
    assert list(cached.parent.iterdir()) == [cached]


def test_without_a_registry_only_the_cache_serves(
    platform: Platform, settings: Settings, artifacts: Artifacts, serve: Serve
) -> None:
    platform.promote(1, artifacts[0])
    api = serve(settings.model_copy(update={"mlflow_uri": None}))
    eventually(lambda: NOT_CONFIGURED in problem(predict(api), 503, "no-model")["detail"])
    cached = settings.home / "cache" / "models" / sha256(artifacts[0])
    cached.parent.mkdir(parents=True)
    cached.write_bytes(artifacts[0])
    eventually(lambda: predict(api).status_code == 200)
    assert _checks(api.get("/ready"))["registry"] == ("degraded", NOT_CONFIGURED)


def test_a_cache_that_cannot_be_written_is_no_reason_not_to_serve(
    platform: Platform, settings: Settings, artifacts: Artifacts, serve: Serve
) -> None:
    (settings.home / "cache").write_text("in the way")
    platform.promote(1, artifacts[0])
    api = serve(settings)
    eventually(lambda: predict(api).status_code == 200)


def test_the_artifacts_that_were_not_used_for_longest_leave_the_cache(tmp_path: Path, mlflow: Mlflow) -> None:
    old = [(f"artifact {number}".encode(), 1_000_000 + number) for number in range(KEPT + 2)]
    for data, used_at in old:
        (tmp_path / sha256(data)).write_bytes(data)
        os.utime(tmp_path / sha256(data), (used_at, used_at))
    (tmp_path / "of a killed process.partial").write_bytes(b"")
    os.utime(tmp_path / "of a killed process.partial", (1, 1))
    mlflow.files["run", "scorer.bin"] = b"new"

    async def load() -> None:
        async with model_cache.Artifacts(mlflow.uri, tmp_path) as artifacts:
            oldest = old[0][0]
            assert await artifacts.load("run", "gone from MLflow", sha256(oldest)) == oldest
            assert await artifacts.load("run", "scorer.bin", sha256(b"new")) == b"new"

    asyncio.run(load())
    kept = [data for data, _ in old[-(KEPT - 2) :]]
    assert {file.name for file in tmp_path.iterdir()} == {sha256(data) for data in (*kept, old[0][0], b"new")}
