"""What goes over the wire: closed bodies, problem details on every error, ids of any kind, the description."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import UUID

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, FormatChecker
from litestar.exceptions import HTTPException
from litestar.testing import TestClient
from serving_world import KNOWN, predict, problem, with_a_new_feature

from serving.app import create_app
from serving.features import UnknownUser
from serving.problems import KINDS, kind_of
from serving.schemas import MAX_BATCH, WHOLE_USER_ID
from streamflow.contract import CONTRACT, USER_ID_PATTERN, Contract
from streamflow.errors import ConfigurationError, StreamFlowError
from streamflow.settings import Settings

JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "empty"),
        (b"{", "truncated"),
        (b"\xff", "malformed"),
        (b"null", "object"),
        (b"[]", "object"),
        (b"{}", "user_id"),
        (b'{"user_id": 1}', "user_id"),
        (b'{"user_id": null}', "user_id"),
        (b'{"user_id": "a", "threshold": 0.1}', "threshold"),
        (b'{"user_id": "a\\n"}', "user_id"),
        (b'{"user_id": NaN}', "malformed"),
        (b'{"user_id": -Infinity}', "malformed"),
        (b'{"user_id": 1e999}', "out of range"),
        (b'{"user_id": "a"} {"user_id": "a"}', "trailing"),
        (b'{"user_id": "\xe9"}', "UTF-8"),
        (b'{"user_id": "\xed\xa0\x80"}', "UTF-8"),
        (b'{"\xff": 1}', "UTF-8"),
        (b'{"user_id": "\\ud800"}', "truncated"),
        (b'\xef\xbb\xbf{"user_id": "a"}', "malformed"),
        ('{"user_id": "a"}'.encode("utf-16"), "malformed"),
        ('{"user_id": "a"}'.encode("utf-16-le"), "malformed"),
        (b"[" * 60_000, "nested"),
        (b'{"user_id": "a", "x": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", "nested"),
        (b'{"user_id": "' + b"a" * 65 + b'"}', "user_id"),
    ],
)
def test_a_malformed_body_is_400_and_says_where(shared_api: httpx.Client, body: bytes, says: str) -> None:
    details = problem(shared_api.post("/predict", content=body, headers=JSON), 400, "malformed-request")
    assert says in details["detail"]
    problem(shared_api.post("/predict/batch", content=body, headers=JSON), 400, "malformed-request")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data"},
        {"content-type": "application/problem+json"},
        {"content-type": ";;="},
        {"content-type": "application/json; charset=latin-1"},
        {"content-type": "application/json; charset=utf-16"},
        JSON | {"content-encoding": "gzip"},
        JSON | {"content-encoding": "identity, br"},
    ],
)
def test_another_media_type_charset_or_encoding_is_415(shared_api: httpx.Client, headers: dict[str, str]) -> None:
    content = json.dumps({"user_id": KNOWN}).encode()
    problem(shared_api.post("/predict", content=content, headers=headers), 415, "unsupported-media-type")


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "Application/JSON; charset=utf-8"},
        {"content-type": 'application/json;charset="UTF-8"'},
        {"content-type": "application/json; profile=x"},
        JSON | {"content-encoding": "identity"},
    ],
)
def test_what_says_in_more_words_that_it_is_json_is_json(shared_api: httpx.Client, headers: dict[str, str]) -> None:
    content = json.dumps({"user_id": KNOWN}).encode()
    assert shared_api.post("/predict", content=content, headers=headers).status_code == 200


def test_of_a_key_given_twice_the_last_counts(shared_api: httpx.Client) -> None:
    content = f'{{"user_id": "nobody", "user_id": "{KNOWN}"}}'.encode()
    assert shared_api.post("/predict", content=content, headers=JSON).json()["user_id"] == KNOWN


def _chunks() -> Iterator[bytes]:
    for _ in range(100):
        yield b" " * 1024


def test_a_body_too_large_is_413_announced_or_not(shared_api: httpx.Client) -> None:
    problem(shared_api.post("/predict", content=b" " * 70_000, headers=JSON), 413, "too-large")
    problem(shared_api.post("/predict", content=_chunks(), headers=JSON), 413, "too-large")
    problem(shared_api.post("/predict/batch", content=b" " * 140_000, headers=JSON), 413, "too-large")


@pytest.mark.parametrize(
    ("method", "path", "status", "name"),
    [
        ("GET", "/predict", 405, "method-not-allowed"),
        ("DELETE", "/features/a", 405, "method-not-allowed"),
        ("POST", "/health", 405, "method-not-allowed"),
        ("GET", "/nowhere", 404, "not-found"),
        ("GET", "/features/", 404, "not-found"),
        ("GET", "/schema/nowhere", 404, "not-found"),
    ],
)
def test_errors_of_routing_are_problems_too(
    shared_api: httpx.Client, method: str, path: str, status: int, name: str
) -> None:
    answer = shared_api.request(method, path)
    problem(answer, status, name)
    assert ("allow" in answer.headers) == (status == 405)


def test_every_answer_has_its_own_request_id(shared_api: httpx.Client) -> None:
    answers = [
        shared_api.get("/health"),
        shared_api.get("/health"),
        shared_api.get("/nowhere"),
        predict(shared_api),
        shared_api.get("/schema"),
    ]
    assert len({answer.headers["x-request-id"] for answer in answers}) == len(answers)


@pytest.mark.parametrize(
    ("given", "echoed"),
    [("a", "a"), ("A-z.0_9" * 9, "A-z.0_9" * 9), ("a" * 65, None), ("", None), ("a b", None), ("a:b", None)],
)
def test_a_well_formed_request_id_of_the_caller_comes_back_beside_ours(
    shared_api: httpx.Client, given: str, echoed: str | None
) -> None:
    for path, status in (("/health", 200), ("/nowhere", 404)):
        answer = shared_api.get(path, headers={"X-Request-ID": given})
        assert answer.status_code == status
        assert answer.headers.get("x-caller-request-id") == echoed
        assert UUID(answer.headers["x-request-id"]).version == 4
    assert "x-caller-request-id" not in shared_api.get("/health").headers


SNIPPETS = (
    "'; DROP TABLE users; --",
    "' OR 1=1 --",
    '"',
    "\\",
    "%s",
    "%00",
    "\x00",
    "a" * 10_000,
    "a\n",
    "..",
    "NULL",
    "",
)
anyone = st.one_of(
    st.text(max_size=100),
    st.text(st.characters(max_codepoint=31), max_size=5),
    st.text(st.characters(categories=["Cs"]), min_size=1, max_size=2),
    st.sampled_from(SNIPPETS),
    st.from_regex(r"\A[A-Za-z0-9_.:-]{1,70}\n?\Z"),
)
anything = st.one_of(
    anyone,
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.lists(anyone, max_size=2),
    st.dictionaries(st.text(max_size=3), st.none(), max_size=2),
)
fuzz = settings(max_examples=100, deadline=None, derandomize=True, database=None)


def _is_id(given: Any) -> bool:
    return isinstance(given, str) and re.fullmatch(USER_ID_PATTERN, given) is not None


def _refused(answer: httpx.Response, *, is_id: bool) -> None:
    """What is no id is malformed; what is one and nobody's is unknown."""
    problem(answer, *((404, "unknown-user") if is_id else (400, "malformed-request")))


