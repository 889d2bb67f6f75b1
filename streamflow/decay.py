"""Decay: how good the predictions made for a month turned out to be, whether that is worse than promised, and why.

Judging predictions once their labels are there belongs here, all of it pure. Metrics and their intervals are
`evaluation.py`'s, how features are distributed is the drift report's, what to do about decay is `retraining.py`'s.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from streamflow import evaluation
from streamflow.contract import USER_ID, FeatureService
from streamflow.dataset import folds
from streamflow.errors import TrainingRefused
from streamflow.evaluation import Groups, Interval, Labels, Probabilities, Segment
from streamflow.gates import Evidence, spread
from streamflow.months import Month
from streamflow.policy import DecayPolicy

CHANCE = 0.5
FEWEST_IN_A_SLIDE = 4
LARGEST_WEIGHT = 20.0
LEAST_EFFECTIVE_SHARE = 0.1
LEAST_COVERED = 0.5
DOMAIN_FOLDS = 5

_NORMAL = NormalDist()
_Z95 = _NORMAL.inv_cdf(0.975)
_SLIDES = 3


# --- the report -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Outcome:
    """What was predicted for the users of a month, and what they did: one entry per user in each array.

    ``held_out`` is as `dataset.split` makes it and ``groups`` as `evaluation.segment_groups` does. ``threshold`` is the
    one that the predictions were made with.
    """

    month: Month
    probabilities: Probabilities
    threshold: float
    labels: Labels
    held_out: NDArray[np.bool_]
    groups: Groups


@dataclass(frozen=True)
class Promise:
    """The version that made the predictions: the months it learned from, and what was measured of it then."""

    version: int
    trained_on: tuple[Month, ...]
    evidence: Evidence


@dataclass(frozen=True)
class Finding:
    """Whether something is so, the figure that tells and the bound it is held against, and a sentence with both.

    ``value`` and ``bound`` are None where there is too little to tell.
    """

    found: bool
    value: float | None
    bound: float | None
    reason: str


@dataclass(frozen=True)
class Achieved:
    """What predictions turned out to be worth among some users, with intervals of 95 %; see `evaluation.segments`."""

    users: int
    churned: int
    metrics: dict[str, Interval]
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class DropExplained:
    """How a fall in AUC from one month to another divides into two parts that add up to it; see `explain_drop`.

    ``feature_drift`` is what the other distribution of features costs by itself, ``concept_drift`` what is left: the
    same features mean something else. ``effective_users`` is how many equally weighted users the reweighted ones are
    worth, ``covered`` the share of the later month's users that they stand for (a little above 1 by error), ``clipped``
    how many weights were cut, ``domain_auc`` how well features tell the months apart (0.5: not at all). Where the parts
    are not ``reliable``, ``reason`` says why.
    """

    reference: str
    month: str
    reference_users: int
    users: int
    reference_auc: Interval
    reweighted_auc: Interval
    auc: Interval
    drop: Interval
    feature_drift: Interval
    concept_drift: Interval
    domain_auc: float
    effective_users: float
    covered: float
    clipped: int
    reliable: bool
    reason: str


@dataclass(frozen=True)
class PerformanceReport:
    """What a version achieved in a month against what it promised; months are written ``YYYY-MM``.

    The findings are of ``held_out``. ``everyone`` is None for a month that the version learned from: it has seen the
    labels of all other users. ``worse_calibrated`` is no reason to train again by itself, because gates choose models
    by how they rank. ``promised`` and ``train_validation_gap`` are of the version when it was trained.
    """

    month: str
    version: int
    trained_on: tuple[str, ...]
    held_out: Achieved
    everyone: Achieved | None
    promised: dict[str, Interval]
    train_validation_gap: float
    worse_than_promised: Finding
    no_better_than_chance: Finding
    worse_calibrated: Finding
    sliding: Finding
    drop: DropExplained | None = None

    @property
    def decayed(self) -> bool:
        """Whether the version ranks worse than it promised, or no better than chance."""
        return self.worse_than_promised.found or self.no_better_than_chance.found


def performance_report(
    outcome: Outcome,
    promise: Promise,
    history: Sequence[PerformanceReport],
    policy: DecayPolicy,
    *,
    seed: int,
    draws: int,
    drop: DropExplained | None = None,
) -> PerformanceReport:
    """Hold what was predicted for a month against its labels and against what the version promised.

    ``history`` has the reports of earlier months, of whatever versions, in any order; later ones do not count.
    Intervals are of ``draws`` bootstrap draws. Raises TrainingRefused when all held-out users stayed or all churned.
    """
    evaluation.require_both(outcome.labels[outcome.held_out])
    held_out = _achieved(outcome, outcome.held_out, seed, draws)
    everybody = np.ones(len(outcome.labels), dtype=np.bool_)
    seen = outcome.month in promise.trained_on
    perfect = evaluation.perfect_ece(outcome.probabilities[outcome.held_out], seed=seed, draws=draws)
    evidence, month = promise.evidence, str(outcome.month)
    now = _Point(
        outcome.month, promise.version, held_out.metrics, evidence.metrics["auc"], evidence.train_validation_gap
    )
    before = [_point(one) for one in history if one.month < month]
    return PerformanceReport(
        month=month,
        version=promise.version,
        trained_on=tuple(str(one) for one in sorted(promise.trained_on)),
        held_out=held_out,
        everyone=None if seen else _achieved(outcome, everybody, seed, draws),
        promised=evidence.metrics,
        train_validation_gap=evidence.train_validation_gap,
        worse_than_promised=_worse_than_promised(held_out, evidence, policy, seen=seen),
        no_better_than_chance=_no_better_than_chance(held_out, evidence),
        worse_calibrated=_worse_calibrated(held_out, evidence, perfect, policy),
        sliding=_sliding([*before, now], policy),
        drop=drop,
    )


def _achieved(outcome: Outcome, who: NDArray[np.bool_], seed: int, draws: int) -> Achieved:
    labels, probabilities = outcome.labels[who], outcome.probabilities[who]
    groups = {attribute: group_of[who] for attribute, group_of in outcome.groups.items()}
    drawn = {"seed": seed, "draws": draws}
    return Achieved(
        len(labels),
        int(labels.sum()),
        evaluation.intervals(labels, probabilities, outcome.threshold, **drawn),
        evaluation.segments(labels, probabilities, outcome.threshold, groups, **drawn),
    )


# --- findings -------------------------------------------------------------------------------------------------------


def _error(interval: Interval) -> float:
    """The standard error behind a 95 % interval; never 0, so that one can divide by it."""
    return max((interval.high - interval.low) / (2 * _Z95), 1e-9)


def _worse_than_promised(achieved: Achieved, evidence: Evidence, policy: DecayPolicy, *, seen: bool) -> Finding:
    """The errors of promise and month add up as those of different users do.

    They are of the same users, so that what is peculiar to them is in both: the difference varies less than that, and
    alarms are rarer than the policy allows.
    """
    promised, auc = evidence.metrics["auc"], achieved.metrics["auc"]
    loss = promised.value - auc.value
    noise = _NORMAL.inv_cdf(1 - policy.maximum_false_alarms) * float(np.hypot(_error(promised), _error(auc)))
    bound = max(noise, policy.minimum_auc_loss)
    side = f"{abs(loss):.4f} {'below' if loss > 0 else 'above'}"
    reason = (
        f"AUC of {achieved.users:,} held-out users is {spread(auc)}, {side} the promised {spread(promised)}; "
        f"a loss of more than {bound:.4f} counts"
    )
    if seen:
        reason += "; the version learned from this month, from its other users"
    return Finding(loss > bound, loss, bound, reason)


def _no_better_than_chance(achieved: Achieved, evidence: Evidence) -> Finding:
    """An interval wide enough for chance and for what was promised tells nothing, and is not found."""
    auc, promised = achieved.metrics["auc"], evidence.metrics["auc"].value
    reason = f"AUC of {achieved.users:,} held-out users is {spread(auc)}; chance is {CHANCE:g}"
    within, as_promised = auc.low <= CHANCE, auc.high >= promised
    if within and as_promised:
        reason += f", and the interval holds the promised {promised:.4f} too: too few users to tell"
    return Finding(within and not as_promised, auc.low, CHANCE, reason)


def _worse_calibrated(achieved: Achieved, evidence: Evidence, perfect: float, policy: DecayPolicy) -> Finding:
    ece, promised = achieved.metrics["ece"].value, evidence.metrics["ece"].value
    bound = perfect + max(promised - evidence.perfect_ece, 0.0) + policy.minimum_ece_growth
    reason = (
        f"the expected calibration error is {100 * ece:.2f} percentage points, {100 * promised:.2f} was promised; "
        f"more than {100 * bound:.2f} counts: {100 * policy.minimum_ece_growth:g} above what a model "
        "calibrated as promised shows among so many users"
    )
    return Finding(ece > bound, ece, bound, reason)


@dataclass(frozen=True)
class _Point:
    """What one month adds to the series in which slides are looked for."""

    month: Month
    version: int
    metrics: dict[str, Interval]
    promised_auc: Interval
    gap: float


def _point(report: PerformanceReport) -> _Point:
    month = Month.parse(report.month)
    return _Point(month, report.version, report.held_out.metrics, report.promised["auc"], report.train_validation_gap)


@dataclass(frozen=True)
class _Series:
    """Figures that grow as a model gets worse, with their standard errors, at ascending ``times``."""

    what: str
    minimum: float
    times: tuple[int, ...]
    values: tuple[float, ...]
    errors: tuple[float, ...]

    def since_last_jump(self, z: float) -> "_Series":
        """What follows the last step that is large by itself, in either direction: a slide has none."""
        start = 0
        for at, (before, after) in enumerate(pairwise(zip(self.values, self.errors, strict=True)), start=1):
            step = abs(after[0] - before[0])
            if step > max(z * float(np.hypot(before[1], after[1])), self.minimum):
                start = at
        return _Series(self.what, self.minimum, self.times[start:], self.values[start:], self.errors[start:])


def _sliding(points: Sequence[_Point], policy: DecayPolicy) -> Finding:
    months = sorted({point.month: point for point in points}.values(), key=lambda point: point.month)
    months = months[-policy.slide_months :]
    z = _NORMAL.inv_cdf(1 - policy.maximum_false_alarms)
    steep = _NORMAL.inv_cdf(1 - policy.maximum_false_alarms / _SLIDES)
    series = [one.since_last_jump(z) for one in _series_of(points, months, policy)]
    long_enough = [one for one in series if len(one.times) >= FEWEST_IN_A_SLIDE]
    if not long_enough:
        longest = max(len(one.times) for one in series)
        reason = f"takes {FEWEST_IN_A_SLIDE} months or versions without a jump to tell; there are {longest}"
        return Finding(False, None, None, reason)
    judged = [(*_growth(one, steep), one) for one in long_enough]
    growth, bound, worst = max(judged, key=lambda one: one[0] / one[1])
    reason = (
        f"over {len(worst.times)} {'versions' if 'gap' in worst.what else 'months'} {worst.what} changed for the "
        f"{'worse' if growth > 0 else 'better'} by {abs(growth):.4f}, from {abs(worst.values[0]):.4f} to "
        f"{abs(worst.values[-1]):.4f}; more than {bound:.4f} for the worse counts"
    )
    return Finding(growth > bound, growth, bound, reason)


def _series_of(points: Sequence[_Point], months: Sequence[_Point], policy: DecayPolicy) -> Iterator[_Series]:
    times = tuple(point.month.year * 12 + point.month.number for point in months)
    for metric, what, minimum, sign in (
        ("auc", "AUC", policy.minimum_auc_loss, -1),
        ("ece", "the calibration error", policy.minimum_ece_growth, 1),
    ):
        measured = [point.metrics[metric] for point in months]
        values = tuple(sign * one.value for one in measured)
        yield _Series(what, minimum, times, values, tuple(_error(one) for one in measured))
    versions = {point.version: point for point in sorted(points, key=lambda point: point.month)}
    newest = [versions[number] for number in sorted(versions)][-policy.slide_months :]
    gaps, errors = tuple(one.gap for one in newest), tuple(_error(one.promised_auc) for one in newest)
    yield _Series("the train-validation gap", policy.minimum_auc_loss, tuple(range(len(newest))), gaps, errors)


def _growth(series: _Series, z: float) -> tuple[float, float]:
    """By how much a series grew from first to last, and from what growth on that is a slide.

    The growth is that of the straight line through the values, weighted by their known errors; its error is increased
    where the values stray further from the line than those explain (Birge 1932).
    """
    times, values, errors = (np.array(part, dtype=np.float64) for part in (series.times, series.values, series.errors))
    weights = errors**-2
    away = times - np.average(times, weights=weights)
    leverage = float((weights * away**2).sum())
    slope = float((weights * away * values).sum()) / leverage
    strays = (weights * (values - np.average(values, weights=weights) - slope * away) ** 2).sum() / (len(times) - 2)
    span = float(times[-1] - times[0])
    error = np.sqrt(max(1.0, strays) / leverage)
    return slope * span, max(z * float(error) * span, series.minimum)


# --- what explains a drop -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Side:
    """Held-out users of a month: ``rows`` with user_id and features, and label and probability of each of them."""

    month: Month
    rows: pd.DataFrame
    labels: Labels
    probabilities: Probabilities

    def in_order(self) -> "Side":
        """The same users in the order of user_id."""
        order = np.argsort(self.rows[USER_ID].to_numpy(), kind="stable")
        rows = self.rows.iloc[order].reset_index(drop=True)
        return Side(self.month, rows, self.labels[order], self.probabilities[order])


def explain_drop(reference: Side, now: Side, service: FeatureService, *, seed: int) -> DropExplained:
    """Divide the fall in AUC from ``reference`` to ``now`` into feature drift and concept drift.

    The users of ``reference`` are weighted so that their features are distributed as those of ``now`` (Shimodaira
    2000); what their AUC, with their own labels, falls by is what feature drift alone costs, and the rest is concept
    drift (the decomposition of Cai, Namkoong and Yadlowsky 2023, without their common distribution). The weight is the
    odds of being of ``now``, at most ``LARGEST_WEIGHT``, by a logistic regression on the features of ``service`` and
    their squares that has not seen the user. Drift of what is not in ``service`` counts as concept drift, and so does
    what such a classifier cannot see, as features that depend on each other in another way. Intervals of 95 % are
    DeLong's (1988) with the weights taken as given, and know that users are in both months. Raises TrainingRefused when
    the labels of either side are all the same.
    """
    from sklearn.metrics import roc_auc_score

    reference, now = reference.in_order(), now.in_order()
    for side in (reference, now):
        evaluation.require_both(side.labels)
    of_now = np.repeat([False, True], [len(reference.labels), len(now.labels)])
    belongs = _probability_of_now(pd.concat([reference.rows, now.rows], ignore_index=True), of_now, service, seed)
    before = belongs[~of_now]
    odds = before / (1 - before) * len(reference.labels) / len(now.labels)
    weights = np.minimum(odds, LARGEST_WEIGHT)
    effective = float(weights.sum() ** 2 / (weights**2).sum())
    then = _ranked(reference, np.ones(len(weights)))
    reweighted = _ranked(reference, weights)
    after = _ranked(now, np.ones(len(now.labels)))
    drop, feature_drift, concept_drift = then.minus(after), then.minus(reweighted), reweighted.minus(after)
    covered = float(weights.mean())
    reliable = effective >= LEAST_EFFECTIVE_SHARE * len(weights) and covered >= LEAST_COVERED
    reason = (
        f"of the fall in AUC by {spread(drop)}, feature drift explains {spread(feature_drift)} and concept drift "
        f"{spread(concept_drift)}"
    )
    if not reliable:
        reason = (
            f"the features of {reference.month} and {now.month} hardly overlap: reweighted, {len(weights):,} users are "
            f"worth {effective:,.0f} and stand for {100 * covered:.0f} % of the others; what explains the fall in AUC "
            f"by {spread(drop)} cannot be told"
        )
    return DropExplained(
        reference=str(reference.month),
        month=str(now.month),
        reference_users=len(weights),
        users=len(now.labels),
        reference_auc=then.interval,
        reweighted_auc=reweighted.interval,
        auc=after.interval,
        drop=drop,
        feature_drift=feature_drift,
        concept_drift=concept_drift,
        domain_auc=float(roc_auc_score(of_now, belongs)),
        effective_users=effective,
        covered=covered,
        clipped=int((odds > LARGEST_WEIGHT).sum()),
        reliable=reliable,
        reason=reason,
    )


def _probability_of_now(
    rows: pd.DataFrame, of_now: NDArray[np.bool_], service: FeatureService, seed: int
) -> Probabilities:
    """How probable it is of each row, by its features, that it is of the later month; other users' rows tell."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline as in_a_row
    from sklearn.preprocessing import FunctionTransformer
    from threadpoolctl import threadpool_limits

    from streamflow.training import make_pipeline

    fold = folds(rows[USER_ID].tolist(), DOMAIN_FOLDS, seed)
    features = rows[service.names]
    belongs = np.empty(len(rows))
    with threadpool_limits(limits=1):
        for one in np.unique(fold):
            learned, told = fold != one, fold == one
            if len(np.unique(of_now[learned])) < 2:
                raise TrainingRefused(f"{len(rows)} users are too few to tell how features of two months differ")
            classifier = in_a_row(FunctionTransformer(_with_squares), LogisticRegression(max_iter=1000))
            domain = make_pipeline("logistic_regression", service, classifier)
            domain.fit(features[learned], of_now[learned])
            belongs[told] = domain.predict_proba(features[told])[:, 1]
    return belongs


