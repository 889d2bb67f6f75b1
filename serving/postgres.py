"""The service's connections to PostgreSQL: bounded in number and in time, and good again when the server is."""

import asyncio
import socket
import time
from typing import Any, Self

import psycopg
from psycopg_pool import AsyncConnectionPool

from streamflow.database import Database
from streamflow.errors import WarehouseUnavailable

CONNECTIONS = 4
WAIT_S = 1.0
"""How long a request waits for a connection."""
QUERY_S = 1.5
"""How long the server may take over a query before it cancels it."""
SILENCE_S = 2.0
"""How long we wait for the server to say anything before the connection is cut."""
RECONNECT_S = 2.0
"""A new attempt to connect is made for whoever asks after this long, without the pool's growing back-off."""

BY_INDEX = {
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
}
"""Lookups by key only: planned once, and well, also when that was while the tables were still empty."""

Row = tuple[Any, ...]


class QueryRefused(WarehouseUnavailable):
    """PostgreSQL answers, but lacks what was asked for, such as a table or the right to read it."""


class Postgres:
    """A pool of connections that read, open as long as its context."""

    def __init__(self, url: str) -> None:
        self._pool = AsyncConnectionPool(
            Database(url, url).libpq(statement_timeout=f"{QUERY_S * 1000:.0f}", **BY_INDEX),
            kwargs={"autocommit": True, "connect_timeout": 2},
            min_size=CONNECTIONS,
            max_size=CONNECTIONS,
            timeout=WAIT_S,
            reconnect_timeout=RECONNECT_S,
            open=False,
        )

    async def __aenter__(self) -> Self:
        """Begin to connect; a server that is away is no error here."""
        await self._pool.open(wait=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._pool.close()

    async def fetch(self, query: bytes, *parameters: object) -> list[Row]:
        """All rows of a prepared query that only reads, asked again if its connection turns out to be lost already.

        Raises WarehouseUnavailable when the server does not answer in time, QueryRefused when it lacks a table. What
        the server or the driver said is the cause of either, not its message, which goes over the wire.
        """
        try:
            return await self._fetch(query, parameters)
        except psycopg.OperationalError as failure:
            raise WarehouseUnavailable("PostgreSQL does not answer; the log says why") from failure
        except psycopg.Error as failure:
            refusal = type(failure).__name__
            raise QueryRefused(f"PostgreSQL refuses a query ({refusal}); the log says why") from failure

    async def _fetch(self, query: bytes, parameters: tuple[object, ...]) -> list[Row]:
        deadline = time.monotonic() + SILENCE_S / 2
        while True:
            async with self._pool.connection() as connection:
                try:
                    return await _fetch(connection, query, parameters)
                except psycopg.OperationalError:
                    if not connection.closed or time.monotonic() >= deadline:
                        raise


async def _fetch(connection: psycopg.AsyncConnection[Row], query: bytes, parameters: tuple[object, ...]) -> list[Row]:
    watchdog = asyncio.get_running_loop().call_later(SILENCE_S, cut, connection)
    try:
        cursor = await connection.execute(query, parameters, prepare=True, binary=True)
        return await cursor.fetchall()
    finally:
        watchdog.cancel()


def cut(connection: psycopg.AsyncConnection[Any]) -> None:
    """Shut the socket under a query: to cancel it politely, psycopg would wait for a server that hangs."""
    with socket.socket(fileno=connection.fileno()) as shared:
        try:
            shared.shutdown(socket.SHUT_RDWR)
        finally:
            shared.detach()
