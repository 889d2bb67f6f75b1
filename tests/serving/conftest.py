"""The service's fixtures: ``shared_*`` for tests that only ask and add customers, the others for all that change it.

What reads features runs twice: with the online features in PostgreSQL, and in Redis.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path

import httpx
import pytest
from scratch_redis import redis_database
from serving_world import (
    Mlflow,
    Platform,
    copied,
    disconnect,
    eventually,
    make_tables,
    metric,
    metrics_of,
    running,
    train,
)

from streamflow.database import Database
from streamflow.settings import Settings

QUICK_POLL_S = 0.2
ALSO_READ_FEATURES = (
    "test_json_with_a_charset_is_json",
    "test_every_answer_has_its_own_request_id",
    "test_no_id_makes_predict_fail",
    "test_no_id_makes_features_fail",
)
"""Those of test_serving_http."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    reads = metafunc.module.__name__ == "test_serving_predict" or metafunc.function.__name__ in ALSO_READ_FEATURES
    if reads and "profile" in metafunc.fixturenames:
        metafunc.parametrize("profile", ["postgres", "redis"], indirect=True, scope="session")


@pytest.fixture(scope="session")
def profile(request: pytest.FixtureRequest) -> str:
    """Where the online features are."""
    return str(getattr(request, "param", "postgres"))


@pytest.fixture(scope="session", autouse=True)
def _quick_polls() -> Iterator[None]:
    """In this process; the service as its own process keeps its pace."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serving.production.POLL_S", QUICK_POLL_S)
        patch.setattr("serving.closed_loop.POLL_S", QUICK_POLL_S)
        yield


@pytest.fixture(scope="session")
def artifacts() -> tuple[bytes, bytes]:
    return train(1), train(2)


@pytest.fixture(scope="session")
def migrated(new_database: Callable[[], Database], server: Database) -> Database:
    """A database with all tables, as the migrations and Feast make them, and nothing in them."""
    database = new_database()
    make_tables(database)
    disconnect(database, server)
    return database


@pytest.fixture(scope="session")
def shared_platform(
    migrated: Database, server: Database, artifacts: tuple[bytes, bytes], profile: str
) -> Iterator[Platform]:
    """A platform with one published customer and version 1 in Production."""
    mlflow = Mlflow()
    with _redis_of(profile) as redis_url:
        platform = Platform(copied(migrated, server), mlflow, redis_url)
        platform.publish()
        platform.promote(1, artifacts[0])
        yield platform
    mlflow.stop()


def _redis_of(profile: str) -> AbstractContextManager[str | None]:
    return redis_database() if profile == "redis" else nullcontext()


@pytest.fixture(scope="session")
def shared_settings(shared_platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return shared_platform.settings(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="session")
def shared_api(shared_settings: Settings) -> Iterator[httpx.Client]:
    with running(shared_settings) as client:
        eventually(lambda: client.get("/ready").status_code == 200)
        eventually(lambda: metric(metrics_of(client), "closed_loop_read_timestamp_seconds") > 0)
        yield client


@pytest.fixture
def mlflow() -> Iterator[Mlflow]:
    server = Mlflow()
    yield server
    server.stop()


@pytest.fixture
def platform(migrated: Database, server: Database, mlflow: Mlflow, profile: str) -> Iterator[Platform]:
    """A platform with one published customer and nothing promoted."""
    with _redis_of(profile) as redis_url:
        platform = Platform(copied(migrated, server), mlflow, redis_url)
        platform.publish()
        yield platform


@pytest.fixture
def settings(platform: Platform, tmp_path: Path) -> Settings:
    return platform.settings(tmp_path)


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
