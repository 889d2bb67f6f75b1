"""How a month's write and its findings are shown in Dagster."""

import base64
from collections.abc import Iterable, Mapping
from time import perf_counter
from typing import TYPE_CHECKING, Any

from dagster import (
    AssetCheckResult,
    AssetCheckSeverity,
    AssetExecutionContext,
    DataVersion,
    MaterializeResult,
    MetadataValue,
)

from streamflow.months import Month
from streamflow.promotion import Evidence, Gate
from streamflow.warehouse import Finding, MonthWrite

if TYPE_CHECKING:
    from streamflow.drift import DriftReport
    from streamflow.selection import Selection
    from streamflow.windows import Choice

OWNERS = ["team:platform"]


def month_of(context: AssetExecutionContext) -> Month:
    """The month that a run materializes."""
    return Month.parse(context.partition_key)


def materialized(
    written: MonthWrite,
    started: float,
    *,
    checks: Iterable[AssetCheckResult] = (),
    more: Mapping[str, Any] | None = None,
) -> MaterializeResult:
    """A month's write: its content is the data version, so that unchanged content leaves downstream fresh.

    ``started`` is what `time.perf_counter` said when the work began.
    """
    sources = {name: f"revision {one['revision']}, {one['digest'][:12]}" for name, one in written.sources.items()}
    return MaterializeResult(
        asset_key=written.relation,
        data_version=DataVersion(written.digest),
        check_results=list(checks),
        metadata={
            "dagster/row_count": written.rows,
            "revision": written.revision,
            "digest": written.digest,
            "duration (s)": round(perf_counter() - started, 3),
            **({"made from": MetadataValue.json(sources)} if sources else {}),
            **(more or {}),
        },
    )


def check_results(findings: Iterable[Finding], asset: str) -> list[AssetCheckResult]:
    """What each finding counted, as the outcome of the check of its name."""
    return [
        AssetCheckResult(
            passed=finding.passed,
            check_name=finding.name,
            asset_key=asset,
            severity=AssetCheckSeverity.ERROR,
            description=finding.summary,
            metadata=dict(finding.counts),
        )
        for finding in findings
    ]


def gates_as_table(gates: Iterable[Gate]) -> str:
    """The gates as a Markdown table."""
    rows = [f"| {gate.name} | {'passed' if gate.passed else '**failed**'} | {gate.reason} |" for gate in gates]
    return "\n".join(["| gate | outcome | reason |", "| --- | --- | --- |", *rows])


def metrics_as_table(evidence: Evidence) -> str:
    """The metrics on held-out users with their intervals, beside those on training users, as a Markdown table."""
    rows = [
        f"| {name} | {one.value:.4f} | {one.low:.4f} to {one.high:.4f} | {evidence.train_metrics[name]:.4f} |"
        for name, one in evidence.metrics.items()
    ]
    return "\n".join(
        ["| metric | held-out users | 95 % interval | training users |", "| --- | --- | --- | --- |", *rows]
    )


def windows_as_table(choice: "Choice") -> str:
    """The windows of months to learn from, simplest first, with the reason for the choice, as Markdown."""
    rows = [
        f"| {'**' if one.chosen else ''}{one.name}{'**' if one.chosen else ''} | {' '.join(one.months)} | {one.rows:,} "
        f"| {one.logloss:.4f} | {one.difference:+.4f} ± {one.standard_error:.4f} | {one.auc:.4f} | {one.seconds:.1f} |"
        for one in choice.scores
    ]
    header = "| window | months | rows | logloss | to the best | AUC | seconds |"
    table = [header, "| --- | --- | --- | --- | --- | --- | --- |", *rows] if rows else []
    return "\n".join([choice.reason, "", *table])


def candidates_as_table(selection: "Selection | None") -> str:
    """The candidates, simplest first, with the reason for the choice, as Markdown."""
    if selection is None:
        return "trained by name; nothing was chosen"
    rows = [
        f"| {'**' if one.chosen else ''}{one.estimator}{'**' if one.chosen else ''} | {one.service} "
        f"| {'yes' if one.calibrated else 'no'} | {one.logloss:.4f} | {one.difference:+.4f} ± {one.standard_error:.4f} "
        f"| {one.auc:.4f} | {one.seconds:.1f} |"
        for one in selection.candidates
    ]
    header = "| estimator | features | calibrated | logloss | to the best | AUC | seconds |"
    return "\n".join([selection.reason, "", header, "| --- | --- | --- | --- | --- | --- | --- |", *rows])


def drift_as_table(report: "DriftReport") -> str:
    """Each feature and the scores as a Markdown table, those that drift in bold."""
    rows = [
        f"| {'**' if one.significant else ''}{one.name}{'**' if one.significant else ''} | {one.adjusted_p_value:.2g} "
        f"| {one.psi:.4f} | {one.size} | {one.effect:.3f} | {one.test} | {one.current_missing:.1%} "
        f"| {one.out_of_range:.1%} |"
        for one in (*report.features, report.score)
    ]
    header = "| feature | p, adjusted | PSI | size | effect | test | missing | out of range |"
    return "\n".join([header, "| --- | --- | --- | --- | --- | --- | --- | --- |", *rows])


def shown(image: bytes, title: str) -> MetadataValue:
    """A PNG as the UI shows it in an asset's page."""
    return MetadataValue.md(f"![{title}](data:image/png;base64,{base64.b64encode(image).decode()})")
