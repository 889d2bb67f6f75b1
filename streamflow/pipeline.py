"""One function for each asset of the graph: what it reads, what it makes of it, what it records.

Dagster's assets and the command line call these with a platform, a month and the time. Here is the order of things;
how each is done is in the module that it belongs to.
"""

import functools
import hashlib
import os
import platform as machine
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from streamflow import dataset, features, warehouse
from streamflow.contract import CONTRACT, USER_ID, Contract, FeatureView, Table
from streamflow.database import Database
from streamflow.errors import UnknownMonth
from streamflow.landing import LandingZone
from streamflow.months import Month
from streamflow.promotion import Decision, Ledger, Policy, Version, apply_policy, check_gates
from streamflow.registry import SCORER_PATH, Evidence, Registry
from streamflow.settings import PROJECT_ROOT, Settings
from streamflow.warehouse import MonthWrite, month_write, record

if TYPE_CHECKING:
    import feast
    from numpy.typing import NDArray

    from streamflow.scoring import Parity

TRAINING_DATASET = "training_dataset"
CHURN_MODEL = "churn_model"
REGISTERED_VERSION = "registered_model_version"
SERVICE = "churn_v1"
ESTIMATOR = "random_forest_baseline"
EXAMPLE_ROWS = 3


@dataclass(frozen=True)
class Platform:
    """The parts of one installation, each made when it is first needed."""

    settings: Settings
    database: Database
    contract: Contract = field(default=CONTRACT)

    @functools.cached_property
    def landing(self) -> LandingZone:
        """The landing zone and its archive."""
        return LandingZone(self.settings.home, self.contract)

    @functools.cached_property
    def registry(self) -> Registry:
        """MLflow."""
        return Registry(self.settings, self.database)

    @functools.cached_property
    def ledger(self) -> Ledger:
        """The promotion ledger."""
        return Ledger(self.database, self.registry)

    @functools.cached_property
    def policy(self) -> Policy:
        """The promotion policy in force."""
        return Policy.load(self.settings)

    @functools.cached_property
    def feature_store(self) -> "feast.FeatureStore":
        """Feast."""
        return features.feature_store(self.database)

    @property
    def datasets(self) -> Path:
        """Where training datasets are kept by digest."""
        return self.settings.home / "datasets"


@dataclass(frozen=True)
class Trained:
    """A logged training run and what a person wants to see of it; ``roc`` is a PNG."""

    write: MonthWrite
    run_id: str
    metrics: dict[str, float]
    parity: "Parity"
    roc: bytes


@dataclass(frozen=True)
class Registered:
    """A registered version and what the policy made of it."""

    write: MonthWrite
    version: Version
    decision: Decision


def prepare(platform: Platform) -> list[str]:
    """Make or update everything that the graph needs to run: schema and feature registry; returns what changed."""
    changes = warehouse.migrate(platform.database, platform.contract)
    features.apply(platform.feature_store, platform.contract)
    return changes


def load_table(platform: Platform, table: Table, month: Month, now: datetime) -> MonthWrite:
    """Bring the landed revision of a table's month into the warehouse.

    Raises UnknownMonth when the month has not landed, or lacks this table.
    """
    revision = platform.landing.manifest(month).current.get(table.name)
    if revision is None:
        raise UnknownMonth(f"{month} has landed without {table.file}; land it with `streamflow land`")
    rows = platform.landing.read(month, table.name)
    return warehouse.write_month(
        platform.database, table, month, rows, digest=revision.sha256, revision=revision.revision, now=now
    )


def build_snapshot(platform: Platform, table: Table, month: Month, now: datetime) -> MonthWrite:
    """Make the snapshot of a table as of the month's last day."""
    return warehouse.build_snapshot(platform.database, table, month, now=now, contract=platform.contract)


def publish_view(platform: Platform, view: FeatureView, month: Month, now: datetime) -> MonthWrite:
    """Put a month of a feature view online."""
    return features.publish(platform.database, platform.feature_store, view, month, now=now)


