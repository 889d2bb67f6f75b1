"""The layer before all answers: request ids, API keys, load shedding, counting, the request log.

Plain ASGI, once for all routes, because middleware of the framework costs more than all of this.
"""

import re
import time

from litestar.types import ASGIApp, Message, Receive, Scope, Send

from serving.auth import Unauthorized, owner_of_key
from serving.metrics import UNROUTED, Metrics
from serving.problems import Overloaded, new_request_id, refuse
from serving.request_log import RequestLog
from streamflow.api_keys import ApiKeys
from streamflow.errors import StreamFlowError

REQUEST_ID_HEADER = b"x-request-id"
CALLER_REQUEST_ID_HEADER = b"x-caller-request-id"
CALLER_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
WITHOUT_KEY = frozenset({"/health", "/ready"})
NEVER_SHED = WITHOUT_KEY | {"/metrics"}

Headers = dict[bytes, bytes]


class Front:
    """Lets a request through to ``app``, or refuses it; ``in_flight`` counts those that are let through."""

    def __init__(
        self, app: ASGIApp, keys: ApiKeys | None, metrics: Metrics, request_log: RequestLog, max_in_flight: int
    ) -> None:
        self._app = app
        self._keys = keys
        self._metrics = metrics
        self._log = request_log
        self._max_in_flight = max_in_flight
        self.in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        started = time.perf_counter()
        headers = dict(scope["headers"])
        added = _identified(scope, headers)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *added]
                self._record(scope, message["status"], time.perf_counter() - started)
            await send(message)

        if refusal := self._refusal(scope, headers):
            await refuse(scope, answer, refusal)
            return
        self.in_flight += 1
        try:
            await self._app(scope, receive, answer)
        finally:
            self.in_flight -= 1

    def _refusal(self, scope: Scope, headers: Headers) -> StreamFlowError | None:
        path = scope["path"]
        if self._keys and path not in WITHOUT_KEY:
            owner = owner_of_key(self._keys, headers)
            if owner is None:
                return Unauthorized()
            scope["state"]["key_owner"] = owner
            self._metrics.key_used(owner)
        if self.in_flight >= self._max_in_flight and path not in NEVER_SHED:
            self._metrics.shed()
            return Overloaded()
        return None

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = scope.get("path_template") or UNROUTED
        self._metrics.request(route, status, seconds)
        self._log.record(scope, route, status, seconds)


def _identified(scope: Scope, headers: Headers) -> list[tuple[bytes, bytes]]:
    """Give the request an id of ours; returns the headers of its answer that tell it, and the caller's beside it."""
    state = scope["state"]
    state["request_id"] = request_id = new_request_id()
    state["caller_request_id"] = state["key_owner"] = None
    added = [(REQUEST_ID_HEADER, request_id.encode())]
    callers = headers.get(REQUEST_ID_HEADER)
    if callers and CALLER_REQUEST_ID.fullmatch(callers):
        state["caller_request_id"] = callers.decode()
        added.append((CALLER_REQUEST_ID_HEADER, callers))
    return added
