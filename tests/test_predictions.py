"""The prediction log in PostgreSQL: its months, who may do what, what comes back, replay to the last bit."""

import functools
import hashlib
import json
import struct
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psycopg
import pytest
from governed import evidence
from hypothesis import given, settings
from hypothesis import strategies as st

from streamflow import predictions, scoring
from streamflow.contract import CONTRACT
from streamflow.database import Database
from streamflow.errors import (
    ArtifactRefused,
    ConfigurationError,
    RegistryUnavailable,
    UnknownPrediction,
    UnknownVersion,
    WarehouseUnavailable,
)
from streamflow.months import Month
from streamflow.pipeline import Platform
from streamflow.predictions import (
    LoggedPrediction,
    Replayed,
    Scored,
    drop_old_months,
    logged_months,
    logged_prediction,
    logged_predictions,
    replay,
    replay_all,
    summarize,
)
from streamflow.promotion import Version
from streamflow.scoring import EncodedColumn, Linear, Scorer, ScorerFeature, Sigmoid, sha256
from streamflow.settings import Settings
from streamflow.warehouse import migrate

MARCH = datetime(2024, 3, 1, 12, 30, 0, 123456, tzinfo=UTC)
COLUMNS = CONTRACT.service("churn_v1").columns


@functools.cache
def artifact(seed: int) -> bytes:
    """A linear scorer of churn_v1, in which each feature moves the probability."""
    random = np.random.default_rng(seed)
    seen = {"boolean": (False, True)}
    features = tuple(
        ScorerFeature(one.name, str(one.view), one.kind, one.categories, one.categories or seen.get(one.kind, (0, 1)))
        for one in COLUMNS
    )
    encoding = tuple(
        EncodedColumn(index, category)
        for index, one in enumerate(features)
        for category in (range(len(one.categories)) if one.categories else (None,))
    )
    coefficients = tuple(random.normal(size=len(encoding)).tolist())
    golden = tuple(tuple(row(1).values()) for _ in range(2))
    draft = scoring._Artifact(
        service="churn_v1",
        features=features,
        encoding=encoding,
        estimator=Linear((0.0,) * len(encoding), coefficients, 0.1),
        link=Sigmoid(0.01, 0.0),
        threshold=0.5,
        golden_rows=golden,
        golden_probabilities=(0.0, 0.0),
    )
    probabilities = tuple(Scorer(draft).score(golden).tolist())
    body = msgspec.msgpack.encode(msgspec.structs.replace(draft, golden_probabilities=probabilities))
    return scoring._MAGIC + hashlib.sha256(body).digest() + body


def row(number: int) -> dict[str, Any]:
    """Features of a customer, by name."""
    values = {"category": "No", "boolean": number % 2 == 0, "integer": number, "float": 29.85 + number / 3}
    return {
        one.name: one.categories[number % len(one.categories)] if one.categories else values[one.kind]
        for one in COLUMNS
    }


class Registry:
    """MLflow's artifacts by run."""

    def __init__(self) -> None:
        self.artifacts: dict[str, bytes] = {}
        self.fetched: list[str] = []
        self.away = False

    def scorer(self, run_id: str) -> bytes:
        self.fetched.append(run_id)
        if self.away:
            raise RegistryUnavailable("MLflow does not answer")
        if run_id not in self.artifacts:
            raise UnknownVersion("MLflow has no such entry: scorer.bin")
        return self.artifacts[run_id]


