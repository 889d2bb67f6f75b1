from dataclasses import replace

import msgspec
import numpy as np
import pandas as pd
import pytest
from governed import DECAY, around, evidence
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from test_dataset import handmade_dataset, real_dataset

from streamflow import decay, evaluation, procedure
from streamflow.contract import CONTRACT
from streamflow.decay import DropExplained, Outcome, PerformanceReport, Promise, Side, explain_drop, performance_report
from streamflow.errors import TrainingRefused
from streamflow.evaluation import Interval
from streamflow.gates import Evidence
from streamflow.months import Month
from streamflow.policy import DecayPolicy
from streamflow.procedure import Procedure
from streamflow.settings import PROJECT_ROOT
from streamflow.training_config import TrainingConfig

JANUARY, FEBRUARY, MARCH = Month.parse_range("2024-01..2024-03")
USERS = 1_600
DRAWN = {"seed": 7, "draws": 200}
SEEDED = np.random.default_rng(5)
LOG_ODDS = SEEDED.normal(-1.2, 1.6, USERS)
CHANCE = 1 / (1 + np.exp(-LOG_ODDS))
LABELS = SEEDED.random(USERS) < CHANCE
HELD_OUT = SEEDED.random(USERS) < 0.5
GROUPS = {"net_service": np.where(SEEDED.random(USERS) < 0.3, "DSL", "No")}
FINDINGS = ("worse_than_promised", "no_better_than_chance", "worse_calibrated", "sliding")


def outcome(probabilities=CHANCE, labels=LABELS, month=FEBRUARY):
    return Outcome(month, probabilities, 0.3, labels, HELD_OUT, GROUPS)


def promise(found: Evidence | None = None, version=1, trained_on=(JANUARY,)):
    return Promise(version, trained_on, found or kept_evidence())


def kept_evidence() -> Evidence:
    """What a version promises that keeps it exactly on the users above."""
    labels, probabilities = LABELS[HELD_OUT], CHANCE[HELD_OUT]
    metrics = evaluation.intervals(labels, probabilities, 0.3, **DRAWN)
    return evidence(metrics=metrics, perfect_ece=evaluation.perfect_ece(probabilities, **DRAWN))


def report_on(*args, history=(), policy: DecayPolicy = DECAY, **changes) -> PerformanceReport:
    return performance_report(outcome(*args), promise(**changes), history, policy, **DRAWN)


KEPT = report_on()


def found(report: PerformanceReport) -> set[str]:
    return {name for name in FINDINGS if getattr(report, name).found}


# --- what is reported -----------------------------------------------------------------------------------------------


def test_what_was_predicted_is_measured_on_the_users_held_out_and_on_all():
    assert KEPT.held_out.users == HELD_OUT.sum()
    assert KEPT.held_out.churned == LABELS[HELD_OUT].sum()
    assert KEPT.held_out.metrics["auc"].value == roc_auc_score(LABELS[HELD_OUT], CHANCE[HELD_OUT])
    assert KEPT.everyone is not None
    assert KEPT.everyone.users == USERS
    assert KEPT.everyone.metrics == evaluation.intervals(LABELS, CHANCE, 0.3, **DRAWN)
    for scope, who in ((KEPT.held_out, HELD_OUT), (KEPT.everyone, np.ones(USERS, dtype=bool))):
        assert [(one.value, one.users) for one in scope.segments] == [
            ("DSL", (GROUPS["net_service"] == "DSL")[who].sum()),
            ("No", (GROUPS["net_service"] == "No")[who].sum()),
        ]
    assert (KEPT.month, KEPT.version, KEPT.trained_on) == ("2024-02", 1, ("2024-01",))


def test_of_a_month_that_was_learned_from_only_held_out_users_count():
    report = report_on(trained_on=(FEBRUARY, JANUARY))
    assert report.everyone is None
    assert report.held_out == KEPT.held_out
    assert report.trained_on == ("2024-01", "2024-02")
    assert report.worse_than_promised.reason.endswith("; the version learned from this month, from its other users")
    assert "learned from" not in KEPT.worse_than_promised.reason


