import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from streamflow import doctor, embedded, stack
from streamflow.database import Database
from streamflow.doctor import Finding, examine
from streamflow.landing import LandingZone
from streamflow.months import Month
from streamflow.settings import Settings
from streamflow.simulate import simulate
from streamflow.warehouse import migrate

NOW = datetime(2024, 3, 1, tzinfo=UTC)
MONTHS = Month.parse_range("2024-01..2024-02")
CHECKS = [
    "Python",
    "packages",
    "home",
    "policy",
    "PostgreSQL",
    "schema",
    "platform role",
    "landing archive",
    "API",
    "MLflow",
    "Dagster",
    "leftovers",
]


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def settings_for(home: Path, database: Database | None, **overrides: Any) -> Settings:
    ports = dict(zip(("api_port", "dagster_port", "mlflow_port"), free_ports(3), strict=True))
    urls = {"database_url": database.url, "owner_database_url": database.owner_url} if database else {}
    return Settings(home=home, **{**ports, **urls, **overrides})


def findings(settings: Settings) -> dict[str, Finding]:
    return {finding.what: finding for finding in examine(settings)}


@pytest.fixture(scope="module")
def migrated(database: Database) -> Database:
    migrate(database)
    return database


@pytest.fixture
def landed(tmp_path: Path) -> LandingZone:
    """A home with two landed months."""
    zone = LandingZone(tmp_path / "home")
    for month, folder in zip(MONTHS, simulate(tmp_path / "months", MONTHS, users=20), strict=True):
        zone.land(folder, month, NOW)
    return zone


def test_a_healthy_installation(landed: LandingZone, migrated: Database) -> None:
    found = findings(settings_for(landed.home, migrated))
    assert [finding.what for finding in found.values() if not finding.ok] == []
    assert list(found) == CHECKS
    assert found["Python"].says == ".".join(map(str, sys.version_info[:3]))
    assert found["packages"].says.endswith("direct dependencies as in requirements.lock")
    assert found["home"].says.startswith(f"{landed.home}, ")
    assert found["policy"].says.startswith("mode manual, ")
    assert found["PostgreSQL"].says.startswith("18.")
    assert found["schema"].says == "at migration 0004"
    assert found["platform role"].says == "streamflow is no superuser and cannot change the ledger"
    assert found["landing archive"].says == "2 months, every file as it landed"
    assert {found[service].says for service in ("API", "MLflow", "Dagster")} == {"not running"}
    assert found["leftovers"].says == "none"


