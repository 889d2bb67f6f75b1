"""API keys on the wire: who is let in, what the others are told, and that no key is ever told to anybody."""

import logging
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from litestar.testing import TestClient
from serving_world import KNOWN, HalfRequest, eventually, metric, metrics_of, predict, problem, running

from serving.app import create_app
from streamflow.api_keys import make_key
from streamflow.errors import ConfigurationError
from streamflow.settings import Settings


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "api_keys"


@pytest.fixture(scope="module")
def key(keys_file: Path) -> str:
    make_key(keys_file, "ada")
    return make_key(keys_file, "retention")


@pytest.fixture(scope="module")
def guarded(shared_settings: Settings, keys_file: Path, key: str) -> Settings:
    return shared_settings.model_copy(update={"api_keys_file": keys_file})


@pytest.fixture(scope="module")
def guarded_api(guarded: Settings) -> Iterator[httpx.Client]:
    with running(guarded) as client:
        eventually(lambda: client.get("/ready").status_code == 200)
        yield client


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/predict"),
        ("POST", "/predict/batch"),
        ("GET", f"/features/{KNOWN}"),
        ("GET", "/model"),
        ("GET", "/metrics"),
        ("GET", "/schema"),
        ("GET", "/schema/openapi.json"),
        ("OPTIONS", "/predict"),
        ("GET", "/nowhere"),
        ("GET", "//health"),
        ("GET", "/health/../model"),
    ],
)
def test_without_a_key_everything_else_is_401(guarded_api: httpx.Client, method: str, path: str) -> None:
    answer = guarded_api.request(method, str(guarded_api.base_url).rstrip("/") + path)
    details = problem(answer, 401, "unauthorized")
    assert "Authorization: Bearer KEY" in details["detail"]
    assert answer.headers["www-authenticate"] == 'Bearer realm="streamflow"'


def test_health_and_readiness_need_no_key(guarded_api: httpx.Client) -> None:
    assert guarded_api.get("/health").status_code == 200
    assert guarded_api.get("/ready").status_code == 200


@pytest.mark.parametrize(
    "template",
    [{"Authorization": "Bearer {}"}, {"authorization": "bearer  {}"}, {"X-API-Key": "{}"}, {"x-api-key": "{}"}],
)
def test_a_key_opens_in_either_header(guarded_api: httpx.Client, key: str, template: dict[str, str]) -> None:
    headers = {name: value.format(key) for name, value in template.items()}
    assert guarded_api.post("/predict", json={"user_id": KNOWN}, headers=headers).status_code == 200
    wrong = {name: value.format(key[:-1]) for name, value in template.items()}
    problem(guarded_api.post("/predict", json={"user_id": KNOWN}, headers=wrong), 401, "unauthorized")


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer"},
        {"Authorization": "Basic {}"},
        {"Authorization": "{}"},
        {"X-API-Key": ""},
        {"X-API-Key": "Bearer {}"},
        {"Authorization": "Bearer \xff"},
        {"Cookie": "key={}"},
    ],
)
def test_nothing_else_opens(guarded_api: httpx.Client, key: str, headers: dict[str, str]) -> None:
    raw = {name: value.format(key).encode("latin-1") for name, value in headers.items()}
    problem(guarded_api.get("/model", headers=raw), 401, "unauthorized")  # type: ignore[arg-type]


def test_who_has_no_key_is_refused_before_the_body(guarded_api: httpx.Client) -> None:
    request = HalfRequest(guarded_api.base_url.port or 0)
    assert request.connection.getresponse().status == 401


def test_the_owner_is_logged_and_counted_and_no_key_is(
    guarded: Settings, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    wrong = key[::-1]
    with running(guarded.model_copy(update={"access_log": True})) as api:
        eventually(lambda: api.get("/ready").status_code == 200)
        api.headers["Authorization"] = f"Bearer {key}"
        assert predict(api).status_code == 200
        predict(api, "nobody")
        assert metric(metrics_of(api), "key_requests_total", owner="retention") == 3
        page = api.get("/metrics").text
        api.headers["Authorization"] = f"Bearer {wrong}"
        predict(api)
    logged = {
        (fields["status"], fields.get("key_owner"))
        for record in caplog.records
        if (fields := getattr(record, "fields", {})).get("route") in ("/predict", "unrouted")
    }
    assert logged == {(200, "retention"), (404, "retention"), (401, None)}
    everything = page + "".join(f"{record.getMessage()}{record.__dict__}" for record in caplog.records)
    assert key not in everything
    assert wrong not in everything


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "api.example", ""])  # noqa: S104
def test_beyond_loopback_there_is_no_service_without_keys(
    shared_settings: Settings, guarded: Settings, host: str
) -> None:
    with pytest.raises(ConfigurationError, match=r"is beyond loopback.*STREAMFLOW_API_KEYS_FILE") as refusal:
        create_app(shared_settings.model_copy(update={"host": host}))
    assert "\n" not in str(refusal.value)
    create_app(guarded.model_copy(update={"host": host}))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_on_loopback_keys_are_a_choice(shared_settings: Settings, host: str) -> None:
    create_app(shared_settings.model_copy(update={"host": host}))


def test_the_description_says_how_to_show_a_key_where_keys_are_on(
    guarded: Settings, shared_settings: Settings, key: str
) -> None:
    with TestClient(create_app(guarded)) as client:
        described = client.get("/schema/openapi.json", headers={"X-API-Key": key}).json()
    schemes = described["components"]["securitySchemes"]
    assert (schemes["bearer"]["type"], schemes["bearer"]["scheme"]) == ("http", "bearer")
    assert (schemes["api_key"]["in"], schemes["api_key"]["name"]) == ("header", "X-API-Key")
    assert described["security"] == [{"bearer": []}, {"api_key": []}]
    free = {path for path, methods in described["paths"].items() if methods.popitem()[1].get("security") == [{}]}
    assert free == {"/health", "/ready"}
    with TestClient(create_app(shared_settings)) as client:
        described = client.get("/schema/openapi.json").json()
    assert "security" not in described
    assert "securitySchemes" not in described["components"]
    for path, methods in described["paths"].items():
        answers = methods.popitem()[1]["responses"]
        assert ("401" in answers) == (path not in ("/health", "/ready"))
