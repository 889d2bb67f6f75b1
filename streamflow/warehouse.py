"""The warehouse in PostgreSQL: DDL from the contract, month-wise replacement by COPY, snapshots, quality.

A month of a relation is written in one transaction under one advisory lock, so that a crash leaves the old month
or the new one. Reading CSVs belongs to landing.py, features to features.py.
"""

import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import pandas as pd
import psycopg
import pyarrow as pa
import pyarrow.csv
from psycopg import sql
from psycopg.types.json import Jsonb

from streamflow.contract import AS_OF, CONTRACT, MONTH, SCHEMA, USER_ID, Column, Contract, Table
from streamflow.database import Database
from streamflow.errors import ConfigurationError, UnknownMonth
from streamflow.months import FIRST_MONTH, Month
from streamflow.relations import MonthWrite as MonthWrite
from streamflow.relations import Source as Source

TYPES = {
    "id": 'text COLLATE "C"',
    "category": "text",
    "boolean": "boolean",
    "integer": "bigint",
    "float": "double precision",
    "date": "date",
}
TOOL_SCHEMAS = ("online", "feast", "mlflow", "dagster")
INSERT_ONLY = ("model_versions", "promotion_ledger", "predictions", "reports", "retraining_attempts")
SESSION_DEFAULTS = {"timezone": "UTC", "datestyle": "ISO", "extra_float_digits": "1"}
"""What each session of the platform's role starts with here, also those of tools that cannot be told."""
COPY_BLOCK_ROWS = 100_000
MEANINGS = "meanings"
"""The fact of a month's write that holds what each column meant when its values were written; `Column.meaning`."""

WITHIN_BOUNDS = "within_bounds"
DATES_AGREE = "dates_agree_with_partition"
ROWS_EQUAL = "row_count_equals_source"
KEY_UNIQUE = "key_is_unique"
EPOCH = Month.parse(FIRST_MONTH)


@dataclass(frozen=True)
class Finding:
    """The outcome of one quality check on one month of a relation, with what was counted."""

    name: str
    passed: bool
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """One line for people."""
        return ", ".join(f"{name}: {count:,}" for name, count in self.counts.items()) or "nothing counted"


def migrate(database: Database, contract: Contract = CONTRACT) -> list[str]:
    """Bring the database to this version's schema; returns what was changed.

    The platform's own tables follow numbered alembic migrations; the contract's tables are created, and given the
    columns they lack, from the contract. Raises ConfigurationError where only a person can decide: a column whose
    type changed, or one that the contract no longer has.
    """
    platform_role = psycopg.conninfo.conninfo_to_dict(database.url)["user"]
    with database.connect(owner=True) as connection:
        connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('streamflow migrate', 0))")
        for schema in (SCHEMA, *TOOL_SCHEMAS):
            connection.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(sql.Identifier(schema)))
    changes = _upgrade(database)
    with database.connect(owner=True) as connection:
        connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('streamflow migrate', 0))")
        changes += _follow_contract(connection, contract)
        _grant(connection, str(platform_role))
    with database.connect() as connection:
        connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('streamflow migrate', 0))")
        for name, value in SESSION_DEFAULTS.items():
            connection.execute(
                sql.SQL("ALTER ROLE CURRENT_USER IN DATABASE {} SET {} = {}").format(
                    sql.Identifier(connection.info.dbname), sql.Identifier(name), sql.Literal(value)
                )
            )
    return changes


def _upgrade(database: Database) -> list[str]:
    import alembic.command
    import alembic.config
    import alembic.runtime.migration
    import alembic.script
    import sqlalchemy

    config = alembic.config.Config()
    config.set_main_option("script_location", "streamflow:migrations")
    config.set_main_option("path_separator", "os")
    scripts = alembic.script.ScriptDirectory.from_config(config)
    engine = sqlalchemy.create_engine(database.sqlalchemy(SCHEMA, owner=True), poolclass=sqlalchemy.pool.NullPool)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(hashtextextended('streamflow migrate', 0))"))
        context = alembic.runtime.migration.MigrationContext.configure(
            connection, opts={"version_table_schema": SCHEMA}
        )
        before = context.get_current_revision()
        known = {script.revision for script in scripts.walk_revisions()}
        if before is not None and before not in known:
            raise ConfigurationError(
                f"the database is at migration {before}, which this version of StreamFlow does not know; "
                "use the version that migrated it, or another database"
            )
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, "head")
        after = context.get_current_revision()
    return [] if before == after else [f"migrated from {before or 'an empty database'} to {after}"]


