"""What a month is watched for: its customers scored, and reports on drift and on how good the scores were.

Here belongs what is compared with what, and the record of it. How drift and decay are judged is drift.py's and
decay.py's.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec

from streamflow import dataset, features, pipeline, scores
from streamflow.contract import USER_ID, Column, Contract
from streamflow.database import Database
from streamflow.drift import DriftReport
from streamflow.errors import UnknownMonth
from streamflow.months import Month
from streamflow.pipeline import Platform
from streamflow.promotion import Version, current, in_force
from streamflow.relations import DRIFT_REPORT as DRIFT_REPORT
from streamflow.relations import PERFORMANCE_REPORT as PERFORMANCE_REPORT
from streamflow.relations import of_other_months
from streamflow.settings import Settings
from streamflow.situation import made_by_another
from streamflow.warehouse import MonthWrite, Source, lock, month_write, record

if TYPE_CHECKING:
    import pandas as pd
    import psycopg

    from streamflow.decay import PerformanceReport
    from streamflow.scoring import Scorer

Kind = Literal["drift_report", "performance_report"]
_Content = TypeVar("_Content")
NAMED = 10
"""How many customers without a score are named."""


@dataclass(frozen=True)
class Report:
    """A report as it was recorded: ``content`` is its findings as plain data."""

    kind: Kind
    month: Month
    version: int
    digest: str
    content: Mapping[str, Any]
    made_at: datetime


class DriftContent(msgspec.Struct, frozen=True):
    """What a drift report says: of which month, against which one, and for which version."""

    month: str
    version: int
    reference_month: str
    report: DriftReport


@dataclass(frozen=True)
class Scoring:
    """A month's scores, of `scores.ranked`, and their record."""

    write: MonthWrite
    frame: "pd.DataFrame"

    @property
    def image(self) -> bytes:
        """How the probabilities are distributed and what contacting customers adds up to, as PNG."""
        from streamflow import plots

        facts = self.write.facts
        image: bytes = plots.contacts_plot(self.frame, facts["capacity"], facts["version"])
        return image


@dataclass(frozen=True)
class Drift:
    """A month's drift report, its record, its plots as PNG by title, and the page for people."""

    write: MonthWrite
    content: DriftContent
    images: Mapping[str, bytes]
    page: Path


@dataclass(frozen=True)
class Performance:
    """A month's performance report, its record, and the reports of all months up to it, oldest first."""

    write: MonthWrite
    report: "PerformanceReport"
    history: "tuple[PerformanceReport, ...]"

    @property
    def image(self) -> bytes:
        """What was promised and achieved, month by month, as PNG."""
        from streamflow import plots

        image: bytes = plots.performance_plot(self.history)
        return image


# --- scores ---------------------------------------------------------------------------------------------------------


def score_month(platform: Platform, month: Month, now: datetime, *, version: int | None = None) -> Scoring | None:
    """Score every customer of the month and keep what came out; None, with nothing changed, while nothing can.

    A month is scored by the version that was Production when it was scored first, however often its data is corrected,
    or by ``version``. None is returned while nothing is in Production. Raises UnknownMonth when the month has no
    snapshots, UnknownVersion, ArtifactRefused.
    """
    from streamflow import procedure

    contract = platform.contract
    chosen = _scores_with(platform, month, version)
    if chosen is None:
        return None
    scorer = pipeline.scorer_of(platform, chosen)
    with platform.database.connect() as connection:
        snapshots = {one.relation: one.as_source for one in _snapshots(connection, contract, month)}
    found = features.features_of_month(platform.database, platform.feature_store, month, contract)
    rows = dataset.scorable(found, month, _columns_of(scorer, contract, contract.fee))
    probabilities = procedure.score(scorer, rows)
    worth, capacity = platform.training_config.value, platform.training_config.threshold.capacity
    fees = rows[contract.fee].to_numpy(dtype="float64")
    frame = scores.ranked(rows[USER_ID], probabilities, fees, chosen.threshold, worth)
    unscored = sorted(set(found[USER_ID]) - set(rows[USER_ID]))
    written = scores.save(
        platform.database,
        scores_folder(platform.settings),
        month,
        frame,
        chosen.version,
        capacity=capacity,
        revision=max(source["revision"] for source in snapshots.values()),
        sources=snapshots,
        facts={
            "run_id": chosen.run_id,
            "threshold": chosen.threshold,
            "artifact_sha256": chosen.artifact_sha256,
            "capacity": capacity,
            "value": msgspec.to_builtins(worth),
            "unscored": {"customers": len(unscored), "such_as": unscored[:NAMED]},
        },
        now=now,
    )
    return Scoring(written, frame)