def test_the_threshold_of_the_predictions_decides():
    few = performance_report(replace(outcome(), threshold=0.9), promise(), (), DECAY, **DRAWN)
    assert few.held_out.metrics["recall"].value < KEPT.held_out.metrics["recall"].value
    assert few.held_out.metrics["auc"] == KEPT.held_out.metrics["auc"]


def test_held_out_users_who_all_stayed_tell_nothing():
    with pytest.raises(TrainingRefused, match=f"of {HELD_OUT.sum()} users to measure a model on 0 churned"):
        report_on(CHANCE, LABELS & ~HELD_OUT)


# --- findings -------------------------------------------------------------------------------------------------------


def test_what_was_promised_exactly_is_not_worse():
    assert found(KEPT) == set()
    assert KEPT.worse_than_promised.value == 0
    assert not KEPT.decayed


def test_a_model_that_knows_nothing_any_more_is_worse_and_no_better_than_chance():
    report = report_on(CHANCE, LABELS[::-1])
    assert found(report) == {"worse_than_promised", "no_better_than_chance", "worse_calibrated"}
    assert report.decayed
    auc = report.held_out.metrics["auc"]
    assert report.worse_than_promised.value == kept_evidence().metrics["auc"].value - auc.value
    assert report.no_better_than_chance.value == auc.low < 0.5 < auc.high


def test_upside_down_is_no_better_than_chance_either():
    report = report_on(1 - CHANCE)
    assert report.held_out.metrics["auc"].high < 0.3
    assert report.no_better_than_chance.found


def test_probabilities_too_high_are_worse_calibrated_only():
    report = report_on(1 / (1 + np.exp(-LOG_ODDS - 0.8)))
    assert found(report) == {"worse_calibrated"}
    assert not report.decayed


def judged(promised: Interval, achieved: Interval, **policy: float):
    scope = decay.Achieved(400, 100, {"auc": achieved}, ())
    by = msgspec.structs.replace(DECAY, **policy)
    of = evidence(metrics={"auc": promised})
    return decay._worse_than_promised(scope, of, by, seen=False), decay._no_better_than_chance(scope, of)


@pytest.mark.parametrize(
    ("promised", "achieved", "policy", "worse", "chance"),
    [
        (around(0.84), around(0.84), {}, False, False),
        (around(0.84), around(0.49), {}, True, True),
        (around(0.84), around(0.60), {}, True, False),
        (around(0.84), around(0.90), {}, False, False),
        # The errors of both together are 0.0144; times 2.33 that is 0.0336.
        (around(0.84), around(0.807), {}, False, False),
        (around(0.84), around(0.806), {}, True, False),
        (around(0.84), around(0.806), {"maximum_false_alarms": 0.001}, False, False),
        (around(0.84), around(0.81), {"maximum_false_alarms": 0.05}, True, False),
        # Certain, but too small to matter.
        (around(0.84, 0.001), around(0.825, 0.001), {}, False, False),
        (around(0.84, 0.001), around(0.825, 0.001), {"minimum_auc_loss": 0.01}, True, False),
        # Of a handful of users: nothing can be told.
        (around(0.84), Interval(0.6, 0.3, 0.9), {}, False, False),
        (around(0.56), around(0.52), {}, True, True),
        (around(0.56), around(0.53, 0.04), {}, False, False),
    ],
)
def test_worse_than_promised_and_no_better_than_chance(promised, achieved, policy, worse, chance):
    of_promise, of_chance = judged(promised, achieved, **policy)
    assert (of_promise.found, of_chance.found) == (worse, chance)


