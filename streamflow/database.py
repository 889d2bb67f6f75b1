"""Where PostgreSQL is and as whom to speak to it; one schema for each part of the platform."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

import psycopg

from streamflow.contract import SCHEMA
from streamflow.errors import WarehouseUnavailable

CONNECT_TIMEOUT_S = 10


@dataclass(frozen=True)
class Database:
    """One PostgreSQL database: ``url`` is the platform's role, ``owner_url`` migrates and owns the ledger.

    Both are ``postgresql://user:password@host:port/name`` addresses. ``socket_url`` is ``url`` by way of a Unix socket,
    which takes less time, where there is one.
    """

    url: str
    owner_url: str
    socket_url: str | None = None

    def libpq(self, schema: str = SCHEMA, **server_settings: str) -> str:
        """The platform's address with that search path (and any further server settings), in UTC."""
        return _with_options(self.url, schema, server_settings)

    def sqlalchemy(self, schema: str, *, owner: bool = False, **server_settings: str) -> str:
        """The same for SQLAlchemy through psycopg2, the driver that dagster-postgres and MLflow need."""
        address = _with_options(self.owner_url if owner else self.url, schema, server_settings)
        return address.replace("postgresql://", "postgresql+psycopg2://", 1)

    @contextmanager
    def connect(self, *, owner: bool = False) -> Iterator[psycopg.Connection[Any]]:
        """One connection and one transaction: committed at the end of the block, rolled back on an error.

        Raises WarehouseUnavailable when the server does not answer.
        """
        address = _with_options(self.owner_url if owner else self.url, SCHEMA, {})
        try:
            connection = psycopg.connect(address, connect_timeout=CONNECT_TIMEOUT_S)
        except psycopg.OperationalError as failure:
            raise WarehouseUnavailable(f"PostgreSQL does not answer: {str(failure).strip()}") from failure
        with connection:
            yield connection


def _with_options(url: str, schema: str, server_settings: dict[str, str]) -> str:
    parts = urlsplit(url)
    flags = {"search_path": schema, "timezone": "UTC", **server_settings}
    options = " ".join(f"-c{name}={value}" for name, value in flags.items())
    query = dict(parse_qsl(parts.query))
    query["options"] = f"{query.get('options', '')} {options}".lstrip()
    return urlunsplit(parts._replace(query=urlencode(query, quote_via=quote)))