def scores_folder(settings: Settings) -> Path:
    """Where scores are exported to: `scores.save`."""
    return settings.home / "scores"


def _scores_with(platform: Platform, month: Month, version: int | None) -> Version | None:
    """The version to score a month with, as it is in force."""
    entries = platform.ledger.entries()
    if version is None:
        version = _scored_with(platform.database, month) or current(entries)
    return None if version is None else in_force(entries, platform.ledger.version(version))


def _scored_with(database: Database, month: Month) -> int | None:
    try:
        with database.connect() as connection:
            number: int = month_write(connection, scores.CHURN_SCORES, month).facts["version"]
    except UnknownMonth:
        return None
    return number


def _columns_of(scorer: "Scorer", contract: Contract, *more: str) -> list[Column]:
    wanted = {feature.name for feature in scorer.features} | set(more)
    return [column for column in contract.features if column.name in wanted]


def _snapshots(connection: "psycopg.Connection[Any]", contract: Contract, month: Month) -> list[MonthWrite]:
    return [month_write(connection, str(table.snapshot), month) for table in contract.snapshots]


# --- drift ----------------------------------------------------------------------------------------------------------


def report_drift(platform: Platform, month: Month, now: datetime) -> Drift:
    """Hold a month against the newest month that the version which scored it was trained on.

    Raises UnknownMonth when the month has not been scored, or when the other is no longer there; UnknownVersion.
    """
    from streamflow import drift, drift_html, plots, procedure

    contract = platform.contract
    with platform.database.connect() as connection:
        scored = month_write(connection, scores.CHURN_SCORES, month)
        sources = {one.relation: one.as_source for one in (*_snapshots(connection, contract, month), scored)}
    version = platform.ledger.version(scored.facts["version"])
    trained_on = trained_months(version)[-1]
    with platform.database.connect() as connection:
        against = _snapshots(connection, contract, trained_on) if trained_on != month else []
    scorer = pipeline.scorer_of(platform, version)
    reference, now_there = (
        features.features_of_month(platform.database, platform.feature_store, one, contract)
        for one in (trained_on, month)
    )
    columns = _columns_of(scorer, contract)
    report = drift.compare(
        reference,
        now_there,
        contract.features,
        reference_scores=procedure.score(scorer, dataset.scorable(reference, trained_on, columns)),
        current_scores=procedure.score(scorer, dataset.scorable(now_there, month, columns)),
    )
    content = DriftContent(str(month), version.version, str(trained_on), report)
    written = _keep(
        platform, DRIFT_REPORT, month, version, content, sources, report.current_users, now, against=against
    )
    page = platform.settings.home / "reports" / str(month) / "drift.html"
    drift_html.evidently_report(reference, now_there, contract.features, page)
    images = {
        "Drift": plots.drift_plot(report),
        "Features that drift": plots.drifted_features_plot(report, reference, now_there),
    }
    return Drift(written, content, images, page)


# --- performance ----------------------------------------------------------------------------------------------------


