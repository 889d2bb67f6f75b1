"""Promotion: what becomes of a version, the ledger and rollback.

The ledger in PostgreSQL is the authority on which version is Production; MLflow's stages follow it. Decisions are pure
functions of evidence and policy; what is decided is a row that nobody changes. What a version must show is gates.py's,
speaking to MLflow registry.py's.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date, datetime
from typing import Any, Literal

import msgspec
import psycopg
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from streamflow.database import Database
from streamflow.errors import (
    PromotionRefused,
    RegistryUnavailable,
    StreamFlowError,
    UnknownVersion,
    WarehouseUnavailable,
)
from streamflow.evaluation import METRICS, Comparison
from streamflow.gates import BETTER, RELATIVE, Candidate, Incomparable, absolute_gates, relative_gates, threshold_gates
from streamflow.gates import Evidence as Evidence
from streamflow.gates import Gate as Gate
from streamflow.gates import Invariance as Invariance
from streamflow.policy import Policy
from streamflow.registry import ARCHIVED, NO_STAGE, PRODUCTION, STAGING, RegisteredVersion, Registry

Action = Literal["promote", "rollback", "wait", "refuse", "threshold", "flag"]
MADE_PRODUCTION = ("promote", "rollback")
POLICY_ACTOR = "policy"
MLFLOW_ACTOR = "mlflow"
BY_HAND = f"stage {PRODUCTION} set by hand in MLflow"
UNREACHABLE = (RegistryUnavailable, WarehouseUnavailable)


# --- decisions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    """What becomes of a version by policy, and the gates that it was held against."""

    promote: bool
    reason: str
    gates: tuple[Gate, ...]

    @property
    def failed(self) -> tuple[Gate, ...]:
        """The gates that forbid a promotion."""
        return tuple(gate for gate in self.gates if not gate.passed)

    @property
    def is_fit(self) -> bool:
        """Whether the version may be served at all, be it better than Production or not."""
        return all(gate.name in RELATIVE for gate in self.failed)


def decide(candidate: Candidate, production: Comparison | Incomparable | None, policy: Policy) -> Decision:
    """Whether the policy promotes a version; a pure function.

    ``production`` holds the candidate against what is in Production; with None nothing is, and only the absolute
    gates apply.
    """
    gates = absolute_gates(candidate.evidence, candidate.history, policy)
    if production is not None:
        gates += relative_gates(candidate, production, policy)
    if failed := [gate.name for gate in gates if not gate.passed]:
        reason = f"{len(failed)} of {len(gates)} gates failed: {', '.join(failed)}"
        return Decision(promote=False, reason=reason, gates=gates)
    if policy.mode == "auto":
        return Decision(promote=True, reason="policy auto: every gate passed", gates=gates)
    if production is None and policy.first_model == "promote":
        reason = "policy first_model: nothing is in Production and every gate passed"
        return Decision(promote=True, reason=reason, gates=gates)
    waits = f"waits for `streamflow promote {candidate.version} --by NAME --reason TEXT`"
    return Decision(promote=False, reason=f"policy {policy.mode}: every gate passed; {waits}", gates=gates)


# --- the ledger -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Version:
    """A registered version as our own records have it.

    ``threshold`` is the one that it was registered with and ``evidence`` what was measured at that, unless the version
    comes from `in_force`.
    """

    version: int
    run_id: str
    as_of: date
    service: str
    threshold: float
    artifact_path: str
    artifact_sha256: str
    dataset_digest: str
    predictions_digest: str
    evidence: Evidence
    lineage: Mapping[str, Any]
    registered_at: datetime

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of the held-out users without their intervals."""
        measured = self.evidence.metrics
        return {name: measured[name].value for name in METRICS if name in measured}


@dataclass(frozen=True)
class Entry:
    """A row of the ledger: ``previous`` was Production before, ``version`` is what it is about.

    ``at`` never goes back from one row to the next. ``gates`` are those that the version was held against then. Where
    the row changes the threshold, ``threshold`` is the new one and ``evidence`` what was measured at it.
    """

    at: datetime
    action: Action
    version: int
    previous: int | None
    by: str
    reason: str
    policy: str
    override: bool
    gates: tuple[Gate, ...]
    threshold: float | None = None
    evidence: Evidence | None = None


Compare = Callable[[Version, Version], Comparison]
"""Holds a candidate against Production on the same held-out users."""

Remeasure = Callable[[Version, float], Evidence]
"""Measures a version again as it would decide at another threshold."""

