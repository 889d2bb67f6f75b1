"""The prediction log without its disk, and with neither disk nor PostgreSQL, under load."""

from faults_world import Load, PostgresServer, World, started
from serving_world import metric, metrics_of

from streamflow.settings import Settings

ROWS = 100
FEW_ROWS = f"from serving import prediction_log; prediction_log.QUEUE_ROWS = {ROWS}"


def test_no_disk_for_the_log(world: World, postgres_server: PostgresServer, settings: Settings) -> None:
    """Where the folder of the spill file should be there is a file, which stops root too."""
    folder = settings.home / "cache" / "predictions"
    folder.parent.mkdir(parents=True)
    folder.write_text("in the way")
    with started(settings, FEW_ROWS) as service, Load(service.port, world.users) as load:
        load.goes_on()
        assert {one.status for one in load.answers} == {200}

        with world.database.connect(owner=True) as busy:
            busy.execute("LOCK TABLE streamflow.predictions IN ACCESS EXCLUSIVE MODE")
            load.goes_on(503)
            assert metric(metrics_of(service.client), "prediction_log_backlog") == ROWS
        load.goes_on()

        with postgres_server.stopped():
            service.becomes(503)
            load.goes_on(503)
        service.becomes(200)
        load.goes_on()
        assert metric(metrics_of(service.client), "prediction_log_spilled_rows") == 0
        parts = {event["part"] for event in service.events if event["event"] == "prediction_log_failing"}
    assert parts == {"database", "spill"}
    refusals = [one.body["type"].rpartition(":")[2] for one in load.answers if one.status == 503]
    assert set(refusals) == {"prediction-log-full", "feature-store-unavailable"}
    world.check_answers(load, "prediction-log-full", "feature-store-unavailable")
    world.check_log(load)
