"""The warehouse on a real PostgreSQL. `random_rows` and `land` make small months for other tests too."""

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

import alembic.command
import numpy as np
import psycopg
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from psycopg import sql

from streamflow import warehouse
from streamflow.contract import CONTRACT, LABELS, SUBSCRIPTIONS, USAGE, USER_ID, USERS, Column, Contract, Table
from streamflow.database import Database
from streamflow.errors import ConfigurationError, UnknownMonth
from streamflow.months import Month
from streamflow.warehouse import (
    Finding,
    MonthWrite,
    build_snapshot,
    copy_in,
    copy_out,
    finding_names,
    landing_findings,
    migrate,
    month_write,
    month_writes,
    record,
    rows_digest,
    snapshot_digest,
    snapshot_findings,
    write_month,
)

JANUARY, FEBRUARY, MARCH = Month(2024, 1), Month(2024, 2), Month(2024, 3)
NOW = datetime(2024, 4, 5, 6, 7, tzinfo=UTC)
PEOPLE = [f"u{number}" for number in range(10)]
SNAPSHOT = str(SUBSCRIPTIONS.snapshot)


# --- small months -----------------------------------------------------------------------------------------------


def random_rows(table: Table, users: Sequence[str], seed: int = 0) -> pa.Table:
    """Rows of a table for these users, with random values that the contract allows; floats use all 64 bits."""
    random = np.random.default_rng([seed, *table.name.encode()])
    values = {column.name: _random_values(column, len(users), random) for column in table.values}
    return pa.table({USER_ID: pa.array(users, pa.string()), **values})


def _random_values(column: Column, size: int, random: np.random.Generator) -> pa.Array:
    match column.kind:
        case "category":
            return pa.array(random.choice(column.categories, size).tolist(), pa.string())
        case "boolean":
            return pa.array(random.random(size) < 0.5)
        case "integer":
            return pa.array(random.integers(int(column.low or 0), int(column.high or 100), size, endpoint=True))
        case "float":
            return pa.array(random.uniform(column.low or 0, column.high or 100, size))
        case "date":
            return pa.array([date(2023, 1, 1) + timedelta(days=int(days)) for days in random.integers(0, 365, size)])
        case _:
            raise ValueError(column.kind)


def land(
    database: Database,
    month: Month,
    users: Sequence[str],
    *,
    seed: int = 0,
    lacking: Mapping[str, Collection[str]] | None = None,
    tables: Sequence[Table] = CONTRACT.tables,
) -> dict[str, pa.Table]:
    """Write a month of random rows and its snapshots; ``lacking`` names the users without a row in a table."""
    landed = {}
    for table in tables:
        absent = (lacking or {}).get(table.name, ())
        rows = random_rows(table, users, seed)
        landed[table.name] = rows.filter(pa.array([user not in absent for user in users]))
        write_month(
            database,
            table,
            month,
            landed[table.name],
            digest=f"{seed:064x}",
            revision=seed + 1,
            meanings=table.meanings,
            now=NOW,
        )
    for table in tables:
        if table.snapshot:
            build_snapshot(database, table, month, now=NOW)
    return landed


def held(database: Database, relation: str) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """Every row of a relation in the schema streamflow: the values by key (period and user)."""
    with database.connect() as connection:
        rows = connection.execute(sql.SQL("SELECT * FROM {}").format(sql.Identifier(relation))).fetchall()
    return {row[:2]: row[2:] for row in rows}


def expected(rows: pa.Table, period: str | date) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """What `held` must give for the rows of one period."""
    return {(period, user): tuple(values) for user, *values in zip(*rows.to_pydict().values(), strict=True)}


def in_months(*months: tuple[pa.Table, str | date]) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    return {key: row for rows, period in months for key, row in expected(rows, period).items()}


def execute(database: Database, statement: str, *, owner: bool = False) -> None:
    with database.connect(owner=owner) as connection:
        connection.execute(statement)


@pytest.fixture(scope="module", autouse=True)
def _migrated(database: Database) -> None:
    migrate(database)


@pytest.fixture
def clean(database: Database) -> Database:
    """The module's database without rows."""
    relations = [name for table in CONTRACT.tables for name in (table.name, table.snapshot) if name]
    execute(database, ";".join(f"DELETE FROM {relation}" for relation in [*relations, "month_writes"]))
    return database


# --- migrations -------------------------------------------------------------------------------------------------


def definition(database: Database) -> list[tuple[Any, ...]]:
    """Everything in the schema streamflow: columns with types, constraints and rights."""
    with database.connect(owner=True) as connection:
        return connection.execute(
            """
            SELECT class.relname, class.relacl::text, attribute.attname, attribute.atttypid::regtype::text,
                attribute.attnotnull, attribute.attcollation::regcollation::text,
                (SELECT array_agg(pg_get_constraintdef(oid) ORDER BY conname)
                 FROM pg_constraint WHERE conrelid = class.oid)
            FROM pg_class AS class JOIN pg_attribute AS attribute ON attribute.attrelid = class.oid
            WHERE class.relnamespace = 'streamflow'::regnamespace AND attribute.attnum > 0 ORDER BY 1, attribute.attnum
            """
        ).fetchall()


def test_a_second_migration_changes_nothing(new_database: Callable[[], Database]) -> None:
    database = new_database()
    relations = [name for table in CONTRACT.tables for name in (table.name, table.snapshot) if name]
    assert migrate(database) == [
        "migrated from an empty database to 0004",
        *(f"created {relation}" for relation in relations),
    ]
    made = definition(database)
    assert migrate(database) == []
    assert definition(database) == made


