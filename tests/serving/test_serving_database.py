"""The database away, restarted and silent: 503 at once, no wrong answer, good again by itself."""

import socket
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import psycopg
import pytest
from psycopg import sql
from serving_world import POSTGRES_URL, Platform, eventually, predict, problem

from streamflow.settings import Settings


def _accept_connections(platform: Platform, *, accept: bool) -> None:
    """Let the database go away, or come back, for everybody."""
    name = urlsplit(platform.url).path[1:]
    with psycopg.connect(POSTGRES_URL, autocommit=True) as server:
        server.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}").format(sql.Identifier(name), accept))
        if not accept:
            server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))


def test_a_database_that_goes_away_and_comes_back(api: httpx.Client, platform: Platform) -> None:
    _accept_connections(platform, accept=False)
    answer = predict(api)
    problem(answer, 503, "feature-store-unavailable")
    assert answer.headers["retry-after"] == "2"
    problem(api.get("/features/7590-VHVEG"), 503, "feature-store-unavailable")
    problem(api.post("/predict/batch", json={"user_ids": ["a"]}), 503, "feature-store-unavailable")
    eventually(lambda: api.get("/ready").status_code == 503)
    problem(api.get("/ready"), 503, "not-ready")
    assert api.get("/health").status_code == 200
    assert api.get("/model").status_code == 200
    time.sleep(4)
    _accept_connections(platform, accept=True)
    eventually(lambda: predict(api).status_code == 200)
    eventually(lambda: api.get("/ready").status_code == 200)


def test_a_quick_restart_fails_no_request(api: httpx.Client, platform: Platform) -> None:
    for _ in range(3):
        _accept_connections(platform, accept=False)
        _accept_connections(platform, accept=True)
        assert predict(api).status_code == 200


class SilentProxy:
    """Passes bytes between the service and PostgreSQL until told to keep silent, as a stopped server does."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = (str(parts.hostname), parts.port or 5432)
        self._talk = threading.Event()
        self._talk.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.url = parts._replace(netloc=f"{parts.netloc.rpartition('@')[0]}@127.0.0.1:{port}").geturl()
        threading.Thread(target=self._accept, daemon=True).start()

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
            far = socket.create_connection(self._target)
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
def proxy(platform: Platform) -> Iterator[SilentProxy]:
    proxy = SilentProxy(platform.url)
    yield proxy
    proxy.talk()
    proxy.close()


@pytest.fixture
def settings(settings: Settings, proxy: SilentProxy) -> Settings:
    return settings.model_copy(update={"database_url": proxy.url})


def test_a_silent_database_costs_a_request_no_more_than_its_timeout(api: httpx.Client, proxy: SilentProxy) -> None:
    proxy.silence()
    for _ in range(3):
        began = time.monotonic()
        problem(predict(api), 503, "feature-store-unavailable")
        assert time.monotonic() - began < 3.5
    eventually(lambda: api.get("/ready").status_code == 503)
    assert api.get("/health").status_code == 200
    proxy.talk()
    eventually(lambda: predict(api).status_code == 200, within_s=10)
    eventually(lambda: api.get("/ready").status_code == 200, within_s=10)
