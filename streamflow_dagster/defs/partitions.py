"""The monthly partitions that every asset shares, and how one month of an asset depends on several of another."""

import warnings

from dagster import BetaWarning, MonthlyPartitionsDefinition, TimeWindowPartitionMapping

from streamflow.months import FIRST_MONTH, KEY_FORMAT

MONTHLY = MonthlyPartitionsDefinition(start_date=FIRST_MONTH, fmt=KEY_FORMAT)


def up_to_the_month(earlier: int) -> TimeWindowPartitionMapping:
    """A month is made from the same month and as many before it, those that there are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BetaWarning)
        return TimeWindowPartitionMapping(start_offset=-earlier, allow_nonexistent_upstream_partitions=True)