SelfTest = Callable[[Version], object]
"""Raises a StreamFlowError unless the registry has a version's artifact as recorded, and it works."""


def decision_in_force(entries: Sequence[Entry]) -> Entry | None:
    """The row that made Production what it is after these, oldest first."""
    return next((entry for entry in reversed(entries) if entry.action in MADE_PRODUCTION), None)


def current(entries: Sequence[Entry]) -> int | None:
    """Which version the ledger says is Production after these entries, oldest first."""
    entry = decision_in_force(entries)
    return entry.version if entry else None


def until(entries: Sequence[Entry], at: datetime) -> list[Entry]:
    """What the ledger said at a moment."""
    return [entry for entry in entries if entry.at <= at]


def production_at(entries: Sequence[Entry], at: datetime) -> int | None:
    """Which version was Production at a moment."""
    return current(until(entries, at))


def predecessor(entries: Sequence[Entry]) -> int | None:
    """Which version was Production before the one that is, undoing rollbacks too.

    A rollback goes back along the line of promotions: after promotions of 1, 2 and 3 and a rollback to 2,
    the predecessor of 2 is 1.
    """
    line: list[int] = []
    for entry in entries:
        if entry.action == "promote":
            line.append(entry.version)
        elif entry.action == "rollback" and entry.version in line:
            line = line[: len(line) - line[::-1].index(entry.version)]
        elif entry.action == "rollback":
            line.append(entry.version)
    return line[-2] if len(line) > 1 else None


def in_force(entries: Iterable[Entry], version: Version) -> Version:
    """A version with the threshold that was decided for it last, if any was, and what was measured at that."""
    for entry in entries:
        if entry.version == version.version and entry.threshold is not None and entry.evidence is not None:
            version = replace(version, threshold=entry.threshold, evidence=entry.evidence)
    return version


def gates_of(entries: Iterable[Entry], number: int) -> tuple[Gate, ...]:
    """The gates that a version was held against last; none before anything was decided about it."""
    judged = [entry.gates for entry in entries if entry.version == number and entry.gates]
    return judged[-1] if judged else ()


def _by_policy(entries: Iterable[Entry], number: int) -> list[Entry]:
    return [entry for entry in entries if entry.version == number and entry.by == POLICY_ACTOR]


def already_promoted(number: int) -> str:
    """Why the policy has nothing to say about a version."""
    return f"version {number} was promoted before"


def _was_production(entries: Iterable[Entry], number: int) -> bool:
    return any(entry.version == number and entry.action in MADE_PRODUCTION for entry in entries)


@dataclass(frozen=True)
class _Turn:
    """What is known while nobody else can decide.

    ``unfollowed`` are the newest rows that MLflow's stages may not follow yet.
    """

    connection: psycopg.Connection[Any]
    versions: Mapping[int, Version]
    entries: list[Entry]
    unfollowed: list[Entry]

    def version(self, number: int) -> Version:
        """One version as it is in force; raises UnknownVersion."""
        return in_force(self.entries, _version(self.versions, number))

    def history(self, number: int) -> tuple[Evidence, ...]:
        """The evidence of all earlier versions, oldest first."""
        return tuple(version.evidence for version in self.versions.values() if version.version < number)

    @property
    def ours(self) -> set[int | None]:
        """The versions that MLflow may show in Production although nobody set a stage by hand."""
        left_over = {number for entry in self.unfollowed for number in (entry.version, entry.previous)}
        return left_over | {current(self.entries)}

    def append(self, entry: Entry) -> Entry:
        """Add a row to the ledger, no earlier than the one before it."""
        if self.entries:
            entry = replace(entry, at=max(entry.at, self.entries[-1].at))
        _append(self.connection, entry)
        self.entries.append(entry)
        return entry


