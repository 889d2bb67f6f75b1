"""What the service reads is what Feast answers; and Redis away, silent, empty, while PostgreSQL is there or not."""

import asyncio
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from scratch_redis import RedisServer, redis_of_its_own
from serving_world import (
    BASELINE,
    FEATURES,
    KNOWN,
    Mlflow,
    Platform,
    accept_connections,
    copied,
    eventually,
    predict,
    problem,
    train,
)
from test_features import exactly, land, land_files

from serving.feast_features import FeastFeatureStore
from serving.features import FeatureQuery, FeatureStore, PostgresFeatureStore, UnknownUser
from serving.postgres import Postgres
from serving.schemas import MAX_BATCH
from streamflow import features
from streamflow.contract import CONTRACT, FeatureService
from streamflow.database import Database
from streamflow.errors import OnlineStoreUnavailable
from streamflow.months import Month
from streamflow.scoring import ScorerFeature
from streamflow.settings import PROJECT_ROOT

JANUARY = Month.parse("2024-01")
NOW = datetime(2024, 2, 1, tzinfo=UTC)
UNAVAILABLE = "Redis does not answer; the log says why"


def query_of(service: FeatureService) -> FeatureQuery:
    return FeatureQuery.of(
        [
            ScorerFeature(column.name, view.name, column.kind, column.categories, ())
            for view in service.views
            for column in service.columns_of(view)
        ]
    )


# --- equality ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """A published month: the features of its customers are in PostgreSQL, or at ``redis_url``."""

    database: Database
    users: list[str]
    redis_url: str | None

    @cached_property
    def feast(self) -> Any:
        return features.feature_store(self.database, self.redis_url)

    async def read(self, query: FeatureQuery, users: list[str]) -> list[Any]:
        """As the service reads, which asks for no more at once than a batch holds."""
        async with Postgres(self.database.url) as postgres:
            store: FeatureStore = PostgresFeatureStore(postgres)
            if self.redis_url:
                store = FeastFeatureStore(self.database.url, self.redis_url)
            batches = [users[at : at + MAX_BATCH] for at in range(0, len(users), MAX_BATCH)]
            return [one for batch in batches for one in await store.read(query, batch)]


@pytest.fixture(scope="module")
def month(migrated: Database, server: Database) -> tuple[Database, list[str]]:
    """A database with the snapshots of the real 2024-01, or of a simulated month, and its customers."""
    database = copied(migrated, server)
    folder = PROJECT_ROOT.parent / "shared" / "data" / "month_000"
    if folder.is_dir():
        return database, list(land_files(database, folder, JANUARY)["users"].index)
    users = [f"user-{number}" for number in range(7_000)]
    land(database, JANUARY, users, seed=7)
    return database, users


@pytest.fixture(scope="module", params=["postgres", "redis"])
def published(month: tuple[Database, list[str]], request: pytest.FixtureRequest) -> Published:
    redis_url = request.getfixturevalue("redis_url") if request.param == "redis" else None
    published = Published(*month, redis_url)
    for view in CONTRACT.views:
        features.publish(published.database, published.feast, view, JANUARY, now=NOW)
    return published


@pytest.mark.parametrize("name", ["churn_v1", "churn_v2"])
def test_every_user_of_a_month_is_read_as_feast_answers(published: Published, name: str) -> None:
    """Every user from PostgreSQL, whose tables are read past Feast; a batch from Redis, which is read through it."""
    service, users = CONTRACT.service(name), published.users
    users = users[:MAX_BATCH] if published.redis_url else users
    feast = published.feast
    answer = feast.get_online_features(feast.get_feature_service(name), {"user_id": users}).to_dict()
    read = asyncio.run(published.read(query_of(service), users))
    assert len(read) == len(users) >= (MAX_BATCH if published.redis_url else 7_000)
    assert [(one.user_id, one.as_of) for one in read] == [(user, JANUARY.as_of) for user in users]
    for position, feature in enumerate(service.names):
        assert exactly([one.values[position] for one in read]) == exactly(answer[feature])


