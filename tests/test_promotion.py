import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import mlflow
import psycopg
import pytest
from governed import POLICY, around, comparison, comparisons, evidence, evidences, gap, policy
from hypothesis import given
from hypothesis import strategies as st

from streamflow import warehouse
from streamflow.database import Database
from streamflow.errors import (
    ArtifactRefused,
    PromotionRefused,
    RegistryUnavailable,
    TrainingRefused,
    UnknownVersion,
    WarehouseUnavailable,
)
from streamflow.evaluation import Comparison, Interval
from streamflow.gates import RELATIVE, Candidate, Evidence, Gate, Incomparable, absolute_gates
from streamflow.policy import Policy
from streamflow.promotion import (
    BY_HAND,
    Entry,
    Ledger,
    Version,
    current,
    decide,
    decision_in_force,
    gates_of,
    in_force,
    predecessor,
    production_at,
    until,
)
from streamflow.registry import ALIAS, ARCHIVED, MODEL, NO_STAGE, PRODUCTION, STAGING, Registry
from streamflow.settings import Settings

NOW = datetime(2024, 2, 3, 4, 5, tzinfo=UTC)
MANUAL = POLICY
AUTO = policy(mode="auto", first_model="wait")
PATIENT = policy(first_model="wait")
FLAGGING = policy(stage_set_by_hand="flag")
GOOD = evidence()
SPOILT = evidence(flipped_decisions=3)
BETTER = comparison()
WORSE = comparison(around(-0.03))


def version(number: int, found: Evidence = GOOD) -> Version:
    return Version(
        version=number,
        run_id=f"run-{number}",
        as_of=date(2024, 1, 31),
        service="churn_v1",
        threshold=0.5,
        artifact_path="scorer/scorer.bin",
        artifact_sha256="a" * 64,
        dataset_digest="d" * 64,
        predictions_digest="p" * 64,
        evidence=found,
        lineage={"month": "2024-01"},
        registered_at=NOW,
    )


# --- decisions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "production", "by", "promote", "reason"),
    [
        (GOOD, None, MANUAL, True, "policy first_model: nothing is in Production and every gate passed"),
        (GOOD, None, PATIENT, False, "policy manual: every gate passed; waits for `streamflow promote 2 --by NAME"),
        (GOOD, None, AUTO, True, "policy auto: every gate passed"),
        (GOOD, None, policy(mode="auto"), True, "policy auto: every gate passed"),
        (GOOD, BETTER, MANUAL, False, "policy manual: every gate passed; waits for `streamflow promote 2 --by NAME"),
        (GOOD, BETTER, PATIENT, False, "waits for `streamflow promote 2"),
        (GOOD, BETTER, AUTO, True, "policy auto: every gate passed"),
        (SPOILT, None, MANUAL, False, "1 of 14 gates failed: no_decision_flips"),
        (SPOILT, None, AUTO, False, "1 of 14 gates failed: no_decision_flips"),
        (SPOILT, BETTER, AUTO, False, "1 of 16 gates failed: no_decision_flips"),
        (GOOD, WORSE, MANUAL, False, "1 of 16 gates failed: better_than_production"),
        (GOOD, WORSE, AUTO, False, "1 of 16 gates failed: better_than_production"),
        (
            GOOD,
            Incomparable("gone"),
            AUTO,
            False,
            "2 of 16 gates failed: better_than_production, no_segment_gets_worse",
        ),
    ],
)
def test_decisions(
    found: Evidence, production: Comparison | Incomparable | None, by: Policy, promote: bool, reason: str
) -> None:
    decision = decide(Candidate(2, found, ()), production, by)

    assert decision.promote is promote
    assert decision.reason.startswith(reason) or reason in decision.reason
    assert len(decision.gates) == (14 if production is None else 16)
    assert decision.failed == tuple(gate for gate in decision.gates if not gate.passed)


def test_a_bug_fix_need_not_be_better() -> None:
    same = comparison(Interval(0.0, -0.005, 0.005))
    assert not decide(Candidate(2, GOOD, ()), same, AUTO).promote
    assert decide(Candidate(2, GOOD, (), bug_fix=True), same, AUTO).promote


def test_earlier_versions_count_for_a_slide() -> None:
    history = tuple(evidence(auc=0.8, train_auc=0.8 + gap) for gap in (0.01, 0.05))
    sliding = evidence(auc=0.8, train_auc=0.9)
    assert decide(Candidate(3, sliding, ()), None, AUTO).promote
    assert decide(Candidate(3, sliding, history), None, AUTO).reason.endswith("failed: does_not_slide")


@given(
    found=evidences(),
    history=st.lists(evidences(), max_size=2).map(tuple),
    production=st.one_of(st.none(), st.just(Incomparable("gone")), comparisons),
    mode=st.sampled_from(["manual", "auto"]),
    first=st.sampled_from(["promote", "wait"]),
    bug_fix=st.booleans(),
)
def test_nothing_is_promoted_with_a_failed_gate(
    found: Evidence,
    history: tuple[Evidence, ...],
    production: Comparison | Incomparable | None,
    mode: str,
    first: str,
    bug_fix: bool,
) -> None:
    by = policy(mode=mode, first_model=first)
    decision = decide(Candidate(2, found, history, bug_fix), production, by)

    assert decision.gates[:14] == absolute_gates(found, history, by)
    assert not (decision.promote and decision.failed)
    wanted = mode == "auto" or (production is None and first == "promote")
    assert decision.promote == (wanted and not decision.failed)
    assert decision.is_fit == all(gate.passed for gate in decision.gates if gate.name not in RELATIVE)


# --- reading the ledger -------------------------------------------------------------------------------------------


def entry(action: Any, number: int, previous: int | None = None) -> Entry:
    return Entry(NOW, action, number, previous, "anna", "because", "manual", override=False, gates=())


