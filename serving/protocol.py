"""HTTP on the connection: uvicorn's, but bounded in what is no body, and with problem details for what is not HTTP."""

import asyncio
from typing import Any, cast

import msgspec
from litestar.exceptions import ClientException
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.problems import MEDIA_TYPE, new_request_id, problem

MAX_HEAD = 32 * 1024
"""Bytes of a request line with its headers, and of whatever else is no body: trailers, extensions of chunks."""
WHOLE = "body_arrived"


class Packets:
    """A transport that sends what is written in one step of the event loop together, such as a head and its body."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._waiting: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send it with the next `flush`, at the end of this step at the latest."""
        if not self._waiting:
            self._loop.call_soon(self.flush)
        self._waiting.append(data)

    def flush(self) -> None:
        """Send what has been written."""
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            self._transport.write(b"".join(waiting))

    def close(self) -> None:
        """Close the connection once everything is sent."""
        self.flush()
        self._transport.close()


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol, whose answer to what it cannot read is a problem; such requests reach no route.

    The parser would keep headers of any size in memory. A request whose body is there before a route runs says so in
    its state, as ``WHOLE``.
    """

    _head = 0
    """Bytes received since the last that ended a head or belonged to a body."""
    _packets: Packets

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a caller's connection."""
        self._packets = Packets(transport, self.loop)
        super().connection_made(cast(asyncio.Transport, self._packets))

    def on_response_complete(self) -> None:
        """Send the answer."""
        self._packets.flush()
        super().on_response_complete()

    def data_received(self, data: bytes) -> None:
        """Take what the caller sent; refuse it once a head has MAX_HEAD bytes and no end."""
        while data and not self.transport.is_closing():
            room = MAX_HEAD - self._head
            piece, data = data[:room], data[room:]
            self._head += len(piece)
            super().data_received(piece)
            if self._head >= MAX_HEAD and not self.transport.is_closing():
                self.send_400_response(f"the request line and headers are larger than {MAX_HEAD} bytes")

    def on_headers_complete(self) -> None:
        """Begin to answer."""
        self._head = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self._head = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Take the end of the request."""
        self._head = 0
        self.scope["state"][WHOLE] = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what cannot be read, and close the connection."""
        request_id = new_request_id()
        body = msgspec.json.encode(problem(ClientException(msg), request_id))
        head = (
            "HTTP/1.1 400 Bad Request",
            f"content-type: {MEDIA_TYPE}",
            f"content-length: {len(body)}",
            "connection: close",
            f"x-request-id: {request_id}",
            "\r\n",
        )
        self.transport.write("\r\n".join(head).encode() + body)
        self.transport.close()