def _with_squares(features: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.hstack([features, features**2])


@dataclass(frozen=True, eq=False)
class _Ranked:
    """A weighted AUC, and how much each user's row adds to its error."""

    auc: float
    users: NDArray[np.str_]
    influence: NDArray[np.float64]

    @property
    def interval(self) -> Interval:
        return _around(self.auc, self.influence)

    def minus(self, other: "_Ranked") -> Interval:
        users, of_user = np.unique(np.concatenate([self.users, other.users]), return_inverse=True)
        both = np.bincount(of_user, np.concatenate([self.influence, -other.influence]), minlength=len(users)).astype(
            np.float64
        )
        return _around(self.auc - other.auc, both)


def _around(value: float, influence: NDArray[np.float64]) -> Interval:
    margin = _Z95 * float(np.sqrt((influence**2).sum()))
    return Interval(value, value - margin, value + margin)


def _ranked(side: Side, weights: NDArray[np.float64]) -> _Ranked:
    """The AUC of weighted users; DeLong, DeLong and Clarke-Pearson (1988) with weights for counts."""
    levels, level_of = np.unique(side.probabilities, return_inverse=True)
    churned, stayed = (np.where(who, weights, 0.0) / weights[who].sum() for who in (side.labels, ~side.labels))

    def beaten(by: NDArray[np.float64]) -> NDArray[np.float64]:
        at = np.bincount(level_of, by, minlength=len(levels))
        return (at.cumsum() - at / 2)[level_of]

    below, above = beaten(stayed), 1 - beaten(churned)
    auc = float((churned * below).sum())
    influence = churned * (below - auc) + stayed * (above - auc)
    return _Ranked(auc, side.rows[USER_ID].to_numpy().astype(np.str_), influence)