def _follow_contract(connection: psycopg.Connection[Any], contract: Contract) -> list[str]:
    changes = []
    for relation, key, values in _relations(contract):
        present = _present_columns(connection, relation)
        keys = {MONTH: "text", AS_OF: "date", USER_ID: "text"}
        wanted = {name: keys[name] for name in key} | {column.name: TYPES[column.kind] for column in values}
        if not present:
            connection.execute(create_table(relation, key, values))
            changes.append(f"created {relation}")
            continue
        if extra := sorted(present.keys() - wanted.keys()):
            raise ConfigurationError(
                f"the warehouse table {relation} has columns that the contract lacks: {', '.join(extra)}; "
                "write a migration that drops or keeps them"
            )
        for name, kind in wanted.items():
            if name not in present:
                column = sql.SQL("ALTER TABLE {} ADD COLUMN {} {}").format(
                    sql.Identifier(SCHEMA, relation), sql.Identifier(name), sql.SQL(kind)
                )
                connection.execute(column)
                changes.append(f"added {relation}.{name}; months landed before carry no value until landed again")
            elif present[name] != kind:
                raise ConfigurationError(
                    f"{relation}.{name} is {present[name]} in the warehouse and {kind} in the contract; "
                    "write a migration"
                )
    return changes


def _relations(contract: Contract) -> Iterable[tuple[str, tuple[str, str], tuple[Column, ...]]]:
    for table in contract.tables:
        yield table.name, (MONTH, USER_ID), table.values
        if table.snapshot:
            yield table.snapshot, (AS_OF, USER_ID), table.values


def _present_columns(connection: psycopg.Connection[Any], relation: str) -> dict[str, str]:
    rows = connection.execute(
        "SELECT column_name, data_type FROM information_schema.columns WHERE table_schema = %s AND table_name = %s",
        (SCHEMA, relation),
    )
    return dict(rows.fetchall())


def create_table(relation: str, key: tuple[str, str], values: Iterable[Column]) -> sql.Composed:
    """The DDL of a contract table or snapshot.

    A snapshot's values may be null: a customer of the month whom a feature file lacks has a row that says so.
    """
    period, _ = key
    columns = [
        sql.SQL("{} {} NOT NULL").format(sql.Identifier(period), sql.SQL("date" if period == AS_OF else "text")),
        sql.SQL("{} {} NOT NULL").format(sql.Identifier(USER_ID), sql.SQL(TYPES["id"])),
    ]
    for column in values:
        nullable = column.nullable or period == AS_OF
        definition = sql.SQL("{} {}" if nullable else "{} {} NOT NULL")
        columns.append(definition.format(sql.Identifier(column.name), sql.SQL(TYPES[column.kind])))
    return sql.SQL("CREATE TABLE {} ({}, PRIMARY KEY ({}))").format(
        sql.Identifier(SCHEMA, relation), sql.SQL(", ").join(columns), sql.SQL(", ").join(map(sql.Identifier, key))
    )


def _grant(connection: psycopg.Connection[Any], role: str) -> None:
    name = sql.Identifier(role)
    for schema in TOOL_SCHEMAS:
        connection.execute(sql.SQL("GRANT USAGE, CREATE ON SCHEMA {} TO {}").format(sql.Identifier(schema), name))
    for statement in (
        "GRANT USAGE ON SCHEMA {} TO {}",
        "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {} TO {}",
    ):
        connection.execute(sql.SQL(statement).format(sql.Identifier(SCHEMA), name))
    for table in (*INSERT_ONLY, "alembic_version"):
        writes = "INSERT, UPDATE, DELETE" if table == "alembic_version" else "UPDATE, DELETE"
        connection.execute(
            sql.SQL("REVOKE {} ON {} FROM {}").format(sql.SQL(writes), sql.Identifier(SCHEMA, table), name)
        )
    partitions = connection.execute(
        "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'streamflow.predictions'::regclass"
    )
    for (partition,) in partitions.fetchall():  # reached through the table that they are of, and by its rights
        connection.execute(sql.SQL("REVOKE ALL ON {} FROM {}").format(sql.SQL(partition), name))
    connection.execute(sql.SQL("GRANT EXECUTE ON FUNCTION streamflow.make_predictions_partition TO {}").format(name))