class Ledger:
    """The append-only record of versions and of what became of them, and MLflow's stages behind it.

    What a stage in MLflow says that the ledger does not is our own unfinished work or somebody's hand. Each time the
    stages have followed the ledger, its newest row is noted. Rows after that one which move a stage (promotions,
    rollbacks, and answers to a hand) are unfollowed: a crash, or MLflow being away, came in between. As long as there
    are any, MLflow may still show the versions that they name as new or previous Production, or none; that is finished
    without a row. Anything else was done by hand.
    """

    def __init__(self, database: Database, registry: Registry) -> None:
        self._database = database
        self._registry = registry

    def register(self, version: Version) -> None:
        """Record a version that MLflow has just numbered."""
        with self._database.connect() as connection:
            connection.execute(
                """
                INSERT INTO streamflow.model_versions (
                    version, run_id, as_of, service, threshold, artifact_path, artifact_sha256, dataset_digest,
                    predictions_digest, evidence, lineage, registered_at
                ) VALUES (
                    %(version)s, %(run_id)s, %(as_of)s, %(service)s, %(threshold)s, %(artifact_path)s,
                    %(artifact_sha256)s, %(dataset_digest)s, %(predictions_digest)s, %(evidence)s, %(lineage)s,
                    %(registered_at)s
                )
                """,
                {
                    **vars(version),
                    "evidence": Jsonb(msgspec.to_builtins(version.evidence)),
                    "lineage": Jsonb(dict(version.lineage)),
                },
            )

    def versions(self) -> list[Version]:
        """Every version, oldest first."""
        with self._database.connect() as connection:
            return list(_versions(connection))

    def version(self, number: int) -> Version:
        """One version; raises UnknownVersion."""
        return _version({version.version: version for version in self.versions()}, number)

    def version_of_run(self, run_id: str) -> Version | None:
        """The version that a run was registered as, if it was."""
        return next((version for version in self.versions() if version.run_id == run_id), None)

    def entries(self) -> list[Entry]:
        """The ledger, oldest first."""
        with self._database.connect() as connection:
            return list(_entries(connection))

    def production(self) -> int | None:
        """The number of the version in Production now."""
        return current(self.entries())

    def apply_policy(self, version: Version, *, now: datetime, policy: Policy, compare: Compare) -> Decision:
        """Decide about a registered version by policy: put a fit one in Staging, and promote it if the policy says so.

        Whatever comes out is in the ledger, once. A version that was in Production before, or is now, stays as it is.
        """
        number = version.version
        with self._turn() as turn:
            if _was_production(turn.entries, number):
                gates = gates_of(turn.entries, number)
                return Decision(promote=False, reason=already_promoted(number), gates=gates)
            stages = self._present(number)
            previous = current(turn.entries)
            decision = _judged(turn, turn.version(number), policy, compare)
            if decision.is_fit and stages[number].stage == NO_STAGE:
                self._registry.set_stage(number, STAGING)
            action: Action = "promote" if decision.promote else "refuse" if decision.failed else "wait"
            entry = Entry(
                now, action, number, previous, POLICY_ACTOR, decision.reason, policy.mode, False, decision.gates
            )
            if decision.promote:
                self._make_production(turn, stages, entry)
            elif not _repeats(_by_policy(turn.entries, number)[-1:], entry):
                turn.append(entry)
            return decision

    def promote(
        self,
        number: int,
        *,
        by: str,
        reason: str,
        now: datetime,
        policy: Policy,
        compare: Compare,
        override: bool = False,
        bug_fix: bool = False,
    ) -> Entry:
        """Make a version Production; ``bug_fix`` asks only that it is not worse than the one before.

        Raises PromotionRefused (recorded in the ledger) when a gate fails and ``override`` is not given, and without
        a record when it is Production already or nobody answers for it; UnknownVersion, also for a version that was
        deleted in MLflow; RegistryUnavailable, which says so if the decision stands and only the stages did not follow.
        """
        _require_answer(by, reason)
        with self._turn() as turn:
            version, previous = turn.version(number), current(turn.entries)
            if previous == number:
                raise PromotionRefused(f"version {number} is in Production already")
            stages = self._present(number)
            decision = _judged(turn, version, policy, compare, bug_fix=bug_fix)
            entry = Entry(now, "promote", number, previous, by, reason, policy.mode, override, decision.gates)
            if decision.failed and not override:
                turn.append(replace(entry, action="refuse", reason=f"{decision.reason}; asked for: {reason}"))
                turn.connection.commit()
                raise PromotionRefused(_refusal(number, decision))
            return self._make_production(turn, stages, entry)

    def rollback(self, number: int | None, *, by: str, reason: str, now: datetime, policy: Policy) -> Entry:
        """Go back to the version that was Production before, or to ``number`` if it ever was.

        Its gates are recorded, but do not stand in the way. Raises PromotionRefused when there is nothing to go back to
        or nobody answers for it; UnknownVersion, also for a version that was deleted in MLflow.
        """
        _require_answer(by, reason)
        with self._turn() as turn:
            previous = current(turn.entries)
            if previous is None:
                raise PromotionRefused("nothing is in Production, so there is nothing to roll back")
            target = number if number is not None else predecessor(turn.entries)
            if target is None:
                raise PromotionRefused(f"version {previous} is the first in Production; it has no predecessor")
            if target == previous:
                raise PromotionRefused(f"version {target} is in Production already")
            version = turn.version(target)
            if not _was_production(turn.entries, target):
                raise PromotionRefused(f"version {target} was never in Production; promote it instead")
            stages = self._present(target)
            gates = absolute_gates(version.evidence, turn.history(target), policy)
            entry = Entry(now, "rollback", target, previous, by, reason, policy.mode, False, gates)
            return self._make_production(turn, stages, entry)

    def set_threshold(
        self,
        number: int,
        value: float,
        *,
        by: str,
        reason: str,
        now: datetime,
        policy: Policy,
        remeasure: Remeasure,
        override: bool = False,
    ) -> Entry:
        """Change the probability from which on a version says churn; the service follows within a second.

        Raises PromotionRefused (recorded in the ledger) when the version would fail a gate that the threshold decides
        and ``override`` is not given, and without a record for a threshold outside (0, 1) or the one in force;
        UnknownVersion.
        """
        _require_answer(by, reason)
        if not 0 < value < 1:
            raise PromotionRefused(f"a threshold is a probability between 0 and 1, both excluded; {value:g} is not")
        with self._turn() as turn:
            version = turn.version(number)
            if version.threshold == value:
                raise PromotionRefused(f"the threshold of version {number} is {value:g} already")
            evidence = remeasure(version, value)
            gates = absolute_gates(evidence, turn.history(number), policy)
            entry = Entry(
                now,
                "threshold",
                number,
                current(turn.entries),
                by,
                reason,
                policy.mode,
                override,
                gates,
                value,
                evidence,
            )
            if (failed := [gate for gate in threshold_gates(evidence, policy) if not gate.passed]) and not override:
                what = f"a threshold of {value:g} fails {', '.join(gate.name for gate in failed)}"
                asked = f"{what}; asked for: {reason}"
                turn.append(replace(entry, action="refuse", reason=asked, threshold=None, evidence=None))
                turn.connection.commit()
                lines = [f"version {number}: {what}; --override changes it all the same"]
                raise PromotionRefused("\n".join([*lines, *_as_lines(failed)]))
            return turn.append(entry)

    def follow(self) -> None:
        """Let MLflow's stages follow the rows of the ledger that they may not follow yet.

        Leaves alone what was changed by hand; that is `reconcile`'s.
        """
        with self._turn() as turn:
            if turn.unfollowed and _in_production(self._registry.versions()) <= turn.ours:
                self._follow(turn)

    def reconcile(self, *, now: datetime, policy: Policy, compare: Compare, self_test: SelfTest) -> list[Entry]:
        """Answer what was changed by hand in MLflow; returns the rows that say so, none if nothing was.

        A version whose stage was set to Production is self-tested and held against its gates: it becomes Production
        when the policy accepts that and nothing fails, else the refusal is recorded and the stage set back. A stage
        taken from the version in Production is put back. A version in Production that was deleted is flagged once.
        Raises RegistryUnavailable; whatever was recorded by then is followed the next time.
        """
        with self._turn() as turn:
            stages = self._registry.versions()
            by_hand = sorted(number for number in _in_production(stages) if number not in turn.ours)
            answers = [
                self._answer(turn, number, by_hand, now=now, policy=policy, compare=compare, self_test=self_test)
                for number in by_hand
            ]
            answers += _lost(turn, stages, by_hand, now, policy)
            made = [turn.append(answer) for answer in answers]
            turn.connection.commit()
            if made or turn.unfollowed:
                self._follow(turn)
            return made

    def _answer(
        self,
        turn: _Turn,
        number: int,
        by_hand: Sequence[int],
        *,
        now: datetime,
        policy: Policy,
        compare: Compare,
        self_test: SelfTest,
    ) -> Entry:
        """What is recorded of a version whose stage was set to Production by hand."""
        previous = current(turn.entries)

        def answer(action: Action, reason: str, gates: tuple[Gate, ...] = ()) -> Entry:
            return Entry(now, action, number, previous, MLFLOW_ACTOR, reason, policy.mode, False, gates)

        if number not in turn.versions:
            return answer("flag", f"{BY_HAND} and taken back: StreamFlow did not register this version")
        if len(by_hand) > 1:
            return answer("refuse", f"{BY_HAND} of versions {', '.join(map(str, by_hand))} at once; only one can be")
        version = turn.version(number)
        try:
            self_test(version)
        except UNREACHABLE:
            raise
        except StreamFlowError as failure:
            return answer("refuse", f"{BY_HAND}; it fails its self-test: {failure}")
        decision = _judged(turn, version, policy, compare)
        if decision.failed:
            return answer("refuse", f"{BY_HAND}; {decision.reason}", decision.gates)
        if policy.stage_set_by_hand == "flag":
            how = f"`streamflow promote {number} --by NAME --reason TEXT`"
            return answer("flag", f"{BY_HAND} and taken back: the policy wants {how}", decision.gates)
        return answer("promote", BY_HAND, decision.gates)

    def _present(self, number: int) -> dict[int, RegisteredVersion]:
        """What MLflow has, which must include this version."""
        stages = self._registry.versions()
        if number not in stages:
            raise UnknownVersion(f"version {number} was deleted in MLflow; it cannot become Production any more")
        return stages

    def _make_production(self, turn: _Turn, stages: Mapping[int, RegisteredVersion], entry: Entry) -> Entry:
        for number in sorted(_in_production(stages) - {*turn.ours, entry.version}):
            reason = f"{BY_HAND}; overruled by the {entry.action} of version {entry.version}"
            turn.append(replace(entry, action="flag", version=number, by=MLFLOW_ACTOR, reason=reason, gates=()))
        entry = turn.append(entry)
        turn.connection.commit()
        try:
            self._follow(turn)
        except RegistryUnavailable as failure:
            raise RegistryUnavailable(
                f"version {entry.version} is in Production by the ledger, but MLflow's stages could not follow "
                f"({failure}); they will while `streamflow up` runs, or at the next `streamflow migrate`"
            ) from failure
        return entry

    def _follow(self, turn: _Turn) -> None:
        """Make MLflow's stages what the ledger says, and note that they are; Production is never without a version."""
        production, stages = current(turn.entries), self._registry.versions()
        displaced = _in_production(stages) - {production}
        if production in stages and (displaced or not _is_settled(stages[production])):
            self._registry.set_stage(production, PRODUCTION)
        for number in sorted(displaced):
            self._registry.set_stage(number, _resting_stage(turn.entries, number))
        turn.connection.execute(
            """
            INSERT INTO streamflow.stages_followed (entry) SELECT max(id) FROM streamflow.promotion_ledger
            ON CONFLICT DO NOTHING
            """
        )

    @contextmanager
    def _turn(self) -> Iterator[_Turn]:
        """One promotion at a time: a session lock that outlasts the commit, until MLflow has followed."""
        with self._database.connect() as connection:
            connection.execute("SELECT pg_advisory_lock(hashtextextended('streamflow promotion', 0))")
            (followed,) = connection.execute("SELECT max(entry) FROM streamflow.stages_followed").fetchone() or (None,)
            newest = _entries(connection, after=followed or 0)
            versions = {version.version: version for version in _versions(connection)}
            unfollowed = [entry for entry in newest if _moves_a_stage(entry)]
            yield _Turn(connection, versions, list(_entries(connection)), unfollowed)


