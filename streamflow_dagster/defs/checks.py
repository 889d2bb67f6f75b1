"""The blocking checks after landing, after the snapshots and before registration."""

import warnings

from dagster import AssetCheckSpec, PreviewWarning

from streamflow.contract import Table
from streamflow.warehouse import finding_names
from streamflow_dagster.defs.partitions import MONTHLY

MEANINGS = {
    "row_count_equals_source": "There are as many rows as in the source, and some.",
    "key_is_unique": "No customer stands twice in a month.",
    "within_bounds": "Every value is within the bounds and categories of the contract.",
    "dates_agree_with_partition": "No date of the month lies after its last day, and snapshots are of that day.",
}
AGREES = "compiled_scorer_agrees"
NO_LEAK = "no_single_feature_separates_the_classes"


def check(name: str, asset: str, description: str, *, blocking: bool = True) -> AssetCheckSpec:
    """A check that, if blocking, stops everything downstream of its month when it fails, and nothing of other months.

    Partitioned checks are a preview of Dagster's; without them a check has one state for all months.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PreviewWarning)
        return AssetCheckSpec(name, asset=asset, description=description, blocking=blocking, partitions_def=MONTHLY)


def of_table(table: Table) -> list[AssetCheckSpec]:
    """The checks of a landed table."""
    return [check(name, table.name, MEANINGS[name]) for name in finding_names(table, snapshot=False)]


def of_snapshot(table: Table) -> list[AssetCheckSpec]:
    """The checks of a table's snapshot."""
    return [check(name, str(table.snapshot), MEANINGS[name]) for name in finding_names(table, snapshot=True)]


def of_model(asset: str) -> list[AssetCheckSpec]:
    """The checks that stand before registration."""
    return [check(AGREES, asset, "The compiled scorer gives every customer the pipeline's probability and decision.")]


def no_single_feature_leaks(asset: str) -> AssetCheckSpec:
    """The warning about a feature that may know what it should predict."""
    return check(NO_LEAK, asset, "No feature alone separates those who churned suspiciously well.", blocking=False)
