"""One function for each asset of the graph: what it reads, what it makes of it, what it records.

Dagster's assets and the command line call these with a platform, a month and the time. Here is the order of things;
how each is done is in the module that it belongs to.
"""

import functools
import hashlib
import platform as machine
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from streamflow import dataset, features, warehouse
from streamflow.contract import CONTRACT, USER_ID, Contract, FeatureView, Table
from streamflow.database import Database
from streamflow.dataset import TrainingDataset
from streamflow.errors import ArtifactRefused, ConfigurationError, TrainingRefused, UnknownMonth, UnknownVersion
from streamflow.landing import LandingZone
from streamflow.months import Month
from streamflow.policy import Policy
from streamflow.promotion import (
    Decision,
    Entry,
    Evidence,
    Gate,
    Ledger,
    Version,
    already_promoted,
    in_force,
)
from streamflow.registry import SCORER_PATH, Registry, RunRecord
from streamflow.relations import CHURN_MODEL as CHURN_MODEL
from streamflow.relations import REGISTERED_VERSION as REGISTERED_VERSION
from streamflow.relations import TRAINING_DATASET as TRAINING_DATASET
from streamflow.relations import considered, of_other_months
from streamflow.settings import PROJECT_ROOT, Settings
from streamflow.training_config import TrainingConfig
from streamflow.warehouse import MonthWrite, month_write, month_writes, record

if TYPE_CHECKING:
    import feast

    from streamflow.evaluation import Comparison
    from streamflow.procedure import Candidate, Forward, Measured
    from streamflow.scoring import Scorer

MODEL_CARD = "model_card.html"
UNUSABLE = (ArtifactRefused, TrainingRefused, UnknownVersion)
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
    def training_config(self) -> TrainingConfig:
        """The training configuration in force."""
        return TrainingConfig.load(self.settings.training_file)

    @functools.cached_property
    def feature_store(self) -> "feast.FeatureStore":
        """Feast."""
        return features.feature_store(self.database, self.settings.online_redis_url)

    @property
    def datasets(self) -> Path:
        """Where training datasets are kept by digest."""
        return self.settings.home / "datasets"


@dataclass(frozen=True)
class Trained:
    """A logged training run and what a person wants to see of it.

    ``forwards`` validate models forward in time: this one on the month after, the one of the month before on this one;
    ``not_validated`` says why one of them could not be. ``images`` are the run's plots as PNG by file name.
    """

    write: MonthWrite
    run_id: str
    candidate: "Candidate"
    measured: "Measured"
    forwards: tuple["Forward", ...]
    not_validated: tuple[str, ...]
    images: Mapping[str, bytes]


@dataclass(frozen=True)
class Registered:
    """A registered version and what the policy made of it."""

    write: MonthWrite
    version: Version
    decision: Decision


@dataclass(frozen=True)
class Rebuilt:
    """Whether a version's datasets and predictions came out the same again, and what has changed since it was made.

    ``largest_difference`` is between the probabilities of the registered scorer and of the one that was trained again.
    """

    version: int
    same_dataset: bool
    same_predictions: bool
    largest_difference: float
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
        platform.database,
        table,
        month,
        rows,
        digest=revision.sha256,
        revision=revision.revision,
        meanings=revision.meanings,
        now=now,
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
    from streamflow import procedure

    contract = platform.contract
    label_month = month.shift(contract.label_horizon_months)
    with platform.database.connect() as connection:
        labels = month_write(connection, contract.label_table.name, label_month)
        snapshots = [month_write(connection, str(table.snapshot), month) for table in contract.snapshots]
    for source in (labels, *snapshots):
        dataset.require_meanings(source, contract)
    assembled = dataset.assemble(
        features.historical_features(platform.database, platform.feature_store, month, contract),
        warehouse.labels(platform.database, label_month, contract),
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
            "dropped": assembled.dropped,
            "churn_rate": float(assembled.labels.mean()),
            "possible_leaks": procedure.possible_leaks(assembled, platform.training_config, contract),
            "files": {
                labels.relation: labels.as_source,
                **{name: source for snapshot in snapshots for name, source in snapshot.sources.items()},
            },
        },
    )
    return _recorded(platform, written)


