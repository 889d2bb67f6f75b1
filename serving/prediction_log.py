"""The prediction log's writer: every answered prediction becomes a row in PostgreSQL, off the request path.

Rows wait in memory, where a kill loses them, for FLUSH_S and then at most PATIENCE_S for PostgreSQL; what it has not
taken by then goes into the spill file, and from there into PostgreSQL when that is back. A row may get there twice on
the way, and is inserted once.
"""

import asyncio
import contextlib
import logging
import socket
from pathlib import Path
from typing import Any, Self

import msgspec
import psycopg

from serving.logs import log
from serving.predictor import Scored
from serving.spill import Spill
from streamflow.database import Database
from streamflow.errors import StreamFlowError
from streamflow.predictions import LoggedPrediction

QUEUE_ROWS = 50_000
"""Rows in memory, 0.7 kB each, beyond which nothing more is answered."""
BATCH_ROWS = 2_000
FLUSH_S = 0.2
PATIENCE_S = 0.2
"""How long rows that PostgreSQL is taking stay in memory only."""
WRITE_S = 3.0
"""How long PostgreSQL may take over a batch before the connection is cut."""
RETRY_S = 1.0
"""How long to leave PostgreSQL alone after it failed."""
CONNECT_S = 2

DATABASE, SPILL, REPLAY = "database", "spill", "replay"
"""What may fail: to insert, to write the spill file, to read it back."""

# JSON escapes both characters, so that its lines pass through CSV as they are.
COPY = rb"COPY staging FROM STDIN (FORMAT csv, QUOTE E'\x01', DELIMITER E'\x02', ENCODING 'UTF8')"
INSERT = b"""
    INSERT INTO streamflow.predictions
    SELECT logged.* FROM staging, json_populate_record(NULL::streamflow.predictions, line) AS logged
    ON CONFLICT DO NOTHING
"""
MAKE_PARTITIONS = b"""
    SELECT streamflow.make_predictions_partition(month) FROM (
        SELECT DISTINCT date_trunc('month', (line ->> 'answered_at')::timestamptz)::date FROM staging
    ) AS answered (month)
"""

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(LoggedPrediction).decode


class PredictionLogFull(StreamFlowError):
    """A prediction cannot be logged, and is therefore not answered."""


def logged(scored: Scored, request_id: str, caller_request_id: str | None) -> LoggedPrediction:
    """The row of a prediction that is answered under ``request_id``."""
    production = scored.model.production
    return LoggedPrediction(
        request_id=request_id,
        answered_at=scored.scored_at,
        caller_request_id=caller_request_id,
        user_id=scored.user_id,
        features_as_of=scored.features_as_of,
        features=scored.features,
        probability=scored.probability,
        threshold=production.threshold,
        decision=scored.churns,
        model_version=production.version,
        run_id=production.run_id,
        artifact_sha256=production.artifact_sha256,
    )


