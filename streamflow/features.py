"""The feature store: the module that talks to Feast (with online_redis.py for what is peculiar to Redis).

Builds Feast's objects from the contract, applies them, publishes months to the online store and retrieves
point-in-time features for training. The serving process reads the online tables itself and never comes here.
"""

import json
import string
from dataclasses import replace
from datetime import datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

import pandas as pd
import psycopg
import pyarrow as pa
import yaml
from psycopg import sql

from streamflow import online_redis
from streamflow.contract import AS_OF, CONTRACT, MONTH, SCHEMA, USER_ID, Contract, FeatureService, FeatureView
from streamflow.database import Database
from streamflow.errors import UnknownMonth
from streamflow.months import Month
from streamflow.relations import ONLINE_STORE, POSTGRES, REDIS
from streamflow.relations import is_published as is_published
from streamflow.settings import PROJECT_ROOT
from streamflow.warehouse import MonthWrite, copy_in, copy_out, month_write, record, rows_digest

if TYPE_CHECKING:
    import feast

REPOSITORY = PROJECT_ROOT / "feature_repo"
EVENT_TIMESTAMP = "event_timestamp"
OWNER = "data-science"
ONLINE = "online"
INSTANT = timedelta(microseconds=1)
_ARROW = {"category": pa.string(), "boolean": pa.bool_(), "integer": pa.int64(), "float": pa.float64()}
SAME_DAY = timedelta(days=1)
"""How long a snapshot holds: whoever is not in a month's snapshot has no features, not those of an earlier month."""


@cache
def _feast() -> Any:
    """Feast, imported without typeguard's instrumentation, in about 1 s instead of 4.

    Feast decorates its classes with `typeguard.typechecked`, which recompiles each of their methods at import. The
    decorator is documented to do nothing when Python runs optimized; it does nothing here while Feast is imported.
    """
    import typeguard

    checked = typeguard.typechecked
    typeguard.typechecked = lambda target: target  # type: ignore[assignment]
    try:
        import feast
    finally:
        typeguard.typechecked = checked
    return feast


@cache
def entity() -> "feast.Entity":
    """The customer, by ``user_id``."""
    feast = _feast()
    return feast.Entity(name="user", join_keys=[USER_ID], value_type=feast.ValueType.STRING, description="A customer.")


def feature_views(contract: Contract = CONTRACT) -> list["feast.FeatureView"]:
    """One Feast view for each view of the contract, with 64-bit fields in contract order."""
    return [_feature_view(view) for view in contract.views]


def feature_services(contract: Contract = CONTRACT) -> list["feast.FeatureService"]:
    """One Feast service for each service of the contract."""
    feast = _feast()
    return [
        feast.FeatureService(
            name=service.name,
            features=[_taken(service, view) for view in service.views if service.columns_of(view)],
            description=service.description,
            owner=OWNER,
        )
        for service in contract.services
    ]


def _taken(service: FeatureService, view: FeatureView) -> Any:
    """The view, or the part of it that the service takes."""
    columns = service.columns_of(view)
    whole = _feature_view(view)
    return whole if columns == view.columns else whole[[column.name for column in columns]]


def _feature_view(view: FeatureView) -> "feast.FeatureView":
    feast = _feast()
    from feast.infra.offline_stores.contrib.postgres_offline_store.postgres_source import PostgreSQLSource
    from feast.types import Bool, Float64, Int64, String

    types = {"category": String, "boolean": Bool, "integer": Int64, "float": Float64}
    query = sql.SQL("SELECT {}, {}::timestamp AT TIME ZONE 'UTC' AS {}, {} FROM {}").format(
        sql.Identifier(USER_ID),
        sql.Identifier(AS_OF),
        sql.Identifier(EVENT_TIMESTAMP),
        sql.SQL(", ").join(sql.Identifier(column.name) for column in view.columns),
        sql.Identifier(SCHEMA, view.snapshot),
    )
    return feast.FeatureView(
        name=view.name,
        entities=[entity()],
        schema=[
            feast.Field(
                name=column.name,
                dtype=types[column.kind],
                description=column.description,
                tags={"unit": column.unit} if column.unit else {},
            )
            for column in view.columns
        ],
        source=PostgreSQLSource(name=view.snapshot, query=query.as_string(None), timestamp_field=EVENT_TIMESTAMP),
        ttl=SAME_DAY,
        description=view.description,
        owner=OWNER,
    )


