"""One function for each asset of the graph: what it reads, what it makes of it, what it records.

Dagster's assets and the command line call these with a platform, a month and the time. Here is the order of things;
how each is done is in the module that it belongs to.
"""

import functools
import hashlib
import os
import platform as machine
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from streamflow import dataset, features, warehouse
from streamflow.contract import CONTRACT, USER_ID, Contract, FeatureView, Table
from streamflow.database import Database
from streamflow.dataset import TrainingDataset
from streamflow.errors import ConfigurationError, TrainingRefused, UnknownMonth
from streamflow.landing import LandingZone
from streamflow.months import Month
from streamflow.promotion import Decision, Ledger, Policy, Version, apply_policy, check_gates
from streamflow.registry import SCORER_PATH, Evidence, Registry
from streamflow.settings import PROJECT_ROOT, Settings
from streamflow.warehouse import MonthWrite, month_write, record

if TYPE_CHECKING:
    import feast
    from numpy.typing import NDArray

    from streamflow.scoring import Parity, Scorer
    from streamflow.training import TrainedModel

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


@dataclass(frozen=True)
class Rebuilt:
    """Whether a version's dataset and predictions came out the same again, and what has changed since it was made."""

    version: int
    same_dataset: bool
    same_predictions: bool
    changed_since: dict[str, str]

    @property
    def identical(self) -> bool:
        """Whether both are the same to the last bit."""
        return self.same_dataset and self.same_predictions

    @property
    def explanation(self) -> str:
        """What may explain a difference."""
        changes = "; ".join(f"{name}: {change}" for name, change in self.changed_since.items())
        return changes or "code and libraries are the same, so the archive or the record is damaged"


def prepare(platform: Platform) -> list[str]:
    """Make or update everything that the graph needs to run: schema and feature registry; returns what changed."""
    changes = warehouse.migrate(platform.database, platform.contract)
    features.apply(platform.feature_store, platform.contract)
    return changes


def require_prepared(platform: Platform) -> None:
    """Raise ConfigurationError unless `prepare` has run here, WarehouseUnavailable when PostgreSQL does not answer."""
    with platform.database.connect() as connection:
        prepared = connection.execute("SELECT to_regclass('streamflow.month_writes')").fetchone()
    if prepared == (None,):
        raise ConfigurationError("the database has not been prepared; run `streamflow migrate`")


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
    with platform.database.connect() as connection:
        if [month_write(connection, one.relation, one.month) for one in (labels, *snapshots)] != [labels, *snapshots]:
            raise TrainingRefused(f"{month} was written anew while its dataset was being made; run it again")
    dataset.save(assembled, platform.datasets)
    written = MonthWrite(
        TRAINING_DATASET,
        month,
        max(source.revision for source in (labels, *snapshots)),
        assembled.digest,
        len(assembled.frame),
        {source.relation: source.as_source for source in (labels, *snapshots)},
        now,
        {
            "service": service.name,
            "dropped": assembled.dropped,
            "churn_rate": float(assembled.labels.mean()),
            "files": {
                labels.relation: labels.as_source,
                **{name: source for snapshot in snapshots for name, source in snapshot.sources.items()},
            },
        },
    )
    return _recorded(platform, written)


def train(platform: Platform, month: Month, now: datetime) -> Trained:
    """Fit, evaluate, compile and log the month's model.

    Raises TrainingRefused for data that must not be trained on, ArtifactRefused when the scorer cannot be compiled.
    """
    from streamflow import evaluation

    with platform.database.connect() as connection:
        source = month_write(connection, TRAINING_DATASET, month)
    data = dataset.load(platform.datasets / f"{source.digest}.parquet", platform.contract)
    candidate = fit_candidate(data, ESTIMATOR)
    roc = evaluation.roc_plot(candidate.labels, candidate.validation)
    facts = {
        "service": data.service.name,
        "estimator": candidate.model.estimator,
        "threshold": candidate.model.threshold,
        "artifact_sha256": candidate.artifact_sha256,
        "metrics": candidate.metrics,
        "parity_difference": candidate.parity.max_difference,
        "flipped_decisions": candidate.parity.flipped_decisions,
        "lineage": {
            "month": str(month),
            "dataset": {"digest": source.digest, "rows": source.rows},
            "sources": dict(source.sources),
            "files": source.facts["files"],
            "estimator": candidate.model.estimator,
            "code_version": code_version(),
            "libraries": libraries(),
            "python": machine.python_version(),
        },
    }
    run_id = platform.registry.log(_evidence(candidate, facts, roc, launched_by=platform.settings.actor))
    written = MonthWrite(
        CHURN_MODEL,
        month,
        source.revision,
        candidate.predictions_digest,
        source.rows,
        {TRAINING_DATASET: source.as_source},
        now,
        {"run_id": run_id, **facts},
    )
    measured = {**candidate.metrics, **candidate.counts, "training_seconds": candidate.seconds}
    return Trained(_recorded(platform, written), run_id, measured, candidate.parity, roc)


