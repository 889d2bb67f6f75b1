"""What has been made of each month, as the warehouse has it: the service may run where the landing zone is not."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec
from msgspec import Struct

from serving.postgres import Postgres
from streamflow.contract import Contract
from streamflow.months import Month
from streamflow.relations import TRAINING_DATASET, MonthWrite, Source, Standing, in_store, standing

NEWEST = 12

# The datasets and snapshots of all months tell what other months make stale. Of facts, what is long and not shown stays
# behind.
WRITES = """
    SELECT relation, month, revision, digest, rows, sources, written_at,
        facts - 'lineage' - 'evidence' - 'files' AS facts
    FROM streamflow.month_writes
    WHERE relation = ANY($2)
        OR month IN (SELECT DISTINCT month FROM streamflow.month_writes ORDER BY month DESC LIMIT $1)
        OR month IN (SELECT month FROM streamflow.month_writes WHERE relation = $3 ORDER BY month DESC LIMIT $1)
    ORDER BY month, relation
"""


class _Write(Struct, frozen=True):
    relation: str
    month: str
    revision: int
    digest: str
    rows: int
    sources: dict[str, Source]
    written_at: datetime
    facts: dict[str, Any]


@dataclass(frozen=True)
class MonthMade:
    """What has been made of a month, by relation, and how far it is."""

    written: Mapping[str, MonthWrite]
    standing: Standing


async def months_made(
    postgres: Postgres, contract: Contract, online_store: str, *, in_production: bool
) -> dict[Month, MonthMade]:
    """The newest ``NEWEST`` months, and as many of the newest that have labels; the newest first.

    Raises WarehouseUnavailable.
    """
    of_older_months = [TRAINING_DATASET, *(str(table.snapshot) for table in contract.snapshots)]
    rows = await postgres.read(_Write, WRITES, NEWEST, of_older_months, contract.label_table.name)
    writes = [MonthWrite(**{**msgspec.structs.asdict(row), "month": Month.parse(row.month)}) for row in rows]
    written = in_store(writes, online_store, contract)
    labelled = [month for month, of_month in written.items() if contract.label_table.name in of_month]
    made = {}
    for month in sorted({*_newest(written), *_newest(labelled)}, reverse=True):
        of_month = written[month]
        landed = {table.name: of_month[table.name].as_source for table in contract.tables if table.name in of_month}
        stands = standing(landed, of_month, contract, written, in_production=in_production)
        made[month] = MonthMade(of_month, stands)
    return made


def _newest(months: Iterable[Month]) -> list[Month]:
    return sorted(months, reverse=True)[:NEWEST]
