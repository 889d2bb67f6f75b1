"""Feast on the warehouse: what is published, what training retrieves, and the feast commands."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import permutations
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from psycopg import sql
from test_warehouse import execute, land, random_rows

from streamflow import features, landing, stack
from streamflow.contract import (
    CONTRACT,
    LABELS,
    PAYMENTS,
    SUBSCRIPTIONS,
    SUPPORT,
    USER_ID,
    USERS,
    Column,
    FeatureService,
)
from streamflow.database import Database
from streamflow.errors import UnknownMonth
from streamflow.months import Month
from streamflow.settings import Settings
from streamflow.warehouse import MonthWrite, build_snapshot, copy_out, migrate, month_write, write_month

JANUARY, FEBRUARY, MARCH = MONTHS = (Month(2024, 1), Month(2024, 2), Month(2024, 3))
NOW = datetime(2024, 4, 5, 6, 7, tzinfo=UTC)
SERVICE = CONTRACT.service("churn_v1")
PROFILE = CONTRACT.view("subs_profile_fv")
PROFILE_TABLES = (USERS, SUBSCRIPTIONS)

Online = dict[str, tuple[Any, ...]]


@pytest.fixture(scope="module")
def store(database: Database) -> Any:
    migrate(database)
    store = features.feature_store(database)
    features.apply(store)
    return store


@pytest.fixture
def clean(database: Database, store: Any) -> Database:
    """The module's database, with everything applied and without rows."""
    return empty(database)


def empty(database: Database) -> Database:
    snapshots = [f"streamflow.{table.snapshot}" for table in CONTRACT.snapshots]
    tables = [f"streamflow.{table.name}" for table in CONTRACT.tables]
    online = [f"online.{view.name}" for view in CONTRACT.views]
    relations = [*snapshots, *tables, *online, "streamflow.month_writes"]
    execute(database, ";".join(f"DELETE FROM {relation}" for relation in relations))
    return database


def publish(database: Database, store: Any, month: Month) -> MonthWrite:
    return features.publish(database, store, PROFILE, month, now=NOW)


def online(database: Database) -> Online:
    """What the online store holds of the profile: event time and values by user."""
    names = ", ".join(column.name for column in PROFILE.columns)
    with database.connect() as connection:
        rows = connection.execute(f"SELECT user_id, event_timestamp, {names} FROM online.{PROFILE.name}").fetchall()
    return {user: tuple(rest) for user, *rest in rows}


def of_month(rows: pa.Table, month: Month) -> Online:
    """What `online` must give for the users of a month."""
    values = rows.select([USER_ID, *(column.name for column in PROFILE.columns)]).to_pydict().values()
    return {user: (month.event_time, *rest) for user, *rest in zip(*values, strict=True)}


# --- publishing -------------------------------------------------------------------------------------------------


def land_files(database: Database, folder: Path, month: Month) -> dict[str, pd.DataFrame]:
    """Bring a folder of CSV files into the warehouse; returns them by table."""
    frames = {}
    for table in CONTRACT.tables:
        parsed = landing.parse((folder / table.file).read_bytes(), table, month)
        assert parsed.count == 0
        write_month(
            database, table, month, parsed.values, digest="0" * 64, revision=1, meanings=table.meanings, now=NOW
        )
        frames[table.name] = parsed.values.to_pandas().set_index(USER_ID)
    for table in CONTRACT.snapshots:
        build_snapshot(database, table, month, now=NOW)
    return frames


def served(store: Any, users: Sequence[str], service: FeatureService = SERVICE) -> dict[str, list[Any]]:
    answer = store.get_online_features(store.get_feature_service(service.name), [{USER_ID: user} for user in users])
    values: dict[str, list[Any]] = answer.to_dict()
    return values


def exactly(values: Sequence[Any]) -> list[tuple[type, Any]]:
    return [(type(value), value) for value in values]


