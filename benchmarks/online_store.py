"""Measures how fast a month goes online in PostgreSQL, and what Feast's own materialization takes for the same.

    python -m benchmarks.online_store [--repeats N] [--users N ...]

On a scratch server, for each number of users (default: 7,043 as in the real months, with every feature view, and
1,000,000 with the widest view only): simulated months, each newer than the last, go online in turn by

- ``publish``: `features.publish`, what `streamflow run` does: merge, withdrawal, record;
- ``copy``: `WideRowOnlineStore.merge` of an Arrow table: COPY into a staging table, then the merge;
- ``feast``: `FeatureStore.materialize`, which `publish` used before (up to 100,000 users).

Landing and snapshots are made beforehand and not timed. The first month goes into empty tables and is reported apart;
every later one replaces all rows. Rows are entities times feature views.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from psycopg import sql

from streamflow import features, warehouse
from streamflow.contract import AS_OF, CONTRACT, SCHEMA, USER_ID, Column, FeatureView, Table
from streamflow.database import Database
from streamflow.embedded import postgres
from streamflow.months import FIRST_MONTH, Month
from streamflow.settings import Settings
from streamflow.warehouse import MonthWrite

REAL_USERS = 7_043
MILLION = 1_000_000
FEAST_UP_TO = 100_000
NOW = datetime(2024, 1, 1, tzinfo=UTC)


class World:
    """A scratch platform with users and no months."""

    def __init__(self, database: Database, users: int, views: Sequence[FeatureView]) -> None:
        warehouse.migrate(database)
        self.database = database
        self.store = features.feature_store(database)
        features.apply(self.store)
        self.views = views
        self.rows = {view.snapshot: _rows(view.table, users) for view in views}

    def snapshots(self, month: Month) -> None:
        """Make the month's snapshots and forget the month before."""
        for snapshot, rows in self.rows.items():
            table = sql.Identifier(SCHEMA, snapshot)
            dated = rows.append_column(AS_OF, pa.repeat(pa.scalar(month.as_of), rows.num_rows))
            written = MonthWrite(snapshot, month, 1, "0" * 64, rows.num_rows, {}, NOW)
            with self.database.connect(owner=True) as connection:
                connection.execute(sql.SQL("TRUNCATE {}").format(table))
                warehouse.copy_in(connection, table, dated)
                warehouse.record(connection, written)
                connection.execute(sql.SQL("ANALYZE {}").format(table))

    def publish(self, month: Month) -> None:
        """As `streamflow run` does."""
        for view in self.views:
            features.publish(self.database, self.store, view, month, now=NOW)

    def copy(self, month: Month) -> None:
        """From Arrow, through the store's own COPY."""
        from streamflow.online_store import WideRowOnlineStore

        for view in self.views:
            rows = self.rows[view.snapshot].select([USER_ID, *(column.name for column in view.columns)])
            for name in ("event_timestamp", "created_timestamp"):
                rows = rows.append_column(name, pa.repeat(pa.scalar(month.event_time), rows.num_rows))
            WideRowOnlineStore().merge(self.store.config, self.store.get_feature_view(view.name), rows)

    def feast(self, month: Month) -> None:
        """Through Feast's engine."""
        with contextlib.redirect_stdout(io.StringIO()):
            self.store.materialize(
                month.event_time - features.INSTANT, month.event_time, feature_views=[view.name for view in self.views]
            )


def _rows(table: Table, users: int) -> pa.Table:
    random = np.random.default_rng(1)
    ids = random.permutation([f"{number:07d}-USER" for number in range(users)])
    values = {column.name: _values(column, users, random) for column in table.values if column.view}
    return pa.table({USER_ID: ids, **values})


def _values(column: Column, users: int, random: np.random.Generator) -> Any:
    match column.kind:
        case "category":
            return random.choice(column.categories, users)
        case "boolean":
            return random.random(users) < 0.5
        case "integer":
            return random.integers(0, 30, users)
        case _:
            return random.random(users) * 100


def _measured(users: int, repeats: int) -> dict[str, Any]:
    views = CONTRACT.views if users <= FEAST_UP_TO else CONTRACT.views[:1]
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="streamflow-bench-") as home:
        Path(home).chmod(0o755)
        with postgres(Settings(home=Path(home))) as database:
            world = World(database, users, views)
            ways: list[Callable[[Month], None]] = [world.publish, world.copy]
            ways += [world.feast] if users <= FEAST_UP_TO else []
            month = Month.parse(FIRST_MONTH)
            empty = _timed(world, world.publish, month)
            for _ in range(repeats):
                for way in ways:
                    month = month.shift(1)
                    seconds.setdefault(way.__name__, []).append(_timed(world, way, month))
    rows = users * len(views)
    return {
        "users": users,
        "feature views": len(views),
        "rows per second": {
            "publish into empty tables": round(rows / empty),
            **{name: _spread(rows / took for took in timed) for name, timed in seconds.items()},
        },
    }


def _timed(world: World, way: Callable[[Month], None], month: Month) -> float:
    world.snapshots(month)
    started = time.perf_counter()
    way(month)
    return time.perf_counter() - started


def _spread(values: Iterable[float]) -> dict[str, int]:
    given = sorted(map(round, values))
    return {"median": round(statistics.median(given)), "minimum": given[0], "maximum": given[-1]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--users", type=int, nargs="+", default=[REAL_USERS, MILLION])
    arguments = parser.parse_args()
    load_before = os.getloadavg()
    measured = [_measured(users, arguments.repeats) for users in arguments.users]
    machine = {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load average before": load_before,
        "load average after": os.getloadavg(),
    }
    print(json.dumps({"machine": machine, "repeats": arguments.repeats, "measured": measured}, indent=2))


if __name__ == "__main__":
    main()