@dataclass(frozen=True)
class World:
    """An empty prediction log and the versions that answered."""

    database: Database
    registry: Registry = field(default_factory=Registry)

    @property
    def platform(self) -> Platform:
        made = Platform(Settings(home=Path("nowhere"), actor="tester"), self.database)
        vars(made)["registry"] = self.registry
        return made

    def register(self, number: int) -> Scorer:
        data = artifact(number)
        self.registry.artifacts[f"run-{number}"] = data
        version = Version(
            number,
            f"run-{number}",
            date(2024, 1, 31),
            "churn_v1",
            0.5,
            "scorer.bin",
            sha256(data),
            "d",
            "p",
            evidence(),
            {},
            MARCH,
        )
        self.platform.ledger.register(version)
        return Scorer.from_bytes(data)

    def answer(self, version: int, features: dict[str, Any] | None = None, **changes: Any) -> LoggedPrediction:
        """What the service would have logged."""
        data = artifact(version)
        scored = row(1) if features is None else features
        probability = float(Scorer.from_bytes(data).score([list(scored.values())])[0])
        facts = {
            "request_id": str(uuid.uuid4()),
            "answered_at": MARCH,
            "caller_request_id": None,
            "user_id": "7590-VHVEG",
            "features_as_of": date(2024, 1, 31),
            "features": scored,
            "probability": probability,
            "threshold": 0.5,
            "decision": probability >= 0.5,
            "model_version": version,
            "run_id": f"run-{version}",
            "artifact_sha256": sha256(data),
        }
        return LoggedPrediction(**{**facts, **changes})

    def log(self, *answered: LoggedPrediction) -> None:
        with self.database.connect() as connection:
            for month in {one.answered_at.astimezone(UTC).date() for one in answered}:
                connection.execute("SELECT make_predictions_partition(%s)", (month,))
            connection.cursor().executemany(
                "INSERT INTO predictions SELECT * FROM json_populate_record(NULL::predictions, %s::json)",
                [(msgspec.json.encode(one).decode(),) for one in answered],
            )

    def months(self) -> list[str]:
        with self.database.connect() as connection:
            return [str(month) for month in logged_months(connection)]


@pytest.fixture(scope="module")
def template(new_database: Callable[[], Database]) -> Database:
    database = new_database()
    migrate(database)
    return database


@pytest.fixture
def world(template: Database) -> World:
    """The module's database with the log, the versions and the ledger emptied, which only a superuser can."""
    with template.connect(owner=True) as connection:
        for month in logged_months(connection):
            connection.execute(f"DROP TABLE predictions_{month}".replace("-", "_"))
        connection.execute("ALTER TABLE model_versions DISABLE TRIGGER append_only")
        connection.execute("DELETE FROM model_versions")
        connection.execute("ALTER TABLE model_versions ENABLE TRIGGER append_only")
    return World(template)


def bits(value: object) -> object:
    return (type(value), struct.pack("<d", value) if isinstance(value, float) else value)


# --- months and rights ------------------------------------------------------------------------------------------------


def test_a_month_is_a_month_in_utc(world: World) -> None:
    east = timezone(timedelta(hours=9))
    first = world.answer(1, answered_at=datetime(2024, 3, 1, 8, 59, 59, 999999, tzinfo=east))
    second = world.answer(1, answered_at=datetime(2024, 3, 1, 9, tzinfo=east))
    world.log(first, second)
    assert world.months() == ["2024-02", "2024-03"]
    with world.database.connect(owner=True) as connection:
        for month, expected in (("2024_02", first), ("2024_03", second)):
            found = connection.execute(f"SELECT request_id FROM predictions_{month}").fetchall()
            assert found == [(uuid.UUID(expected.request_id),)]


def test_a_month_is_made_once_also_by_two_at_a_time(world: World) -> None:
    with world.database.connect() as one:
        one.execute("SELECT make_predictions_partition('2023-12-31')")
        one.execute("SELECT make_predictions_partition('2023-12-01')")
        with world.database.connect() as other:
            other.execute("SET lock_timeout = '50ms'")
            with pytest.raises(psycopg.errors.LockNotAvailable):
                other.execute("SELECT make_predictions_partition('2023-12-02')")
    with world.database.connect() as other:
        other.execute("SELECT make_predictions_partition('2023-12-02')")
    assert world.months() == ["2023-12"]


def test_making_a_month_waits_for_no_reader(world: World) -> None:
    world.log(world.answer(1))
    with world.database.connect() as reader, world.database.connect() as writer:
        reader.execute("SELECT count(*) FROM predictions")
        writer.execute("SET lock_timeout = '2s'")
        writer.execute("SELECT make_predictions_partition('2030-01-01')")


