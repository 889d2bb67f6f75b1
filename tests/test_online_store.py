"""The online store by itself: what Feast calls, on the tables of a real PostgreSQL."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import ModuleType
from typing import Any

import psycopg
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamflow import features
from streamflow.database import Database
from streamflow.warehouse import migrate

JANUARY = datetime(2024, 1, 31, tzinfo=UTC)
FEBRUARY = datetime(2024, 2, 29, tzinfo=UTC)
VALUES = {
    "months_active": 2**53 + 1,
    "monthly_fee": 29.85,
    "paperless_billing": True,
    "plan_stream_tv": False,
    "plan_stream_movies": False,
    "net_service": 'Fiber, "optic"',
}


@dataclass(frozen=True)
class World:
    """The online store as Feast holds it."""

    module: ModuleType
    database: Database
    config: Any
    view: Any

    @property
    def store(self) -> Any:
        return self.module.WideRowOnlineStore()

    def write(self, *rows: tuple[Any, ...]) -> None:
        self.store.online_write_batch(self.config, self.view, list(rows), None)

    def read(self, users: Sequence[str], requested: list[str] | None = None) -> list[Any]:
        """Per user (event time, values), with None for what is null."""
        answers = self.store.online_read(self.config, self.view, [self.key(user) for user in users], requested)
        return [
            (moment, values and {name: plain(value) for name, value in values.items()}) for moment, values in answers
        ]

    def key(self, user: str) -> Any:
        from feast.protos.feast.types.EntityKey_pb2 import EntityKey
        from feast.protos.feast.types.Value_pb2 import Value

        return EntityKey(join_keys=["user_id"], entity_values=[Value(string_val=user)])

    def row(self, user: str, moment: datetime, created: datetime | None = None, **values: Any) -> tuple[Any, ...]:
        """What Feast hands over for one user; what is not named is `VALUES`."""
        return (
            self.key(user),
            {name: self.value(name, value) for name, value in (VALUES | values).items()},
            moment,
            created,
        )

    def value(self, name: str, value: Any) -> Any:
        from feast.protos.feast.types.Value_pb2 import Value

        fields = {field.name: field.dtype for field in self.view.features}
        kinds = {"String": "string_val", "Bool": "bool_val", "Int64": "int64_val", "Float64": "double_val"}
        return Value() if value is None else Value(**{kinds[str(fields[name])]: value})


def plain(value: Any) -> Any:
    kind = value.WhichOneof("val")
    return None if kind is None else getattr(value, kind)


@pytest.fixture(scope="module")
def world(database: Database) -> World:
    migrate(database)
    feast = features.feature_store(database)
    features.apply(feast)
    from streamflow import online_store

    return World(online_store, database, feast.config, feast.get_feature_view("subs_profile_fv"))


@pytest.fixture(autouse=True)
def _empty(world: World) -> None:
    with world.database.connect() as connection:
        connection.execute("DELETE FROM online.subs_profile_fv")


def columns(database: Database, table: str) -> dict[str, str]:
    with database.connect() as connection:
        rows = connection.execute(
            "SELECT column_name, data_type FROM information_schema.columns "
            "WHERE table_schema = 'online' AND table_name = %s ORDER BY ordinal_position",
            (table,),
        )
        return dict(rows.fetchall())


# --- tables -----------------------------------------------------------------------------------------------------


def test_a_views_table_is_wide_and_typed(world: World) -> None:
    assert columns(world.database, "subs_profile_fv") == {
        "user_id": "text",
        "event_timestamp": "timestamp with time zone",
        "created_timestamp": "timestamp with time zone",
        "months_active": "bigint",
        "monthly_fee": "double precision",
        "paperless_billing": "boolean",
        "plan_stream_tv": "boolean",
        "plan_stream_movies": "boolean",
        "net_service": "text",
    }


def test_pages_have_room_for_the_next_month(world: World) -> None:
    with world.database.connect() as connection:
        row = connection.execute("SELECT reloptions FROM pg_class WHERE oid = 'online.subs_profile_fv'::regclass")
        assert row.fetchone() == (["fillfactor=50"],)


def two_keys(name: str, *fields: tuple[str, Any]) -> Any:
    """A view of devices: two join keys."""
    import feast
    from feast.infra.offline_stores.contrib.postgres_offline_store.postgres_source import PostgreSQLSource
    from feast.types import Int64, String

    return feast.FeatureView(
        name=name,
        entities=[
            features.entity(),
            feast.Entity(name="device", join_keys=["device"], value_type=feast.ValueType.INT64),
        ],
        schema=[
            feast.Field(name="user_id", dtype=String),
            feast.Field(name="device", dtype=Int64),
            *(feast.Field(name=field, dtype=dtype) for field, dtype in fields),
        ],
        source=PostgreSQLSource(name=name, query="SELECT 1", timestamp_field="event_timestamp"),
    )


@pytest.fixture
def devices(world: World) -> Iterator[Any]:
    from feast.types import Float64

    view = two_keys("devices_fv", ("hours", Float64))
    world.store.update(world.config, [], [view], [], [], partial=False)
    yield view
    world.store.teardown(world.config, [view], [])


def test_update_adds_a_column_and_keeps_the_rows(world: World, devices: Any) -> None:
    from feast.types import Bool, Float64

    rows = {
        "user_id": ["a"],
        "device": [1],
        "event_timestamp": [JANUARY],
        "created_timestamp": [JANUARY],
        "hours": [0.1],
    }
    assert world.store.merge(world.config, devices, pa.table(rows)) == 1
    wider = two_keys("devices_fv", ("hours", Float64), ("shared", Bool))
    for _ in range(2):
        world.store.update(world.config, [], [wider], [], [], partial=True)
    assert list(columns(world.database, "devices_fv").items())[-1] == ("shared", "boolean")
    with world.database.connect() as connection:
        held = connection.execute("SELECT user_id, device, hours, shared FROM online.devices_fv").fetchall()
    assert held == [("a", 1, 0.1, None)]


def test_update_drops_what_was_deleted_and_teardown_everything(world: World, devices: Any) -> None:
    world.store.update(world.config, [devices], [world.view], [], [], partial=True)
    assert columns(world.database, "devices_fv") == {}
    assert columns(world.database, "subs_profile_fv")
    world.store.update(world.config, [], [devices], [], [], partial=True)
    world.store.teardown(world.config, [devices], [])
    assert columns(world.database, "devices_fv") == {}


def test_a_type_that_it_cannot_hold_is_refused(world: World) -> None:
    from feast.types import Float32

    view = two_keys("imprecise_fv", ("hours", Float32))
    with pytest.raises(TypeError, match=r"holds no ValueType\.FLOAT; it holds .*DOUBLE"):
        world.store.update(world.config, [], [view], [], [], partial=True)
    assert columns(world.database, "imprecise_fv") == {}


def test_entities_may_have_several_join_keys(world: World, devices: Any) -> None:
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    def key(user: str, device: int) -> Any:
        return EntityKey(
            join_keys=["device", "user_id"], entity_values=[Value(int64_val=device), Value(string_val=user)]
        )

    data = [
        (key(user, device), {"hours": Value(double_val=device + 0.5)}, JANUARY, None)
        for user in "ab"
        for device in (1, 2)
    ]
    world.store.online_write_batch(world.config, devices, data, None)
    asked = [key("b", 2), key("a", 3), key("a", 1)]
    answers = world.store.online_read(world.config, devices, asked)
    assert [values and plain(values["hours"]) for _, values in answers] == [2.5, None, 1.5]


# --- writing and reading ----------------------------------------------------------------------------------------


def test_values_come_back_with_64_bits_and_nulls(world: World) -> None:
    nothing = dict.fromkeys(VALUES)
    world.write(world.row("a", JANUARY), world.row("b", FEBRUARY, **nothing), world.row("c", JANUARY, monthly_fee=0.1))
    assert world.read(["a", "b", "c"]) == [
        (JANUARY, VALUES),
        (FEBRUARY, nothing),
        (JANUARY, VALUES | {"monthly_fee": 0.1}),
    ]


def test_answers_are_in_the_order_of_the_question(world: World) -> None:
    users = [f"u{number}" for number in range(50)]
    world.write(*(world.row(user, JANUARY, months_active=number) for number, user in enumerate(users)))
    asked = [*reversed(users), "nobody", "u7", "u7", ""]
    found = [values and values["months_active"] for _, values in world.read(asked)]
    assert found == [*range(49, -1, -1), None, 7, 7, None]


def test_an_unknown_entity_has_no_time_and_no_values(world: World) -> None:
    assert world.read(["nobody", "'; DROP TABLE online.subs_profile_fv; --"]) == [(None, None)] * 2
    assert world.read([]) == []


def test_only_what_was_asked_for_is_read(world: World) -> None:
    world.write(world.row("a", JANUARY))
    assert world.read(["a"], ["net_service", "monthly_fee"]) == [
        (JANUARY, {"monthly_fee": 29.85, "net_service": VALUES["net_service"]})
    ]


def test_a_feature_that_is_not_given_is_null_and_one_of_another_type_is_refused(world: World) -> None:
    from feast.protos.feast.types.Value_pb2 import Value

    key, values, *times = world.row("a", JANUARY)
    del values["monthly_fee"]
    world.write((key, values, *times))
    assert world.read(["a"]) == [(JANUARY, VALUES | {"monthly_fee": None})]

    with pytest.raises(TypeError, match="monthly_fee is float_val, not double_val"):
        world.write((key, values | {"monthly_fee": Value(float_val=29.85)}, *times))
    assert world.read(["a"]) == [(JANUARY, VALUES | {"monthly_fee": None})]


def test_a_time_without_a_zone_is_utc(world: World) -> None:
    world.write(world.row("a", JANUARY.replace(tzinfo=None)))
    assert world.read(["a"]) == [(JANUARY, VALUES)]


def test_progress_is_told_also_of_nothing(world: World) -> None:
    told: list[int] = []
    world.store.online_write_batch(world.config, world.view, [], told.append)
    world.store.online_write_batch(world.config, world.view, [world.row("a", JANUARY)], told.append)
    assert told == [0, 1]


# --- merging ----------------------------------------------------------------------------------------------------


def test_an_older_month_does_not_replace_a_newer_one(world: World) -> None:
    world.write(world.row("a", FEBRUARY, monthly_fee=2.0))
    world.write(world.row("a", JANUARY, monthly_fee=1.0), world.row("b", JANUARY, monthly_fee=1.0))
    assert [(moment, values["monthly_fee"]) for moment, values in world.read(["a", "b"])] == [
        (FEBRUARY, 2.0),
        (JANUARY, 1.0),
    ]


def test_the_same_month_again_replaces_it(world: World) -> None:
    world.write(world.row("a", JANUARY, monthly_fee=1.0))
    world.write(world.row("a", JANUARY, monthly_fee=None))
    assert world.read(["a"])[0][1]["monthly_fee"] is None


def test_of_several_rows_in_a_batch_the_newest_counts(world: World) -> None:
    late = FEBRUARY + timedelta(days=9)
    world.write(
        world.row("a", JANUARY, monthly_fee=1.0),
        world.row("a", FEBRUARY, FEBRUARY, monthly_fee=2.0),
        world.row("a", FEBRUARY, late, monthly_fee=3.0),
        world.row("a", FEBRUARY, monthly_fee=4.0),
    )
    assert world.read(["a"])[0][1]["monthly_fee"] == 3.0


BATCHES = st.lists(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.integers(0, 3), st.none() | st.floats(allow_nan=False)),
        max_size=6,
        unique_by=lambda row: row[:2],
    ),
    max_size=5,
)
"""Batches of rows (user, day, fee), with several rows for one user, but not two of the same day."""


@settings(max_examples=20, deadline=None)
@given(batches=BATCHES)
def test_after_any_batches_each_entity_has_its_newest_row(
    world: World, batches: list[list[tuple[str, int, float | None]]]
) -> None:
    with world.database.connect() as connection:
        connection.execute("DELETE FROM online.subs_profile_fv")
    newest: dict[str, tuple[int, float | None]] = {}
    for batch in batches:
        world.write(*(world.row(user, JANUARY + timedelta(days=day), monthly_fee=fee) for user, day, fee in batch))
        for user, day, fee in batch:
            if user not in newest or day >= newest[user][0]:
                newest[user] = (day, fee)
    expected = [
        (JANUARY + timedelta(days=newest[user][0]), newest[user][1]) if user in newest else (None, None)
        for user in "abcd"
    ]
    assert [(moment, values and values["monthly_fee"]) for moment, values in world.read("abcd")] == expected


def test_months_that_are_merged_at_the_same_time_leave_the_newer(world: World) -> None:
    users = [f"u{number}" for number in range(300)]
    together = threading.Barrier(2)

    def publish(moment: datetime) -> None:
        rows = [world.row(user, moment, months_active=moment.month) for user in users]
        together.wait()
        for _ in range(5):
            world.write(*(rows if moment == JANUARY else reversed(rows)))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(publish, [JANUARY, FEBRUARY]))
    assert {(moment, values["months_active"]) for moment, values in world.read(users)} == {(FEBRUARY, 2)}


def test_a_merge_that_fails_changes_nothing(world: World) -> None:
    world.write(world.row("a", JANUARY))
    times = {name: [FEBRUARY, FEBRUARY] for name in ("event_timestamp", "created_timestamp")}
    with pytest.raises(psycopg.errors.NotNullViolation):
        world.store.merge(world.config, world.view, pa.table({"user_id": ["a", None], **times}))
    assert world.read(["a"]) == [(JANUARY, VALUES)]


def test_a_view_without_a_table_is_an_error_not_an_unknown_entity(world: World) -> None:
    from feast.types import Float64

    view = two_keys("never_applied_fv", ("hours", Float64))
    with pytest.raises(psycopg.errors.UndefinedTable, match="never_applied_fv"):
        world.store.online_read(world.config, view, [])
