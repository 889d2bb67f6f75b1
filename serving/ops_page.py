"""What the ops page tells: what is in Production and why, how good it promised to be and is, months, ledger, a trace.

Reading the database into what the page shows belongs here; how that looks is ops_html.py's. What reports and versions
record is read by the few names that the page shows. Months are as the warehouse has them: the service may run where
the landing zone is not.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Literal
from uuid import UUID

from msgspec import Struct

from serving.months import NEWEST, MonthMade
from serving.postgres import Postgres
from serving.retraining import read_loop
from streamflow.contract import Contract
from streamflow.months import Month
from streamflow.predictions import LoggedPrediction
from streamflow.relations import CHURN_SCORES, Standing
from streamflow.retraining import Alarm, RetrainingDecision
from streamflow.settings import Settings

SHOWN_ENTRIES = 20
SHOWN_RETRAININGS = 12
SHOWN_CANDIDATES = 5
TOLD_BY = {
    "decay": ("no better than chance", "worse than promised"),
    "worse_calibrated": ("worse calibrated",),
    "slide": ("sliding",),
}
"""Which findings of a performance report an alarm tells with all that there is to it."""


# --- what the database has ------------------------------------------------------------------------------------------


class Interval(Struct, frozen=True):
    """A measure and its interval of 95 %."""

    value: float
    low: float
    high: float


class Gate(Struct, frozen=True):
    """One condition that a version was held against."""

    name: str
    passed: bool
    value: float | None
    bound: float | None
    reason: str


class Version(Struct, frozen=True):
    """A version and the decision about it that counts: what made it Production, or why it waits.

    ``held_against`` was in Production then. ``because`` is what it was trained again for, None where a person asked.
    """

    version: int
    at: datetime
    action: str
    by: str
    reason: str
    override: bool
    held_against: int | None
    gates: tuple[Gate, ...]
    threshold: float
    as_of: date
    service: str
    estimator: str | None
    calibrated: bool | None
    window: tuple[str, ...]
    window_reason: str | None
    because: str | None
    promised: Interval | None
    users: int | None
    run_id: str
    dataset_digest: str
    artifact_sha256: str
    code_version: str | None

    @property
    def failed(self) -> tuple[Gate, ...]:
        """The gates that it did not pass."""
        return tuple(gate for gate in self.gates if not gate.passed)


class Entry(Struct, frozen=True):
    """A row of the ledger; ``threshold`` is the new one where it changes that."""

    at: datetime
    action: str
    version: int
    previous: int | None
    by: str
    reason: str
    override: bool
    threshold: float | None


class Finding(Struct, frozen=True):
    """Whether something is so, and a sentence about it."""

    found: bool
    reason: str


class Performance(Struct, frozen=True):
    """What a version achieved on the held-out users of a month, and what it had promised, as AUC."""

    month: str
    version: int
    trained_on: tuple[str, ...]
    users: int
    achieved: Interval
    promised: Interval
    worse_than_promised: Finding
    no_better_than_chance: Finding
    worse_calibrated: Finding
    sliding: Finding
    explained: str | None

    @property
    def decayed(self) -> bool:
        """Whether the version ranked worse than it promised, or no better than chance."""
        return self.worse_than_promised.found or self.no_better_than_chance.found

    @property
    def seen(self) -> bool:
        """Whether the version learned from other users of this month."""
        return self.month in self.trained_on

    @property
    def findings(self) -> tuple[str, ...]:
        """What was found, in words."""
        named = {
            "no better than chance": self.no_better_than_chance,
            "worse than promised": self.worse_than_promised,
            "worse calibrated": self.worse_calibrated,
            "sliding": self.sliding,
        }
        return tuple(name for name, finding in named.items() if finding.found)


Size = Literal["none", "small", "moderate", "large"]


class FeatureDrift(Struct, frozen=True):
    """How far one feature, or the scores, moved."""

    name: str
    psi: float
    significant: bool
    size: Size


class Drift(Struct, frozen=True):
    """How a month differs from the one that its version was trained on."""

    month: str
    version: int
    reference_month: str
    features: tuple[FeatureDrift, ...]
    score: FeatureDrift

    @property
    def significant(self) -> tuple[str, ...]:
        """The features whose drift is no chance."""
        return tuple(one.name for one in self.features if one.significant)

    @property
    def largest(self) -> FeatureDrift:
        """The feature that moved most."""
        return max(self.features, key=lambda one: one.psi)


class Retraining(Struct, frozen=True):
    """A model that is trained for a cause, and the version that came of it, if one did, and what became of that.

    ``failure`` is what one of its ``attempts`` ended with, None as long as none failed; one may have been killed.
    """

    month: str
    cause: str
    reason: str
    started_at: datetime
    attempts: int
    failure: str | None
    version: int | None
    outcome: str | None


class _Counts(Struct, frozen=True):
    entries: int
    months: int
    waiting: int


class Origin(Struct, frozen=True):
    """Where a version comes from; ``promoted_at`` is when it became Production last, before it answered."""

    as_of: date
    service: str
    window: tuple[str, ...]
    estimator: str | None
    dataset_digest: str
    registered_at: datetime
    promoted_at: datetime | None


# --- what the page tells --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MonthView:
    """One month: how far it is, and what was found of it; what has not been made of it is None."""

    month: str
    standing: Standing
    customers: int | None
    scored_by: int | None
    to_contact: int | None
    expected_value: float | None
    drift: Drift | None
    performance: Performance | None
    retraining: Retraining | None


@dataclass(frozen=True)
class Traced:
    """A logged prediction and what answered it; ``origin`` is None for a version that was never registered."""

    prediction: LoggedPrediction
    origin: Origin | None


@dataclass(frozen=True)
class Trace:
    """What came of looking for ``request_id``: a prediction, or the reason why there is none."""

    request_id: str
    traced: Traced | None
    problem: str | None = None


@dataclass(frozen=True)
class Look:
    """Something that needs a person: ``what`` it is, ``why`` it is so, and the ``remedy``, where there are such."""

    what: str
    why: str | None = None
    remedy: str | None = None


@dataclass(frozen=True)
class Served:
    """What this process answers with: a version, and why it is not another; no version and the reason."""

    version: int | None
    problem: Look | None


@dataclass(frozen=True)
class OpsPage:
    """Everything on the page at ``at``; months and retrainings are newest first, as is the ledger.

    ``entries_in_all`` and ``months_in_all`` count those that are not shown too, ``waiting_in_all`` the candidates.
    ``decision`` says whether to train again; where that cannot be decided it is None, and ``undecided`` says why.
    """

    at: datetime
    production: Version | None
    served: Served
    waiting: Sequence[Version]
    waiting_in_all: int
    months: Sequence[MonthView]
    months_in_all: int
    decision: RetrainingDecision | None
    undecided: str | None
    retrainings: Sequence[Retraining]
    ledger: Sequence[Entry]
    entries_in_all: int
    trace: Trace | None

    @property
    def performances(self) -> list[Performance]:
        """The reports on the months shown, oldest first."""
        return [one.performance for one in reversed(self.months) if one.performance]

    @property
    def drifts(self) -> list[Drift]:
        """The same for drift."""
        return [one.drift for one in reversed(self.months) if one.drift]

    @property
    def achieved(self) -> Performance | None:
        """The newest report on what is in Production."""
        number = self.production.version if self.production else None
        return next((one for one in reversed(self.performances) if one.version == number), None)

    @property
    def held_back(self) -> bool:
        """Whether something calls for another model and nothing may be trained, which a person must look at."""
        return self.decision is not None and any(alarm.obstacle for alarm in self.decision.alarms)

    @property
    def attention(self) -> list[Look]:
        """What a person must look at, most urgent first."""
        alarms = self.decision.alarms if self.decision else ()
        looks = [(bool(alarm.obstacle), Look(alarm.what, alarm.why, alarm.remedy)) for alarm in alarms]
        found = [self.served.problem] if self.served.problem else []
        found += [look for held_back, look in looks if held_back]
        if self.undecided:
            found.append(Look("whether to train again cannot be decided", self.undecided))
        found += self._decayed(alarms)
        found += [look for held_back, look in looks if not held_back]
        found += [
            Look(f"{one.month} is {one.standing.state}: {_listed(one.standing.stale or one.standing.missing)}")
            for one in self.months
            if one.standing.state in ("stale", "incomplete")
        ]
        found += [
            Look(f"the retraining for {one.month} failed", one.failure, f"mend that, then `streamflow run {one.month}`")
            if one.failure
            else Look(f"the retraining for {one.month} has no version yet: it is under way, or its process was killed")
            for one in self.retrainings
            if one.version is None
        ]
        if self.waiting_in_all:
            what = "1 version waits" if self.waiting_in_all == 1 else f"{self.waiting_in_all} versions wait"
            found.append(Look(f"{what} for approval"))
        return found

    def _decayed(self, alarms: Sequence[Alarm]) -> Iterator[Look]:
        """What the labels say of Production that no alarm tells."""
        told = {finding for alarm in alarms for finding in TOLD_BY.get(alarm.about, ())}
        if (achieved := self.achieved) and (names := [name for name in achieved.findings if name not in told]):
            what = f"version {achieved.version}, which is in Production, was {_listed(names)} in {achieved.month}"
            retrain = self.decision is not None and self.decision.retrain
            yield Look(f"{what}; another is trained by itself" if retrain else what)


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1]))) if names else ""


# --- reading --------------------------------------------------------------------------------------------------------

_VERSION = """
    SELECT decided.version, decided.at, decided.action, decided.by, decided.reason, decided.override,
        decided.previous AS held_against, decided.gates, registered.as_of, registered.service, registered.run_id,
        registered.dataset_digest, registered.artifact_sha256,
        coalesce(
            (SELECT later.threshold FROM streamflow.promotion_ledger AS later
             WHERE later.action = 'threshold' AND later.version = decided.version ORDER BY later.id DESC LIMIT 1),
            registered.threshold
        ) AS threshold,
        lineage -> 'estimator' AS estimator, lineage -> 'calibrated' AS calibrated,
        coalesce(lineage -> 'window', '[]') AS window, lineage -> 'window_reason' AS window_reason,
        lineage -> 'code_version' AS code_version, retrainings.reason AS because,
        registered.evidence #> '{metrics,auc}' AS promised, registered.evidence -> 'users' AS users
    FROM streamflow.promotion_ledger AS decided
    JOIN streamflow.model_versions AS registered USING (version)
    LEFT JOIN streamflow.retrainings ON retrainings.cause = lineage ->> 'cause'
