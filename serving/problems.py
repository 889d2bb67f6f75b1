"""Errors on the wire: the one table from exception to problem details (RFC 9457), for every error there is."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from http import HTTPStatus
from typing import Any
from uuid import uuid4

import msgspec
from litestar import Request, Response
from litestar.exceptions import ClientException, HTTPException
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.types import Scope, Send
from msgspec import UNSET

from serving.auth import CHALLENGE, Unauthorized
from serving.features import IncompleteFeatures, MissingFeatures, UnknownUser
from serving.prediction_log import PredictionLogFull
from serving.predictor import StaleFeatures, UnscorableUser
from serving.production import NOTHING_PROMOTED, Check, NoModel, State
from serving.schemas import EXAMPLE_REQUEST_ID, EXAMPLE_USER_ID, Problem, ReadinessCheck
from streamflow.contract import CONTRACT
from streamflow.errors import StreamFlowError, WarehouseUnavailable
from streamflow.scoring import ScorerFeature, UnscorableFeatures

MEDIA_TYPE = "application/problem+json"


class NotReady(StreamFlowError):
    """Predictions cannot be answered now."""

    def __init__(self, checks: Sequence[Check]) -> None:
        super().__init__(
            "; ".join(f"{check.name}: {check.reason}" for check in checks if check.state is not State.READY)
        )
        self.checks = checks


class Overloaded(StreamFlowError):
    """More requests are in flight than the service takes."""

    def __init__(self) -> None:
        super().__init__("the service is answering as many requests as it can; ask again")


@dataclass(frozen=True)
class Kind:
    """One type of problem: its status, the end of its ``type``, its title, when to ask again, how to prove who asks."""

    status: HTTPStatus
    name: str
    title: str
    retry_after_s: int | None = None
    challenge: str | None = None

    @property
    def type(self) -> str:
        """The stable URI of this type of problem."""
        return f"urn:streamflow:problem:{self.name}"


KINDS: dict[type[Exception] | int, Kind] = {
    UnknownUser: Kind(HTTPStatus.NOT_FOUND, "unknown-user", "Unknown user"),
    IncompleteFeatures: Kind(HTTPStatus.UNPROCESSABLE_ENTITY, "incomplete-features", "Incomplete features"),
    UnscorableUser: Kind(HTTPStatus.UNPROCESSABLE_ENTITY, "unscorable-features", "Features that cannot be scored"),
    StaleFeatures: Kind(HTTPStatus.SERVICE_UNAVAILABLE, "stale-features", "Features are too old", 3600),
    NoModel: Kind(HTTPStatus.SERVICE_UNAVAILABLE, "no-model", "No model is served", 5),
    WarehouseUnavailable: Kind(
        HTTPStatus.SERVICE_UNAVAILABLE, "feature-store-unavailable", "The feature store is unavailable", 2
    ),
    PredictionLogFull: Kind(HTTPStatus.SERVICE_UNAVAILABLE, "prediction-log-full", "The prediction log is full", 2),
    NotReady: Kind(HTTPStatus.SERVICE_UNAVAILABLE, "not-ready", "Not ready", 2),
    Overloaded: Kind(HTTPStatus.SERVICE_UNAVAILABLE, "overloaded", "Overloaded", 1),
    Unauthorized: Kind(
        HTTPStatus.UNAUTHORIZED, "unauthorized", "Missing or wrong API key, where keys are on", challenge=CHALLENGE
    ),
    400: Kind(HTTPStatus.BAD_REQUEST, "malformed-request", "Malformed request"),
    404: Kind(HTTPStatus.NOT_FOUND, "not-found", "Nothing is here"),
    405: Kind(HTTPStatus.METHOD_NOT_ALLOWED, "method-not-allowed", "Method not allowed"),
    413: Kind(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too-large", "Request body too large"),
    415: Kind(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "unsupported-media-type", "Unsupported media type"),
    500: Kind(HTTPStatus.INTERNAL_SERVER_ERROR, "internal-error", "Internal error"),
}


def kind_of(failure: Exception) -> Kind:
    """The kind of problem that an exception is; whatever is not in the table is a defect of ours: 500."""
    if isinstance(failure, HTTPException):
        return KINDS.get(failure.status_code, KINDS[500])
    return next((KINDS[kind] for kind in type(failure).__mro__ if kind in KINDS), KINDS[500])


def problem(failure: Exception, request_id: str) -> Problem:
    """The problem details of an exception."""
    kind = kind_of(failure)
    return Problem(
        type=kind.type,
        title=kind.title,
        status=kind.status,
        detail=_detail(failure, kind),
        instance=f"urn:uuid:{request_id}",
        request_id=request_id,
        missing_features=list(failure.missing) if isinstance(failure, MissingFeatures) else UNSET,
        checks=readiness_checks(failure.checks) if isinstance(failure, NotReady) else UNSET,
    )


def _detail(failure: Exception, kind: Kind) -> str:
    if kind is KINDS[500]:
        return "The service failed; the log has more under this request_id."
    if not isinstance(failure, HTTPException):
        return str(failure)
    errors = failure.extra if isinstance(failure.extra, list) else []
    return (
        "; ".join(f"{error['key'].replace('data', 'body')}: {error['message']}" for error in errors) or failure.detail
    )


def readiness_checks(checks: Sequence[Check]) -> list[ReadinessCheck]:
    """The checks as they go over the wire."""
    return [ReadinessCheck(check.name, check.state, check.reason) for check in checks]


def respond(request: Request[Any, Any, Any], failure: Exception) -> Response[Problem]:
    """Answer any exception with problem details; the request log finds it in the request's state."""
    request.scope["state"]["failure"] = failure
    kind = kind_of(failure)
    body = problem(failure, request_id_of(request.scope))
    return Response(body, status_code=kind.status, media_type=MEDIA_TYPE, headers=_headers(failure, kind))


