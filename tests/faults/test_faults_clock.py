"""The machine's clock set back, under load."""

from collections import Counter
from datetime import UTC, datetime, timedelta

from faults_world import Load, World
from serving_world import eventually, running

from streamflow.settings import Settings

BEFORE = datetime(2024, 4, 1, 0, 0, 30, tzinfo=UTC)
BACK = timedelta(minutes=1)
"""Into the month before, whose partition there isn't yet."""


def test_a_clock_that_is_set_back(world: World, settings: Settings) -> None:
    now = [BEFORE]
    with running(settings, clock=lambda: now[0]) as client:
        eventually(lambda: client.get("/ready").status_code == 200)
        with Load(int(client.base_url.port or 0), world.users) as load:
            load.goes_on()
            now[0] = BEFORE - BACK
            load.goes_on()
            world.platform.decide("promote", 3)
            eventually(lambda: client.get("/model").json()["version"] == 3)
            loaded_at = datetime.fromisoformat(client.get("/model").json()["loaded_at"])
            load.goes_on()
            assert client.get("/ready").status_code == 200
            assert client.get("/metrics").status_code == 200
        world.platform.decide("rollback", 1)
    assert loaded_at == BEFORE - BACK
    assert {one.status for one in load.answers} == {200}
    world.check_answers(load)
    world.check_log(load)
    times = [datetime.fromisoformat(one["timestamp"]) for one in load.predictions]
    assert set(times) == {BEFORE, BEFORE - BACK}
    logged = world.logged(load).values()
    assert Counter(row[-1] for row in logged) == Counter(times)
    with world.database.connect() as connection:
        found = connection.execute(
            "SELECT DISTINCT tableoid::regclass::text, answered_at FROM predictions WHERE caller_request_id = %s",
            (load.name,),
        ).fetchall()
    assert sorted(found) == [("predictions_2024_03", BEFORE - BACK), ("predictions_2024_04", BEFORE)]