def _judged(turn: _Turn, version: Version, policy: Policy, compare: Compare, *, bug_fix: bool = False) -> Decision:
    """What the policy says of a version now; one that cannot be compared with Production is not better than it."""
    previous, production = current(turn.entries), None
    if previous is not None:
        production = _compared(compare, version, turn.version(previous))
    candidate = Candidate(version.version, version.evidence, turn.history(version.version), bug_fix)
    return decide(candidate, production, policy)


def _compared(compare: Compare, candidate: Version, production: Version) -> Comparison | Incomparable:
    try:
        return compare(candidate, production)
    except UNREACHABLE:
        raise
    except StreamFlowError as failure:
        return Incomparable(str(failure))


def _moves_a_stage(entry: Entry) -> bool:
    return entry.action in MADE_PRODUCTION or entry.by == MLFLOW_ACTOR


def _in_production(stages: Mapping[int, RegisteredVersion]) -> set[int]:
    return {number for number, one in stages.items() if one.stage == PRODUCTION}


def _is_settled(version: RegisteredVersion) -> bool:
    return version.stage == PRODUCTION and version.has_alias


def _resting_stage(entries: Iterable[Entry], number: int) -> str:
    """The stage of a version that is not in Production."""
    if _was_production(entries, number):
        return ARCHIVED
    judged = _by_policy(entries, number)
    fit = judged and Decision(promote=False, reason="", gates=judged[-1].gates).is_fit
    return STAGING if fit else NO_STAGE