def train(
    platform: Platform,
    month: Month,
    now: datetime,
    *,
    estimator: str | None = None,
    service: str | None = None,
    cause: str | None = None,
) -> Trained:
    """Choose, fit, evaluate, compile and log the month's model; ``estimator`` fits that one as it comes instead.

    Earlier months that have a dataset may be learned from too; see `procedure.run`. ``cause`` is what the model is
    trained for, where nobody asked for it; see loop.py.

    Raises ConfigurationError for an unknown estimator or service, TrainingRefused for data that must not be trained on.
    """
    from streamflow import procedure

    with platform.database.connect() as connection:
        source = month_write(connection, TRAINING_DATASET, month)
    data = training_dataset(platform, source.digest)
    how = procedure.Procedure.of(
        platform.training_config,
        platform.policy,
        estimator=estimator,
        service=service,
        contract=platform.contract,
    )
    datasets = [one for one in month_writes(platform.database) if one.relation == TRAINING_DATASET]
    others = considered(month, how.earlier_months, datasets)
    earlier = [_earlier_dataset(platform, one, month) for one in others]
    candidate = procedure.run(data, how, platform.contract, earlier=earlier)
    measured = procedure.measure(candidate, platform.policy, platform.contract)
    model, not_validated = candidate.model, []
    after = before = None
    try:
        after = _forward(platform, candidate.scorer, month, month.shift(1), model.threshold)
        before = _validate_the_month_before(platform, data)
        if before is not None:
            _tell_forward(platform, *before)
    except UNUSABLE as failure:
        not_validated.append(str(failure))
    lineage = {
        "as_of": str(month.as_of),
        "cause": cause,
        "window": [str(one) for one in candidate.window.window.months],
        "window_name": candidate.window.window.name,
        "window_reason": candidate.window.reason,
        "windows": [score.document for score in candidate.window.scores],
        **_origin(platform, source),
        "earlier": [_origin(platform, one) for one in others],
        "estimator": model.estimator,
        "service": model.service.name,
        "calibrated": model.calibrated,
        "threshold": model.threshold,
        **how.document,
        "code_version": code_version(),
        "libraries": libraries(),
        "python": machine.python_version(),
    }
    run, images = _run_record(platform, candidate, measured, after, source, lineage)
    run_id = platform.registry.log(run)
    written = MonthWrite(
        CHURN_MODEL,
        month,
        source.revision,
        candidate.predictions_digest,
        source.rows,
        {TRAINING_DATASET: source.as_source, **of_other_months(others)},
        now,
        {
            "run_id": run_id,
            "earlier_months": how.earlier_months,
            "service": model.service.name,
            "threshold": model.threshold,
            "artifact_sha256": candidate.artifact_sha256,
            "evidence": msgspec.to_builtins(measured.evidence),
            "lineage": lineage,
        },
    )
    forwards = (*([before[1]] if before else []), *([after] if after else []))
    return Trained(_recorded(platform, written), run_id, candidate, measured, forwards, tuple(not_validated), images)


def _earlier_dataset(platform: Platform, source: MonthWrite, month: Month) -> TrainingDataset:
    try:
        return training_dataset(platform, source.digest)
    except TrainingRefused as failure:
        raise TrainingRefused(f"{month} may learn from {source.month} too, but {failure} for {source.month}") from None


def _origin(platform: Platform, source: MonthWrite) -> dict[str, Any]:
    """What a training dataset was made from, enough to make it again."""
    return {
        "month": str(source.month),
        "label_month": str(source.month.shift(platform.contract.label_horizon_months)),
        "dataset": {"digest": source.digest, "rows": source.rows},
        "sources": dict(source.sources),
        "files": source.facts["files"],
    }


def training_dataset(platform: Platform, digest: str) -> TrainingDataset:
    """The dataset of that digest; raises TrainingRefused when it is gone or altered."""
    return dataset.load(platform.datasets / f"{digest}.parquet", platform.contract)


def _forward(
    platform: Platform, scorer: "Scorer", trained_on: Month, month: Month, threshold: float
) -> "Forward | None":
    """The scorer's validation on a later month, if that has a dataset already."""
    from streamflow import procedure

    try:
        with platform.database.connect() as connection:
            later = month_write(connection, TRAINING_DATASET, month)
    except UnknownMonth:
        return None
    data = training_dataset(platform, later.digest)
    return procedure.forward(scorer, data, trained_on, threshold, platform.training_config)


def _validate_the_month_before(platform: Platform, data: TrainingDataset) -> "tuple[Version, Forward] | None":
    """The newest version of the month before, and how that does on this month."""
    from streamflow import procedure

    month = data.month.shift(-1)
    versions = [version for version in platform.ledger.versions() if version.as_of == month.as_of]
    if not versions:
        return None
    version = in_force(platform.ledger.entries(), versions[-1])
    scorer = scorer_of(platform, version)
    return version, procedure.forward(scorer, data, month, version.threshold, platform.training_config)