@pytest.mark.parametrize(
    "attack",
    [
        "SELECT * FROM predictions_2024_03",
        "INSERT INTO predictions_2024_03 SELECT * FROM predictions",
        "UPDATE predictions_2024_03 SET probability = 0",
        "DELETE FROM predictions_2024_03",
        "TRUNCATE predictions_2024_03",
        "DROP TABLE predictions_2024_03",
        "ALTER TABLE predictions DETACH PARTITION predictions_2024_03",
        "ALTER FUNCTION make_predictions_partition SET search_path = public",
        "CREATE OR REPLACE FUNCTION make_predictions_partition(month date) RETURNS void LANGUAGE sql AS ''",
    ],
)
def test_the_platforms_role_reaches_no_partition(world: World, attack: str) -> None:
    world.log(world.answer(1))
    migrate(world.database)  # which grants anew
    with pytest.raises(psycopg.errors.InsufficientPrivilege), world.database.connect() as connection:
        connection.execute(attack)


def test_even_the_owner_changes_no_month(world: World) -> None:
    world.log(world.answer(1))
    for statement in ("UPDATE {} SET threshold = 0", "DELETE FROM {}", "TRUNCATE {}"):
        for table in ("predictions", "predictions_2024_03"):
            with (
                pytest.raises(psycopg.errors.RaiseException, match="is append-only"),
                world.database.connect(owner=True) as connection,
            ):
                connection.execute(statement.format(table))


def test_only_the_platforms_role_may_have_months_made(world: World) -> None:
    with world.database.connect(owner=True) as connection:
        found = connection.execute(
            "SELECT proacl::text, prosecdef, proconfig FROM pg_proc WHERE proname = 'make_predictions_partition'"
        ).fetchone()
    assert found is not None
    rights, definer, configured = found
    granted = {entry.partition("=")[0] for entry in rights.strip("{}").split(",")}
    assert granted == {"streamflow", "streamflow_owner"}
    assert (definer, configured) == (True, ["search_path=pg_catalog, pg_temp"])


# --- retention --------------------------------------------------------------------------------------------------------


def keep_all_months(world: World) -> None:
    world.log(*(world.answer(1, answered_at=datetime(2024, month, 9, tzinfo=UTC)) for month in range(1, 7)))


def test_months_before_those_kept_are_dropped_whole(world: World) -> None:
    keep_all_months(world)
    now = datetime(2024, 6, 1, tzinfo=UTC)
    assert drop_old_months(world.database, None, now) == []
    assert drop_old_months(world.database, 3, now) == [Month(2024, 1), Month(2024, 2)]
    assert world.months() == ["2024-03", "2024-04", "2024-05", "2024-06"]
    assert drop_old_months(world.database, 3, now) == []


def test_now_is_taken_in_utc_and_the_current_month_is_never_dropped(world: World) -> None:
    keep_all_months(world)
    west = timezone(timedelta(hours=-5))
    assert drop_old_months(world.database, 1, datetime(2024, 5, 31, 20, tzinfo=west))[-1] == Month(2024, 4)
    assert world.months() == ["2024-05", "2024-06"]
    with pytest.raises(ConfigurationError, match="at least 1"):
        drop_old_months(world.database, 0, datetime(2024, 6, 1, tzinfo=UTC))


def test_a_reader_delays_retention_and_is_not_cut_off(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "DROP_WAIT_S", 0.1)
    keep_all_months(world)
    with world.database.connect() as reader:
        reader.execute("SELECT count(*) FROM predictions")
        with pytest.raises(WarehouseUnavailable, match="run `streamflow migrate` again"):
            drop_old_months(world.database, 1, datetime(2024, 6, 1, tzinfo=UTC))
    assert len(world.months()) == 6


# --- reading ----------------------------------------------------------------------------------------------------------