def test_a_check_that_breaks_is_a_finding(tmp_path: Path, migrated: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROJECT_ROOT", tmp_path)
    found = findings(settings_for(tmp_path, migrated))
    assert not found["packages"].ok
    assert found["packages"].says.startswith("could not be checked: FileNotFoundError: ")
    assert list(found) == CHECKS


class TestMachine:
    @pytest.fixture
    def project(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
        """Gives a project that needs Python 4 and three packages its lock file."""
        needs = '["ruff>=0.1", "psycopg[binary]", "nowhere-to-be-found"]'
        (tmp_path / "pyproject.toml").write_text(f'[project]\nrequires-python = ">=4"\ndependencies = {needs}\n')
        monkeypatch.setattr(doctor, "PROJECT_ROOT", tmp_path)
        return lambda lock: (tmp_path / "requirements.lock").write_text(lock) and None

    def test_another_python_is_needed(self, project: Callable[[str], None]) -> None:
        finding = doctor._finding("Python", doctor._python)
        assert not finding.ok
        assert finding.says.endswith(" runs, >=4 is needed; make the virtual environment with that")

    def test_packages_that_differ_from_the_lock(self, project: Callable[[str], None]) -> None:
        project(
            "# comment\n"
            "ruff==0.0.1\n    # via streamflow\n"
            "psycopg==9.9 ; python_full_version < '3'\n"
            "nowhere-to-be-found==1.0\n"
        )
        finding = doctor._finding("packages", doctor._packages)
        assert not finding.ok
        assert finding.says == (
            f"ruff is =={version('ruff')}, locked is ==0.0.1; psycopg is =={version('psycopg')}, locked is nothing; "
            "nowhere-to-be-found is missing, locked is ==1.0; "
            "install requirements.lock into the virtual environment again"
        )

    @pytest.mark.parametrize("home", [Path("/proc/streamflow"), Path(__file__) / "home"])
    def test_a_home_that_cannot_be_written(self, home: Path) -> None:
        finding = doctor._finding("home", lambda: doctor._home(home))
        assert not finding.ok
        assert "cannot be written into" in finding.says
        assert finding.says.endswith("set STREAMFLOW_HOME")
        assert not home.exists()

    def test_a_home_that_is_not_there_yet_stays_so(self, tmp_path: Path) -> None:
        assert doctor._finding("home", lambda: doctor._home(tmp_path / "a" / "b")).ok
        assert list(tmp_path.iterdir()) == []

    def test_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = type("Usage", (), {"free": int(1.96 * 2**30)})
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage)
        finding = doctor._finding("home", lambda: doctor._home(tmp_path))
        assert not finding.ok
        assert finding.says.startswith(f"{tmp_path} has 2.0 GiB free, less than 2 GiB; make room")

    def test_leftovers(self, tmp_path: Path) -> None:
        def find() -> Finding:
            return doctor._finding("leftovers", lambda: doctor._leftovers(tmp_path))

        with process_of_up(tmp_path, supervisor=os.getpid()):
            assert find() == Finding("leftovers", True, f"none; `streamflow up` runs as process {os.getpid()}")
        with process_of_up(tmp_path, supervisor=2**22 + 1) as left, process_of_up(tmp_path / "other", supervisor=1):
            assert find() == Finding(
                "leftovers",
                False,
                f"mlflow (process {left.pid}) of a killed `streamflow up`; the next `streamflow up` stops them",
            )
        assert find() == Finding("leftovers", True, "none")


@contextmanager
def process_of_up(home: Path, *, supervisor: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process as `streamflow up` marks its own."""
    mark = {embedded._MARK: f"mlflow {supervisor} {home}"}
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=mark) as process:
        try:
            yield process
        finally:
            process.kill()


class TestPolicy:
    def test_an_unknown_key(self, tmp_path: Path, migrated: Database) -> None:
        file = tmp_path / "policy.toml"
        file.write_text('mode = "manual"\nfirst_model = "wait"\nlast_model = "wait"\n')
        finding = findings(settings_for(tmp_path, migrated, policy_file=file))["policy"]
        assert not finding.ok
        assert "last_model" in finding.says


class TestDatabase:
    def test_no_answer(self, tmp_path: Path) -> None:
        (port,) = free_ports(1)
        found = findings(settings_for(tmp_path, None, database_url=f"postgresql://a:b@127.0.0.1:{port}/c"))
        assert not found["PostgreSQL"].ok
        assert found["PostgreSQL"].says.startswith("PostgreSQL does not answer: ")
        assert list(found) == [check for check in CHECKS if check not in ("schema", "platform role")]

    def test_the_embedded_server_is_started_and_stopped_again(self, tmp_path: Path) -> None:
        found = findings(settings_for(tmp_path, None))
        assert found["PostgreSQL"].ok
        assert not found["schema"].ok
        assert not (tmp_path / "postgres" / "data" / "postmaster.pid").exists()

    def test_not_migrated(self, tmp_path: Path, new_database: Callable[[], Database]) -> None:
        database = new_database()
        found = findings(settings_for(tmp_path, database))
        assert found["schema"] == Finding(
            "schema", False, "at migration none, this version needs 0004; run `streamflow migrate`"
        )
        assert found["platform role"].says == (
            "streamflow finds no model_versions and no promotion_ledger and no predictions and no reports and no "
            "retraining_attempts; run `streamflow migrate`"
        )

    def test_migrated_by_another_version(self, tmp_path: Path, new_database: Callable[[], Database]) -> None:
        database = new_database()
        migrate(database)
        with database.connect(owner=True) as connection:
            connection.execute("UPDATE streamflow.alembic_version SET version_num = '0000'")
        finding = findings(settings_for(tmp_path, database))["schema"]
        assert not finding.ok
        assert finding.says.startswith("at migration 0000, this version needs 0004; ")

    @pytest.mark.parametrize("right", ["UPDATE", "DELETE", "TRUNCATE"])
    def test_a_role_that_may_change_the_ledger(
        self, tmp_path: Path, new_database: Callable[[], Database], right: str
    ) -> None:
        database = new_database()
        migrate(database)
        with database.connect(owner=True) as connection:
            connection.execute(f"GRANT {right} ON streamflow.promotion_ledger TO streamflow")
        finding = findings(settings_for(tmp_path, database))["platform role"]
        assert not finding.ok
        assert finding.says.startswith("streamflow can change the ledger; ")

    def test_a_role_that_owns_the_ledger(self, tmp_path: Path, migrated: Database) -> None:
        with migrated.connect(owner=True) as connection:
            connection.execute("REVOKE UPDATE, DELETE, TRUNCATE ON streamflow.promotion_ledger FROM CURRENT_USER")
            connection.execute("REVOKE UPDATE, DELETE, TRUNCATE ON streamflow.model_versions FROM CURRENT_USER")
        finding = findings(settings_for(tmp_path, migrated, database_url=migrated.owner_url))["platform role"]
        assert not finding.ok
        assert finding.says.startswith("streamflow_owner can change the ledger; ")


class TestArchive:
    def examined(self, zone: LandingZone) -> Finding:
        return doctor._finding("landing archive", lambda: doctor._archive(zone))

    def test_nothing_has_landed(self, tmp_path: Path) -> None:
        assert self.examined(LandingZone(tmp_path)).says == "no month has landed yet"

    def test_each_damaged_month_is_named(self, landed: LandingZone) -> None:
        january, february = MONTHS
        landed.path(january, "users").unlink()
        archived = landed.path(february, "labels")
        archived.chmod(0o644)
        archived.write_bytes(archived.read_bytes().replace(b"True", b"true", 1))
        finding = self.examined(landed)
        assert not finding.ok
        gone, damaged = finding.says.split("; land that file again")[:2]
        assert gone.endswith("the archived users.csv of 2024-01, is gone")
        assert damaged.endswith("the archived labels.csv of 2024-02, is damaged")

    def test_a_damaged_manifest(self, landed: LandingZone) -> None:
        (landed.home / "landing" / "2024-02" / "manifest.json").write_text("{}")
        finding = self.examined(landed)
        assert not finding.ok
        assert "is damaged" in finding.says


@contextmanager
def answering(answers: dict[str, tuple[int, str]]) -> Iterator[int]:
    """A web server with these answers by path; yields its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers.get(self.path, (404, "<html>not found</html>"))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def readiness(registry: str, reason: str) -> str:
    ready = [{"name": name, "state": "ready", "reason": "fine"} for name in ("model", "feature_store")]
    return json.dumps({"checks": [*ready, {"name": "registry", "state": registry, "reason": reason}]})


class TestServices:
    """The answers of MLflow 3.17.2 and Dagster 1.13.27 are as seen; the API is the real one."""

    def examined(self, **overrides: Any) -> dict[str, Finding]:
        settings = settings_for(Path("unused"), None, **overrides)
        return {finding.what: finding for finding in doctor._services(settings)}

    def test_the_real_api_says_why_it_is_not_ready(self, tmp_path: Path, migrated: Database) -> None:
        settings = settings_for(tmp_path, migrated)
        api = stack.command("api", settings, migrated)
        with subprocess.Popen(api.argv, env={**os.environ, **api.environment}) as process:
            try:
                deadline = time.monotonic() + 30
                while (found := next(doctor._services(settings))).says == "not running":
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
            finally:
                process.terminate()
        assert not found.ok
        assert found.says.startswith("runs and is not ready: model: ")

    def test_answers(self) -> None:
        info = '{"dagster_webserver_version":"1.13.27","dagster_version":"1.13.27","dagster_graphql_version":"1.13.27"}'
        answers = {"/ready": (200, readiness("ready", "")), "/health": (200, "OK"), "/server_info": (200, info)}
        with answering(answers) as port:
            found = self.examined(api_port=port, mlflow_port=port, dagster_port=port)
            assert all(finding.ok for finding in found.values())
            assert found["API"].says == f"ready at http://127.0.0.1:{port}/ready"
            assert found["MLflow"].says == f"answers at http://127.0.0.1:{port}/health"
            assert found["Dagster"].says == f"1.13.27 at http://127.0.0.1:{port}/server_info"

    def test_a_degraded_api(self) -> None:
        with answering({"/ready": (200, readiness("degraded", "MLflow does not answer"))}) as port:
            finding = self.examined(api_port=port)["API"]
        assert finding.ok
        assert finding.says.startswith("degraded (registry: MLflow does not answer) at ")

    @pytest.mark.parametrize(
        "answers",
        [
            {},
            dict.fromkeys(("/ready", "/health", "/server_info"), (200, "<html>hello</html>")),
            dict.fromkeys(("/ready", "/health", "/server_info"), (200, "[]")),
            dict.fromkeys(("/ready", "/health", "/server_info"), (503, '{"checks": null}')),
        ],
    )
    def test_something_else_on_the_ports(self, answers: dict[str, tuple[int, str]]) -> None:
        with answering(answers) as port:
            found = self.examined(api_port=port, mlflow_port=port, dagster_port=port)
        for what, path, variable in (
            ("API", "ready", "API_PORT"),
            ("MLflow", "health", "MLFLOW_PORT"),
            ("Dagster", "server_info", "DAGSTER_PORT"),
        ):
            url = f"http://127.0.0.1:{port}/{path}"
            says = f"something else is at {url}, or it hangs; stop it or set STREAMFLOW_{variable}"
            assert found[what] == Finding(what, False, says)

    def test_something_that_speaks_no_http(self, migrated: Database) -> None:
        with migrated.connect() as connection:
            finding = self.examined(api_port=connection.info.port)["API"]
        assert not finding.ok
        assert "something else" in finding.says

    def test_a_registry_elsewhere(self) -> None:
        with answering({"/health": (200, "OK")}) as port:
            assert self.examined(mlflow_uri=f"http://127.0.0.1:{port}")["MLflow"].ok
        finding = self.examined(mlflow_uri=f"http://127.0.0.1:{port}")["MLflow"]
        assert not finding.ok
        assert finding.says.endswith("start it or correct STREAMFLOW_MLFLOW_URI")
