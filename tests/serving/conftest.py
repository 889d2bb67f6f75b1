"""The service's fixtures."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import psycopg
import pytest
from serving_world import TYPES, Mlflow, Platform, eventually, named, new_database, running, train

from streamflow.contract import CONTRACT
from streamflow.database import Database
from streamflow.settings import Settings
from streamflow.warehouse import migrate


@pytest.fixture(scope="session")
def artifacts() -> tuple[bytes, bytes]:
    return train(1), train(2)


@pytest.fixture
def mlflow() -> Iterator[Mlflow]:
    server = Mlflow()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def migrated() -> Iterator[str]:
    """The name of a database with all tables and nothing in them."""
    with new_database("template0") as name:
        migrate(Database(named(name), named(name)))
        with psycopg.connect(named(name)) as connection:
            for view in CONTRACT.views:
                features = ", ".join(f"{column.name} {TYPES[column.kind]}" for column in view.columns)
                connection.execute(
                    f'CREATE TABLE online.{view.name} (user_id text COLLATE "C" PRIMARY KEY, '
                    f"event_timestamp timestamptz NOT NULL, created_timestamp timestamptz, {features})"
                )
        yield name


@pytest.fixture
def platform(migrated: str, mlflow: Mlflow) -> Iterator[Platform]:
    """A platform with one published customer and nothing promoted."""
    with new_database(migrated) as name:
        platform = Platform(named(name), mlflow)
        platform.publish()
        yield platform


@pytest.fixture
def settings(platform: Platform, mlflow: Mlflow, tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, database_url=platform.url, mlflow_uri=mlflow.uri)


@pytest.fixture
def serve() -> Iterator[Callable[[Settings], httpx.Client]]:
    with ExitStack() as stack:
        yield lambda settings: stack.enter_context(running(settings))


@pytest.fixture
def api(
    platform: Platform,
    settings: Settings,
    artifacts: tuple[bytes, bytes],
    serve: Callable[[Settings], httpx.Client],
) -> httpx.Client:
    """The service with version 1 in Production."""
    platform.promote(1, artifacts[0])
    client = serve(settings)
    eventually(lambda: client.get("/ready").status_code == 200)
    return client
