"""The service's connections to PostgreSQL: bounded in number and in time, and good again when the server is.

By asyncpg: a lookup costs a fifth of the processor time that psycopg's asynchronous connections take for it.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Self, TypeVar

import asyncpg
import msgspec

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
_Row = TypeVar("_Row")
_AS_JSON = "SELECT row_to_json(shown)::text FROM"

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
    """Some connections that read, open as long as its context.

    Not asyncpg's pool, which takes as much processor time as a lookup: nothing needs to be reset here, nor to expire.
    """

    def __init__(self, url: str) -> None:
        self._address = Database(url, url).libpq(statement_timeout=f"{QUERY_S * 1000:.0f}", **BY_INDEX)
        self._places = asyncio.Semaphore(CONNECTIONS)
        self._idle: list[Any] = []

    async def __aenter__(self) -> Self:
        """Get ready to connect, which the first query does; a server that is away is no error here."""
        return self

    async def __aexit__(self, *_: object) -> None:
        while self._idle:
            self._idle.pop().terminate()

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

    async def read(self, kind: type[_Row], query: str, *parameters: object) -> list[_Row]:
        """The same, each row as one JSON document: floats in their shortest exact form, checked against ``kind``."""
        rows = await self.fetch(f"{_AS_JSON} ({query}) AS shown", *parameters)
        return [msgspec.json.decode(document, type=kind) for (document,) in rows]

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
                self._release(connection)

    async def _connection(self) -> Any:
        if self._idle and not self._places.locked():  # the usual case, for which a time limit costs too much
            await self._places.acquire()
            connection = self._idle.pop()
            if not connection.is_closed():
                return connection
            self._places.release()
        async with asyncio.timeout(WAIT_S):
            await self._places.acquire()
            try:
                while self._idle:
                    connection = self._idle.pop()
                    if not connection.is_closed():
                        return connection
                return await asyncpg.connect(self._address)
            except BaseException as failure:
                self._places.release()
                if isinstance(failure, asyncpg.PostgresError):
                    raise asyncpg.InterfaceError(f"no connection: {failure}") from failure
                raise

    def _release(self, connection: Any) -> None:
        self._places.release()
        if not connection.is_closed():
            self._idle.append(connection)


async def _fetch(connection: Any, query: str, parameters: tuple[object, ...]) -> Sequence[Row]:
    """Cut the connection under a query that hangs or is given up; to cancel it, asyncpg would wait for the server."""
    watchdog = asyncio.get_running_loop().call_later(SILENCE_S, connection.terminate)
    try:
        rows: Sequence[Row] = await connection.fetch(query, *parameters)
    except asyncio.CancelledError:
        connection.terminate()
        raise
    else:
        return rows
    finally:
        watchdog.cancel()
