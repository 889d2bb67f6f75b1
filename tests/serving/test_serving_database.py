"""The database away, restarted and silent: 503 at once, no wrong answer, good again by itself."""

import asyncio
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from serving_world import KNOWN, Mlflow, Platform, accept_connections, eventually, make_tables, predict, problem

from serving.postgres import CONNECTIONS, Postgres
from streamflow.database import Database
from streamflow.embedded import postgres
from streamflow.settings import Settings

UNAVAILABLE = "PostgreSQL does not answer; the log says why"


def test_a_database_that_goes_away_and_comes_back(
    api: httpx.Client, platform: Platform, server: Database, caplog: pytest.LogCaptureFixture
) -> None:
    accept_connections(platform.database, server, accept=False)
    answer = predict(api)
    assert problem(answer, 503, "feature-store-unavailable")["detail"] == UNAVAILABLE
    assert answer.headers["retry-after"] == "2"
    (logged,) = [record.fields for record in caplog.records if record.getMessage() == "request_unanswered"]  # type: ignore[attr-defined]
    assert logged["request_id"] == answer.headers["x-request-id"]
    assert len(logged["reason"]) > len(f"{UNAVAILABLE}: ")
    problem(api.get(f"/features/{KNOWN}"), 503, "feature-store-unavailable")
    problem(api.post("/predict/batch", json={"user_ids": ["a"]}), 503, "feature-store-unavailable")
    eventually(lambda: api.get("/ready").status_code == 503)
    details = problem(api.get("/ready"), 503, "not-ready")
    assert details["detail"] == f"feature_store: {UNAVAILABLE}"
    assert api.get("/health").status_code == 200
    assert api.get("/model").status_code == 200

    accept_connections(platform.database, server, accept=True)
    eventually(lambda: predict(api).status_code == 200)
    eventually(lambda: api.get("/ready").status_code == 200)


def test_a_quick_restart_fails_no_request(api: httpx.Client, platform: Platform, server: Database) -> None:
    for _ in range(3):
        accept_connections(platform.database, server, accept=False)
        accept_connections(platform.database, server, accept=True)
        assert predict(api).status_code == 200


class Proxy:
    """Passes bytes between the service and PostgreSQL until told to keep silent, as a stopped server does."""

    def __init__(self, url: str) -> None:
        self.lead_to(url)
        self._talk = threading.Event()
        self._talk.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        parts = urlsplit(url)
        self.url = parts._replace(netloc=f"{parts.netloc.rpartition('@')[0]}@127.0.0.1:{port}").geturl()
        threading.Thread(target=self._accept, daemon=True).start()

    def lead_to(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = (str(parts.hostname), parts.port or 5432)

    def silence(self) -> None:
        self._talk.clear()

    def talk(self) -> None:
        self._talk.set()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self._target)
            except ConnectionRefusedError:
                near.close()
                continue
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                self._talk.wait()
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)
        except OSError:
            sink.close()


@pytest.fixture
def proxy(platform: Platform) -> Iterator[Proxy]:
    proxy = Proxy(platform.database.url)
    yield proxy
    proxy.talk()
    proxy.close()


def test_a_silent_database_costs_a_request_no_more_than_its_timeout(
    platform: Platform,
    settings: Settings,
    proxy: Proxy,
    artifacts: tuple[bytes, bytes],
    serve: Callable[[Settings], httpx.Client],
) -> None:
    platform.promote(1, artifacts[0])
    api = serve(settings.model_copy(update={"database_url": proxy.url}))
    eventually(lambda: predict(api).status_code == 200)

    def ask(_: int) -> tuple[httpx.Response, float]:
        began = time.monotonic()
        return predict(api), time.monotonic() - began

    proxy.silence()
    with ThreadPoolExecutor(8) as clients:
        for answer, took_s in clients.map(ask, range(8)):
            assert problem(answer, 503, "feature-store-unavailable")["detail"] == UNAVAILABLE
            assert took_s < 3.5
    eventually(lambda: api.get("/ready").status_code == 503)
    assert api.get("/health").status_code == 200
    proxy.talk()
    eventually(lambda: predict(api).status_code == 200)
    eventually(lambda: api.get("/ready").status_code == 200)


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="streamflow-serving-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def _stop_as_an_operator_would(home: Path) -> None:
    (pid_file,) = home.glob("postgres/**/postmaster.pid")
    postmaster = psutil.Process(int(pid_file.read_text().splitlines()[0]))
    os.kill(postmaster.pid, signal.SIGINT)
    postmaster.wait(30)


def test_a_server_that_restarts(
    home: Path, mlflow: Mlflow, artifacts: tuple[bytes, bytes], serve: Callable[[Settings], httpx.Client]
) -> None:
    own_server = Settings(home=home)
    # The embedded server comes back on another port, one of your own on the same.
    with postgres(own_server) as database, closing(Proxy(database.url)) as proxy:
        make_tables(database)
        platform = Platform(database, mlflow)
        platform.publish()
        platform.promote(1, artifacts[0])
        api = serve(platform.settings(home).model_copy(update={"database_url": proxy.url}))
        eventually(lambda: predict(api).status_code == 200)
        before = predict(api).json()

        _stop_as_an_operator_would(home)
        assert problem(predict(api), 503, "feature-store-unavailable")["detail"] == UNAVAILABLE
        eventually(lambda: api.get("/ready").status_code == 503)

        with postgres(own_server) as database:
            proxy.lead_to(database.url)
            eventually(lambda: predict(api).status_code == 200)
            eventually(lambda: api.get("/ready").status_code == 200)
            assert {**predict(api).json(), "request_id": ""} == {**before, "request_id": ""}


def test_queries_share_a_few_connections_and_one_that_is_given_up_loses_its_own(server: Database) -> None:
    async def backend(postgres: Postgres, seconds: float = 0) -> int:
        ((backend, _),) = await postgres.fetch("SELECT pg_backend_pid(), pg_sleep($1)", seconds)
        return int(backend)

    async def ask() -> None:
        async with Postgres(server.url) as postgres:
            one_by_one = {await backend(postgres) for _ in range(3)}
            assert len(one_by_one) == 1
            at_once = set(await asyncio.gather(*(backend(postgres, 0.02) for _ in range(3 * CONNECTIONS))))
            assert one_by_one < at_once
            assert len(at_once) == CONNECTIONS
            for _ in range(2 * CONNECTIONS):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.05):
                        await backend(postgres, 1.4)
            assert await backend(postgres) not in at_once

    asyncio.run(ask())
