"""The shortcut of the usual prediction: taken when it may be, and then answering as the framework does."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from litestar.testing import TestClient
from litestar.types import ASGIApp, Receive, Scope, Send
from serving_world import FEATURES, KNOWN, Platform, eventually, metric, metrics_of, running

from serving.app import create_app
from serving.shortcut import Shortcut
from streamflow.settings import Settings

JSON = {"content-type": "application/json"}
UNUSUAL = JSON | {"content-encoding": "identity"}
"""What is allowed and yet goes through the framework."""


@pytest.fixture
def through_the_framework(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of requests that reached the framework."""
    seen: list[str] = []

    def shortcut(app: ASGIApp, service: Any) -> Shortcut:
        async def framework(scope: Scope, receive: Receive, send: Send) -> None:
            seen.append(scope["path"])
            await app(scope, receive, send)

        return Shortcut(framework, service)

    monkeypatch.setattr("serving.app.Shortcut", shortcut)
    return seen


@pytest.fixture
def api(shared_settings: Settings, through_the_framework: list[str]) -> Iterator[httpx.Client]:
    with running(shared_settings) as client:
        eventually(lambda: client.get("/ready").status_code == 200)
        through_the_framework.clear()
        yield client


def _body(user_id: str = KNOWN, **more: Any) -> bytes:
    return json.dumps({"user_id": user_id, **more}).encode()


def _pieces() -> Iterator[bytes]:
    yield _body()


@pytest.mark.parametrize(
    ("content", "headers", "status", "usual"),
    [
        (_body(), JSON, 200, True),
        (_body(), JSON | {"x-request-id": "call-7"}, 200, True),
        (_body(explain="shapley"), JSON, 200, True),
        (_body("nobody"), JSON, 404, True),
        (_body(), UNUSUAL, 200, False),
        (_body(), {"content-type": "application/json; charset=utf-8"}, 200, False),
        (_body(), {}, 415, False),
        (_body(), [*JSON.items(), ("content-type", "text/plain")], 200, False),
        (_body(), JSON | {"host": "a{}"}, 400, False),
        (_pieces(), JSON, 200, False),
        (_body() + b" " * 65_536, JSON, 413, False),
        (b"", JSON, 400, False),
        (_body()[:-1], JSON, 400, False),
        (_body("a\n"), JSON, 400, False),
        (_body(more=1), JSON, 400, False),
        (b'{"user_id": "\xff"}', JSON, 400, False),
        (b"[" * 60_000, JSON, 400, False),
    ],
)
def test_only_the_usual_is_answered_without_the_framework(
    api: httpx.Client, through_the_framework: list[str], content: Any, headers: Any, status: int, usual: bool
) -> None:
    answer = api.post("/predict", content=content, headers=headers)
    assert answer.status_code == status
    assert through_the_framework == ([] if usual else ["/predict"])


def test_other_routes_and_methods_are_the_frameworks(api: httpx.Client, through_the_framework: list[str]) -> None:
    api.get("/predict")
    api.post("/predict/", content=_body(), headers=JSON)
    api.post("/predict/batch", json={"user_ids": [KNOWN]})
    assert len(through_the_framework) == 3


def _told(answer: httpx.Response) -> tuple[int, list[str], dict[str, Any]]:
    """Status, names and kinds of headers, and the body; without what differs between any two answers."""
    body = {name: value for name, value in answer.json().items() if name not in ("request_id", "instance", "timestamp")}
    volatile = ("x-request-id", "date", "content-length")
    headers = [f"{name}: {'' if name in volatile else value}" for name, value in answer.headers.items()]
    return answer.status_code, sorted(headers), body


@pytest.mark.parametrize(
    ("user_id", "more"),
    [(KNOWN, {}), ("nobody", {}), ("incomplete", {}), ("unusual", {}), (KNOWN, {"explain": "shapley"})],
)
def test_both_ways_answer_and_count_alike(
    shared_platform: Platform, api: httpx.Client, user_id: str, more: dict[str, str]
) -> None:
    shared_platform.publish("incomplete", failed_payments_90d=None)
    shared_platform.publish("unusual", monthly_fee=1e6)
    status = _told(api.post("/predict", content=_body(user_id, **more), headers=JSON))[0]
    labels = {"name": "requests_total", "route": "/predict", "status": str(status)}
    before = metric(metrics_of(api), **labels)
    usual, unusual = (api.post("/predict", content=_body(user_id, **more), headers=each) for each in (JSON, UNUSUAL))
    assert _told(usual) == _told(unusual)
    assert metric(metrics_of(api), **labels) == before + 2
    if status == 200 and user_id == KNOWN:
        assert usual.json()["features_used"] == FEATURES


@pytest.mark.parametrize("headers", [JSON, UNUSUAL])
def test_a_defect_is_a_problem_on_both_ways(
    shared_settings: Settings, monkeypatch: pytest.MonkeyPatch, headers: dict[str, str]
) -> None:
    monkeypatch.setattr("serving.predictor.Predictor.predict", lambda *_: 1 / 0)
    with TestClient(create_app(shared_settings), raise_server_exceptions=False) as client:
        answer = client.post("/predict", content=_body(), headers=headers)
    assert (answer.status_code, answer.json()["type"]) == (500, "urn:streamflow:problem:internal-error")
    assert "division" not in answer.text