def test_many_users_are_one_question_to_feast(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    import feast

    asked = []
    answer = feast.FeatureStore.get_online_features

    def counted(*arguments: Any, **options: Any) -> Any:
        asked.append(arguments)
        return answer(*arguments, **options)

    monkeypatch.setattr(feast.FeatureStore, "get_online_features", counted)
    first, second, *_ = published.users
    read = asyncio.run(published.read(query_of(CONTRACT.service("churn_v1")), [second, first, second, "nobody"]))
    assert len(asked) == (1 if published.redis_url else 0)
    assert [getattr(one, "user_id", None) for one in read] == [second, first, second, None]
    assert isinstance(read[3], UnknownUser)


def test_a_batch_is_given_the_time_that_feast_takes_for_it(
    month: tuple[Database, list[str]], redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.feast_features.READ_S", 0.1)
    monkeypatch.setattr(FeastFeatureStore, "_read", lambda *_: time.sleep(0.4))
    store, query = FeastFeatureStore(month[0].url, redis_url), query_of(CONTRACT.service("churn_v1"))
    asyncio.run(store.read(query, ["one"] * MAX_BATCH))
    with pytest.raises(OnlineStoreUnavailable, match="in time"):
        asyncio.run(store.read(query, ["one"]))


# --- faults -----------------------------------------------------------------------------------------------------


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_of_its_own(tmp_path) as server:
        yield server


@pytest.fixture
def platform(migrated: Database, server: Database, mlflow: Mlflow, redis_server: RedisServer) -> Platform:
    platform = Platform(copied(migrated, server), mlflow, redis_server.url)
    platform.publish()
    return platform


def test_a_redis_that_goes_away_and_comes_back(
    api: httpx.Client, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    before = predict(api).json()
    assert before["features_used"] == FEATURES
    redis_server.stop()
    answer = predict(api)
    assert problem(answer, 503, "feature-store-unavailable")["detail"] == UNAVAILABLE
    assert answer.headers["retry-after"] == "2"
    problem(api.get(f"/features/{KNOWN}"), 503, "feature-store-unavailable")
    problem(api.post("/predict/batch", json={"user_ids": ["a"]}), 503, "feature-store-unavailable")
    eventually(lambda: api.get("/ready").status_code == 503)
    assert problem(api.get("/ready"), 503, "not-ready")["detail"] == f"feature_store: {UNAVAILABLE}"
    assert api.get("/health").status_code == 200
    (reason, *_) = [
        record.fields["reason"]  # type: ignore[attr-defined]
        for record in caplog.records
        if record.getMessage() == "request_unanswered"
    ]
    assert len(reason) > len(f"{UNAVAILABLE}: ")

    redis_server.start()
    eventually(lambda: predict(api).status_code == 200)
    eventually(lambda: api.get("/ready").status_code == 200)
    assert {**predict(api).json(), "request_id": ""} == {**before, "request_id": ""}
    (check,) = [one for one in api.get("/ready").json()["checks"] if one["name"] == "feature_store"]
    assert check["reason"] == "Redis answers"


def test_a_silent_redis_costs_a_request_no_more_than_its_timeout(api: httpx.Client, redis_server: RedisServer) -> None:
    redis_server.process.send_signal(signal.SIGSTOP)
    for answer in [predict(api) for _ in range(2)]:
        problem(answer, 503, "feature-store-unavailable")
        assert answer.elapsed.total_seconds() < 3.5
    eventually(lambda: api.get("/ready").status_code == 503)
    redis_server.process.send_signal(signal.SIGCONT)
    eventually(lambda: predict(api).status_code == 200)
    eventually(lambda: api.get("/ready").status_code == 200)


def test_a_redis_that_lost_everything_calls_nobody_unknown(
    api: httpx.Client, platform: Platform, redis_server: RedisServer
) -> None:
    problem(predict(api, "nobody"), 404, "unknown-user")
    redis.Redis.from_url(redis_server.url).flushall()
    for user in (KNOWN, "nobody"):
        details = problem(predict(api, user), 503, "feature-store-unavailable")
        assert "Redis does not hold subs_profile_fv" in details["detail"]
        assert "streamflow run" in details["detail"]
    eventually(lambda: api.get("/ready").status_code == 503)
    platform.publish()
    assert predict(api).status_code == 200
    problem(predict(api, "nobody"), 404, "unknown-user")


def test_predictions_go_on_while_postgresql_is_away(api: httpx.Client, platform: Platform, server: Database) -> None:
    accept_connections(platform.database, server, accept=False)
    assert predict(api).status_code == 200
    eventually(lambda: api.get("/ready").status_code == 503)
    assert predict(api).status_code == 200
    accept_connections(platform.database, server, accept=True)
    eventually(lambda: api.get("/ready").status_code == 200)


def test_a_model_whose_features_are_not_in_redis_is_refused_and_the_old_one_goes_on(
    api: httpx.Client, platform: Platform, artifacts: tuple[bytes, bytes], redis_server: RedisServer
) -> None:
    redis.Redis.from_url(redis_server.url).hdel("streamflow:published:streamflow", "customer_fv")

    platform.promote(2, train(3, replace(BASELINE, service=CONTRACT.service("churn_v2"))), service="churn_v2")
    eventually(lambda: api.get("/model").json()["refused"] is not None)
    assert "Redis does not hold customer_fv" in api.get("/model").json()["refused"]["reason"]
    assert predict(api).json()["model_version"] == 1
    platform.publish()
    eventually(lambda: predict(api).json()["model_version"] == 2)
    assert api.get(f"/features/{KNOWN}").json()["as_of"] == str(date(2024, 1, 31))
