"""The service as its own process: what it imports, how it starts and stops."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from serving_world import KNOWN, HalfRequest, Platform, eventually, metric, metrics_of

from streamflow.api_keys import make_key
from streamflow.settings import PROJECT_ROOT, Settings

HEAVY = ("mlflow", "feast", "sklearn", "pandas", "pyarrow", "dagster", "sqlalchemy", "alembic", "matplotlib")

SERVE_ONE_PREDICTION = """
import json, sys, time
from litestar.testing import TestClient
from serving.app import create_app
from streamflow.settings import Settings
import serving.__main__

with TestClient(create_app(Settings.load())) as client:
    deadline = time.monotonic() + 30
    while client.get("/ready").status_code != 200 and time.monotonic() < deadline:
        time.sleep(0.05)
    status = {client.post("/predict", json={"user_id": sys.argv[1]}).status_code, client.get("/").status_code}
print(json.dumps([list(status), sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def _environment(settings: Settings) -> dict[str, str]:
    return {**os.environ, **settings.environment()}


def test_serving_a_prediction_imports_nothing_heavy(
    platform: Platform, settings: Settings, artifacts: tuple[bytes, bytes]
) -> None:
    platform.promote(1, artifacts[0])
    command = [sys.executable, "-c", SERVE_ONE_PREDICTION, KNOWN]
    done = subprocess.run(
        command, env=_environment(settings), cwd=PROJECT_ROOT, capture_output=True, check=True, timeout=60
    )
    status, modules = json.loads(done.stdout)
    assert status == [200]
    assert not set(modules) & set(HEAVY)


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture
def process(
    platform: Platform, settings: Settings, artifacts: tuple[bytes, bytes], port: int
) -> Iterator[subprocess.Popen[bytes]]:
    platform.promote(1, artifacts[0])
    environment = _environment(settings.model_copy(update={"api_port": port}))
    command = [sys.executable, "-m", "serving"]
    with subprocess.Popen(command, env=environment, cwd=PROJECT_ROOT, stderr=subprocess.PIPE) as process:
        yield process
        process.kill()


def _answers(client: httpx.Client, path: str) -> bool:
    try:
        return client.get(path).status_code == 200
    except httpx.TransportError:
        return False


def test_the_process_serves_picks_up_a_promotion_and_stops_cleanly(
    process: subprocess.Popen[bytes], port: int, platform: Platform, artifacts: tuple[bytes, bytes]
) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        eventually(lambda: _answers(client, "/ready"), within_s=30)
        assert client.post("/predict", json={"user_id": KNOWN}).json()["model_version"] == 1
        platform.promote(2, artifacts[1])
        eventually(lambda: client.get("/model").json()["version"] == 2, within_s=5)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=15)
    assert process.returncode == 0
    events = _events(log)
    assert [event["version"] for event in events if event["event"] == "model_served"] == [1, 2]
    assert not [event for event in events if event["level"] in ("warning", "error")]


def _events(log: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.decode().splitlines()]


@pytest.fixture
def two_workers(
    platform: Platform, settings: Settings, artifacts: tuple[bytes, bytes], port: int
) -> Iterator[subprocess.Popen[bytes]]:
    platform.promote(1, artifacts[0])
    environment = _environment(settings.model_copy(update={"api_port": port, "workers": 2}))
    with subprocess.Popen(
        [sys.executable, "-m", "serving"], env=environment, cwd=PROJECT_ROOT, stderr=subprocess.PIPE
    ) as process:
        left = [process.pid]
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
                eventually(lambda: len(_in_flight(client)) == 2, within_s=60)
                left += _in_flight(client)
            ready = f"http://127.0.0.1:{port}/ready"
            # Each on a connection of its own, which either worker may take.
            eventually(lambda: all(httpx.get(ready).status_code == 200 for _ in range(12)), within_s=30)
            yield process
        finally:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _in_flight(client: httpx.Client) -> dict[int, float]:
    """The requests in flight of each worker, by its pid."""
    if not _answers(client, "/metrics"):
        return {}
    return {
        int(dict(labels)["pid"]): value
        for (name, labels), value in metrics_of(client).items()
        if name == "streamflow_requests_in_flight"
    }


def _predictions(client: httpx.Client) -> float:
    return metric(metrics_of(client), "requests_total", route="/predict", status="200")


def test_two_workers_share_the_work_and_finish_it_before_they_stop(
    two_workers: subprocess.Popen[bytes], port: int
) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        assert client.post("/predict", json={"user_id": KNOWN}).status_code == 200
        promoted = ("streamflow_ledger_decisions", frozenset({("action", "promote")}))
        eventually(lambda: metrics_of(client).get(promoted) == 1, within_s=30)
        assert metric(metrics_of(client), "readiness", part="model", state="ready") == 1
        half: list[HalfRequest] = []

        def both_are_busy() -> bool:
            half.append(HalfRequest(port))
            return all(_in_flight(client).values())

        eventually(both_are_busy, within_s=30)
        eventually(lambda: sum(_in_flight(client).values()) >= len(half))
        pids = set(_in_flight(client))
        assert _predictions(client) == 1
    two_workers.send_signal(signal.SIGTERM)
    lines: list[bytes] = []
    assert two_workers.stderr
    while sum(b'"Shutting down"' in line for line in lines) < 2:
        lines.append(two_workers.stderr.readline())
    assert [request.finish() for request in half] == [200] * len(half)
    _, rest = two_workers.communicate(timeout=30)
    assert two_workers.returncode == 0
    events = _events(b"".join(lines) + rest)
    assert {event["pid"] for event in events if event["event"].startswith("Finished server process")} == pids
    assert not [event for event in events if event["level"] in ("warning", "error")]


def test_workers_that_are_killed_are_replaced_and_end_with_their_parent(
    two_workers: subprocess.Popen[bytes], port: int
) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        for _ in range(10):
            assert client.post("/predict", json={"user_id": KNOWN}).status_code == 200
        before = set(_in_flight(client))
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: len(set(_in_flight(client)) - before) == 2, within_s=60)
        assert not set(_in_flight(client)) & before
        assert _predictions(client) == 10
        workers = [psutil.Process(pid) for pid in _in_flight(client)]
    two_workers.kill()
    _, left = psutil.wait_procs(workers, timeout=20)
    for orphan in left:
        orphan.kill()
    assert left == [], "workers without a parent keep the port"
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_several_workers_read_the_keys_anew_on_a_hangup(
    platform: Platform, settings: Settings, artifacts: tuple[bytes, bytes], port: int, tmp_path: Path
) -> None:
    platform.promote(1, artifacts[0])
    file = tmp_path / "api_keys"
    old = make_key(file, "old")
    settings = settings.model_copy(update={"api_port": port, "workers": 2, "api_keys_file": file})
    command = [sys.executable, "-m", "serving"]
    with subprocess.Popen(command, env=_environment(settings), cwd=PROJECT_ROOT, stderr=subprocess.PIPE) as process:
        try:
            eventually(lambda: _statuses(port, old) == {200}, within_s=60)
            file.unlink()
            new = make_key(file, "new")
            assert _statuses(port, new) == {401}
            process.send_signal(signal.SIGHUP)
            eventually(lambda: (_statuses(port, new), _statuses(port, old)) == ({200}, {401}), within_s=60)
            process.terminate()
            _, log = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0
    assert not [event for event in _events(log) if event["level"] == "error"]


def _statuses(port: int, key: str) -> set[int | None]:
    """Of answers on several connections, which either worker may take; None where there is no answer."""
    found: set[int | None] = set()
    with httpx.Client(headers={"X-API-Key": key, "Connection": "close"}) as client:
        for _ in range(12):
            try:
                found.add(client.get(f"http://127.0.0.1:{port}/model").status_code)
            except httpx.TransportError:
                found.add(None)
    return found


WRONG = (
    ({"STREAMFLOW_DATABASE_URL": ""}, "STREAMFLOW_DATABASE_URL"),
    ({"STREAMFLOW_API_PORT": "x"}, "STREAMFLOW_API_PORT"),
    ({"STREAMFLOW_HOST": "192.0.2.1"}, "STREAMFLOW_API_KEYS_FILE"),
    ({"STREAMFLOW_API_KEYS_FILE": "/nowhere/api_keys", "STREAMFLOW_WORKERS": "2"}, "/nowhere/api_keys"),
)


def test_wrong_settings_are_one_line(shared_settings: Settings) -> None:
    environment = _environment(shared_settings)
    for changes, says in WRONG:
        command = [sys.executable, "-m", "serving"]
        done = subprocess.run(
            command, env={**environment, **changes}, cwd=PROJECT_ROOT, capture_output=True, timeout=60
        )
        assert done.returncode == 1
        assert says in done.stderr.decode()
        assert len(done.stderr.decode().splitlines()) == 1