def _tell_forward(platform: Platform, version: Version, validated: "Forward") -> None:
    """Put what became known of a version later on its run: the metrics, and the section of its model card."""
    from streamflow import model_card

    platform.registry.add_metrics(version.run_id, _forward_metrics(validated))
    card = platform.registry.page(version.run_id, MODEL_CARD)
    card = model_card.with_forward(card, validated, version.evidence.metrics)
    platform.registry.put_page(version.run_id, MODEL_CARD, card)


def _forward_metrics(validated: "Forward") -> dict[str, float]:
    return {
        f"forward_{name}{suffix}": value
        for name, interval in validated.metrics.items()
        for suffix, value in (("", interval.value), ("_low", interval.low), ("_high", interval.high))
    }


def _run_record(
    platform: Platform,
    candidate: "Candidate",
    measured: "Measured",
    after: "Forward | None",
    source: MonthWrite,
    lineage: Mapping[str, Any],
) -> tuple[RunRecord, Mapping[str, bytes]]:
    from streamflow import evaluation, report, selection, training, windows

    data, model = candidate.data, candidate.model
    images = report.images(candidate, measured, platform.contract)
    intervals = measured.evidence.metrics
    record = RunRecord(
        name=f"{data.month} {model.estimator} {model.service.name}",
        pipeline=model.pipeline,
        service=model.service,
        example=data.frame[model.service.names].head(EXAMPLE_ROWS),
        scorer=candidate.artifact,
        parameters={
            "estimator": model.estimator,
            **model.params,
            "calibrated": model.calibrated,
            "threshold": model.threshold,
            "feature_service": model.service.name,
            "as_of": lineage["as_of"],
            "window": " ".join(lineage["window"]),
            "window_name": lineage["window_name"],
            "seed": lineage["seed"],
            "config_digest": lineage["config_digest"],
        },
        metrics={
            **{name: interval.value for name, interval in intervals.items()},
            **{f"{name}_low": interval.low for name, interval in intervals.items()},
            **{f"{name}_high": interval.high for name, interval in intervals.items()},
            **{f"train_{name}": one for name, one in measured.evidence.train_metrics.items()},
            "perfect_ece": measured.evidence.perfect_ece,
            "training_rows": model.train_rows,
            "validation_rows": measured.evidence.users,
            "parity_difference": candidate.parity.max_difference,
            "flipped_decisions": candidate.parity.flipped_decisions,
            "scoring_microseconds": measured.evidence.scoring_microseconds,
            "expected_value": measured.value.expected_value,
            "revenue_at_risk": measured.value.revenue_at_risk,
            **({} if after is None else _forward_metrics(after)),
            **{f"seconds_{step}": took for step, took in {**candidate.seconds, **measured.seconds}.items()},
        },
        tags={
            "month": str(data.month),
            "dataset_digest": lineage["dataset"]["digest"],
            "predictions_digest": candidate.predictions_digest,
            "artifact_sha256": candidate.artifact_sha256,
            "code_version": lineage["code_version"],
            "config_digest": lineage["config_digest"],
            "chosen_because": report.why_chosen(candidate),
            "window_chosen_because": candidate.window.reason,
            "launched_by": platform.settings.actor,
        },
        images=images,
        documents={
            "feature_schema.json": training.feature_schema(model.service),
            "lineage.json": lineage,
            "evidence.json": msgspec.to_builtins(measured.evidence),
            "training_config.json": candidate.procedure.config.document,
        },
        tables={
            "importances.csv": measured.importances,
            "predictions_sample.csv": evaluation.prediction_sample(
                data.holdout_rows, candidate.validation, model.threshold
            ),
            **({"candidates.csv": selection.as_table(candidate.selection)} if candidate.selection else {}),
            **({"windows.csv": windows.as_table(candidate.window)} if candidate.window.scores else {}),
        },
        pages={MODEL_CARD: report.card(candidate, measured, after, source, lineage, images, platform.contract)},
    )
    return record, images


