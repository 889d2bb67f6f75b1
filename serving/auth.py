"""Who asks: API keys in the header of a request, where keys are on."""

from collections.abc import Mapping
from ipaddress import ip_address

from litestar.openapi.spec import Components, SecurityScheme

from streamflow.api_keys import ApiKeys
from streamflow.errors import ConfigurationError, StreamFlowError
from streamflow.settings import Settings

CHALLENGE = 'Bearer realm="streamflow"'
BEARER = b"bearer "
SECURITY_SCHEMES = Components(
    security_schemes={
        "bearer": SecurityScheme(type="http", scheme="bearer", description="Authorization: Bearer KEY"),
        "api_key": SecurityScheme(type="apiKey", name="X-API-Key", security_scheme_in="header", description="The key."),
    }
)
EITHER: list[dict[str, list[str]]] = [{"bearer": []}, {"api_key": []}]
"""What a route asks for, in OpenAPI."""


class Unauthorized(StreamFlowError):
    """A request without an accepted API key."""

    def __init__(self) -> None:
        super().__init__("send an accepted API key as `Authorization: Bearer KEY` or `X-API-Key: KEY`")


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


def owner_of_key(keys: ApiKeys, headers: Mapping[bytes, bytes]) -> str | None:
    """Whose key a request shows; None if nobody's."""
    credentials = headers.get(b"authorization", b"")
    if credentials[: len(BEARER)].lower() == BEARER:
        return keys.owner(credentials[len(BEARER) :].strip())
    key = headers.get(b"x-api-key")
    return keys.owner(key) if key else None


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
