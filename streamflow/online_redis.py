"""Feast's Redis online store, and what months that are corrected and come in any order need beyond its own rules.

Feast's check of event times passes over a row that is not newer than the one held, so that a corrected month would
never arrive, and it removes nobody. What each customer should have is therefore asked of the warehouse (features.py);
what Redis holds, and the writing, is here. The store itself is Feast's own, read by `get_online_features`.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from streamflow.contract import USER_ID
from streamflow.errors import OnlineStoreUnavailable

if TYPE_CHECKING:
    import feast

TIMEOUT_S = 1.5
"""How long Redis may take to accept a connection, or to say anything."""
KEYS_AT_ONCE = 5_000
PUBLISHED = "streamflow:published:"
"""Followed by Feast's project: the hash whose fields are the views that Redis holds; Feast's own keys end in it."""


def connection_string(url: str) -> str:
    """A ``redis[s]://`` address as Feast writes it; values are JSON, in which no comma of a password is left bare."""
    parts = urlsplit(url)
    options = {
        "db": int(parts.path.strip("/") or 0),
        "username": unquote(parts.username or "") or None,
        "password": unquote(parts.password or "") or None,
        "ssl": parts.scheme == "rediss",
        "socket_timeout": TIMEOUT_S,
        "socket_connect_timeout": TIMEOUT_S,
    }
    given = [f"{name}={_json(value)}" for name, value in options.items() if value is not None]
    # No repeated attempts with growing pauses: whoever asks decides when to ask again.
    return ",".join([f"{parts.hostname}:{parts.port or 6379}", *given, "retry=null"])


def _json(value: object) -> str:
    return json.dumps(value).replace(",", "\\u002c")


@contextmanager
def answering() -> Iterator[None]:
    """Raise OnlineStoreUnavailable for whatever keeps Redis from answering; what it was is the cause."""
    from redis.exceptions import RedisError

    try:
        yield
    except RedisError as failure:
        raise OnlineStoreUnavailable("Redis does not answer; the log says why") from failure


def require(url: str) -> str:
    """Which Redis answers at the address, for people; raises OnlineStoreUnavailable if none does, or one that forgets.

    A Redis that may evict keys would make customers unknown that are not.
    """
    import redis

    parts = urlsplit(url)
    address = f"{parts.hostname}:{parts.port or 6379}"
    try:
        with redis.Redis.from_url(
            url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, retry=None
        ) as client:
            info: Any = client.info()
    except redis.RedisError as failure:
        advice = "start it or correct STREAMFLOW_REDIS_URL"
        raise OnlineStoreUnavailable(f"Redis does not answer at {address} ({failure}); {advice}") from failure
    if (policy := info.get("maxmemory_policy", "noeviction")) != "noeviction":
        raise OnlineStoreUnavailable(
            f"Redis at {address} may drop features (maxmemory-policy {policy}); set it to noeviction"
        )
    return f"Redis {info['redis_version']} at {address}"


def held(store: "feast.FeatureStore", view: str) -> dict[str, datetime]:
    """The event time of each customer that Redis holds for a view; looks at every customer of every view."""
    from feast.infra.key_encoding_utils import deserialize_entity_key, serialize_entity_key_prefix
    from google.protobuf.timestamp_pb2 import Timestamp

    client, project = _client(store), store.project.encode()
    keys = client.scan_iter(serialize_entity_key_prefix([USER_ID]) + b"*" + project, count=KEYS_AT_ONCE)
    found = {}
    while some := list(islice(keys, KEYS_AT_ONCE)):
        with client.pipeline(transaction=False) as pipeline:
            for key in some:
                pipeline.hget(key, f"_ts:{view}")
            stamps = pipeline.execute()
        for key, stamp in zip(some, stamps, strict=True):
            if stamp is not None:
                user = deserialize_entity_key(key[: -len(project)]).entity_values[0].string_val
                found[user] = Timestamp.FromString(stamp).ToDatetime(UTC)
    return found


def write(store: "feast.FeatureStore", view: str, rows: Iterable[tuple[Any, ...]]) -> None:
    """Put rows (user id, event time, features in the view's order) in place of whatever Redis holds for them."""
    from feast.protos.feast.types.Value_pb2 import Value

    from streamflow.online_store import value_fields

    table = store.get_feature_view(view)
    fields = value_fields(table)
    config = store.config.model_copy()
    # Which rows are to be written is decided; Feast's own check would leave out those of a corrected month.
    config._online_store = config.online_store.model_copy(update={"skip_dedup": True})
    remaining = iter(rows)
    while some := list(islice(remaining, KEYS_AT_ONCE)):
        data = [
            (
                _entity_key(user),
                {
                    name: Value() if value is None else Value(**{field: value})
                    for (name, field), value in zip(fields.items(), values, strict=True)
                },
                moment,
                None,
            )
            for user, moment, *values in some
        ]
        store._get_provider().online_write_batch(config, table, data, None)


def remove(store: "feast.FeatureStore", view: str, users: Sequence[str]) -> None:
    """Take customers out of a view."""
    from feast.infra.online_stores.helpers import _mmh3, _redis_key

    fields = [_mmh3(f"{view}:{field.name}") for field in store.get_feature_view(view).features]
    with _client(store).pipeline(transaction=False) as pipeline:
        for user in users:
            pipeline.hdel(_redis_key(store.project, _entity_key(user)), f"_ts:{view}", *fields)
        pipeline.execute()


def mark(store: "feast.FeatureStore", view: str) -> None:
    """State that Redis holds what is published of a view, so that a customer it lacks is unknown indeed."""
    _client(store).hset(PUBLISHED + store.project, view, 1)


def lacking(store: "feast.FeatureStore", views: Sequence[str]) -> list[str]:
    """The views of which Redis holds nothing, or not any more: never published, or lost with Redis's memory."""
    marks = _client(store).hmget(PUBLISHED + store.project, views)
    return [view for view, marked in zip(views, marks, strict=True) if marked is None]


def _client(store: "feast.FeatureStore") -> Any:
    online_store: Any = store._get_provider().online_store
    return online_store._get_client(store.config.online_store)


def _entity_key(user: str) -> Any:
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    return EntityKey(join_keys=[USER_ID], entity_values=[Value(string_val=user)])
