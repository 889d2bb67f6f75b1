"""What is known when it is decided whether to train again: read from tables filled as the platform fills them."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest
from governed import evidence
from psycopg.types.json import Jsonb

from streamflow import drift, gates, loop, monitoring
from streamflow.contract import Column
from streamflow.database import Database
from streamflow.decay import Finding
from streamflow.errors import ConfigurationError
from streamflow.months import Month
from streamflow.promotion import Ledger, Version
from streamflow.relations import MonthWrite
from streamflow.retraining import Correction, Drift, Performance, Production, Retraining, Situation
from streamflow.situation import MOST_ATTEMPTS, QUERY
from streamflow.warehouse import migrate, record

JANUARY, FEBRUARY, MARCH = Month.parse_range("2024-01..2024-03")
BEGAN = datetime(2024, 2, 2, 9, tzinfo=UTC)
QUIET = Finding(False, 0.1, 0.2, "as promised")
WORSE = Finding(True, 0.3, 0.2, "worse by 0.3")


@dataclass
class World:
    """What is in the database, written as the platform writes it."""

    database: Database
    rows: int = 0

    def later(self) -> datetime:
        self.rows += 1
        return BEGAN + timedelta(hours=self.rows)

    def execute(self, query: str, *parameters: Any) -> None:
        with self.database.connect() as connection:
            connection.execute(query, parameters)

    def register(self, number: int, **lineage: Any) -> None:
        scorer = (0.5, "scorer.bin", "a")
        about = (FEBRUARY.as_of, "churn_v1", *scorer, "d", "p", evidence(), lineage, BEGAN)
        version = Version(number, f"run-{number}", *about)
        Ledger(self.database, None).register(version)  # type: ignore[arg-type]

    def decide(self, action: str, version: int, *, better: bool | None = None) -> None:
        judged = [] if better is None else [{"name": gates.BETTER, "passed": better}]
        self.execute(
            "INSERT INTO streamflow.promotion_ledger (at, action, version, by, reason, policy, override, gates) "
            "VALUES (%s, %s, %s, 'policy', 'r', 'auto', false, %s)",
            *(self.later(), action, version, Jsonb(judged)),
        )

    def dataset(self, month: Month, digest: str) -> None:
        with self.database.connect() as connection:
            record(connection, MonthWrite("training_dataset", month, 1, digest, 10, {}, BEGAN, {}))

    def attempt(self, cause: str, month: Month, failure: str | None = None) -> None:
        self.execute(
            "INSERT INTO streamflow.retraining_attempts (cause, month, reason, by, at, failure) "
            "VALUES (%s, %s, 'why', 'sensor', %s, %s)",
            *(cause, str(month), self.later(), failure),
        )

    def report(self, kind: str, month: Month, version: int, content: object) -> None:
        self.execute(
            "INSERT INTO streamflow.reports (kind, month, model_version, digest, content, made_at) "
            "VALUES (%s, %s, %s, 'd', %s, %s)",
            *(kind, str(month), version, msgspec.json.encode(msgspec.to_builtins(content)).decode(), self.later()),
        )

    def performance(self, month: Month, version: int, **found: Finding) -> None:
        names = ("worse_than_promised", "no_better_than_chance", "worse_calibrated", "sliding")
        findings = dict.fromkeys(names, QUIET) | found
        self.report("performance_report", month, version, {"month": str(month), "version": version, **findings})

    def known(self, newest: Month | None) -> Situation:
        return loop.known(self.database).situation(newest)


@pytest.fixture
def world(new_database: Callable[[], Database]) -> World:
    database = new_database()
    migrate(database)
    return World(database)


def of_month(month: Month, digest: str) -> dict[str, Any]:
    return {"month": str(month), "dataset": {"digest": digest}}


def test_of_an_empty_platform_nothing_is_known(world: World) -> None:
    assert world.known(None) == Situation(None, None, None, None, (), ())
    assert world.known(JANUARY) == Situation(JANUARY, None, None, None, (), ())


def test_production_is_what_the_ledger_says_with_the_months_it_learned_from(world: World) -> None:
    world.register(1, window=["2024-01"])
    world.register(2, window=["2024-02", "2024-01"])
    world.register(3)
    world.decide("promote", 1)
    world.decide("promote", 2)
    world.decide("wait", 3)
    assert world.known(None).production == Production(2, (JANUARY, FEBRUARY))
    world.decide("rollback", 1)
    world.decide("flag", 2)
    assert world.known(None).production == Production(1, (JANUARY,))
    world.decide("promote", 3)
    assert world.known(None).production == Production(3, (FEBRUARY,)), "without a window, the month of its as_of"


def test_a_month_of_productions_window_with_another_dataset_now_is_corrected(world: World) -> None:
    earlier = [of_month(JANUARY, "january"), of_month(JANUARY.shift(-1), "unused")]
    world.register(1, **of_month(FEBRUARY, "february"), earlier=earlier, window=["2024-01", "2024-02"])
    world.dataset(FEBRUARY, "february")
    world.dataset(JANUARY.shift(-1), "unused but corrected")
    assert world.known(None).corrected == ()
    world.decide("promote", 1)
    assert world.known(None).corrected == (), "January's dataset is gone: nothing to learn from instead"
    world.dataset(JANUARY, "january, corrected")
    assert world.known(None).corrected == (Correction(JANUARY, "january, corrected"),)
    world.dataset(FEBRUARY, "february, corrected")
    assert [one.month for one in world.known(None).corrected] == [JANUARY, FEBRUARY]


def test_the_performance_report_in_force_of_the_newest_month_counts(world: World) -> None:
    world.register(1)
    world.performance(JANUARY, 1, sliding=WORSE)
    world.performance(FEBRUARY, 1, worse_than_promised=WORSE)
    world.performance(FEBRUARY, 1, worse_calibrated=WORSE)
    newest = world.known(FEBRUARY).performance
    assert isinstance(newest, Performance)
    assert (newest.month, newest.version, newest.decayed) == ("2024-02", 1, False)
    assert (newest.worse_calibrated.found, newest.worse_calibrated.reason) == (True, "worse by 0.3")
    january = world.known(JANUARY).performance
    assert january is not None
    assert january.sliding.found
    assert world.known(MARCH).performance is None
    assert world.known(None).performance is None


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.2, 20.0])
def test_the_drift_report_of_the_newest_month_is_read_as_it_was_made(world: World, shift: float) -> None:
    world.register(1)
    random = np.random.default_rng(5)
    users, hours, scores = 2_000, random.normal(25, 5, 2_000), np.linspace(0.1, 0.9, 2_000)
    frames = [
        pd.DataFrame({"hours": hours + by, "stalls": np.arange(users) % 7 + (by > 5), "fee": hours})
        for by in (0.0, shift)
    ]
    columns = [Column(name, "float", name) for name in ("hours", "stalls", "fee")]
    found = drift.compare(*frames, columns, reference_scores=scores, current_scores=scores * (1 - shift / 40))
    world.report("drift_report", JANUARY, 1, {"report": "of an older month"})
    world.report("drift_report", MARCH, 1, {"report": "replaced"})
    world.report("drift_report", MARCH, 1, monitoring.DriftContent("2024-03", 1, "2024-01", found))
    assert world.known(JANUARY).drift == Drift(
        MARCH,
        1,
        found.drifted("none"),
        found.drifted("moderate"),
        found.drifted("large"),
        found.score.size if found.score.significant else "none",
    )


def test_retrainings_that_are_over_are_known_with_what_came_of_them(world: World) -> None:
    for cause, version, decisions in (
        ("no_model:2024-01", 1, [("promote", None)]),
        ("decay:2024-02:version 1", 2, [("refuse", False)]),
        ("slide:2024-02:version 1", 3, [("wait", True)]),
        ("drift:2024-02:version 1", 4, [("wait", True), ("promote", False), ("rollback", None)]),
        ("corrected_data:x:version 1", 5, []),
    ):
        world.attempt(cause, FEBRUARY)
        world.register(version, cause=cause)
        for action, better in decisions:
            world.decide(action, version, better=better)
    world.attempt("killed", MARCH)
    world.attempt("failed", MARCH)
    world.attempt("failed", MARCH, "ValueError: no luck")
    assert world.known(MARCH).past == (
        Retraining(FEBRUARY, "no_model:2024-01", True, True),
        Retraining(FEBRUARY, "decay:2024-02:version 1", False, False),
        Retraining(FEBRUARY, "slide:2024-02:version 1", False, True),
        Retraining(FEBRUARY, "drift:2024-02:version 1", True, False),
        Retraining(FEBRUARY, "corrected_data:x:version 1", False, None),
        Retraining(MARCH, "failed", False, None),
    )
    for _ in range(MOST_ATTEMPTS - 1):
        world.attempt("killed", MARCH)
    assert [one.cause for one in world.known(MARCH).past][-2:] == ["killed", "failed"]
    assert loop.attempt(world.database, "killed") == MOST_ATTEMPTS + 1


@pytest.mark.parametrize("kind", [monitoring.DRIFT_REPORT, monitoring.PERFORMANCE_REPORT])
def test_a_report_of_another_version_of_this_program_is_named(world: World, kind: str) -> None:
    world.register(1)
    world.report(kind, FEBRUARY, 1, {})
    says = rf"the {kind} of 2024-02 was made by another version of StreamFlow .*run: streamflow run 2024-02$"
    with pytest.raises(ConfigurationError, match=says):
        world.known(FEBRUARY)


def test_the_names_that_are_spelt_in_the_query_are_the_cores() -> None:
    """gates.py needs pandas, which the service does without."""
    assert f"'{gates.BETTER}'" in QUERY
