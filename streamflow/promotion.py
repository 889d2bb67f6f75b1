"""Promotion: gates, decisions, the ledger and rollback.

The ledger in PostgreSQL is the authority on which version is Production; MLflow's stages follow it. Decisions are
pure functions of evidence and policy; what is promoted, rolled back or refused is a row that nobody changes.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec
import psycopg
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from streamflow.database import Database
from streamflow.errors import ConfigurationError, PromotionRefused, RegistryUnavailable, UnknownVersion
from streamflow.registry import ARCHIVED, PRODUCTION, STAGING, Registry
from streamflow.settings import Settings

Action = Literal["promote", "rollback", "refuse"]
POLICY_ACTOR = "policy"


class Gates(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The bounds that a version must keep."""

    minimum_auc: float
    maximum_parity_difference: float


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who may promote, and the gates before it; see policy.toml."""

    mode: Literal["manual", "auto"]
    first_model: Literal["promote", "wait"]
    gates: Gates

    @classmethod
    def load(cls, settings: Settings) -> "Policy":
        """Read the policy file; raises ConfigurationError that names the key that cannot be used."""
        path: Path = settings.policy_file
        try:
            policy = msgspec.toml.decode(path.read_bytes(), type=cls)
        except OSError as failure:
            raise ConfigurationError(f"the policy file {path} cannot be read: {failure.strerror}") from failure
        except (msgspec.DecodeError, UnicodeDecodeError) as failure:
            raise ConfigurationError(f"the policy file {path} cannot be used: {failure}") from failure
        return msgspec.structs.replace(policy, mode=settings.policy) if settings.policy else policy


@dataclass(frozen=True)
class Gate:
    """One condition, what was measured against which bound, and the outcome in words."""

    name: str
    passed: bool
    value: float
    bound: float
    reason: str


@dataclass(frozen=True)
class Version:
    """A registered version as our own records have it."""

    version: int
    run_id: str
    as_of: date
    service: str
    threshold: float
    artifact_path: str
    artifact_sha256: str
    dataset_digest: str
    predictions_digest: str
    metrics: Mapping[str, float]
    gates: tuple[Gate, ...]
    lineage: Mapping[str, Any]
    registered_at: datetime


@dataclass(frozen=True)
class Entry:
    """A row of the ledger: ``previous`` was Production before, ``version`` is what it is about."""

    at: datetime
    action: Action
    version: int
    previous: int | None
    by: str
    reason: str
    policy: str
    override: bool
    gates: tuple[Gate, ...]


@dataclass(frozen=True)
class Decision:
    """What the policy does with a version that nobody has asked to promote."""

    promote: bool
    reason: str


def check_gates(
    metrics: Mapping[str, float], *, parity_difference: float, flipped_decisions: int, policy: Policy
) -> tuple[Gate, ...]:
    """Hold a candidate's evidence against the policy's bounds; a pure function."""
    auc, bounds = metrics["auc"], policy.gates
    difference = bounds.maximum_parity_difference
    return (
        Gate(
            "ranks_better_than_chance",
            auc > bounds.minimum_auc,
            auc,
            bounds.minimum_auc,
            f"hold-out AUC is {auc:.4f}, to exceed {bounds.minimum_auc:g}",
        ),
        Gate(
            "compiled_scorer_agrees",
            parity_difference <= difference,
            parity_difference,
            difference,
            f"largest difference to the pipeline is {parity_difference:.1e}, at most {difference:g} allowed",
        ),
        Gate(
            "no_decision_flips",
            flipped_decisions == 0,
            flipped_decisions,
            0,
            f"{flipped_decisions} rows are decided otherwise by the compiled scorer, none allowed",
        ),
    )


def decide(candidate: Version, production: Version | None, policy: Policy) -> Decision:
    """Whether the policy promotes a freshly registered version by itself; a pure function."""
    if failed := [gate.reason for gate in candidate.gates if not gate.passed]:
        return Decision(promote=False, reason=f"gates failed: {'; '.join(failed)}")
    if policy.mode == "auto":
        return Decision(promote=True, reason="policy auto: every gate passed")
    if production is None and policy.first_model == "promote":
        return Decision(promote=True, reason="policy first_model: nothing is in Production and every gate passed")
    return Decision(
        promote=False,
        reason=f"policy {policy.mode}: waits for `streamflow promote {candidate.version} --by NAME --reason TEXT`",
    )


class Ledger:
    """The append-only record of versions and of what became Production, and MLflow's stages behind it."""

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
                    predictions_digest, metrics, gates, lineage, registered_at
                ) VALUES (
                    %(version)s, %(run_id)s, %(as_of)s, %(service)s, %(threshold)s, %(artifact_path)s,
                    %(artifact_sha256)s, %(dataset_digest)s, %(predictions_digest)s, %(metrics)s, %(gates)s,
                    %(lineage)s, %(registered_at)s
                )
                """,
                {
                    **vars(version),
                    "metrics": Jsonb(dict(version.metrics)),
                    "gates": _json(version.gates),
                    "lineage": Jsonb(dict(version.lineage)),
                },
            )

    def versions(self) -> list[Version]:
        """Every version, oldest first."""
        with self._database.connect() as connection:
            return list(_versions(connection))

    def version(self, number: int) -> Version:
        """One version; raises UnknownVersion."""
        found = {version.version: version for version in self.versions()}
        if number not in found:
            known = ", ".join(map(str, found)) or "none yet"
            raise UnknownVersion(f"there is no version {number}; registered are: {known}")
        return found[number]

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

    def promote(
        self, number: int, *, by: str, reason: str, now: datetime, policy: Policy, override: bool = False
    ) -> Entry:
        """Make a version Production.

        Raises PromotionRefused (recorded in the ledger) when a gate failed and ``override`` is not given, and without
        a record when it is Production already or nobody answers for it; UnknownVersion; RegistryUnavailable, with
        nothing changed.
        """
        _require_answer(by, reason)
        version = self.version(number)
        failed = [gate.reason for gate in version.gates if not gate.passed]
        with self._turn() as (connection, entries):
            self._registry.require(number)
            previous = current(entries)
            if previous == number:
                raise PromotionRefused(f"version {number} is in Production already")
            entry = Entry(now, "promote", number, previous, by, reason, policy.mode, override, version.gates)
            if failed and not override:
                refused = Entry(
                    now, "refuse", number, previous, by, "; ".join(failed), policy.mode, override, version.gates
                )
                _append(connection, refused)
                connection.commit()
                raise PromotionRefused(
                    f"version {number} fails its gates: {'; '.join(failed)}; --override promotes it all the same"
                )
            return self._make_production(connection, entry)

    def rollback(self, number: int | None, *, by: str, reason: str, now: datetime, policy: Policy) -> Entry:
        """Go back to the version that was Production before, or to ``number`` if it ever was.

        Raises PromotionRefused when there is nothing to go back to or nobody answers for it.
        """
        _require_answer(by, reason)
        with self._turn() as (connection, entries):
            previous = current(entries)
            if previous is None:
                raise PromotionRefused("nothing is in Production, so there is nothing to roll back")
            target = number if number is not None else predecessor(entries)
            if target is None:
                raise PromotionRefused(f"version {previous} is the first in Production; it has no predecessor")
            if target == previous:
                raise PromotionRefused(f"version {target} is in Production already")
            version = self.version(target)
            if all(entry.version != target or entry.action == "refuse" for entry in entries):
                raise PromotionRefused(f"version {target} was never in Production; promote it instead")
            self._registry.require(target)
            entry = Entry(
                now, "rollback", target, previous, by, reason, policy.mode, override=False, gates=version.gates
            )
            return self._make_production(connection, entry)

    def follow(self) -> None:
        """Bring MLflow's stages in line with the ledger, where they are not."""
        with self._turn() as (_, entries):
            self._mirror(current(entries))

    def _make_production(self, connection: psycopg.Connection[Any], entry: Entry) -> Entry:
        _append(connection, entry)
        connection.commit()
        try:
            self._mirror(entry.version)
        except RegistryUnavailable as failure:
            raise RegistryUnavailable(
                f"version {entry.version} is in Production by the ledger, but MLflow's stages could not follow "
                f"({failure}); they will at the next `streamflow up` or promotion"
            ) from failure
        return entry

    def _mirror(self, production: int | None) -> None:
        for version in self._registry.versions().values():
            if version.stage == PRODUCTION and version.version != production:
                self._registry.set_stage(version.version, ARCHIVED)
            if version.version == production and not (version.stage == PRODUCTION and version.has_alias):
                self._registry.set_stage(version.version, PRODUCTION)

    @contextmanager
    def _turn(self) -> Iterator[tuple[psycopg.Connection[Any], list[Entry]]]:
        """One promotion at a time: a session lock that outlasts the commit, until MLflow has followed."""
        with self._database.connect() as connection:
            connection.execute("SELECT pg_advisory_lock(hashtextextended('streamflow promotion', 0))")
            yield connection, list(_entries(connection))


