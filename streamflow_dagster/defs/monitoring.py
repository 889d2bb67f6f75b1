"""The reports: how far a month's customers differ from those learned from, and how good their scores turned out."""

from time import perf_counter

from dagster import AssetExecutionContext, MaterializeResult, MetadataValue, asset

from streamflow import monitoring, pipeline
from streamflow.contract import CONTRACT
from streamflow.plots import with_interval
from streamflow.scores import CHURN_SCORES
from streamflow_dagster.defs.conditions import WHEN_REMADE
from streamflow_dagster.defs.failing import fails_plainly
from streamflow_dagster.defs.partitions import MONTHLY
from streamflow_dagster.defs.resources import PlatformResource
from streamflow_dagster.defs.results import OWNERS, drift_as_table, materialized, month_of, shown


@asset(
    deps=[*(str(table.snapshot) for table in CONTRACT.snapshots), CHURN_SCORES],
    group_name="monitoring",
    owners=OWNERS,
    kinds={"python"},
    code_version=pipeline.code_version("contract", "drift"),
    partitions_def=MONTHLY,
    automation_condition=WHEN_REMADE,
)
@fails_plainly
def drift_report(context: AssetExecutionContext, core: PlatformResource) -> MaterializeResult:
    """Each feature and the scores of the month, held against the month that the scoring version was trained on."""
    started = perf_counter()
    drift = monitoring.report_drift(core.platform, month_of(context), core.now())
    return materialized(
        drift.write,
        started,
        more={
            "finding": drift.content.report.summary,
            "version": drift.content.version,
            "reference month": drift.content.reference_month,
            "features": MetadataValue.md(drift_as_table(drift.content.report)),
            **{title: shown(image, title) for title, image in drift.images.items()},
            "for people": MetadataValue.path(drift.page),
        },
    )


@asset(
    deps=[pipeline.TRAINING_DATASET, CHURN_SCORES],
    group_name="monitoring",
    owners=OWNERS,
    kinds={"python"},
    code_version=pipeline.code_version("contract", "decay", "evaluation", "bootstrap"),
    partitions_def=MONTHLY,
    automation_condition=WHEN_REMADE,
)
@fails_plainly
def performance_report(context: AssetExecutionContext, core: PlatformResource) -> MaterializeResult:
    """How good the month's scores turned out, held against what their version promised, and what explains a fall."""
    started = perf_counter()
    performance = monitoring.report_performance(core.platform, month_of(context), core.now())
    report = performance.report
    findings = {
        "worse than promised": report.worse_than_promised,
        "no better than chance": report.no_better_than_chance,
        "worse calibrated": report.worse_calibrated,
        "sliding": report.sliding,
    }
    return materialized(
        performance.write,
        started,
        more={
            "version": report.version,
            "AUC of held-out users": with_interval(report.held_out.metrics["auc"]),
            "AUC promised": with_interval(report.promised["auc"]),
            **{name: f"{'yes' if found.found else 'no'}: {found.reason}" for name, found in findings.items()},
            **({"what explains the fall": report.drop.reason} if report.drop else {}),
            "performance": shown(performance.image, "Performance"),
        },
    )


ASSETS = [drift_report, performance_report]