def assemble_dataset(platform: Platform, month: Month, now: datetime) -> MonthWrite:
    """Join the month's features and labels through Feast and keep them as Parquet under their digest.

    Raises UnknownMonth without labels or snapshots, TrainingRefused for data that must not be trained on.
    """
    contract, service = platform.contract, platform.contract.service(SERVICE)
    label_month = month.shift(contract.label_horizon_months)
    with platform.database.connect() as connection:
        labels = month_write(connection, contract.label_table.name, label_month)
        snapshots = [month_write(connection, view.snapshot, month) for view in service.views]
    assembled = dataset.assemble(
        features.historical_features(platform.feature_store, service, month, contract),
        warehouse.labels(platform.database, label_month, contract),
        service,
        month=month,
        label_month=label_month,
        contract=contract,
    )
    dataset.save(assembled, platform.datasets)
    written = MonthWrite(
        TRAINING_DATASET,
        month,
        max(source.revision for source in (labels, *snapshots)),
        assembled.digest,
        len(assembled.frame),
        {source.relation: source.as_source for source in (labels, *snapshots)},
        now,
        {"service": service.name, "dropped": assembled.dropped, "churn_rate": float(assembled.labels.mean())},
    )
    return _recorded(platform, written)


def train(platform: Platform, month: Month, now: datetime) -> Trained:
    """Fit, evaluate, compile and log the month's model.

    Raises TrainingRefused for data that must not be trained on, ArtifactRefused when the scorer cannot be compiled.
    """
    from streamflow import evaluation, scoring, training

    with platform.database.connect() as connection:
        source = month_write(connection, TRAINING_DATASET, month)
    data = dataset.load(platform.datasets / f"{source.digest}.parquet", platform.contract)
    fitting = time.perf_counter()
    model = training.fit(data, ESTIMATOR, n_jobs=os.cpu_count() or 1)
    training_seconds = time.perf_counter() - fitting

    artifact = scoring.compile_pipeline(model, data)
    scorer = scoring.Scorer.from_bytes(artifact)
    scoring.self_test(scorer)
    probabilities = scorer.score_columns({column.name: data.frame[column.name] for column in data.service.columns})
    parity = scoring.parity(model.pipeline, scorer, data.features)

    held_out, labels = data.holdout, data.labels
    measured = asdict(evaluation.metrics(labels[held_out], probabilities[held_out], model.threshold))
    importances = evaluation.importances(model)
    roc = evaluation.roc_plot(labels[held_out], probabilities[held_out])
    artifact_sha256 = scoring.sha256(artifact)
    predictions = predictions_digest(data.frame[USER_ID].tolist(), probabilities)
    run_id = platform.registry.log(
        Evidence(
            name=f"{month} {model.estimator}",
            pipeline=model.pipeline,
            service=data.service,
            example=data.features.head(EXAMPLE_ROWS),
            scorer=artifact,
            parameters={
                "estimator": model.estimator,
                **model.params,
                "threshold": model.threshold,
                "feature_service": data.service.name,
                "as_of": str(month.as_of),
            },
            metrics={
                **measured,
                "training_seconds": training_seconds,
                "training_rows": model.train_rows,
                "validation_rows": int(held_out.sum()),
                "parity_difference": parity.max_difference,
                "flipped_decisions": parity.flipped_decisions,
            },
            tags={
                "month": str(month),
                "dataset_digest": data.digest,
                "predictions_digest": predictions,
                "artifact_sha256": artifact_sha256,
                "code_version": code_version(),
                "launched_by": platform.settings.actor,
            },
            images={
                "roc.png": roc,
                "confusion_matrix.png": evaluation.confusion_plot(
                    labels[held_out], probabilities[held_out], model.threshold
                ),
                "importances.png": evaluation.importance_plot(importances),
            },
            documents={
                "feature_schema.json": training.feature_schema(data.service),
                "lineage.json": {
                    "dataset": {"digest": source.digest, "rows": source.rows, **source.facts},
                    "sources": dict(source.sources),
                    "code_version": code_version(),
                    "libraries": libraries(),
                    "python": machine.python_version(),
                },
            },
            tables={
                "importances.csv": importances,
                "predictions_sample.csv": evaluation.prediction_sample(data, probabilities[held_out], model.threshold),
            },
        )
    )
    written = MonthWrite(
        CHURN_MODEL,
        month,
        source.revision,
        predictions,
        source.rows,
        {TRAINING_DATASET: source.as_source},
        now,
        {
            "run_id": run_id,
            "service": data.service.name,
            "threshold": model.threshold,
            "artifact_sha256": artifact_sha256,
            "metrics": measured,
            "parity_difference": parity.max_difference,
            "flipped_decisions": parity.flipped_decisions,
        },
    )
    return Trained(
        _recorded(platform, written),
        run_id,
        {**measured, "training_seconds": training_seconds, "training_rows": model.train_rows},
        parity,
        roc,
    )