def current(entries: list[Entry]) -> int | None:
    """Which version the ledger says is Production after these entries, oldest first."""
    return next((entry.version for entry in reversed(entries) if entry.action != "refuse"), None)


def predecessor(entries: list[Entry]) -> int | None:
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


def apply_policy(ledger: Ledger, registry: Registry, version: Version, policy: Policy, now: datetime) -> Decision:
    """Put a registered version in Staging when it passes its gates, and promote it if the policy says so.

    A version that was in Production before, or is now, stays as it is.
    """
    if any(entry.version == version.version and entry.action != "refuse" for entry in ledger.entries()):
        return Decision(promote=False, reason=f"version {version.version} was promoted before")
    if all(gate.passed for gate in version.gates):
        registry.set_stage(version.version, STAGING)
    production = ledger.production()
    decision = decide(version, None if production is None else ledger.version(production), policy)
    if decision.promote:
        ledger.promote(version.version, by=POLICY_ACTOR, reason=decision.reason, now=now, policy=policy)
    return decision


def _require_answer(by: str, reason: str) -> None:
    if not by.strip() or not reason.strip():
        raise PromotionRefused("the ledger needs the name of who decides and the reason; give --by NAME --reason TEXT")


def _versions(connection: psycopg.Connection[Any]) -> Iterator[Version]:
    rows = connection.cursor(row_factory=dict_row).execute(
        """
        SELECT version, run_id, as_of, service, threshold, artifact_path, artifact_sha256, dataset_digest,
               predictions_digest, metrics, gates, lineage, registered_at
        FROM streamflow.model_versions ORDER BY version
        """
    )
    for row in rows.fetchall():
        yield Version(**{**row, "gates": _gates(row["gates"])})


def _entries(connection: psycopg.Connection[Any]) -> Iterator[Entry]:
    rows = connection.cursor(row_factory=dict_row).execute(
        """
        SELECT at, action, version, previous, by, reason, policy, override, gates
        FROM streamflow.promotion_ledger ORDER BY id
        """
    )
    for row in rows.fetchall():
        yield Entry(**{**row, "gates": _gates(row["gates"])})


def _append(connection: psycopg.Connection[Any], entry: Entry) -> None:
    connection.execute(
        """
        INSERT INTO streamflow.promotion_ledger
            (at, action, version, previous, by, reason, policy, override, gates)
        VALUES (%(at)s, %(action)s, %(version)s, %(previous)s, %(by)s, %(reason)s, %(policy)s, %(override)s, %(gates)s)
        """,
        {**vars(entry), "gates": _json(entry.gates)},
    )


def _json(gates: tuple[Gate, ...]) -> Jsonb:
    return Jsonb([asdict(gate) for gate in gates])


def _gates(rows: list[dict[str, Any]]) -> tuple[Gate, ...]:
    return tuple(Gate(**row) for row in rows)