@dataclass(frozen=True)
class Candidate:
    """A fitted and compiled model: ``probabilities`` are the scorer's of every row, ``seconds`` those of fitting."""

    data: TrainingDataset
    model: "TrainedModel"
    artifact: bytes
    probabilities: "NDArray[np.float64]"
    parity: "Parity"
    seconds: float

    @property
    def labels(self) -> "NDArray[np.bool_]":
        """The labels of the held-out rows."""
        return self.data.labels[self.data.holdout]

    @property
    def validation(self) -> "NDArray[np.float64]":
        """The probabilities of the held-out rows."""
        return self.probabilities[self.data.holdout]

    @property
    def counts(self) -> dict[str, float]:
        """How many rows it learned from, and was measured on."""
        return {"training_rows": self.model.train_rows, "validation_rows": len(self.labels)}

    @functools.cached_property
    def metrics(self) -> dict[str, float]:
        """The metrics on the held-out rows."""
        from streamflow import evaluation

        return asdict(evaluation.metrics(self.labels, self.validation, self.model.threshold))

    @functools.cached_property
    def artifact_sha256(self) -> str:
        """The digest of the compiled scorer."""
        return hashlib.sha256(self.artifact).hexdigest()

    @functools.cached_property
    def predictions_digest(self) -> str:
        """The digest of the probabilities of every row."""
        return predictions_digest(self.data.frame[USER_ID].tolist(), self.probabilities)


def fit_candidate(data: TrainingDataset, estimator: str) -> Candidate:
    """Fit an estimator, compile it, and score every row of the dataset by both forms."""
    from streamflow import scoring, training

    started = time.perf_counter()
    model = training.fit(data, estimator, n_jobs=os.cpu_count() or 1)
    seconds = time.perf_counter() - started
    artifact = scoring.compile_pipeline(model, data)
    scorer = scoring.Scorer.from_bytes(artifact)
    scoring.self_test(scorer)
    probabilities = score(scorer, data)
    parity = scoring.parity(model.probabilities(data.features), probabilities, model.threshold)
    return Candidate(data, model, artifact, probabilities, parity, seconds)


def score(scorer: "Scorer", data: TrainingDataset) -> "NDArray[np.float64]":
    """The scorer's probability of each row of a dataset."""
    return scorer.score_columns({column.name: data.frame[column.name] for column in data.service.columns})


def _evidence(candidate: Candidate, facts: Mapping[str, Any], roc: bytes, *, launched_by: str) -> Evidence:
    from streamflow import evaluation, training

    data, model, lineage = candidate.data, candidate.model, facts["lineage"]
    importances = evaluation.importances(model)
    return Evidence(
        name=f"{data.month} {model.estimator}",
        pipeline=model.pipeline,
        service=data.service,
        example=data.features.head(EXAMPLE_ROWS),
        scorer=candidate.artifact,
        parameters={
            "estimator": model.estimator,
            **model.params,
            "threshold": model.threshold,
            "feature_service": data.service.name,
            "as_of": str(data.month.as_of),
        },
        metrics={
            **candidate.metrics,
            **candidate.counts,
            "training_seconds": candidate.seconds,
            "parity_difference": candidate.parity.max_difference,
            "flipped_decisions": candidate.parity.flipped_decisions,
        },
        tags={
            "month": str(data.month),
            "dataset_digest": lineage["dataset"]["digest"],
            "predictions_digest": candidate.predictions_digest,
            "artifact_sha256": candidate.artifact_sha256,
            "code_version": lineage["code_version"],
            "launched_by": launched_by,
        },
        images={
            "roc.png": roc,
            "confusion_matrix.png": evaluation.confusion_plot(candidate.labels, candidate.validation, model.threshold),
            "importances.png": evaluation.importance_plot(importances),
        },
        documents={"feature_schema.json": training.feature_schema(data.service), "lineage.json": lineage},
        tables={
            "importances.csv": importances,
            "predictions_sample.csv": evaluation.prediction_sample(data, candidate.validation, model.threshold),
        },
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
        facts["lineage"],
        now,
    )
    try:
        platform.ledger.register(version)
    except BaseException:
        platform.registry.delete(number)
        raise
    return version


def rebuild(platform: Platform, number: int) -> Rebuilt:
    """Make a version's dataset anew from the archived files, train again, and compare both with the record.

    Works on what the version was made from, whatever has landed since. Raises UnknownVersion, and ArchiveUnusable when
    the archive no longer has those bytes.
    """
    version, contract = platform.ledger.version(number), platform.contract
    lineage = version.lineage
    month, service = Month.parse(lineage["month"]), contract.service(version.service)
    label_month = month.shift(contract.label_horizon_months)
    frames = {
        name: platform.landing.read_archived(
            label_month if name == contract.label_table.name else month, name, source["digest"]
        ).to_pandas()
        for name, source in lineage["files"].items()
    }
    labels = frames[contract.label_table.name]
    joined = labels[[USER_ID]].assign(**{dataset.EVENT_TIMESTAMP: month.event_time})
    for view in service.views:
        known = frames[contract.tables[0].name][[USER_ID]].merge(frames[view.table.name], on=USER_ID)
        joined = joined.merge(known[[USER_ID, *(column.name for column in view.columns)]], on=USER_ID, how="left")
    data = dataset.assemble(joined, labels, service, month=month, label_month=label_month, contract=contract)
    candidate = fit_candidate(data, lineage["estimator"])
    changed = {
        name: f"{then} then, {now} now"
        for name, then, now in (
            ("code", lineage["code_version"], code_version()),
            *((library, lineage["libraries"].get(library), now) for library, now in libraries().items()),
        )
        if then != now
    }
    return Rebuilt(
        number,
        data.digest == version.dataset_digest,
        candidate.predictions_digest == version.predictions_digest,
        changed,
    )


def run_link(platform: Platform, run_id: str) -> str:
    """Where a run's page is in the MLflow UI."""
    return f"{platform.settings.mlflow_page}/#/experiments/{platform.registry.experiment_id}/runs/{run_id}"


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
