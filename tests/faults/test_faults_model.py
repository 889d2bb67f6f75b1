"""MLflow away, and a promotion every second, under load."""

import time
from itertools import cycle, pairwise

from faults_world import Answer, Load, World, free_port, started
from serving_world import Mlflow, eventually, metric, metrics_of

from streamflow.settings import Settings

PROMOTIONS = 60
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
