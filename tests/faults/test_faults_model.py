"""MLflow away, and promotions in quick succession, under load."""

import time
from itertools import cycle, pairwise

from faults_world import Load, World, free_port, started
from serving_world import Mlflow, eventually, metric, metrics_of

from streamflow.settings import Settings

PROMOTIONS = 25
EVERY_S = 0.2
QUICK_POLLS = "from serving import production; production.POLL_S = 0.05"


def test_promotions_in_quick_succession(world: World, settings: Settings) -> None:
    """Five a second, for a service that reads the ledger more often than that, to take nearly all of them."""
    with started(settings, QUICK_POLLS) as service, Load(service.port, world.users) as load:
        load.goes_on()
        for _, version in zip(range(PROMOTIONS), cycle((2, 3, 1)), strict=False):
            world.platform.decide("promote", version)
            time.sleep(EVERY_S)
        world.platform.decide("promote", 1)
        eventually(lambda: service.client.get("/model").json()["version"] == 1)
        settled = time.monotonic()
        load.goes_on()
        assert metric(metrics_of(service.client), "model_swaps_total", result="taken") > PROMOTIONS / 2
    assert {one.status for one in load.answers} == {200}
    world.check_answers(load)
    world.check_log(load)
    in_order = [one.body["model_version"] for one in sorted(load.predictions, key=lambda one: one.received)]
    assert sum(one != other for one, other in pairwise(in_order)) > PROMOTIONS / 2
    assert set(in_order) == {1, 2, 3}
    assert {one.body["model_version"] for one in load.between(settled)} == {1}


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
    assert {one.body["model_version"] for one in load.between(0, returns)} == {1}
    assert {one.body["model_version"] for one in load.between(taken)} == {2}
    world.check_answers(load)
    world.check_log(load)

    with started(settings) as service, Load(service.port, world.users) as load:
        load.goes_on()
        service.becomes(200, "degraded")
    assert {one.status for one in load.answers} == {200}
    assert {one.body["model_version"] for one in load.answers} == {2}
    world.check_answers(load)
    world.check_log(load)
    world.platform.decide("rollback", 1)