def test_every_user_is_served_the_snapshots_values_by_every_service(clean: Database, store: Any) -> None:
    users = [f"user-{number}" for number in range(200)]
    landed = land(clean, JANUARY, users, seed=5)
    for view in CONTRACT.views:
        features.publish(clean, store, view, JANUARY, now=NOW)
    for service in CONTRACT.services:
        answer = served(store, users, service)
        assert set(answer) == {USER_ID, *service.names}
        for view in service.views:
            for column in service.columns_of(view):
                assert exactly(answer[column.name]) == exactly(landed[view.table.name][column.name].to_pylist())


def test_every_real_user_is_served_the_files_values(clean: Database, store: Any, real_data: Path) -> None:
    frames = land_files(clean, real_data / "month_000", JANUARY)
    for view in CONTRACT.views:
        features.publish(clean, store, view, JANUARY, now=NOW)
    users = list(frames["users"].index)
    assert len(users) == 7043
    answer = served(store, users, CONTRACT.service("churn_v2_protected"))
    assert set(answer) == {USER_ID, *(column.name for column in CONTRACT.features)}
    for view in CONTRACT.views:
        for column in view.columns:
            assert exactly(answer[column.name]) == exactly(frames[view.table.name].loc[users, column.name].tolist())
    assert (users[0], answer["monthly_fee"][0]) == ("7590-VHVEG", 29.85)
    assert sum(answer["plan_stream_tv"]) == 2707


def test_what_a_feature_file_lacks_is_served_as_null_never_as_zero(clean: Database, store: Any) -> None:
    landed = land(clean, JANUARY, ["a", "b"], lacking={"subscriptions": ["b"], "usage_agg_30d": ["b"]})
    for view in CONTRACT.views:
        features.publish(clean, store, view, JANUARY, now=NOW)
    answer = served(store, ["a", "b", "nobody"])
    for view in SERVICE.views:
        for column in view.columns:
            value = landed[view.table.name][column.name][0].as_py()
            lacking = view.table.name in ("subscriptions", "usage_agg_30d")
            there = None if lacking else landed[view.table.name][column.name][1].as_py()
            assert exactly(answer[column.name]) == exactly([value, there, None])


def test_nulls_do_not_take_bits_from_their_neighbours(clean: Database, store: Any) -> None:
    """Whole numbers, which Feast hands on as floats where one is missing, are exact as far as floats are."""
    rows = random_rows(SUBSCRIPTIONS, ["a"])
    rows = rows.set_column(1, "months_active", pa.array([2**53 - 1]))
    for table, values in ((USERS, random_rows(USERS, ["a", "b"])), (SUBSCRIPTIONS, rows)):
        write_month(clean, table, JANUARY, values, digest="0" * 64, revision=1, meanings=table.meanings, now=NOW)
    build_snapshot(clean, SUBSCRIPTIONS, JANUARY, now=NOW)
    publish(clean, store, JANUARY)
    assert {user: values[1] for user, values in online(clean).items()} == {"a": 2**53 - 1, "b": None}


def test_what_was_published_is_recorded(clean: Database, store: Any) -> None:
    land(clean, JANUARY, ["a", "b"], seed=6, lacking={"subscriptions": ["b"]})
    published = publish(clean, store, JANUARY)
    with clean.connect() as connection:
        snapshot = month_write(connection, PROFILE.snapshot, JANUARY)
        assert month_write(connection, PROFILE.name, JANUARY) == published
    assert published == replace(
        snapshot, relation="subs_profile_fv", sources={PROFILE.snapshot: snapshot.as_source}, written_at=NOW
    )
    assert (published.rows, published.facts["missing"]) == (2, 1)


def test_feast_is_told_what_was_published(clean: Database, store: Any) -> None:
    land(clean, FEBRUARY, ["a"], tables=PROFILE_TABLES)
    publish(clean, store, FEBRUARY)
    _, until = store.get_feature_view(PROFILE.name).materialization_intervals[-1]
    assert until == FEBRUARY.event_time


