"""What runs by itself: the watch over MLflow's stages, and that every sensor says what it is for.

The others are in integration/test_closed_loop.py.
"""

import os
import subprocess
import sys
from contextlib import contextmanager
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from dagster import (
    AssetKey,
    AssetMaterialization,
    DagsterInstance,
    DefaultSensorStatus,
    SensorDefinition,
    SkipReason,
    build_sensor_context,
    evaluate_automation_conditions,
)

from streamflow import pipeline
from streamflow.errors import RegistryUnavailable, WarehouseUnavailable
from streamflow.promotion import Entry
from streamflow.status import TRAINED, WATCHED, relations
from streamflow_dagster.definitions import build_definitions
from streamflow_dagster.defs.failing import TickFailed
from streamflow_dagster.defs.resources import PlatformResource

NOW = datetime(2024, 2, 3, tzinfo=UTC)
FOUND = [
    Entry(NOW, "promote", 3, 2, "mlflow", "stage Production set by hand in MLflow", "manual", False, ()),
    Entry(NOW, "flag", 9, 3, "mlflow", "taken back", "manual", False, ()),
]


class Ledger:
    """Answers or fails as told, and keeps what it was asked."""

    def __init__(self):
        self.outcome = []
        self.asked = {}

    def reconcile(self, **asked):
        self.asked = asked
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


ledger = Ledger()
platform = SimpleNamespace(ledger=ledger, policy="the policy")


class Core(PlatformResource):
    @contextmanager
    def yield_for_execution(self, context):
        yield self

    @property
    def platform(self):
        return platform

    def now(self):
        return NOW


@pytest.fixture(scope="module")
def registry_stages() -> SensorDefinition:
    return next(one for one in build_definitions().sensors if one.name == "registry_stages")


def looked(sensor, outcome, caplog):
    ledger.outcome = outcome
    with build_sensor_context(resources={"core": Core()}) as context:
        context.log.addHandler(caplog.handler)
        answer = sensor(context)
    assert isinstance(answer, SkipReason)
    return answer.skip_message, [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_the_watch_runs_by_itself_every_half_minute_and_requests_nothing(registry_stages):
    assert registry_stages.name == "registry_stages"
    assert registry_stages.default_status is DefaultSensorStatus.RUNNING
    assert registry_stages.minimum_interval_seconds == 30
    assert "ledger" in registry_stages.description
    assert registry_stages.targets == []


def test_nothing_changed_by_hand_is_said(registry_stages, caplog):
    assert looked(registry_stages, [], caplog) == ("MLflow's stages are those of the ledger", [])
    assert (ledger.asked["now"], ledger.asked["policy"]) == (NOW, "the policy")
    compare, self_test = ledger.asked["compare"], ledger.asked["self_test"]
    assert (compare.func, compare.args) == (pipeline.compare_versions, (platform,))
    assert (self_test.func, self_test.args) == (pipeline.scorer_of, (platform,))


def test_what_was_found_is_said_logged_and_put_on_the_card_of_a_version_of_ours(registry_stages, caplog, monkeypatch):
    explained = []
    monkeypatch.setattr(pipeline, "explain", lambda _, entry: explained.append(entry.version))
    said = ["promote version 3: stage Production set by hand in MLflow", "flag version 9: taken back"]
    assert looked(registry_stages, FOUND, caplog) == ("; ".join(said), said)
    assert explained == [3]


def test_an_mlflow_that_is_away_is_no_failure_of_ours(registry_stages, caplog):
    away = RegistryUnavailable("MLflow does not answer")
    assert looked(registry_stages, away, caplog) == ("not looked at: MLflow does not answer", [])


def test_any_other_failure_is_one(registry_stages, caplog):
    with pytest.raises(TickFailed, match=r"^PostgreSQL does not answer$"):
        looked(registry_stages, WarehouseUnavailable("PostgreSQL does not answer"), caplog)


def test_every_sensor_is_described_and_runs_by_itself():
    sensors = {one.name: one for one in build_definitions().sensors}
    assert set(sensors) == {"landed_months", "corrections", "retraining", "registry_stages"}
    for name, one in sensors.items():
        assert one.description, name
        assert one.default_status is DefaultSensorStatus.RUNNING, name


def test_automation_can_be_off():
    """What a person then starts is the person's; the watch over stages is not automation."""
    code = (
        "from streamflow_dagster.definitions import defs\n"
        "print(sorted(one.name for one in defs.sensors if one.default_status.value == 'RUNNING'))"
    )
    told = {**os.environ, "STREAMFLOW_AUTOMATION": "off"}
    done = subprocess.run([sys.executable, "-c", code], env=told, capture_output=True, text=True, check=True)
    assert done.stdout == "['registry_stages']\n"


class Conditions:
    """What the automation conditions ask for of a month, as what is made of it goes by."""

    def __init__(self):
        self.definitions = build_definitions()
        self.instance = DagsterInstance.ephemeral()
        self.state = evaluate_automation_conditions(self.definitions, self.instance)

    def asked_for(self, *made):
        for name in made:
            self.instance.report_runless_asset_event(AssetMaterialization(name, partition="2024-01"))
        self.state = evaluate_automation_conditions(self.definitions, self.instance, cursor=self.state.cursor)
        return {name for name in relations() if self.state.get_requested_partitions(AssetKey(name))}


DATA = [name for name in relations() if name not in (*TRAINED, *WATCHED)]


def test_a_correction_has_made_again_what_there_is_of_it_and_nothing_for_the_first_time():
    """What is missing of a month, such as the scores while nothing is in Production, is the landing sensor's to ask."""
    conditions = Conditions()
    assert conditions.asked_for(*DATA) == set()
    assert conditions.asked_for("payments_agg_90d") == {
        "payments_agg_90d_snapshots",
        "payments_agg_90d_fv",
        "training_dataset",
    }


def test_what_was_made_again_is_followed_by_what_is_made_from_it_and_by_no_model():
    conditions = Conditions()
    assert conditions.asked_for(*relations()) == set()
    assert conditions.asked_for("labels") == {"training_dataset", "performance_report"}


def test_conditions_whose_cursor_was_lost_ask_for_nothing():
    conditions = Conditions()
    conditions.asked_for(*relations())
    conditions.state = evaluate_automation_conditions(conditions.definitions, conditions.instance)
    assert conditions.state.total_requested == 0
    assert conditions.asked_for() == set()