class PredictionLog:
    """Takes rows as long as its context is open and brings all of them to PostgreSQL or into the ``spill`` folder.

    ``written`` counts the rows that PostgreSQL has taken from this process.
    """

    def __init__(self, url: str, spill: Path) -> None:
        limit = f"{WRITE_S * 1000:.0f}"
        self._address = Database(url, url).libpq(statement_timeout=limit, client_min_messages="warning")
        self._spill = Spill(spill, _is_logged_prediction)
        self._rows: list[bytes] = []
        self._wake = asyncio.Event()
        self._stopping = False
        self._writer: asyncio.Task[None] | None = None
        self._connection: psycopg.AsyncConnection[Any] | None = None
        self._batch: asyncio.Task[int] | None = None
        self._in_batch = 0
        """How many of the first rows in memory the running batch holds."""
        self._patient_until = 0.0
        self._replaying = False
        self._retry_at = float("-inf")
        self._failures: dict[str, str] = {}
        self.written = 0

    @property
    def backlog(self) -> int:
        """Rows in memory."""
        return len(self._rows)

    @property
    def spilled_rows(self) -> int:
        """Rows in the spill files that wait for PostgreSQL."""
        return self._spill.rows

    @property
    def spilled_bytes(self) -> int:
        """The same in bytes."""
        return self._spill.size

    @property
    def last_error(self) -> str | None:
        """What does not work now and why; None while all is well."""
        return "; ".join(self._failures.values()) or None

    def record(self, *predictions: LoggedPrediction) -> None:
        """Take predictions that are about to be answered: all of them, or none and raise PredictionLogFull."""
        waiting = len(self._rows)
        if waiting + len(predictions) > QUEUE_ROWS:
            raise PredictionLogFull("predictions cannot be logged now, and none is answered unlogged; the log says why")
        self._rows += map(_encode, predictions)
        if waiting < BATCH_ROWS <= len(self._rows):
            self._wake.set()

    async def __aenter__(self) -> Self:
        """Begin to write; a database that is away is no error here."""
        self._writer = asyncio.create_task(self._write())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Bring what is in memory to PostgreSQL, or else into the spill file."""
        self._stopping = True
        self._wake.set()
        if self._writer:
            await self._writer
        while self._rows and await self._store():
            pass
        if self._rows:
            await self._spill_rows()
        if self._rows:
            log(logging.CRITICAL, "predictions_lost", rows=len(self._rows), reason=self.last_error)
        await self._disconnect()
        self._spill.close()

    async def _write(self) -> None:
        while not self._stopping:
            try:
                more = await self._flush()
            except Exception as failure:
                log(logging.ERROR, "prediction_log_failed", failure=failure)
                more = False
            if not more:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(FLUSH_S):
                        await self._wake.wait()
                self._wake.clear()

    async def _flush(self) -> bool:
        """Get what is in memory out of it; returns whether PostgreSQL could take more at once."""
        if await self._store():
            return len(self._rows) >= BATCH_ROWS or (self._spill.rows > 0 and REPLAY not in self._failures)
        if self._rows:
            await self._spill_rows()
        return False

    async def _store(self) -> bool:
        """Bring a batch from memory and one from the spill file to PostgreSQL; returns whether it took them in time.

        A batch that it takes longer over goes on, and its outcome is seen at the next call.
        """
        now = asyncio.get_running_loop().time
        if self._batch is None:
            if now() < self._retry_at:
                return False
            lines = await self._next_batch()
            if not lines:
                await self._forget_spilled()
                return True
            self._batch = asyncio.create_task(self._insert(lines))
            self._patient_until = now() + PATIENCE_S
        await asyncio.wait({self._batch}, timeout=max(0, self._patient_until - now()))
        if not self._batch.done():
            return False
        batch, self._batch = self._batch, None
        try:
            self.written += batch.result()
        except Exception as failure:
            self._retry_at = now() + RETRY_S
            self._note(DATABASE, failure)
            return False
        self._note(DATABASE, None)
        self._failures.pop(SPILL, None)
        del self._rows[: self._in_batch]
        await self._forget_spilled()
        return True

    async def _next_batch(self) -> list[bytes]:
        spilled: list[bytes] = []
        self._replaying = not self._stopping
        if self._replaying:
            try:
                spilled = await asyncio.to_thread(self._spill.read)
            except OSError as failure:
                self._replaying = False
                self._note(REPLAY, failure)
        rows = self._rows[:BATCH_ROWS]
        self._in_batch = len(rows)
        return rows + spilled

    async def _forget_spilled(self) -> None:
        if self._replaying:
            try:
                await asyncio.to_thread(self._spill.forget)
            except OSError as failure:
                self._note(REPLAY, failure)
            else:
                self._note(REPLAY, None)

    async def _spill_rows(self) -> None:
        rows = self._rows[:]
        try:
            await asyncio.to_thread(self._spill.append, rows)
        except OSError as failure:
            self._note(SPILL, failure)
        else:
            self._note(SPILL, None)
            del self._rows[: len(rows)]
            self._in_batch = 0

    def _note(self, part: str, failure: Exception | None) -> None:
        """Keep how a part does, and log it when that changes between well and failing."""
        failing = part in self._failures
        if failure:
            self._failures[part] = f"{part}: {str(failure).strip() or type(failure).__name__}"
            if not failing:
                log(logging.WARNING, "prediction_log_failing", part=part, reason=self._failures[part])
        elif failing:
            del self._failures[part]
            log(logging.INFO, "prediction_log_recovered", part=part, backlog=self.backlog, spilled=self.spilled_rows)

    async def _insert(self, lines: list[bytes]) -> int:
        """Insert the lines that are not there yet, in one transaction; returns how many. Raises psycopg.Error."""
        data = b"\n".join(lines)
        try:
            connection = await self._connect()
            watchdog = asyncio.get_running_loop().call_later(WRITE_S, _cut, connection)
            try:
                try:
                    return await _insert(connection, data)
                except psycopg.errors.CheckViolation:  # a month without a partition
                    return await _insert(connection, data, MAKE_PARTITIONS)
            finally:
                watchdog.cancel()
        except BaseException:
            await self._close_connection()
            raise

    async def _connect(self) -> psycopg.AsyncConnection[Any]:
        if self._connection is None:
            self._connection = await psycopg.AsyncConnection.connect(
                self._address, autocommit=True, connect_timeout=CONNECT_S
            )
        return self._connection

    async def _close_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection:
            await connection.close()

    async def _disconnect(self) -> None:
        if self._batch:
            if self._connection:
                _cut(self._connection)
            else:
                self._batch.cancel()
            await asyncio.gather(self._batch, return_exceptions=True)
        await self._close_connection()


async def _insert(connection: psycopg.AsyncConnection[Any], data: bytes, before: bytes | None = None) -> int:
    async with connection.transaction():
        await connection.execute("CREATE TEMP TABLE IF NOT EXISTS staging (line json) ON COMMIT DELETE ROWS")
        async with connection.cursor() as cursor:
            async with cursor.copy(COPY) as copy:
                await copy.write(data)
            if before:
                await cursor.execute(before)
            await cursor.execute(INSERT)
            return cursor.rowcount


def _cut(connection: psycopg.AsyncConnection[Any]) -> None:
    """Shut the socket under a query: to cancel it politely, psycopg would wait for a server that hangs."""
    with socket.socket(fileno=connection.fileno()) as shared:
        try:
            shared.shutdown(socket.SHUT_RDWR)
        finally:
            shared.detach()


def _is_logged_prediction(line: bytes) -> bool:
    try:
        _decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return False
    return True
