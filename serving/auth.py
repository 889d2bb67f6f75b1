"""Who asks: API keys in the header of a request, where keys are on."""

import base64
import binascii
from collections.abc import Mapping
from ipaddress import ip_address

from litestar.openapi.spec import Components, SecurityScheme

from streamflow.api_keys import ApiKeys
from streamflow.errors import ConfigurationError, StreamFlowError
from streamflow.settings import Settings

CHALLENGE = 'Bearer realm="streamflow"'
BROWSER_CHALLENGE = 'Basic realm="streamflow", charset="UTF-8"'
"""How a browser is told to ask its user, who gives any name and a key as the password."""
BEARER, BASIC = b"bearer ", b"basic "
SECURITY_SCHEMES = Components(
    security_schemes={
        "bearer": SecurityScheme(type="http", scheme="bearer", description="Authorization: Bearer KEY"),
        "api_key": SecurityScheme(type="apiKey", name="X-API-Key", security_scheme_in="header", description="The key."),
    }
)
EITHER: list[dict[str, list[str]]] = [{"bearer": []}, {"api_key": []}]
"""What a route asks for, in OpenAPI."""


class Unauthorized(StreamFlowError):
    """A request without an accepted API key; ``by_browser`` where it may also come as a password."""

    def __init__(self, *, by_browser: bool = False) -> None:
        as_password = ", or in a browser as the password, with any user name" if by_browser else ""
        super().__init__(f"send an accepted API key as `Authorization: Bearer KEY` or `X-API-Key: KEY`{as_password}")
        self.challenge = BROWSER_CHALLENGE if by_browser else CHALLENGE


def api_keys(settings: Settings) -> ApiKeys | None:
    """The accepted keys, None where keys are off.

    Raises ConfigurationError for a file of keys that cannot be used, and when the service would listen beyond loopback
    without keys.
    """
    if settings.api_keys_file:
        return ApiKeys.load(settings.api_keys_file)
    if not _is_loopback(settings.host):
        raise ConfigurationError(
            f"STREAMFLOW_HOST={settings.host} is beyond loopback, where the service needs API keys; set "
            "STREAMFLOW_API_KEYS_FILE and make a key by `streamflow key NAME`"
        )
    return None


def owner_of_key(keys: ApiKeys, headers: Mapping[bytes, bytes], *, by_browser: bool = False) -> str | None:
    """Whose key a request shows; None if nobody's. ``by_browser`` also takes it as the password of HTTP Basic.

    Only for what changes nothing: a browser sends a password along with whatever another site makes it ask for.
    """
    credentials = headers.get(b"authorization", b"")
    if by_browser and credentials[: len(BASIC)].lower() == BASIC:
        return keys.owner(_password(credentials[len(BASIC) :]))
    if credentials[: len(BEARER)].lower() == BEARER:
        return keys.owner(credentials[len(BEARER) :].strip())
    key = headers.get(b"x-api-key")
    return keys.owner(key) if key else None


def _password(credentials: bytes) -> bytes:
    """The password of HTTP Basic (RFC 7617); none of what is not that."""
    try:
        return base64.b64decode(credentials.strip(), validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