def test_findings_speak_to_people():
    worse, chance = judged(around(0.84), Interval(0.6, 0.3, 0.9))
    assert worse.reason == (
        "AUC of 400 held-out users is 0.6000 (95 % interval 0.3000 to 0.9000), 0.2400 below the promised 0.8400 "
        "(95 % interval 0.8200 to 0.8600); a loss of more than 0.3569 counts"
    )
    assert chance.reason == (
        "AUC of 400 held-out users is 0.6000 (95 % interval 0.3000 to 0.9000); chance is 0.5, and the interval holds "
        "the promised 0.8400 too: too few users to tell"
    )


@pytest.mark.parametrize(
    ("ece", "promised", "perfect_then", "found"),
    [
        (0.05, 0.02, 0.03, False),
        (0.061, 0.02, 0.03, True),
        # What was promised above a perfect model's is granted.
        (0.061, 0.05, 0.03, False),
        (0.081, 0.05, 0.03, True),
    ],
)
def test_worse_calibrated(ece, promised, perfect_then, found):
    scope = decay.Achieved(400, 100, {"ece": around(ece)}, ())
    of = evidence(ece=promised, perfect_ece=perfect_then)
    assert decay._worse_calibrated(scope, of, 0.03, DECAY).found == found


# --- slides ---------------------------------------------------------------------------------------------------------


def history_of(
    aucs, *, spread=0.02, versions=(), gaps=(), eces=(), first=JANUARY, promised=0.84, promises=()
) -> list[PerformanceReport]:
    """Reports of consecutive months with these AUCs; all else as promised unless said otherwise."""
    made = []
    for at, auc in enumerate(aucs):
        metrics = KEPT.held_out.metrics | {"auc": around(auc, spread)}
        if eces:
            metrics = metrics | {"ece": around(eces[at], 0.01)}
        made.append(
            replace(
                KEPT,
                month=str(first.shift(at)),
                version=versions[at] if versions else 1,
                held_out=replace(KEPT.held_out, metrics=metrics),
                promised=KEPT.promised | {"auc": around(promises[at] if promises else promised, spread)},
                train_validation_gap=gaps[at] if gaps else 0.02,
            )
        )
    return made


def slide(reports, **policy):
    points = [decay._point(report) for report in reports]
    return decay._sliding(points, msgspec.structs.replace(DECAY, **policy))


@pytest.mark.parametrize(
    ("reports", "found"),
    [
        (history_of([0.84] * 6), False),
        (history_of([0.84, 0.83, 0.82, 0.81, 0.80, 0.79]), True),
        (history_of([0.79, 0.80, 0.81, 0.82, 0.83, 0.84]), False),
        (history_of([0.84, 0.83, 0.82]), False),
        (history_of([0.84, 0.80, 0.86, 0.81, 0.85, 0.81]), False),
        # So slow that it does not matter, however certain.
        (history_of([0.840, 0.837, 0.834, 0.831, 0.828, 0.825], spread=0.001), False),
        (history_of([0.840, 0.835, 0.830, 0.825, 0.820, 0.815], spread=0.001), True),
        # A jump is no slide, and what was before it does not count.
        (history_of([0.84, 0.49, 0.66, 0.66, 0.66, 0.66]), False),
        (history_of([0.84, 0.84, 0.84, 0.66, 0.65, 0.64]), False),
        (history_of([0.60, 0.84, 0.83, 0.82, 0.81, 0.80, 0.79]), True),
        # Only the last six months count.
        (history_of([0.90, 0.88, 0.86, 0.84, 0.84, 0.84, 0.84, 0.84, 0.84]), False),
        (history_of([0.84] * 6, eces=[0.01, 0.02, 0.03, 0.04, 0.05, 0.06]), True),
        (history_of([0.84] * 6, eces=[0.06, 0.05, 0.04, 0.03, 0.02, 0.01]), False),
        # A version counts once, however many months it served.
        (history_of([0.84] * 4, versions=[1, 2, 3, 4], gaps=[0.02, 0.04, 0.06, 0.08]), True),
        (history_of([0.84] * 6, versions=[1, 1, 1, 2, 2, 2], gaps=[0.02] * 3 + [0.05] * 3), False),
    ],
)
def test_a_slide_is_slow_steady_and_large_enough(reports, found):
    assert slide(reports).found == found