@fuzz
@given(user_id=anything)
def test_an_id_in_a_body_is_unknown_or_malformed(shared_api: httpx.Client, user_id: Any) -> None:
    one, batch = (json.dumps(body).encode() for body in ({"user_id": user_id}, {"user_ids": [KNOWN, user_id]}))
    _refused(shared_api.post("/predict", content=one, headers=JSON), is_id=_is_id(user_id))
    answer = shared_api.post("/predict/batch", content=batch, headers=JSON)
    if _is_id(user_id):
        known, unknown = answer.json()["results"]
        assert (known["user_id"], unknown["type"]) == (KNOWN, "urn:streamflow:problem:unknown-user")
    else:
        _refused(answer, is_id=False)


@fuzz
@given(user_id=anyone)
def test_an_id_in_a_path_is_unknown_or_malformed(shared_api: httpx.Client, user_id: str) -> None:
    answer = shared_api.get("/features/" + quote(user_id, safe="", errors="surrogatepass").replace(".", "%2E"))
    if "/" in user_id or not user_id:
        problem(answer, 404, "not-found")
    else:
        _refused(answer, is_id=_is_id(user_id))


@fuzz
@given(body=st.binary(max_size=200))
def test_no_bytes_make_predict_fail(shared_api: httpx.Client, body: bytes) -> None:
    _refused(shared_api.post("/predict", content=body, headers=JSON), is_id=False)


