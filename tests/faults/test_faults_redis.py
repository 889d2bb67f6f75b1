"""Redis away and silent, under load, in the profile that has the online features there."""

from collections.abc import Iterator

import pytest
from faults_world import Service, World, check_outage, free_port, started
from scratch_redis import RedisServer, redis_of_its_own
from serving_world import Platform


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_of_its_own(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def in_redis(world: World, redis_server: RedisServer) -> World:
    """The same platform, with the customers' features in Redis only."""
    platform = Platform(world.database, world.platform.mlflow, redis_server.url)
    for user_id, features in world.users.items():
        platform.publish(user_id, **features)
    return World(platform, world.users, world.models)


@pytest.fixture(scope="module")
def service(in_redis: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    settings = in_redis.platform.settings(tmp_path_factory.mktemp("home"))
    with started(settings.model_copy(update={"api_port": free_port()})) as service:
        yield service


@pytest.mark.parametrize("fault", ["stopped", "frozen"])
def test_a_redis_that_is_away_and_returns(
    fault: str, redis_server: RedisServer, in_redis: World, service: Service
) -> None:
    check_outage(in_redis, service, getattr(redis_server, fault)())