def test_migrations_at_the_same_time_do_the_work_once(new_database: Callable[[], Database]) -> None:
    database = new_database()
    together = threading.Barrier(3)

    def run(_: int) -> list[str]:
        together.wait()
        return migrate(database)

    with ThreadPoolExecutor(3) as pool:
        changes = [change for changed in pool.map(run, range(3)) for change in changed]
    assert len(changes) == len(set(changes)) == 1 + len(CONTRACT.tables) + len(CONTRACT.snapshots)
    assert migrate(database) == []


def test_versions_without_evidence_are_not_carried_over(
    new_database: Callable[[], Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    database = new_database()
    upgrade = alembic.command.upgrade
    with monkeypatch.context() as earlier:
        earlier.setattr("alembic.command.upgrade", lambda config, _: upgrade(config, "0001"))
        earlier.setattr("streamflow.warehouse._grant", lambda *_: None)
        migrate(database)
    execute(
        database,
        """
        INSERT INTO model_versions VALUES (
            1, 'run', '2024-01-31', 'churn_v1', 0.5, 'scorer', 'sha', 'data', 'predictions', '{}', '[]', '{}',
            '2024-02-01')
        """,
        owner=True,
    )
    before = definition(database)
    with pytest.raises(ConfigurationError, match=r"registered without evidence.*another STREAMFLOW_HOME"):
        migrate(database)
    assert definition(database) == before


def test_a_database_of_a_newer_version_is_left_alone(database: Database) -> None:
    before = definition(database)
    execute(database, "UPDATE alembic_version SET version_num = '9999'", owner=True)
    try:
        with pytest.raises(ConfigurationError, match=r"at migration 9999, which this version .* does not know"):
            migrate(database, _with(SUBSCRIPTIONS, Column("extra", "float", "")))
    finally:
        execute(database, "UPDATE alembic_version SET version_num = '0004'", owner=True)
    assert definition(database) == before


def _with(table: Table, *added: Column, without: str = "", **changed: Column) -> Contract:
    columns = tuple(changed.get(column.name, column) for column in table.columns if column.name != without)
    other = replace(table, columns=(*columns, *added))
    return replace(CONTRACT, tables=tuple(other if one is table else one for one in CONTRACT.tables))


@pytest.mark.parametrize(
    ("contract", "message"),
    [
        (
            _with(USAGE, skips_7d=replace(USAGE.values[3], kind="float")),
            "usage_agg_30d.skips_7d is bigint in the warehouse and double precision in the contract; write a migration",
        ),
        (
            _with(SUBSCRIPTIONS, without="total_paid"),
            "table subscriptions has columns that the contract lacks: total_paid; write a migration that drops",
        ),
    ],
)
def test_what_only_a_person_can_decide_is_refused_whole(database: Database, contract: Contract, message: str) -> None:
    before = definition(database)
    users = replace(USERS, columns=(*USERS.columns, Column("added_before", "float", "")))
    with pytest.raises(ConfigurationError, match=message):
        migrate(database, replace(contract, tables=(users, *contract.tables[1:])))
    assert definition(database) == before


# --- COPY -------------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0")) | st.sampled_from(['"', "\\.", ",", "\r\n", ""])
WHOLE = st.integers(-(2**63), 2**63 - 1)
ROWS = st.lists(
    st.tuples(
        st.none() | TEXT,
        st.none() | WHOLE,
        st.none() | st.floats(allow_nan=False),
        st.none() | st.booleans(),
        st.none() | st.dates(),
        st.none() | st.datetimes(timezones=st.just(UTC)),
    ),
    max_size=5,
)
COPIED = pa.schema(
    [
        ("words", pa.string()),
        ("whole", pa.int64()),
        ("number", pa.float64()),
        ("flag", pa.bool_()),
        ("day", pa.date32()),
        ("moment", pa.timestamp("us", tz="UTC")),
    ]
)


@pytest.fixture(scope="module")
def scratch(database: Database) -> Iterator[psycopg.Connection[Any]]:
    with database.connect() as connection:
        connection.execute(
            "CREATE TEMP TABLE scratch (words text, whole bigint, number double precision, flag boolean, "
            "day date, moment timestamptz)"
        )
        yield connection


def _exactly(row: tuple[Any, ...]) -> str:
    *values, moment = row
    return repr([*values, moment and moment.astimezone(UTC).isoformat()])


@settings(max_examples=40, deadline=None)
@given(rows=ROWS)
def test_copy_brings_every_value_to_the_last_bit(scratch: psycopg.Connection[Any], rows: list[tuple[Any, ...]]) -> None:
    scratch.execute("TRUNCATE scratch")
    table = pa.Table.from_pylist([dict(zip(COPIED.names, row, strict=True)) for row in rows], COPIED)
    copy_in(scratch, sql.Identifier("scratch"), table)
    arrived = scratch.execute("SELECT * FROM scratch").fetchall()
    assert sorted(map(_exactly, arrived)) == sorted(map(_exactly, rows))
    taken = copy_out(scratch, sql.SQL("SELECT * FROM scratch"), dict(zip(COPIED.names, COPIED.types, strict=True)))
    assert taken.schema == COPIED
    assert sorted(_exactly(tuple(row.values())) for row in taken.to_pylist()) == sorted(map(_exactly, rows))


@pytest.mark.parametrize("words", [[None], ["", None, ""], []])
def test_a_row_whose_only_value_is_missing_is_copied_out(scratch: psycopg.Connection[Any], words: list[Any]) -> None:
    scratch.execute("TRUNCATE scratch")
    copy_in(scratch, sql.Identifier("scratch"), pa.table({"words": pa.array(words, pa.string())}))
    taken = copy_out(scratch, sql.SQL("SELECT whole, words FROM scratch"), {"words": pa.string()})
    assert taken.to_pydict() == {"words": words}


def test_copy_brings_every_block(scratch: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warehouse, "COPY_BLOCK_ROWS", 3)
    scratch.execute("TRUNCATE scratch")
    copy_in(scratch, sql.Identifier("scratch"), pa.table({"whole": range(10)}))
    assert scratch.execute("SELECT count(*), sum(whole) FROM scratch").fetchone() == (10, 45)


# --- months -----------------------------------------------------------------------------------------------------


def put(database: Database, month: Month, rows: pa.Table, *, revision: int = 1) -> MonthWrite:
    return write_month(
        database,
        SUBSCRIPTIONS,
        month,
        rows,
        digest=f"{revision:064x}",
        revision=revision,
        meanings=SUBSCRIPTIONS.meanings,
        now=NOW,
    )


def test_a_month_replaces_what_that_month_had_and_nothing_else(clean: Database) -> None:
    january, february = (random_rows(SUBSCRIPTIONS, PEOPLE, seed) for seed in (1, 2))
    put(clean, JANUARY, january)
    put(clean, FEBRUARY, february)
    assert held(clean, "subscriptions") == in_months((january, "2024-01"), (february, "2024-02"))

    corrected = random_rows(SUBSCRIPTIONS, ["u3", "new"], 3)
    written = put(clean, JANUARY, corrected, revision=2)
    assert held(clean, "subscriptions") == in_months((corrected, "2024-01"), (february, "2024-02"))
    with clean.connect() as connection:
        assert month_write(connection, "subscriptions", JANUARY) == written
        assert month_write(connection, "subscriptions", FEBRUARY).revision == 1
    facts = {"meanings": {column.name: column.meaning for column in SUBSCRIPTIONS.values}}
    assert written == MonthWrite("subscriptions", JANUARY, 2, f"{2:064x}", 2, {}, NOW, facts)


def test_a_server_with_other_habits_makes_no_difference(new_database: Callable[[], Database]) -> None:
    database = new_database()
    name = database.url.rpartition("/")[2]
    for habit in ("timezone = 'America/New_York'", "datestyle = 'SQL, DMY'", "extra_float_digits = -10"):
        execute(database, f"ALTER DATABASE {name} SET {habit}", owner=True)
    migrate(database)
    landed = land(database, JANUARY, PEOPLE)
    assert held(database, "users") == expected(landed["users"], "2024-01")
    assert held(database, SNAPSHOT) == expected(landed["subscriptions"], JANUARY.as_of)
    assert {written.written_at for written in month_writes(database)} == {NOW}
    assert red(landing_findings(database, USERS, JANUARY)) == {}


def test_the_same_rows_again_in_any_order_have_the_same_digest(clean: Database) -> None:
    rows = random_rows(SUBSCRIPTIONS, PEOPLE)
    query = sql.SQL("SELECT * FROM subscriptions ORDER BY user_id")

    def digest() -> str:
        with clean.connect() as connection:
            return rows_digest(connection, query)

    put(clean, JANUARY, rows)
    first = digest()
    put(clean, JANUARY, rows)
    assert digest() == first
    put(clean, JANUARY, rows.take(pa.array(range(9, -1, -1))))
    assert digest() == first
    put(clean, JANUARY, rows.set_column(2, "monthly_fee", pa.array(np.nextafter(rows["monthly_fee"].to_numpy(), 1e9))))
    assert digest() != first


def terminated(step: Callable[..., Any], *, after: bool) -> Callable[..., Any]:
    """The step, with its connection killed by the server before or after it."""

    def crash(connection: psycopg.Connection[Any], *arguments: Any) -> None:
        if after:
            step(connection, *arguments)
        connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    return crash


@pytest.mark.parametrize("step", ["copy_in", "record"])
@pytest.mark.parametrize("after", [False, True])
def test_a_connection_lost_at_any_step_leaves_the_old_month(
    clean: Database, monkeypatch: pytest.MonkeyPatch, step: str, after: bool
) -> None:
    rows = random_rows(SUBSCRIPTIONS, PEOPLE, 1)
    old = put(clean, JANUARY, rows)
    corrected = random_rows(SUBSCRIPTIONS, PEOPLE[:4], 2)
    with monkeypatch.context() as patch:
        patch.setattr(warehouse, step, terminated(getattr(warehouse, step), after=after))
        with pytest.raises(psycopg.OperationalError):
            put(clean, JANUARY, corrected, revision=2)
    assert held(clean, "subscriptions") == in_months((rows, "2024-01"))
    assert month_writes(clean) == [old]

    new = put(clean, JANUARY, corrected, revision=2)
    assert held(clean, "subscriptions") == in_months((corrected, "2024-01"))
    assert month_writes(clean) == [new]


def test_a_row_refused_in_the_middle_of_copy_leaves_the_old_month(
    clean: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warehouse, "COPY_BLOCK_ROWS", 1)
    rows = random_rows(SUBSCRIPTIONS, PEOPLE, 1)
    old = put(clean, JANUARY, rows)
    broken = rows.set_column(2, "monthly_fee", pa.array([1.0] * 7 + [None] + [1.0] * 2))
    with pytest.raises(psycopg.errors.NotNullViolation):
        put(clean, JANUARY, broken, revision=2)
    assert held(clean, "subscriptions") == in_months((rows, "2024-01"))
    assert month_writes(clean) == [old]


def waiting(database: Database) -> int:
    """How many sessions wait for an advisory lock of this database."""
    with database.connect() as connection:
        row = connection.execute(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted "
            "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        ).fetchone()
    return int(row[0]) if row else 0


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.01)


class Pause:
    """Stands for a function of the warehouse; the first call stops there until `go`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self._step = getattr(warehouse, name)
        self._calls = iter(range(1_000))
        self.reached, self.go = threading.Event(), threading.Event()
        monkeypatch.setattr(warehouse, name, self)

    def __call__(self, *arguments: Any) -> Any:
        if next(self._calls) == 0:
            self.reached.set()
            assert self.go.wait(10)
        return self._step(*arguments)


def test_two_writers_of_one_month_go_one_after_the_other(clean: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their customers differ, so without the lock both would stay: neither sees the other's rows to delete."""
    one, other = random_rows(SUBSCRIPTIONS, PEOPLE[:5], 1), random_rows(SUBSCRIPTIONS, PEOPLE[5:], 2)
    pause = Pause(monkeypatch, "copy_in")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(put, clean, JANUARY, one, revision=1)
        assert pause.reached.wait(10)
        second = pool.submit(put, clean, JANUARY, other, revision=2)
        until(lambda: waiting(clean) == 1)
        pause.go.set()
        first.result(10)
        second.result(10)
    assert held(clean, "subscriptions") == in_months((other, "2024-01"))
    assert [written.revision for written in month_writes(clean)] == [2]


def test_writers_of_different_months_do_not_wait(clean: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(SUBSCRIPTIONS, PEOPLE)
    pause = Pause(monkeypatch, "copy_in")
    with ThreadPoolExecutor(1) as pool:
        january = pool.submit(put, clean, JANUARY, rows)
        assert pause.reached.wait(10)
        put(clean, FEBRUARY, rows)
        pause.go.set()
        january.result(10)
    assert held(clean, "subscriptions") == in_months((rows, "2024-01"), (rows, "2024-02"))


# --- snapshots --------------------------------------------------------------------------------------------------


MEANINGS = {column.name: column.meaning for column in SUBSCRIPTIONS.values}


def test_a_snapshot_has_a_row_for_each_user_of_the_month(clean: Database) -> None:
    landed = land(clean, JANUARY, PEOPLE, seed=1, lacking={"subscriptions": ["u2", "u7"]})
    february = land(clean, FEBRUARY, PEOPLE[:3], seed=2)
    nothing = (None,) * len(SUBSCRIPTIONS.values)
    assert held(clean, SNAPSHOT) == {
        **expected(landed["subscriptions"], date(2024, 1, 31)),
        (date(2024, 1, 31), "u2"): nothing,
        (date(2024, 1, 31), "u7"): nothing,
        **expected(february["subscriptions"], date(2024, 2, 29)),
    }
    with clean.connect() as connection:
        written = month_write(connection, SNAPSHOT, JANUARY)
        assert written.rows == 10
        assert written.facts == {"missing": 2, "meanings": MEANINGS}
        assert written.revision == 2
        assert written.digest == snapshot_digest(connection, SUBSCRIPTIONS, JANUARY)
        assert written.sources == {
            name: month_write(connection, name, JANUARY).as_source for name in ("users", "subscriptions")
        }
        assert month_write(connection, SNAPSHOT, FEBRUARY).facts == {"missing": 0, "meanings": MEANINGS}


def test_rows_of_strangers_stay_out_of_a_snapshot_and_hide_nobody_who_is_missing(clean: Database) -> None:
    """As while a corrected month loads, when one table has it and the other not yet."""
    rows = {
        USERS: random_rows(USERS, ["a", "b", "c"]),
        SUBSCRIPTIONS: random_rows(SUBSCRIPTIONS, ["c", "left", "gone", "away"]),
    }
    for table, values in rows.items():
        write_month(clean, table, JANUARY, values, digest="0" * 64, revision=1, meanings=table.meanings, now=NOW)
    written = build_snapshot(clean, SUBSCRIPTIONS, JANUARY, now=NOW)
    assert sorted(user for _, user in held(clean, SNAPSHOT)) == ["a", "b", "c"]
    assert (written.rows, written.facts) == (3, {"missing": 2, "meanings": MEANINGS})


def test_the_snapshot_of_users_is_users_and_made_from_nothing_else(clean: Database) -> None:
    landed = land(clean, JANUARY, PEOPLE, seed=1)["users"]
    land(clean, FEBRUARY, PEOPLE[:3], seed=2)
    january = {key: row for key, row in held(clean, str(USERS.snapshot)).items() if key[0] == JANUARY.as_of}
    assert january == expected(landed, JANUARY.as_of)
    with clean.connect() as connection:
        users = month_write(connection, "users", JANUARY)
        written = month_write(connection, "users_snapshots", JANUARY)
    assert written.sources == {"users": users.as_source}
    assert (written.rows, written.revision) == (10, users.revision)
    assert written.facts == {"missing": 0, **users.facts}


def test_a_snapshot_has_the_meanings_that_its_values_were_written_with(clean: Database) -> None:
    """Whatever the contract says by the time that it is built."""
    columns = [
        replace(column, unit="cents") if column.unit == "currency" else column for column in SUBSCRIPTIONS.columns
    ]
    before = replace(SUBSCRIPTIONS, columns=tuple(columns))
    land(clean, JANUARY, PEOPLE, tables=[USERS, before])
    written = build_snapshot(clean, SUBSCRIPTIONS, JANUARY, now=NOW)
    meanings = written.facts["meanings"]
    assert {name for name in meanings if meanings[name] != MEANINGS[name]} == {"total_paid"}
    assert meanings.keys() == MEANINGS.keys()


def test_a_snapshot_of_rows_that_were_written_without_meanings_has_none(clean: Database) -> None:
    land(clean, JANUARY, PEOPLE)
    execute(clean, "UPDATE month_writes SET facts = '{}' WHERE relation = 'subscriptions'")
    assert build_snapshot(clean, SUBSCRIPTIONS, JANUARY, now=NOW).facts == {"missing": 0, "meanings": {}}


def test_a_snapshot_again_replaces_that_day_only(clean: Database) -> None:
    land(clean, JANUARY, PEOPLE, seed=1)
    february = land(clean, FEBRUARY, PEOPLE, seed=2)
    corrected = land(clean, JANUARY, PEOPLE[:2], seed=3)
    assert held(clean, SNAPSHOT) == in_months(
        (corrected["subscriptions"], JANUARY.as_of), (february["subscriptions"], FEBRUARY.as_of)
    )


@pytest.mark.parametrize("absent", ["users", "subscriptions"])
def test_a_snapshot_needs_both_tables(clean: Database, absent: str) -> None:
    land(clean, JANUARY, PEOPLE)
    before = held(clean, SNAPSHOT), month_writes(clean)
    for table in (USERS, SUBSCRIPTIONS):
        if table.name != absent:
            rows = random_rows(table, PEOPLE)
            write_month(clean, table, FEBRUARY, rows, digest="0" * 64, revision=1, meanings=table.meanings, now=NOW)
    with pytest.raises(UnknownMonth, match=f"^{absent} holds nothing for 2024-02; land the month and materialize"):
        build_snapshot(clean, SUBSCRIPTIONS, FEBRUARY, now=NOW)
    assert held(clean, SNAPSHOT) == before[0]
    assert [written for written in month_writes(clean) if written.month == JANUARY] == before[1]


def test_a_snapshot_waits_for_a_table_that_is_being_written(clean: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    land(clean, JANUARY, PEOPLE, seed=1)
    corrected = random_rows(SUBSCRIPTIONS, PEOPLE, 2)
    pause = Pause(monkeypatch, "copy_in")
    with ThreadPoolExecutor(2) as pool:
        writing = pool.submit(put, clean, JANUARY, corrected, revision=9)
        assert pause.reached.wait(10)
        building = pool.submit(build_snapshot, clean, SUBSCRIPTIONS, JANUARY, now=NOW)
        until(lambda: waiting(clean) == 1)
        pause.go.set()
        writing.result(10)
        built = building.result(10)
    assert built.revision == 9
    assert held(clean, SNAPSHOT) == in_months((corrected, JANUARY.as_of))


@pytest.mark.parametrize("after", [False, True])
def test_a_connection_lost_while_building_leaves_the_old_snapshot(
    clean: Database, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    old = land(clean, JANUARY, PEOPLE, seed=1)["subscriptions"]
    put(clean, JANUARY, random_rows(SUBSCRIPTIONS, PEOPLE, 2), revision=7)
    before = month_writes(clean)
    monkeypatch.setattr(warehouse, "record", terminated(warehouse.record, after=after))
    with pytest.raises(psycopg.OperationalError):
        build_snapshot(clean, SUBSCRIPTIONS, JANUARY, now=NOW)
    assert held(clean, SNAPSHOT) == in_months((old, JANUARY.as_of))
    assert month_writes(clean) == before


def test_a_snapshots_digest_is_that_of_its_content(clean: Database) -> None:
    users = ["Z", "a", "B", "_", "1", "10", "9", "a-b", "a.b", "ab"]
    rows = random_rows(SUBSCRIPTIONS, users)
    write_month(
        clean, USERS, JANUARY, random_rows(USERS, users), digest="0" * 64, revision=1, meanings=USERS.meanings, now=NOW
    )
    digests = set()
    for order in (range(10), range(9, -1, -1), np.random.default_rng(1).permutation(10)):
        put(clean, JANUARY, rows.take(pa.array(order)))
        digests.add(build_snapshot(clean, SUBSCRIPTIONS, JANUARY, now=NOW).digest)
    assert len(digests) == 1

    put(clean, JANUARY, rows.slice(1))
    assert build_snapshot(clean, SUBSCRIPTIONS, JANUARY, now=NOW).digest not in digests
    write_month(
        clean, USERS, FEBRUARY, random_rows(USERS, users), digest="0" * 64, revision=1, meanings=USERS.meanings, now=NOW
    )
    put(clean, FEBRUARY, rows)
    assert build_snapshot(clean, SUBSCRIPTIONS, FEBRUARY, now=NOW).digest not in digests


@pytest.mark.parametrize(
    "setting",
    [
        "datestyle = 'SQL, DMY'",
        "timezone = 'America/New_York'",
        "extra_float_digits = -10",
        "client_encoding = 'latin1'",
        "lc_numeric = 'C.UTF-8'",
        "enable_sort = off",
    ],
)
def test_a_digest_does_not_depend_on_the_session(clean: Database, setting: str) -> None:
    query = sql.SQL("SELECT *, 'é' AS accent, 0.1 + 0.2::float8 AS sum, {}::timestamptz AS moment FROM {}").format(
        sql.Literal("2024-01-31T23:30:00+00:00"), sql.Identifier(SNAPSHOT)
    )
    land(clean, JANUARY, ["a"])
    with clean.connect() as connection:
        plain = snapshot_digest(connection, SUBSCRIPTIONS, JANUARY), rows_digest(connection, query)
    with clean.connect() as connection:
        connection.execute(f"SET {setting}")
        assert (snapshot_digest(connection, SUBSCRIPTIONS, JANUARY), rows_digest(connection, query)) == plain


# --- quality ----------------------------------------------------------------------------------------------------


@pytest.fixture
def january(clean: Database) -> Database:
    """January, in which the usage file lacks two of ten users, and February."""
    tables = (USERS, SUBSCRIPTIONS, USAGE)
    land(clean, JANUARY, PEOPLE, lacking={"usage_agg_30d": ["u1", "u2"]}, tables=tables)
    land(clean, FEBRUARY, PEOPLE, seed=1, tables=tables)
    return clean


def red(findings: list[Finding]) -> dict[str, dict[str, int]]:
    """The checks that failed, with the counts that are not zero."""
    return {
        finding.name: {label: count for label, count in finding.counts.items() if count}
        for finding in findings
        if not finding.passed
    }


def test_checks_pass_on_untouched_months(clean: Database) -> None:
    land(clean, JANUARY, PEOPLE, lacking={"usage_agg_30d": ["u1", "u2"]})
    for table in CONTRACT.tables:
        findings = landing_findings(clean, table, JANUARY)
        assert [finding.name for finding in findings] == finding_names(table, snapshot=False)
        assert red(findings) == {}
    for table in CONTRACT.snapshots:
        findings = snapshot_findings(clean, table, JANUARY)
        assert [finding.name for finding in findings] == finding_names(table, snapshot=True)
        assert all(finding.counts for finding in findings)
        assert red(findings) == {}
        assert findings[0].counts == {"rows": 10, "source rows": 10}


@pytest.mark.parametrize(
    ("table", "tampering", "found"),
    [
        (SUBSCRIPTIONS, "DELETE FROM {} WHERE user_id < 'u3'", {"row_count_equals_source": (7, 10)}),
        (SUBSCRIPTIONS, "DELETE FROM {}", {"row_count_equals_source": (0, 10)}),
        (SUBSCRIPTIONS, "UPDATE {} SET monthly_fee = -0.01 WHERE user_id < 'u2'", {"monthly_fee": 2}),
        (SUBSCRIPTIONS, "UPDATE {} SET monthly_fee = 10000.01", {"monthly_fee": 10}),
        (SUBSCRIPTIONS, "UPDATE {} SET monthly_fee = 'NaN' WHERE user_id = 'u4'", {"monthly_fee": 1}),
        (SUBSCRIPTIONS, "UPDATE {} SET monthly_fee = '-Infinity' WHERE user_id = 'u4'", {"monthly_fee": 1}),
        (SUBSCRIPTIONS, "UPDATE {} SET monthly_fee = 10000 WHERE user_id = 'u4'", {}),
        (SUBSCRIPTIONS, "UPDATE {} SET monthly_fee = 0 WHERE user_id = 'u4'", {}),
        (SUBSCRIPTIONS, "UPDATE {} SET net_service = 'dsl' WHERE user_id >= 'u7'", {"net_service": 3}),
        (SUBSCRIPTIONS, "UPDATE {} SET net_service = '', months_active = -1", {"net_service": 10, "months_active": 10}),
        (USERS, "UPDATE {} SET signup_date = '2024-02-01' WHERE user_id < 'u5'", {"signup_date after as_of": 5}),
        (USERS, "UPDATE {} SET signup_date = '2024-01-31'", {}),
        (USERS, "UPDATE {} SET signup_date = '1999-12-31' WHERE user_id = 'u0'", {"signup_date": 1}),
        (USERS, "UPDATE {} SET signup_date = 'infinity' WHERE user_id = 'u0'", {"signup_date after as_of": 1}),
    ],
)
def test_a_landed_month_that_was_tampered_with_turns_red(
    january: Database, table: Table, tampering: str, found: dict[str, Any]
) -> None:
    execute(january, f"{tampering.format(table.name)} {'AND' if 'WHERE' in tampering else 'WHERE'} month = '2024-01'")
    failed = red(landing_findings(january, table, JANUARY))
    if "row_count_equals_source" in found:
        rows, source = found["row_count_equals_source"]
        counts = {"rows": rows, "source rows": source}
        assert failed == {"row_count_equals_source": {name: count for name, count in counts.items() if count}}
    else:
        assert {name: count for counts in failed.values() for name, count in counts.items()} == found
        dates = {name for name in found if name.endswith("after as_of")}
        assert set(failed) == ({"dates_agree_with_partition"} if dates else {"within_bounds"} if found else set())
    assert red(landing_findings(january, table, FEBRUARY)) == {}


@pytest.mark.parametrize(
    ("tampering", "found"),
    [
        ("DELETE FROM {} WHERE user_id = 'u1'", {"row_count_equals_source": {"rows": 9, "source rows": 10}}),
        ("UPDATE {} SET watch_hours_30d = 'NaN' WHERE user_id > 'u7'", {"within_bounds": {"watch_hours_30d": 2}}),
        ("UPDATE {} SET watch_hours_30d = 721", {"within_bounds": {"watch_hours_30d": 10}}),
        ("UPDATE {} SET skips_7d = NULL", {}),
    ],
)
def test_a_snapshot_that_was_tampered_with_turns_red(
    january: Database, tampering: str, found: dict[str, dict[str, int]]
) -> None:
    where = "AND" if "WHERE" in tampering else "WHERE"
    execute(january, f"{tampering.format(USAGE.snapshot)} {where} as_of = '2024-01-31'")
    assert red(snapshot_findings(january, USAGE, JANUARY)) == found
    assert red(snapshot_findings(january, USAGE, FEBRUARY)) == {}


def test_a_snapshot_of_another_day_of_the_month_turns_red(january: Database) -> None:
    execute(january, f"UPDATE {USAGE.snapshot} SET as_of = '2024-01-30' WHERE user_id < 'u3' AND as_of = '2024-01-31'")
    assert red(snapshot_findings(january, USAGE, JANUARY)) == {
        "row_count_equals_source": {"rows": 7, "source rows": 10},
        "dates_agree_with_partition": {"as_of within the month, but not its last day": 3},
    }
    assert red(snapshot_findings(january, USAGE, FEBRUARY)) == {}


def test_a_key_that_is_there_twice_turns_red(new_database: Callable[[], Database]) -> None:
    database = new_database()
    migrate(database)
    land(database, JANUARY, PEOPLE)
    for relation in ("subscriptions", SNAPSHOT):
        execute(
            database,
            f"ALTER TABLE {relation} DROP CONSTRAINT {relation}_pkey;"
            f"INSERT INTO {relation} SELECT * FROM {relation} WHERE user_id < 'u3'",
            owner=True,
        )
    expected_red = {
        "row_count_equals_source": {"rows": 13, "source rows": 10},
        "key_is_unique": {"rows": 13, "different keys": 10},
    }
    assert red(landing_findings(database, SUBSCRIPTIONS, JANUARY)) == expected_red
    assert red(snapshot_findings(database, SUBSCRIPTIONS, JANUARY)) == expected_red


def test_an_empty_month_is_no_success(clean: Database) -> None:
    put(clean, JANUARY, random_rows(SUBSCRIPTIONS, []))
    assert red(landing_findings(clean, SUBSCRIPTIONS, JANUARY)) == {"row_count_equals_source": {}}


def test_a_month_that_nobody_wrote_cannot_be_checked(clean: Database) -> None:
    with pytest.raises(UnknownMonth, match="subscriptions holds nothing for 2024-03"):
        landing_findings(clean, SUBSCRIPTIONS, MARCH)
    with pytest.raises(UnknownMonth, match="users holds nothing for 2024-03"):
        snapshot_findings(clean, SUBSCRIPTIONS, MARCH)


def test_a_finding_says_what_it_counted() -> None:
    assert Finding("x", True, {"rows": 7043, "source rows": 7043}).summary == "rows: 7,043, source rows: 7,043"
    assert Finding("x", True).summary == "nothing counted"


# --- what each month holds --------------------------------------------------------------------------------------


def test_what_is_recorded_comes_back_as_it_was(clean: Database) -> None:
    first = MonthWrite("a", JANUARY, 1, "d", 5, {"b": {"revision": 3, "digest": "e"}}, NOW, {"list": [1, {"x": None}]})
    second = MonthWrite("b", JANUARY, 3, "e", 0, {}, NOW + timedelta(microseconds=1))
    earlier = MonthWrite("z", Month(2023, 12), 1, "f", 1, {}, NOW)
    for written in (second, first, earlier):
        with clean.connect() as connection:
            record(connection, written)
    assert month_writes(clean) == [earlier, first, second]
    assert month_writes(clean)[1].written_at.tzinfo is not None

    again = replace(first, revision=2, digest="g", rows=6, sources={}, facts={"x": 0.1}, written_at=NOW)
    with clean.connect() as connection:
        record(connection, again)
        assert month_write(connection, "a", JANUARY) == again
    assert month_writes(clean) == [earlier, again, second]


def test_labels_are_those_of_the_month(clean: Database) -> None:
    landed = land(clean, JANUARY, PEOPLE, seed=1, tables=[USERS, LABELS])["labels"]
    land(clean, FEBRUARY, PEOPLE, seed=2, tables=[USERS, LABELS])
    assert warehouse.labels(clean, JANUARY).to_dict("list") == landed.to_pydict()
    assert list(warehouse.labels(clean, MARCH).columns) == ["user_id", "churn_label"]
    assert warehouse.labels(clean, MARCH).empty


# --- rights -----------------------------------------------------------------------------------------------------

VERSION = """
    INSERT INTO model_versions (
        version, run_id, as_of, service, threshold, artifact_path, artifact_sha256, dataset_digest, predictions_digest,
        evidence, lineage, registered_at
    ) VALUES (
        {number}, 'run {number}', '2024-01-31', 'churn_v1', 0.5, 'scorer', 'sha', 'data', 'predictions',
        '{{}}', '{{}}', '2024-02-01')
"""
PREDICTION = """
    INSERT INTO predictions VALUES (
        gen_random_uuid(), '2024-02-01', NULL, 'a', '2024-01-31', '{}', 0.4, 0.5, false, 1, 'run 1', 'sha')
"""
DECISION = """
    INSERT INTO promotion_ledger (at, action, version, by, reason, policy, override, gates)
    VALUES ('2024-02-01', 'promote', {number}, 'ada', 'first', 'manual', false, '[]')
"""


REPORT = """
    INSERT INTO reports (kind, month, model_version, digest, content, made_at)
    VALUES ('drift_report', '2024-02', 1, 'd', '{}', '2024-03-01')
"""
ATTEMPT = """
    INSERT INTO retraining_attempts (cause, month, reason, by, at)
    VALUES ('decay:2024-02:version 1', '2024-02', 'decayed', 'ada', '2024-03-01')
"""


@pytest.fixture(scope="module")
def governed(new_database: Callable[[], Database]) -> Database:
    """A database with one row in each append-only table, inserted by the platform's role."""
    database = new_database()
    migrate(database)
    execute(database, VERSION.format(number=1))
    execute(database, DECISION.format(number=1))
    execute(database, "SELECT make_predictions_partition('2024-02-01')")
    execute(database, PREDICTION)
    execute(database, REPORT)
    execute(database, ATTEMPT)
    return database


def governance(database: Database) -> list[list[tuple[Any, ...]]]:
    with database.connect() as connection:
        return [connection.execute(f"SELECT * FROM {name}").fetchall() for name in warehouse.INSERT_ONLY]


COLUMN = {
    "model_versions": "version",
    "promotion_ledger": "version",
    "predictions": "model_version",
    "reports": "digest",
    "retraining_attempts": "reason",
}
"""A column of each append-only table that anybody might want to change."""

ATTACKS = [
    *(
        statement.format(table, column=COLUMN[table])
        for table in warehouse.INSERT_ONLY
        for statement in (
            "UPDATE {} SET {column} = {column}",
            "DELETE FROM {}",
            "TRUNCATE {} CASCADE",
            "ALTER TABLE {} DISABLE TRIGGER append_only",
            "ALTER TABLE {} DISABLE TRIGGER ALL",
            "ALTER TABLE {} ADD COLUMN note text",
            "ALTER TABLE {} OWNER TO CURRENT_USER",
            "ALTER TABLE {} RENAME TO old",
            "DROP TABLE {} CASCADE",
            "DROP TRIGGER append_only ON {}",
            "CREATE TRIGGER other BEFORE INSERT ON {} FOR EACH ROW EXECUTE FUNCTION refuse_change()",
            "CREATE RULE other AS ON INSERT TO {} DO INSTEAD NOTHING",
            "GRANT UPDATE ON {0} TO CURRENT_USER; UPDATE {0} SET {column} = {column}",
            "LOCK TABLE {} IN ACCESS EXCLUSIVE MODE",
        )
    ),
    "INSERT INTO model_versions SELECT * FROM model_versions ON CONFLICT (version) DO UPDATE SET threshold = 0.9",
    "UPDATE model_versions SET evidence = '{}'",
    "UPDATE promotion_ledger SET threshold = 0.9",
    "ALTER TABLE promotion_ledger DROP COLUMN threshold",
    "ALTER TABLE promotion_ledger DROP COLUMN registered_version",
    "DROP SCHEMA streamflow CASCADE",
    "CREATE TABLE streamflow.mine ()",
    "CREATE OR REPLACE FUNCTION streamflow.refuse_change() RETURNS trigger LANGUAGE sql AS 'SELECT NULL'",
    "DROP FUNCTION refuse_change() CASCADE",
    "SET session_replication_role = 'replica'",
    "SET ROLE streamflow_owner",
    "SET SESSION AUTHORIZATION streamflow_owner",
    "GRANT streamflow_owner TO streamflow",
    "ALTER ROLE streamflow SUPERUSER",
    "UPDATE alembic_version SET version_num = '0000'",
    "DELETE FROM alembic_version",
    "INSERT INTO alembic_version VALUES ('0004')",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_platforms_role_cannot_rewrite_history(governed: Database, attack: str) -> None:
    before = governance(governed)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        execute(governed, attack)
    assert governance(governed) == before


def test_the_platforms_role_is_nothing_special(governed: Database) -> None:
    with governed.connect() as connection:
        role = connection.execute(
            "SELECT rolsuper, rolcreaterole, rolcreatedb, rolreplication, rolbypassrls, "
            "pg_has_role(rolname, 'streamflow_owner', 'MEMBER') FROM pg_roles WHERE rolname = current_user"
        ).fetchone()
    assert role == (False,) * 6


def test_even_the_owner_only_appends(governed: Database) -> None:
    before = governance(governed)
    for table in warehouse.INSERT_ONLY:
        for statement in ("UPDATE {} SET {column} = {column}", "DELETE FROM {}", "TRUNCATE {} CASCADE"):
            with pytest.raises(psycopg.errors.RaiseException, match=r"is append-only: (UPDATE|DELETE|TRUNCATE)"):
                execute(governed, statement.format(table, column=COLUMN[table]), owner=True)
    assert governance(governed) == before


def test_the_platforms_role_appends_and_reads(governed: Database) -> None:
    execute(governed, VERSION.format(number=2))
    execute(governed, DECISION.format(number=2))
    versions, decisions, *_ = governance(governed)
    assert [row[0] for row in versions] == [1, 2]
    assert [row[3] for row in decisions] == [1, 2]
