"""The closed loop: what is to be done next without being asked, and whether to train again.

Both are decided here from what the platform holds, once for Dagster's sensors and for the command line. How things are
done is pipeline.py's and monitoring.py's.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

from streamflow import relations, situation
from streamflow.database import Database
from streamflow.errors import TrainingRefused, UnknownMonth
from streamflow.months import Month
from streamflow.pipeline import CHURN_MODEL, Platform
from streamflow.relations import TRAINED, WATCHED, needs_labels
from streamflow.retraining import RetrainingDecision, should_retrain
from streamflow.situation import Known
from streamflow.status import MonthStatus, month_statuses
from streamflow.warehouse import month_write


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
    return should_retrain(known(platform.database).situation(newest), platform.policy.retraining)


def newest_labelled(months: Sequence[MonthStatus]) -> Month | None:
    """The newest month that has labels and of which nothing is to be made."""
    return relations.newest_labelled({Month.parse(one.month): one.standing for one in months})


def whole_months(platform: Platform, months: Iterable[Month]) -> Iterator[Step]:
    """Everything of each of these months, a model included, and then what that makes due of it."""
    for month in months:
        labelled = platform.contract.label_table.name in platform.landing.manifest(month).tables
        graph = relations.relations(platform.contract)
        unlabelled = [name for name in graph if not needs_labels(name, platform.contract)]
        yield Step(month, tuple(graph) if labelled else tuple(unlabelled), f"{month} was asked for")
        status = next(one for one in month_statuses(platform) if one.month == str(month))
        if status.pending and set(status.pending) <= set(WATCHED):
            yield Step(month, status.pending, f"{month} can be scored now")


# --- retrainings ----------------------------------------------------------------------------------------------------


def known(database: Database) -> Known:
    """What PostgreSQL has for the decision whether to train again."""
    with database.connect() as connection:
        ((document,),) = connection.execute(situation.QUERY).fetchall()
    return situation.read(document)


def attempt(database: Database, cause: str) -> int:
    """Which attempt a training for that cause would be, from 1."""
    return 1 + sum(one.attempts for one in known(database).begun if one.cause == cause)


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
