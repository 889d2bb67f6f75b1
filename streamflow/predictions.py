"""The prediction log: what was answered, whether it can be computed again to the last bit, and how long it is kept.

The service writes it (serving/prediction_log.py) and loads this module to know what a logged prediction is; nothing
heavy is imported here before it is needed.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import psycopg
from psycopg import sql

from streamflow.contract import SCHEMA
from streamflow.database import Database
from streamflow.errors import (
    ArtifactRefused,
    ConfigurationError,
    UnknownPrediction,
    UnknownVersion,
    WarehouseUnavailable,
)
from streamflow.months import Month
from streamflow.scoring import Scorer, UnscorableFeatures, Value, decide

if TYPE_CHECKING:
    from streamflow.pipeline import Platform

CHUNK_ROWS = 5_000
NAMED = 10
"""How many predictions a summary names."""
PARTITION = "predictions_"
DROP_WAIT_S = 5


class LoggedPrediction(msgspec.Struct, frozen=True):
    """One answered prediction, a column for each field; ``features`` are those that were scored, by name.

    ``caller_request_id`` is the caller's own X-Request-ID, ``artifact_sha256`` the digest of the scorer.
    """

    request_id: str
    answered_at: datetime
    caller_request_id: str | None
    user_id: str
    features_as_of: date
    features: dict[str, Value]
    probability: float
    threshold: float
    decision: bool
    model_version: int
    run_id: str
    artifact_sha256: str


@dataclass(frozen=True)
class Scored:
    """What came of some features."""

    probability: float
    decision: bool


@dataclass(frozen=True)
class Replayed:
    """A logged prediction and the same computed again; ``problem`` says why it could not be."""

    request_id: str
    identical: bool
    logged: Scored
    replayed: Scored | None
    problem: str | None = None


@dataclass
class Summary:
    """How many predictions came out the same to the last bit; ``named`` are the first that did not."""

    count: int = 0
    identical: int = 0
    different: int = 0
    not_replayable: int = 0
    named: list[Replayed] = field(default_factory=list)

    def add(self, result: Replayed) -> None:
        """Count a prediction."""
        self.count += 1
        self.identical += result.identical
        self.not_replayable += result.replayed is None
        self.different = self.count - self.identical - self.not_replayable
        if not result.identical and len(self.named) < NAMED:
            self.named.append(result)


# --- reading --------------------------------------------------------------------------------------------------------

# As one JSON document, in which features stand as they were written and floats in their shortest exact form.
_ROWS = "SELECT row_to_json(predictions)::text FROM streamflow.predictions"
_decode = msgspec.json.Decoder(LoggedPrediction).decode


def logged_prediction(database: Database, request_id: str) -> LoggedPrediction:
    """The prediction that was answered under a request id, a UUID; raises UnknownPrediction."""
    with database.connect() as connection:
        row = connection.execute(f"{_ROWS} WHERE request_id = %s::uuid", (request_id,)).fetchone()
    if row is None:
        raise UnknownPrediction(
            f"the prediction log has no request {request_id}: it answered no prediction, its month was dropped, or the "
            "service still keeps it in its spill file because PostgreSQL was away"
        )
    return _decode(row[0])


def logged_predictions(database: Database, since: datetime | None = None) -> Iterator[list[LoggedPrediction]]:
    """Every prediction in the log, or those answered at ``since`` or later, in chunks of at most CHUNK_ROWS."""
    query, given = (f"{_ROWS} WHERE answered_at >= %s", (since,)) if since else (_ROWS, ())
    with database.connect() as connection, connection.cursor(name="predictions") as cursor:
        cursor.execute(query, given)
        while rows := cursor.fetchmany(CHUNK_ROWS):
            yield [_decode(document) for (document,) in rows]


# --- replay ---------------------------------------------------------------------------------------------------------


def replay(platform: "Platform", request_id: str) -> Replayed:
    """Score the features of one logged prediction again with the artifact that it was answered by.

    Raises UnknownPrediction, UnknownVersion for a version or an artifact that is gone, ArtifactRefused for an artifact
    that is not the registered one, RegistryUnavailable.
    """
    prediction = logged_prediction(platform.database, request_id)
    scorer = _Scorers(platform).of(prediction)
    (result,) = _replayed(scorer, [prediction])
    return result


def replay_all(platform: "Platform", since: datetime | None = None) -> Iterator[Replayed]:
    """The same for every logged prediction, or those answered at ``since`` or later, in no order.

    What cannot be replayed says why and stops nothing else. Needs the memory of a chunk. Raises RegistryUnavailable.
    """
    scorers = _Scorers(platform)
    for chunk in logged_predictions(platform.database, since):
        yield from _replayed_chunk(scorers, chunk)


def summarize(results: Iterable[Replayed]) -> Summary:
    """Count the results of a replay."""
    summary = Summary()
    for result in results:
        summary.add(result)
    return summary


class _Scorers:
    """The registered scorers of logged predictions, each verified once."""

    def __init__(self, platform: "Platform") -> None:
        self._platform = platform
        self._known: dict[int, tuple[str, Scorer] | UnknownVersion | ArtifactRefused] = {}

    def of(self, prediction: LoggedPrediction) -> Scorer:
        number, answered_by = prediction.model_version, prediction.artifact_sha256
        if number not in self._known:
            try:
                self._known[number] = self._load(number)
            except (UnknownVersion, ArtifactRefused) as failure:
                self._known[number] = failure
        known = self._known[number]
        if isinstance(known, Exception):
            raise type(known)(f"what version {number} answered cannot be replayed: {known}") from known
        registered, scorer = known
        if answered_by != registered:
            raise ArtifactRefused(
                f"request {prediction.request_id} was answered by a scorer with SHA-256 {answered_by}; the one "
                f"registered as version {number} has {registered}"
            )
        return scorer

    def _load(self, number: int) -> tuple[str, Scorer]:
        from streamflow import pipeline

        version = self._platform.ledger.version(number)
        return version.artifact_sha256, pipeline.scorer_of(self._platform, version)


def _replayed_chunk(scorers: _Scorers, chunk: Sequence[LoggedPrediction]) -> Iterator[Replayed]:
    by_artifact: dict[tuple[int, str], list[LoggedPrediction]] = {}
    for prediction in chunk:
        by_artifact.setdefault((prediction.model_version, prediction.artifact_sha256), []).append(prediction)
    for predictions in by_artifact.values():
        try:
            scorer = scorers.of(predictions[0])
        except (UnknownVersion, ArtifactRefused) as failure:
            yield from (_not_replayable(prediction, str(failure)) for prediction in predictions)
        else:
            yield from _replayed(scorer, predictions)


def _replayed(scorer: Scorer, predictions: Sequence[LoggedPrediction]) -> list[Replayed]:
    """Score them in one call; when one of them cannot be scored, each by itself."""
    rows = [[one.features.get(feature.name) for feature in scorer.features] for one in predictions]
    try:
        probabilities = scorer.score(rows)
    except UnscorableFeatures as refusal:
        if len(predictions) == 1:
            return [_not_replayable(predictions[0], f"its scorer no longer takes its features: {refusal}")]
        return [result for one in predictions for result in _replayed(scorer, [one])]
    logged = np.array([one.probability for one in predictions], dtype=np.float64)
    same_bits = logged.view(np.int64) == probabilities.view(np.int64)
    return [
        _compared(one, probability, same_bits=same)
        for one, probability, same in zip(predictions, probabilities.tolist(), same_bits.tolist(), strict=True)
    ]


def _compared(prediction: LoggedPrediction, probability: float, *, same_bits: bool) -> Replayed:
    replayed = Scored(probability, decide(probability, prediction.threshold))
    identical = same_bits and replayed.decision == prediction.decision
    return Replayed(prediction.request_id, identical, _logged(prediction), replayed)


def _not_replayable(prediction: LoggedPrediction, problem: str) -> Replayed:
    return Replayed(prediction.request_id, False, _logged(prediction), None, problem)


def _logged(prediction: LoggedPrediction) -> Scored:
    return Scored(prediction.probability, prediction.decision)


# --- retention ------------------------------------------------------------------------------------------------------


def logged_months(connection: psycopg.Connection[Any]) -> list[Month]:
    """The months that the log has a partition for, oldest first."""
    rows = connection.execute(
        "SELECT relname FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid "
        "WHERE inhparent = 'streamflow.predictions'::regclass"
    )
    return sorted(Month.parse(name.removeprefix(PARTITION).replace("_", "-")) for (name,) in rows.fetchall())


def drop_old_months(database: Database, keep: int | None, now: datetime) -> list[Month]:
    """Drop the partitions of months before the ``keep`` whole ones that precede the current one; returns the dropped.

    None keeps all. The owner does it. Raises ConfigurationError for fewer than one, WarehouseUnavailable when a replay
    or another reader holds the log for longer than DROP_WAIT_S seconds.
    """
    if keep is None:
        return []
    if keep < 1:
        raise ConfigurationError(f"{keep} months of predictions cannot be kept; keep at least 1")
    today = now.astimezone(UTC)
    first_kept = Month(today.year, today.month).shift(-keep)
    try:
        with database.connect(owner=True) as connection:
            connection.execute(f"SET LOCAL lock_timeout = '{DROP_WAIT_S}s'")
            dropped = [month for month in logged_months(connection) if month < first_kept]
            for month in dropped:
                name = f"{PARTITION}{month}".replace("-", "_")
                connection.execute(sql.SQL("DROP TABLE {}").format(sql.Identifier(SCHEMA, name)))
    except psycopg.errors.LockNotAvailable as failure:
        raise WarehouseUnavailable(
            "the prediction log is being read, so its old months could not be dropped; run `streamflow migrate` again "
            "when `streamflow replay` is done"
        ) from failure
    return dropped