def environment(database: Database, redis_url: str | None = None) -> dict[str, str]:
    """The variables that `feature_store.yaml` names, escaped as between double quotes in YAML.

    With a ``redis_url`` the online store is that Redis.
    """
    parts = psycopg.conninfo.conninfo_to_dict(database.url)
    return {
        "STREAMFLOW_DATABASE_URL": database.url,
        "STREAMFLOW_FEAST_REGISTRY_URL": database.sqlalchemy("feast"),
        "STREAMFLOW_POSTGRES_HOST": str(parts["host"]),
        "STREAMFLOW_POSTGRES_PORT": str(parts.get("port", 5432)),
        "STREAMFLOW_POSTGRES_DATABASE": _escaped(str(parts["dbname"])),
        "STREAMFLOW_POSTGRES_USER": _escaped(str(parts["user"])),
        "STREAMFLOW_POSTGRES_PASSWORD": _escaped(str(parts.get("password", ""))),
        "STREAMFLOW_ONLINE_STORE": REDIS if redis_url else POSTGRES,
        "STREAMFLOW_REDIS_CONNECTION": _escaped(online_redis.connection_string(redis_url)) if redis_url else "",
    }


def _escaped(text: str) -> str:
    return json.dumps(text)[1:-1]


def feature_store(
    database: Database, redis_url: str | None = None, *, registry_ttl_s: int | None = None
) -> "feast.FeatureStore":
    """The feature store of `feature_repo/` on this database, with that Redis as its online store if there is one.

    ``registry_ttl_s`` replaces how long what the registry says is believed; 0: until `refresh_registry`.
    """
    feast = _feast()
    from feast.repo_config import RepoConfig

    text = string.Template((REPOSITORY / "feature_store.yaml").read_text(encoding="utf-8"))
    config = yaml.safe_load(text.substitute(environment(database, redis_url)))
    if registry_ttl_s is not None:
        config["registry"]["cache_ttl_seconds"] = registry_ttl_s
    return feast.FeatureStore(config=RepoConfig(**config, repo_path=REPOSITORY))


def apply(store: "feast.FeatureStore", contract: Contract = CONTRACT) -> None:
    """Register entity, views and services, and make the online tables."""
    store.apply([entity(), *feature_views(contract), *feature_services(contract)])


def publish(
    database: Database, store: "feast.FeatureStore", view: FeatureView, month: Month, *, now: datetime
) -> MonthWrite:
    """Bring the online store to what it should hold once ``view``'s snapshot of ``month`` is part of it.

    Each customer has the newest published month that knows them, in whatever order months are published or corrected.
    In PostgreSQL that happens in one transaction; in Redis customer by customer, and again if it breaks off.
    Raises UnknownMonth when the month has no snapshot, OnlineStoreUnavailable when Redis does not answer.
    """
    with database.connect() as connection:
        # One month at a time: a withdrawal must see every other month either published whole or not at all.
        connection.execute(
            "SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", (f"{SCHEMA} publishes {view.name}",)
        )
        snapshot = month_write(connection, view.snapshot, month)
        published = replace(
            snapshot, relation=view.name, sources={snapshot.relation: snapshot.as_source}, written_at=now
        )
        if _is_redis(store):
            published = replace(published, facts={**snapshot.facts, ONLINE_STORE: REDIS})
            record(connection, published)
            with online_redis.answering():
                _bring_to_redis(connection, store, view, month)
        else:
            _merge(connection, view, month)
            _withdraw(connection, view, month)
            record(connection, published)
    store.registry.apply_materialization(
        store.get_feature_view(view.name), store.project, month.event_time - INSTANT, month.event_time
    )
    return published


def _is_redis(store: "feast.FeatureStore") -> bool:
    return bool(store.config.online_store.type == REDIS)