def test_no_month_of_a_slide_is_an_alarm_by_itself():
    reports = history_of([0.843, 0.836, 0.829, 0.822, 0.815, 0.808])
    single = [judged(one.promised["auc"], one.held_out.metrics["auc"])[0].found for one in reports]
    assert single == [False] * 6
    assert slide(reports).found


def test_slides_are_told_in_words():
    assert slide(history_of([0.84] * 3)).reason == "takes 4 months or versions without a jump to tell; there are 3"
    assert slide(history_of([0.84, 0.83, 0.82, 0.81])).reason == (
        "over 4 months AUC changed for the worse by 0.0300, from 0.8400 to 0.8100; "
        "more than 0.0371 for the worse counts"
    )
    versions = history_of([0.84] * 4, versions=[1, 2, 3, 4], gaps=[0.02, 0.04, 0.06, 0.08])
    assert slide(versions).reason.startswith("over 4 versions the train-validation gap changed for the worse by 0.0600")


def test_the_growth_of_a_straight_line_and_its_error():
    series = decay._Series("AUC", 0.0, (0, 1, 2, 4), (0.1, 0.2, 0.3, 0.5), (0.02,) * 4)
    growth, bound = decay._growth(series, 2.0)
    assert growth == pytest.approx(0.4)
    assert bound == pytest.approx(2 * 0.02 * 4 / np.sqrt(8.75))
    straying = decay._Series("AUC", 0.0, (0, 1, 2, 3), (0.1, 0.3, 0.1, 0.3), (0.001,) * 4)
    slope, covariance = np.polyfit(straying.times, straying.values, 1, cov=True)
    growth, bound = decay._growth(straying, 1.0)
    assert growth == pytest.approx(3 * slope[0])
    assert bound == pytest.approx(3 * np.sqrt(covariance[0, 0]))


def test_the_report_knows_earlier_months_in_any_order_and_no_later_ones():
    earlier = history_of([0.90, 0.885, 0.87, 0.855, 0.84], first=Month(2023, 9))
    sliding = report_on(history=earlier).sliding
    assert sliding.value is not None
    assert sliding.value > 0.05
    assert report_on(history=earlier[::-1]).sliding == sliding
    assert report_on(history=[*earlier, *history_of([0.99] * 3, first=FEBRUARY)]).sliding == sliding


# --- properties -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=5)
@given(st.integers(0, 100))
def test_the_order_of_users_never_counts(seed):
    order = np.random.default_rng(seed).permutation(USERS)
    groups = {name: of[order] for name, of in GROUPS.items()}
    shuffled = Outcome(FEBRUARY, CHANCE[order], 0.3, LABELS[order], HELD_OUT[order], groups)
    assert performance_report(shuffled, promise(), (), DECAY, **DRAWN) == KEPT


unit = st.floats(0, 1)


@given(promised=unit, spread=st.floats(0, 0.2), aucs=st.tuples(unit, unit).map(sorted), policy=st.floats(0.001, 0.4))
def test_what_is_found_of_an_auc_is_found_of_a_lower_one(promised, spread, aucs, policy):
    low, high = (judged(around(promised), around(auc, spread), maximum_false_alarms=policy) for auc in aucs)
    for of_low, of_high in zip(low, high, strict=True):
        assert of_low.found >= of_high.found


@given(st.lists(unit, min_size=3, max_size=3).map(sorted))
def test_a_promise_that_is_kept_is_never_worse(ends):
    kept = Interval(ends[1], ends[0], ends[2])
    worse, chance = judged(kept, kept)
    assert not worse.found
    assert not chance.found


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(unit, unit), min_size=1, max_size=9), st.floats(0, 0.1))
def test_reports_survive_json_whatever_their_history(series, spread):
    reports = history_of([auc for auc, _ in series], spread=spread, eces=[ece for _, ece in series])
    report = replace(KEPT, sliding=slide(reports), drop=DROP)
    assert msgspec.json.decode(msgspec.json.encode(report), type=PerformanceReport) == report
    assert msgspec.convert(msgspec.to_builtins(report), PerformanceReport) == report