async def refuse(scope: Scope, send: Send, failure: Exception) -> None:
    """Answer a request that does not reach the framework with problem details."""
    scope["state"]["failure"] = failure
    kind = kind_of(failure)
    body = msgspec.json.encode(problem(failure, request_id_of(scope)))
    headers = {"Content-Type": MEDIA_TYPE, "Content-Length": str(len(body)), **_headers(failure, kind)}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": kind.status, "headers": raw})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _headers(failure: Exception, kind: Kind) -> dict[str, str]:
    headers = dict(failure.headers or {}) if isinstance(failure, HTTPException) else {}
    if kind.retry_after_s:
        headers["Retry-After"] = str(kind.retry_after_s)
    if kind.challenge:
        headers["WWW-Authenticate"] = kind.challenge
    return headers


def request_id_of(scope: Scope) -> str:
    """The request's id, which `front.Front` gave it."""
    return str(scope["state"]["request_id"])


def new_request_id() -> str:
    """A unique id."""
    return str(uuid4())


def documented(*causes: type[Exception] | int) -> dict[int, ResponseSpec]:
    """The OpenAPI entries for the problems that a route can answer with, each with an example."""
    by_status: dict[int, list[type[Exception] | int]] = {}
    for cause in causes:
        by_status.setdefault(KINDS[cause].status.value, []).append(cause)
    return {
        status: ResponseSpec(
            Problem,
            description="; ".join(KINDS[cause].title for cause in causes),
            media_type=MEDIA_TYPE,
            generate_examples=False,
            examples=[_example(cause) for cause in causes],
        )
        for status, causes in by_status.items()
    }


def _example(cause: type[Exception] | int) -> Example:
    kind = KINDS[cause]
    body = problem(EXAMPLES[cause], EXAMPLE_REQUEST_ID)
    return Example(id=kind.name, summary=kind.title, value=msgspec.to_builtins(body))


_FEATURE = ScorerFeature(CONTRACT.services[0].names[0], CONTRACT.views[0].name, "integer", (), ())
EXAMPLES: dict[type[Exception] | int, Exception] = {
    UnknownUser: UnknownUser(f"the feature store does not know user {EXAMPLE_USER_ID}", CONTRACT.services[0].names),
    IncompleteFeatures: IncompleteFeatures(
        f"the feature store lacks features of user {EXAMPLE_USER_ID}: {_FEATURE.name}", [_FEATURE.name]
    ),
    UnscorableUser: UnscorableUser(EXAMPLE_USER_ID, UnscorableFeatures(0, _FEATURE, 1e300)),
    StaleFeatures: StaleFeatures(EXAMPLE_USER_ID, date(2024, 1, 31), 45),
    NoModel: NoModel(NOTHING_PROMOTED),
    WarehouseUnavailable: WarehouseUnavailable("PostgreSQL does not answer; the log says why"),
    PredictionLogFull: PredictionLogFull(
        "predictions cannot be logged now, and none is answered unlogged; the log says why"
    ),
    NotReady: NotReady([Check("feature_store", State.UNAVAILABLE, "PostgreSQL does not answer; the log says why")]),
    Overloaded: Overloaded(),
    Unauthorized: Unauthorized(),
    400: ClientException("user_id: Expected `str`, got `int`"),
    413: ClientException("Request Entity Too Large", status_code=413),
    415: ClientException("send the body as application/json in UTF-8", status_code=415),
}
"""One of each that a route documents."""