@pytest.mark.parametrize(
    ("steps", "production", "before"),
    [
        ([], None, None),
        ([("refuse", 1)], None, None),
        ([("promote", 1)], 1, None),
        ([("promote", 1), ("refuse", 2)], 1, None),
        ([("wait", 1), ("flag", 9)], None, None),
        ([("promote", 1), ("wait", 2), ("threshold", 2), ("flag", 9)], 1, None),
        ([("promote", 1), ("promote", 2)], 2, 1),
        ([("promote", 1), ("promote", 2), ("promote", 3), ("rollback", 2)], 2, 1),
        ([("promote", 1), ("promote", 2), ("promote", 3), ("rollback", 2), ("rollback", 1)], 1, None),
        ([("promote", 1), ("promote", 2), ("promote", 3), ("rollback", 1)], 1, None),
        ([("promote", 1), ("promote", 2), ("rollback", 1), ("promote", 3)], 3, 1),
        ([("promote", 1), ("promote", 2), ("rollback", 1), ("rollback", 2)], 2, 1),
        ([("promote", 1), ("promote", 2), ("promote", 1), ("rollback", 2)], 2, 1),
    ],
)
def test_production_and_its_predecessor(
    steps: list[tuple[str, int]], production: int | None, before: int | None
) -> None:
    entries = [entry(action, number) for action, number in steps]

    assert current(entries) == production
    assert predecessor(entries) == before


Step = tuple[str, int]
OTHERS = ("wait", "refuse", "threshold", "flag")
steps = st.lists(st.tuples(st.sampled_from(["promote", "rollback", *OTHERS]), st.integers(1, 5)), max_size=30)


def ledger_of(requests: list[Step]) -> list[Entry]:
    """What `Ledger` would have written: no promotion of what is Production, rollbacks to the predecessor."""
    entries: list[Entry] = []
    for action, number in requests:
        if action == "rollback":
            target = predecessor(entries)
            if target is not None:
                entries.append(entry("rollback", target, current(entries)))
        elif action in OTHERS or number != current(entries):
            entries.append(entry(action, number, current(entries)))
    return entries


@given(steps)
def test_rollbacks_walk_back_along_the_promotions_that_still_stand(requests: list[Step]) -> None:
    standing: list[int] = []
    for made in ledger_of(requests):
        if made.action == "promote":
            standing.append(made.version)
        elif made.action == "rollback":
            standing.pop()

    entries = ledger_of(requests)
    assert current(entries) == (standing[-1] if standing else None)
    for expected in reversed(standing[:-1]):
        assert predecessor(entries) == expected
        entries.append(entry("rollback", expected, current(entries)))
        assert current(entries) == expected
    assert predecessor(entries) is None


@given(steps)
def test_nothing_else_changes_what_is_production(requests: list[Step]) -> None:
    entries = ledger_of(requests)
    without = [made for made in entries if made.action not in OTHERS]

    assert current(entries) == current(without)
    assert predecessor(entries) == predecessor(without)


@given(steps, st.integers(1, 5))
def test_a_promotion_is_undone_by_a_rollback(requests: list[Step], number: int) -> None:
    entries = ledger_of(requests)
    before = current(entries)
    if before is not None and number != before:
        assert predecessor([*entries, entry("promote", number, before)]) == before


@given(steps, st.data())
def test_what_was_production_at_a_moment_is_what_was_decided_by_then(requests: list[Step], data: st.DataObject) -> None:
    minutes = sorted(data.draw(st.lists(st.integers(0, 20), min_size=len(requests), max_size=len(requests))))
    made = ledger_of(requests)
    entries = [replace(one, at=NOW + timedelta(minutes=minute)) for one, minute in zip(made, minutes, strict=False)]

    assert production_at(entries, NOW - timedelta(seconds=1)) is None
    for at in range(21):
        moment = NOW + timedelta(minutes=at)
        seen = [one for one in entries if one.at <= moment]
        assert until(entries, moment) == seen
        assert production_at(entries, moment) == current(seen)
    assert production_at(entries, NOW + timedelta(days=1)) == current(entries)


def test_the_decision_in_force_is_the_newest_that_made_a_production() -> None:
    first, second = entry("promote", 1), entry("promote", 2, 1)
    later = [entry("wait", 3, 2), entry("threshold", 2, 2), entry("flag", 9, 2), entry("refuse", 1, 2)]
    assert decision_in_force([]) is None
    assert decision_in_force([first, second, *later]) == second
    back = entry("rollback", 1, 2)
    assert decision_in_force([first, second, *later, back]) == back


def test_the_threshold_in_force_is_the_newest_that_was_decided_for_the_version() -> None:
    changes = [
        replace(entry("threshold", number), threshold=value, evidence=evidence(flipped_decisions=number))
        for number, value in [(1, 0.3), (2, 0.6), (1, 0.4)]
    ]
    assert in_force([], version(1)) == version(1)
    assert in_force([entry("promote", 1)], version(1)) == version(1)
    assert [in_force(changes[:count], version(1)).threshold for count in range(4)] == [0.5, 0.3, 0.3, 0.4]
    assert in_force(changes, version(2)) == replace(version(2), threshold=0.6, evidence=changes[1].evidence)
    assert in_force(changes, version(3)) == version(3)


def test_the_gates_of_a_version_are_those_of_its_newest_judgement() -> None:
    old, new = (Gate("fair", passed, 0.1, 0.2, "") for passed in (False, True))
    rows = [
        replace(entry("refuse", 1), gates=(old,)),
        replace(entry("promote", 1), gates=(new,)),
        entry("threshold", 1),
    ]
    assert gates_of(rows, 1) == (new,)
    assert gates_of(rows[:1], 1) == (old,)
    assert gates_of(rows, 2) == ()


# --- the ledger in PostgreSQL, with MLflow behind it --------------------------------------------------------------

APPEND_ONLY = ("model_versions", "promotion_ledger")


@pytest.fixture(scope="module")
def prepared(database: Database) -> Database:
    warehouse.migrate(database)
    return database


