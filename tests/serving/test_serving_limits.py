"""Too many requests, callers that go away, and what the request log says of requests."""

import json
import logging
from collections.abc import Callable

import httpx
import pytest
from litestar.testing import TestClient
from serving_world import KNOWN, HalfRequest, eventually, metric, metrics_of, predict, problem, running

from serving.app import create_app
from serving.request_log import LINES_PER_S
from streamflow.settings import Settings


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


Serve = Callable[[Settings], httpx.Client]


def _port(api: httpx.Client) -> int:
    assert api.base_url.port
    return api.base_url.port


def test_beyond_the_limit_requests_are_refused_at_once(shared_settings: Settings, serve: Serve) -> None:
    api = serve(shared_settings.model_copy(update={"max_in_flight": 2}))
    eventually(lambda: api.get("/ready").status_code == 200)
    half = [HalfRequest(_port(api)) for _ in range(2)]
    eventually(lambda: metric(metrics_of(api), "requests_in_flight") == 3)  # with the one that asks
    before = metrics_of(api)
    for answer in (predict(api), api.get("/model"), api.get(f"/features/{KNOWN}"), api.get("/nowhere")):
        assert "ask again" in problem(answer, 503, "overloaded")["detail"]
        assert answer.headers["retry-after"] == "1"
    assert api.get("/health").status_code == 200
    assert api.get("/ready").status_code == 200
    after = metrics_of(api)
    assert metric(after, "requests_shed_total") == metric(before, "requests_shed_total") + 4
    assert metric(after, "requests_total", route="unrouted", status="503") == 4
    stage = {"name": "stage_seconds_count", "stage": "features"}
    assert metric(after, **stage) == metric(before, **stage), "the store was asked for a request that was refused"
    assert [request.finish() for request in half] == [200, 200]
    assert predict(api).status_code == 200


def test_a_body_that_does_not_arrive_is_not_waited_for(
    shared_api: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.routes.BODY_S", 0.2)
    request = HalfRequest(_port(shared_api))
    answer = request.connection.getresponse()
    assert answer.status == 400
    assert json.loads(answer.read())["detail"] == "the body did not arrive within 0.2 seconds"


def test_a_caller_that_goes_away_is_no_failure_of_ours(
    shared_api: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    bad_requests = ("streamflow_requests_total", frozenset({("route", "/predict"), ("status", "400")}))
    before = metrics_of(shared_api).get(bad_requests, 0)
    caplog.clear()
    request = HalfRequest(_port(shared_api))
    eventually(lambda: metric(metrics_of(shared_api), "requests_in_flight") == 2)
    request.connection.close()
    eventually(lambda: metrics_of(shared_api).get(bad_requests, 0) == before + 1)
    assert metric(metrics_of(shared_api), "requests_in_flight") == 1
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


def _lines(caplog: pytest.LogCaptureFixture, event: str) -> list[tuple[str, dict[str, object]]]:
    return [
        (record.levelname, record.fields)  # type: ignore[attr-defined]
        for record in caplog.records
        if record.getMessage() == event
    ]


def test_a_refusal_is_a_line_with_both_ids(
    shared_settings: Settings, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    api = serve(shared_settings)
    eventually(lambda: api.get("/ready").status_code == 200)
    caplog.clear()
    answer = api.post("/predict", json={"user_id": "nobody"}, headers={"X-Request-ID": "call-7"})
    api.get("/model", headers={"X-Request-ID": "not well-formed"})
    other = api.get("/nowhere", headers={"X-Request-ID": "not well-formed"})
    (level, fields), (_, unrouted) = _lines(caplog, "request_refused")
    assert 0 < fields.pop("seconds") < 60  # type: ignore[operator]
    assert level == "INFO"
    assert fields == {
        "request_id": answer.headers["x-request-id"],
        "caller_request_id": "call-7",
        "route": "/predict",
        "status": 404,
        "kind": "unknown-user",
    }
    del unrouted["seconds"]
    assert unrouted == {
        "request_id": other.headers["x-request-id"],
        "route": "unrouted",
        "status": 404,
        "kind": "not-found",
    }
    assert not _lines(caplog, "request_answered")


def test_each_kind_of_refusal_has_its_lines_and_the_rest_is_counted(
    shared_settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("serving.request_log.WINDOW_S", 3600)
    with running(shared_settings) as api:
        for _ in range(LINES_PER_S + 5):
            api.get("/nowhere")
        api.get("/predict")
    kinds = [fields["kind"] for _, fields in _lines(caplog, "request_refused")]
    assert kinds == ["not-found"] * LINES_PER_S + ["method-not-allowed"]
    assert _lines(caplog, "refusals_left_out") == [("INFO", {"kind": "not-found", "count": 5})]


def test_after_a_second_there_are_lines_again(
    shared_settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("serving.request_log.WINDOW_S", 0.3)
    with running(shared_settings) as api:
        for _ in range(LINES_PER_S + 1):
            api.get("/nowhere")
        eventually(lambda: bool(_lines(caplog, "refusals_left_out")))
        before = len(_lines(caplog, "request_refused"))
        api.get("/nowhere")
        assert len(_lines(caplog, "request_refused")) == before + 1


def test_every_failure_is_a_line(
    shared_settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("serving.predictor.Predictor.predict", lambda *_: 1 / 0)
    with TestClient(create_app(shared_settings), raise_server_exceptions=False) as client:
        ids = [client.post("/predict", json={"user_id": KNOWN}).headers["x-request-id"] for _ in range(LINES_PER_S + 5)]
    lines = _lines(caplog, "request_failed")
    assert [fields["request_id"] for _, fields in lines] == ids
    assert {level for level, _ in lines} == {"ERROR"}
    records = [record for record in caplog.records if record.getMessage() == "request_failed"]
    assert all(record.exc_info and record.exc_info[0] is ZeroDivisionError for record in records)


def test_answers_are_logged_when_wanted(
    shared_settings: Settings, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    api = serve(shared_settings.model_copy(update={"access_log": True}))
    answer = api.get("/health")
    ((level, fields),) = _lines(caplog, "request_answered")
    assert (level, fields["request_id"]) == ("INFO", answer.headers["x-request-id"])
    assert (fields["route"], fields["status"]) == ("/health", 200)
