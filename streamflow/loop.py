"""The closed loop: what is to be done next without being asked, and whether to train again.

Both are decided here from what the platform holds, once for Dagster's sensors and for the command line. How things are
done is pipeline.py's and monitoring.py's.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

from streamflow import monitoring
from streamflow.database import Database
from streamflow.errors import TrainingRefused, UnknownMonth
from streamflow.gates import BETTER
from streamflow.months import Month
from streamflow.pipeline import CHURN_MODEL, TRAINING_DATASET, Platform
from streamflow.promotion import MADE_PRODUCTION, Entry, Version, current, gates_of
from streamflow.retraining import (
    Correction,
    Drift,
    Production,
    Retraining,
    RetrainingDecision,
    Situation,
    should_retrain,
)
from streamflow.status import TRAINED, WATCHED, MonthStatus, month_statuses, needs_labels, relations
from streamflow.warehouse import month_write

MOST_ATTEMPTS = 3
"""How often a training is begun for one cause when its process is killed each time."""


@dataclass(frozen=True)
class Step:
    """The next thing to do: make these assets of a month, upstream first.

    ``cause`` is that of a retraining. ``because_of`` are the other months whose correction made some of them due, which
    nothing in their own month did: `Standing.because_of`.
    """

    month: Month
    assets: tuple[str, ...]
    reason: str
    cause: str | None = None
    because_of: tuple[Month, ...] = ()


def next_step(
    months: Sequence[MonthStatus],
    decide: Callable[[Month], RetrainingDecision],
    *,
    left_out: Collection[Month] = (),
) -> Step | None:
    """What is to be done next; None when nothing is. A pure function of ``months``, oldest first, and ``decide``.

    ``decide`` says whether to train again when the given month is the newest that is labelled and done. Months are
    done in order, and before a newer one is scored, models are trained for what the older ones gave reason to: the
    newer one is scored by what comes of it. Those ``left_out``, because they failed, hold up no other.
    """
    newest_labelled = None
    for status in months:
        month = Month.parse(status.month)
        if month in left_out:
            continue
        if status.pending:
            retraining = None if status.scored else _retraining(newest_labelled, decide)
            return retraining or _pending(month, status)
        if status.state != "unlabelled":
            newest_labelled = month
    return _retraining(newest_labelled, decide)


def _pending(month: Month, status: MonthStatus) -> Step:
    others = sorted({other for name in status.pending for other in status.because_of.get(name, ())})
    why = f", held against {', '.join(others)} as it was before its correction" if others else ""
    return Step(
        month, status.pending, f"{month} is {status.state}{why}", because_of=tuple(Month.parse(one) for one in others)
    )


def _retraining(newest: Month | None, decide: Callable[[Month], RetrainingDecision]) -> Step | None:
    if newest is None:
        return None
    decision = decide(newest)
    return Step(newest, TRAINED, decision.reason, decision.cause) if decision.retrain else None


def due(platform: Platform, left_out: Collection[Month] = ()) -> Step | None:
    """What the platform is to do next."""
    decide = functools.partial(decision, platform)
    return next_step(month_statuses(platform), decide, left_out=left_out)


def decision(platform: Platform, newest: Month | None) -> RetrainingDecision:
    """Whether to train again, ``newest`` being the newest month that has labels and is done."""
    return should_retrain(situation(platform, newest), platform.policy.retraining)


def newest_labelled(months: Sequence[MonthStatus]) -> Month | None:
    """The newest month that has labels and of which nothing is to be made."""
    labelled = [one.month for one in months if not one.is_pending and one.state != "unlabelled"]
    return Month.parse(labelled[-1]) if labelled else None


def whole_months(platform: Platform, months: Iterable[Month]) -> Iterator[Step]:
    """Everything of each of these months, a model included, and then what that makes due of it."""
    for month in months:
        labelled = platform.contract.label_table.name in platform.landing.manifest(month).tables
        graph = relations(platform.contract)
        unlabelled = [name for name in graph if not needs_labels(name, platform.contract)]
        yield Step(month, tuple(graph) if labelled else tuple(unlabelled), f"{month} was asked for")
        status = next(one for one in month_statuses(platform) if one.month == str(month))
        if status.pending and set(status.pending) <= set(WATCHED):
            yield Step(month, status.pending, f"{month} can be scored now")


# --- the situation --------------------------------------------------------------------------------------------------


def situation(platform: Platform, newest: Month | None) -> Situation:
    """What is known for the decision whether to train again, ``newest`` being the newest month that has labels."""
    entries, versions = platform.ledger.entries(), platform.ledger.versions()
    number = current(entries)
    in_production = next((version for version in versions if version.version == number), None)
    performance = {Month.parse(one.month): one for one in monitoring.performance_history(platform.database)}
    return Situation(
        newest,
        None if in_production is None else Production(in_production.version, monitoring.trained_months(in_production)),
        None if newest is None else performance.get(newest),
        _drift(platform),
        () if in_production is None else tuple(_corrections(platform, in_production)),
        tuple(retrainings(platform.database, entries, versions)),
    )


def _drift(platform: Platform) -> Drift | None:
    """What the newest drift report says."""
    found = monitoring.drift_history(platform.database)
    if not found:
        return None
    newest = found[-1]
    report = newest.report
    return Drift(
        Month.parse(newest.month),
        newest.version,
        report.drifted("none"),
        report.drifted("moderate"),
        report.drifted("large"),
        report.score.size if report.score.significant else "none",
    )


def _corrections(platform: Platform, version: Version) -> Iterator[Correction]:
    """The months that a version learned from whose dataset is another one now."""
    with platform.database.connect() as connection:
        for month, digest in monitoring.datasets_of(version).items():
            try:
                now = month_write(connection, TRAINING_DATASET, month).digest
            except UnknownMonth:
                continue
            if now != digest:
                yield Correction(month, now)


def retrainings(database: Database, entries: Sequence[Entry], versions: Sequence[Version]) -> Iterator[Retraining]:
    """Every retraining that is over, in the order in which they were begun, and what came of it.

    One whose process was killed is not over: it may be begun again, up to ``MOST_ATTEMPTS`` times.
    """
    made = {version.lineage["cause"]: version.version for version in versions if version.lineage["cause"]}
    for cause, begun in _begun(database).items():
        number = made.get(cause)
        if number is None and not begun.failed and begun.attempts < MOST_ATTEMPTS:
            continue
        promoted = any(one.version == number and one.action in MADE_PRODUCTION for one in entries)
        better = [] if number is None else [gate.passed for gate in gates_of(entries, number) if gate.name == BETTER]
        yield Retraining(begun.month, cause, promoted, helped=any(better) if better else (promoted or None))


@dataclass(frozen=True)
class _Begun:
    month: Month
    attempts: int
    failed: bool


def _begun(database: Database) -> dict[str, _Begun]:
    with database.connect() as connection:
        rows = connection.execute(
            "SELECT cause, month, attempts, failure IS NOT NULL FROM streamflow.retrainings ORDER BY started_at, cause"
        ).fetchall()
    return {cause: _Begun(Month.parse(month), attempts, failed) for cause, month, attempts, failed in rows}


def attempt(database: Database, cause: str) -> int:
    """Which attempt a training for that cause would be, from 1."""
    begun = _begun(database).get(cause)
    return 1 + (begun.attempts if begun else 0)


@contextmanager
def retraining(platform: Platform, month: Month, cause: str, reason: str, *, by: str, now: datetime) -> Iterator[None]:
    """Around the training of a model for a cause: states that it is begun and, if it fails, with what.

    Raises TrainingRefused, with nothing begun, when a model has been trained for the cause already.
    """
    try:
        with platform.database.connect() as connection:
            trained = month_write(connection, CHURN_MODEL, month)
    except UnknownMonth:
        pass
    else:
        if trained.facts["lineage"]["cause"] == cause:
            raise TrainingRefused(f"a model has been trained for {cause} already; nothing is trained twice for it")
    _note(platform.database, cause, month, reason, by, now, None)
    try:
        yield
    except Exception as failure:
        _note(platform.database, cause, month, reason, by, now, f"{type(failure).__name__}: {failure}")
        raise


def _note(
    database: Database, cause: str, month: Month, reason: str, by: str, now: datetime, failure: str | None
) -> None:
    with database.connect() as connection:
        connection.execute(
            "INSERT INTO streamflow.retraining_attempts (cause, month, reason, by, at, failure) "
            "VALUES (%s, %s, %s, %s, %s, %s)",
            (cause, str(month), reason, by, now, failure),
        )


# --- one at a time --------------------------------------------------------------------------------------------------


@contextmanager
def at_work(database: Database, *, wait: bool = False) -> Iterator[bool]:
    """Whether the loop is this program's for the length of the block; it is not while another has it.

    With ``wait`` it always is: once the other is done.
    """
    with database.connect() as connection:
        how = "pg_advisory_xact_lock" if wait else "pg_try_advisory_xact_lock"
        row = connection.execute(f"SELECT {how}(hashtextextended('streamflow closed loop', 0))").fetchone()
        yield wait or row == (True,)
