"""The usual ``POST /predict``, answered without the framework, which costs more than the prediction.

What is unusual about a request, or wrong with its body, is the framework's: it says what is accepted and what is not.
"""

from typing import Any

import msgspec
from litestar._asgi.utils import is_valid_host
from litestar.types import ASGIApp, Receive, Scope, Send

from serving.problems import refuse
from serving.protocol import WHOLE
from serving.routes import MAX_BODY, Service, body_deadline, body_too_late, predicted
from serving.schemas import PredictRequest

PATH = "/predict"
JSON = b"application/json"

_decode = msgspec.json.Decoder(PredictRequest).decode


class Shortcut:
    """Answers usual predictions by itself and leaves everything else to ``app``."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if not _is_usual(scope):
            await self._app(scope, receive, send)
            return
        if WHOLE in scope["state"]:
            message = await receive()
        else:
            try:
                async with body_deadline():
                    message = await receive()
            except TimeoutError:
                await refuse(scope, send, body_too_late())
                return
        asked = _asked(message)
        if asked is None:
            await self._app(scope, _again(message, receive), send)
            return
        scope["path_template"] = PATH
        try:
            body = await predicted(asked, scope, self._service)
        except Exception as failure:
            await refuse(scope, send, failure)
            return
        headers = [(b"content-type", JSON), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})


def _is_usual(scope: Scope) -> bool:
    if scope["path"] != PATH or scope.get("method") != "POST":
        return False
    given = list(scope["headers"])
    headers = dict(given)
    length = headers.get(b"content-length", b"")
    return (
        headers.get(b"content-type") == JSON
        and b"content-encoding" not in headers
        and length.isdigit()
        and int(length) <= MAX_BODY
        and is_valid_host(headers.get(b"host", b""))
        and len(headers) == len(given)
    )


def _asked(message: Any) -> PredictRequest | None:
    """What a body that came in one piece asks for; None if it is not that, or nothing well-formed."""
    if message.get("more_body") or not message.get("body"):
        return None
    try:
        return _decode(message["body"])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _again(message: Any, receive: Receive) -> Receive:
    """``receive`` as if it had not given the message yet."""
    messages = [message]

    async def from_the_beginning() -> Any:
        return messages.pop() if messages else await receive()

    return from_the_beginning