def _bring_to_redis(
    connection: psycopg.Connection[Any], store: "feast.FeatureStore", view: FeatureView, month: Month
) -> None:
    """Write what Redis should hold for the month's customers, those it no longer has, and all if Redis lost the view.

    The newest published month of each counts. A newer row of a publication that broke off stays: its month comes again.
    """
    held = online_redis.held(store, view.name)
    connection.execute('CREATE TEMP TABLE held (user_id text COLLATE "C", event_timestamp timestamptz) ON COMMIT DROP')
    times = pa.array(held.values(), pa.timestamp("us", tz="UTC"))
    copy_in(connection, sql.Identifier("held"), pa.table({USER_ID: list(held), EVENT_TIMESTAMP: times}))
    given = {
        "event_time": month.event_time,
        "as_of": month.as_of,
        "view": view.name,
        "store": REDIS,
        "lost": bool(online_redis.lacking(store, [view.name])),
    }
    parts = {
        "snapshot": sql.Identifier(SCHEMA, view.snapshot),
        "user_id": sql.Identifier(USER_ID),
        "as_of": sql.Identifier(AS_OF),
        "values": sql.SQL(", ").join(sql.Identifier("snapshot", column.name) for column in view.columns),
    }
    newest = sql.SQL(
        """
        SELECT newest.* FROM (
            SELECT DISTINCT ON (snapshot.{user_id})
                snapshot.{user_id}, snapshot.{as_of}::timestamp AT TIME ZONE 'UTC' AS event_timestamp, {values}
            FROM {snapshot} AS snapshot
            JOIN streamflow.month_writes AS published
                ON published.relation = %(view)s AND published.month = to_char(snapshot.{as_of}, 'YYYY-MM')
                AND published.facts ->> 'online_store' = %(store)s
            WHERE %(lost)s OR snapshot.{user_id} IN (
                SELECT {user_id} FROM {snapshot} WHERE {as_of} = %(as_of)s
                UNION SELECT user_id FROM held WHERE event_timestamp = %(event_time)s
            )
            ORDER BY snapshot.{user_id}, snapshot.{as_of} DESC
        ) AS newest
        LEFT JOIN held ON held.user_id = newest.{user_id}
        WHERE held.user_id IS NULL
            OR held.event_timestamp < newest.event_timestamp OR held.event_timestamp = %(event_time)s
        """
    ).format(**parts)
    with connection.cursor("newest") as cursor:
        cursor.itersize = online_redis.KEYS_AT_ONCE
        online_redis.write(store, view.name, cursor.execute(newest, given))
    gone = sql.SQL(
        """
        SELECT user_id FROM held WHERE event_timestamp = %(event_time)s AND NOT EXISTS (
            SELECT FROM {snapshot} AS snapshot
            JOIN streamflow.month_writes AS published
                ON published.relation = %(view)s AND published.month = to_char(snapshot.{as_of}, 'YYYY-MM')
                AND published.facts ->> 'online_store' = %(store)s
            WHERE snapshot.{user_id} = held.user_id
        )
        """
    ).format(**parts)
    online_redis.remove(store, view.name, [user for (user,) in connection.execute(gone, given)])
    online_redis.mark(store, view.name)


def _merge(connection: psycopg.Connection[Any], view: FeatureView, month: Month) -> None:
    """Bring the month's snapshot into the online table of the same database, without its rows leaving the server."""
    _feast()
    from streamflow.online_store import merge

    times = [EVENT_TIMESTAMP, "created_timestamp"]
    values = [column.name for column in view.columns]
    source = sql.SQL("SELECT {}, {}::timestamptz AS {}, NULL::timestamptz AS {}, {} FROM {} WHERE {} = {}").format(
        sql.Identifier(USER_ID),
        sql.Literal(month.event_time),
        *map(sql.Identifier, times),
        sql.SQL(", ").join(map(sql.Identifier, values)),
        sql.Identifier(SCHEMA, view.snapshot),
        sql.Identifier(AS_OF),
        sql.Literal(month.as_of),
    )
    merge(connection, sql.Identifier(ONLINE, view.name), [USER_ID], [USER_ID, *times, *values], source)


def _withdraw(connection: psycopg.Connection[Any], view: FeatureView, month: Month) -> None:
    """Customers that a corrected month no longer knows go back to the newest published month that does."""
    names = [EVENT_TIMESTAMP, *(column.name for column in view.columns)]
    parts = {
        "online": sql.Identifier(ONLINE, view.name),
        "snapshot": sql.Identifier(SCHEMA, view.snapshot),
        "user_id": sql.Identifier(USER_ID),
        "as_of": sql.Identifier(AS_OF),
        "names": sql.SQL(", ").join(map(sql.Identifier, names)),
        "values": sql.SQL(", ").join(sql.Identifier("snapshot", column.name) for column in view.columns),
    }
    given = {"event_time": month.event_time, "as_of": month.as_of, "view": view.name}
    connection.execute(
        sql.SQL(
            """
            CREATE TEMP TABLE withdrawn ON COMMIT DROP AS
            SELECT {user_id} FROM {online} AS online
            WHERE event_timestamp = %(event_time)s AND NOT EXISTS (
                SELECT FROM {snapshot} AS snapshot
                WHERE snapshot.{as_of} = %(as_of)s AND snapshot.{user_id} = online.{user_id}
            )
            """
        ).format(**parts),
        given,
    )
    connection.execute(
        sql.SQL("DELETE FROM {online} USING withdrawn WHERE {online}.{user_id} = withdrawn.{user_id}").format(**parts)
    )
    connection.execute(
        sql.SQL(
            """
            INSERT INTO {online} ({user_id}, {names})
            SELECT DISTINCT ON (snapshot.{user_id})
                snapshot.{user_id}, snapshot.{as_of}::timestamp AT TIME ZONE 'UTC', {values}
            FROM withdrawn
            JOIN {snapshot} AS snapshot USING ({user_id})
            JOIN streamflow.month_writes AS published
                ON published.relation = %(view)s AND published.month = to_char(snapshot.{as_of}, 'YYYY-MM')
                AND NOT published.facts ? 'online_store'
            WHERE snapshot.{as_of} < %(as_of)s
            ORDER BY snapshot.{user_id}, snapshot.{as_of} DESC
            """
        ).format(**parts),
        given,
    )