def write_month(
    database: Database,
    table: Table,
    month: Month,
    rows: pa.Table,
    *,
    digest: str,
    revision: int,
    meanings: Mapping[str, str],
    now: datetime,
) -> MonthWrite:
    """Replace what ``table`` holds for ``month`` by ``rows`` (user_id and values, typed) in one transaction.

    ``meanings`` are those of the columns when the rows landed.
    """
    names = [MONTH, USER_ID, *(column.name for column in table.values)]
    keyed = rows.append_column(MONTH, pa.repeat(pa.scalar(str(month)), rows.num_rows)).select(names)
    facts = {MEANINGS: dict(meanings)}
    written = MonthWrite(table.name, month, revision, digest, rows.num_rows, {}, now, facts)
    with database.connect() as connection:
        lock(connection, table.name, month)
        connection.execute(
            sql.SQL("DELETE FROM {} WHERE {} = %s").format(sql.Identifier(SCHEMA, table.name), sql.Identifier(MONTH)),
            (str(month),),
        )
        copy_in(connection, sql.Identifier(SCHEMA, table.name), keyed)
        record(connection, written)
    return written


def build_snapshot(
    database: Database, table: Table, month: Month, *, now: datetime, contract: Contract = CONTRACT
) -> MonthWrite:
    """Replace the snapshot of ``table`` as of the month's last day: one row for each customer in users.

    A customer whom the feature file lacks has nulls, so that nobody takes an older month's values for theirs.
    Raises UnknownMonth when users or the table do not hold the month.
    """
    users = contract.tables[0]
    snapshot = str(table.snapshot)
    insert, count_missing = _snapshot_statements(table, users)
    period = {"as_of": month.as_of, "month": str(month)}
    with database.connect() as connection:
        for relation in sorted({users.name, table.name, snapshot}):
            lock(connection, relation, month)
        sources = {name: month_write(connection, name, month) for name in (users.name, table.name)}
        connection.execute(
            sql.SQL("DELETE FROM {} WHERE {} = %s").format(sql.Identifier(SCHEMA, snapshot), sql.Identifier(AS_OF)),
            (month.as_of,),
        )
        inserted = connection.execute(insert, period)
        (missing,) = connection.execute(count_missing, period).fetchone() or (None,)
        written = MonthWrite(
            snapshot,
            month,
            sources[table.name].revision,
            snapshot_digest(connection, table, month),
            inserted.rowcount,
            {name: write.as_source for name, write in sources.items()},
            now,
            {"missing": missing, MEANINGS: sources[table.name].facts.get(MEANINGS, {})},
        )
        record(connection, written)
    return written


def _snapshot_statements(table: Table, users: Table) -> tuple[sql.Composed, sql.Composed]:
    """Insert a month's snapshot; count the customers of the month whom ``table`` lacks."""
    columns = sql.SQL(
        "INSERT INTO {snapshot} ({as_of}, {user_id}, {values}) SELECT %(as_of)s, users.{user_id}, {sourced}"
    ).format(
        snapshot=sql.Identifier(SCHEMA, str(table.snapshot)),
        as_of=sql.Identifier(AS_OF),
        user_id=sql.Identifier(USER_ID),
        values=sql.SQL(", ").join(sql.Identifier(column.name) for column in table.values),
        sourced=sql.SQL(", ").join(sql.Identifier("source", column.name) for column in table.values),
    )
    joined = sql.SQL(
        """
        FROM {users} AS users
        LEFT JOIN {source} AS source ON source.{month} = users.{month} AND source.{user_id} = users.{user_id}
        WHERE users.{month} = %(month)s
        """
    ).format(
        users=sql.Identifier(SCHEMA, users.name),
        source=sql.Identifier(SCHEMA, table.name),
        month=sql.Identifier(MONTH),
        user_id=sql.Identifier(USER_ID),
    )
    missing = sql.SQL("SELECT count(*) {} AND source.{} IS NULL").format(joined, sql.Identifier(USER_ID))
    return columns + joined, missing


def snapshot_digest(connection: psycopg.Connection[Any], table: Table, month: Month) -> str:
    """SHA-256 of a snapshot's rows in the order of user_id."""
    names = (AS_OF, USER_ID, *(column.name for column in table.values))
    query = sql.SQL("SELECT {} FROM {} WHERE {} = {} ORDER BY {}").format(
        sql.SQL(", ").join(map(sql.Identifier, names)),
        sql.Identifier(SCHEMA, str(table.snapshot)),
        sql.Identifier(AS_OF),
        sql.Literal(month.as_of),
        sql.Identifier(USER_ID),
    )
    return rows_digest(connection, query)


def rows_digest(connection: psycopg.Connection[Any], query: sql.Composable) -> str:
    """SHA-256 of a query's rows as CSV, in the order that the query gives them."""
    digest = hashlib.sha256()
    for block in _csv(connection, query):
        digest.update(block)
    return digest.hexdigest()


