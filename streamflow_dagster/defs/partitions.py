"""The monthly partitions that every asset shares."""

from dagster import MonthlyPartitionsDefinition

from streamflow.months import FIRST_MONTH, KEY_FORMAT

MONTHLY = MonthlyPartitionsDefinition(start_date=FIRST_MONTH, fmt=KEY_FORMAT)