"""
PRODUCTION = f"{_VERSION} WHERE decided.action IN ('promote', 'rollback') ORDER BY decided.id DESC LIMIT 1"
_WAITING = """
    SELECT id FROM (
        SELECT DISTINCT ON (version) id, action FROM streamflow.promotion_ledger
        WHERE action IN ('promote', 'rollback', 'wait', 'refuse') ORDER BY version, id DESC
    ) AS newest WHERE action = 'wait'
"""
WAITING = f"{_VERSION} WHERE decided.id IN ({_WAITING}) ORDER BY decided.id DESC LIMIT $1"
LEDGER = """
    SELECT at, action, version, previous, by, reason, override, threshold
    FROM streamflow.promotion_ledger ORDER BY id DESC LIMIT $1
"""
_COUNTS = """
    SELECT (SELECT count(*) FROM streamflow.promotion_ledger) AS entries,
        (SELECT count(DISTINCT month) FROM streamflow.month_writes) AS months, count(*) AS waiting
    FROM
"""
COUNTS = f"{_COUNTS} ({_WAITING}) AS waits"
PERFORMANCE = """
    SELECT DISTINCT ON (month) month, model_version AS version, content -> 'trained_on' AS trained_on,
        content #> '{held_out,users}' AS users, content #> '{held_out,metrics,auc}' AS achieved,
        content #> '{promised,auc}' AS promised, content -> 'worse_than_promised' AS worse_than_promised,
        content -> 'no_better_than_chance' AS no_better_than_chance, content -> 'worse_calibrated' AS worse_calibrated,
        content -> 'sliding' AS sliding, content #> '{drop,reason}' AS explained
    FROM streamflow.reports WHERE kind = 'performance_report' AND month = ANY($1) ORDER BY month, id DESC