def _csv(connection: psycopg.Connection[Any], query: sql.Composable) -> Iterator[bytes]:
    """A query's rows as CSV with a header; floats in their shortest exact form, times in UTC."""
    connection.execute("SET LOCAL datestyle = 'ISO'; SET LOCAL timezone = 'UTC'; SET LOCAL extra_float_digits = 1")
    statement = sql.SQL("COPY ({}) TO STDOUT (FORMAT csv, HEADER, ENCODING 'UTF8')").format(query)
    with connection.cursor() as cursor, cursor.copy(statement) as copy:
        yield from map(bytes, copy)


def month_write(connection: psycopg.Connection[Any], relation: str, month: Month) -> MonthWrite:
    """What ``relation`` holds for ``month``; raises UnknownMonth when it holds nothing."""
    row = connection.execute(
        "SELECT revision, digest, rows, sources, written_at, facts FROM streamflow.month_writes "
        "WHERE relation = %s AND month = %s",
        (relation, str(month)),
    ).fetchone()
    if row is None:
        raise UnknownMonth(f"{relation} holds nothing for {month}; land the month and materialize {relation} first")
    return MonthWrite(relation, month, *row)


def month_writes(database: Database) -> list[MonthWrite]:
    """What every relation holds, by month and relation."""
    with database.connect() as connection:
        rows = connection.execute(
            "SELECT relation, month, revision, digest, rows, sources, written_at, facts "
            "FROM streamflow.month_writes ORDER BY month, relation"
        ).fetchall()
    return [MonthWrite(relation, Month.parse(month), *rest) for relation, month, *rest in rows]


def record(connection: psycopg.Connection[Any], written: MonthWrite) -> None:
    """State what a relation now holds for a month; call it in the transaction that writes the rows."""
    connection.execute(
        """
        INSERT INTO streamflow.month_writes (relation, month, revision, digest, rows, sources, facts, written_at)
        VALUES (%(relation)s, %(month)s, %(revision)s, %(digest)s, %(rows)s, %(sources)s, %(facts)s, %(written_at)s)
        ON CONFLICT (relation, month) DO UPDATE SET
            (revision, digest, rows, sources, facts, written_at) = ROW (
                EXCLUDED.revision, EXCLUDED.digest, EXCLUDED.rows, EXCLUDED.sources, EXCLUDED.facts, EXCLUDED.written_at
            )
        """,
        {
            **vars(written),
            "month": str(written.month),
            "sources": Jsonb(dict(written.sources)),
            "facts": Jsonb(dict(written.facts)),
        },
    )


def labels(database: Database, month: Month, contract: Contract = CONTRACT) -> pd.DataFrame:
    """The labels that landed for a month: user_id and the label, a row for each labelled customer."""
    query = sql.SQL("SELECT {}, {} FROM {} WHERE {} = %s ORDER BY 1").format(
        sql.Identifier(USER_ID),
        sql.Identifier(contract.label),
        sql.Identifier(SCHEMA, contract.label_table.name),
        sql.Identifier(MONTH),
    )
    with database.connect() as connection:
        rows = connection.execute(query, (str(month),)).fetchall()
    return pd.DataFrame(rows, columns=[USER_ID, contract.label])


def copy_in(connection: psycopg.Connection[Any], target: sql.Composable, rows: pa.Table) -> None:
    """COPY an Arrow table into the columns of ``target`` that bear its names."""
    names = sql.SQL(", ").join(map(sql.Identifier, rows.column_names))
    statement = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT csv, ENCODING 'UTF8')").format(target, names)
    with connection.cursor() as cursor, cursor.copy(statement) as copy:
        for batch in rows.to_batches(max_chunksize=COPY_BLOCK_ROWS):
            block = io.BytesIO()
            pyarrow.csv.write_csv(batch, block, pyarrow.csv.WriteOptions(include_header=False))
            copy.write(block.getbuffer())


def copy_out(connection: psycopg.Connection[Any], query: sql.Composable, types: Mapping[str, pa.DataType]) -> pa.Table:
    """COPY a query's rows out as an Arrow table of the columns and types named."""
    columns = sql.SQL(", ").join(map(sql.Identifier, types))
    text = b"".join(_csv(connection, sql.SQL("SELECT {} FROM ({}) AS asked").format(columns, query)))
    return pyarrow.csv.read_csv(
        pa.BufferReader(text),
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True, ignore_empty_lines=False),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=types,
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
            true_values=["t"],
            false_values=["f"],
        ),
    )


