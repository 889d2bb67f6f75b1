"""MLflow away, and a promotion every second, under load."""

import time
from contextlib import ExitStack
from itertools import cycle, pairwise

import pytest
from faults_world import Answer, Load, Service, World, free_port, started
from serving_world import Mlflow, eventually, metric, metrics_of

from streamflow.settings import Settings

PROMOTIONS = 60
FEWER_PROMOTIONS = 13
EVERY_S = 1.0
PAUSE_S = 0.05


def test_a_promotion_every_second_for_a_minute(world: World, settings: Settings) -> None:
    with started(settings) as service, Load(service.port, world.users, PAUSE_S) as load:
        load.goes_on()
        begun = time.monotonic()
        for number, version in zip(range(PROMOTIONS), cycle((2, 3, 1)), strict=False):
            time.sleep(max(0, begun + number * EVERY_S - time.monotonic()))
            world.platform.decide("promote", version)
        eventually(lambda: service.client.get("/model").json()["version"] == 1)
        settled = time.monotonic()
        load.goes_on()
        assert metric(metrics_of(service.client), "model_swaps_total", result="taken") > PROMOTIONS / 2
    assert {one.status for one in load.answers} == {200}
    world.check_answers(load)
    world.check_log(load)
    in_order = [
        one.predictions[0]["model_version"]
        for one in sorted(load.answers, key=lambda one: one.received)
        if one.predictions
    ]
    assert sum(one != other for one, other in pairwise(in_order)) > PROMOTIONS / 2
    assert set(in_order) == {1, 2, 3}
    assert versions(load.between(settled)) == {1}


@pytest.mark.parametrize("workers", [2], scope="session")
def test_promotions_reach_every_worker(world: World, settings: Settings) -> None:
    with started(settings) as service, ExitStack() as loads:
        eventually(lambda: _versions_of_workers(service) == {1})
        kept = loads.enter_context(Load(service.port, world.users, PAUSE_S))
        load = loads.enter_context(Load(service.port, world.users, PAUSE_S, reconnect=True))
        load.goes_on()
        begun = time.monotonic()
        for number, version in zip(range(FEWER_PROMOTIONS), cycle((2, 3, 1)), strict=False):
            time.sleep(max(0, begun + number * EVERY_S - time.monotonic()))
            world.platform.decide("promote", version)
        eventually(lambda: _versions_of_workers(service) == {2})
        settled = time.monotonic()
        load.goes_on()
        # More than the first of both and all that one of them can have taken since: both follow.
        assert metric(metrics_of(service.client), "model_swaps_total", result="taken") > FEWER_PROMOTIONS + 2
    world.platform.decide("rollback", 1)
    for one in (kept, load):
        assert {answer.status for answer in one.answers} == {200}
        world.check_answers(one)
        world.check_log(one)
        assert versions(one.answers) == {1, 2, 3}
        assert versions(one.between(settled)) == {2}


def _versions_of_workers(service: Service) -> set[int | None]:
    """What the workers serve; None is of one that has no model yet."""
    return {answer.json().get("version") for answer in service.by_worker("/model").values()}


def versions(answers: list[Answer]) -> set[int]:
    return {prediction["model_version"] for one in answers for prediction in one.predictions}


def mlflow_of(world: World, port: int) -> Mlflow:
    """One with the same artifacts."""
    mlflow = Mlflow(port)
    mlflow.files.update(world.platform.mlflow.files)
    return mlflow


def test_mlflow_away(world: World, settings: Settings) -> None:
    port = free_port()
    settings = settings.model_copy(update={"mlflow_uri": f"http://127.0.0.1:{port}"})
    mlflow = mlflow_of(world, port)
    with started(settings) as service, Load(service.port, world.users) as load:
        load.goes_on()
        mlflow.stop()
        service.becomes(200, "degraded")
        world.platform.decide("promote", 2)
        eventually(lambda: service.client.get("/model").json()["refused"] is not None)
        assert service.client.get("/model").json()["refused"]["version"] == 2
        load.goes_on()
        returns = time.monotonic()
        mlflow = mlflow_of(world, port)
        service.becomes(200, "ready")
        eventually(lambda: service.client.get("/model").json()["version"] == 2)
        taken = time.monotonic()
        load.goes_on()
        mlflow.stop()
    assert {one.status for one in load.answers} == {200}
    assert versions(load.between(0, returns)) == {1}
    assert versions(load.between(taken)) == {2}
    world.check_answers(load)
    world.check_log(load)

    with started(settings) as service, Load(service.port, world.users) as load:
        load.goes_on()
        service.becomes(200, "degraded")
    assert {one.status for one in load.answers} == {200}
    assert versions(load.answers) == {2}
    world.check_answers(load)
    world.check_log(load)
    world.platform.decide("rollback", 1)