@pytest.fixture(scope="module")
def registry(prepared: Database, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return Registry(Settings(home=tmp_path_factory.mktemp("home")), prepared)


@pytest.fixture
def client(registry: Registry) -> mlflow.MlflowClient:
    """Somebody's hand in MLflow."""
    return mlflow.MlflowClient(registry.uri, registry.uri)


@pytest.fixture
def ledger(prepared: Database, registry: Registry, client: mlflow.MlflowClient) -> Iterator[Ledger]:
    """A ledger with versions 1 to 3, nothing promoted yet, in MLflow as well."""
    client.create_registered_model(MODEL)
    made = Ledger(prepared, registry)
    for number in (1, 2, 3):
        client.create_model_version(MODEL, source=f"/nowhere/{number}", run_id=f"run-{number}")
        made.register(version(number))
    yield made
    client.delete_registered_model(MODEL)
    with prepared.connect(owner=True) as connection:
        for table in (*APPEND_ONLY, "reports"):
            connection.execute(f"ALTER TABLE streamflow.{table} DISABLE TRIGGER append_only")
        connection.execute(
            "TRUNCATE streamflow.model_versions, streamflow.promotion_ledger, streamflow.stages_followed "
            "RESTART IDENTITY CASCADE"
        )
        for table in (*APPEND_ONLY, "reports"):
            connection.execute(f"ALTER TABLE streamflow.{table} ENABLE TRIGGER append_only")


def better(candidate: Version, production: Version) -> Comparison:
    """As `pipeline.compare_versions`, always in favour of the candidate."""
    assert candidate.version != production.version
    return BETTER


def worse(candidate: Version, production: Version) -> Comparison:
    return WORSE


def fails_with(failure: Exception) -> Callable[..., Any]:
    def fail(*_: object) -> None:
        raise failure

    return fail


def promote(ledger: Ledger, number: int, **more: Any) -> Entry:
    given = {"by": "anna", "reason": "better", "now": NOW, "policy": MANUAL, "compare": better}
    return ledger.promote(number, **{**given, **more})


def rollback(ledger: Ledger, number: int | None = None, **more: Any) -> Entry:
    return ledger.rollback(number, **{"by": "ben", "reason": "worse", "now": NOW, "policy": MANUAL, **more})


def as_good(version: Version, threshold: float) -> Evidence:
    return evidence(parity_rows=round(100 * threshold))


def set_threshold(ledger: Ledger, number: int, value: float, **more: Any) -> Entry:
    given = {"by": "dora", "reason": "capacity", "now": NOW, "policy": MANUAL, "remeasure": as_good}
    return ledger.set_threshold(number, value, **{**given, **more})


def apply_policy(ledger: Ledger, number: int, by: Policy, **more: Any) -> bool:
    given = {"now": NOW, "policy": by, "compare": better}
    return ledger.apply_policy(ledger.version(number), **{**given, **more}).promote


def judged(found: Evidence, production: Comparison | None, history: tuple[Evidence, ...] = ()) -> tuple[Gate, ...]:
    return decide(Candidate(0, found, history), production, MANUAL).gates


def stages(registry: Registry) -> dict[int, str]:
    return {number: one.stage for number, one in registry.versions().items()}


def aliased(registry: Registry) -> list[int]:
    return [number for number, one in registry.versions().items() if one.has_alias]


def told(entries: list[Entry]) -> list[tuple[str, int, int | None, str]]:
    return [(one.action, one.version, one.previous, one.by) for one in entries]


@pytest.fixture
def spoilt(ledger: Ledger, client: mlflow.MlflowClient) -> int:
    """A fourth version, which fails a gate."""
    number = int(client.create_model_version(MODEL, source="/nowhere/4", run_id="run-4").version)
    ledger.register(version(number, SPOILT))
    return number


def test_versions_come_back_as_they_were_registered(ledger: Ledger, spoilt: int) -> None:
    assert ledger.versions() == [version(1), version(2), version(3), version(spoilt, SPOILT)]
    assert ledger.version(2) == version(2)
    assert ledger.version(2).metrics == {"auc": 0.84, "logloss": 0.42, "ece": 0.02, "f1": 0.6}
    assert ledger.version_of_run("run-3") == version(3)
    assert ledger.version_of_run("run-9") is None
    assert ledger.production() is None


def test_evidence_that_is_no_number_is_not_recorded(ledger: Ledger) -> None:
    with pytest.raises(psycopg.errors.InvalidTextRepresentation):
        ledger.register(version(4, evidence(scoring_microseconds=float("nan"))))
    assert len(ledger.versions()) == 3


def test_a_promotion_is_in_the_ledger_and_mlflow_follows(ledger: Ledger, registry: Registry) -> None:
    first = promote(ledger, 1)
    second = promote(ledger, 2, by="carl", reason="fresher")

    assert first == Entry(NOW, "promote", 1, None, "anna", "better", "manual", False, judged(GOOD, None))
    gates = judged(GOOD, BETTER, (GOOD,))
    assert second == Entry(NOW, "promote", 2, 1, "carl", "fresher", "manual", False, gates)
    assert [len(one.gates) for one in (first, second)] == [14, 16]
    assert ledger.entries() == [first, second]
    assert ledger.production() == 2
    assert stages(registry) == {1: ARCHIVED, 2: PRODUCTION, 3: NO_STAGE}
    assert aliased(registry) == [2]


def test_a_candidate_is_held_against_what_is_production_then_with_nobody_else_deciding(
    ledger: Ledger, prepared: Database
) -> None:
    seen = []

    def compare(candidate: Version, production: Version) -> Comparison:
        with prepared.connect() as connection:
            free = connection.execute("SELECT pg_try_advisory_lock(hashtextextended('streamflow promotion', 0))")
            seen.append((candidate.version, production.version, free.fetchone()))
        return BETTER

    for number in (1, 2, 3):
        promote(ledger, number, compare=compare)
    assert seen == [(2, 1, (False,)), (3, 2, (False,))]


def test_promoting_what_is_production_is_refused_without_a_record(ledger: Ledger) -> None:
    promote(ledger, 1)
    with pytest.raises(PromotionRefused, match="version 1 is in Production already"):
        promote(ledger, 1)
    assert len(ledger.entries()) == 1


def test_an_unknown_version_is_named_with_the_known_ones(ledger: Ledger) -> None:
    promote(ledger, 1)
    for attempt in (promote, rollback, lambda ledger, number: set_threshold(ledger, number, 0.4)):
        with pytest.raises(UnknownVersion, match="there is no version 77; registered are: 1, 2, 3"):
            attempt(ledger, 77)
    assert len(ledger.entries()) == 1


def test_a_version_deleted_in_mlflow_does_not_become_production(ledger: Ledger, registry: Registry) -> None:
    registry.delete(2)
    gone = "version 2 was deleted in MLflow; it cannot become Production any more"
    with pytest.raises(UnknownVersion, match=gone):
        promote(ledger, 2)
    with pytest.raises(UnknownVersion, match=gone):
        apply_policy(ledger, 2, AUTO)
    assert ledger.entries() == []

    promote(ledger, 1)
    promote(ledger, 3)
    registry.delete(1)
    for number in (None, 1):
        with pytest.raises(UnknownVersion, match="version 1 was deleted in MLflow"):
            rollback(ledger, number)
    assert len(ledger.entries()) == 2
    assert stages(registry) == {3: PRODUCTION}


def test_a_production_that_was_deleted_in_mlflow_does_not_stop_the_next(ledger: Ledger, registry: Registry) -> None:
    promote(ledger, 1)
    registry.delete(1)
    assert promote(ledger, 2).previous == 1
    assert stages(registry) == {2: PRODUCTION, 3: NO_STAGE}


def test_a_failed_gate_is_refused_and_recorded_and_an_override_is_recorded(
    ledger: Ledger, registry: Registry, spoilt: int
) -> None:
    promote(ledger, 1)

    with pytest.raises(PromotionRefused) as refusal:
        promote(ledger, spoilt, compare=worse, reason="I like it")
    assert str(refusal.value).splitlines() == [
        f"version {spoilt}: 2 of 16 gates failed: no_decision_flips, better_than_production; "
        "--override promotes it all the same, --bug-fix asks only that it is not worse",
        "  no_decision_flips: 3 of 7,043 rows are decided otherwise by the compiled scorer, none allowed",
        "  better_than_production: AUC minus Production's, of the same 1,783 held-out users, is "
        "-0.0300 (95 % interval -0.0500 to -0.0100); the lower end must exceed 0",
    ]
    assert ledger.production() == 1
    assert stages(registry)[1] == PRODUCTION
    refused = ledger.entries()[-1]
    assert (refused.action, refused.version, refused.previous, refused.by) == ("refuse", spoilt, 1, "anna")
    assert (refused.override, refused.gates) == (False, judged(SPOILT, WORSE, (GOOD,) * 3))
    assert refused.reason == "2 of 16 gates failed: no_decision_flips, better_than_production; asked for: I like it"

    promoted = promote(ledger, spoilt, compare=worse, override=True)
    assert (promoted.action, promoted.override, promoted.gates) == ("promote", True, refused.gates)
    assert ledger.entries()[-1] == promoted
    assert ledger.production() == spoilt


def test_a_bug_fix_is_promoted_when_it_is_not_worse(ledger: Ledger) -> None:
    def same(candidate: Version, production: Version) -> Comparison:
        return comparison(Interval(0.0, -0.005, 0.005))

    promote(ledger, 1)
    with pytest.raises(PromotionRefused, match="better_than_production"):
        promote(ledger, 2, compare=same)
    fixed = promote(ledger, 2, compare=same, bug_fix=True)
    assert [gate.bound for gate in fixed.gates if gate.name == "better_than_production"] == [-0.01]


def test_the_policy_of_the_moment_counts(ledger: Ledger) -> None:
    strict = policy(minimum_auc=0.83)
    with pytest.raises(PromotionRefused, match="ranks_better_than_chance"):
        promote(ledger, 1, policy=strict)
    promote(ledger, 1)


def test_what_cannot_be_compared_takes_an_override(ledger: Ledger) -> None:
    promote(ledger, 1)
    for lost in (ArtifactRefused("its scorer is gone"), TrainingRefused("its dataset is gone")):
        with pytest.raises(PromotionRefused, match=f"cannot be held against Production: {lost}") as refusal:
            promote(ledger, 2, compare=fails_with(lost))
        assert "--bug-fix" not in str(refusal.value)
    entry = promote(ledger, 2, compare=fails_with(lost), override=True)
    assert [gate.name for gate in entry.gates if not gate.passed] == list(RELATIVE)


@pytest.mark.parametrize("failure", [RegistryUnavailable("MLflow is away"), WarehouseUnavailable("PostgreSQL is away")])
def test_what_cannot_be_compared_now_is_no_refusal(ledger: Ledger, failure: Exception) -> None:
    promote(ledger, 1)
    before = ledger.entries()
    for attempt in (promote, lambda ledger, number, **more: apply_policy(ledger, number, AUTO, **more)):
        with pytest.raises(type(failure), match="is away"):
            attempt(ledger, 2, compare=fails_with(failure))
    assert ledger.entries() == before


@pytest.mark.parametrize("nothing", ["", "  "])
@pytest.mark.parametrize("field", ["by", "reason"])
def test_nobody_decides_without_name_and_reason(ledger: Ledger, field: str, nothing: str) -> None:
    promote(ledger, 1)
    promote(ledger, 2)
    for attempt in (
        lambda **more: promote(ledger, 3, **more),
        lambda **more: rollback(ledger, **more),
        lambda **more: set_threshold(ledger, 2, 0.4, **more),
    ):
        with pytest.raises(PromotionRefused, match="--by NAME --reason TEXT"):
            attempt(**{field: nothing})
    assert len(ledger.entries()) == 2


@pytest.mark.parametrize("name", ["policy", "mlflow"])
def test_nobody_decides_in_the_name_of_the_platform(ledger: Ledger, name: str) -> None:
    with pytest.raises(PromotionRefused, match=f"'{name}' is a name that the ledger uses itself"):
        promote(ledger, 1, by=name)
    assert ledger.entries() == []


def test_times_of_the_ledger_do_not_go_back(ledger: Ledger) -> None:
    """Whoever waits for the lock has asked the clock before; what counts is the order of the decisions."""
    later = NOW + timedelta(minutes=5)
    assert promote(ledger, 1, now=later).at == later
    assert promote(ledger, 2, now=NOW).at == later
    assert set_threshold(ledger, 2, 0.4, now=later + timedelta(minutes=1)).at == later + timedelta(minutes=1)
    entries = ledger.entries()
    assert [one.at for one in entries] == [later, later, later + timedelta(minutes=1)]
    assert [production_at(entries, at) for at in (NOW, later)] == [None, 2]


def test_rollbacks_go_back_step_by_step_until_there_is_no_predecessor(ledger: Ledger, registry: Registry) -> None:
    for number in (1, 2, 3):
        promote(ledger, number)

    gates = judged(GOOD, None, (GOOD,))
    assert rollback(ledger) == Entry(NOW, "rollback", 2, 3, "ben", "worse", "manual", False, gates)
    assert stages(registry) == {1: ARCHIVED, 2: PRODUCTION, 3: ARCHIVED}
    assert rollback(ledger).version == 1
    with pytest.raises(PromotionRefused, match="version 1 is the first in Production; it has no predecessor"):
        rollback(ledger)
    assert stages(registry) == {1: PRODUCTION, 2: ARCHIVED, 3: ARCHIVED}
    assert aliased(registry) == [1]
    assert rollback(ledger, 3).previous == 1
    assert ledger.production() == 3


def test_a_failed_gate_does_not_stop_a_rollback(ledger: Ledger, spoilt: int) -> None:
    promote(ledger, spoilt, override=True)
    promote(ledger, 1)
    entry = rollback(ledger)
    assert (entry.version, [gate.name for gate in entry.gates if not gate.passed]) == (spoilt, ["no_decision_flips"])


def test_rollbacks_that_are_refused_leave_no_record(ledger: Ledger) -> None:
    with pytest.raises(PromotionRefused, match="nothing is in Production"):
        rollback(ledger)
    promote(ledger, 1)
    set_threshold(ledger, 3, 0.4)
    with pytest.raises(PromotionRefused, match="version 3 was never in Production; promote it instead"):
        rollback(ledger, 3)
    with pytest.raises(PromotionRefused, match="version 1 is in Production already"):
        rollback(ledger, 1)
    assert len(ledger.entries()) == 2


def test_a_refusal_does_not_count_as_having_been_in_production(ledger: Ledger, spoilt: int) -> None:
    promote(ledger, 1)
    with pytest.raises(PromotionRefused):
        promote(ledger, spoilt)
    with pytest.raises(PromotionRefused, match="never in Production"):
        rollback(ledger, spoilt)


# --- thresholds ---------------------------------------------------------------------------------------------------


def test_a_threshold_is_decided_and_recorded(ledger: Ledger, registry: Registry) -> None:
    promote(ledger, 1)
    entry = set_threshold(ledger, 1, 0.3)
    other = set_threshold(ledger, 2, 0.7)

    seen = evidence(parity_rows=30)
    gates = absolute_gates(seen, (), MANUAL)
    assert entry == Entry(NOW, "threshold", 1, 1, "dora", "capacity", "manual", False, gates, 0.3, seen)
    assert ledger.entries()[1:] == [entry, other]
    assert [in_force(ledger.entries(), ledger.version(number)).threshold for number in (1, 2, 3)] == [0.3, 0.7, 0.5]
    assert (ledger.production(), ledger.version(1).threshold) == (1, 0.5)
    assert set_threshold(ledger, 1, 0.5).threshold == 0.5


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1.1, float("nan"), float("inf")])
def test_a_threshold_outside_of_0_and_1_is_refused(ledger: Ledger, value: float) -> None:
    with pytest.raises(PromotionRefused, match="a threshold is a probability between 0 and 1, both excluded"):
        set_threshold(ledger, 1, value)
    assert ledger.entries() == []


