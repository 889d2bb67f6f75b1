"""How the months and the models do, as Prometheus reads it: months, drift, decay, retraining and promotion.

All of it is read from PostgreSQL in the background, so that a scrape asks nobody. It is how things stand, not what this
process has counted: every worker says the same, at most a poll later than another, hence gauges. Labels are bounded:
the newest ``MONTHS`` months, features of the contract, our own names, versions of those months.
"""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Self, TypeVar, get_args

import msgspec
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.logs import log, with_cause
from serving.polling import Polling
from serving.postgres import Postgres, Row
from serving.retraining import read_loop
from streamflow.contract import Contract
from streamflow.errors import WarehouseUnavailable
from streamflow.months import Month
from streamflow.retraining import Obstacle, RetrainingDecision
from streamflow.settings import Settings
from streamflow.situation import Begun

POLL_S = 30.0
MONTHS = 24
SCORE = "score"
ACTIONS = ("promote", "rollback", "wait", "refuse", "threshold", "flag")
CAUSES = ("no_model", "corrected_data", "decay", "slide", "drift", "more_data")
HELD_BACK = ("corrected_data", "decay", "slide", "drift")
"""The causes for which nothing may be trained with an alarm."""
RESULTS = ("promoted", "not_promoted", "no_version")
FINDINGS = ("worse_than_promised", "no_better_than_chance", "worse_calibrated", "sliding")

MONTHS_HELD = """
    SELECT month, max(written_at),
        max(rows) FILTER (WHERE relation = $1),
        max(rows) FILTER (WHERE relation = 'churn_scores'),
        bool_or(relation = $2)
    FROM streamflow.month_writes
    GROUP BY month
    ORDER BY month DESC
    LIMIT $3
"""
REPORTS_IN_FORCE = """
    SELECT max(id) FROM streamflow.reports WHERE kind = $1 GROUP BY month ORDER BY month DESC LIMIT $2
"""
REPORTS = "SELECT id, content FROM streamflow.reports WHERE id = ANY($1::bigint[])"
DECISIONS = "SELECT action, count(*) FROM streamflow.promotion_ledger GROUP BY action"
PRODUCTION = """
    SELECT decision.at, registered.as_of
    FROM streamflow.promotion_ledger AS decision
    JOIN streamflow.model_versions AS registered USING (version)
    WHERE decision.action IN ('promote', 'rollback')
    ORDER BY decision.id DESC
    LIMIT 1
"""
CANDIDATES_WAITING = """
    SELECT count(*)
    FROM (
        SELECT DISTINCT ON (version) id, action FROM streamflow.promotion_ledger
        WHERE action IN ('promote', 'rollback', 'wait', 'refuse') ORDER BY version, id DESC
    ) AS newest
    WHERE action = 'wait' AND id > coalesce(
        (SELECT max(id) FROM streamflow.promotion_ledger WHERE action IN ('promote', 'rollback')), 0
    )
"""

# --- what is read ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MonthHeld:
    """A month; ``scored`` is how many of its customers are, None if it is not."""

    month: str
    written_at: datetime
    customers: int | None
    scored: int | None
    labelled: bool


class FeatureDrift(msgspec.Struct, frozen=True):
    """The part of a drift report's feature that is exposed."""

    name: str
    psi: float
    significant: bool
    current_missing: float


class Drifts(msgspec.Struct, frozen=True):
    """The features and the score of a drift report."""

    features: tuple[FeatureDrift, ...]
    score: FeatureDrift


class DriftReport(msgspec.Struct, frozen=True):
    """The part of `monitoring.DriftContent` that is exposed."""

    month: str
    version: int
    report: Drifts


class Interval(msgspec.Struct, frozen=True):
    """A figure and its interval."""

    value: float
    low: float
    high: float


class Auc(msgspec.Struct, frozen=True):
    """The one of all metrics that is exposed."""

    auc: Interval


