"""Months published to Feast's Redis online store: any order, corrections, what is lost, what is read back."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from typing import Any

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st
from test_features import (
    FEBRUARY,
    FINAL,
    JANUARY,
    MARCH,
    MISTAKEN,
    MONTHS,
    NOW,
    PROFILE,
    PROFILE_TABLES,
    Event,
    Online,
    empty,
    exactly,
    land,
    of_month,
    online,
    publish,
    served,
)
from test_warehouse import random_rows

from streamflow import features, online_redis
from streamflow.contract import CONTRACT, SUBSCRIPTIONS
from streamflow.database import Database
from streamflow.errors import ConfigurationError, OnlineStoreUnavailable
from streamflow.months import Month
from streamflow.settings import Settings
from streamflow.warehouse import migrate, month_write

VIEW = PROFILE.name


@pytest.fixture(scope="module")
def store(database: Database, redis_url: str) -> Any:
    migrate(database)
    store = features.feature_store(database, redis_url)
    features.apply(store)
    return store


@pytest.fixture
def client(redis_url: str) -> Iterator[Any]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def clean(database: Database, store: Any) -> Database:
    return start_again(database, store)


def start_again(database: Database, store: Any) -> Database:
    """Neither months nor features, as `feast teardown` leaves Redis."""
    features_online = store._get_provider().online_store
    features_online.delete_entity_values(store.config, ["user_id"])
    online_redis._client(store).delete(online_redis.PUBLISHED + store.project)
    return _without_online_tables(database)


def _without_online_tables(database: Database) -> Database:
    """`empty` of the tables that are there; in this profile Feast makes none."""
    with database.connect() as connection:
        for view in CONTRACT.views:
            connection.execute(f"CREATE TABLE IF NOT EXISTS online.{view.name} ()")
    return empty(database)


def in_redis(store: Any) -> Online:
    """What Redis holds of the profile: event time and values by user."""
    held = online_redis.held(store, VIEW)
    if not held:
        return {}
    names = [column.name for column in PROFILE.columns]
    references = [f"{VIEW}:{name}" for name in names]
    answer = store.get_online_features(references, [{"user_id": user} for user in held]).to_dict()
    values = zip(*(answer[name] for name in names), strict=True)
    return {user: (moment, *row) for (user, moment), row in zip(held.items(), values, strict=True)}


def in_order() -> Online:
    """What the months leave when they land once, in order."""
    expected: Online = {}
    for month in MONTHS:
        expected |= of_month(random_rows(SUBSCRIPTIONS, FINAL[month], 10 * month.number), month)
    return expected | {"b": (FEBRUARY.event_time, *(None for _ in PROFILE.columns))}


# --- publishing -------------------------------------------------------------------------------------------------


def test_every_user_is_served_the_snapshots_values_by_every_service(clean: Database, store: Any) -> None:
    users = [f"user-{number}" for number in range(200)]
    landed = land(clean, JANUARY, users, seed=5, lacking={"usage_agg_30d": ["user-7"]})
    for view in CONTRACT.views:
        features.publish(clean, store, view, JANUARY, now=NOW)
    for service in CONTRACT.services:
        answer = served(store, users, service)
        for view in service.views:
            for column in service.columns_of(view):
                expected = landed[view.table.name][column.name].to_pylist()
                if view.table.name == "usage_agg_30d":
                    expected.insert(7, None)
                assert exactly(answer[column.name]) == exactly(expected)


@pytest.mark.parametrize("order", permutations(MONTHS), ids=lambda order: "-".join(f"{one.number}" for one in order))
def test_any_order_ends_the_same(clean: Database, store: Any, order: tuple[Month, ...]) -> None:
    for month in order:
        Event(month).happen(clean, store)
    assert in_redis(store) == in_order()


@settings(max_examples=3, deadline=None)
@given(
    earlier=st.lists(st.builds(Event, st.sampled_from(MONTHS), st.booleans()), min_size=1, max_size=4),
    last=st.permutations(MONTHS),
)
def test_corrections_in_any_order_end_the_same(
    database: Database, store: Any, earlier: list[Event], last: list[Month]
) -> None:
    start_again(database, store)
    for event in [*earlier, *map(Event, last)]:
        event.happen(database, store)
    assert in_redis(store) == in_order()


def test_feasts_own_check_would_not_let_a_correction_in(clean: Database, store: Any) -> None:
    """Why `online_redis.write` goes past it: a corrected month has the event time of the one it corrects."""
    Event(JANUARY, mistaken=True).happen(clean, store)
    before = in_redis(store)
    land(clean, JANUARY, FINAL[JANUARY], seed=10, lacking={"subscriptions": ["b"]}, tables=PROFILE_TABLES)
    store.materialize(JANUARY.event_time - features.INSTANT, JANUARY.event_time, feature_views=[VIEW])
    assert in_redis(store)["a"] == before["a"]
    publish(clean, store, JANUARY)
    assert in_redis(store) == of_month(random_rows(SUBSCRIPTIONS, ["a", "b", "c"], 10), JANUARY) | {
        "b": (JANUARY.event_time, *(None for _ in PROFILE.columns))
    }


def test_an_older_month_by_the_feast_command_does_not_replace_a_newer_one(clean: Database, store: Any) -> None:
    for month in (JANUARY, FEBRUARY):
        Event(month).happen(clean, store)
    before = in_redis(store)
    store.materialize(JANUARY.event_time - features.INSTANT, JANUARY.event_time, feature_views=[VIEW])
    assert in_redis(store) == before


def test_customers_that_no_month_knows_are_gone(clean: Database, store: Any, client: Any) -> None:
    Event(JANUARY, mistaken=True).happen(clean, store)
    assert set(in_redis(store)) == set(MISTAKEN[JANUARY])
    Event(JANUARY).happen(clean, store)
    assert set(in_redis(store)) == set(FINAL[JANUARY])
    assert len(list(client.scan_iter(b"*user_id*x*streamflow"))) == 0


def test_a_publication_that_broke_off_is_made_up_for(
    clean: Database, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for event in (Event(JANUARY), Event(FEBRUARY, mistaken=True), Event(MARCH)):
        event.happen(clean, store)
    with monkeypatch.context() as patch:
        patch.setattr(online_redis, "remove", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            Event(FEBRUARY).happen(clean, store)
    with clean.connect() as connection:
        assert month_write(connection, VIEW, FEBRUARY).revision == 22
    publish(clean, store, FEBRUARY)
    assert in_redis(store) == in_order()


def test_a_newer_month_that_broke_off_is_not_taken_back_by_an_older_one(
    clean: Database, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(online_redis, "remove", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            Event(FEBRUARY).happen(clean, store)
    before = in_redis(store)
    Event(JANUARY).happen(clean, store)
    assert {user: row for user, row in in_redis(store).items() if user in before} == before


def test_months_published_at_the_same_time_leave_the_newer(clean: Database, store: Any, redis_url: str) -> None:
    for month in (JANUARY, FEBRUARY):
        land(clean, month, ["a", "b", "c"], seed=month.number, tables=PROFILE_TABLES)
    together = threading.Barrier(2)

    def again_and_again(month: Month) -> None:
        own = features.feature_store(clean, redis_url)
        together.wait()
        for _ in range(3):
            publish(clean, own, month)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(again_and_again, [JANUARY, FEBRUARY]))
    assert in_redis(store) == of_month(random_rows(SUBSCRIPTIONS, ["a", "b", "c"], 2), FEBRUARY)


# --- what is lost or elsewhere ----------------------------------------------------------------------------------


def test_what_redis_lost_comes_back_with_any_month(clean: Database, store: Any, client: Any) -> None:
    for month in MONTHS:
        Event(month).happen(clean, store)
    assert online_redis.lacking(store, [VIEW, "usage_agg_30d_fv"]) == ["usage_agg_30d_fv"]
    for key in client.scan_iter():
        client.delete(key)
    assert online_redis.lacking(store, [VIEW]) == [VIEW]
    publish(clean, store, JANUARY)
    assert in_redis(store) == in_order()
    assert online_redis.lacking(store, [VIEW]) == []


def test_what_is_published_elsewhere_does_not_count_here(
    database: Database, store: Any, new_database: Callable[[], Database], redis_url: str
) -> None:
    """From PostgreSQL to Redis and back; in each only what was published there is anything to go back to."""
    database = new_database()
    migrate(database)
    tables, elsewhere = features.feature_store(database), features.feature_store(database, redis_url)
    features.apply(tables)
    start_again(database, elsewhere)
    land(database, JANUARY, ["a", "b"], seed=1, tables=PROFILE_TABLES)
    assert features.is_published(publish(database, tables, JANUARY), "postgres")
    land(database, FEBRUARY, ["a", "b"], seed=2, tables=PROFILE_TABLES)
    publish(database, elsewhere, FEBRUARY)
    assert set(in_redis(elsewhere)) == {"a", "b"}
    february = land(database, FEBRUARY, ["b"], seed=3, tables=PROFILE_TABLES)["subscriptions"]
    written = publish(database, elsewhere, FEBRUARY)
    assert features.is_published(written, "redis")
    assert not features.is_published(written, "postgres")
    assert in_redis(elsewhere) == of_month(february, FEBRUARY)
    land(database, FEBRUARY, ["a", "b"], seed=5, tables=PROFILE_TABLES)
    for users in (["a", "b"], ["b"]):
        march = land(database, MARCH, users, seed=4, tables=PROFILE_TABLES)["subscriptions"]
        publish(database, tables, MARCH)
    january = of_month(random_rows(SUBSCRIPTIONS, ["a", "b"], 1), JANUARY)
    assert online(database) == {"a": january["a"]} | of_month(march, MARCH)


def test_a_service_is_offline_until_all_its_views_are_held(clean: Database, store: Any) -> None:
    service = CONTRACT.service("churn_v1")
    land(clean, JANUARY, ["a"])
    assert features.offline(clean, store, service) == tuple(service.names)
    for view in service.views[1:]:
        features.publish(clean, store, view, JANUARY, now=NOW)
    assert features.offline(clean, store, service) == tuple(one.name for one in service.views[0].columns)
    features.publish(clean, store, service.views[0], JANUARY, now=NOW)
    assert features.offline(clean, store, service) == ()


def test_a_redis_that_is_away_is_an_error_and_nothing_is_published(clean: Database) -> None:
    away = features.feature_store(clean, "redis://127.0.0.1:1/0")
    land(clean, JANUARY, ["a"], tables=PROFILE_TABLES)
    with pytest.raises(OnlineStoreUnavailable):
        publish(clean, away, JANUARY)
    with pytest.raises(OnlineStoreUnavailable):
        features.offline(clean, away, CONTRACT.service("churn_v1"))
    with clean.connect() as connection, pytest.raises(features.UnknownMonth):
        month_write(connection, VIEW, JANUARY)


# --- the address ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("redis://example", {"host": "example", "port": "6379", "db": 0, "ssl": False}),
        ("rediss://example:6380/3", {"host": "example", "port": "6380", "db": 3, "ssl": True}),
        ("redis://u%40:a%2C%22b%3D@h/1", {"username": "u@", "password": 'a,"b=', "db": 1}),
        ("redis://:1234@h", {"password": "1234"}),
        ("redis://:true@h", {"password": "true"}),
    ],
)
def test_any_address_reaches_feast(url: str, wanted: dict[str, Any], tmp_path: Any, database: Database) -> None:
    from feast.infra.online_stores.redis import RedisOnlineStore

    config = features.feature_store(database, url).config.online_store
    (node,), options = RedisOnlineStore._parse_connection_string(config.connection_string)
    given = {**node, **options}
    assert {name: given[name] for name in wanted} == wanted
    assert (given["socket_timeout"], given["retry"]) == (online_redis.TIMEOUT_S, None)


@pytest.mark.parametrize(
    "url",
    ["", "127.0.0.1:6379", "http://h", "redis://", "redis://h/x", "redis://h:0", "redis://h:70000", "redis://h?a=1"],
)
def test_an_address_that_is_none_is_refused_by_name(url: str) -> None:
    with pytest.raises(ConfigurationError, match="STREAMFLOW_REDIS_URL"):
        Settings.load(redis_url=url)


def test_doctor_and_up_ask_whether_redis_answers_and_keeps_everything(redis_url: str, client: Any) -> None:
    assert online_redis.require(redis_url).startswith(f"Redis {client.info()['redis_version']} at ")
    with pytest.raises(OnlineStoreUnavailable, match=r"does not answer at 127\.0\.0\.1:1 .*STREAMFLOW_REDIS_URL"):
        online_redis.require("redis://127.0.0.1:1")


def test_a_redis_that_may_evict_is_refused(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis.Redis, "info", lambda _: {"redis_version": "7", "maxmemory_policy": "allkeys-lru"})
    with pytest.raises(OnlineStoreUnavailable, match=r"may drop features .*allkeys-lru.*noeviction"):
        online_redis.require(redis_url)
