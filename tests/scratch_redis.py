"""Databases of a real Redis for tests, and servers to stop; without a Redis its tests are skipped and say so."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis

CLAIM = "streamflow-tests:claimed"
CLAIMED_FOR_S = 3_600
START_S = 10.0


@contextmanager
def redis_database() -> Iterator[str]:
    """The address of an empty database of the test Redis, claimed for its user and emptied afterwards."""
    address = os.environ.get("STREAMFLOW_TEST_REDIS_URL", "redis://127.0.0.1:6379")
    try:
        databases = range(1, int(redis.Redis.from_url(address).config_get("databases")["databases"]))
    except redis.ConnectionError as failure:
        pytest.skip(f"no Redis at STREAMFLOW_TEST_REDIS_URL ({address}): {failure}")
    for number in databases:
        url = urlsplit(address)._replace(path=f"/{number}").geturl()
        with redis.Redis.from_url(url) as client:
            if not _claims(client):
                continue
            try:
                yield url
            finally:
                client.flushdb()
            return
    pytest.skip(f"no database of the Redis at STREAMFLOW_TEST_REDIS_URL ({address}) is empty")


def _claims(client: Any) -> bool:
    """Take a database that is empty, or was left by a session that died."""
    left = float(client.get(CLAIM) or "inf") < time.time() - CLAIMED_FOR_S
    if left:
        client.flushdb()
    if not client.set(CLAIM, time.time(), nx=True):
        return False
    if client.dbsize() == 1:
        return True
    client.delete(CLAIM)
    return False


class RedisServer:
    """A Redis of a test's own, which it may stop; on the same port when it is started again, with what it held."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = int(probe.getsockname()[1])
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = folder
        self.start()

    def start(self) -> None:
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder)]
        self.process = subprocess.Popen([*command, "--appendonly", "yes"], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + START_S
        while not self._answers():
            assert time.monotonic() < deadline, "redis-server does not start"
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            return bool(redis.Redis.from_url(self.url).ping())
        except redis.ConnectionError:
            return False

    def stop(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        self.process.wait(10)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        self.stop()
        yield
        self.start()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        self.process.send_signal(signal.SIGSTOP)
        yield
        self.process.send_signal(signal.SIGCONT)


@contextmanager
def redis_of_its_own(folder: Path) -> Iterator[RedisServer]:
    """A server that keeps what it holds in the folder."""
    if not shutil.which("redis-server"):
        pytest.skip("no redis-server to start and stop")
    data = folder / "redis"
    data.mkdir()
    server = RedisServer(data)
    try:
        yield server
    finally:
        server.stop()
