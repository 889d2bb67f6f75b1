"""The services of one installation: what each is started with, here by `streamflow up` and in containers alike."""

import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from streamflow.database import Database
from streamflow.embedded import Command
from streamflow.features import environment as feast_environment
from streamflow.settings import PREFIX, PROJECT_ROOT, Settings

OWNER_ADDRESS = f"{PREFIX}OWNER_DATABASE_URL"

GRAPH = PROJECT_ROOT / "streamflow_dagster"
SERVICES: Mapping[str, str] = {
    "mlflow": "the model registry and its UI",
    "code": "Dagster's code server, which executes runs",
    "webserver": "the Dagster UI",
    "daemon": "Dagster's queue, schedules and sensors",
    "api": "the prediction service",
}


@dataclass(frozen=True)
class Addresses:
    """Where a person finds the services."""

    dagster: str
    mlflow: str
    api: str

    @classmethod
    def of(cls, settings: Settings) -> "Addresses":
        """The addresses that these settings give."""
        ports = (settings.dagster_port, settings.mlflow_port, settings.api_port)
        return cls(*(f"http://{settings.host}:{port}" for port in ports))


def environment(settings: Settings, database: Database) -> dict[str, str]:
    """What every process of the platform is told: the settings, the database for each tool, Dagster's home.

    Nobody but a migration is given the owner's address; one that a process would inherit is taken away.
    """
    return {
        **settings.environment(),
        **feast_environment(database, settings.online_redis_url),
        OWNER_ADDRESS: "",
        "STREAMFLOW_DAGSTER_DATABASE_URL": database.sqlalchemy("dagster", synchronous_commit="off"),
        "DAGSTER_HOME": str(dagster_home(settings)),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "DO_NOT_TRACK": "true",
    }


def dagster_home(settings: Settings) -> Path:
    """Dagster's home below ours, with the project's dagster.yaml in it."""
    home = settings.home / "dagster"
    home.mkdir(parents=True, exist_ok=True)
    wanted = GRAPH / "dagster.yaml"
    present = home / "dagster.yaml"
    if not present.exists() or present.read_bytes() != wanted.read_bytes():
        shutil.copyfile(wanted, present)
    return home


def command(service: str, settings: Settings, database: Database) -> Command:
    """The program of a service; KeyError for an unknown one."""
    workspace = ("--workspace", str(GRAPH / "workspace.yaml"))
    here = ("--host", settings.host, "--port")
    stored = ("--artifacts-destination", str(settings.home / "mlflow" / "artifacts"))
    graph = ("--module-name", "streamflow_dagster.definitions", "--location-name", "streamflow")
    argv = {
        "mlflow": (_script("mlflow"), "server", *here, str(settings.mlflow_port), *stored, "--workers", "1"),
        "code": (_script("dagster"), "code-server", "start", *here, str(settings.code_port), *graph),
        "webserver": (_script("dagster-webserver"), *here, str(settings.dagster_port), *workspace),
        "daemon": (sys.executable, "-m", "streamflow_dagster.daemon", *workspace),
        "api": (sys.executable, "-m", "serving"),
    }
    variables = environment(settings, database)
    if service == "mlflow":
        # Not an argument, which every user of the machine could read.
        variables["MLFLOW_BACKEND_STORE_URI"] = database.sqlalchemy("mlflow")
        # Eight more processes for jobs of MLflow's that nobody here submits.
        variables["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    if service == "api":
        if not settings.online_redis_url:  # which is read through Feast, and that takes a host
            variables["STREAMFLOW_DATABASE_URL"] = database.socket_url or database.url
        variables["STREAMFLOW_MLFLOW_URI"] = settings.mlflow_uri or Addresses.of(settings).mlflow
    return Command(argv[service], variables)


def _script(name: str) -> str:
    return str(Path(sys.executable).with_name(name))
