"""HTTP on the connection: uvicorn's, but what is not HTTP is told so by problem details as well."""

import msgspec
from litestar.exceptions import ClientException
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.problems import MEDIA_TYPE, new_request_id, problem


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol, whose answer to what it cannot read is a problem; such requests reach no route."""

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