def online_digest(database: Database, view: FeatureView) -> str:
    """SHA-256 of everything that the online store holds for a view, in the order of user_id."""
    names = (USER_ID, EVENT_TIMESTAMP, *(column.name for column in view.columns))
    query = sql.SQL("SELECT {} FROM {} ORDER BY {}").format(
        sql.SQL(", ").join(map(sql.Identifier, names)), sql.Identifier(ONLINE, view.name), sql.Identifier(USER_ID)
    )
    with database.connect() as connection:
        return rows_digest(connection, query)


def offline(database: Database, store: "feast.FeatureStore", service: FeatureService) -> tuple[str, ...]:
    """The service's features that the online store lacks, so that a model on it could not be served.

    In PostgreSQL the online tables say so. Redis has no schema: there Feast's registry, by which it is read, says which
    features a view has, and a view that Redis does not hold lacks all of them.
    """
    if _is_redis(store):
        with online_redis.answering():
            lacking = online_redis.lacking(store, [view.name for view in service.views])
        online = {
            (view.name, field.name)
            for view in store.list_feature_views()
            for field in view.features
            if view.name not in lacking
        }
    else:
        with database.connect() as connection:
            online = set(
                connection.execute(
                    "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = %s", (ONLINE,)
                ).fetchall()
            )
    return tuple(
        column.name
        for view in service.views
        for column in service.columns_of(view)
        if (view.name, column.name) not in online
    )


def historical_features(
    database: Database, store: "feast.FeatureStore", month: Month, contract: Contract = CONTRACT
) -> pd.DataFrame:
    """All features of each labelled customer as they were known on the month's last day.

    Returns user_id, event_timestamp and the features, a row for each customer labelled for the month plus the
    contract's label horizon. Raises UnknownMonth when no label of that month has landed.
    """
    labelled = month.shift(contract.label_horizon_months)
    return _as_known(
        *(database, store, month, contract),
        customers_of=(contract.label_table.name, MONTH, str(labelled)),
        lacking=f"no labels of {labelled} have landed; land its labels.csv, then train {month}",
    )


def features_of_month(
    database: Database, store: "feast.FeatureStore", month: Month, contract: Contract = CONTRACT
) -> pd.DataFrame:
    """The same of every customer of the month, labelled or not; raises UnknownMonth when it has no snapshots."""
    snapshot = str(contract.snapshots[0].snapshot)
    return _as_known(
        *(database, store, month, contract),
        customers_of=(snapshot, AS_OF, str(month.as_of)),
        lacking=f"{snapshot} holds nothing for {month}; land the month and materialize its snapshots first",
    )


def _as_known(
    database: Database,
    store: "feast.FeatureStore",
    month: Month,
    contract: Contract,
    *,
    customers_of: tuple[str, str, str],
    lacking: str,
) -> pd.DataFrame:
    """All features, as of the month's last day, of the customers that a relation has where a column is a key."""
    relation, period, key = customers_of
    customers = sql.SQL(
        "SELECT {user_id}, {event_time}::timestamptz AS {event_timestamp} FROM {relation} WHERE {period} = {key}"
    ).format(
        user_id=sql.Identifier(USER_ID),
        event_time=sql.Literal(month.event_time),
        event_timestamp=sql.Identifier(EVENT_TIMESTAMP),
        relation=sql.Identifier(SCHEMA, relation),
        period=sql.Identifier(period),
        key=sql.Literal(key),
    )
    with database.connect() as connection:
        if connection.execute(sql.SQL("SELECT EXISTS ({})").format(customers)).fetchone() == (False,):
            raise UnknownMonth(lacking)
        columns = [(view, column) for view in contract.views for column in view.columns]
        job: Any = store.get_historical_features(
            entity_df=customers.as_string(None), features=[f"{view.name}:{column.name}" for view, column in columns]
        )
        # PostgreSQL takes Feast's filters by time to leave a single row and loops over all rows for each of them.
        connection.execute("SET LOCAL enable_nestloop = off")
        types = {
            USER_ID: pa.string(),
            EVENT_TIMESTAMP: pa.timestamp("us", tz="UTC"),
            **{column.name: _ARROW[column.kind] for _, column in columns},
        }
        frame: pd.DataFrame = copy_out(connection, sql.SQL(job.to_sql()), types).to_pandas()
    return frame