def report_performance(platform: Platform, month: Month, now: datetime) -> Performance:
    """Hold the scores that the month was given against its labels, and against what their version promised.

    Raises UnknownMonth when the month was not scored or has no labels, TrainingRefused when its dataset is gone or one
    of its labels is the same for all held-out users.
    """
    from streamflow import decay, evaluation, procedure

    config, contract = platform.training_config, platform.contract
    scored = scores.load(platform.database, month)
    with platform.database.connect() as connection:
        labelled = month_write(connection, pipeline.TRAINING_DATASET, month)
    version = in_force(platform.ledger.entries(), platform.ledger.version(scored.version))
    rows = pipeline.training_dataset(platform, labelled.digest).frame.merge(scored.frame, on=USER_ID)
    held_out, labels = dataset.split(rows[USER_ID].tolist()), rows[contract.label].to_numpy(dtype="bool")
    probabilities = rows["probability"].to_numpy(dtype="float64")
    trained_on = trained_months(version)
    drop = None
    if month not in trained_on:
        learned_from = pipeline.training_dataset(platform, version.dataset_digest)
        reference = learned_from.holdout_rows
        before = procedure.score(pipeline.scorer_of(platform, version), reference)
        drop = decay.explain_drop(
            decay.Side(learned_from.month, reference, learned_from.labels[learned_from.holdout], before),
            decay.Side(month, rows[held_out], labels[held_out], probabilities[held_out]),
            contract.service(version.service),
            seed=config.seed,
        )
    history = performance_history(platform.database, before=month)
    report = decay.performance_report(
        decay.Outcome(
            month, probabilities, scored.threshold, labels, held_out, evaluation.segment_groups(rows, config.segments)
        ),
        decay.Promise(version.version, trained_on, version.evidence),
        history,
        platform.policy.decay,
        seed=config.seed,
        draws=config.bootstrap_draws,
        drop=drop,
    )
    sources = {scores.CHURN_SCORES: scored.write.as_source, pipeline.TRAINING_DATASET: labelled.as_source}
    written = _keep(platform, PERFORMANCE_REPORT, month, version, report, sources, len(rows), now)
    return Performance(written, report, (*history, report))


def trained_months(version: Version) -> tuple[Month, ...]:
    """The months that a version learned from, oldest first."""
    return tuple(sorted(Month.parse(month) for month in version.lineage["window"]))


def drift_history(database: Database) -> "list[DriftContent]":
    """The drift report in force of each month, oldest first."""
    return [_content(one, DriftContent) for one in reports(database, DRIFT_REPORT).values()]


def performance_history(database: Database, before: Month | None = None) -> "list[PerformanceReport]":
    """The performance report in force of each month, or of those before one, oldest first."""
    from streamflow.decay import PerformanceReport

    found = reports(database, PERFORMANCE_REPORT).values()
    return [_content(one, PerformanceReport) for one in found if before is None or one.month < before]


def _content(report: Report, kind: type[_Content]) -> _Content:
    """What a report says; raises ConfigurationError for one that another version of this program has made."""
    try:
        return msgspec.convert(report.content, kind)
    except msgspec.ValidationError as failure:
        raise made_by_another(report.kind, str(report.month), failure) from failure


# --- the record of reports ------------------------------------------------------------------------------------------


def reports(database: Database, kind: Kind) -> dict[Month, Report]:
    """The report in force of each month, oldest month first."""
    with database.connect() as connection:
        rows = connection.execute(
            "SELECT DISTINCT ON (month) kind, month, model_version, digest, content, made_at FROM streamflow.reports "
            "WHERE kind = %s ORDER BY month, id DESC",
            (kind,),
        ).fetchall()
    return {Month.parse(row[1]): Report(row[0], Month.parse(row[1]), *row[2:]) for row in rows}


def _keep(
    platform: Platform,
    kind: Kind,
    month: Month,
    version: Version,
    content: object,
    sources: Mapping[str, Source],
    rows: int,
    now: datetime,
    *,
    against: Iterable[MonthWrite] = (),
) -> MonthWrite:
    """Add a report to those of its month, unless the newest says the same; ``against`` is what another month held."""
    document = msgspec.json.encode(msgspec.to_builtins(content), order="deterministic")
    written = MonthWrite(
        kind,
        month,
        max(source["revision"] for source in sources.values()),
        hashlib.sha256(document).hexdigest(),
        rows,
        {**sources, **of_other_months(against)},
        now,
        {"version": version.version},
    )
    with platform.database.connect() as connection:
        lock(connection, kind, month)
        newest = connection.execute(
            "SELECT digest FROM streamflow.reports WHERE kind = %s AND month = %s ORDER BY id DESC LIMIT 1",
            (kind, str(month)),
        ).fetchone()
        if newest != (written.digest,):
            connection.execute(
                "INSERT INTO streamflow.reports (kind, month, model_version, digest, content, made_at) "
                "VALUES (%s, %s, %s, %s, %s, %s)",
                (kind, str(month), version.version, written.digest, document.decode(), now),
            )
        record(connection, written)
    return written
