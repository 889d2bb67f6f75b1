"""The routes: each unpacks a request, calls one thing and packs the answer."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

import msgspec
from litestar import MediaType, Request, Response, get, post
from litestar.di import NamedDependency
from litestar.exceptions import ClientException, InternalServerException, SerializationException
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.params import FromQuery, JSONBody, Parameter, SkipValidation
from litestar.response.base import ASGIResponse
from litestar.types import Scope
from msgspec import UNSET

from serving import ops_html, ops_page
from serving.auth import Unauthorized
from serving.features import IncompleteFeatures, UnknownUser
from serving.metrics import CONTENT_TYPE, Metrics
from serving.ops_page import Look, Served
from serving.postgres import Postgres
from serving.prediction_log import PredictionLog, PredictionLogFull, logged
from serving.predictor import Predictor, Scored, StaleFeatures, UnscorableUser
from serving.problems import (
    KINDS,
    NotReady,
    Overloaded,
    documented,
    new_request_id,
    problem,
    readiness_checks,
    request_id_of,
)
from serving.production import NoModel, ProductionModel, State
from serving.schemas import (
    EXAMPLE_USER_ID,
    WHOLE_USER_ID,
    Alive,
    BatchAnswer,
    BatchRequest,
    Explanation,
    FeaturesOfUser,
    Model,
    Outcome,
    Prediction,
    PredictRequest,
    Readiness,
    RefusedVersion,
)
from streamflow import explanation
from streamflow.contract import Contract
from streamflow.errors import StreamFlowError, WarehouseUnavailable
from streamflow.settings import Settings

MAX_BODY = 64 * 1024
MAX_BATCH_BODY = 128 * 1024
BODY_S = 30.0
"""How long a body may take to arrive; until then it counts as a request in flight."""

REFUSED = (Unauthorized, Overloaded)
UNAVAILABLE = (*REFUSED, NoModel, WarehouseUnavailable)
OPEN: list[dict[str, list[str]]] = [{}]
"""What a route asks for that anybody may use, in OpenAPI."""
BODY = (400, 413, 415)
METRICS = 'streamflow_requests_total{route="/predict",status="200"} 1.0\n'
USER = (UnknownUser, IncompleteFeatures)

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True)
class Service:
    """What the routes call; one dependency, because Litestar starts tasks to provide several."""

    predictor: Predictor
    predictions: PredictionLog
    production: ProductionModel
    metrics: Metrics
    ops: "Ops"


@dataclass(frozen=True)
class Ops:
    """What the ops page is made from."""

    postgres: Postgres
    contract: Contract
    settings: Settings
    clock: Callable[[], datetime]


TheService = NamedDependency[SkipValidation[Service]]


def body_deadline() -> asyncio.Timeout:
    """Within it a body must have arrived, else TimeoutError."""
    return asyncio.timeout(BODY_S)


def body_too_late() -> ClientException:
    """The refusal of a request whose body did not."""
    return ClientException(f"the body did not arrive within {BODY_S:g} seconds")


class JsonRequest(Request[Any, Any, Any]):
    """A request whose body is JSON in UTF-8, not compressed, or refused."""

    async def body(self) -> bytes:
        """The bytes of the body; raises a ClientException with status 400 if there are none."""
        try:
            async with body_deadline():
                body = await super().body()
        except TimeoutError:
            raise body_too_late() from None
        except InternalServerException:
            raise ClientException("the caller went away before the end of the body") from None
        if body:
            return body
        raise ClientException("the body is empty")

    async def json(self) -> Any:
        """The decoded body; raises a ClientException with status 415 or 400."""
        media_type, parameters = self.content_type
        if media_type.lower() != "application/json" or parameters.get("charset", "utf-8").lower() != "utf-8":
            raise ClientException("send the body as application/json in UTF-8", status_code=415)
        if self.headers.get("content-encoding", "identity").lower() != "identity":
            raise ClientException("send the body without a Content-Encoding", status_code=415)
        try:
            return await super().json()
        except RecursionError:
            raise SerializationException("the body is nested too deeply") from None
        except UnicodeDecodeError:
            raise SerializationException("the body is not UTF-8") from None


@post(
    "/predict",
    status_code=200,
    request_max_body_size=MAX_BODY,
    responses={
        200: ResponseSpec(
            Prediction, generate_examples=False, description="The prediction and everything it came from."
        ),
        **documented(*BODY, *USER, UnscorableUser, StaleFeatures, *UNAVAILABLE, PredictionLogFull),
    },
)
async def predict(data: JSONBody[PredictRequest], request: JsonRequest, service: TheService) -> ASGIResponse:
    """Score one customer with the Production model and the features of the feature store."""
    return ASGIResponse(body=await predicted(data, request.scope, service), media_type=MediaType.JSON)


async def predicted(asked: PredictRequest, scope: Scope, service: Service) -> bytes:
    """Score one customer, log that and return the answer as JSON."""
    scored = await service.predictor.predict(asked.user_id)
    request_id = request_id_of(scope)
    answer = _prediction(scored, request_id)
    if asked.explain is not UNSET:
        answer.explanation = _explanation(await service.predictor.explain(scored))
    service.predictions.record(logged(scored, request_id, scope["state"]["caller_request_id"]))
    return _encode(answer)


@post(
    "/predict/batch",
    status_code=200,
    request_max_body_size=MAX_BATCH_BODY,
    response_description="A prediction or a problem for each, in the order asked for.",
    responses=documented(*BODY, *UNAVAILABLE, PredictionLogFull),
)
async def predict_batch(data: JSONBody[BatchRequest], request: JsonRequest, service: TheService) -> BatchAnswer:
    """Score up to 1,000 customers: a prediction or a problem for each, in order, each with its own request_id."""
    outcomes = [(new_request_id(), outcome) for outcome in await service.predictor.predict_all(data.user_ids)]
    callers = request.scope["state"]["caller_request_id"]
    service.predictions.record(
        *(logged(outcome, own, callers) for own, outcome in outcomes if isinstance(outcome, Scored))
    )
    return BatchAnswer([_outcome(outcome, own) for own, outcome in outcomes])


@get(
    "/features/{user_id:str}",
    response_description="The features and the day they speak of.",
    responses=documented(400, *USER, *UNAVAILABLE),
)
async def features_of_user(
    user_id: Annotated[
        str, Parameter(pattern=WHOLE_USER_ID, description="The customer.", examples=[Example(value=EXAMPLE_USER_ID)])
    ],
    service: TheService,
) -> FeaturesOfUser:
    """The features that a prediction for this customer would use."""
    as_of, features = await service.predictor.features(user_id)
    return FeaturesOfUser(user_id, as_of, features)


@get("/model", response_description="The version.", responses=documented(*REFUSED, NoModel))
async def model(service: TheService) -> Model:
    """The version that is served and since when; a Production version that is refused, and why."""
    served = service.production.current()
    version, refusal = served.production, service.production.refusal
    return Model(
        version=version.version,
        run_id=version.run_id,
        service=version.service,
        as_of=version.as_of,
        threshold=version.threshold,
        promoted_at=version.promoted_at,
        loaded_at=served.loaded_at,
        artifact_sha256=version.artifact_sha256,
        refused=RefusedVersion(refusal.production.version, refusal.reason) if refusal else None,
    )


@get("/health", response_description="It does.", security=OPEN)
async def health() -> Alive:
    """Whether the process answers."""
    return Alive("alive")


@get(
    "/ready",
    response_description="Predictions can be answered; degraded: not everything is well.",
    responses=documented(NotReady),
    security=OPEN,
)
async def ready(service: TheService) -> Readiness:
    """Whether predictions can be answered: 200 ready or degraded, else 503; each check with its reason."""
    checks = service.production.checks()
    states = {check.state for check in checks}
    if State.UNAVAILABLE in states:
        raise NotReady(checks)
    status = State.DEGRADED if State.DEGRADED in states else State.READY
    return Readiness(status, readiness_checks(checks))


@get(
    "/metrics",
    media_type=CONTENT_TYPE,
    responses={
        200: ResponseSpec(
            str,
            generate_examples=False,
            description="The metrics.",
            media_type=CONTENT_TYPE,
            examples=[Example(value=METRICS)],
        ),
        **documented(Unauthorized),
    },
)
async def metrics_page(service: TheService) -> str:
    """How the service does, for Prometheus."""
    return service.metrics.page().decode()


@get("/", media_type=MediaType.HTML, include_in_schema=False)
async def ops(request: JsonRequest, service: TheService, request_id: FromQuery[str | None] = None) -> Response[str]:
    """The ops page, with the trace of ``request_id`` if given; for people, so it is no part of the API's description.

    503, and a page that says so, while the database cannot be read.
    """
    made_of, served = service.ops, _served(service.production)
    now, settings = made_of.clock(), made_of.settings
    try:
        page = await ops_page.read(made_of.postgres, made_of.contract, settings, served, request_id, now)
    except WarehouseUnavailable as failure:
        request.scope["state"]["failure"] = failure
        html = ops_html.unavailable(str(failure), now)
        again = {"Retry-After": str(KINDS[WarehouseUnavailable].retry_after_s)}
        return Response(html, media_type=MediaType.HTML, status_code=503, headers={**ops_html.headers(), **again})
    html = await asyncio.to_thread(ops_html.render, page, settings.mlflow_page)
    return Response(html, media_type=MediaType.HTML, headers=ops_html.headers())


def _served(production: ProductionModel) -> Served:
    """What this process answers with, and what is wrong with that if anything is."""
    try:
        version = production.current().production.version
    except NoModel as failure:
        return Served(None, Look("this service answers no prediction", str(failure)))
    if production.refusal:
        refused = production.refusal.production.version
        return Served(version, Look(f"this service serves version {version}, not {refused}", production.refusal.reason))
    return Served(version, None)


def _prediction(scored: Scored, request_id: str) -> Prediction:
    production = scored.model.production
    return Prediction(
        request_id=request_id,
        user_id=scored.user_id,
        prediction=1 if scored.churns else 0,
        probability=scored.probability,
        threshold=production.threshold,
        model_version=production.version,
        run_id=production.run_id,
        features_as_of=scored.features_as_of,
        timestamp=scored.scored_at,
        features_used=scored.features,
        features_stale=scored.stale,
        features_outside_training=list(scored.outside),
    )


def _explanation(explained: explanation.Explanation) -> Explanation:
    return Explanation(
        method=f"{explanation.METHOD}; {explained.orders} orders",
        value_function=explanation.VALUE_FUNCTION,
        background=f"{explained.background} customers of the training dataset, stored with the version",
        scale=explanation.SCALE,
        base=explained.base,
        contributions=explained.contributions,
    )


def _outcome(outcome: Scored | StreamFlowError, request_id: str) -> Outcome:
    if isinstance(outcome, StreamFlowError):
        return problem(outcome, request_id)
    return _prediction(outcome, request_id)


ROUTES = (predict, predict_batch, features_of_user, model, health, ready, metrics_page, ops)