def test_a_month_without_a_snapshot_cannot_be_published(clean: Database, store: Any) -> None:
    land(clean, JANUARY, ["a"], tables=PROFILE_TABLES)
    publish(clean, store, JANUARY)
    before = online(clean)
    with pytest.raises(UnknownMonth, match="subscriptions_profile_snapshots holds nothing for 2024-02"):
        publish(clean, store, FEBRUARY)
    assert online(clean) == before


def test_an_older_month_does_not_take_users_back_in_time(clean: Database, store: Any) -> None:
    january = land(clean, JANUARY, ["left", "stays"], seed=1, tables=PROFILE_TABLES)["subscriptions"]
    february = land(clean, FEBRUARY, ["stays", "new"], seed=2, tables=PROFILE_TABLES)["subscriptions"]
    publish(clean, store, FEBRUARY)
    assert online(clean) == of_month(february, FEBRUARY)
    publish(clean, store, JANUARY)
    assert online(clean) == of_month(january, JANUARY) | of_month(february, FEBRUARY)


# --- any order --------------------------------------------------------------------------------------------------

FINAL = {JANUARY: ["a", "b", "c"], FEBRUARY: ["b", "c", "d"], MARCH: ["c", "e"]}
"""Who is there when everything has landed as it should: some leave, some join, b and d are gone in March."""
MISTAKEN = {JANUARY: ["a", "x"], FEBRUARY: ["a", "b", "e", "y"], MARCH: ["a", "b", "c", "d", "z"]}
"""Months that land at first with users who do not belong there and without some who do; all their values differ."""


@dataclass(frozen=True)
class Event:
    """A month lands and is published, as it should be or mistaken."""

    month: Month
    mistaken: bool = False

    def happen(self, database: Database, store: Any) -> None:
        users = (MISTAKEN if self.mistaken else FINAL)[self.month]
        lacking = {"subscriptions": ["d"] if self.mistaken else ["b"]}
        seed = 10 * self.month.number + self.mistaken
        land(database, self.month, users, seed=seed, lacking=lacking, tables=PROFILE_TABLES)
        publish(database, store, self.month)


@pytest.fixture(scope="module")
def in_order(database: Database, store: Any) -> tuple[Online, str]:
    """What the months leave online when they land once, in order, and the digest of it."""
    empty(database)
    for month in MONTHS:
        Event(month).happen(database, store)
    found = online(database)
    expected: Online = {}
    for month in MONTHS:
        rows = random_rows(SUBSCRIPTIONS, FINAL[month], 10 * month.number)
        expected |= of_month(rows, month)
    expected["b"] = (FEBRUARY.event_time, *(None for _ in PROFILE.columns))
    assert found == expected
    assert {user: moment.month for user, (moment, *_) in found.items()} == {"a": 1, "b": 2, "c": 3, "d": 2, "e": 3}
    return found, features.online_digest(database, PROFILE)


@pytest.mark.parametrize(
    "order", permutations(MONTHS), ids=lambda order: "-".join(f"{month.number}" for month in order)
)
def test_any_order_ends_the_same(
    database: Database, store: Any, in_order: tuple[Online, str], order: tuple[Month, ...]
) -> None:
    empty(database)
    for month in order:
        Event(month).happen(database, store)
    assert (online(database), features.online_digest(database, PROFILE)) == in_order


@settings(max_examples=6, deadline=None)
@given(
    earlier=st.lists(st.builds(Event, st.sampled_from(MONTHS), st.booleans()), min_size=1, max_size=4),
    last=st.permutations(MONTHS),
)
def test_corrections_in_any_order_end_the_same(
    database: Database, store: Any, in_order: tuple[Online, str], earlier: list[Event], last: list[Month]
) -> None:
    empty(database)
    for event in [*earlier, *map(Event, last)]:
        event.happen(database, store)
    assert (online(database), features.online_digest(database, PROFILE)) == in_order


