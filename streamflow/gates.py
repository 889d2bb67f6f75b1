"""Gates: what is measured of a version, and each condition of the policy with value, bound and reason.

All of it is pure. Measuring belongs to procedure.py, what becomes of a version to promotion.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import msgspec

from streamflow.evaluation import Comparison, FairnessGap, Interval, Segment
from streamflow.policy import Gates, InvarianceRule, Policy

NOT_TAKEN = "not a feature of this model"


# --- evidence: what was measured of a version -----------------------------------------------------------------------


class Invariance(msgspec.Struct, frozen=True):
    """By how much a score moved at most when ``feature`` alone was changed, as ``change`` says."""

    feature: str
    change: str
    largest_difference: float


class Evidence(msgspec.Struct, frozen=True):
    """What was measured of a version for its gates.

    ``metrics`` are of the held-out users with intervals of 95 %, ``train_metrics`` of the training users.
    ``perfect_ece`` is what a perfectly calibrated model of this size stays below in 95 % of cases. ``features_offline``
    are features of its service that the online store lacks, ``protected`` the protected attributes that it predicts
    from, ``possible_leaks`` the AUC of each feature that alone separates the classes suspiciously well.
    """

    users: int
    churned: int
    metrics: dict[str, Interval]
    train_metrics: dict[str, float]
    perfect_ece: float
    segments: tuple[Segment, ...]
    fairness: tuple[FairnessGap, ...]
    parity_difference: float
    flipped_decisions: int
    parity_rows: int
    golden_rows_reproduced: bool
    invariances: tuple[Invariance, ...]
    features_offline: tuple[str, ...]
    signature_fits: bool
    protected: tuple[str, ...]
    scoring_microseconds: float
    possible_leaks: dict[str, float]

    @property
    def train_validation_gap(self) -> float:
        """How much better the model ranks the users that it learned from than those that it did not."""
        return self.train_metrics["auc"] - self.metrics["auc"].value


# --- gates ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gate:
    """One condition, what was measured against which bound, and the outcome in words.

    ``value`` is None where there was nothing to measure, ``bound`` where the policy sets none.
    """

    name: str
    passed: bool
    value: float | None
    bound: float | None
    reason: str


def absolute_gates(evidence: Evidence, history: Sequence[Evidence], policy: Policy) -> tuple[Gate, ...]:
    """Hold what was measured of a version against the policy's bounds, whatever is in Production; a pure function.

    ``history`` is the evidence of all earlier versions, oldest first.
    """
    bounds = policy.gates
    return (
        _ranks_better_than_chance(evidence, bounds),
        _calibrated(evidence, bounds),
        _no_segment_collapses(evidence, bounds),
        _fair(evidence, bounds),
        _predicts_from_no_protected_attribute(evidence, policy),
        _compiled_scorer_agrees(evidence, bounds),
        _no_decision_flips(evidence),
        _golden_rows_reproduce(evidence),
        _invariances_hold(evidence, policy.invariances, allowed=policy.protected_attributes == "predict"),
        _overfits_little(evidence, bounds),
        _does_not_slide(evidence, history, bounds),
        _features_are_online(evidence),
        _signature_fits(evidence),
        _scores_quickly(evidence, bounds),
    )


def threshold_gates(evidence: Evidence, policy: Policy) -> tuple[Gate, ...]:
    """Those of the absolute gates that a version's threshold decides."""
    return (_fair(evidence, policy.gates), _no_decision_flips(evidence))


def _ranks_better_than_chance(evidence: Evidence, bounds: Gates) -> Gate:
    auc, bound = evidence.metrics["auc"], bounds.minimum_auc
    reason = f"AUC of {evidence.users:,} held-out users is {spread(auc)}; the lower end must exceed {bound:g}"
    return Gate("ranks_better_than_chance", auc.low > bound, auc.low, bound, reason)


def _calibrated(evidence: Evidence, bounds: Gates) -> Gate:
    """Even a perfectly calibrated model shows some ECE in a sample; what it stays below in 95 % of cases is granted."""
    ece, bound = evidence.metrics["ece"].value, evidence.perfect_ece + bounds.maximum_excess_ece
    reason = (
        f"the expected calibration error is {100 * ece:.2f} percentage points, at most {100 * bound:.2f} allowed: "
        f"{100 * bounds.maximum_excess_ece:g} above what a perfectly calibrated model of this size shows"
    )
    return Gate("calibrated", ece <= bound, ece, bound, reason)


def _no_segment_collapses(evidence: Evidence, bounds: Gates) -> Gate:
    name, bound, least = "no_segment_collapses", bounds.minimum_segment_auc, bounds.minimum_segment_users
    ranked = [one for one in evidence.segments if one.users >= least and "auc" in one.metrics]
    if not ranked:
        return Gate(name, False, None, bound, f"no segment has {least:,} held-out users, churned ones and others")
    worst = min(ranked, key=lambda one: one.metrics["auc"].high)
    auc = worst.metrics["auc"]
    reason = (
        f"the worst of {len(ranked)} segments of at least {least:,} users is {worst.attribute}={worst.value} "
        f"({worst.users:,} users): AUC {spread(auc)}; the upper end must reach {bound:g}"
    )
    return Gate(name, all(one.metrics["auc"].high >= bound for one in ranked), auc.high, bound, reason)