"""
DRIFT = """
    SELECT DISTINCT ON (month) month, model_version AS version, content -> 'reference_month' AS reference_month,
        content #> '{report,features}' AS features, content #> '{report,score}' AS score
    FROM streamflow.reports WHERE kind = 'drift_report' AND month = ANY($1) ORDER BY month, id DESC
"""
RETRAININGS = """
    SELECT retrainings.month, retrainings.cause, retrainings.reason, started_at, attempts, failure, made.version,
        (SELECT action FROM streamflow.promotion_ledger AS decided
         WHERE decided.version = made.version AND action IN ('promote', 'rollback', 'wait', 'refuse')
         ORDER BY id DESC LIMIT 1) AS outcome
    FROM streamflow.retrainings
    LEFT JOIN LATERAL (
        SELECT version FROM streamflow.model_versions WHERE lineage ->> 'cause' = cause ORDER BY version DESC LIMIT 1
    ) AS made ON true
    ORDER BY started_at DESC, cause LIMIT $1
"""
LOGGED = "SELECT * FROM streamflow.predictions WHERE request_id = $1::uuid"
ORIGIN = """
    SELECT as_of, service, coalesce(lineage -> 'window', '[]') AS window, lineage -> 'estimator' AS estimator,
        dataset_digest, registered_at,
        (SELECT max(at) FROM streamflow.promotion_ledger AS decided
         WHERE decided.version = registered.version AND action IN ('promote', 'rollback') AND at <= $2) AS promoted_at
    FROM streamflow.model_versions AS registered WHERE version = $1