def _lost(
    turn: _Turn, stages: Mapping[int, RegisteredVersion], by_hand: Sequence[int], now: datetime, policy: Policy
) -> list[Entry]:
    """What is recorded when the version in Production has lost its stage, its alias or itself."""
    production = current(turn.entries)
    if production is None:
        return []

    def flag(reason: str) -> Entry:
        return Entry(now, "flag", production, production, MLFLOW_ACTOR, reason, policy.mode, False, ())

    if production not in stages:
        deleted = flag(
            "deleted in MLflow while in Production; the service goes on with the copy in its cache: promote another "
            "version, or `streamflow rollback --by NAME --reason TEXT`"
        )
        return [] if _repeats(turn.entries, deleted) else [deleted]
    shown = stages[production]
    if _is_settled(shown) or by_hand or turn.unfollowed:
        return []
    what = "its alias" if shown.stage == PRODUCTION else f"its stage {PRODUCTION} (it was {shown.stage})"
    return [flag(f"lost {what} by hand in MLflow; put back, because only `streamflow` promotes and rolls back")]


def _repeats(entries: Iterable[Entry], entry: Entry) -> bool:
    """Whether one of the rows says the same, at another time."""
    return any(replace(one, at=entry.at) == entry for one in entries)


def _refusal(number: int, decision: Decision) -> str:
    hints = ["--override promotes it all the same"]
    if any(gate.name == BETTER and gate.value is not None for gate in decision.failed):
        hints.append("--bug-fix asks only that it is not worse")
    lines = [f"version {number}: {decision.reason}; {', '.join(hints)}"]
    return "\n".join([*lines, *_as_lines(decision.failed)])


