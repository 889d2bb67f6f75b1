import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from sklearn.compose import ColumnTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import OneHotEncoder

from streamflow import warehouse
from streamflow.contract import CONTRACT, Column
from streamflow.database import Database
from streamflow.errors import RegistryUnavailable, UnknownVersion
from streamflow.registry import (
    ARCHIVED,
    EXPERIMENT,
    MODEL,
    PRODUCTION,
    SCORER_PATH,
    Registry,
    RunRecord,
    model_requirements,
    signature,
)
from streamflow.settings import Settings

NOW = datetime(2024, 2, 3, tzinfo=UTC)
SERVICE = CONTRACT.service("churn_v1")
ROWS = 60


def values(column: Column, random: np.random.Generator) -> Any:
    match column.kind:
        case "category":
            return random.choice(column.categories, ROWS)
        case "boolean":
            return random.random(ROWS) < 0.5
        case "integer":
            return random.integers(0, 30, ROWS)
        case _:
            return random.random(ROWS) * 100


@pytest.fixture(scope="module")
def features() -> pd.DataFrame:
    random = np.random.default_rng(7)
    return pd.DataFrame({column.name: values(column, random) for column in SERVICE.columns})


@pytest.fixture(scope="module")
def pipeline(features: pd.DataFrame) -> Pipeline:
    one_hot = ColumnTransformer([("category", OneHotEncoder(), ["net_service"])], remainder="passthrough")
    return Pipeline([("preprocessing", one_hot), ("classifier", LogisticRegression(max_iter=2_000))]).fit(
        features, features["watch_hours_30d"] < 40
    )


