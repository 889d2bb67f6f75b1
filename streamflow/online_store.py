"""A Feast online store on PostgreSQL: one wide, typed row for each entity and feature view.

Feast finds it by its dotted name in `feature_store.yaml`. Rows that Feast hands over come in by COPY through a staging
table; they, and a month that is published from the same database, are merged in one transaction in which the newer
event time wins, so that an older month never replaces a newer one.
Anybody may read the tables directly: ``online.<view>(<join keys>, event_timestamp, created_timestamp, <features>)``.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import psycopg
import pyarrow as pa
from feast import Entity, FeatureView
from feast.infra.online_stores.online_store import OnlineStore
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.repo_config import FeastConfigBaseModel, RepoConfig
from feast.value_type import ValueType
from psycopg import sql
from pydantic import StrictStr

from streamflow.warehouse import copy_in

EVENT_TIMESTAMP = "event_timestamp"
CREATED_TIMESTAMP = "created_timestamp"
TIMES = (EVENT_TIMESTAMP, CREATED_TIMESTAMP)

FILLFACTOR = 50
"""A month replaces every row: with half of each page free its new version lands beside it and no index changes."""


class _Type:
    def __init__(self, column: str, value: str, arrow: pa.DataType) -> None:
        self.column = column
        self.value = value
        self.arrow = arrow


TYPES = {
    ValueType.STRING: _Type('text COLLATE "C"', "string_val", pa.string()),
    ValueType.BOOL: _Type("boolean", "bool_val", pa.bool_()),
    ValueType.INT64: _Type("bigint", "int64_val", pa.int64()),
    ValueType.DOUBLE: _Type("double precision", "double_val", pa.float64()),
}

FeatureRow = tuple[EntityKey, dict[str, Value], datetime, datetime | None]
"""What Feast hands over for one entity: its key, its features, the event time and the creation time."""


class WideRowOnlineStoreConfig(FeastConfigBaseModel):  # type: ignore[misc]
    """``url`` is a ``postgresql://`` address; the tables are made in ``db_schema``."""

    type: Literal["streamflow.online_store.WideRowOnlineStore"] = "streamflow.online_store.WideRowOnlineStore"
    url: StrictStr
    db_schema: StrictStr = "online"


