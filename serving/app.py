"""Puts the service together; decides nothing."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from litestar import Litestar
from litestar.di import Provide

from serving.artifacts import Artifacts
from serving.features import FeatureStore, PostgresFeatureStore
from serving.openapi import ClosedSchemas, ContractSchemas, openapi_config
from serving.postgres import Postgres
from serving.predictor import Predictor
from serving.problems import add_request_id, respond
from serving.production import ProductionModel
from serving.routes import MAX_BODY, ROUTES, JsonRequest
from streamflow.contract import CONTRACT, Contract
from streamflow.errors import ConfigurationError
from streamflow.settings import Settings


def utc_now() -> datetime:
    """The time now."""
    return datetime.now(UTC)


def create_app(
    settings: Settings, *, contract: Contract = CONTRACT, clock: Callable[[], datetime] = utc_now
) -> Litestar:
    """The service for these settings; it connects when it starts up.

    Raises ConfigurationError without a ``database_url``.
    """
    if not settings.database_url:
        raise ConfigurationError("the service needs a database; set STREAMFLOW_DATABASE_URL")
    postgres = Postgres(settings.database_url)
    store = _feature_store(settings, postgres)
    artifacts = Artifacts(settings.mlflow_uri, settings.home / "cache" / "models")
    production = ProductionModel(postgres, store, artifacts, clock)
    predictor = Predictor(production, store, clock)

    @asynccontextmanager
    async def running(_: Litestar) -> AsyncIterator[None]:
        async with postgres, artifacts, production:
            yield

    def shared(value: Any) -> Provide:
        return Provide(lambda: value, sync_to_thread=False)

    return Litestar(
        route_handlers=ROUTES,
        lifespan=[running],
        dependencies={"predictor": shared(predictor), "production": shared(production)},
        exception_handlers={Exception: respond},
        before_send=[add_request_id],
        request_class=JsonRequest,
        request_max_body_size=MAX_BODY,
        plugins=[ContractSchemas(contract), ClosedSchemas()],
        openapi_config=openapi_config(),
        logging_config=None,
    )


def _feature_store(settings: Settings, postgres: Postgres) -> FeatureStore:
    if not settings.online_redis_url:
        return PostgresFeatureStore(postgres)
    from serving.feast_features import FeastFeatureStore

    return FeastFeatureStore(str(settings.database_url), settings.online_redis_url)
