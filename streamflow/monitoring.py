"""What a month is watched for: its customers scored, and reports on drift and on how good the scores were.

Here belongs what is compared with what, and the record of it. How drift and decay are judged is drift.py's and
decay.py's.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from streamflow import dataset, features, pipeline, scores
from streamflow.contract import USER_ID, Column, Contract
from streamflow.database import Database
from streamflow.errors import UnknownMonth
from streamflow.months import Month
from streamflow.pipeline import Platform
from streamflow.promotion import Version, current, in_force
from streamflow.warehouse import MonthWrite, Source, lock, month_write, record

if TYPE_CHECKING:
    import pandas as pd
    import psycopg
    from numpy.typing import NDArray

    from streamflow.drift import DriftReport
    from streamflow.scoring import Scorer

DRIFT_REPORT = "drift_report"
PERFORMANCE_REPORT = "performance_report"
Kind = Literal["drift_report", "performance_report"]
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


@dataclass(frozen=True)
class Drift:
    """A month's drift report, what was compared, and its record."""

    write: MonthWrite
    report: "DriftReport"
    reference: "pd.DataFrame"
    current: "pd.DataFrame"


# --- scores ---------------------------------------------------------------------------------------------------------


def score_month(platform: Platform, month: Month, now: datetime, *, version: int | None = None) -> MonthWrite | None:
    """Score every customer of the month and keep what came out; None, with nothing changed, while nothing can.

    A month is scored by the version that was Production when it was scored first, however often its data is corrected,
    or by ``version``. None is returned while nothing is in Production. Raises UnknownMonth when the month has no
    snapshots, UnknownVersion, ArtifactRefused.
    """
    contract = platform.contract
    chosen = _scores_with(platform, month, version)
    if chosen is None:
        return None
    scorer = pipeline.scorer_of(platform, chosen)
    with platform.database.connect() as connection:
        snapshots = _snapshots(connection, contract, month)
    found = features.features_of_month(platform.database, platform.feature_store, month, contract)
    rows = dataset.scorable(found, month, _columns_of(scorer, contract, contract.fee))
    probabilities = _score(scorer, rows)
    worth, capacity = platform.training_config.value, platform.training_config.threshold.capacity
    fees = rows[contract.fee].to_numpy(dtype="float64")
    frame = scores.ranked(rows[USER_ID], probabilities, fees, chosen.threshold, worth)
    unscored = sorted(set(found[USER_ID]) - set(rows[USER_ID]))
    return scores.save(
        platform.database,
        platform.settings.home / "scores",
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


def _score(scorer: "Scorer", rows: "pd.DataFrame") -> "NDArray[Any]":
    return scorer.score_columns({feature.name: rows[feature.name].to_numpy() for feature in scorer.features})


def _snapshots(connection: "psycopg.Connection[Any]", contract: Contract, month: Month) -> dict[str, Source]:
    names = [str(table.snapshot) for table in contract.snapshots]
    return {name: month_write(connection, name, month).as_source for name in names}


# --- drift ----------------------------------------------------------------------------------------------------------


def report_drift(platform: Platform, month: Month, now: datetime) -> Drift:
    """Hold a month against the newest month that the version which scored it was trained on.

    Raises UnknownMonth when the month has not been scored, or when the other is no longer there; UnknownVersion.
    """
    from streamflow import drift

    contract = platform.contract
    with platform.database.connect() as connection:
        scored = month_write(connection, scores.CHURN_SCORES, month)
        sources = {**_snapshots(connection, contract, month), scores.CHURN_SCORES: scored.as_source}
    version = platform.ledger.version(scored.facts["version"])
    trained_on = Month(version.as_of.year, version.as_of.month)
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
        reference_scores=_score(scorer, dataset.scorable(reference, trained_on, columns)),
        current_scores=_score(scorer, dataset.scorable(now_there, month, columns)),
    )
    facts = {"version": version.version, "reference_month": str(trained_on)}
    written = _keep(
        platform, DRIFT_REPORT, month, version, {**facts, "drift": report}, sources, report.current_users, now
    )
    return Drift(written, report, reference, now_there)


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
    content: Mapping[str, Any],
    sources: Mapping[str, Source],
    rows: int,
    now: datetime,
) -> MonthWrite:
    """Add a report to those of its month, unless the newest says the same."""
    document = msgspec.json.encode(msgspec.to_builtins(content), order="deterministic")
    written = MonthWrite(
        kind,
        month,
        max(source["revision"] for source in sources.values()),
        hashlib.sha256(document).hexdigest(),
        rows,
        sources,
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
