"""A PostgreSQL server of these tests' own, and one platform and one service on it for all that leave them whole."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults_world import PostgresServer, Service, World, free_port, started
from serving_world import Mlflow, Platform, make_tables, train

from streamflow.embedded import postgres
from streamflow.settings import Settings


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    with tempfile.TemporaryDirectory(prefix="streamflow-faults-") as home:
        Path(home).chmod(0o755)
        with postgres(Settings(home=Path(home))) as database:
            yield PostgresServer(Path(home), database)


@pytest.fixture(scope="session")
def world(postgres_server: PostgresServer) -> Iterator[World]:
    """Twelve customers and three versions, of which version 1 is in Production; versions 1 and 3 are the same model."""
    make_tables(postgres_server.database)
    mlflow = Mlflow()
    world = World(Platform(postgres_server.database, mlflow))
    for number in range(12):
        world.add_user(
            f"user-{number}",
            months_active=2 * number,
            monthly_fee=8.0 * number,
            watch_hours_30d=(99 - 9 * number) / 7,
            skips_7d=29 - number,
        )
    first, second = train(1), train(2)
    for version, artifact, threshold in ((1, first, 0.5), (2, second, 0.3), (3, first, 0.7)):
        world.register(version, artifact, threshold)
    for user_id in world.users:
        assert world.expected(user_id, 1)["probability"] != world.expected(user_id, 2)["probability"]
    assert len({world.expected(user_id, 1)["probability"] for user_id in world.users}) > 6
    world.platform.decide("promote", 1)
    yield world
    mlflow.stop()


@pytest.fixture(autouse=True)
def _replay(world: World) -> Iterator[None]:
    """What the test logged must replay to the last bit."""
    yield
    world.check_replay()


@pytest.fixture(scope="session")
def workers() -> int:
    """Of the service; a test may be parametrized by them."""
    return 1


@pytest.fixture
def settings(world: World, tmp_path: Path, workers: int) -> Settings:
    """Settings for a service of the test's own."""
    return world.platform.settings(tmp_path).model_copy(update={"api_port": free_port(), "workers": workers})


@pytest.fixture(scope="session")
def shared_service(world: World, tmp_path_factory: pytest.TempPathFactory, workers: int) -> Iterator[Service]:
    settings = world.platform.settings(tmp_path_factory.mktemp("shared"))
    with started(settings.model_copy(update={"api_port": free_port(), "workers": workers})) as service:
        yield service


@pytest.fixture
def service(shared_service: Service) -> Service:
    """The service that the tests share, which the one before must have left ready."""
    shared_service.becomes(200)
    return shared_service
