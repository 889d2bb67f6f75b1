"""PostgreSQL restarted, frozen, too slow for the connections, and half filled, under load."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from faults_world import AWAY, TURNS, Load, PostgresServer, Service, World, check_outage
from serving_world import eventually, problem

from serving.postgres import CONNECTIONS
from streamflow.contract import CONTRACT


@pytest.mark.parametrize("workers", [1, 2], scope="session")
@pytest.mark.parametrize("fault", ["stopped", "frozen"])
def test_a_server_that_is_away_and_returns(
    fault: str, postgres_server: PostgresServer, world: World, service: Service
) -> None:
    check_outage(world, service, getattr(postgres_server, fault)())


def test_all_connections_in_use(world: World, service: Service) -> None:
    waiting = """
        SELECT count(*) FROM pg_stat_activity
        WHERE wait_event_type = 'Lock' AND query LIKE '%WITH ORDINALITY%' AND pid <> pg_backend_pid()
    """
    asked = [*world.users] * 2
    with Load(service.port, world.users) as load, ThreadPoolExecutor(len(asked)) as callers:
        load.goes_on()
        with world.database.connect() as holder, world.database.connect() as watcher:
            watcher.autocommit = True
            holder.execute("LOCK TABLE online.usage_agg_30d_fv IN ACCESS EXCLUSIVE MODE")
            answers = [callers.submit(service.client.get, f"/features/{user}") for user in asked]
            eventually(lambda: watcher.execute(waiting).fetchone() == (CONNECTIONS,))
            load.goes_on(503, count=2)
        service.becomes(200)
        load.goes_on()
    statuses = [answer.result().status_code for answer in answers]
    assert set(statuses) <= {200, 503}
    assert 503 in statuses
    for user_id, answer in zip(asked, answers, strict=True):
        if answer.result().status_code == 200:
            assert answer.result().json()["features"] == world.expected(user_id, 1)["features_used"]
        else:
            problem(answer.result(), 503, AWAY)
            assert answer.result().headers["retry-after"] == "2"
    world.check_answers(load, AWAY)
    world.check_log(load)


def test_a_view_that_is_there_for_half_of_the_customers(world: World, service: Service) -> None:
    (view,) = [view for view in CONTRACT.views if view.name == "usage_agg_30d_fv"]
    scorer, _ = world.models[1]
    names = [feature.name for feature in scorer.features if feature.view == view.name]
    assert len(names) > 1
    without = list(world.users)[::2]
    with Load(service.port, world.users) as load:
        load.goes_on()
        world.platform.execute(f"DELETE FROM online.{view.name} WHERE user_id = ANY(%s)", without)
        gone = time.monotonic()
        load.goes_on(422, count=60)
        returns = time.monotonic()
        assert service.readiness()[0] == 200
        for user_id in without:
            world.platform.publish(user_id, views=[view.name], **world.users[user_id])
        back = time.monotonic()
        load.goes_on()
    outcomes = [
        (one.route, user_id, outcome.get("missing_features"))
        for one in load.between(gone, returns)
        for user_id, outcome in zip(one.user_ids, one.outcomes, strict=True)
    ]
    for route in {*TURNS}:
        found = {user_id: missing for asked, user_id, missing in outcomes if asked == route}
        assert found == {user_id: names if user_id in without else None for user_id in world.users}
    assert {outcome.get("status", 200) for one in load.between(back) for outcome in one.outcomes} == {200}
    world.check_answers(load, "incomplete-features")
    world.check_log(load)
