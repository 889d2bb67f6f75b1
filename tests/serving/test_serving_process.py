"""The service as its own process: what it imports, how it starts and stops."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest
from serving_world import KNOWN, Platform, eventually

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
    status = client.post("/predict", json={"user_id": sys.argv[1]}).status_code
print(json.dumps([status, sorted({name.partition(".")[0] for name in sys.modules})]))
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
    assert status == 200
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
    assert process.returncode in (0, -signal.SIGTERM)
    events = [json.loads(line) for line in log.decode().splitlines()]
    assert [event["version"] for event in events if event["event"] == "model_served"] == [1, 2]
    assert not [event for event in events if event["level"] in ("warning", "error")]


def test_wrong_settings_are_one_line(shared_settings: Settings) -> None:
    environment = _environment(shared_settings)
    for changes, says in (
        ({"STREAMFLOW_DATABASE_URL": ""}, "STREAMFLOW_DATABASE_URL"),
        ({"STREAMFLOW_API_PORT": "x"}, "STREAMFLOW_API_PORT"),
    ):
        command = [sys.executable, "-m", "serving"]
        done = subprocess.run(
            command, env={**environment, **changes}, cwd=PROJECT_ROOT, capture_output=True, timeout=60
        )
        assert done.returncode == 1
        assert says in done.stderr.decode()
        assert len(done.stderr.decode().splitlines()) == 1