def test_the_threshold_in_force_is_no_change(ledger: Ledger) -> None:
    with pytest.raises(PromotionRefused, match=r"the threshold of version 1 is 0\.5 already"):
        set_threshold(ledger, 1, 0.5)
    set_threshold(ledger, 1, 0.4)
    with pytest.raises(PromotionRefused, match=r"the threshold of version 1 is 0\.4 already"):
        set_threshold(ledger, 1, 0.4)
    assert len(ledger.entries()) == 1


UNFAIR = evidence(fairness=(gap("user_gender", "recall", around(0.5)),))


def test_a_threshold_that_fails_a_gate_of_its_own_is_refused_and_recorded(ledger: Ledger) -> None:
    promote(ledger, 1)
    with pytest.raises(PromotionRefused, match=r"(?s)fails fair; --override changes it all.*  fair: the largest"):
        set_threshold(ledger, 1, 0.3, remeasure=lambda *_: UNFAIR)
    refused = ledger.entries()[-1]
    assert (refused.action, refused.version, refused.threshold, refused.evidence) == ("refuse", 1, None, None)
    assert refused.reason == "a threshold of 0.3 fails fair; asked for: capacity"
    assert [gate.name for gate in refused.gates if not gate.passed] == ["fair"]
    assert in_force(ledger.entries(), ledger.version(1)) == version(1)


