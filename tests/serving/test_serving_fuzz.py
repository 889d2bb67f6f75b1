"""Garbage: what is not HTTP, what is not quite, and whatever Schemathesis makes of the description."""

import gzip
import http.client
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from serving_world import KNOWN, eventually, problem, running

from serving.protocol import MAX_HEAD
from streamflow.api_keys import make_key
from streamflow.settings import Settings

PATIENCE_S = 10
BODY = json.dumps({"user_id": KNOWN}).encode()
ALL_OF_IT = b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
POST = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


def _answer(api: httpx.Client, *sent: bytes, ended: bool = False) -> httpx.Response:
    """The first answer to these bytes, after which the caller sends no more if ``ended``."""
    with socket.create_connection(("127.0.0.1", api.base_url.port or 0), timeout=PATIENCE_S) as connection:
        connection.sendall(b"".join(sent))
        if ended:
            connection.shutdown(socket.SHUT_WR)
        return _read(connection)


def _read(connection: socket.socket) -> httpx.Response:
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return httpx.Response(answer.status, headers=answer.getheaders(), content=answer.read())


def _get(path: bytes, *headers: bytes) -> bytes:
    return b"\r\n".join((b"GET " + path + b" HTTP/1.1", b"Host: a", *headers, b"", b""))


def _chunked(*chunks: bytes) -> bytes:
    return (
        POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(b"%x\r\n%s\r\n" % (len(each), each) for each in chunks)
    )


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00" * 20,
        b"hello\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
        b"FROB /predict HTTP/1.1\r\n\r\n",
        b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n",
        _get(b"/features/a\x00b"),
        _get(b"/features/\xc3\xa9"),
        _get(b"/health", b"X A\x00: b"),
        POST + b"Content-Length: -1\r\n\r\n" + BODY,
        POST + b"Content-Length: some\r\n\r\n" + BODY,
        POST + b"Content-Length: 9" + b"9" * 30 + b"\r\n\r\n" + BODY,
        POST + b"Content-Length: 25\r\nContent-Length: 5\r\n\r\n" + BODY,
        POST + b"Content-Length: 25\r\nTransfer-Encoding: chunked\r\n\r\n19\r\n" + BODY + b"\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: gzip\r\n\r\n" + BODY,
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_not_http_is_400(shared_api: httpx.Client, sent: bytes) -> None:
    answer = _answer(shared_api, sent)
    assert problem(answer, 400, "malformed-request")["detail"] == "Invalid HTTP request received."
    assert answer.headers["connection"] == "close"


def _padded(size: int) -> bytes:
    """A head of that many bytes."""
    with_nothing = _get(b"/health", b"X-Padding: ")
    return _get(b"/health", b"X-Padding: " + b"a" * (size - len(with_nothing)))


