"""Puts the service together; decides nothing."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime

from litestar import Litestar
from litestar.di import Provide

from serving.artifacts import Artifacts
from serving.auth import api_keys
from serving.closed_loop import ClosedLoop
from serving.features import FeatureStore, PostgresFeatureStore
from serving.front import Front
from serving.metrics import Metrics, workers_folder
from serving.openapi import ClosedSchemas, ContractSchemas, openapi_config
from serving.postgres import Postgres
from serving.prediction_log import PredictionLog
from serving.predictor import Freshness, Predictor
from serving.problems import respond
from serving.production import ProductionModel
from serving.request_log import RequestLog
from serving.routes import MAX_BODY, ROUTES, JsonRequest, Ops, Service
from serving.shortcut import Shortcut
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

    Raises ConfigurationError without a ``database_url``, for API keys that cannot be used, and for a host beyond
    loopback without API keys.
    """
    if not settings.database_url:
        raise ConfigurationError("the service needs a database; set STREAMFLOW_DATABASE_URL")
    keys = api_keys(settings)
    metrics = Metrics(contract, clock, workers_folder(settings))
    request_log = RequestLog(answered=settings.access_log)
    postgres = Postgres(settings.database_url)
    store = _feature_store(settings, postgres)
    artifacts = Artifacts(settings.mlflow_uri, settings.home / "cache" / "models")
    production = ProductionModel(postgres, store, artifacts, clock, metrics)
    freshness = Freshness(settings.max_feature_age_days, refuse=settings.stale_features == "refuse")
    predictor = Predictor(production, store, freshness, clock, metrics)
    predictions = PredictionLog(settings.database_url, settings.home / "cache" / "predictions")

    closed_loop = ClosedLoop(postgres, contract, settings, clock)
    service = Service(predictor, predictions, production, metrics, Ops(postgres, contract, settings, clock))

    @asynccontextmanager
    async def running(_: Litestar) -> AsyncIterator[None]:
        async with metrics, postgres, artifacts, production, predictions, closed_loop:
            yield
        request_log.close()

    app = Litestar(
        route_handlers=ROUTES,
        lifespan=[running],
        dependencies={"service": Provide(lambda: service, sync_to_thread=False)},
        exception_handlers={Exception: respond},
        request_class=JsonRequest,
        request_max_body_size=MAX_BODY,
        plugins=[ContractSchemas(contract), ClosedSchemas()],
        openapi_config=openapi_config(with_keys=keys is not None),
        logging_config=None,
    )
    front = Front(Shortcut(app.asgi_handler, service), keys, metrics, request_log, settings.max_in_flight)
    metrics.follow(metrics.in_flight, lambda: front.in_flight)
    metrics.follow(metrics.queue_depth, lambda: predictor.waiting)
    metrics.follow_model(production)
    metrics.follow_log(predictions)
    metrics.add(closed_loop)
    app.asgi_handler = front
    return app


def _feature_store(settings: Settings, postgres: Postgres) -> FeatureStore:
    if not settings.online_redis_url:
        return PostgresFeatureStore(postgres)
    from serving.feast_features import FeastFeatureStore

    return FeastFeatureStore(str(settings.database_url), settings.online_redis_url)
