"""What several benchmarks start from."""

from datetime import datetime
from pathlib import Path

from streamflow import pipeline
from streamflow.contract import CONTRACT
from streamflow.months import FIRST_MONTH, Month
from streamflow.settings import PROJECT_ROOT
from streamflow.simulate import simulate
from streamflow.warehouse import MonthWrite

REAL_MONTH = PROJECT_ROOT.parent / "shared" / "data" / "month_000"
MONTH = Month.parse(FIRST_MONTH)


def folder_of_a_month(data: Path, scratch: Path) -> Path:
    """The folder if it is there, else one with a simulated month."""
    return data if data.is_dir() else simulate(scratch / "simulated", [MONTH])[0]


def assembled(installed: pipeline.Platform, folder: Path, month: Month, now: datetime) -> MonthWrite:
    """Land a folder as a month and bring it through tables, snapshots and views to its training dataset."""
    installed.landing.land(folder, month, now)
    for table in CONTRACT.tables:
        pipeline.load_table(installed, table, month, now)
    for table in CONTRACT.snapshots:
        pipeline.build_snapshot(installed, table, month, now)
    for view in CONTRACT.views:
        pipeline.publish_view(installed, view, month, now)
    return pipeline.assemble_dataset(installed, month, now)