def _fair(evidence: Evidence, bounds: Gates) -> Gate:
    """Equalized odds (Hardt et al. 2016): who churns is found, and who stays is left alone, equally in all groups."""
    name, bound, least = "fair", bounds.maximum_fairness_gap, bounds.minimum_segment_users
    small = {one.attribute for one in evidence.segments if one.users < least}
    measures = ("recall", "false positive rate")
    gaps = [one for one in evidence.fairness if one.measure in measures and one.attribute not in small]
    if not gaps:
        reason = f"no protected attribute has two groups of at least {least:,} held-out users to compare"
        return Gate(name, False, None, bound, reason)
    worst = max(gaps, key=lambda one: one.gap.low)
    groups = ", ".join(f"{group} {rate:.3f}" for group, rate in sorted(worst.groups.items()))
    reason = (
        f"the largest gap between groups is in {worst.measure} by {worst.attribute} ({groups}): "
        f"{spread(worst.gap)}; the lower end may be at most {bound:g}"
    )
    return Gate(name, all(one.gap.low <= bound for one in gaps), worst.gap.low, bound, reason)


def _predicts_from_no_protected_attribute(evidence: Evidence, policy: Policy) -> Gate:
    allowed, count = policy.protected_attributes == "predict", len(evidence.protected)
    reason = f"predicts from {', '.join(evidence.protected) or 'no protected attribute'}"
    if count:
        reason += ", as the policy allows" if allowed else "; the policy allows to measure by protected attributes only"
    bound = None if allowed else 0
    return Gate("predicts_from_no_protected_attribute", allowed or not count, count, bound, reason)


def _compiled_scorer_agrees(evidence: Evidence, bounds: Gates) -> Gate:
    difference, bound = evidence.parity_difference, bounds.maximum_parity_difference
    reason = (
        f"the largest difference to the pipeline in {evidence.parity_rows:,} rows is {difference:.1e}, "
        f"at most {bound:g} allowed"
    )
    passed = evidence.parity_rows > 0 and difference <= bound
    return Gate("compiled_scorer_agrees", passed, difference, bound, reason)


def _no_decision_flips(evidence: Evidence) -> Gate:
    flipped = evidence.flipped_decisions
    reason = f"{flipped:,} of {evidence.parity_rows:,} rows are decided otherwise by the compiled scorer, none allowed"
    return Gate("no_decision_flips", flipped == 0, flipped, 0, reason)


def _golden_rows_reproduce(evidence: Evidence) -> Gate:
    passed = evidence.golden_rows_reproduced
    reason = f"the rows stored with the scorer {'score' if passed else 'do not score'} as stored"
    return Gate("golden_rows_reproduce", passed, int(passed), 1, reason)


def _invariances_hold(evidence: Evidence, rules: Sequence[InvarianceRule], *, allowed: bool) -> Gate:
    name, moved = "invariances_hold", []
    # What the policy lets a model predict from may move its scores.
    for rule in (rule for rule in rules if rule.feature not in evidence.protected or not allowed):
        found = [one for one in evidence.invariances if _is_about(one, rule)]
        if not found:
            reason = f"what {rule.feature} ({rule.change}) changes was not measured; train the month again"
            return Gate(name, False, None, rule.largest_change, reason)
        moved += [(one.largest_difference, rule.largest_change, one) for one in found]
    if not moved:
        return Gate(name, True, None, None, "the policy declares no invariance")
    difference, bound, worst = max(moved, key=lambda one: one[0] - one[1])
    reason = (
        f"{worst.feature} ({worst.change}) changes a probability by {difference:.2g} at most, {bound:g} allowed; "
        f"the worst of {len(moved)} declared"
    )
    return Gate(name, all(one[0] <= one[1] for one in moved), difference, bound, reason)


def _is_about(invariance: Invariance, rule: InvarianceRule) -> bool:
    return invariance.feature == rule.feature and invariance.change in (rule.change, NOT_TAKEN)


def _overfits_little(evidence: Evidence, bounds: Gates) -> Gate:
    gap, bound = evidence.train_validation_gap, bounds.maximum_train_validation_gap
    reason = (
        f"AUC is {evidence.train_metrics['auc']:.4f} of training users and {evidence.metrics['auc'].value:.4f} of "
        f"held-out ones: a gap of {gap:.4f}, at most {bound:g} allowed"
    )
    return Gate("overfits_little", gap <= bound, gap, bound, reason)


