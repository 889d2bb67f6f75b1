"""The online features in Redis, read through Feast: only imported, and Feast with it, in that profile."""

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date
from typing import Any

from serving.features import (
    FeatureQuery,
    FeatureStore,
    FeatureValue,
    MissingFeatures,
    OnlineFeatures,
    UnknownUser,
    online_features,
)
from serving.postgres import QueryRefused
from streamflow.contract import USER_ID
from streamflow.database import Database
from streamflow.errors import OnlineStoreUnavailable, WarehouseUnavailable

THREADS = 4
READ_S = 2.0
"""How long a request waits for Feast, which gives up on a silent Redis before that."""
USER_S = 0.003
"""How much longer for each customer: Feast computes for 0.3 ms, and may not have a core to itself."""


class FeastFeatureStore(FeatureStore):
    """`get_online_features` in a thread, once for all customers of a request."""

    answers = "Redis answers"

    def __init__(self, database_url: str, redis_url: str) -> None:
        self._database = Database(database_url, database_url)
        self._redis_url = redis_url
        self._threads = ThreadPoolExecutor(THREADS, "feast")
        self._opening = threading.Lock()
        self._store: Any = None
        self._known: set[tuple[str, ...]] = set()

    async def read(self, query: FeatureQuery, user_ids: Sequence[str]) -> list[OnlineFeatures | MissingFeatures]:
        """As `FeatureStore.read`; PostgreSQL is asked only for a query that is new, for what Feast registered."""
        loop = asyncio.get_running_loop()
        if query.references not in self._known:
            await loop.run_in_executor(self._threads, self._learn, query)
        try:
            async with asyncio.timeout(READ_S + USER_S * len(user_ids)):
                return await loop.run_in_executor(self._threads, self._read, query, list(user_ids))
        except TimeoutError as failure:
            raise OnlineStoreUnavailable("Redis does not answer in time") from failure

    def _learn(self, query: FeatureQuery) -> None:
        """See that Feast's registry has what the query names, as of now."""
        from feast.errors import FeatureViewNotFoundException
        from sqlalchemy.exc import SQLAlchemyError

        with self._opening:
            try:
                self._store = self._store or self._opened()
                self._store.refresh_registry()
                for view, names in _by_view(query).items():
                    fields = {field.name for field in self._store.get_feature_view(view).features}
                    if absent := sorted(names - fields):
                        raise QueryRefused(
                            f"Feast does not know {', '.join(absent)} of {view}; run `streamflow migrate`"
                        )
            except SQLAlchemyError as failure:
                raise WarehouseUnavailable("Feast's registry cannot be read; the log says why") from failure
            except FeatureViewNotFoundException as failure:
                raise QueryRefused(f"{failure}; run `streamflow migrate`") from failure
        self._known.add(query.references)

    def _opened(self) -> Any:
        from streamflow.features import feature_store

        return feature_store(self._database, self._redis_url, registry_ttl_s=0)

    def _read(self, query: FeatureQuery, user_ids: list[str]) -> list[OnlineFeatures | MissingFeatures]:
        from streamflow.online_redis import answering

        with answering():
            if not user_ids:
                self._require_views(query)
                return []
            answer = self._store.get_online_features(list(query.references), {USER_ID: user_ids}).proto
            found = [
                online_features(query.names, user, as_of, values)
                for user, (as_of, values) in zip(user_ids, _rows(answer, query), strict=True)
            ]
            if any(isinstance(one, UnknownUser) for one in found):
                self._require_views(query)
            return found

    def _require_views(self, query: FeatureQuery) -> None:
        """Raise QueryRefused for a view that Redis lost, so that nobody is called unknown who is not."""
        from streamflow.online_redis import lacking

        if views := lacking(self._store, list(_by_view(query))):
            raise QueryRefused(
                f"Redis does not hold {', '.join(views)}; publish a month again by `streamflow run MONTH`"
            )


def _by_view(query: FeatureQuery) -> dict[str, set[str]]:
    views: dict[str, set[str]] = {}
    for reference in query.references:
        view, _, name = reference.partition(":")
        views.setdefault(view, set()).add(name)
    return views


def _rows(answer: Any, query: FeatureQuery) -> list[tuple[date | None, list[FeatureValue]]]:
    """Per customer the oldest day of the views that know them, and the values in the order of the query."""
    columns = dict(zip(answer.metadata.feature_names.val, answer.results, strict=True))
    vectors = [columns[name] for name in query.names]
    days = zip(*([_day(moment) for moment in vector.event_timestamps] for vector in vectors), strict=True)
    values = zip(*([_plain(value) for value in vector.values] for vector in vectors), strict=True)
    return [
        (min((day for day in known if day is not None), default=None), list(row))
        for known, row in zip(days, values, strict=True)
    ]


def _day(moment: Any) -> date | None:
    """The day of an event time; Feast's answer has none, which is its zero, where a view does not know a customer."""
    return moment.ToDatetime(UTC).date() if moment.seconds else None


def _plain(value: Any) -> Any:
    kind = value.WhichOneof("val")
    return None if kind in (None, "null_val") else getattr(value, kind)