def test_what_was_logged_comes_back(world: World) -> None:
    first = world.answer(1, caller_request_id="a.b-c", answered_at=MARCH)
    second = world.answer(1, answered_at=MARCH + timedelta(days=40))
    world.log(first, second)
    assert logged_prediction(world.database, first.request_id) == first
    assert [one for chunk in logged_predictions(world.database) for one in chunk] == [first, second]
    assert list(logged_predictions(world.database, second.answered_at)) == [[second]]
    assert list(logged_predictions(world.database, second.answered_at + timedelta(microseconds=1))) == []
    with pytest.raises(UnknownPrediction, match=r"no request 00000000-0000-0000-0000-000000000000: .*spill"):
        logged_prediction(world.database, str(uuid.UUID(int=0)))


def test_reading_needs_no_more_memory_than_a_chunk(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "CHUNK_ROWS", 3)
    world.log(*(world.answer(1) for _ in range(8)))
    assert [len(chunk) for chunk in logged_predictions(world.database)] == [3, 3, 2]


# --- replay -----------------------------------------------------------------------------------------------------------


def test_a_prediction_replays_to_the_last_bit(world: World) -> None:
    world.register(1)
    answered = world.answer(1)
    world.log(answered)
    logged = Scored(answered.probability, answered.decision)
    assert replay(world.platform, answered.request_id) == Replayed(answered.request_id, True, logged, logged)


def test_the_last_bit_and_the_decision_count(world: World) -> None:
    world.register(1)
    right = world.answer(1)
    off = world.answer(1, probability=float(np.nextafter(right.probability, 1)))
    flipped = world.answer(1, decision=not right.decision)
    stricter = world.answer(1, threshold=float(np.nextafter(right.probability, 1)), decision=False)
    world.log(right, off, flipped, stricter)
    found = {one.request_id: one for one in replay_all(world.platform)}
    assert {name: one.identical for name, one in found.items()} == {
        right.request_id: True,
        off.request_id: False,
        flipped.request_id: False,
        stricter.request_id: True,
    }
    assert found[off.request_id].replayed == Scored(right.probability, right.decision)
    assert found[off.request_id].logged == Scored(off.probability, off.decision)


def test_features_are_taken_by_name(world: World) -> None:
    world.register(1)
    answered = world.answer(1)
    shuffled = msgspec.structs.replace(answered, features=dict(reversed(answered.features.items())))
    world.log(shuffled)
    assert replay(world.platform, answered.request_id).identical


def test_many_are_grouped_by_version_and_each_scorer_is_fetched_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "CHUNK_ROWS", 4)
    for version in (1, 2):
        world.register(version)
    answered = [world.answer(1 + number % 2, row(number)) for number in range(10)]
    world.log(*answered)
    calls: list[int] = []
    score = Scorer.score
    monkeypatch.setattr(Scorer, "score", lambda self, rows: calls.append(len(rows)) or score(self, rows))
    summary = summarize(replay_all(world.platform))
    assert (summary.count, summary.identical, summary.different, summary.not_replayable) == (10, 10, 0, 0)
    assert summary.named == []
    assert sorted(world.registry.fetched) == ["run-1", "run-2"]
    assert calls == [2, 2, 2, 2, 2, 2, 1, 1]  # the self-tests in between have 2 golden rows each


def test_since_leaves_the_older_ones_out(world: World) -> None:
    world.register(1)
    world.log(world.answer(1), world.answer(1, answered_at=MARCH + timedelta(hours=1)))
    assert summarize(replay_all(world.platform, MARCH + timedelta(minutes=1))).count == 1