def test_a_gate_that_no_threshold_decides_does_not_stand_in_the_way(ledger: Ledger) -> None:
    entry = set_threshold(ledger, 1, 0.3, remeasure=lambda *_: evidence(signature_fits=False))
    assert (entry.threshold, [gate.name for gate in entry.gates if not gate.passed]) == (0.3, ["signature_fits"])


def test_a_threshold_set_by_override_counts_in_later_promotions(ledger: Ledger) -> None:
    entry = set_threshold(ledger, 2, 0.3, remeasure=lambda *_: UNFAIR, override=True)
    assert (entry.override, entry.threshold) == (True, 0.3)
    with pytest.raises(PromotionRefused, match="1 of 14 gates failed: fair"):
        promote(ledger, 2)
    assert not ledger.apply_policy(ledger.version(2), now=NOW, policy=AUTO, compare=better).promote
    set_threshold(ledger, 2, 0.5)
    assert promote(ledger, 2).version == 2


def test_a_threshold_does_not_need_mlflow(ledger: Ledger, prepared: Database) -> None:
    assert set_threshold(without_mlflow(prepared), 1, 0.4) == ledger.entries()[0]


# --- what the database enforces -----------------------------------------------------------------------------------


def test_the_platforms_role_only_adds_to_the_ledger(ledger: Ledger, prepared: Database) -> None:
    promote(ledger, 1)
    for table in APPEND_ONLY:
        for change in (f"UPDATE streamflow.{table} SET version = 2", f"DELETE FROM streamflow.{table}"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege), prepared.connect() as connection:
                connection.execute(change)
            with pytest.raises(psycopg.Error, match="append-only"), prepared.connect(owner=True) as connection:
                connection.execute(change)


@pytest.mark.parametrize(
    ("changes", "constraint"),
    [
        ({"action": "bless"}, "action_check"),
        ({"version": 77}, "registered_version_fkey"),
        ({"previous": 77}, "previous_fkey"),
        ({"threshold": 0.4}, "check"),
        ({"action": "threshold"}, "check"),
        ({"action": "threshold", "threshold": 0.4}, "check"),
        ({"action": "threshold", "evidence": "{}"}, "check"),
        ({"action": "threshold", "threshold": 1.0, "evidence": "{}"}, "threshold_check"),
        ({"by": ""}, "by_check"),
        ({"reason": ""}, "reason_check"),
    ],
)
def test_rows_that_make_no_sense_are_refused(
    ledger: Ledger, prepared: Database, changes: dict[str, Any], constraint: str
) -> None:
    row: dict[str, Any] = {"at": NOW, "action": "promote", "version": 1, "previous": None, "by": "a", "reason": "b"}
    row |= {"policy": "manual", "override": False, "gates": "[]", **changes}
    names, marks = ", ".join(row), ", ".join(f"%({name})s" for name in row)
    with pytest.raises(psycopg.errors.IntegrityError, match=constraint), prepared.connect() as connection:
        connection.execute(f"INSERT INTO streamflow.promotion_ledger ({names}) VALUES ({marks})", row)
    assert ledger.entries() == []


