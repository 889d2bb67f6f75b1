"""`streamflow up` as a user runs it: real processes, real ports, an interruption, and a kill at the worst moment."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import psutil
import pytest

from streamflow import embedded
from streamflow.contract import CONTRACT
from streamflow.features import online_digest
from streamflow.months import Month
from streamflow.pipeline import CHURN_MODEL, TRAINING_DATASET, Platform
from streamflow.settings import Settings
from streamflow.simulate import Scenario, simulate
from streamflow.warehouse import month_writes

MONTHS = [Month.parse("2024-01"), Month.parse("2024-02")]
USERS = 800
TIMEOUT_S = 240


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """In the second month churn follows another rule, so that there is reason to train again."""
    folder = tmp_path_factory.mktemp("data")
    simulate(folder, MONTHS, users=USERS, scenario=Scenario(concept_drift_from=MONTHS[1]))
    return folder


@pytest.fixture(scope="module")
def new_settings(tmp_path_factory, quick_training_file):
    def make():
        api, dagster, mlflow, code = free_ports(4)
        home = tmp_path_factory.mktemp("home")
        return Settings(
            home=home,
            api_port=api,
            dagster_port=dagster,
            mlflow_port=mlflow,
            code_port=code,
            training_file=quick_training_file,
        )

    return make


def streamflow(settings, *arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "streamflow", *map(str, arguments)],
        env={**os.environ, **settings.environment()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **options,
    )


def finished(process):
    output, _ = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, output


def running_for(home):
    """Processes other than this one that name the home in their command or environment."""
    found = []
    for process in psutil.process_iter():
        try:
            told = [*process.cmdline(), *process.environ().values()]
        except psutil.Error:
            continue
        if process.pid != os.getpid() and any(str(home) in text for text in told):
            found.append(process)
    return found


def digests(settings):
    """Everything that must come out the same, whatever happened on the way."""
    with embedded.postgres(settings) as database:
        platform = Platform(settings, database)
        kept = (TRAINING_DATASET, CHURN_MODEL, *(str(table.snapshot) for table in CONTRACT.snapshots))
        production = platform.ledger.version(platform.ledger.production())
        return {
            **{(one.relation, str(one.month)): one.digest for one in month_writes(database) if one.relation in kept},
            **{("online", view.name): online_digest(database, view) for view in CONTRACT.views},
            "production": (production.as_of, production.predictions_digest, production.artifact_sha256),
        }


@pytest.fixture(scope="module")
def undisturbed(new_settings, data):
    """A home after one `up --once`, and what that printed."""
    settings = new_settings()
    code, output = finished(streamflow(settings, "up", "--once", "--data", data))
    assert code == 0, output
    return settings, output


def test_once_does_the_main_job_and_leaves_nothing_running(undisturbed):
    settings, output = undisturbed
    assert "StreamFlow is up after" in output
    assert f"http://127.0.0.1:{settings.api_port}/schema" in output
    assert "churns with probability" in output
    assert running_for(settings.home) == []


def test_status_and_models_after_the_main_job(undisturbed):
    settings, _ = undisturbed
    code, output = finished(streamflow(settings, "status", "--json"))
    assert code == 0, output
    status = json.loads(output)
    assert [(month["month"], month["state"], month["rows"]) for month in status["months"]] == [
        ("2024-01", "complete", USERS),
        ("2024-02", "complete", USERS),
    ]
    assert status["production"]["version"] == 1
    assert status["production"]["as_of"] == "2024-01-31"
    assert status["production"]["promoted_by"] == "policy"
    code, output = finished(streamflow(settings, "models", "--json"))
    assert code == 0, output
    assert [(one["version"], one["stage"]) for one in json.loads(output)] == [(1, "Production"), (2, "Staging")]
    assert running_for(settings.home) == []


def test_a_second_start_changes_nothing_answers_and_stops_cleanly_on_interrupt(undisturbed, data):
    settings, _ = undisturbed
    before = digests(settings)
    process = streamflow(settings, "up", "--data", data)
    try:
        embedded.wait_until_ready(f"http://127.0.0.1:{settings.api_port}/ready", "the API", TIMEOUT_S)
        embedded.wait_until_ready(f"http://127.0.0.1:{settings.dagster_port}/server_info", "Dagster", TIMEOUT_S)
        embedded.wait_until_ready(f"http://127.0.0.1:{settings.mlflow_port}/health", "MLflow", TIMEOUT_S)
        user_id = (data / "2024-02" / "users.csv").read_text().splitlines()[1].split(",")[0]
        answer = httpx.post(f"http://127.0.0.1:{settings.api_port}/predict", json={"user_id": user_id})
        assert answer.status_code == 200, answer.text
        assert answer.json()["model_version"] == 1
        assert answer.json()["features_as_of"] == "2024-02-29"
        code, output = finished(
            streamflow(settings, "promote", "2", "--by", "an engineer", "--reason", "newer month", "--override")
        )
        assert code == 0, output
        served = None
        deadline = time.monotonic() + 30
        while served != 2 and time.monotonic() < deadline:
            served = httpx.get(f"http://127.0.0.1:{settings.api_port}/model").json()["version"]
            time.sleep(0.2)
        assert served == 2
        code, output = finished(streamflow(settings, "rollback", "--by", "an engineer", "--reason", "just a test"))
        assert code == 0, output
    finally:
        process.send_signal(signal.SIGINT)
        code, output = finished(process)
    assert code == 0, output
    assert "had landed already" in output
    assert running_for(settings.home) == []
    assert digests(settings) == before


def test_a_taken_port_is_one_clear_line(undisturbed, data):
    settings, _ = undisturbed
    with socket.create_server(("127.0.0.1", settings.api_port)):
        code, output = finished(streamflow(settings, "up", "--once", "--data", data))
    assert code == 1
    assert output == (f"port {settings.api_port} (API) is taken; stop what uses it or set STREAMFLOW_API_PORT\n")


def test_a_missing_data_folder_is_one_clear_line(undisturbed, tmp_path):
    settings, _ = undisturbed
    code, output = finished(streamflow(settings, "up", "--once", "--data", tmp_path / "nowhere"))
    assert code == 1
    assert len(output.splitlines()) == 1
    assert str(tmp_path / "nowhere") in output


def test_kills_in_the_middle_leave_nothing_wrong(new_settings, undisturbed, data):
    """Killed among the data layers of the first month, started again, killed in the training of the second."""
    settings = new_settings()
    for under_way in (
        lambda database: ("usage_agg_30d_snapshots", "2024-01") in written(database),
        lambda database: ("training_dataset", "2024-02") in written(database) and is_training(database),
    ):
        process = streamflow(settings, "up", "--data", data)
        wait_until(under_way, settings, process)
        kill_everything(settings, process)
    code, output = finished(streamflow(settings, "up", "--once", "--data", data))
    assert code == 0, output
    assert running_for(settings.home) == []
    assert digests(settings) == digests(undisturbed[0])


def written(database):
    return {(one.relation, str(one.month)) for one in month_writes(database)}


def is_training(database):
    """Whether a training holds the slot that only one may hold."""
    with database.connect() as connection:
        return connection.execute("SELECT FROM dagster.concurrency_slots WHERE run_id IS NOT NULL").fetchone() == ()


def wait_until(under_way, settings, process):
    """Return as soon as the database shows that something is under way, which then goes on."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (settings.home / "landing" / str(MONTHS[-1])).exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    with embedded.postgres(settings) as database:
        while not under_way(database):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.02)


def kill_everything(settings, process):
    """SIGKILL to every process of the platform at once, the database server included."""
    postmaster = next((settings.home / "postgres").rglob("postmaster.pid")).read_text().splitlines()[0]
    server = psutil.Process(int(postmaster))
    for one in [*running_for(settings.home), server, *server.children(recursive=True)]:
        if one.pid != os.getpid():
            os.kill(one.pid, signal.SIGKILL) if one.is_running() else None
    process.wait(timeout=60)
    process.stdout.close()