class HeldOut(msgspec.Struct, frozen=True):
    """What was achieved among held-out users."""

    metrics: Auc


class Finding(msgspec.Struct, frozen=True):
    """Whether something is so."""

    found: bool


class Drop(msgspec.Struct, frozen=True):
    """How a fall in AUC divides, where that is ``reliable``."""

    feature_drift: Interval
    concept_drift: Interval
    reliable: bool


class PerformanceReport(msgspec.Struct, frozen=True):
    """The part of `decay.PerformanceReport` that is exposed."""

    month: str
    version: int
    held_out: HeldOut
    promised: Auc
    worse_than_promised: Finding
    no_better_than_chance: Finding
    worse_calibrated: Finding
    sliding: Finding
    drop: Drop | None


@dataclass(frozen=True)
class LoopState:
    """What was read at ``read_at``; months and reports newest first, retrainings oldest first.

    ``decision`` says whether to train again, None where that cannot be decided.
    """

    read_at: datetime
    months: Sequence[MonthHeld]
    drift: Sequence[DriftReport]
    performance: Sequence[PerformanceReport]
    retrainings: Sequence[Begun]
    decision: RetrainingDecision | None
    decisions: dict[str, int]
    promoted_at: datetime | None
    trained_to: date | None
    candidates_waiting: int


# --- reading it -----------------------------------------------------------------------------------------------------

_Report = TypeVar("_Report", DriftReport, PerformanceReport)


class ClosedLoop(Collector):
    """How months and models did at the last poll that PostgreSQL answered; polls as long as its context."""

    def __init__(
        self, postgres: Postgres, contract: Contract, settings: Settings, clock: Callable[[], datetime]
    ) -> None:
        self._postgres = postgres
        self._contract = contract
        self._settings = settings
        self._clock = clock
        self._reports: dict[int, DriftReport | PerformanceReport] = {}
        self._metrics: Sequence[Metric] = (_read_at(None),)
        self._failing = False
        self._undecided: str | None = None
        self._polling = Polling(POLL_S, self._poll)

    async def __aenter__(self) -> Self:
        """Begin to poll."""
        await self._polling.__aenter__()
        return self

    async def __aexit__(self, *end: object) -> None:
        """Stop polling."""
        await self._polling.__aexit__(*end)

    def collect(self) -> Iterable[Metric]:
        """The metrics of the last poll that was answered."""
        return self._metrics

    async def _poll(self) -> None:
        try:
            state = await self._read()
        except WarehouseUnavailable as failure:
            if not self._failing:
                log(logging.WARNING, "closed_loop_unread", reason=with_cause(failure))
            self._failing = True
        else:
            self._metrics = tuple(metrics_of(state))
            self._failing = False

    async def _read(self) -> LoopState:
        fetch, now = self._postgres.fetch, self._clock()
        users, labels = self._contract.tables[0].name, self._contract.label_table.name
        months = [MonthHeld(*row) for row in await fetch(MONTHS_HELD, users, labels, MONTHS)]
        drift = await self._reports_in_force("drift_report", DriftReport)
        performance = await self._reports_in_force("performance_report", PerformanceReport)
        promoted_at, trained_to = _first(await fetch(PRODUCTION)) or (None, None)
        (waiting,) = (await fetch(CANDIDATES_WAITING))[0]
        loop = await read_loop(self._postgres, self._contract, self._settings)
        if loop.undecided and loop.undecided != self._undecided:
            log(logging.WARNING, "retraining_undecided", reason=loop.undecided)
        self._undecided = loop.undecided
        return LoopState(
            now,
            months,
            drift,
            performance,
            loop.begun,
            loop.decision,
            {row[0]: row[1] for row in await fetch(DECISIONS)},
            promoted_at,
            trained_to,
            waiting,
        )

    async def _reports_in_force(self, kind: str, report: type[_Report]) -> list[_Report]:
        """The newest months' reports; each is fetched once, because a report never changes."""
        numbers = [number for (number,) in await self._postgres.fetch(REPORTS_IN_FORCE, kind, MONTHS)]
        unknown = [number for number in numbers if number not in self._reports]
        if unknown:
            for number, content in await self._postgres.fetch(REPORTS, unknown):
                self._reports[number] = msgspec.json.decode(content, type=report)
        return [known for number in numbers if isinstance(known := self._reports[number], report)]