def test_stable_months_do_not_alarm():
    alarms, rng = 0, np.random.default_rng(11)
    for _ in range(40):
        then, now = (rng.random(HELD_OUT.sum()) < CHANCE[HELD_OUT] for _ in range(2))
        promised, achieved = (
            evaluation.intervals(labels, CHANCE[HELD_OUT], 0.3, seed=1, draws=50)["auc"] for labels in (then, now)
        )
        alarms += judged(promised, achieved)[0].found
    assert alarms <= 2


# --- what explains a drop -------------------------------------------------------------------------------------------


V1 = CONTRACT.service("churn_v1")
MADE = handmade_dataset(1_500)


def side(month, rows, labels=None, probabilities=None):
    """Users whose chance of churning falls with the months that they have been customers."""
    log_odds = 1.5 - rows["months_active"].to_numpy() / 12
    if labels is None:
        chance = 1 / (1 + np.exp(-log_odds))
        labels = np.random.default_rng(month.number).random(len(rows)) < chance
    return Side(month, rows, labels, 1 / (1 + np.exp(-log_odds)) if probabilities is None else probabilities)


THEN = side(JANUARY, MADE.frame)


def shifted(rows: pd.DataFrame) -> pd.DataFrame:
    """Of those who have been customers for very short or very long, few are still there."""
    months = rows["months_active"].to_numpy()
    away = (months - np.median(months)) / months.std()
    kept = np.random.default_rng(0).random(len(rows)) < np.exp(-(away**2))
    return rows[kept].reset_index(drop=True)


def explained(now: Side) -> DropExplained:
    return explain_drop(THEN, now, V1, seed=3)


DROP = explained(side(FEBRUARY, MADE.frame))


def test_the_parts_of_a_drop_add_up():
    for one in (DROP, explained(side(FEBRUARY, shifted(MADE.frame)))):
        assert one.drop.value == pytest.approx(one.feature_drift.value + one.concept_drift.value, abs=1e-12)
        assert one.drop.value == pytest.approx(one.reference_auc.value - one.auc.value, abs=1e-12)
        assert one.reference_auc.value == pytest.approx(roc_auc_score(THEN.labels, THEN.probabilities), abs=1e-12)
        assert (one.reference, one.month, one.reference_users) == ("2024-01", "2024-02", 1_500)
        assert one.reliable


def test_the_same_month_again_explains_nothing():
    one = explained(Side(FEBRUARY, THEN.rows, THEN.labels, THEN.probabilities))
    assert one.drop == Interval(0, 0, 0)
    assert abs(one.feature_drift.value) < 0.003
    assert one.effective_users > 1_450
    assert one.clipped == 0
    assert abs(one.domain_auc - 0.5) < 0.05


def test_other_labels_for_the_same_features_are_concept_drift():
    one = explained(side(FEBRUARY, THEN.rows, labels=side(FEBRUARY, THEN.rows).labels[::-1]))
    assert one.concept_drift.low > 0.1
    assert abs(one.feature_drift.value) < 0.02


def test_other_features_under_the_same_law_are_feature_drift():
    now = side(FEBRUARY, shifted(MADE.frame))
    one = explained(now)
    assert one.domain_auc > 0.6
    assert one.feature_drift.low > 0.02
    assert one.concept_drift.low < 0 < one.concept_drift.high
    assert one.reason.startswith(f"of the fall in AUC by {one.drop.value:.4f} (95 % interval ")


def test_months_without_overlap_are_not_explained():
    rows = MADE.frame.assign(monthly_fee=MADE.frame["monthly_fee"] + 1_000)
    one = explained(side(FEBRUARY, rows))
    assert not one.reliable
    assert one.covered < 0.05
    assert "the features of 2024-01 and 2024-02 hardly overlap" in one.reason
    assert one.domain_auc > 0.99


