"""The reports: how far a month's customers differ from those learned from, and how good their scores turned out."""

import base64
from time import perf_counter

from dagster import AssetExecutionContext, MaterializeResult, MetadataValue, asset

from streamflow import monitoring, pipeline
from streamflow.contract import CONTRACT
from streamflow.scores import CHURN_SCORES
from streamflow_dagster.defs.conditions import WHEN_REMADE
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
def drift_report(context: AssetExecutionContext, core: PlatformResource) -> MaterializeResult:
    """Each feature and the scores of the month, held against the month that the scoring version was trained on."""
    started = perf_counter()
    drift = monitoring.report_drift(core.platform, month_of(context), core.now())
    return materialized(
        drift.write,
        started,
        more={
            "finding": drift.report.summary,
            "version": drift.write.facts["version"],
            "reference month": drift.write.facts["reference_month"],
            "drift": shown(drift.image, "Drift"),
            "features": MetadataValue.md(drift_as_table(drift.report)),
            "for people": MetadataValue.path(drift.page),
        },
    )


ASSETS = [drift_report]