class WideRowOnlineStore(OnlineStore):  # type: ignore[misc]
    """Feast's online store interface over the wide tables."""

    def online_write_batch(
        self,
        config: RepoConfig,
        table: FeatureView,
        data: list[FeatureRow],
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Merge the rows; Feast calls this when it materializes."""
        if data:
            self.merge(config, table, _arrow(table, data))
        if progress:
            progress(len(data))

    def merge(self, config: RepoConfig, table: FeatureView, rows: pa.Table) -> int:
        """Merge typed rows (join keys, event time, creation time, features) in one transaction.

        Of several rows for one entity the newest counts, in the batch as in the store; equal event times: the one
        written last. Returns how many entities were written.
        """
        target, keys = _identifier(config, table), list(_types(table.entity_columns))
        staged = sql.SQL(", ").join(map(sql.Identifier, rows.column_names))
        with psycopg.connect(config.online_store.url) as connection:
            connection.execute(
                sql.SQL("CREATE TEMP TABLE staging ON COMMIT DROP AS SELECT {} FROM {} WITH NO DATA").format(
                    staged, target
                )
            )
            copy_in(connection, sql.Identifier("staging"), rows)
            source = sql.SQL("SELECT {} FROM staging").format(staged)
            return merge(connection, target, keys, rows.column_names, source)

    def online_read(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: list[EntityKey],
        requested_features: list[str] | None = None,
    ) -> list[tuple[datetime | None, dict[str, Value] | None]]:
        """Read the features of these entities, in their order; an entity without a row gives (None, None)."""
        features = {
            name: kind
            for name, kind in _types(table.features).items()
            if requested_features is None or name in requested_features
        }
        keys = _types(table.entity_columns)
        query = sql.SQL("SELECT {columns} FROM {target} WHERE ({keys}) = ANY(SELECT {unnested})").format(
            columns=sql.SQL(", ").join(map(sql.Identifier, [*keys, EVENT_TIMESTAMP, *features])),
            target=_identifier(config, table),
            keys=sql.SQL(", ").join(map(sql.Identifier, keys)),
            unnested=sql.SQL(", ").join(sql.SQL(f"unnest(%s::{kind.column.split()[0]}[])") for kind in keys.values()),
        )
        wanted = [_key_values(entity_key, keys) for entity_key in entity_keys]
        with psycopg.connect(config.online_store.url) as connection:
            held = connection.execute(query, [[key[at] for key in wanted] for at in range(len(keys))]).fetchall()
        found = {row[: len(keys)]: row[len(keys) :] for row in held}
        return [_answer(found.get(key), features) for key in wanted]

    def update(
        self,
        config: RepoConfig,
        tables_to_delete: Sequence[FeatureView],
        tables_to_keep: Sequence[FeatureView],
        entities_to_delete: Sequence[Entity],
        entities_to_keep: Sequence[Entity],
        partial: bool,  # noqa: FBT001
    ) -> None:
        """Make the tables of ``tables_to_keep`` (or give them the columns they lack); drop the deleted ones."""
        with psycopg.connect(config.online_store.url) as connection:
            for table in tables_to_delete:
                connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(_identifier(config, table)))
            for table in tables_to_keep:
                for statement in _definition(config, table):
                    connection.execute(statement)

    def teardown(self, config: RepoConfig, tables: Sequence[FeatureView], entities: Sequence[Entity]) -> None:
        """Drop the tables of these feature views."""
        self.update(config, tables, [], entities, [], partial=False)


def merge(
    connection: psycopg.Connection[Any],
    target: sql.Identifier,
    keys: Sequence[str],
    names: Sequence[str],
    source: sql.Composable,
) -> int:
    """Merge what the query ``source`` gives for ``names`` into ``target`` and return how many entities were written.

    Of several rows for one entity the newest event time counts, in the query as in the table; equal event times: the
    one created or written last. Merges into one table wait for one another until their transactions end.
    """
    connection.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", (target.as_string(None),))
    statement = sql.SQL(
        """
        INSERT INTO {target} AS held ({names})
        SELECT DISTINCT ON ({keys}) {names} FROM ({source}) AS given
        ORDER BY {keys}, event_timestamp DESC, created_timestamp DESC NULLS LAST
        ON CONFLICT ({keys}) DO UPDATE SET ({names}) = ROW ({excluded})
        WHERE held.event_timestamp <= EXCLUDED.event_timestamp
        """
    ).format(
        target=target,
        names=sql.SQL(", ").join(map(sql.Identifier, names)),
        keys=sql.SQL(", ").join(map(sql.Identifier, keys)),
        source=source,
        excluded=sql.SQL(", ").join(sql.Identifier("excluded", name) for name in names),
    )
    return connection.execute(statement).rowcount


def value_fields(table: FeatureView) -> dict[str, str]:
    """For each feature of a view the field of Feast's ``Value`` that holds it."""
    return {name: kind.value for name, kind in _types(table.features).items()}


def _identifier(config: RepoConfig, table: FeatureView) -> sql.Identifier:
    return sql.Identifier(config.online_store.db_schema, table.name)


def _types(fields: Sequence[Any]) -> dict[str, _Type]:
    try:
        return {field.name: TYPES[field.dtype.to_value_type()] for field in fields}
    except KeyError as unknown:
        raise TypeError(f"the wide-row online store holds no {unknown.args[0]}; it holds {list(TYPES)}") from None


def _definition(config: RepoConfig, table: FeatureView) -> list[sql.Composed]:
    target = _identifier(config, table)
    keys = _types(table.entity_columns)
    key_columns = [sql.SQL(f"{{}} {kind.column} NOT NULL").format(sql.Identifier(name)) for name, kind in keys.items()]
    create = sql.SQL(
        "CREATE TABLE IF NOT EXISTS {} ({}, event_timestamp timestamptz NOT NULL, created_timestamp timestamptz, "
        "PRIMARY KEY ({}))"
    ).format(target, sql.SQL(", ").join(key_columns), sql.SQL(", ").join(map(sql.Identifier, keys)))
    features = [
        sql.SQL(f"ALTER TABLE {{}} ADD COLUMN IF NOT EXISTS {{}} {kind.column}").format(target, sql.Identifier(name))
        for name, kind in _types(table.features).items()
    ]
    room = sql.SQL("ALTER TABLE {} SET (fillfactor = {})").format(target, sql.Literal(FILLFACTOR))
    return [create, room, *features]


def _key_values(entity_key: EntityKey, keys: dict[str, _Type]) -> tuple[Any, ...]:
    given = dict(zip(entity_key.join_keys, entity_key.entity_values, strict=True))
    return tuple(getattr(given[name], kind.value) for name, kind in keys.items())


def _arrow(table: FeatureView, data: list[FeatureRow]) -> pa.Table:
    keys, features = _types(table.entity_columns), _types(table.features)
    columns: dict[str, pa.Array] = {
        name: pa.array([_key_values(row[0], {name: kind})[0] for row in data], kind.arrow)
        for name, kind in keys.items()
    }
    for index, name in enumerate(TIMES, start=2):
        columns[name] = pa.array([_utc(row[index]) for row in data], pa.timestamp("us", tz="UTC"))
    for name, kind in features.items():
        columns[name] = pa.array([_python(name, row[1].get(name), kind) for row in data], kind.arrow)
    return pa.table(columns)


def _utc(moment: Any) -> datetime | None:
    if moment is None or moment.tzinfo is not None:
        return moment  # type: ignore[no-any-return]
    return moment.replace(tzinfo=UTC)  # type: ignore[no-any-return]


def _python(name: str, value: Value | None, kind: _Type) -> Any:
    given = value.WhichOneof("val") if value is not None else None
    if given not in (None, "null_val", kind.value):
        raise TypeError(f"{name} is {given}, not {kind.value}")
    return getattr(value, kind.value) if given == kind.value else None


def _answer(row: tuple[Any, ...] | None, features: dict[str, _Type]) -> tuple[datetime | None, dict[str, Value] | None]:
    if row is None:
        return None, None
    event_timestamp, *values = row
    answer = {
        name: Value() if value is None else Value(**{kind.value: value})
        for (name, kind), value in zip(features.items(), values, strict=True)
    }
    return event_timestamp, answer
