import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import mlflow
import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamflow import warehouse
from streamflow.database import Database
from streamflow.errors import ConfigurationError, PromotionRefused, RegistryUnavailable, UnknownVersion
from streamflow.promotion import (
    Decision,
    Entry,
    Gate,
    Gates,
    Ledger,
    Policy,
    Version,
    apply_policy,
    check_gates,
    current,
    decide,
    predecessor,
)
from streamflow.registry import ALIAS, ARCHIVED, MODEL, PRODUCTION, STAGING, Registry
from streamflow.settings import Settings

NOW = datetime(2024, 2, 3, 4, 5, tzinfo=UTC)
MANUAL = Policy(mode="manual", first_model="promote", gates=Gates(minimum_auc=0.5, maximum_parity_difference=1e-9))
AUTO = Policy(mode="auto", first_model="wait", gates=MANUAL.gates)
PATIENT = Policy(mode="manual", first_model="wait", gates=MANUAL.gates)
PASSED = Gate("ranks_better_than_chance", passed=True, value=0.8, bound=0.5, reason="hold-out AUC is 0.8")
FAILED = Gate("no_decision_flips", passed=False, value=3, bound=0, reason="3 rows are decided otherwise")


def version(number: int, *gates: Gate) -> Version:
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
        metrics={"auc": 0.8},
        gates=gates or (PASSED,),
        lineage={"month": "2024-01"},
        registered_at=NOW,
    )


# --- gates and decisions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("auc", "difference", "flipped", "failed"),
    [
        (0.81, 0.0, 0, []),
        (0.81, 1e-9, 0, []),
        (0.5000001, 0.0, 0, []),
        (0.5, 0.0, 0, ["ranks_better_than_chance"]),
        (0.49, 0.0, 0, ["ranks_better_than_chance"]),
        (float("nan"), 0.0, 0, ["ranks_better_than_chance"]),
        (0.81, 1.1e-9, 0, ["compiled_scorer_agrees"]),
        (0.81, float("nan"), 0, ["compiled_scorer_agrees"]),
        (0.81, 0.0, 1, ["no_decision_flips"]),
        (0.4, 1.0, 7, ["ranks_better_than_chance", "compiled_scorer_agrees", "no_decision_flips"]),
    ],
)
def test_gates_hold_evidence_against_the_policys_bounds(
    auc: float, difference: float, flipped: int, failed: list[str]
) -> None:
    gates = check_gates({"auc": auc}, parity_difference=difference, flipped_decisions=flipped, policy=MANUAL)

    assert [gate.name for gate in gates if not gate.passed] == failed
    assert len(gates) == 3
    assert gates[0].bound == 0.5
    assert gates[2].value == flipped


def test_a_gate_says_what_was_measured_against_which_bound() -> None:
    gates = check_gates({"auc": 0.4812}, parity_difference=2e-8, flipped_decisions=2, policy=MANUAL)

    assert [gate.reason for gate in gates] == [
        "hold-out AUC is 0.4812, to exceed 0.5",
        "largest difference to the pipeline is 2.0e-08, at most 1e-09 allowed",
        "2 rows are decided otherwise by the compiled scorer, none allowed",
    ]


@pytest.mark.parametrize(
    ("candidate", "production", "policy", "promote", "reason"),
    [
        (version(1), None, MANUAL, True, "first_model"),
        (version(1), None, PATIENT, False, "streamflow promote 1"),
        (version(2), version(1), MANUAL, False, "streamflow promote 2"),
        (version(1), None, AUTO, True, "auto"),
        (version(2), version(1), AUTO, True, "auto"),
        (version(1, PASSED, FAILED), None, MANUAL, False, FAILED.reason),
        (version(2, FAILED), version(1), AUTO, False, FAILED.reason),
    ],
)
def test_decisions(candidate: Version, production: Version | None, policy: Policy, promote: bool, reason: str) -> None:
    decision = decide(candidate, production, policy)

    assert decision.promote is promote
    assert reason in decision.reason


# --- the policy file ----------------------------------------------------------------------------------------------

POLICY = """
mode = "manual"
first_model = "wait"
[gates]
minimum_auc = 0.6
maximum_parity_difference = 1e-9
"""


def load(folder: Path, content: bytes, **settings: Any) -> Policy:
    file = folder / "policy.toml"
    file.write_bytes(content)
    return Policy.load(Settings(policy_file=file, **settings))


def test_a_policy_is_read_and_the_command_line_overrides_its_mode(tmp_path: Path) -> None:
    policy = load(tmp_path, POLICY.encode())

    assert policy == Policy("manual", "wait", Gates(0.6, 1e-9))
    assert load(tmp_path, POLICY.encode(), policy="auto") == Policy("auto", "wait", Gates(0.6, 1e-9))