def test_a_correction_takes_out_who_does_not_belong(
    database: Database, store: Any, in_order: tuple[Online, str]
) -> None:
    empty(database)
    for month in MONTHS:
        Event(month, mistaken=True).happen(database, store)
    assert {user: moment.month for user, (moment, *_) in online(database).items()} == {
        **dict.fromkeys("abcdz", 3),
        "e": 2,
        "x": 1,
        "y": 2,
    }
    for month in reversed(MONTHS):
        Event(month).happen(database, store)
    assert (online(database), features.online_digest(database, PROFILE)) == in_order


def test_a_month_that_was_not_published_is_nothing_to_go_back_to(clean: Database, store: Any) -> None:
    land(clean, JANUARY, ["a", "b"], seed=1, tables=PROFILE_TABLES)
    for users in (["a", "b"], ["b"]):
        february = land(clean, FEBRUARY, users, seed=2, tables=PROFILE_TABLES)["subscriptions"]
        publish(clean, store, FEBRUARY)
    assert online(clean) == of_month(february, FEBRUARY)


def test_a_publication_that_broke_off_is_made_up_for(
    database: Database, store: Any, in_order: tuple[Online, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    empty(database)
    for event in (Event(JANUARY), Event(FEBRUARY, mistaken=True), Event(MARCH)):
        event.happen(database, store)
    before = online(database)
    for step in ("_withdraw", "record"):
        with monkeypatch.context() as patch:
            patch.setattr(features, step, lambda *_: 1 // 0)
            with pytest.raises(ZeroDivisionError):
                Event(FEBRUARY).happen(database, store)
        assert online(database) == before
    with database.connect() as connection:
        assert month_write(connection, PROFILE.name, FEBRUARY).revision == 22
    publish(database, store, FEBRUARY)
    assert (online(database), features.online_digest(database, PROFILE)) == in_order


def test_a_correction_and_an_older_month_at_the_same_time(
    database: Database, store: Any, in_order: tuple[Online, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """February loses "a" while January, which "a" must go back to, is half published."""
    empty(database)
    for event in (Event(MARCH), Event(FEBRUARY, mistaken=True)):
        event.happen(database, store)
    land(database, JANUARY, FINAL[JANUARY], seed=10, lacking={"subscriptions": ["b"]}, tables=PROFILE_TABLES)
    other = features.feature_store(database)
    merged, corrected = threading.Event(), threading.Event()
    merge = features._merge

    def half_way(*arguments: Any) -> None:
        merge(*arguments)
        if arguments[-1] == JANUARY:
            merged.set()
            corrected.wait(0.5)

    monkeypatch.setattr(features, "_merge", half_way)

    def correct() -> None:
        assert merged.wait(10)
        Event(FEBRUARY).happen(database, other)
        corrected.set()

    with ThreadPoolExecutor(2) as pool:
        correction = pool.submit(correct)
        pool.submit(publish, database, store, JANUARY).result(20)
        correction.result(20)
    assert (online(database), features.online_digest(database, PROFILE)) == in_order


# --- training ---------------------------------------------------------------------------------------------------


def label(database: Database, month: Month, labels: dict[str, bool]) -> None:
    rows = pa.table({USER_ID: list(labels), "churn_label": list(labels.values())})
    write_month(database, LABELS, month, rows, digest="0" * 64, revision=1, meanings=LABELS.meanings, now=NOW)


def retrieve(database: Database, store: Any, month: Month, **changes: Any) -> pd.DataFrame:
    frame = features.historical_features(database, store, month, replace(CONTRACT, **changes))
    return frame.set_index(USER_ID).sort_index()


FEATURES = [column.name for column in CONTRACT.features]


@pytest.fixture
def leaky(clean: Database) -> Database:
    """Three months in which failed payments and tickets of a later month tell February's label.

    "gone" was there in January only, "late" comes in March.
    """
    users = {JANUARY: ["a", "b", "c", "gone"], FEBRUARY: ["a", "b", "c"], MARCH: ["a", "b", "c", "late"]}
    churned = {"a": True, "b": False, "c": True, "gone": True, "late": True}
    for month in MONTHS:
        land(clean, month, users[month], seed=month.number, tables=CONTRACT.snapshots)
        label(clean, month, {user: churned[user] == (month == FEBRUARY) for user in users[month]})
    telling = {
        PAYMENTS: lambda user: {"failed_payments_90d": 1000 * churned[user]},
        SUPPORT: lambda user: {
            "support_tickets_90d": 1000 * churned[user],
            "ticket_avg_resolution_hrs_90d": 2160.0 * churned[user],
        },
    }
    for table, values in telling.items():
        rows = pa.Table.from_pylist([{USER_ID: user, **values(user)} for user in users[MARCH]])
        write_month(clean, table, MARCH, rows, digest="0" * 64, revision=9, meanings=table.meanings, now=NOW)
        build_snapshot(clean, table, MARCH, now=NOW)
    return clean


def as_landed(users: list[str], seed: int) -> dict[str, list[Any]]:
    return {
        column.name: random_rows(view.table, users, seed)[column.name].to_pylist()
        for view in CONTRACT.views
        for column in view.columns
    }


def test_features_are_those_of_the_day_and_none_from_later(leaky: Database, store: Any) -> None:
    frame = retrieve(leaky, store, FEBRUARY)
    assert list(frame.index) == ["a", "b", "c"]
    assert list(frame.columns) == ["event_timestamp", *FEATURES]
    assert set(pd.to_datetime(frame["event_timestamp"], utc=True)) == {pd.Timestamp("2024-02-29", tz="UTC")}
    values = as_landed(["a", "b", "c"], FEBRUARY.number)
    assert {name: frame[name].tolist() for name in values} == values
    assert frame["failed_payments_90d"].tolist() != [1000, 0, 1000]
    telling = retrieve(leaky, store, MARCH)
    assert telling["failed_payments_90d"].tolist() == [1000, 0, 1000, 1000]


def test_later_months_change_nothing_in_what_was_retrieved(leaky: Database, store: Any) -> None:
    january, february = retrieve(leaky, store, JANUARY), retrieve(leaky, store, FEBRUARY)
    land(leaky, MARCH, ["a", "b", "gone", "new"], seed=77, tables=CONTRACT.snapshots)
    label(leaky, MARCH, {"a": True, "new": False})
    pd.testing.assert_frame_equal(retrieve(leaky, store, JANUARY), january)
    pd.testing.assert_frame_equal(retrieve(leaky, store, FEBRUARY), february)


def test_retrieval_never_loops_over_all_rows_for_each_row(
    clean: Database, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What PostgreSQL planned once it had counted the rows: 14 s for 7,043 customers instead of 0.2 s."""
    users = [f"user {number}" for number in range(300)]
    for month in (JANUARY, FEBRUARY):
        land(clean, month, users, seed=month.number, tables=CONTRACT.snapshots)
    with clean.connect(owner=True) as connection:
        connection.execute("ANALYZE")
    plans = []

    def explained(connection: Any, query: Any, types: Any) -> pa.Table:
        plans.append("\n".join(line for (line,) in connection.execute(sql.SQL("EXPLAIN ") + query)))
        return copy_out(connection, query, types)

    monkeypatch.setattr(features, "copy_out", explained)
    assert len(features.features_of_month(clean, store, FEBRUARY)) == 300
    (plan,) = plans
    assert "customer_fv__base" in plan
    assert "Nested Loop" not in plan


def test_a_user_whom_the_month_does_not_know_has_no_features_of_an_earlier_one(leaky: Database, store: Any) -> None:
    label(leaky, FEBRUARY, {"a": True, "gone": True, "late": False})
    frame = retrieve(leaky, store, FEBRUARY)
    assert list(frame.index) == ["a", "gone", "late"]
    unknown = frame.loc[["gone", "late"], FEATURES]
    assert unknown.isna().all(axis=None)
    assert frame.loc["a", "monthly_fee"] == as_landed(["a", "b", "c"], FEBRUARY.number)["monthly_fee"][0]


def test_a_user_whom_a_file_of_the_month_lacks_has_nulls_there(leaky: Database, store: Any) -> None:
    land(leaky, FEBRUARY, ["a", "b", "c"], seed=2, lacking={"subscriptions": ["b"]}, tables=CONTRACT.snapshots)
    frame = retrieve(leaky, store, FEBRUARY)
    lacking = [column.name for column in CONTRACT.features if column in SUBSCRIPTIONS.columns]
    assert len(lacking) == 8
    assert frame.loc["b", lacking].isna().all()
    assert frame.drop(columns=lacking).notna().all(axis=None)
    assert frame.loc[["a", "c"], lacking].notna().all(axis=None)


def test_labels_of_a_later_month_meet_the_features_of_this_one(leaky: Database, store: Any) -> None:
    frame = retrieve(leaky, store, FEBRUARY, label_horizon_months=1)
    assert list(frame.index) == ["a", "b", "c", "late"]
    assert frame["monthly_fee"].tolist()[:3] == as_landed(["a", "b", "c"], FEBRUARY.number)["monthly_fee"]
    assert frame.loc["late", FEATURES].isna().all()


def test_a_month_without_labels_trains_nothing(leaky: Database, store: Any) -> None:
    execute(leaky, "DELETE FROM labels WHERE month = '2024-02'")
    with pytest.raises(UnknownMonth, match=r"no labels of 2024-02 have landed; land its labels\.csv, then train"):
        retrieve(leaky, store, FEBRUARY)
    with pytest.raises(UnknownMonth, match="no labels of 2024-04"):
        retrieve(leaky, store, MARCH, label_horizon_months=1)


@pytest.fixture
def process_in_tokyo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("process_in_tokyo")
def test_a_server_and_a_process_elsewhere_make_no_difference(
    leaky: Database, store: Any, new_database: Callable[[], Database]
) -> None:
    land(leaky, FEBRUARY, ["a", "b", "c"], seed=2, tables=CONTRACT.snapshots)
    publish(leaky, store, FEBRUARY)
    elsewhere = new_database()
    name = elsewhere.url.rpartition("/")[2]
    for habit in ("timezone = 'America/New_York'", "datestyle = 'SQL, DMY'"):
        execute(elsewhere, f"ALTER DATABASE {name} SET {habit}", owner=True)
    migrate(elsewhere)
    other = features.feature_store(elsewhere)
    features.apply(other)
    land(elsewhere, FEBRUARY, ["a", "b", "c"], seed=2, tables=CONTRACT.snapshots)
    label(elsewhere, FEBRUARY, {"a": True, "b": False, "c": True})
    publish(elsewhere, other, FEBRUARY)
    assert online(elsewhere) == online(leaky)
    assert features.online_digest(elsewhere, PROFILE) == features.online_digest(leaky, PROFILE)
    pd.testing.assert_frame_equal(
        *(
            frame.assign(event_timestamp=pd.to_datetime(frame["event_timestamp"], utc=True))
            for frame in (retrieve(elsewhere, other, FEBRUARY), retrieve(leaky, store, FEBRUARY))
        )
    )


# --- the repository and the feast commands ----------------------------------------------------------------------


def test_any_password_reaches_feast(monkeypatch: pytest.MonkeyPatch) -> None:
    from feast.repo_config import load_repo_config

    password = """p"a\\s's: #{$HOME} %41 é"""
    url = f"postgresql://platform:{quote(password, safe='')}@db.example:5433/name"
    for name, value in features.environment(Database(url, url)).items():
        monkeypatch.setenv(name, value)
    config = load_repo_config(features.REPOSITORY, features.REPOSITORY / "feature_store.yaml")
    assert config.offline_store.password == password
    assert (config.offline_store.host, config.offline_store.port) == ("db.example", 5433)
    assert config.online_store.url == url


def test_a_service_has_nothing_of_a_view_all_of_whose_columns_are_protected() -> None:
    """Feast would take an empty part of a view for the whole."""
    protected = tuple(replace(one, protected=one.view == "customer_fv") for one in USERS.columns)
    contract = replace(CONTRACT, tables=(replace(USERS, columns=protected), *CONTRACT.tables[1:]))
    for service, made in zip(contract.services, features.feature_services(contract), strict=True):
        taken = {one.name: [field.name for field in one.features] for one in made.feature_view_projections}
        assert [name for names in taken.values() for name in names] == service.names
        assert ("customer_fv" in taken) == (service.name == "churn_v2_protected")


def test_a_service_whose_features_are_not_online_is_noticed(database: Database, store: Any) -> None:
    for service in CONTRACT.services:
        assert features.offline(database, store, service) == ()
    added = Column("coupons_used", "integer", "Coupons used.", view="contract_fv")
    wider = replace(SUBSCRIPTIONS, columns=(*SUBSCRIPTIONS.columns, added))
    contract = replace(CONTRACT, tables=tuple(wider if one is SUBSCRIPTIONS else one for one in CONTRACT.tables))
    offline = [features.offline(database, store, service) for service in contract.services]
    assert offline == [(), ("coupons_used",), ("coupons_used",)]


def test_the_repository_registers_what_the_contract_states(store: Any) -> None:
    from feature_repo import definitions

    views = {view.name: view for view in store.list_feature_views()}
    assert sorted(views) == sorted(view.name for view in CONTRACT.views)
    for view in CONTRACT.views:
        assert getattr(definitions, view.name).name == view.name
        assert [field.name for field in views[view.name].features] == [column.name for column in view.columns]
        assert views[view.name].entities == ["user"]
    assert sorted(one.name for one in store.list_feature_services()) == sorted(one.name for one in CONTRACT.services)
    for service in CONTRACT.services:
        registered = store.get_feature_service(service.name).feature_view_projections
        taken = {one.name: [field.name for field in one.features] for one in registered}
        assert taken == {view.name: [column.name for column in service.columns_of(view)] for view in service.views}
        assert getattr(definitions, service.name).name == service.name
    assert {"user_gender", "user_is_senior"}.isdisjoint(
        field.name for one in store.get_feature_service("churn_v2").feature_view_projections for field in one.features
    )
    assert definitions.user.join_key == "user_id"


@pytest.fixture
def feast(database: Database, store: Any, tmp_path: Path) -> Callable[..., str]:
    """Runs a feast command in the repository and returns what it prints."""
    environment = {**os.environ, **stack.environment(Settings(home=tmp_path), database)}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [str(Path(sys.executable).with_name("feast")), *arguments],
            cwd=features.REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_feast_commands_work_in_the_repository(
    database: Database, store: Any, in_order: tuple[Online, str], feast: Callable[..., str]
) -> None:
    empty(database)
    for month in MONTHS:
        land(
            database,
            month,
            FINAL[month],
            seed=10 * month.number,
            lacking={"subscriptions": ["b"]},
            tables=PROFILE_TABLES,
        )
    with ThreadPoolExecutor(2) as pool:
        listing = pool.submit(feast, "feature-views", "list")
        feast("materialize", "2024-01-01T00:00:00", "2024-03-31T00:00:00", "--views", PROFILE.name)
        listed = listing.result()
    assert [view.name for view in CONTRACT.views if view.name in listed] == [view.name for view in CONTRACT.views]
    assert (online(database), features.online_digest(database, PROFILE)) == in_order