def test_neither_order_of_rows_changes_the_explanation():
    now = side(FEBRUARY, shifted(MADE.frame))
    order, others = np.random.default_rng(2).permutation(1_500), np.random.default_rng(3).permutation(len(now.labels))
    then = Side(JANUARY, THEN.rows.iloc[order], THEN.labels[order], THEN.probabilities[order])
    other = Side(FEBRUARY, now.rows.iloc[others], now.labels[others], now.probabilities[others])
    assert explain_drop(then, other, V1, seed=3) == explained(now)


def test_the_weighted_auc_is_that_of_scikit_learn_and_its_error_that_of_a_bootstrap():
    rng = np.random.default_rng(4)
    weights = rng.random(1_500) + 0.2
    ranked = decay._ranked(THEN, weights)
    expected = roc_auc_score(THEN.labels, THEN.probabilities, sample_weight=weights)
    assert ranked.auc == pytest.approx(expected, abs=1e-12)
    drawn = []
    for _ in range(200):
        users = rng.integers(1_500, size=1_500)
        drawn.append(roc_auc_score(THEN.labels[users], THEN.probabilities[users], sample_weight=weights[users]))
    assert np.std(drawn) == pytest.approx(decay._error(ranked.interval), rel=0.15)


@pytest.mark.parametrize("alike", ["then", "now"])
def test_a_month_in_which_all_stayed_cannot_be_explained(alike):
    nobody = np.zeros(1_500, dtype=bool)
    then = Side(JANUARY, THEN.rows, nobody, THEN.probabilities) if alike == "then" else THEN
    now = side(FEBRUARY, THEN.rows, labels=nobody if alike == "now" else None)
    with pytest.raises(TrainingRefused, match="of 1500 users to measure a model on 0 churned"):
        explain_drop(then, now, V1, seed=3)


# --- the real months ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decayed(real_data):
    """The report on February of a logistic regression of January, the quickest of the estimators."""
    config = TrainingConfig.load(PROJECT_ROOT / "training.toml")
    january, february = real_dataset(real_data), real_dataset(real_data, FEBRUARY)
    how = Procedure(config, (CONTRACT.service("churn_v2"),), "logistic_regression")
    made = procedure.run(january, how)
    scores = procedure.score(made.scorer, february.frame)
    drawn = {"seed": config.seed, "draws": 200}
    auc = evaluation.intervals(made.labels, made.validation, 0.5, **drawn)["auc"]
    metrics = evidence().metrics | {"auc": auc}
    drop = explain_drop(
        Side(JANUARY, january.holdout_rows, made.labels, made.validation),
        Side(FEBRUARY, february.holdout_rows, february.labels[february.holdout], scores[february.holdout]),
        made.model.service,
        seed=config.seed,
    )
    groups = evaluation.segment_groups(february.frame, config.segments)
    predicted = Outcome(FEBRUARY, scores, 0.5, february.labels, february.holdout, groups)
    return performance_report(predicted, promise(evidence(metrics=metrics)), (), DECAY, **drawn, drop=drop)


def test_januarys_model_is_no_better_than_chance_in_february(decayed):
    assert decayed.promised["auc"].value == pytest.approx(0.84, abs=0.01)
    assert decayed.held_out.metrics["auc"].value == pytest.approx(0.49, abs=0.015)
    assert decayed.everyone.users == 7_043
    assert decayed.everyone.metrics["auc"].value == pytest.approx(0.49, abs=0.015)
    assert found(decayed) >= {"worse_than_promised", "no_better_than_chance"}
    assert not decayed.sliding.found


def test_februarys_drop_is_concept_drift(decayed):
    drop = decayed.drop
    assert drop.drop.value == pytest.approx(0.35, abs=0.015)
    assert abs(drop.feature_drift.value) < 0.01
    assert drop.concept_drift.value > 0.95 * drop.drop.value
    assert drop.reliable
    assert drop.effective_users > 0.9 * drop.reference_users