def register(platform: Platform, month: Month, now: datetime) -> Registered:
    """Register the month's newest model as a version, once, and let the policy decide about it."""
    with platform.database.connect() as connection:
        model = month_write(connection, CHURN_MODEL, month)
    facts = model.facts
    version = platform.ledger.version_of_run(facts["run_id"])
    if version is None:
        version = _new_version(platform, model, now)
    decision = apply_policy(platform.ledger, platform.registry, version, platform.policy, now)
    written = MonthWrite(
        REGISTERED_VERSION,
        month,
        model.revision,
        facts["artifact_sha256"],
        model.rows,
        {CHURN_MODEL: model.as_source},
        now,
        {"version": version.version, "run_id": version.run_id},
    )
    return Registered(_recorded(platform, written), version, decision)


def _new_version(platform: Platform, model: MonthWrite, now: datetime) -> Version:
    facts = model.facts
    gates = check_gates(
        facts["metrics"],
        parity_difference=facts["parity_difference"],
        flipped_decisions=facts["flipped_decisions"],
        policy=platform.policy,
    )
    dataset_digest = model.sources[TRAINING_DATASET]["digest"]
    number = platform.registry.register(
        facts["run_id"],
        tags={
            "as_of": str(model.month.as_of),
            "feature_service": facts["service"],
            "dataset_digest": dataset_digest,
            "artifact_sha256": facts["artifact_sha256"],
            **{f"gate.{gate.name}": "passed" if gate.passed else "failed" for gate in gates},
        },
        description=f"Trained on {model.month}; " + "; ".join(gate.reason for gate in gates),
    )
    version = Version(
        number,
        facts["run_id"],
        model.month.as_of,
        facts["service"],
        facts["threshold"],
        SCORER_PATH,
        facts["artifact_sha256"],
        dataset_digest,
        model.digest,
        facts["metrics"],
        gates,
        now,
    )
    try:
        platform.ledger.register(version)
    except BaseException:
        platform.registry.delete(number)
        raise
    return version


def run_link(platform: Platform, run_id: str) -> str:
    """Where a run's page is in the MLflow UI."""
    settings = platform.settings
    address = settings.mlflow_uri or f"http://{settings.host}:{settings.mlflow_port}"
    return f"{address}/#/experiments/{platform.registry.experiment_id}/runs/{run_id}"


def predictions_digest(user_ids: Sequence[str], probabilities: "NDArray[np.float64]") -> str:
    """SHA-256 of who got which probability, to the last bit, in the order of user_id."""
    order = np.argsort(np.array(user_ids, dtype=object))
    digest = hashlib.sha256("\n".join(user_ids[index] for index in order).encode())
    digest.update(np.ascontiguousarray(probabilities[order], dtype="<f8").tobytes())
    return digest.hexdigest()


@functools.cache
def code_version(*names: str) -> str:
    """Twelve hex digits that change with the core's source (of these modules, if named), with or without git."""
    package = PROJECT_ROOT / "streamflow"
    sources = [package / f"{name}.py" for name in names] or sorted(package.rglob("*.py"))
    digest = hashlib.sha256()
    for source in sources:
        digest.update(f"{source.relative_to(package).as_posix()}\n".encode() + source.read_bytes())
    return digest.hexdigest()[:12]


def libraries() -> dict[str, str]:
    """The installed versions of the libraries that shape a result."""
    names = ("feast", "mlflow", "numpy", "pandas", "psycopg", "pyarrow", "scikit-learn", "scipy", "treelite")
    return {name: installed_version(name) for name in names}


def _recorded(platform: Platform, written: MonthWrite) -> MonthWrite:
    with platform.database.connect() as connection:
        record(connection, written)
    return written
