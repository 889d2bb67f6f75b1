"""The model registry: the only module that talks to MLflow.

Logs a training run with everything that speaks for it, registers versions and moves their stages. It decides
nothing: whether a version may become Production is promotion.py's business and the ledger's to say.
"""

import functools
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pandas as pd

from streamflow.contract import Column, FeatureService
from streamflow.database import Database
from streamflow.errors import RegistryUnavailable, UnknownVersion
from streamflow.settings import Settings

if TYPE_CHECKING:
    import mlflow
    from mlflow.models import ModelSignature

EXPERIMENT = "streamflow"
MODEL = "streamflow_churn"
PRODUCTION = "Production"
STAGING = "Staging"
ARCHIVED = "Archived"
NO_STAGE = "None"
ALIAS = "production"
SCORER_PATH = "scorer/scorer.bin"
MODEL_NAME = "model"
HEALTH_TIMEOUT_S = 3.0

SIGNATURE_TYPES = {"category": "string", "boolean": "boolean", "integer": "long", "float": "double"}


@dataclass(frozen=True)
class RunRecord:
    """What one training run leaves behind: artifacts by file name, as bytes, data for JSON, tables or HTML pages."""

    name: str
    pipeline: Any
    service: FeatureService
    example: pd.DataFrame
    scorer: bytes
    parameters: Mapping[str, Any]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    images: Mapping[str, bytes] = field(default_factory=dict)
    documents: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    pages: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RegisteredVersion:
    """A version as MLflow has it; ``has_alias`` tells whether it is the one with the alias `production`."""

    version: int
    run_id: str
    stage: str
    has_alias: bool


