"""The snapshots: what was known of each customer on the month's last day."""

from time import perf_counter

from dagster import AssetExecutionContext, AssetsDefinition, MaterializeResult, asset

from streamflow import pipeline
from streamflow.contract import CONTRACT, Table
from streamflow.warehouse import snapshot_findings
from streamflow_dagster.defs import checks
from streamflow_dagster.defs.conditions import WHEN_REMADE
from streamflow_dagster.defs.failing import fails_plainly
from streamflow_dagster.defs.partitions import MONTHLY
from streamflow_dagster.defs.resources import PlatformResource
from streamflow_dagster.defs.results import OWNERS, check_results, materialized, month_of

CODE = pipeline.code_version("contract", "warehouse")
USERS = CONTRACT.tables[0]


def snapshot_of(table: Table) -> AssetsDefinition:
    """The asset of one table's snapshot."""
    name = str(table.snapshot)

    @asset(
        name=name,
        deps=list(dict.fromkeys((USERS.name, table.name))),
        group_name="snapshots",
        description=f"{table.description} One row for each customer of the month, as of its last day.",
        owners=OWNERS,
        kinds={"postgres", "sql"},
        code_version=CODE,
        partitions_def=MONTHLY,
        check_specs=checks.of_snapshot(table),
        automation_condition=WHEN_REMADE,
    )
    @fails_plainly
    def snapshot(context: AssetExecutionContext, core: PlatformResource) -> MaterializeResult:
        started, month = perf_counter(), month_of(context)
        written = pipeline.build_snapshot(core.platform, table, month, core.now())
        findings = snapshot_findings(core.platform.database, table, month)
        return materialized(
            written,
            started,
            checks=check_results(findings, name),
            more={"customers without features": written.facts["missing"]},
        )

    return snapshot


ASSETS = [snapshot_of(table) for table in CONTRACT.snapshots]
