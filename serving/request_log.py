"""The request log: a line for each request that failed, some for those that were refused, and all if wanted."""

import asyncio
import logging
from typing import Any

from litestar.exceptions import HTTPException
from litestar.types import Scope

from serving.logs import log, with_cause
from serving.problems import KINDS, Kind, NotReady, Overloaded, kind_of

LINES_PER_S = 10
"""How many lines a second each kind of refusal may take."""
WINDOW_S = 1.0
REFUSALS = (KINDS[NotReady], KINDS[Overloaded])
"""What is told with a status of 5xx and yet is no failure: why is logged elsewhere, or it is to be cheap."""


class RequestLog:
    """Logs requests when their answer begins; ``answered`` also those that went well."""

    def __init__(self, *, answered: bool) -> None:
        self._answered = answered
        self._seen: dict[Kind, int] = {}

    def record(self, scope: Scope, route: str, status: int, seconds: float) -> None:
        """Log a request, if it is to be logged."""
        if status >= 400:
            self._record_problem(scope, route, status, seconds)
        elif self._answered:
            log(logging.INFO, "request_answered", **_fields(scope, route, status, seconds))

    def _record_problem(self, scope: Scope, route: str, status: int, seconds: float) -> None:
        failure = scope["state"].get("failure") or HTTPException(status_code=status)
        kind = kind_of(failure)
        fields = {**_fields(scope, route, status, seconds), "kind": kind.name}
        if status < 500 or kind in REFUSALS:
            if self._may_log(kind):
                log(logging.INFO, "request_refused", **fields)
        elif kind is KINDS[500]:
            log(logging.ERROR, "request_failed", path=scope["path"], failure=failure, **fields)
        else:
            log(logging.WARNING, "request_unanswered", reason=with_cause(failure), **fields)

    def _may_log(self, kind: Kind) -> bool:
        seen = self._seen.get(kind, 0) + 1
        self._seen[kind] = seen
        if seen == 1:
            asyncio.get_running_loop().call_later(WINDOW_S, self._end_window, kind)
        return seen <= LINES_PER_S

    def _end_window(self, kind: Kind) -> None:
        left_out = self._seen.pop(kind, 0) - LINES_PER_S
        if left_out > 0:
            log(logging.INFO, "refusals_left_out", kind=kind.name, count=left_out)

    def close(self) -> None:
        """Say what was left out so far."""
        for kind in list(self._seen):
            self._end_window(kind)


def _fields(scope: Scope, route: str, status: int, seconds: float) -> dict[str, Any]:
    state = scope["state"]
    fields = {
        "request_id": state["request_id"],
        "caller_request_id": state["caller_request_id"],
        "route": route,
        "status": status,
        "key_owner": state["key_owner"],
        "seconds": round(seconds, 6),
    }
    return {name: value for name, value in fields.items() if value is not None}