# --- policy -------------------------------------------------------------------------------------------------------


def test_the_policy_decides_once_and_every_decision_is_in_the_ledger(ledger: Ledger, registry: Registry) -> None:
    assert apply_policy(ledger, 1, MANUAL)
    assert not apply_policy(ledger, 2, MANUAL)
    assert not apply_policy(ledger, 3, MANUAL, compare=worse)
    assert stages(registry) == {1: PRODUCTION, 2: STAGING, 3: STAGING}
    entries = ledger.entries()
    assert told(entries) == [
        ("promote", 1, None, "policy"),
        ("wait", 2, 1, "policy"),
        ("refuse", 3, 1, "policy"),
    ]
    assert [one.reason for one in entries] == [
        "policy first_model: nothing is in Production and every gate passed",
        "policy manual: every gate passed; waits for `streamflow promote 2 --by NAME --reason TEXT`",
        "1 of 16 gates failed: better_than_production",
    ]
    assert [one.gates for one in entries] == [
        judged(GOOD, None),
        judged(GOOD, BETTER, (GOOD,)),
        judged(GOOD, WORSE, (GOOD, GOOD)),
    ]

    entries.append(set_threshold(ledger, 2, 0.4, remeasure=lambda *_: GOOD))
    for number in (1, 2):
        assert not apply_policy(ledger, number, MANUAL, now=NOW + timedelta(days=1))
    assert not apply_policy(ledger, 3, MANUAL, compare=worse)
    again = ledger.apply_policy(ledger.version(1), now=NOW, policy=AUTO, compare=better)
    assert (again.promote, again.reason, again.gates) == (False, "version 1 was promoted before", entries[0].gates)
    assert ledger.entries() == entries

    assert apply_policy(ledger, 2, AUTO)
    assert told(ledger.entries())[4:] == [("promote", 2, 1, "policy")]
    assert not apply_policy(ledger, 1, AUTO)
    assert not apply_policy(ledger, 3, MANUAL, compare=worse)
    assert told(ledger.entries())[5:] == [("refuse", 3, 2, "policy")]
    assert stages(registry) == {1: ARCHIVED, 2: PRODUCTION, 3: STAGING}

    rollback(ledger)
    assert not apply_policy(ledger, 3, MANUAL, compare=worse)
    assert told(ledger.entries())[6:] == [("rollback", 1, 2, "ben"), ("refuse", 3, 1, "policy")]


def test_a_version_with_a_failed_gate_does_not_reach_staging(ledger: Ledger, registry: Registry, spoilt: int) -> None:
    assert not apply_policy(ledger, spoilt, AUTO)
    assert stages(registry)[spoilt] == NO_STAGE
    assert told(ledger.entries()) == [("refuse", spoilt, None, "policy")]


def test_a_stage_that_somebody_set_is_not_touched_by_the_policy(ledger: Ledger, registry: Registry) -> None:
    registry.set_stage(1, ARCHIVED)
    assert not apply_policy(ledger, 1, PATIENT)
    assert stages(registry)[1] == ARCHIVED


# --- MLflow follows the ledger ------------------------------------------------------------------------------------


def without_mlflow(database: Database) -> Ledger:
    return Ledger(database, Registry(Settings(mlflow_uri="http://127.0.0.1:9"), database))


def interrupted(ledger: Ledger, registry: Registry, monkeypatch: pytest.MonkeyPatch, step: str, *after: int) -> None:
    """Promote version 2; MLflow goes away at its ``step`` with one of the versions ``after``, or at once."""
    working = getattr(registry, step)

    def away(*given: Any) -> Any:
        if not after or given[0] in after:
            raise RegistryUnavailable("MLflow does not answer")
        return working(*given)

    with monkeypatch.context() as broken:
        broken.setattr(registry, step, away)
        with pytest.raises(RegistryUnavailable, match="version 2 is in Production by the ledger, but MLflow's stages"):
            promote(ledger, 2)


