"""The landed tables: a validated CSV of the month, copied into the warehouse."""

from time import perf_counter

from dagster import AssetExecutionContext, AssetsDefinition, MaterializeResult, MetadataValue, asset

from streamflow import pipeline
from streamflow.contract import CONTRACT, Table
from streamflow.warehouse import landing_findings
from streamflow_dagster.defs import checks
from streamflow_dagster.defs.failing import fails_plainly
from streamflow_dagster.defs.partitions import MONTHLY
from streamflow_dagster.defs.resources import PlatformResource
from streamflow_dagster.defs.results import OWNERS, check_results, materialized, month_of

CODE = pipeline.code_version("contract", "landing", "warehouse")


def landed_table(table: Table) -> AssetsDefinition:
    """The asset of one table of the contract."""

    @asset(
        name=table.name,
        group_name="landing",
        description=table.description,
        owners=OWNERS,
        kinds={"csv", "postgres"},
        code_version=CODE,
        partitions_def=MONTHLY,
        check_specs=checks.of_table(table),
    )
    @fails_plainly
    def landed(context: AssetExecutionContext, core: PlatformResource) -> MaterializeResult:
        started, month = perf_counter(), month_of(context)
        written = pipeline.load_table(core.platform, table, month, core.now())
        findings = landing_findings(core.platform.database, table, month)
        file = core.platform.landing.path(month, table.name)
        return materialized(
            written, started, checks=check_results(findings, table.name), more={"file": MetadataValue.path(file)}
        )

    return landed


ASSETS = [landed_table(table) for table in CONTRACT.tables]
