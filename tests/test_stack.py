import os
import sys
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from streamflow import stack
from streamflow.database import Database
from streamflow.settings import PROJECT_ROOT, Settings

DATABASE = Database(
    "postgresql://platform:secret@127.0.0.1:5432/sf", "postgresql://owner:ownersecret@127.0.0.1:5432/sf"
)
SCRIPTS = Path(sys.executable).parent


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        home=tmp_path / "home",
        database_url=DATABASE.url,
        owner_database_url=DATABASE.owner_url,
        host="127.0.0.2",
        api_port=8101,
        dagster_port=8102,
        mlflow_port=8103,
        code_port=8104,
        actor="anna",
    )


def test_addresses_are_those_of_the_settings(settings: Settings) -> None:
    assert stack.Addresses.of(settings) == stack.Addresses(
        dagster="http://127.0.0.2:8102", mlflow="http://127.0.0.2:8103", api="http://127.0.0.2:8101"
    )


def test_each_service_has_its_command(settings: Settings) -> None:
    workspace = str(PROJECT_ROOT / "streamflow_dagster" / "workspace.yaml")
    expected = {
        "mlflow": [
            *(SCRIPTS / "mlflow", "server", "--host", "127.0.0.2", "--port", "8103"),
            *("--artifacts-destination", settings.home / "mlflow" / "artifacts", "--workers", "1"),
        ],
        "code": [
            *(SCRIPTS / "dagster", "code-server", "start", "--host", "127.0.0.2", "--port", "8104"),
            *("--module-name", "streamflow_dagster.definitions", "--location-name", "streamflow"),
        ],
        "webserver": [
            *(SCRIPTS / "dagster-webserver", "--host", "127.0.0.2", "--port", "8102", "--workspace", workspace),
        ],
        "daemon": [sys.executable, "-m", "streamflow_dagster.daemon", "--workspace", workspace],
        "api": [sys.executable, "-m", "serving"],
    }
    assert {name: stack.command(name, settings, DATABASE).argv for name in stack.SERVICES} == {
        name: tuple(map(str, argv)) for name, argv in expected.items()
    }


@pytest.mark.parametrize("service", stack.SERVICES)
def test_programs_exist(service: str, settings: Settings) -> None:
    assert os.access(stack.command(service, settings, DATABASE).argv[0], os.X_OK)


def test_an_unknown_service_is_a_mistake_of_ours(settings: Settings) -> None:
    with pytest.raises(KeyError):
        stack.command("redis", settings, DATABASE)


def test_the_service_goes_by_the_socket_if_there_is_one(settings: Settings) -> None:
    by_socket = "postgresql://platform:secret@/sf?host=%2Ftmp&port=5432"
    reachable = replace(DATABASE, socket_url=by_socket)
    with_redis = settings.model_copy(update={"online_store": "redis", "redis_url": "redis://r:6379/0"})

    def address(service: str, settings: Settings, database: Database) -> str:
        return stack.command(service, settings, database).environment["STREAMFLOW_DATABASE_URL"]

    assert {name: address(name, settings, reachable) for name in stack.SERVICES} == {
        name: by_socket if name == "api" else DATABASE.url for name in stack.SERVICES
    }
    assert address("api", settings, DATABASE) == DATABASE.url
    assert address("api", with_redis, reachable) == DATABASE.url


@pytest.mark.parametrize("service", stack.SERVICES)
def test_no_service_is_given_the_owner_or_shows_a_password(service: str, settings: Settings) -> None:
    command = stack.command(service, settings, DATABASE)

    assert not any("ownersecret" in value for value in command.environment.values())
    assert command.environment[stack.OWNER_ADDRESS] == "", "an inherited address would be used"
    assert not any("secret" in argument for argument in command.argv)


def test_services_read_back_the_settings_they_were_started_with(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in stack.environment(settings, DATABASE).items():
        monkeypatch.setenv(name, value)

    told = Settings.load()
    assert told.model_dump(exclude={"owner_database_url"}) == settings.model_dump(exclude={"owner_database_url"})
    assert not told.owner_database_url


def test_an_embedded_database_is_named_to_the_services(settings: Settings) -> None:
    embedded = settings.model_copy(update={"database_url": None, "owner_database_url": None})
    assert stack.environment(embedded, DATABASE)["STREAMFLOW_DATABASE_URL"] == DATABASE.url


def test_each_tool_has_its_schema(settings: Settings) -> None:
    told = stack.command("mlflow", settings, DATABASE).environment
    for variable, schema in (
        ("STREAMFLOW_FEAST_REGISTRY_URL", "feast"),
        ("STREAMFLOW_DAGSTER_DATABASE_URL", "dagster"),
        ("MLFLOW_BACKEND_STORE_URI", "mlflow"),
    ):
        address = urlsplit(told[variable])
        assert address.scheme == "postgresql+psycopg2"
        assert address.username == "platform"
        assert f"search_path%3D{schema}" in address.query


def test_only_mlflow_gets_the_store_and_only_the_service_is_sent_to_mlflow(settings: Settings) -> None:
    told = {name: stack.command(name, settings, DATABASE).environment for name in stack.SERVICES}

    assert [name for name in told if "MLFLOW_BACKEND_STORE_URI" in told[name]] == ["mlflow"]
    assert [name for name in told if "STREAMFLOW_MLFLOW_URI" in told[name]] == ["api"]
    assert told["api"]["STREAMFLOW_MLFLOW_URI"] == "http://127.0.0.2:8103"
    assert all(one["DO_NOT_TRACK"] == one["MLFLOW_DISABLE_TELEMETRY"] == "true" for one in told.values())


def test_an_mlflow_elsewhere_is_left_alone(settings: Settings) -> None:
    elsewhere = settings.model_copy(update={"mlflow_uri": "http://mlflow.internal:80"})
    for service in stack.SERVICES:
        told = stack.command(service, elsewhere, DATABASE).environment
        assert told["STREAMFLOW_MLFLOW_URI"] == "http://mlflow.internal:80"


def test_dagsters_home_follows_the_projects_configuration(settings: Settings) -> None:
    home = stack.dagster_home(settings)
    file = home / "dagster.yaml"

    assert home == settings.home / "dagster"
    assert file.read_bytes() == (stack.GRAPH / "dagster.yaml").read_bytes()
    assert "STREAMFLOW_DAGSTER_DATABASE_URL" in str(yaml.safe_load(file.read_text()))

    written = file.stat().st_mtime_ns
    stack.dagster_home(settings)
    assert file.stat().st_mtime_ns == written
    file.write_text("storage: {}\n")
    stack.dagster_home(settings)
    assert file.read_bytes() == (stack.GRAPH / "dagster.yaml").read_bytes()