def test_mlflow_failing_after_the_decision_leaves_the_ledger_right_and_follow_repairs(
    ledger: Ledger, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(ledger, 1)
    interrupted(ledger, registry, monkeypatch, "set_stage")
    assert ledger.production() == 2
    assert stages(registry)[1] == PRODUCTION

    ledger.follow()
    assert stages(registry) == {1: ARCHIVED, 2: PRODUCTION, 3: NO_STAGE}
    assert aliased(registry) == [2]


@pytest.mark.parametrize("shown", [[1], [2], []])
def test_our_own_unfinished_work_is_finished_without_a_row(
    ledger: Ledger, registry: Registry, client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch, shown: list[int]
) -> None:
    """Wherever it was interrupted: before anything, after the stage but before the alias, or between two stages."""
    promote(ledger, 1)
    interrupted(ledger, registry, monkeypatch, "set_stage")
    for number in (1, 2):
        client.transition_model_version_stage(MODEL, str(number), PRODUCTION if number in shown else ARCHIVED)
    before = ledger.entries()

    assert reconcile(ledger) == []
    assert ledger.entries() == before
    assert stages(registry) == {1: ARCHIVED, 2: PRODUCTION, 3: NO_STAGE}
    assert aliased(registry) == [2]


def test_a_hand_is_told_from_our_own_unfinished_work(
    ledger: Ledger, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(ledger, 1)
    interrupted(ledger, registry, monkeypatch, "set_stage")
    registry.set_stage(3, PRODUCTION)
    ledger.follow()
    assert stages(registry)[3] == PRODUCTION

    assert told(reconcile(ledger, compare=worse)) == [("refuse", 3, 2, "mlflow")]
    assert stages(registry) == {1: ARCHIVED, 2: PRODUCTION, 3: NO_STAGE}


def test_mlflow_away_before_the_decision_changes_nothing(ledger: Ledger, prepared: Database) -> None:
    away = without_mlflow(prepared)
    promote(ledger, 1)
    promote(ledger, 3)
    for attempt in (
        lambda: promote(away, 2),
        lambda: rollback(away),
        lambda: apply_policy(away, 2, AUTO),
        lambda: reconcile(away),
    ):
        with pytest.raises(RegistryUnavailable):
            attempt()
    away.follow()
    assert ledger.production() == 3
    assert len(ledger.entries()) == 2


# --- what somebody changes by hand in MLflow ----------------------------------------------------------------------


def reconcile(ledger: Ledger, **more: Any) -> list[Entry]:
    given = {"now": NOW, "policy": MANUAL, "compare": better, "self_test": lambda version: None}
    return ledger.reconcile(**{**given, **more})


Hand = Callable[[mlflow.MlflowClient], object]


def to(number: int, stage: str, *, archive: bool = False) -> Hand:
    return lambda client: client.transition_model_version_stage(
        MODEL, str(number), stage, archive_existing_versions=archive
    )


@pytest.fixture
def two(ledger: Ledger, registry: Registry) -> Ledger:
    """Versions 1 and 2 were promoted, version 3 is in Staging."""
    promote(ledger, 1)
    promote(ledger, 2)
    apply_policy(ledger, 3, MANUAL)
    return ledger


def assert_nothing_is_left_to_do(ledger: Ledger, registry: Registry, **more: Any) -> None:
    """MLflow shows what the ledger says, and another look changes nothing."""
    before, shown = ledger.entries(), stages(registry)
    assert [number for number, stage in shown.items() if stage == PRODUCTION] == [ledger.production()]
    assert aliased(registry) == [ledger.production()]
    assert reconcile(ledger, **more) == []
    assert (ledger.entries(), stages(registry)) == (before, shown)


def test_nothing_by_hand_is_no_row(two: Ledger, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "set_stage", fails_with(AssertionError("nothing is to be set")))
    assert_nothing_is_left_to_do(two, registry)


def test_nothing_in_production_and_nothing_by_hand_is_no_row(ledger: Ledger) -> None:
    assert reconcile(ledger) == []
    assert ledger.entries() == []


@pytest.mark.parametrize("archive", [False, True])
def test_a_stage_set_by_hand_is_self_tested_judged_recorded_and_served(
    two: Ledger, registry: Registry, client: mlflow.MlflowClient, archive: bool
) -> None:
    tested = []
    to(3, PRODUCTION, archive=archive)(client)

    (entry,) = reconcile(two, self_test=tested.append)

    assert tested == [version(3)]
    assert entry == Entry(NOW, "promote", 3, 2, "mlflow", BY_HAND, "manual", False, judged(GOOD, BETTER, (GOOD, GOOD)))
    assert two.production() == 3
    assert stages(registry) == {1: ARCHIVED, 2: ARCHIVED, 3: PRODUCTION}
    assert_nothing_is_left_to_do(two, registry)
    assert rollback(two).version == 2


def test_the_first_production_may_come_by_hand(ledger: Ledger, registry: Registry, client: mlflow.MlflowClient) -> None:
    to(3, PRODUCTION)(client)
    assert told(reconcile(ledger)) == [("promote", 3, None, "mlflow")]
    assert_nothing_is_left_to_do(ledger, registry)


@pytest.mark.parametrize(
    ("archive", "how", "action", "reason", "gates"),
    [
        (True, {"compare": worse}, "refuse", f"{BY_HAND}; 1 of 16 gates failed: better_than_production", 16),
        (
            False,
            {"self_test": fails_with(ArtifactRefused("its scorer has another SHA-256"))},
            "refuse",
            f"{BY_HAND}; it fails its self-test: its scorer has another SHA-256",
            0,
        ),
        (
            True,
            {"self_test": fails_with(UnknownVersion("MLflow has no such entry"))},
            "refuse",
            f"{BY_HAND}; it fails its self-test: MLflow has no such entry",
            0,
        ),
        (
            False,
            {"policy": FLAGGING},
            "flag",
            f"{BY_HAND} and taken back: the policy wants `streamflow promote 3 --by NAME --reason TEXT`",
            16,
        ),
        (True, {"policy": FLAGGING, "compare": worse}, "refuse", f"{BY_HAND}; 1 of 16 gates failed", 16),
    ],
)
def test_a_stage_set_by_hand_that_may_not_be_is_recorded_and_set_back(
    two: Ledger,
    registry: Registry,
    client: mlflow.MlflowClient,
    archive: bool,
    how: dict[str, Any],
    action: str,
    reason: str,
    gates: int,
) -> None:
    to(3, PRODUCTION, archive=archive)(client)

    (entry,) = reconcile(two, **how)

    assert (entry.action, entry.version, entry.previous, entry.by) == (action, 3, 2, "mlflow")
    assert entry.reason.startswith(reason)
    assert len(entry.gates) == gates
    assert two.production() == 2
    assert stages(registry) == {1: ARCHIVED, 2: PRODUCTION, 3: STAGING}
    assert_nothing_is_left_to_do(two, registry)


def test_each_hand_is_answered(two: Ledger, client: mlflow.MlflowClient) -> None:
    for hand, answer in ((to(3, PRODUCTION), ("refuse", 3)), (to(2, ARCHIVED), ("flag", 2))):
        for _ in range(2):
            hand(client)
            assert told(reconcile(two, compare=worse)) == [(*answer, 2, "mlflow")]


def test_a_version_is_set_back_to_where_it_belongs(
    two: Ledger, registry: Registry, client: mlflow.MlflowClient, spoilt: int
) -> None:
    apply_policy(two, spoilt, MANUAL)
    for number, stage in ((1, ARCHIVED), (3, STAGING), (spoilt, NO_STAGE)):
        to(number, PRODUCTION)(client)
        assert told(reconcile(two, compare=worse)) == [("refuse", number, 2, "mlflow")]
        assert stages(registry)[number] == stage
    assert two.production() == 2


def test_two_stages_set_at_once_are_both_refused(two: Ledger, registry: Registry, client: mlflow.MlflowClient) -> None:
    to(1, PRODUCTION)(client)
    to(3, PRODUCTION)(client)

    entries = reconcile(two)

    assert told(entries) == [("refuse", 1, 2, "mlflow"), ("refuse", 3, 2, "mlflow")]
    assert {one.reason for one in entries} == {f"{BY_HAND} of versions 1, 3 at once; only one can be"}
    assert_nothing_is_left_to_do(two, registry)


@pytest.mark.parametrize(
    ("hand", "what"),
    [
        (to(2, ARCHIVED), "its stage Production (it was Archived)"),
        (to(2, STAGING), "its stage Production (it was Staging)"),
        (lambda client: client.delete_registered_model_alias(MODEL, ALIAS), "its alias"),
        (lambda client: client.set_registered_model_alias(MODEL, ALIAS, "1"), "its alias"),
    ],
)
def test_a_stage_taken_from_production_is_flagged_and_put_back(
    two: Ledger, registry: Registry, client: mlflow.MlflowClient, hand: Hand, what: str
) -> None:
    hand(client)
    (entry,) = reconcile(two)
    assert (entry.action, entry.version, entry.previous, entry.by) == ("flag", 2, 2, "mlflow")
    assert entry.reason.startswith(f"lost {what} by hand in MLflow; put back")
    assert_nothing_is_left_to_do(two, registry)


def test_a_production_that_was_deleted_is_flagged_once(
    two: Ledger, registry: Registry, client: mlflow.MlflowClient
) -> None:
    client.delete_model_version(MODEL, "2")

    (entry,) = reconcile(two)
    assert (entry.action, entry.version, entry.previous, entry.by) == ("flag", 2, 2, "mlflow")
    assert entry.reason.startswith("deleted in MLflow while in Production; the service goes on")
    for _ in range(2):
        assert reconcile(two, now=NOW + timedelta(minutes=1)) == []
    assert two.production() == 2
    assert stages(registry) == {1: ARCHIVED, 3: STAGING}

    assert rollback(two).version == 1
    assert_nothing_is_left_to_do(two, registry)


def test_a_hand_may_replace_a_production_that_was_deleted(
    two: Ledger, registry: Registry, client: mlflow.MlflowClient
) -> None:
    client.delete_model_version(MODEL, "2")
    to(3, PRODUCTION)(client)
    assert told(reconcile(two)) == [("promote", 3, 2, "mlflow"), ("flag", 2, 2, "mlflow")]
    assert_nothing_is_left_to_do(two, registry)


def test_a_version_that_we_did_not_register_is_flagged_and_taken_back(
    two: Ledger, registry: Registry, client: mlflow.MlflowClient
) -> None:
    stranger = int(client.create_model_version(MODEL, source="/nowhere/x", run_id="run-x").version)
    to(stranger, PRODUCTION, archive=True)(client)

    (entry,) = reconcile(two, self_test=fails_with(AssertionError("there is no record to test it by")))

    assert (entry.action, entry.version, entry.previous) == ("flag", stranger, 2)
    assert entry.reason == f"{BY_HAND} and taken back: StreamFlow did not register this version"
    assert stages(registry)[stranger] == NO_STAGE
    assert_nothing_is_left_to_do(two, registry)
    assert promote(two, 3).previous == 2


def test_a_crash_between_the_row_and_mlflow_is_finished_without_another_row(
    two: Ledger, registry: Registry, client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    for how in ({"compare": worse}, {}):
        to(3, PRODUCTION)(client)
        before = len(two.entries())
        with monkeypatch.context() as broken:
            broken.setattr(registry, "set_stage", fails_with(RegistryUnavailable("MLflow does not answer")))
            with pytest.raises(RegistryUnavailable):
                reconcile(two, **how)
        assert len(two.entries()) == before + 1
        assert reconcile(two, **how) == []
        assert_nothing_is_left_to_do(two, registry)
    assert two.production() == 3


def test_mlflow_going_away_before_a_row_leaves_none(two: Ledger, client: mlflow.MlflowClient) -> None:
    to(3, PRODUCTION)(client)
    before = two.entries()
    for part in ("self_test", "compare"):
        with pytest.raises(RegistryUnavailable):
            reconcile(two, **{part: fails_with(RegistryUnavailable("MLflow does not answer"))})
    assert two.entries() == before
    assert told(reconcile(two)) == [("promote", 3, 2, "mlflow")]


def test_a_decision_overrules_a_hand_and_says_so(two: Ledger, registry: Registry, client: mlflow.MlflowClient) -> None:
    to(3, PRODUCTION)(client)
    rollback(two)
    assert told(two.entries())[-2:] == [("flag", 3, 2, "mlflow"), ("rollback", 1, 2, "ben")]
    assert two.entries()[-2].reason == f"{BY_HAND}; overruled by the rollback of version 1"
    assert stages(registry) == {1: PRODUCTION, 2: ARCHIVED, 3: STAGING}

    to(3, PRODUCTION)(client)
    promote(two, 3)
    assert told(two.entries())[-2:] == [("rollback", 1, 2, "ben"), ("promote", 3, 1, "anna")]
    assert_nothing_is_left_to_do(two, registry)


def test_follow_leaves_to_reconcile_what_was_done_by_hand(two: Ledger, registry: Registry) -> None:
    registry.set_stage(3, PRODUCTION)
    two.follow()
    assert stages(registry)[3] == PRODUCTION
    assert told(reconcile(two)) == [("promote", 3, 2, "mlflow")]


# --- at the same time ---------------------------------------------------------------------------------------------


def promote_in_a_world_of_its_own(database: Database, home: Path, number: int) -> int:
    """Promotes with nothing shared with other callers but the servers; also run in processes."""
    promote(Ledger(database, Registry(Settings(home=home), database)), number)
    return number


@pytest.fixture(scope="module", params=["threads", "processes"])
def workers(request: pytest.FixtureRequest) -> Iterator[Executor]:
    spawn = multiprocessing.get_context("spawn")
    with ThreadPoolExecutor(2) if request.param == "threads" else ProcessPoolExecutor(2, spawn) as executor:
        yield executor


def test_promotions_at_the_same_time_leave_one_production(
    workers: Executor, ledger: Ledger, registry: Registry, prepared: Database, tmp_path: Path
) -> None:
    for repeat in range(6):
        both = (1, 2) if repeat % 2 else (3, 2)
        if ledger.production() in both:
            promote(ledger, ({1, 2, 3} - set(both)).pop())
        started = [workers.submit(promote_in_a_world_of_its_own, prepared, tmp_path, number) for number in both]
        assert sorted(done.result() for done in started) == sorted(both)

        earlier, later = ledger.entries()[-2:]
        assert {earlier.version, later.version} == set(both)
        assert later.previous == earlier.version
        assert [number for number, stage in stages(registry).items() if stage == PRODUCTION] == [later.version]
        assert aliased(registry) == [later.version]


def test_a_hand_and_a_promotion_at_the_same_time_leave_one_production(
    two: Ledger, registry: Registry, client: mlflow.MlflowClient
) -> None:
    with ThreadPoolExecutor(2) as both:
        for repeat in range(4):
            number = 1 if repeat % 2 else 2
            done = [both.submit(reconcile, two)]
            if two.production() != number:
                done.append(both.submit(promote, two, number))
            to(3, PRODUCTION)(client)
            for one in done:
                one.result()
            reconcile(two)
            assert_nothing_is_left_to_do(two, registry)