@pytest.fixture(scope="module")
def registry(database: Database, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    warehouse.migrate(database)
    return Registry(Settings(home=tmp_path_factory.mktemp("home")), database)


@pytest.fixture(scope="module")
def client(registry: Registry) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(registry.uri, registry.uri)


def evidence(pipeline: Pipeline, features: pd.DataFrame, **more: Any) -> RunRecord:
    given: dict[str, Any] = {
        "name": "2024-01 tiny",
        "pipeline": pipeline,
        "service": SERVICE,
        "example": features.head(3),
        "scorer": b"compiled",
        "parameters": {"C": 1.0, "estimator": "tiny"},
        "metrics": {"auc": 0.75, "training_rows": ROWS},
        "tags": {"month": "2024-01"},
        "images": {"roc.png": b"a picture"},
        "documents": {"feature_schema.json": {"service": "churn_v1"}},
        "tables": {"importances.csv": pd.DataFrame({"feature": ["skips_7d"], "importance": [0.5]})},
    }
    return RunRecord(**{**given, **more})


@pytest.fixture(scope="module")
def run_id(registry: Registry, pipeline: Pipeline, features: pd.DataFrame) -> str:
    return registry.log(evidence(pipeline, features))


@pytest.fixture(scope="module")
def version(registry: Registry, run_id: str) -> int:
    return registry.register(run_id, tags={"as_of": "2024-01-31"}, description="Trained on 2024-01")


# --- what a run leaves behind -------------------------------------------------------------------------------------


def test_a_run_carries_parameters_metrics_and_tags(client: mlflow.MlflowClient, run_id: str) -> None:
    run = client.get_run(run_id)

    assert run.info.status == "FINISHED"
    assert run.info.run_name == "2024-01 tiny"
    assert client.get_experiment(run.info.experiment_id).name == EXPERIMENT
    assert run.data.params == {"C": "1.0", "estimator": "tiny"}
    assert {name: run.data.metrics[name] for name in ("auc", "training_rows")} == {"auc": 0.75, "training_rows": ROWS}
    assert run.data.tags["month"] == "2024-01"


def test_a_run_keeps_its_artifacts_byte_by_byte(
    client: mlflow.MlflowClient, registry: Registry, run_id: str, tmp_path: Path
) -> None:
    folder = Path(client.download_artifacts(run_id, "", str(tmp_path)))

    assert (folder / "roc.png").read_bytes() == b"a picture"
    assert json.loads((folder / "feature_schema.json").read_text()) == {"service": "churn_v1"}
    assert (folder / "importances.csv").read_bytes() == b"feature,importance\nskips_7d,0.5\n"
    assert (folder / SCORER_PATH).read_bytes() == b"compiled"
    assert registry.scorer(run_id) == b"compiled"


def test_the_signature_is_derived_from_the_contract() -> None:
    types = {"category": "string", "boolean": "boolean", "integer": "long", "float": "double"}
    inputs = signature(SERVICE).inputs.to_dict()

    assert [(spec["name"], spec["type"]) for spec in inputs] == [
        (column.name, types[column.kind]) for column in SERVICE.columns
    ]
    assert [spec["type"] for spec in signature(SERVICE).outputs.to_dict()] == ["boolean"]


def test_a_version_is_linked_to_its_run_and_states_its_requirements(
    client: mlflow.MlflowClient, run_id: str, version: int, registry: Registry
) -> None:
    made = client.get_model_version(MODEL, str(version))

    assert (made.run_id, made.tags, made.description) == (run_id, {"as_of": "2024-01-31"}, "Trained on 2024-01")
    assert registry.versions()[version].run_id == run_id
    needed = Path(mlflow.pyfunc.get_model_dependencies(f"models:/{MODEL}/{version}")).read_text().split()
    assert set(needed) >= {f"{package}=={number}" for package, number in model_requirements().items()}
    info = mlflow.models.get_model_info(f"models:/{MODEL}/{version}")
    assert info.signature == signature(SERVICE)


def test_production_loads_with_plain_mlflow_and_without_this_package(
    registry: Registry,
    version: int,
    pipeline: Pipeline,
    features: pd.DataFrame,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry.set_stage(version, PRODUCTION)
    mlflow.set_tracking_uri(registry.uri)
    mlflow.set_registry_uri(registry.uri)
    for name in [name for name in sys.modules if name.partition(".")[0] == "streamflow"]:
        monkeypatch.setitem(sys.modules, name, None)

    for address in (f"models:/{MODEL}/{PRODUCTION}", f"models:/{MODEL}@production"):
        loaded = mlflow.pyfunc.load_model(address)
        assert loaded.predict(features).tolist() == pipeline.predict(features).tolist()


def test_a_version_that_an_interrupted_registration_left_behind_is_taken_up(
    registry: Registry, run_id: str, version: int
) -> None:
    known = registry.versions()
    assert registry.register(run_id, tags={}, description="The same again") == version
    assert registry.versions() == known


def test_what_is_learned_later_is_added_to_the_run(
    registry: Registry, client: mlflow.MlflowClient, run_id: str
) -> None:
    registry.add_metrics(run_id, {"forward_auc": 0.5})
    assert client.get_run(run_id).data.metrics["forward_auc"] == 0.5
    registry.put_page(run_id, "card.html", "<p>76\N{NO-BREAK SPACE}%</p>")
    registry.put_page(run_id, "card.html", "<p>77\N{NO-BREAK SPACE}%</p>")
    assert registry.page(run_id, "card.html") == "<p>77\N{NO-BREAK SPACE}%</p>"


def test_a_runs_model_declares_its_inputs_in_order(registry: Registry, run_id: str) -> None:
    mlflow.set_tracking_uri("sqlite:///elsewhere.db")  # as in a process that has logged no run
    assert registry.input_names(run_id) == SERVICE.names


def test_a_version_of_another_model_is_not_taken_up(
    registry: Registry, client: mlflow.MlflowClient, pipeline: Pipeline, features: pd.DataFrame
) -> None:
    run_id = registry.log(evidence(pipeline, features, name="twice registered"))
    client.create_registered_model("somebody_elses")
    (logged,) = client.get_run(run_id).outputs.model_outputs
    client.create_model_version("somebody_elses", source=f"models:/{logged.model_id}", run_id=run_id)
    known = registry.versions()
    assert registry.register(run_id, tags={}, description="") == max(known, default=0) + 1


def test_tags_are_added_to_a_version(registry: Registry, client: mlflow.MlflowClient, version: int) -> None:
    registry.set_tags(version, {"decision": "waits", "gate.fair": "passed"})
    assert client.get_model_version(MODEL, str(version)).tags.items() >= {
        ("decision", "waits"),
        ("gate.fair", "passed"),
    }


def test_production_displaces_production(
    registry: Registry, pipeline: Pipeline, features: pd.DataFrame, version: int
) -> None:
    other = registry.register(registry.log(evidence(pipeline, features)), tags={}, description="The same again")
    registry.set_stage(version, PRODUCTION)
    registry.set_stage(other, PRODUCTION)

    found = registry.versions()
    assert (found[version].stage, found[version].has_alias) == (ARCHIVED, False)
    assert (found[other].stage, found[other].has_alias) == (PRODUCTION, True)


# --- failures -----------------------------------------------------------------------------------------------------


class Unprintable:
    def to_csv(self, *_: object, **__: object) -> None:
        raise OSError("No space left on device")


def test_a_run_whose_logging_fails_is_marked_failed_and_the_next_one_works(
    registry: Registry, client: mlflow.MlflowClient, pipeline: Pipeline, features: pd.DataFrame
) -> None:
    with pytest.raises(OSError, match="No space left"):
        registry.log(evidence(pipeline, features, name="doomed", tables={"importances.csv": Unprintable()}))

    (run,) = client.search_runs([registry.experiment_id], "attributes.run_name = 'doomed'")
    assert run.info.status == "FAILED"
    assert mlflow.active_run() is None
    again = registry.log(evidence(pipeline, features, name="undaunted"))
    assert client.get_run(again).info.status == "FINISHED"


def test_a_deleted_version_is_gone_and_its_number_is_not_given_again(
    registry: Registry, pipeline: Pipeline, features: pd.DataFrame
) -> None:
    run_id = registry.log(evidence(pipeline, features, name="doomed"))
    doomed = registry.register(run_id, tags={}, description="to be taken back")
    registry.delete(doomed)

    assert doomed not in registry.versions()
    with pytest.raises(UnknownVersion, match="no such entry"):
        registry.set_stage(doomed, PRODUCTION)
    assert registry.register(run_id, tags={}, description="anew") == doomed + 1


def test_a_run_without_a_model_is_not_registered(registry: Registry, client: mlflow.MlflowClient) -> None:
    empty = client.create_run(registry.experiment_id).info.run_id
    before = registry.versions()
    with pytest.raises(UnknownVersion, match="logged 0 models; train the month again"):
        registry.register(empty, tags={}, description="")
    assert registry.versions() == before


def test_an_unknown_version_has_no_stage(registry: Registry, version: int) -> None:
    with pytest.raises(UnknownVersion):
        registry.set_stage(version + 1_000, PRODUCTION)


@pytest.mark.parametrize(
    "call",
    [
        lambda away, pipeline, features: away.experiment_id,
        lambda away, pipeline, features: away.log(evidence(pipeline, features)),
        lambda away, pipeline, features: away.register("run", tags={}, description=""),
        lambda away, pipeline, features: away.delete(1),
        lambda away, pipeline, features: away.versions(),
        lambda away, pipeline, features: away.set_stage(1, PRODUCTION),
        lambda away, pipeline, features: away.scorer("run"),
    ],
    ids=["experiment", "log", "register", "delete", "versions", "set_stage", "scorer"],
)
def test_mlflow_away_is_said_at_once(
    call: Callable[[Registry, Pipeline, pd.DataFrame], object],
    database: Database,
    pipeline: Pipeline,
    features: pd.DataFrame,
) -> None:
    away = Registry(Settings(mlflow_uri="http://127.0.0.1:9"), database)
    with pytest.raises(RegistryUnavailable, match=r"MLflow does not answer: .*refused"):
        call(away, pipeline, features)


def test_prepare_makes_the_tables_and_the_experiment_once(new_database: Callable[[], Database], tmp_path: Path) -> None:
    database = new_database()
    warehouse.migrate(database)
    settings = Settings(home=tmp_path, database_url=database.url)
    Registry(settings, database).prepare()
    with database.connect() as connection:
        found = connection.execute("SELECT name FROM mlflow.experiments ORDER BY experiment_id").fetchall()
    assert found == [("Default",), ("streamflow",)]
    Registry(settings, database).prepare()
    assert Registry(settings, database).versions() == {}