def _does_not_slide(evidence: Evidence, history: Sequence[Evidence], bounds: Gates) -> Gate:
    name, wanted, bound = "does_not_slide", bounds.slide_versions, bounds.maximum_slide
    recent = (*history, evidence)[-wanted:]
    if len(recent) < wanted:
        reason = f"takes {wanted} versions to tell; with this one there are {len(recent)}"
        return Gate(name, True, None, bound, reason)
    slides = {
        "the train-validation gap": _unbroken_growth([one.train_validation_gap for one in recent]),
        "the calibration error": _unbroken_growth([one.metrics["ece"].value for one in recent]),
    }
    worst = max(slides, key=lambda what: slides[what])
    reason = f"over the last {wanted} versions {worst} grew each time, by {slides[worst]:.4f} in all, at most {bound:g}"
    if not slides[worst]:
        reason = f"over the last {wanted} versions neither {' nor '.join(slides)} grew each time"
    return Gate(name, slides[worst] <= bound, slides[worst], bound, reason)


def _unbroken_growth(values: Sequence[float]) -> float:
    """How much a series grew from first to last if it grew at every step, else 0."""
    grows = all(before < after for before, after in pairwise(values))
    return values[-1] - values[0] if grows else 0.0


def _features_are_online(evidence: Evidence) -> Gate:
    missing = evidence.features_offline
    reason = f"the online store lacks {', '.join(missing)}" if missing else "the online store has every feature"
    return Gate("features_are_online", not missing, len(missing), 0, reason)


def _signature_fits(evidence: Evidence) -> Gate:
    fits = evidence.signature_fits
    reason = f"the model's inputs {'are' if fits else 'are not'} the features of its feature service, in their order"
    return Gate("signature_fits", fits, int(fits), 1, reason)


def _scores_quickly(evidence: Evidence, bounds: Gates) -> Gate:
    taken, bound = evidence.scoring_microseconds, bounds.maximum_scoring_microseconds
    reason = f"one customer takes {taken:,.0f} microseconds to score, at most {bound:,.0f} allowed"
    return Gate("scores_quickly", taken <= bound, taken, bound, reason)


BETTER = "better_than_production"
NO_LOSS = "no_segment_gets_worse"
RELATIVE = (BETTER, NO_LOSS)


@dataclass(frozen=True)
class Candidate:
    """A version to decide about; ``history`` is the evidence of all earlier versions, oldest first."""

    version: int
    evidence: Evidence
    history: tuple[Evidence, ...]
    bug_fix: bool = False


@dataclass(frozen=True)
class Incomparable:
    """Why a candidate could not be held against what is in Production."""

    reason: str


def relative_gates(candidate: Candidate, production: Comparison | Incomparable, policy: Policy) -> tuple[Gate, ...]:
    """Hold a candidate against Production on the same held-out users; a pure function."""
    bounds = policy.gates
    if isinstance(production, Incomparable):
        reason = f"cannot be held against Production: {production.reason}"
        return (
            Gate(BETTER, False, None, -bounds.not_worse_by if candidate.bug_fix else bounds.better_by, reason),
            Gate(NO_LOSS, False, None, -bounds.maximum_segment_loss, reason),
        )
    better = _not_worse_than_production if candidate.bug_fix else _better_than_production
    return (better(production, bounds), _no_segment_gets_worse(production, bounds))


def _better_than_production(production: Comparison, bounds: Gates) -> Gate:
    """Better beyond noise in AUC, or in log loss while the AUC itself is no lower than it must be.

    Log loss is of probabilities and not only of ranks: it notices in far fewer users that a model fits a new month.
    """
    auc, logloss, bound = production.auc, production.logloss, bounds.better_by
    reason = f"{_difference(production)}; the lower end must exceed {bound:g}"
    if auc.low > bound:
        return Gate(BETTER, True, auc.low, bound, reason)
    if auc.value >= bound and logloss.high < 0:
        reason = (
            f"{_difference(production)}, at least {bound:g} itself, and log loss minus Production's is surely lower: "
        )
        return Gate(BETTER, True, auc.value, bound, reason + spread(logloss))
    return Gate(BETTER, False, auc.low, bound, reason)


def _not_worse_than_production(production: Comparison, bounds: Gates) -> Gate:
    low, bound = production.auc.low, -bounds.not_worse_by
    reason = f"{_difference(production)}; for a bug fix the lower end must reach {bound:g}"
    return Gate(BETTER, low >= bound, low, bound, reason)


def _difference(production: Comparison) -> str:
    return f"AUC minus Production's, of the same {production.users:,} held-out users, is {spread(production.auc)}"


def _no_segment_gets_worse(production: Comparison, bounds: Gates) -> Gate:
    bound, least = -bounds.maximum_segment_loss, bounds.minimum_segment_users
    compared = [segment for segment in production.segments if segment.users >= least]
    if not compared:
        return Gate(NO_LOSS, False, None, bound, f"no segment has {least:,} held-out users to compare")
    worst = min(compared, key=lambda segment: segment.auc.high)
    reason = (
        f"the worst of {len(compared)} segments is {worst.name}: AUC minus Production's is {spread(worst.auc)}; "
        f"the upper end must reach {bound:g}"
    )
    return Gate(NO_LOSS, worst.auc.high >= bound, worst.auc.high, bound, reason)


def spread(interval: Interval) -> str:
    """A measure and its interval, as reasons give it."""
    return f"{interval.value:.4f} (95 % interval {interval.low:.4f} to {interval.high:.4f})"