def signature(service: FeatureService) -> "ModelSignature":
    """The MLflow signature of a model on this feature service: typed inputs in feature order, a churn flag out."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    def spec(column: Column) -> ColSpec:
        return ColSpec(SIGNATURE_TYPES[column.kind], column.name)

    return ModelSignature(
        inputs=Schema([spec(column) for column in service.columns]), outputs=Schema([ColSpec("boolean")])
    )


class Registry:
    """MLflow behind an HTTP address or directly on its tables; every failure to reach it is RegistryUnavailable."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self.uri = settings.mlflow_uri or database.sqlalchemy("mlflow")
        self._http = settings.mlflow_uri is not None
        self._artifacts = None if self._http else str(settings.home / "mlflow" / "artifacts")

    @contextmanager
    def _reachable(self) -> Iterator["mlflow.MlflowClient"]:
        import mlflow
        import sqlalchemy.exc
        from mlflow.exceptions import MlflowException

        try:
            if self._http:
                httpx.get(f"{self.uri}/health", timeout=HEALTH_TIMEOUT_S).raise_for_status()
            mlflow.set_tracking_uri(self.uri)
            mlflow.set_registry_uri(self.uri)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                yield mlflow.MlflowClient(self.uri, self.uri)
        except (httpx.HTTPError, sqlalchemy.exc.OperationalError) as failure:
            raise RegistryUnavailable(f"MLflow does not answer: {failure}") from failure
        except MlflowException as failure:
            if failure.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise UnknownVersion(f"MLflow has no such entry: {failure.message}") from failure
            raise RegistryUnavailable(f"MLflow refused: {failure.message}") from failure

    def prepare(self) -> None:
        """Make MLflow's tables and the experiment where they are not there yet."""
        _ = self.experiment_id

    @functools.cached_property
    def experiment_id(self) -> str:
        """The experiment's id; it is made when it isn't there."""
        with self._reachable() as client:
            experiment = client.get_experiment_by_name(EXPERIMENT)
            if experiment is not None:
                return str(experiment.experiment_id)
            return str(client.create_experiment(EXPERIMENT, artifact_location=self._artifacts))

    def log(self, record: RunRecord) -> str:
        """Log a run with its pipeline, scorer and artifacts; returns the run's id. A failed run is marked failed."""
        import mlflow

        experiment_id = self.experiment_id
        with self._reachable() as client, mlflow.start_run(experiment_id=experiment_id, run_name=record.name) as run:
            mlflow.log_params(dict(record.parameters))
            mlflow.log_metrics(dict(record.metrics))
            mlflow.set_tags(dict(record.tags))
            self._log_pipeline(record)
            with tempfile.TemporaryDirectory() as folder:
                _write_artifacts(Path(folder), record)
                client.log_artifacts(run.info.run_id, folder)
            return str(run.info.run_id)

    def _log_pipeline(self, record: RunRecord) -> None:
        import mlflow.sklearn

        mlflow.sklearn.log_model(
            record.pipeline,
            name=MODEL_NAME,
            signature=signature(record.service),
            input_example=record.example,
            pip_requirements=[f"{package}=={version}" for package, version in model_requirements().items()],
            serialization_format=mlflow.sklearn.SERIALIZATION_FORMAT_CLOUDPICKLE,
        )

    def add_metrics(self, run_id: str, metrics: Mapping[str, float]) -> None:
        """Log what was learned about a run's model after it had ended."""
        with self._reachable() as client:
            for name, value in metrics.items():
                client.log_metric(run_id, name, value)

    def page(self, run_id: str, name: str) -> str:
        """An HTML page or other text among the run's artifacts."""
        return self._artifact(run_id, name).decode()

    def put_page(self, run_id: str, name: str, content: str) -> None:
        """Write an HTML page or other text among the run's artifacts, in place of what was there."""
        with self._reachable() as client:
            client.log_text(run_id, content, name)

    def input_names(self, run_id: str) -> list[str]:
        """The inputs that the run's model declares to MLflow, in order."""
        from mlflow.models import get_model_info

        with self._reachable() as client:
            (logged,) = client.get_run(run_id).outputs.model_outputs
            declared = get_model_info(f"models:/{logged.model_id}").signature
            return list(declared.inputs.input_names()) if declared else []

    def register(self, run_id: str, *, tags: Mapping[str, str], description: str) -> int:
        """Make the run's model the next version of the registered model; returns its number.

        A version that an interrupted registration of the same run left behind is taken up again.
        """
        from mlflow.exceptions import MlflowException

        with self._reachable() as client:
            for left_behind in client.search_model_versions(f"name = '{MODEL}' and run_id = '{run_id}'"):
                return int(left_behind.version)
            try:
                client.get_registered_model(MODEL)
            except MlflowException as missing:
                if missing.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                client.create_registered_model(MODEL, description="Probability that a customer churns in the month.")
            outputs = client.get_run(run_id).outputs.model_outputs
            if len(outputs) != 1:
                raise UnknownVersion(f"run {run_id} logged {len(outputs)} models; train the month again")
            made = client.create_model_version(
                MODEL,
                source=f"models:/{outputs[0].model_id}",
                run_id=run_id,
                model_id=outputs[0].model_id,
                tags=dict(tags),
                description=description,
            )
            return int(made.version)

    def set_tags(self, version: int, tags: Mapping[str, str]) -> None:
        """Add tags to a version, in place of those of the same names."""
        with self._reachable() as client:
            for name, value in tags.items():
                client.set_model_version_tag(MODEL, str(version), name, value)

    def delete(self, version: int) -> None:
        """Take back a version whose registration could not be completed."""
        with self._reachable() as client:
            client.delete_model_version(MODEL, str(version))

    def versions(self) -> dict[int, RegisteredVersion]:
        """Every registered version by number."""
        with self._reachable() as client:
            found = client.search_model_versions(f"name = '{MODEL}'")
            aliased = int(client.get_registered_model(MODEL).aliases.get(ALIAS, 0)) if found else None
            return {
                int(one.version): RegisteredVersion(
                    int(one.version), str(one.run_id), str(one.current_stage), int(one.version) == aliased
                )
                for one in found
            }

    def set_stage(self, version: int, stage: str) -> None:
        """Move one version to a stage; Production displaces whatever is there and carries the alias `production`."""
        with self._reachable() as client:
            client.transition_model_version_stage(
                MODEL, str(version), stage, archive_existing_versions=stage == PRODUCTION
            )
            if stage == PRODUCTION:
                client.set_registered_model_alias(MODEL, ALIAS, str(version))

    def has_run(self, run_id: str) -> bool:
        """Whether a run is there and not deleted."""
        try:
            with self._reachable() as client:
                return str(client.get_run(run_id).info.lifecycle_stage) == "active"
        except UnknownVersion:
            return False

    def scorer(self, run_id: str) -> bytes:
        """The bytes of the run's compiled scorer."""
        return self._artifact(run_id, SCORER_PATH)

    def _artifact(self, run_id: str, path: str) -> bytes:
        import mlflow.artifacts
        from mlflow.environment_variables import MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR

        MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.set(False)
        with self._reachable(), tempfile.TemporaryDirectory() as folder:
            found = mlflow.artifacts.download_artifacts(
                run_id=run_id, artifact_path=path, dst_path=folder, tracking_uri=self.uri
            )
            return Path(found).read_bytes()


def model_requirements() -> dict[str, str]:
    """The installed versions of the libraries that a loaded pipeline needs."""
    from importlib.metadata import version

    return {package: version(package) for package in ("scikit-learn", "numpy", "pandas", "scipy", "cloudpickle")}


def _write_artifacts(folder: Path, record: RunRecord) -> None:
    import json

    scorer = folder / SCORER_PATH
    scorer.parent.mkdir(parents=True)
    scorer.write_bytes(record.scorer)
    for name, image in record.images.items():
        (folder / name).write_bytes(image)
    for name, document in record.documents.items():
        (folder / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    for name, table in record.tables.items():
        table.to_csv(folder / name, index=False, lineterminator="\n")
    for name, page in record.pages.items():
        (folder / name).write_text(page, encoding="utf-8")