def finding_names(table: Table, *, snapshot: bool) -> list[str]:
    """The checks that apply to a table or its snapshot: bounds where there are any, dates where there are any."""
    counting = {check for (check, _), _ in _violations(table, EPOCH, snapshot=snapshot)}
    return [ROWS_EQUAL, KEY_UNIQUE, *(check for check in (WITHIN_BOUNDS, DATES_AGREE) if check in counting)]


def landing_findings(database: Database, table: Table, month: Month) -> list[Finding]:
    """Check a landed month in the warehouse against its source, its key, its bounds and its own partition."""
    return _findings(database, table, month, source=table.name, snapshot=False)


def snapshot_findings(database: Database, table: Table, month: Month, contract: Contract = CONTRACT) -> list[Finding]:
    """Check a month's snapshot against users (one row each), its key, its bounds and its own partition."""
    return _findings(database, table, month, source=contract.tables[0].name, snapshot=True)


def _findings(database: Database, table: Table, month: Month, *, source: str, snapshot: bool) -> list[Finding]:
    relation, column, value = (str(table.snapshot), AS_OF, month.as_of) if snapshot else (table.name, MONTH, str(month))
    tests = {
        (KEY_UNIQUE, "rows"): sql.SQL("count(*)"),
        (KEY_UNIQUE, "different keys"): sql.SQL("count(DISTINCT {})").format(sql.Identifier(USER_ID)),
        **dict(_violations(table, month, snapshot=snapshot)),
    }
    query = sql.SQL("SELECT {} FROM {} WHERE {} = %s").format(
        sql.SQL(", ").join(tests.values()), sql.Identifier(SCHEMA, relation), sql.Identifier(column)
    )
    with database.connect() as connection:
        counted = dict(zip(tests, connection.execute(query, (value,)).fetchone() or (), strict=True))
        source_rows = month_write(connection, source, month).rows
    counts: dict[str, dict[str, int]] = {}
    for (check, label), count in counted.items():
        counts.setdefault(check, {})[label] = count
    rows, keys = counts[KEY_UNIQUE].values()
    counts[ROWS_EQUAL] = {"rows": rows, "source rows": source_rows}
    passed = {ROWS_EQUAL: rows == source_rows > 0, KEY_UNIQUE: rows == keys}
    return [
        Finding(name, passed.get(name, not any(counts[name].values())), counts[name])
        for name in finding_names(table, snapshot=snapshot)
    ]


def _violations(table: Table, month: Month, *, snapshot: bool) -> Iterator[tuple[tuple[str, str], sql.Composed]]:
    """What no row may be, by check and name: an expression that counts such rows of a month."""
    for column in table.values:
        if condition := _out_of_bounds(column):
            yield (WITHIN_BOUNDS, column.name), sql.SQL("count(*) FILTER (WHERE {})").format(condition)
        if column.not_after_as_of:
            late = sql.SQL("count(*) FILTER (WHERE {} > {})")
            yield (
                (DATES_AGREE, f"{column.name} after as_of"),
                late.format(sql.Identifier(column.name), sql.Literal(month.as_of)),
            )
    if snapshot:
        inside = sql.SQL("(SELECT count(*) FROM {} WHERE {as_of} >= {} AND {as_of} < {})")
        yield (
            (DATES_AGREE, "as_of within the month, but not its last day"),
            inside.format(
                sql.Identifier(SCHEMA, str(table.snapshot)),
                sql.Literal(month.as_of.replace(day=1)),
                sql.Literal(month.as_of),
                as_of=sql.Identifier(AS_OF),
            ),
        )


def _out_of_bounds(column: Column) -> sql.Composable | None:
    name = sql.Identifier(column.name)
    conditions = []
    for bound, operator in ((column.low, "<"), (column.high, ">"), (column.earliest, "<")):
        if bound is not None:
            conditions.append(sql.SQL(f"{{}} {operator} {{}}").format(name, sql.Literal(bound)))
    if column.kind == "float":
        conditions.append(sql.SQL("{} = 'NaN'").format(name))
    if column.categories:
        conditions.append(sql.SQL("NOT {} = ANY({})").format(name, sql.Literal(list(column.categories))))
    return sql.SQL(" OR ").join(conditions) if conditions else None


def lock(connection: psycopg.Connection[Any], relation: str, month: Month) -> None:
    """Wait for whoever writes that month of that relation, and let nobody else do so in this transaction."""
    connection.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", (f"{SCHEMA}.{relation} {month}",))