@fuzz
@given(quoted=st.binary(max_size=20))
def test_no_bytes_in_a_string_make_predict_fail(shared_api: httpx.Client, quoted: bytes) -> None:
    _refused(
        shared_api.post("/predict", content=b'{"user_id": "' + quoted + b'\n"}', headers=JSON),
        is_id=False,
    )


def test_a_defect_is_500_without_its_secrets(shared_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.predictor.Predictor.predict", lambda *_: 1 / 0)
    with TestClient(create_app(shared_settings), raise_server_exceptions=False) as client:
        answer = client.post("/predict", json={"user_id": KNOWN})
    details = problem(answer, 500, "internal-error")
    assert "division" not in answer.text
    assert details["request_id"]


class _Unmapped(StreamFlowError):
    pass


def test_the_table_of_problems() -> None:
    types = [kind.type for kind in KINDS.values()]
    assert len(types) == len(set(types))
    assert kind_of(UnknownUser("x", ())).status == 404
    assert kind_of(_Unmapped("x")).status == 500
    assert kind_of(HTTPException(status_code=418)).status == 500
    assert all(kind.retry_after_s for kind in KINDS.values() if kind.status == 503)


def _openapi(settings: Settings, contract: Contract) -> dict[str, Any]:
    with TestClient(create_app(settings, contract=contract)) as client:
        description: dict[str, Any] = client.get("/schema/openapi.json").json()
        return description


def _described(settings: Settings, contract: Contract) -> list[dict[str, dict[str, Any]]]:
    """What is said of feature values, wherever it is said: a schema for each service, by its name."""
    schemas = _openapi(settings, contract)["components"]["schemas"]
    places = (("Prediction", "features_used"), ("FeaturesOfUser", "features"))
    return [
        {schema["title"]: schema for schema in schemas[name]["properties"][field]["anyOf"]} for name, field in places
    ]


def test_the_description_lists_the_features_of_each_service(shared_settings: Settings) -> None:
    for contract in (CONTRACT, with_a_new_feature()):
        for schemas in _described(shared_settings, contract):
            assert list(schemas) == ["churn_v1", "churn_v2", "churn_v2_protected"]
            for service in contract.services:
                described = schemas[service.name]
                assert list(described["properties"]) == described["required"] == service.names
                assert described["additionalProperties"] is False
                assert described["description"] == service.description
    for described in schemas.values():
        assert described["properties"]["coupons_used"] == {
            "type": "integer",
            "description": "Coupons used. [coupons]",
            "minimum": 0,
            "maximum": 9,
        }
        assert described["properties"]["monthly_fee"]["type"] == "number"
    assert schemas["churn_v2_protected"]["properties"]["user_gender"]["enum"] == ["Female", "Male"]
    assert "user_gender" not in schemas["churn_v2"]["properties"]


def test_the_description_of_a_single_feature_service_is_that_services(shared_settings: Settings) -> None:
    contract = replace(
        CONTRACT,
        service_views={"churn_v1": CONTRACT.service_views["churn_v1"]},
        service_descriptions={"churn_v1": "The only one."},
        services_with_protected=frozenset(),
    )
    schemas = _openapi(shared_settings, contract)["components"]["schemas"]
    described = schemas["Prediction"]["properties"]["features_used"]
    assert (described["title"], list(described["properties"])) == ("churn_v1", CONTRACT.service("churn_v1").names)


def test_the_description_says_what_a_body_may_be(shared_settings: Settings) -> None:
    schemas = _openapi(shared_settings, CONTRACT)["components"]["schemas"]
    for name in ("PredictRequest", "BatchRequest"):
        assert schemas[name]["additionalProperties"] is False
    assert "additionalProperties" not in schemas["Prediction"]
    ids = schemas["BatchRequest"]["properties"]["user_ids"]
    assert (ids["maxItems"], ids["items"]["pattern"]) == (MAX_BATCH, WHOLE_USER_ID)
    assert schemas["PredictRequest"]["properties"]["user_id"]["pattern"] == WHOLE_USER_ID


def test_the_description_names_every_problem_of_predict(shared_settings: Settings) -> None:
    responses = _openapi(shared_settings, CONTRACT)["paths"]["/predict"]["post"]["responses"]
    assert set(responses) == {"200", "400", "401", "404", "413", "415", "422", "503"}
    assert all("application/problem+json" in responses[status]["content"] for status in responses if status != "200")


def _bodies(operation: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for body in (operation.get("requestBody", {}), *operation["responses"].values()):
        yield from body.get("content", {}).values()


def test_every_body_has_examples_and_they_are_valid(shared_settings: Settings) -> None:
    for contract in (CONTRACT, with_a_new_feature()):
        description = _openapi(shared_settings, contract)
        for path, methods in description["paths"].items():
            for content in _bodies(methods.popitem()[1]):
                schema = {**content["schema"], "components": description["components"]}
                assert ("example" in content) != ("examples" in content), path
                examples = [each["value"] for each in content.get("examples", {}).values()] or [content["example"]]
                for example in examples:
                    Draft202012Validator(schema, format_checker=FormatChecker()).validate(example)
    answers = _openapi(shared_settings, CONTRACT)["paths"]["/predict"]["post"]["responses"]
    example = answers["200"]["content"]["application/json"]["example"]
    assert list(example["features_used"]) == CONTRACT.services[0].names
    problems = answers["503"]["content"]["application/problem+json"]["examples"]
    assert {name: each["value"]["type"] for name, each in problems.items()} == {
        name: f"urn:streamflow:problem:{name}"
        for name in ("stale-features", "overloaded", "no-model", "feature-store-unavailable", "prediction-log-full")
    }
    assert set(problems["no-model"]) == {"summary", "value"}


def test_the_description_says_which_headers_an_answer_has(shared_settings: Settings) -> None:
    description = _openapi(shared_settings, CONTRACT)
    for methods in description["paths"].values():
        for status, answer in methods.popitem()[1]["responses"].items():
            told = {"401": {"WWW-Authenticate"}, "503": {"Retry-After"}}.get(status, set())
            assert set(answer["headers"]) == {"X-Request-ID", "X-Caller-Request-ID"} | told
            assert all(each["$ref"] == f"#/components/headers/{name}" for name, each in answer["headers"].items())
    required = {name for name, header in description["components"]["headers"].items() if header.get("required")}
    assert required == {"X-Request-ID", "WWW-Authenticate", "Retry-After"}


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.external: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag != "script"
        self.external += [str(value) for name, value in attributes if name in ("href", "src") and "//" in str(value)]


def test_the_page_needs_no_internet(shared_settings: Settings) -> None:
    with TestClient(create_app(shared_settings)) as client:
        page = client.get("/schema")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    links = _Links()
    links.feed(page.text)
    assert links.external == []
    assert "http://" not in page.text
    assert "https://" not in page.text
    assert "&quot;user_id&quot;: &quot;7590-VHVEG&quot;" in page.text
    rows = re.findall(r"<tr><td><code>features_used\.(\w+)</code></td><td>([^<]*)</td><td>([^<]*)</td></tr>", page.text)
    assert [name for name, _, _ in rows] == [*CONTRACT.service("churn_v2").names, "user_gender", "user_is_senior"]
    told = {name: (kind, meaning) for name, kind, meaning in rows}
    assert told["monthly_fee"] == ("number", "Fee charged for the month. [currency/month]")
    assert told["has_family"] == ("boolean", "Lives with a partner. Only of churn_v2, churn_v2_protected.")
    assert told["user_is_senior"] == ("boolean", "65 years or older. Only of churn_v2_protected.")
    assert "<td><code>features_used</code></td><td>churn_v1 or churn_v2 or churn_v2_protected</td>" in page.text
    for text in ("POST /predict", "Score one customer", "features_used.monthly_fee", "Fee charged", "Unknown user"):
        assert text in page.text


def test_without_a_database_address_there_is_no_service(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="STREAMFLOW_DATABASE_URL"):
        create_app(Settings(home=tmp_path), clock=lambda: datetime(2024, 1, 1, tzinfo=UTC))