"""


async def read(
    postgres: Postgres, contract: Contract, settings: Settings, served: Served, request_id: str | None, now: datetime
) -> OpsPage:
    """Everything that the page tells, with the trace of a request id if one is asked for.

    One query after the other: the connections are the predictions' too. Raises WarehouseUnavailable.
    """
    loop = await read_loop(postgres, contract, settings)
    production = await postgres.read(Version, PRODUCTION)
    retrainings = await postgres.read(Retraining, RETRAININGS, SHOWN_RETRAININGS)
    (counts,) = await postgres.read(_Counts, COUNTS)
    return OpsPage(
        at=now,
        production=production[0] if production else None,
        served=served,
        waiting=await postgres.read(Version, WAITING, SHOWN_CANDIDATES),
        waiting_in_all=counts.waiting,
        months=await _months(postgres, contract, loop.months, retrainings),
        months_in_all=counts.months,
        decision=loop.decision,
        undecided=loop.undecided,
        retrainings=retrainings,
        ledger=await postgres.read(Entry, LEDGER, SHOWN_ENTRIES),
        entries_in_all=counts.entries,
        trace=await _trace(postgres, request_id.strip()) if request_id and request_id.strip() else None,
    )


async def _months(
    postgres: Postgres, contract: Contract, made: Mapping[Month, MonthMade], retrainings: Sequence[Retraining]
) -> list[MonthView]:
    """The newest months, newest first."""
    shown = list(made)[:NEWEST]
    keys = [str(month) for month in shown]
    performances = {one.month: one for one in await postgres.read(Performance, PERFORMANCE, keys)}
    drifts = {one.month: one for one in await postgres.read(Drift, DRIFT, keys)}
    newest = {one.month: one for one in reversed(retrainings)}
    return [
        _month(
            month,
            contract,
            made[month],
            drift=drifts.get(str(month)),
            performance=performances.get(str(month)),
            retraining=newest.get(str(month)),
        )
        for month in shown
    ]


def _month(
    month: Month,
    contract: Contract,
    made: MonthMade,
    *,
    drift: Drift | None,
    performance: Performance | None,
    retraining: Retraining | None,
) -> MonthView:
    tables = [made.written[table.name] for table in contract.tables if table.name in made.written]
    scores = made.written[CHURN_SCORES].facts if CHURN_SCORES in made.written else {}
    return MonthView(
        str(month),
        made.standing,
        tables[0].rows if tables else None,
        scores.get("version"),
        scores.get("contacts"),
        scores.get("expected_value"),
        drift,
        performance,
        retraining,
    )


async def _trace(postgres: Postgres, request_id: str) -> Trace:
    try:
        wanted = UUID(request_id)
    except ValueError:
        return Trace(request_id, None, "That is no request id: one is a UUID, as in an answer's X-Request-ID header.")
    found = await postgres.read(LoggedPrediction, LOGGED, wanted)
    if not found:
        problem = (
            "The prediction log has no such request: it answered no prediction, its month was dropped, or it is so new "
            "that PostgreSQL does not have it yet."
        )
        return Trace(str(wanted), None, problem)
    origin = await postgres.read(Origin, ORIGIN, found[0].model_version, found[0].answered_at)
    return Trace(str(wanted), Traced(found[0], origin[0] if origin else None))
