"""The service's connections to PostgreSQL: bounded in number and in time, and good again when the server is.

By asyncpg: a lookup costs a fifth of the processor time that psycopg's asynchronous connections take for it.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Self

import asyncpg

from streamflow.database import Database
from streamflow.errors import WarehouseUnavailable

CONNECTIONS = 4
WAIT_S = 1.0
"""How long a request waits for a connection, a new one included."""
QUERY_S = 1.5
"""How long the server may take over a query before it cancels it."""
SILENCE_S = 2.0
"""How long we wait for the server to say anything before the connection is cut."""

BY_INDEX = {
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
}
"""Lookups by key only: planned once, and well, also when that was while the tables were still empty."""

Row = Sequence[Any]

LOST = (
    OSError,
    asyncpg.InterfaceError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.InternalClientError,
)
"""What a query meets when the server goes away, is not there yet, or takes too long. TimeoutError is an OSError."""


class QueryRefused(WarehouseUnavailable):
    """PostgreSQL answers, but lacks what was asked for, such as a table or the right to read it."""


class Postgres:
    """A pool of connections that read, open as long as its context."""

    def __init__(self, url: str) -> None:
        self._address = Database(url, url).libpq(statement_timeout=f"{QUERY_S * 1000:.0f}", **BY_INDEX)
        self._pool: asyncpg.Pool[asyncpg.Record]

    async def __aenter__(self) -> Self:
        """Get ready to connect, which the first query does; a server that is away is no error here."""
        self._pool = await asyncpg.create_pool(
            self._address,
            min_size=0,
            max_size=CONNECTIONS,
            max_inactive_connection_lifetime=0,
            timeout=WAIT_S,
            reset=_leave_as_it_is,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        self._pool.terminate()

    async def fetch(self, query: str, *parameters: object) -> Sequence[Row]:
        """All rows of a prepared query that only reads, asked again if its connection turns out to be lost already.

        Raises WarehouseUnavailable when the server does not answer in time, QueryRefused when it lacks a table. What
        the server or the driver said is the cause of either, not its message, which goes over the wire.
        """
        try:
            return await self._fetch(query, parameters)
        except LOST as failure:
            raise WarehouseUnavailable("PostgreSQL does not answer; the log says why") from failure
        except asyncpg.PostgresError as failure:
            refusal = type(failure).__name__.removesuffix("Error")
            raise QueryRefused(f"PostgreSQL refuses a query ({refusal}); the log says why") from failure

    async def _fetch(self, query: str, parameters: tuple[object, ...]) -> Sequence[Row]:
        deadline = time.monotonic() + SILENCE_S / 2
        while True:
            connection = await self._connection()
            try:
                return await _fetch(connection, query, parameters)
            except LOST:
                if not connection.is_closed() or time.monotonic() >= deadline:
                    raise
            finally:
                await self._pool.release(connection)

    async def _connection(self) -> Any:
        try:
            return await self._pool.acquire(timeout=WAIT_S)
        except asyncpg.PostgresError as failure:
            raise asyncpg.InterfaceError(f"no connection: {failure}") from failure


async def _fetch(connection: Any, query: str, parameters: tuple[object, ...]) -> Sequence[Row]:
    """Cut the connection under a query that hangs: to cancel it politely, asyncpg would wait for the server."""
    watchdog = asyncio.get_running_loop().call_later(SILENCE_S, connection.terminate)
    try:
        rows: Sequence[Row] = await connection.fetch(query, *parameters)
        return rows
    finally:
        watchdog.cancel()


async def _leave_as_it_is(_: Any) -> None:
    """Nothing to reset: no query here changes its session."""