@pytest.mark.parametrize("given", [b"", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"], ids=["first", "after another"])
def test_a_head_may_have_so_many_bytes(shared_api: httpx.Client, given: bytes) -> None:
    assert len(_padded(MAX_HEAD)) == MAX_HEAD
    with socket.create_connection(("127.0.0.1", shared_api.base_url.port or 0), timeout=PATIENCE_S) as connection:
        if given:
            connection.sendall(given)
            assert _read(connection).status_code == 200
        connection.sendall(_padded(MAX_HEAD))
        assert _read(connection).status_code == 200
        connection.sendall(_padded(MAX_HEAD + 1))
        assert "larger than 32768 bytes" in problem(_read(connection), 400, "malformed-request")["detail"]


ENDLESS = {
    "path": (b"GET /features/", b"a"),
    "header": (b"GET /health HTTP/1.1\r\nX-Header: ", b"a"),
    "headers": (b"GET /health HTTP/1.1\r\n", b"X-Header: abcdef\r\n"),
    "header name": (b"GET /health HTTP/1.1\r\n", b"X"),
    "blank lines": (b"", b"\r\n"),
    "trailers": (POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n \r\n0\r\n", b"X-Trailer: abcdef\r\n"),
    "extension of a chunk": (POST + b"Transfer-Encoding: chunked\r\n\r\n1;", b"a"),
}


@pytest.mark.parametrize("part", ENDLESS)
def test_what_is_no_body_and_does_not_end_is_refused(shared_api: httpx.Client, part: str) -> None:
    begin, more = ENDLESS[part]
    with socket.create_connection(("127.0.0.1", shared_api.base_url.port or 0), timeout=PATIENCE_S) as connection:
        with suppress(ConnectionError):
            connection.sendall(begin + more * 2**20)
        assert "larger than 32768 bytes" in problem(_read(connection), 400, "malformed-request")["detail"]


@pytest.mark.parametrize(
    ("sent", "status", "name"),
    [
        (POST + b"Content-Length: 5\r\n\r\n" + BODY, 400, "malformed-request"),
        (POST + b"Content-Length: 1000000000\r\n\r\n" + BODY, 413, "too-large"),
        (_chunked(*[b" " * 4096] * 20), 413, "too-large"),
        (_chunked(gzip.compress(BODY)) + b"0\r\n\r\n", 400, "malformed-request"),
        (POST + b"Content-Encoding: gzip\r\n" + ALL_OF_IT, 415, "unsupported-media-type"),
        (
            POST.replace(b"application/json", b"\xff\xfe") + b"Content-Length: 2\r\n\r\n{}",
            415,
            "unsupported-media-type",
        ),
        (POST + b"Connection: Upgrade\r\nUpgrade: websocket\r\n" + ALL_OF_IT, 400, "malformed-request"),
        (_get(b"/features/%zz"), 400, "malformed-request"),
        (_get(b"/features/%ff%fe"), 400, "malformed-request"),
        (_get(b"/features/a%0a"), 400, "malformed-request"),
        (_get(b"/features/.."), 400, "malformed-request"),
        (_get(b"/features/a?x=%ff&y"), 404, "unknown-user"),
        (_get(b"/features/a%2Fb"), 404, "not-found"),
        (b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", 404, "not-found"),
        (b"TRACE /predict HTTP/1.1\r\nHost: a\r\n\r\n", 405, "method-not-allowed"),
    ],
)
def test_what_is_http_but_no_request_of_ours_is_a_problem(
    shared_api: httpx.Client, sent: bytes, status: int, name: str
) -> None:
    problem(_answer(shared_api, sent), status, name)


@pytest.mark.parametrize(
    "sent",
    [
        POST + b"".join(b"X-%d: y\r\n" % number for number in range(2000)) + ALL_OF_IT,
        POST + b"Cookie: \xff=\xfe\r\nX-Request-ID: \xff\r\n" + ALL_OF_IT,
        POST + b"Expect: 200-maybe\r\n" + ALL_OF_IT,
        POST + b"Accept: image/png\r\n" + ALL_OF_IT,
        _chunked(*(bytes([byte]) for byte in BODY)) + b"0\r\n\r\n",
    ],
)
def test_what_is_odd_and_well_formed_is_answered(shared_api: httpx.Client, sent: bytes) -> None:
    assert _answer(shared_api, sent).json()["user_id"] == KNOWN


@pytest.mark.parametrize("sent", [POST + b"Content-Length: 25\r\n\r\n" + BODY[:5], _chunked(BODY)])
def test_who_goes_away_in_the_middle_leaves_the_service_well(shared_api: httpx.Client, sent: bytes) -> None:
    with pytest.raises(http.client.RemoteDisconnected):
        _answer(shared_api, sent, ended=True)
    assert shared_api.get("/health").status_code == 200


@pytest.fixture(scope="module")
def guarded_api(shared_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """The service with API keys on; the client shows one."""
    keys = tmp_path_factory.mktemp("keys") / "api_keys"
    key = make_key(keys, "ada")
    with running(shared_settings.model_copy(update={"api_keys_file": keys})) as client:
        eventually(lambda: client.get("/ready").status_code == 200)
        client.headers["Authorization"] = f"Bearer {key}"
        yield client


@pytest.mark.parametrize("fixture", ["shared_api", "guarded_api"])
def test_nothing_that_schemathesis_tries_is_answered_otherwise_than_described(
    request: pytest.FixtureRequest, tmp_path: Path, fixture: str
) -> None:
    """All checks; those of deleted resources and of object-level authorization find nothing to apply to."""
    api: httpx.Client = request.getfixturevalue(fixture)
    headers = [f"--header=Authorization: {key}" for key in [api.headers.get("Authorization")] if key]
    command = [sys.executable, "-m", "schemathesis.cli", "run", str(api.base_url.join("/schema/openapi.json"))]
    options = ["--checks=all", "--max-examples=20", "--generation-deterministic", "--continue-on-failure", "--no-color"]
    done = subprocess.run(
        [*command, *options, f"--request-timeout={PATIENCE_S}", *headers], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Tested: 7\n" in done.stdout
    assert "WARNING" not in done.stdout.upper()