def test_what_cannot_be_replayed_says_why_and_stops_nothing_else(world: World) -> None:
    world.register(1)
    world.register(2)
    world.register(3)
    del world.registry.artifacts["run-2"]
    world.registry.artifacts["run-3"] = artifact(1)
    good = world.answer(1)
    gone, altered, unknown = world.answer(2), world.answer(3), world.answer(4)
    other = world.answer(1, artifact_sha256="0" * 64)
    lacking = world.answer(1)
    lacking = msgspec.structs.replace(lacking, features=dict.fromkeys(list(lacking.features)[:3], 0))
    world.log(good, gone, altered, unknown, other, lacking)
    results = {one.request_id: one for one in replay_all(world.platform)}
    reasons = {name: one.problem for name, one in results.items()}
    assert results[good.request_id].identical
    assert str(reasons[gone.request_id]).startswith(
        "what version 2 answered cannot be replayed: MLflow has no scorer of run run-2"
    )
    assert "has SHA-256" in str(reasons[altered.request_id])
    assert "no version 4" in str(reasons[unknown.request_id])
    assert "was answered by a scorer with SHA-256 0000" in str(reasons[other.request_id])
    assert "no longer takes its features" in str(reasons[lacking.request_id])
    summary = summarize(results.values())
    assert (summary.count, summary.identical, summary.different, summary.not_replayable) == (6, 1, 0, 5)

    for prediction, error in ((gone, UnknownVersion), (altered, ArtifactRefused), (unknown, UnknownVersion)):
        with pytest.raises(error, match="cannot be replayed"):
            replay(world.platform, prediction.request_id)


def test_a_registry_that_is_away_is_no_finding(world: World) -> None:
    world.register(1)
    world.log(world.answer(1))
    world.registry.away = True
    with pytest.raises(RegistryUnavailable):
        summarize(replay_all(world.platform))


def test_a_summary_names_the_first(world: World) -> None:
    logged = Scored(0.5, True)
    results = [Replayed(str(number), number == 0, logged, Scored(0.25, False)) for number in range(30)]
    summary = summarize(results)
    assert (summary.count, summary.identical, summary.different) == (30, 1, 29)
    assert [one.request_id for one in summary.named] == [str(number) for number in range(1, 11)]


NUMBERS = {
    "float": st.floats(allow_nan=False, allow_infinity=False, min_value=-3e38, max_value=3e38)
    | st.sampled_from([-0.0, 5e-324, -2.2e-308, 1e16, 0.1 + 0.2, 29.85, 1e22, 123456789012345680.0]),
    "integer": st.integers(-(2**63), 2**63 - 1),
    "boolean": st.booleans(),
}
FEATURES = st.fixed_dictionaries(
    {one.name: st.sampled_from(one.categories) if one.categories else NUMBERS[one.kind] for one in COLUMNS}
).map(lambda drawn: {one.name: drawn[one.name] for one in COLUMNS})
NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
ANYTHING = st.dictionaries(NAMES, st.one_of(*NUMBERS.values(), NAMES), max_size=8)


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(FEATURES, min_size=1, max_size=20))
def test_any_features_replay_to_the_last_bit(template: Database, rows: list[dict[str, Any]]) -> None:
    world = World(template)
    scorer = Scorer.from_bytes(artifact(7))
    probabilities = scorer.score([list(features.values()) for features in rows]).tolist()
    answered = [
        world.answer(7, features, probability=probability, decision=probability >= 0.5)
        for features, probability in zip(rows, probabilities, strict=True)
    ]
    world.log(*answered)
    for one in answered:
        back = logged_prediction(template, one.request_id)
        assert list(map(bits, back.features.values())) == list(map(bits, one.features.values()))
        (again,) = predictions._replayed(scorer, [back])
        assert again.identical


@settings(max_examples=60, deadline=None)
@given(features=ANYTHING)
def test_any_value_comes_back_as_it_was(template: Database, features: dict[str, Any]) -> None:
    world = World(template)
    answered = world.answer(7, row(1))
    answered = msgspec.structs.replace(answered, features=features)
    world.log(answered)
    back = logged_prediction(template, answered.request_id).features
    assert {name: bits(value) for name, value in back.items()} == {n: bits(v) for n, v in features.items()}


def test_the_document_is_what_json_says(world: World) -> None:
    """Not only our own decoder reads it."""
    answered = world.answer(1)
    world.log(answered)
    with world.database.connect() as connection:
        (text,) = connection.execute("SELECT features::text FROM predictions").fetchone() or ("",)
    assert json.loads(text) == answered.features