def register(platform: Platform, month: Month, now: datetime) -> Registered:
    """Register the month's newest model as a version, once, and let the policy decide about it.

    Raises ArtifactRefused, with nothing registered, when the compiled scorer in the registry is not the one that was
    made, or does not agree with the pipeline.
    """
    with platform.database.connect() as connection:
        model = month_write(connection, CHURN_MODEL, month)
    facts = model.facts
    version = platform.ledger.version_of_run(facts["run_id"])
    if version is None:
        version = _new_version(platform, model, now)
    decision = platform.ledger.apply_policy(
        version, now=now, policy=platform.policy, compare=functools.partial(compare_versions, platform)
    )
    if decision.reason != already_promoted(version.version):
        _explain(platform, version, decision)
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
    evidence = _completed_evidence(platform, facts)
    dataset_digest = model.sources[TRAINING_DATASET]["digest"]
    auc, trained_on = evidence.metrics["auc"], " ".join(facts["lineage"]["window"])
    number = platform.registry.register(
        facts["run_id"],
        tags={
            "as_of": str(model.month.as_of),
            "feature_service": facts["service"],
            "estimator": facts["lineage"]["estimator"],
            "dataset_digest": dataset_digest,
            "artifact_sha256": facts["artifact_sha256"],
            "predictions_digest": model.digest,
            "config_digest": facts["lineage"]["config_digest"],
            "parity_difference": repr(evidence.parity_difference),
            "flipped_decisions": str(evidence.flipped_decisions),
            **{name: f"{one.value:.4f} ({one.low:.4f} to {one.high:.4f})" for name, one in evidence.metrics.items()},
        },
        description=(
            f"{facts['lineage']['estimator']} on {facts['service']}, trained on {trained_on}: AUC {auc.value:.3f} "
            f"({auc.low:.3f} to {auc.high:.3f}) on {evidence.users:,} held-out users"
        ),
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
        evidence,
        facts["lineage"],
        now,
    )
    try:
        platform.ledger.register(version)
    except BaseException:
        if (registered := platform.ledger.version_of_run(version.run_id)) is not None:
            return registered  # by somebody else at the same time
        platform.registry.delete(number)
        raise
    return version


def _completed_evidence(platform: Platform, facts: Mapping[str, Any]) -> Evidence:
    """The training run's evidence and what registry and online store tell: the model as it would be served."""
    from streamflow import scoring

    service = platform.contract.service(facts["service"])
    scorer = _recorded_scorer(platform, facts["run_id"], facts["artifact_sha256"])
    try:
        scoring.self_test(scorer)
    except ArtifactRefused:
        golden_rows_reproduced = False
    else:
        golden_rows_reproduced = True
    evidence = msgspec.convert(facts["evidence"], Evidence)
    if evidence.flipped_decisions or evidence.parity_difference > scoring.MAX_DIFFERENCE:
        raise ArtifactRefused(
            f"the compiled scorer of run {facts['run_id']} differs from its pipeline by {evidence.parity_difference:g} "
            f"and flips {evidence.flipped_decisions} decisions; the version is refused: train the month again"
        )
    return msgspec.structs.replace(
        evidence,
        golden_rows_reproduced=golden_rows_reproduced,
        features_offline=features.offline(platform.database, platform.feature_store, service),
        signature_fits=platform.registry.input_names(facts["run_id"])
        == service.names
        == [feature.name for feature in scorer.features],
    )


def _explain(platform: Platform, version: Version, decision: Decision) -> None:
    """Put the decision and its gates on the version: on its model card and in its tags."""
    tags = {f"gate.{gate.name}": "passed" if gate.passed else "failed" for gate in decision.gates}
    platform.registry.set_tags(version.version, {**tags, "decision": decision.reason})
    _put_on_card(platform, version, decision.gates, decision.reason)


def explain(platform: Platform, entry: Entry) -> None:
    """Put a decision of the ledger on the model card of the version that it is about."""
    reason = f"{entry.action} by {entry.by} on {entry.at:%Y-%m-%d %H:%M} UTC: {entry.reason}"
    _put_on_card(platform, platform.ledger.version(entry.version), entry.gates, reason)


def _put_on_card(platform: Platform, version: Version, gates: tuple[Gate, ...], reason: str) -> None:
    from streamflow import model_card

    card = platform.registry.page(version.run_id, MODEL_CARD)
    platform.registry.put_page(
        version.run_id, MODEL_CARD, model_card.with_decision(card, gates, reason, version.version)
    )


def _recorded_scorer(platform: Platform, run_id: str, artifact_sha256: str) -> "Scorer":
    """The scorer as the registry has it; raises ArtifactRefused unless it is the one recorded."""
    from streamflow import scoring

    try:
        artifact = platform.registry.scorer(run_id)
    except UnknownVersion as failure:
        raise UnknownVersion(
            f"MLflow has no scorer of run {run_id} any more; restore mlflow/ from a backup"
        ) from failure
    if (found := scoring.sha256(artifact)) != artifact_sha256:
        raise ArtifactRefused(
            f"MLflow's scorer of run {run_id} has SHA-256 {found}; the record says {artifact_sha256}; restore it "
            "from a backup of mlflow/, and find out who changed it"
        )
    return scoring.Scorer.from_bytes(artifact)


