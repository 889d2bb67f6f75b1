"""The service told to stop, and killed, under load."""

import signal
import time

import psutil
import pytest
from faults_world import CLIENTS, Load, World, started
from serving_world import HalfRequest, eventually

from streamflow.settings import Settings

UNLOGGED_S = 0.5
"""How long before a kill a prediction must have been answered to be in the log for certain."""


@pytest.mark.parametrize("workers", [1, 2], scope="session")
def test_a_stop_answers_what_was_accepted_and_logs_it(world: World, settings: Settings) -> None:
    with started(settings) as service, Load(service.port, world.users) as load:
        load.goes_on()
        half = [HalfRequest(service.port, {"X-Request-ID": load.name}, user_id) for user_id in world.users]
        eventually(lambda: service.total("requests_in_flight") > len(half))
        stopped = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        load.goes_on(None)
        assert service.process.poll() is None
        finished = [request.finish() for request in half]
        assert service.process.wait(15) == 0
    assert finished == [200] * len(half)
    assert all(one.received > stopped for one in load.answers if one.response is None)
    world.check([one for one in load.answers if one.response])
    logged = world.logged(load)
    answered = {prediction["request_id"] for prediction in load.predictions}
    assert answered < set(logged)
    assert len(logged) == len(answered) + len(half)


@pytest.mark.parametrize("workers", [2], scope="session")
def test_a_worker_that_is_killed_is_replaced_by_one_that_answers_from_its_first_request(
    world: World, settings: Settings
) -> None:
    with started(settings) as service:
        eventually(lambda: {answer.status_code for answer in service.by_worker("/ready").values()} == {200})
        with Load(service.port, world.users, reconnect=True) as load:
            load.goes_on()
            before = set(service.by_worker("/ready"))
            for pid in before:
                psutil.Process(pid).kill()
                eventually(lambda pid=pid: not psutil.pid_exists(pid))
                eventually(lambda pid=pid: pid not in service.by_worker("/ready"))
                load.goes_on()
            after = set(service.by_worker("/ready"))
    assert len(after) == 2
    assert not after & before
    # What a worker had accepted when it was killed is lost with it; nothing is refused.
    assert {one.status for one in load.answers} <= {200, None}
    lost = [one for one in load.answers if one.response is None]
    assert len(lost) <= 2 * CLIENTS
    world.check([one for one in load.answers if one.response])


@pytest.mark.parametrize("workers", [1, 2], scope="session")
def test_a_kill_loses_only_the_newest_rows_and_the_next_start_takes_up_the_rest(
    world: World, settings: Settings
) -> None:
    spilled = settings.home / "cache" / "predictions"
    with started(settings) as service, Load(service.port, world.users) as load:
        load.goes_on()
        with world.database.connect(owner=True) as busy:
            busy.execute("LOCK TABLE streamflow.predictions IN ACCESS EXCLUSIVE MODE")
            eventually(lambda: service.total("prediction_log_spilled_rows") > 50)
            load.goes_on()
            killed = time.monotonic()
            service.kill()
            gone = time.monotonic()
        left = [file for file in spilled.glob("*.jsonl") if file.stat().st_size > 0]
        assert left
        load.goes_on(None)
        with started(settings) as next_service:
            load.goes_on()
            eventually(lambda: not any(file.exists() for file in left))
        assert "spilled_predictions_taken_up" in [event["event"] for event in next_service.events]
    assert all(one.received > killed for one in load.answers if one.response is None)
    world.check([one for one in load.answers if one.response], "no-model")
    logged = world.logged(load)
    lost = [one for one in load.answers if any(body["request_id"] not in logged for body in one.predictions)]
    assert len(logged) > 100
    assert all(killed - UNLOGGED_S < one.received for one in lost)
    assert all(one.sent < gone for one in lost)
