"""What the closed loop leaves in PostgreSQL: months, reports, retrainings; in the platform's own types."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np
import pandas as pd
from psycopg.types.json import Jsonb
from serving_world import Platform, simulated_values

from streamflow import drift, relations
from streamflow.contract import CONTRACT, USER_ID
from streamflow.decay import Achieved, DropExplained, Finding, PerformanceReport
from streamflow.evaluation import Interval
from streamflow.monitoring import DRIFT_REPORT, PERFORMANCE_REPORT, DriftContent
from streamflow.months import Month

WRITTEN = datetime(2024, 3, 1, 6, tzinfo=UTC)
USERS, SCORED = 7_043, 7_032
FINDINGS = ("worse_than_promised", "no_better_than_chance", "worse_calibrated", "sliding")


def write_month(platform: Platform, month: str, *, labelled: bool = True, scored: bool = True) -> None:
    """State that a month has landed and what has been made of it: all but models."""
    made = {
        relation: sources
        for relation, sources in relations.relations().items()
        if relation not in relations.TRAINED
        and (labelled or not relations.needs_labels(relation))
        and (scored or relation not in relations.WATCHED)
    }
    for relation, sources in made.items():
        platform.execute(
            "INSERT INTO streamflow.month_writes (relation, month, revision, digest, rows, sources, facts, written_at) "
            "VALUES (%s, %s, 1, 'd', %s, %s, '{}', %s)",
            relation,
            month,
            SCORED if relation == relations.CHURN_SCORES else USERS,
            Jsonb({source: {"revision": 1, "digest": "d"} for source in sources}),
            WRITTEN,
        )


def report(platform: Platform, kind: str, month: str, version: int, content: object) -> None:
    """Record a report as `monitoring` does."""
    platform.execute(
        "INSERT INTO streamflow.reports (kind, month, model_version, digest, content, made_at) "
        "VALUES (%s, %s, %s, 'd', %s, %s)",
        kind,
        month,
        version,
        msgspec.json.encode(msgspec.to_builtins(content), order="deterministic").decode(),
        WRITTEN,
    )


def drift_content(month: str, version: int, shifted: Mapping[str, float]) -> DriftContent:
    """The comparison of 400 random customers with others, of whom some features are greater by so much."""
    random, users = np.random.default_rng(int(month[-2:])), 400
    frames, scores = [], []
    for shifts in ({}, shifted):
        frame = pd.DataFrame({column.name: simulated_values(column, users, random) for column in CONTRACT.features})
        frame.insert(0, USER_ID, [f"user-{number:04d}" for number in range(users)])
        for name, by in shifts.items():
            frame[name] = frame[name] + by
        frames.append(frame)
        scores.append(random.random(users))
    found = drift.compare(*frames, CONTRACT.features, reference_scores=scores[0], current_scores=scores[1])
    return DriftContent(month, version, "2024-01", found)


def report_drift(platform: Platform, month: str, version: int, **shifted: float) -> DriftContent:
    """Record the drift report of a month some of whose features are greater by so much."""
    content = drift_content(month, version, shifted)
    report(platform, DRIFT_REPORT, month, version, content)
    return content


def report_performance(
    platform: Platform,
    month: str,
    version: int,
    *,
    auc: float,
    promised: float,
    found: Sequence[str] = (),
    explained: bool = False,
    reliable: bool = True,
) -> None:
    """Record the performance report of a month, with these findings."""

    def around(value: float) -> Interval:
        return Interval(value, value - 0.02, value + 0.03)

    achieved = Achieved(1_400, 370, {"auc": around(auc), "ece": around(0.1)}, ())
    drop = None
    if explained:
        parts = {"drop": around(promised - auc), "feature_drift": around(0.01)}
        concept = around(promised - auc - 0.01)
        drop = DropExplained(
            "2024-01",
            month,
            1_400,
            1_400,
            around(promised),
            around(promised - 0.01),
            around(auc),
            **parts,
            concept_drift=concept,
            domain_auc=0.52,
            effective_users=1_300.0,
            covered=1.0,
            clipped=0,
            reliable=reliable,
            reason="",
        )
    findings = {name: Finding(name in found, 0.1, 0.05, "a reason") for name in FINDINGS}
    content = PerformanceReport(
        month=month,
        version=version,
        trained_on=("2024-01",),
        held_out=achieved,
        everyone=None,
        promised={"auc": around(promised), "ece": around(0.02)},
        train_validation_gap=0.05,
        **findings,
        drop=drop,
    )
    report(platform, PERFORMANCE_REPORT, month, version, content)


def begin_retraining(platform: Platform, cause: str, month: str, at: datetime) -> None:
    """State that a model is trained for a cause."""
    platform.execute(
        "INSERT INTO streamflow.retraining_attempts (cause, month, reason, by, at) VALUES (%s, %s, 'r', 'ada', %s)",
        cause,
        month,
        at,
    )


def registered_for(cause: str, month: str) -> dict[str, Any]:
    """What is recorded of a version that was trained for a cause in a month."""
    return {"as_of": Month.parse(month).as_of, "lineage": Jsonb({"cause": cause})}


def judge(platform: Platform, action: str, version: int, *, better: bool | None) -> None:
    """Add a decision with gates to the ledger; ``better`` is the verdict of the comparison with Production."""
    gates = [{"name": "minimum_auc", "passed": True}]
    if better is not None:
        gates.append({"name": "better_than_production", "passed": better})
    platform.execute(
        "INSERT INTO streamflow.promotion_ledger (at, action, version, previous, by, reason, policy, override, gates) "
        "VALUES (%s, %s, %s, NULL, 'policy', 'r', 'auto', false, %s)",
        WRITTEN,
        action,
        version,
        Jsonb(gates),
    )


JANUARY, FEBRUARY = "no_model:2024-01", "decay:2024-02:version 1"
BEGUN = datetime(2024, 2, 2, tzinfo=UTC), datetime(2024, 3, 1, tzinfo=UTC)


def tell_the_story(platform: Platform, artifacts: Sequence[bytes]) -> None:
    """January's model decays in February and is replaced; March has landed, without labels."""
    for month in ("2024-01", "2024-02", "2024-03"):
        write_month(platform, month, labelled=month != "2024-03")
    begin_retraining(platform, JANUARY, "2024-01", BEGUN[0])
    platform.register(1, artifacts[0], **registered_for(JANUARY, "2024-01"))
    judge(platform, "promote", 1, better=None)
    report_performance(platform, "2024-01", 1, auc=0.84, promised=0.84)
    report_drift(platform, "2024-02", 1, failed_payments_90d=10)
    found = ("worse_than_promised", "no_better_than_chance")
    report_performance(platform, "2024-02", 1, auc=0.49, promised=0.84, found=found, explained=True)
    begin_retraining(platform, FEBRUARY, "2024-02", BEGUN[1])
    platform.register(2, artifacts[1], **registered_for(FEBRUARY, "2024-02"))
    judge(platform, "promote", 2, better=True)
    report_drift(platform, "2024-03", 2, watch_hours_30d=60)