def scorer_of(platform: Platform, version: Version) -> "Scorer":
    """A version's compiled scorer, verified by our own record of its digest and by its self-test."""
    from streamflow import scoring

    scorer = _recorded_scorer(platform, version.run_id, version.artifact_sha256)
    scoring.self_test(scorer)
    return scorer


def compare_versions(platform: Platform, candidate: Version, production: Version) -> "Comparison":
    """Hold a version against Production on the held-out users of the newer of the months that they were trained on.

    On its own old month a model of long ago would beat what the world of today needs. Raises TrainingRefused when that
    dataset is gone, ArtifactRefused when a scorer is not the one registered.
    """
    from streamflow import procedure

    newer = max(candidate, production, key=lambda version: version.as_of)
    return procedure.compare(
        training_dataset(platform, newer.dataset_digest),
        scorer_of(platform, candidate),
        scorer_of(platform, production),
        procedure.Procedure.of_document(candidate.lineage, platform.contract).config,
    )


def remeasure(platform: Platform, version: Version, threshold: float) -> Evidence:
    """Measure a version again as it would decide at another threshold, on the dataset that it was trained on.

    Raises TrainingRefused when that dataset is gone, ArtifactRefused when the scorer is not the one registered.
    """
    from streamflow import procedure

    return procedure.at_threshold(
        version.evidence,
        scorer_of(platform, version),
        training_dataset(platform, version.dataset_digest),
        threshold,
        procedure.Procedure.of_document(version.lineage, platform.contract).config,
        platform.contract,
    )


def rebuild(platform: Platform, number: int) -> Rebuilt:
    """Make a version's datasets anew from the archived files, train again, and compare both with the record.

    Works on what the version was made from, and by the configuration of then, whatever has landed or changed since.
    Raises UnknownVersion, and ArchiveUnusable when the archive no longer has those bytes.
    """
    from streamflow import procedure

    version = platform.ledger.version(number)
    how = procedure.Procedure.of_document(version.lineage, platform.contract)
    data, *earlier = (_archived_dataset(platform, one) for one in (version.lineage, *version.lineage["earlier"]))
    candidate = procedure.run(data, how, platform.contract, earlier=earlier)
    recorded = [version.dataset_digest, *(one["dataset"]["digest"] for one in version.lineage["earlier"])]
    registered = procedure.score(scorer_of(platform, version), data.frame)
    then, libraries_then = version.lineage["code_version"], version.lineage["libraries"]
    changes = (
        ("code", then, code_version()),
        *((library, libraries_then.get(library), now) for library, now in libraries().items()),
    )
    return Rebuilt(
        number,
        [one.digest for one in (data, *earlier)] == recorded,
        candidate.predictions_digest == version.predictions_digest,
        float(abs(registered - candidate.probabilities).max()),
        {name: f"{then} then, {now} now" for name, then, now in changes if then != now},
    )


def _archived_dataset(platform: Platform, origin: Mapping[str, Any]) -> TrainingDataset:
    contract, month, label_month = platform.contract, Month.parse(origin["month"]), Month.parse(origin["label_month"])
    frames = {
        name: platform.landing.read_archived(
            label_month if name == contract.label_table.name else month, name, source["digest"]
        ).to_pandas()
        for name, source in origin["files"].items()
    }
    labels = frames[contract.label_table.name]
    joined = labels[[USER_ID]].assign(**{dataset.EVENT_TIMESTAMP: month.event_time})
    for view in contract.views:
        known = frames[contract.tables[0].name][[USER_ID]].merge(frames[view.table.name], on=USER_ID)
        joined = joined.merge(known[[USER_ID, *(column.name for column in view.columns)]], on=USER_ID, how="left")
    return dataset.assemble(joined, labels, month=month, label_month=label_month, contract=contract)


def run_link(platform: Platform, run_id: str) -> str:
    """Where a run's page is in the MLflow UI."""
    return f"{platform.settings.mlflow_page}/#/experiments/{platform.registry.experiment_id}/runs/{run_id}"


def card_link(platform: Platform, run_id: str) -> str:
    """Where a run's model card is in the MLflow UI."""
    return f"{run_link(platform, run_id)}/artifacts/{MODEL_CARD}"


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