def _first(rows: Sequence[Row]) -> Row | None:
    return rows[0] if rows else None


# --- saying it ------------------------------------------------------------------------------------------------------

Samples = Iterable[tuple[Sequence[str], float]]


def metrics_of(state: LoopState) -> Iterator[Metric]:
    """Everything that is exposed; a metric without a value is left out."""
    yield _read_at(state.read_at)
    for metric in (*_months(state), *_drift(state), *_performance(state), *_models(state)):
        if metric.samples:
            yield metric


def _gauge(name: str, about: str, labels: Sequence[str], samples: Samples) -> Metric:
    family = GaugeMetricFamily(f"streamflow_{name}", about, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _read_at(moment: datetime | None) -> Metric:
    about = "When months, reports and ledger were last read from PostgreSQL; 0: not yet."
    return _gauge("closed_loop_read_timestamp_seconds", about, (), [((), moment.timestamp() if moment else 0)])


def _end(last_day: date) -> float:
    """Midnight UTC at the end of a day, in seconds since 1970."""
    return datetime.combine(last_day + timedelta(days=1), time(), UTC).timestamp()


def _months(state: LoopState) -> Iterator[Metric]:
    def of_each(name: str, about: str, value: Callable[[MonthHeld], float]) -> Metric:
        return _gauge(name, about, ("month",), [((one.month,), value(one)) for one in state.months])

    yield of_each(
        "month_end_timestamp_seconds", "When the month ended.", lambda one: _end(Month.parse(one.month).as_of)
    )
    about = "When anything of the month was last written."
    yield of_each("month_written_timestamp_seconds", about, lambda one: one.written_at.timestamp())
    yield of_each("month_customers", "Customers of the month.", lambda one: one.customers or 0)
    about = "Customers of the month with a score; 0: not scored."
    yield of_each("month_scored_customers", about, lambda one: one.scored or 0)
    yield of_each("month_labelled", "1: the month's labels have landed.", lambda one: one.labelled)


def _drift(state: LoopState) -> Iterator[Metric]:
    def of_each(name: str, about: str, value: Callable[[DriftReport], float]) -> Metric:
        samples = [((one.month, str(one.version)), value(one)) for one in state.drift]
        return _gauge(name, about, ("month", "version"), samples)

    about = "Features that differ significantly from the month that the version learned from."
    yield of_each("month_drifting_features", about, lambda one: sum(each.significant for each in one.report.features))
    about = "The largest population stability index of a feature."
    yield of_each("month_largest_psi", about, lambda one: max(each.psi for each in one.report.features))

    def of_newest(name: str, about: str, value: Callable[[FeatureDrift], float]) -> Metric:
        samples = [
            ((one.month, str(one.version), each.name), value(each))
            for one in state.drift[:1]
            for each in (*one.report.features, one.report.score)
        ]
        return _gauge(name, about, ("month", "version", "feature"), samples)

    about = "Population stability index of each feature and of the score, in the newest month with a drift report."
    yield of_newest("drift_psi", about, lambda one: one.psi)
    yield of_newest("drift_significant", "1: the difference is significant.", lambda one: one.significant)
    yield of_newest("drift_missing_ratio", "Share of customers without a value.", lambda one: one.current_missing)


def _performance(state: LoopState) -> Iterator[Metric]:
    def of_each(name: str, about: str, samples: Callable[[PerformanceReport], Samples], *labels: str) -> Metric:
        found = [
            ((one.month, str(one.version), *values), value)
            for one in state.performance
            for values, value in samples(one)
        ]
        return _gauge(name, about, ("month", "version", *labels), found)

    def interval(name: str, about: str, auc: Callable[[PerformanceReport], Interval]) -> Iterator[Metric]:
        yield of_each(name, f"{about}.", lambda one: [((), auc(one).value)])
        yield of_each(f"{name}_low", f"{about}: lower end of 95 %.", lambda one: [((), auc(one).low)])
        yield of_each(f"{name}_high", f"{about}: upper end of 95 %.", lambda one: [((), auc(one).high)])

    about = "AUC of the month's scores among held-out customers"
    yield from interval("month_auc", about, lambda one: one.held_out.metrics.auc)
    yield from interval("month_promised_auc", "AUC that the version promised", lambda one: one.promised.auc)
    yield of_each(
        "month_decay",
        "1: the month's labels gave this finding about the version that scored it.",
        lambda one: [((finding,), getattr(one, finding).found) for finding in FINDINGS],
        "finding",
    )
    yield of_each(
        "month_auc_drop",
        "What the AUC lost since the month that the version learned from, by cause, where that can be told.",
        lambda one: [
            ((part,), getattr(one.drop, part).value)
            for part in ("feature_drift", "concept_drift")
            if one.drop and one.drop.reliable
        ],
        "part",
    )


def _models(state: LoopState) -> Iterator[Metric]:
    def single(name: str, about: str, value: float | None) -> Metric:
        return _gauge(name, about, (), [] if value is None else [((), value)])

    begun = state.retrainings
    counted = {(kind, result): 0 for kind in CAUSES for result in RESULTS}
    for one in begun:
        counted[_kind(one), _result(one)] = counted.get((_kind(one), _result(one)), 0) + 1
    yield _gauge("retrainings", "Retrainings begun, by cause and result so far.", ("cause", "result"), counted.items())
    about = "How many of the newest retrainings in a row did not give a better model than there was."
    yield single("retrainings_in_vain", about, _in_vain(begun))
    about = "1: the newest retraining has not given a version yet."
    yield single("retraining_unfinished", about, bool(begun) and begun[-1].version is None)
    about = "When the newest retraining began."
    yield single("retraining_started_timestamp_seconds", about, begun[-1].started_at.timestamp() if begun else None)
    about = "1: this calls for another model, and that forbids to train it; `streamflow status` says more."
    yield _gauge("retraining_held_back", about, ("cause", "obstacle"), _held_back(state.decision))
    decisions = [((action,), state.decisions.get(action, 0)) for action in ACTIONS]
    yield _gauge("ledger_decisions", "Rows of the promotion ledger.", ("action",), decisions)
    about = "Versions that passed every gate, newer than the last decision, and wait for a person's approval."
    yield single("candidates_waiting", about, state.candidates_waiting)
    about = "End of the newest month that the Production version learned from."
    yield single("production_data_end_timestamp_seconds", about, _end(state.trained_to) if state.trained_to else None)
    about = "When the Production version was decided on."
    moment = state.promoted_at.timestamp() if state.promoted_at else None
    yield single("production_promoted_timestamp_seconds", about, moment)


def _kind(begun: Begun) -> str:
    return begun.cause.split(":")[0]


def _result(begun: Begun) -> str:
    if begun.version is None:
        return "no_version"
    return "promoted" if begun.promoted else "not_promoted"


def _held_back(decision: RetrainingDecision | None) -> Samples:
    """Every cause and obstacle while it can be decided, so that one that is gone is 0 and not left as it was."""
    if decision is None:
        return []
    alarms = {(alarm.about, alarm.obstacle) for alarm in decision.alarms}
    pairs = itertools.product(HELD_BACK, get_args(Obstacle))
    return [(pair, pair in alarms) for pair in pairs]


def _in_vain(begun: Sequence[Begun]) -> int:
    known = [one.helped for one in begun if _kind(one) != "no_model" and one.helped is not None]
    return next((number for number, helped in enumerate(reversed(known)) if helped), len(known))