def _as_lines(gates: Iterable[Gate]) -> list[str]:
    return [f"  {gate.name}: {gate.reason}" for gate in gates]


def _version(versions: Mapping[int, Version], number: int) -> Version:
    if number not in versions:
        known = ", ".join(map(str, versions)) or "none yet"
        raise UnknownVersion(f"there is no version {number}; registered are: {known}")
    return versions[number]


def _require_answer(by: str, reason: str) -> None:
    if not by.strip() or not reason.strip():
        raise PromotionRefused("the ledger needs the name of who decides and the reason; give --by NAME --reason TEXT")
    if by in (POLICY_ACTOR, MLFLOW_ACTOR):
        raise PromotionRefused(f"{by!r} is a name that the ledger uses itself; give --by with the name of a person")


def _versions(connection: psycopg.Connection[Any]) -> Iterator[Version]:
    rows = connection.cursor(row_factory=dict_row).execute(
        """
        SELECT version, run_id, as_of, service, threshold, artifact_path, artifact_sha256, dataset_digest,
               predictions_digest, evidence, lineage, registered_at
        FROM streamflow.model_versions ORDER BY version
        """
    )
    for row in rows.fetchall():
        yield Version(**{**row, "evidence": msgspec.convert(row["evidence"], Evidence)})


def _entries(connection: psycopg.Connection[Any], *, after: int = 0) -> Iterator[Entry]:
    rows = connection.cursor(row_factory=dict_row).execute(
        """
        SELECT at, action, version, previous, by, reason, policy, override, gates, threshold, evidence
        FROM streamflow.promotion_ledger WHERE id > %s ORDER BY id
        """,
        (after,),
    )
    for row in rows.fetchall():
        measured = row["evidence"] and msgspec.convert(row["evidence"], Evidence)
        yield Entry(**{**row, "gates": tuple(Gate(**gate) for gate in row["gates"]), "evidence": measured})


def _append(connection: psycopg.Connection[Any], entry: Entry) -> None:
    connection.execute(
        """
        INSERT INTO streamflow.promotion_ledger
            (at, action, version, previous, by, reason, policy, override, gates, threshold, evidence)
        VALUES (
            %(at)s, %(action)s, %(version)s, %(previous)s, %(by)s, %(reason)s, %(policy)s, %(override)s, %(gates)s,
            %(threshold)s, %(evidence)s
        )
        """,
        {
            **vars(entry),
            "gates": Jsonb([asdict(gate) for gate in entry.gates]),
            "evidence": entry.evidence and Jsonb(msgspec.to_builtins(entry.evidence)),
        },
    )