def test_the_shipped_policy_waits_for_a_person_after_the_first_model() -> None:
    assert Policy.load(Settings()) == MANUAL


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (POLICY + "surprise = 1\n", "surprise"),
        ("colour = 1\n" + POLICY, "colour"),
        (POLICY.replace("minimum_auc = 0.6\n", ""), "minimum_auc"),
        (POLICY.replace('mode = "manual"\n', ""), "mode"),
        (POLICY.replace("0.6", '"high"'), r"\$\.gates\.minimum_auc"),
        (POLICY.replace('"wait"', '"perhaps"'), "first_model"),
        ("mode = ", "policy.toml"),
        (POLICY + "# \xff", "utf-8"),
    ],
)
def test_a_policy_that_cannot_be_used_is_refused_with_its_key(tmp_path: Path, content: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        load(tmp_path, content.encode("latin-1"))


def test_a_missing_policy_file_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.toml"
    with pytest.raises(ConfigurationError, match=f"{missing} cannot be read: No such file"):
        Policy.load(Settings(policy_file=missing))


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
steps = st.lists(st.tuples(st.sampled_from(["promote", "refuse", "rollback"]), st.integers(1, 5)), max_size=30)


def ledger_of(requests: list[Step]) -> list[Entry]:
    """What `Ledger` would have written: no promotion of what is Production, rollbacks to the predecessor."""
    entries: list[Entry] = []
    for action, number in requests:
        if action == "rollback":
            target = predecessor(entries)
            if target is not None:
                entries.append(entry("rollback", target, current(entries)))
        elif action == "refuse" or number != current(entries):
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
def test_refusals_change_nothing(requests: list[Step]) -> None:
    entries = ledger_of(requests)
    without = [made for made in entries if made.action != "refuse"]

    assert current(entries) == current(without)
    assert predecessor(entries) == predecessor(without)


@given(steps, st.integers(1, 5))
def test_a_promotion_is_undone_by_a_rollback(requests: list[Step], number: int) -> None:
    entries = ledger_of(requests)
    before = current(entries)
    if before is not None and number != before:
        assert predecessor([*entries, entry("promote", number, before)]) == before


# --- the ledger in PostgreSQL, with MLflow behind it --------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(database: Database) -> Database:
    warehouse.migrate(database)
    return database


@pytest.fixture(scope="module")
def registry(prepared: Database, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return Registry(Settings(home=tmp_path_factory.mktemp("home")), prepared)


@pytest.fixture
def ledger(prepared: Database, registry: Registry) -> Iterator[Ledger]:
    """A ledger with versions 1 to 3, nothing promoted yet, in MLflow as well."""
    client = mlflow.MlflowClient(registry.uri, registry.uri)
    client.create_registered_model(MODEL)
    made = Ledger(prepared, registry)
    for number in (1, 2, 3):
        client.create_model_version(MODEL, source=f"/nowhere/{number}", run_id=f"run-{number}")
        made.register(version(number))
    yield made
    client.delete_registered_model(MODEL)
    with prepared.connect(owner=True) as connection:
        for table in ("model_versions", "promotion_ledger"):
            connection.execute(f"ALTER TABLE streamflow.{table} DISABLE TRIGGER append_only")
        connection.execute("TRUNCATE streamflow.model_versions, streamflow.promotion_ledger RESTART IDENTITY")
        for table in ("model_versions", "promotion_ledger"):
            connection.execute(f"ALTER TABLE streamflow.{table} ENABLE TRIGGER append_only")


def promote(ledger: Ledger, number: int, **more: Any) -> Entry:
    return ledger.promote(number, **{"by": "anna", "reason": "better", "now": NOW, "policy": MANUAL, **more})


def rollback(ledger: Ledger, number: int | None = None, **more: Any) -> Entry:
    return ledger.rollback(number, **{"by": "ben", "reason": "worse", "now": NOW, "policy": MANUAL, **more})


def stages(registry: Registry) -> dict[int, str]:
    return {number: one.stage for number, one in registry.versions().items()}


def aliased(registry: Registry) -> list[int]:
    return [number for number, one in registry.versions().items() if one.has_alias]


def add_failing_version(ledger: Ledger, registry: Registry) -> int:
    client = mlflow.MlflowClient(registry.uri, registry.uri)
    number = int(client.create_model_version(MODEL, source="/nowhere/4", run_id="run-4").version)
    ledger.register(version(number, PASSED, FAILED))
    return number


def test_versions_come_back_as_they_were_registered(ledger: Ledger) -> None:
    assert ledger.versions() == [version(1), version(2), version(3)]
    assert ledger.version(2) == version(2)
    assert ledger.version_of_run("run-3") == version(3)
    assert ledger.version_of_run("run-9") is None
    assert ledger.production() is None


def test_a_promotion_is_in_the_ledger_and_mlflow_follows(ledger: Ledger, registry: Registry) -> None:
    first = promote(ledger, 1)
    second = promote(ledger, 2, by="carl", reason="fresher")

    assert first == Entry(NOW, "promote", 1, None, "anna", "better", "manual", override=False, gates=(PASSED,))
    assert second == Entry(NOW, "promote", 2, 1, "carl", "fresher", "manual", override=False, gates=(PASSED,))
    assert ledger.entries() == [first, second]
    assert ledger.production() == 2
    assert stages(registry) == {1: ARCHIVED, 2: PRODUCTION, 3: "None"}
    assert aliased(registry) == [2]


def test_promoting_what_is_production_is_refused_without_a_record(ledger: Ledger) -> None:
    promote(ledger, 1)
    with pytest.raises(PromotionRefused, match="version 1 is in Production already"):
        promote(ledger, 1)
    assert len(ledger.entries()) == 1


def test_an_unknown_version_is_named_with_the_known_ones(ledger: Ledger) -> None:
    for attempt in (promote, rollback):
        promote(ledger, 1) if attempt is rollback else None
        with pytest.raises(UnknownVersion, match="there is no version 77; registered are: 1, 2, 3"):
            attempt(ledger, 77)
    assert len(ledger.entries()) == 1


def test_a_version_deleted_in_mlflow_is_not_promoted(ledger: Ledger, registry: Registry) -> None:
    registry.delete(2)
    with pytest.raises(UnknownVersion, match="MLflow has no such entry"):
        promote(ledger, 2)
    assert ledger.entries() == []


def test_a_failed_gate_is_refused_and_recorded_and_an_override_is_recorded(ledger: Ledger, registry: Registry) -> None:
    promote(ledger, 1)
    number = add_failing_version(ledger, registry)

    with pytest.raises(PromotionRefused, match=f"version {number} fails its gates: {FAILED.reason}; --override"):
        promote(ledger, number)
    assert ledger.production() == 1
    assert stages(registry)[1] == PRODUCTION
    refused = ledger.entries()[-1]
    assert (refused.action, refused.version, refused.previous, refused.override) == ("refuse", number, 1, False)
    assert refused.reason == FAILED.reason
    assert refused.gates == (PASSED, FAILED)

    promoted = promote(ledger, number, override=True)
    assert (promoted.action, promoted.override, promoted.gates) == ("promote", True, (PASSED, FAILED))
    assert ledger.entries()[-1] == promoted
    assert ledger.production() == number


@pytest.mark.parametrize("nothing", ["", "  "])
@pytest.mark.parametrize("field", ["by", "reason"])
def test_nobody_decides_without_name_and_reason(ledger: Ledger, field: str, nothing: str) -> None:
    promote(ledger, 1)
    promote(ledger, 2)
    for attempt in (lambda **more: promote(ledger, 3, **more), lambda **more: rollback(ledger, **more)):
        with pytest.raises(PromotionRefused, match="--by NAME --reason TEXT"):
            attempt(**{field: nothing})
    assert len(ledger.entries()) == 2


def test_rollbacks_go_back_step_by_step_until_there_is_no_predecessor(ledger: Ledger, registry: Registry) -> None:
    for number in (1, 2, 3):
        promote(ledger, number)

    assert rollback(ledger) == Entry(NOW, "rollback", 2, 3, "ben", "worse", "manual", override=False, gates=(PASSED,))
    assert stages(registry) == {1: ARCHIVED, 2: PRODUCTION, 3: ARCHIVED}
    assert rollback(ledger).version == 1
    with pytest.raises(PromotionRefused, match="version 1 is the first in Production; it has no predecessor"):
        rollback(ledger)
    assert stages(registry) == {1: PRODUCTION, 2: ARCHIVED, 3: ARCHIVED}
    assert aliased(registry) == [1]
    assert rollback(ledger, 3).previous == 1
    assert ledger.production() == 3


def test_rollbacks_that_are_refused_leave_no_record(ledger: Ledger) -> None:
    with pytest.raises(PromotionRefused, match="nothing is in Production"):
        rollback(ledger)
    promote(ledger, 1)
    with pytest.raises(PromotionRefused, match="version 3 was never in Production; promote it instead"):
        rollback(ledger, 3)
    with pytest.raises(PromotionRefused, match="version 1 is in Production already"):
        rollback(ledger, 1)
    assert len(ledger.entries()) == 1


def test_a_refusal_does_not_count_as_having_been_in_production(ledger: Ledger, registry: Registry) -> None:
    promote(ledger, 1)
    number = add_failing_version(ledger, registry)
    with pytest.raises(PromotionRefused):
        promote(ledger, number)
    with pytest.raises(PromotionRefused, match="never in Production"):
        rollback(ledger, number)


def test_the_platforms_role_only_adds_to_the_ledger(ledger: Ledger, prepared: Database) -> None:
    promote(ledger, 1)
    for table in ("promotion_ledger", "model_versions"):
        for change in (f"UPDATE streamflow.{table} SET version = 2", f"DELETE FROM streamflow.{table}"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege), prepared.connect() as connection:
                connection.execute(change)
            with pytest.raises(psycopg.Error, match="append-only"), prepared.connect(owner=True) as connection:
                connection.execute(change)


def test_a_policy_decision_is_made_once(ledger: Ledger, registry: Registry) -> None:
    assert apply_policy(ledger, registry, version(1), MANUAL, NOW).promote
    assert ledger.entries()[0].by == "policy"
    assert not apply_policy(ledger, registry, version(2), MANUAL, NOW).promote
    assert stages(registry) == {1: PRODUCTION, 2: STAGING, 3: "None"}

    again = apply_policy(ledger, registry, version(1), AUTO, NOW)
    assert again == Decision(promote=False, reason="version 1 was promoted before")
    assert stages(registry) == {1: PRODUCTION, 2: STAGING, 3: "None"}

    assert apply_policy(ledger, registry, version(2), AUTO, NOW).promote
    assert not apply_policy(ledger, registry, version(1), AUTO, NOW).promote
    assert ledger.production() == 2
    assert len(ledger.entries()) == 2


def test_a_version_with_a_failed_gate_does_not_reach_staging(ledger: Ledger, registry: Registry) -> None:
    number = add_failing_version(ledger, registry)
    assert not apply_policy(ledger, registry, ledger.version(number), AUTO, NOW).promote
    assert stages(registry)[number] == "None"
    assert ledger.entries() == []


# --- MLflow follows the ledger ------------------------------------------------------------------------------------


def test_mlflow_failing_after_the_decision_leaves_the_ledger_right_and_follow_repairs(
    ledger: Ledger, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(ledger, 1)

    def away(*_: object) -> None:
        raise RegistryUnavailable("MLflow does not answer")

    with monkeypatch.context() as broken:
        broken.setattr(registry, "set_stage", away)
        with pytest.raises(RegistryUnavailable, match="version 2 is in Production by the ledger, but MLflow's stages"):
            promote(ledger, 2)
    assert ledger.production() == 2
    assert stages(registry)[1] == PRODUCTION

    ledger.follow()
    assert stages(registry) == {1: ARCHIVED, 2: PRODUCTION, 3: "None"}
    assert aliased(registry) == [2]


def test_mlflow_away_before_the_decision_changes_nothing(ledger: Ledger, prepared: Database) -> None:
    away = Ledger(prepared, Registry(Settings(mlflow_uri="http://127.0.0.1:9"), prepared))
    promote(ledger, 1)
    for attempt in (lambda: promote(away, 2), lambda: rollback(away, 2)):
        with pytest.raises((RegistryUnavailable, PromotionRefused)):
            attempt()
    assert ledger.production() == 1
    assert len(ledger.entries()) == 1


def to(number: int, stage: str) -> Callable[[mlflow.MlflowClient], object]:
    return lambda client: client.transition_model_version_stage(MODEL, str(number), stage)


@pytest.mark.parametrize(
    "by_hand",
    [
        [to(2, "None")],
        [to(1, PRODUCTION)],
        [to(1, PRODUCTION), to(2, ARCHIVED), to(3, PRODUCTION)],
        [lambda client: client.delete_registered_model_alias(MODEL, ALIAS)],
        [lambda client: client.set_registered_model_alias(MODEL, ALIAS, "1")],
        [],
    ],
)
def test_what_was_changed_by_hand_in_mlflow_is_put_right(
    ledger: Ledger, registry: Registry, by_hand: list[Callable[[mlflow.MlflowClient], object]]
) -> None:
    promote(ledger, 1)
    promote(ledger, 2)
    for change in by_hand:
        change(mlflow.MlflowClient(registry.uri, registry.uri))

    ledger.follow()

    found = stages(registry)
    assert [number for number, stage in found.items() if stage == PRODUCTION] == [2]
    assert aliased(registry) == [2]


def test_without_a_promotion_mlflow_has_no_production(ledger: Ledger, registry: Registry) -> None:
    registry.set_stage(3, PRODUCTION)
    ledger.follow()
    assert PRODUCTION not in stages(registry).values()


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
