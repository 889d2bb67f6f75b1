"""HTTP on the connection: uvicorn's, but bounded in what is no body, and with problem details for what is not HTTP."""

import msgspec
from litestar.exceptions import ClientException
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.problems import MEDIA_TYPE, new_request_id, problem

MAX_HEAD = 32 * 1024
"""Bytes of a request line with its headers, and of whatever else is no body: trailers, extensions of chunks."""


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol, whose answer to what it cannot read is a problem; such requests reach no route.

    The parser would keep headers of any size in memory.
    """

    _head = 0
    """Bytes received since the last that ended a head or belonged to a body."""

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
