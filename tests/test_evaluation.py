import math
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from streamflow.bootstrap import ece, observed
from streamflow.contract import CONTRACT
from streamflow.errors import ConfigurationError, TrainingRefused
from streamflow.evaluation import (
    METRICS,
    capture,
    compare,
    fairness,
    intervals,
    lift_curve,
    metrics,
    perfect_ece,
    permutation_importances,
    prediction_sample,
    reliability,
    segment_groups,
    segments,
    univariate_auc,
)
from streamflow.training_config import Segments

LABELS = np.array([False, False, False, True, True])
PROBABILITIES = np.array([0.1, 0.5, 0.4, 0.45, 0.9])
DRAWN = {"seed": 3, "draws": 200}


def users(count=400, seed=0):
    """Labels and rounded, so often tied, probabilities of a useful model, a worse one's, and the users' rows."""
    rng = np.random.default_rng(seed)
    probabilities = rng.beta(1, 3, count).round(2)
    labels = rng.random(count) < probabilities
    worse = np.clip(probabilities + rng.normal(0, 0.3, count), 0, 1).round(2)
    rows = pd.DataFrame(
        {
            "user_id": [f"{number:04d}" for number in range(count)],
            "months_active": rng.integers(0, 60, count),
            "monthly_fee": rng.uniform(20, 120, count),
            "contract_type": rng.choice(["Month-to-month", "One year", "Two year"], count).astype(object),
            "user_is_senior": rng.random(count) < 0.2,
        }
    )
    return labels, probabilities, worse, rows


def groups_of(rows):
    named = Segments(attributes=("contract_type", "user_is_senior"), bands={"months_active": (6, 12, 24, 48)})
    return segment_groups(rows, named)


# Metrics


def test_metrics_by_hand():
    found = metrics(LABELS, PROBABILITIES, 0.5)
    assert found.auc == pytest.approx(5 / 6)
    assert found.average_precision == pytest.approx(1 / 2 * 1 + 1 / 2 * 2 / 3)
    assert (found.accuracy, found.precision, found.recall, found.f1) == (0.6, 0.5, 0.5, 0.5)
    surprise = -math.log(0.9) - math.log(0.5) - math.log(0.6) - math.log(0.45) - math.log(0.9)
    assert found.logloss == pytest.approx(surprise / 5)
    assert found.brier == pytest.approx((0.1**2 + 0.5**2 + 0.4**2 + 0.55**2 + 0.1**2) / 5)
    assert found.ece == pytest.approx((0.1 + 0.5 + (1 - 0.4 - 0.45) + 0.1) / 5)


def test_metrics_are_named_as_declared():
    assert tuple(asdict(metrics(LABELS, PROBABILITIES, 0.5))) == METRICS


def test_the_threshold_itself_counts_as_churn():
    assert metrics(LABELS, PROBABILITIES, 0.45).recall == 1
    assert metrics(LABELS, PROBABILITIES, math.nextafter(0.45, 1)).recall == 0.5


def test_predicting_nobody_scores_zero():
    found = metrics(LABELS, PROBABILITIES, 0.95)
    assert (found.precision, found.recall, found.f1, found.accuracy) == (0, 0, 0, 0.6)


def test_certain_and_wrong_has_a_finite_logloss():
    found = metrics(LABELS, 1.0 - LABELS, 0.5)
    assert math.isfinite(found.logloss)
    assert all(type(value) is float for value in asdict(found).values())


@pytest.mark.parametrize("labels", [np.zeros(5, bool), np.ones(5, bool)])
def test_labels_of_one_value_are_refused(labels):
    rows = pd.DataFrame({"user_id": list("abcde"), "monthly_fee": 1.0})
    for measured in (
        lambda: metrics(labels, PROBABILITIES, 0.5),
        lambda: intervals(labels, PROBABILITIES, 0.5, **DRAWN),
        lambda: capture(labels, PROBABILITIES, **DRAWN),
        lambda: lift_curve(labels, PROBABILITIES),
        lambda: compare(labels, PROBABILITIES, PROBABILITIES, {}, **DRAWN),
        lambda: permutation_importances(lambda frame: PROBABILITIES, rows, labels, [], seed=1, repeats=2),
        lambda: univariate_auc(rows, labels, []),
    ):
        with pytest.raises(TrainingRefused, match=rf"of 5 users to measure a model on {labels.sum()} churned"):
            measured()


# Intervals


def test_intervals_are_around_the_metrics():
    labels, probabilities, *_ = users()
    found = intervals(labels, probabilities, 0.3, **DRAWN)
    assert tuple(found) == METRICS
    assert {name: one.value for name, one in found.items()} == asdict(metrics(labels, probabilities, 0.3))
    for name in set(METRICS) - {"ece"}:
        assert found[name].low < found[name].value < found[name].high, name


def test_intervals_are_those_of_a_plain_bootstrap():
    labels, probabilities, *_ = users(200)
    rng = np.random.default_rng(1)
    plain = {"auc": [], "average_precision": [], "logloss": [], "brier": []}
    for _ in range(250):
        drawn = np.concatenate(
            [rng.choice(np.flatnonzero(labels == label), (labels == label).sum()) for label in (0, 1)]
        )
        plain["auc"].append(sk.roc_auc_score(labels[drawn], probabilities[drawn]))
        plain["average_precision"].append(sk.average_precision_score(labels[drawn], probabilities[drawn]))
        plain["logloss"].append(sk.log_loss(labels[drawn], probabilities[drawn]))
        plain["brier"].append(np.mean((labels[drawn] - probabilities[drawn]) ** 2))
    found = intervals(labels, probabilities, 0.3, seed=1, draws=5000)
    for name, values in plain.items():
        low, high = np.percentile(values, [2.5, 97.5])
        assert found[name].low == pytest.approx(low, abs=0.2 * (high - low)), name
        assert found[name].high == pytest.approx(high, abs=0.2 * (high - low)), name


def test_interval_of_a_rate_is_the_binomials():
    labels, probabilities, *_ = users()
    found = intervals(labels, probabilities, 0.3, seed=1, draws=20_000)["recall"]
    churned = labels.sum()
    low, high = stats.binom.ppf([0.025, 0.975], churned, found.value) / churned
    assert (found.low, found.high) == pytest.approx((low, high), abs=1.01 / churned)


def test_draws_depend_on_the_seed_only():
    labels, probabilities, *_ = users()
    found = intervals(labels, probabilities, 0.3, seed=3, draws=200)
    assert intervals(labels, probabilities, 0.3, seed=3, draws=200) == found
    assert intervals(labels, probabilities, 0.3, seed=4, draws=200)["auc"].low != found["auc"].low


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(20, 300))
def test_no_figure_depends_on_the_order_of_users(seed, count):
    labels, probabilities, worse, rows = users(count, seed)
    labels[:2] = True, False
    order = np.random.default_rng(seed).permutation(count)
    columns = [column for column in CONTRACT.features if column.name in rows]

    def figures(order):
        here = labels[order], probabilities[order]
        frame = rows.iloc[order]
        groups = groups_of(frame)
        return (
            metrics(*here, 0.3),
            intervals(*here, 0.3, seed=1, draws=40),
            perfect_ece(here[1], seed=1, draws=40),
            str(reliability(*here)),
            segments(*here, 0.3, groups, seed=1, draws=40),
            fairness(*here, 0.3, groups, seed=1, draws=40),
            capture(*here, seed=1, draws=40),
            lift_curve(*here).to_dict(),
            compare(*here, worse[order], groups, seed=1, draws=40),
            univariate_auc(frame, here[0], columns),
            permutation_importances(
                model, frame, here[0], ["monthly_fee", "months_active"], seed=1, repeats=2
            ).to_dict(),
            prediction_sample(frame, here[1], 0.3).to_dict(),
        )

    for shuffled, plain in zip(figures(order), figures(np.arange(count)), strict=True):
        assert shuffled == plain


# Calibration


def test_perfect_ece_of_one_probability_is_the_binomials():
    low, high = stats.binom.ppf([0.025, 0.975], 1000, 0.5) / 1000
    found = perfect_ece(np.full(1000, 0.5), seed=1, draws=20_000)
    assert found == pytest.approx((high - low) / 2, abs=0.0011)


def test_perfect_ece_holds_for_95_percent_of_calibrated_models():
    rng = np.random.default_rng(0)
    probabilities = rng.beta(1, 3, 500)
    bound = perfect_ece(probabilities, seed=1, draws=4000)
    errors = [ece(observed(rng.random(500) < probabilities, probabilities))[0] for _ in range(300)]
    assert np.mean(np.array(errors) < bound) == pytest.approx(0.95, abs=0.03)
    assert perfect_ece(probabilities.repeat(16), seed=1, draws=500) < bound / 3


def test_reliability_by_hand():
    bins = reliability(LABELS, PROBABILITIES)
    assert [(one.low, one.high) for one in bins] == [(index / 10, (index + 1) / 10) for index in range(10)]
    assert [one.users for one in bins] == [0, 1, 0, 0, 2, 1, 0, 0, 0, 1]
    assert (bins[4].mean_probability, bins[4].churn_rate) == pytest.approx((0.425, 0.5))
    assert math.isnan(bins[0].mean_probability)
    assert math.isnan(bins[0].churn_rate)


def test_reliability_is_what_ece_sums_up():
    labels, probabilities, *_ = users()
    bins = [one for one in reliability(labels, probabilities) if one.users]
    error = sum(one.users * abs(one.mean_probability - one.churn_rate) for one in bins) / len(labels)
    assert metrics(labels, probabilities, 0.5).ece == pytest.approx(error, rel=1e-12)


# Segments


def test_groups_of_attributes_are_their_values_and_of_numbers_their_bands():
    rows = pd.DataFrame(
        {
            "months_active": [0, 5, 6, 11, 12, 23, 24, 47, 48, 72],
            "monthly_fee": [0.0, 19.99, 20.0, 55.5, 59.99, 60.0, 100.0, 118.75, 20.0, 0.5],
            "skips_7d": [0, 1, 2, 3, 0, 1, 2, 3, 0, 1],
            "contract_type": ["One year", "Two year"] * 5,
            "user_is_senior": [True, False] * 5,
        }
    )
    bands = {"months_active": (6, 12, 24, 48), "monthly_fee": (20, 60), "skips_7d": (0.5, 2, 3)}
    groups = segment_groups(rows, Segments(attributes=("contract_type", "user_is_senior"), bands=bands))
    assert list(groups) == ["contract_type", "user_is_senior", "monthly_fee", "months_active", "skips_7d"]
    assert groups["contract_type"].tolist() == ["One year", "Two year"] * 5
    assert groups["user_is_senior"].tolist() == ["True", "False"] * 5
    assert groups["months_active"].tolist() == (
        ["0-5", "0-5", "6-11", "6-11", "12-23", "12-23", "24-47", "24-47", "48+", "48+"]
    )
    cheap, middling, dear = "0 to <20", "20 to <60", "60+"
    assert groups["monthly_fee"].tolist() == (
        [cheap, cheap, middling, middling, middling, dear, dear, dear, middling, cheap]
    )
    assert groups["skips_7d"].tolist() == ["0", "1", "2", "3+", "0", "1", "2", "3+", "0", "1"]


def test_the_lowest_band_of_a_column_without_lower_bound_is_open():
    unbounded = tuple(
        replace(table, columns=tuple(replace(column, low=None) for column in table.columns))
        for table in CONTRACT.tables
    )
    rows = pd.DataFrame({"months_active": [-3, 7], "monthly_fee": [-3.5, 7]})
    bands = Segments(attributes=(), bands={"months_active": (6,), "monthly_fee": (6.5,)})
    groups = segment_groups(rows, bands, replace(CONTRACT, tables=unbounded))
    assert {name: group.tolist() for name, group in groups.items()} == {
        "months_active": ["<6", "6+"],
        "monthly_fee": ["<6.5", "6.5+"],
    }


@pytest.mark.parametrize(
    ("named", "complaint"),
    [
        (Segments(attributes=("contract_type", "shoe_size")), "names shoe_size, which is no column"),
        (Segments(attributes=(), bands={"shoe_size": (1,)}), "names shoe_size, which is no column"),
        (Segments(attributes=("signup_date",)), "names signup_date, which is no column"),
        (Segments(attributes=("months_active",), bands={"months_active": (1,)}), "months_active more than once"),
        (Segments(attributes=("monthly_fee",)), "monthly_fee, whose values are too many"),
        (Segments(attributes=(), bands={"contract_type": (1,)}), "contract_type, which is no number"),
        (Segments(attributes=(), bands={"user_is_senior": (1,)}), "user_is_senior, which is no number"),
        (Segments(attributes=(), bands={"months_active": ()}), "months_active in training.toml must ascend"),
        (Segments(attributes=(), bands={"months_active": (12, 6)}), "months_active in training.toml must ascend"),
        (Segments(attributes=(), bands={"months_active": (6, 6)}), "months_active in training.toml must ascend"),
    ],
)
def test_segments_that_make_no_sense_are_refused(named, complaint):
    with pytest.raises(ConfigurationError, match=complaint):
        segment_groups(users(20)[-1], named)


def test_segments_are_the_groups_in_order_with_their_metrics():
    labels, probabilities, _, rows = users()
    groups = groups_of(rows)
    found = segments(labels, probabilities, 0.3, groups, **DRAWN)
    assert [(one.attribute, one.value) for one in found] == (
        [("contract_type", value) for value in ("Month-to-month", "One year", "Two year")]
        + [("user_is_senior", value) for value in ("False", "True")]
        + [("months_active", value) for value in ("0-5", "6-11", "12-23", "24-47", "48+")]
    )
    for one in found:
        members = groups[one.attribute] == one.value
        assert (one.users, one.churned) == (members.sum(), labels[members].sum())
        expected = asdict(metrics(labels[members], probabilities[members], 0.3))
        assert {name: interval.value for name, interval in one.metrics.items()} == expected
        assert one.metrics["auc"].low < one.metrics["auc"].value < one.metrics["auc"].high


def test_a_segment_does_not_depend_on_the_others():
    labels, probabilities, _, rows = users()
    groups = groups_of(rows)
    together = segments(labels, probabilities, 0.3, groups, **DRAWN)
    alone = segments(labels, probabilities, 0.3, {"months_active": groups["months_active"]}, **DRAWN)
    assert alone == together[-5:]
    seniors = rows["user_is_senior"].to_numpy()
    few = {"user_is_senior": groups["user_is_senior"][seniors]}
    (segment,) = segments(labels[seniors], probabilities[seniors], 0.3, few, **DRAWN)
    assert segment == together[4]


def test_every_segment_has_its_own_draws():
    labels, probabilities, *_ = users(100)
    twice = {"group": np.repeat(["a", "b"], 100)}
    first, second = segments(np.tile(labels, 2), np.tile(probabilities, 2), 0.3, twice, **DRAWN)
    assert first.metrics["auc"].value == second.metrics["auc"].value
    assert first.metrics["auc"].low != second.metrics["auc"].low


def test_segments_of_one_class_have_no_metric_that_needs_both():
    labels = np.array([False, False, True, True, False, True])
    probabilities = np.array([0.1, 0.6, 0.7, 0.3, 0.2, 0.9])
    groups = {"group": np.array(["stayed", "stayed", "churned", "churned", "mixed", "mixed"])}
    churned, mixed, stayed = segments(labels, probabilities, 0.5, groups, **DRAWN)
    assert (stayed.users, stayed.churned) == (2, 0)
    assert set(stayed.metrics) == {"brier", "ece", "accuracy", "precision"}
    assert stayed.metrics["brier"].value == pytest.approx((0.01 + 0.36) / 2)
    assert stayed.metrics["accuracy"].value == 0.5
    assert (churned.users, churned.churned) == (2, 2)
    assert set(churned.metrics) == {"brier", "ece", "accuracy", "precision", "recall", "f1"}
    assert churned.metrics["recall"].value == 0.5
    assert churned.metrics["brier"].value == pytest.approx((0.09 + 0.49) / 2)
    assert set(mixed.metrics) == set(METRICS)


def test_groups_are_in_the_order_of_their_numbers():
    values = np.array(["100+", "20 to <100", "-5 to <20", "<-5", "None"])
    found = segments(np.arange(5) < 2, np.full(5, 0.5), 0.5, {"fee": values}, **DRAWN)
    assert [one.value for one in found] == ["<-5", "None", "-5 to <20", "20 to <100", "100+"]


# Fairness


def test_fairness_by_hand():
    labels = np.array([1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0], bool)
    probabilities = np.array([0.9, 0.9, 0.9, 0.1, 0.9, 0.1, 0.1, 0.1, 0.9, 0.1, 0.1, 0.1])
    groups = {"user_gender": np.array(["Female"] * 8 + ["Male"] * 4)}
    recall, alarms, selected = fairness(labels, probabilities, 0.5, groups, **DRAWN)
    assert {gap.attribute for gap in (recall, alarms, selected)} == {"user_gender"}
    assert (recall.measure, alarms.measure, selected.measure) == ("recall", "false positive rate", "selection rate")
    assert recall.groups == {"Female": 0.75, "Male": 0.5}
    assert alarms.groups == {"Female": 0.25, "Male": 0.0}
    assert selected.groups == {"Female": 0.5, "Male": 0.25}
    assert (recall.gap.value, alarms.gap.value, selected.gap.value) == (0.25, 0.25, 0.25)


def test_the_interval_of_a_gap_is_that_of_the_difference_of_two_rates():
    labels, probabilities, _, rows = users(4000)
    groups = {"user_is_senior": groups_of(rows)["user_is_senior"]}
    found = fairness(labels, probabilities, 0.3, groups, seed=1, draws=4000)
    acted, seniors = probabilities >= 0.3, rows["user_is_senior"].to_numpy()
    for gap, among in zip(found, (labels, ~labels), strict=False):
        rates = {name: acted[among & who].mean() for name, who in (("False", ~seniors), ("True", seniors))}
        assert gap.groups == pytest.approx(rates)
        variance = sum(
            rate * (1 - rate) / (among & who).sum()
            for rate, who in zip(rates.values(), (~seniors, seniors), strict=True)
        )
        half = 1.96 * math.sqrt(variance)
        assert gap.gap.value == pytest.approx(abs(rates["True"] - rates["False"]))
        assert (gap.gap.low, gap.gap.high) == pytest.approx(
            (gap.gap.value - half, gap.gap.value + half), abs=0.1 * half
        )
    found_rates, alarm_rates, selected = ((by["False"], by["True"]) for by in (gap.groups for gap in found))
    share = labels[seniors].mean()
    assert selected[1] == pytest.approx(share * found_rates[1] + (1 - share) * alarm_rates[1])


def test_a_gap_by_noise_alone_has_an_interval_around_zero():
    labels = np.tile([True, True, False, False], 60)
    probabilities = np.tile([0.9, 0.1], 120)
    groups = {"group": np.repeat(["a", "b", "c"], 80)}
    for gap in fairness(labels, probabilities, 0.5, groups, **DRAWN):
        assert gap.gap.value == 0
        assert gap.gap.low < 0 < gap.gap.high


def test_the_gap_is_between_the_extremes_of_many_groups():
    labels = np.ones(12, bool)
    probabilities = np.array([1, 1, 0, 0, 1, 0, 0, 0, 1, 1, 1, 0.0])
    (recall, selected) = fairness(labels, probabilities, 0.5, {"group": np.repeat(["a", "b", "c"], 4)}, **DRAWN)
    assert recall.groups == {"a": 0.5, "b": 0.25, "c": 0.75}
    assert recall.gap.value == selected.gap.value == 0.5


def test_groups_without_the_class_that_a_rate_needs_are_left_out():
    labels = np.array([True, False, False, False, True, False])
    probabilities = np.array([0.9, 0.9, 0.1, 0.1, 0.1, 0.1])
    groups = {"two": np.array(["a", "a", "b", "b", "c", "c"]), "one": np.full(6, "all")}
    found = fairness(labels, probabilities, 0.5, groups, **DRAWN)
    assert [(gap.attribute, gap.measure, gap.gap.value) for gap in found] == [
        ("two", "recall", 1),
        ("two", "false positive rate", 1),
        ("two", "selection rate", 1),
    ]
    assert [set(gap.groups) for gap in found] == [{"a", "c"}, {"a", "b", "c"}, {"a", "b", "c"}]


# Capture


def test_capture_by_hand():
    labels = np.array([1, 1, 0, 1, 0, 0, 0, 0, 0, 1], bool)
    probabilities = np.arange(10, 0, -1) / 10
    found = capture(labels, probabilities, share=0.2, **DRAWN)
    assert (found.share, found.users) == (0.2, 2)
    assert (found.captured.value, found.lift.value) == (0.5, 2.5)
    assert found.captured.low < 0.5 <= found.captured.high
    assert found.lift.high == pytest.approx(found.captured.high / 0.2)
    assert capture(labels, probabilities, share=0.15, **DRAWN).captured.value == pytest.approx(1.5 / 4)


def test_capture_of_a_model_that_knows_nothing_is_the_share():
    found = capture(LABELS, np.full(5, 0.3), seed=1, draws=10)
    assert [found.captured.low, found.captured.value, found.captured.high] == pytest.approx([0.1] * 3)
    assert found.lift.value == pytest.approx(1)


def test_lift_curve_by_hand():
    labels = np.array([True, False, True, False])
    curve = lift_curve(labels, np.array([0.9, 0.6, 0.6, 0.1]))
    assert list(curve) == ["share", "captured", "lift"]
    assert curve["share"].tolist() == [0.25, 0.75, 1]
    assert curve["captured"].tolist() == [0.5, 1, 1]
    assert curve["lift"].tolist() == pytest.approx([2, 4 / 3, 1])


# Importances


def model(frame):
    return (frame["monthly_fee"] / 120).to_numpy()


def test_importance_is_what_shuffling_costs():
    *_, rows = users()
    labels = rows["monthly_fee"].to_numpy() > 70
    table = permutation_importances(model, rows, labels, ["months_active", "monthly_fee"], seed=1, repeats=5)
    assert list(table) == ["feature", "importance", "low", "high"]
    assert table["feature"].tolist() == ["monthly_fee", "months_active"]
    fee, months = table.itertuples(index=False)
    assert fee.importance == pytest.approx(0.5, abs=0.06)
    assert fee.low < fee.importance < fee.high
    assert (months.importance, months.low, months.high) == (0, 0, 0)


def test_importance_has_students_interval_over_shuffles():
    labels, *_, rows = users()
    shuffled = []

    def seen(frame):
        shuffled.extend(frame["monthly_fee"].to_numpy().reshape(-1, len(rows)))
        return model(frame)

    (row,) = permutation_importances(seen, rows, labels, ["monthly_fee"], seed=1, repeats=4).itertuples(index=False)
    intact, *losses = (sk.roc_auc_score(labels, values) for values in shuffled)
    losses = intact - np.array(losses)
    assert all(sorted(values) == sorted(shuffled[0]) for values in shuffled)
    assert len({tuple(values) for values in shuffled}) == 5
    assert row.importance == pytest.approx(losses.mean())
    assert (row.low, row.high) == pytest.approx(stats.t.interval(0.95, 3, losses.mean(), stats.sem(losses)))


def test_importance_of_a_feature_does_not_depend_on_the_others():
    labels, *_, rows = users()

    def both(frame):
        return model(frame) / 2 + frame["months_active"].to_numpy() / 200

    together = permutation_importances(both, rows, labels, ["monthly_fee", "months_active"], seed=1, repeats=3)
    for name in ("months_active", "monthly_fee"):
        alone = permutation_importances(both, rows, labels, [name], seed=1, repeats=3)
        assert together[together["feature"] == name].to_dict("list") == alone.to_dict("list")


def test_every_feature_has_its_own_shuffles():
    labels, *_, rows = users()
    rows = rows.assign(total_paid=rows["monthly_fee"])
    shuffled = []

    def seen(frame):
        shuffled.append((frame["monthly_fee"].tolist(), frame["total_paid"].tolist()))
        return model(frame)

    permutation_importances(seen, rows, labels, ["monthly_fee", "total_paid"], seed=1, repeats=2)
    (_, _), (fees, _), (_, paid) = shuffled
    assert fees != paid
    assert sorted(fees) == sorted(paid)


def test_equally_important_features_are_in_the_order_of_their_names():
    labels, *_, rows = users()
    names = ["user_is_senior", "contract_type", "months_active"]
    table = permutation_importances(model, rows, labels, names, seed=1, repeats=2)
    assert table["feature"].tolist() == sorted(names)


# Comparison


def test_the_same_model_does_not_differ():
    labels, probabilities, _, rows = users()
    found = compare(labels, probabilities, probabilities.copy(), groups_of(rows), **DRAWN)
    for one in (found.auc, found.logloss, *(segment.auc for segment in found.segments)):
        assert (one.value, one.low, one.high) == (0, 0, 0)


def test_a_better_candidate_has_more_auc_and_less_logloss():
    labels, probabilities, worse, rows = users(1500)
    groups = groups_of(rows)
    found = compare(labels, probabilities, worse, groups, **DRAWN)
    ours, theirs = metrics(labels, probabilities, 0.5), metrics(labels, worse, 0.5)
    assert found.users == 1500
    assert found.auc.value == pytest.approx(ours.auc - theirs.auc)
    assert found.logloss.value == pytest.approx(ours.logloss - theirs.logloss)
    assert 0 < found.auc.low < found.auc.value < found.auc.high
    assert found.logloss.low < found.logloss.value < found.logloss.high < 0
    members = groups["months_active"] == "6-11"
    by_hand = (
        metrics(labels[members], probabilities[members], 0.5).auc - metrics(labels[members], worse[members], 0.5).auc
    )
    (segment,) = (one for one in found.segments if one.name == "months_active=6-11")
    assert (segment.users, segment.auc.value) == (members.sum(), pytest.approx(by_hand))
    turned = compare(labels, worse, probabilities, groups, **DRAWN)
    assert turned.auc.value == -found.auc.value
    assert turned.auc.high < 0


def test_the_draws_of_a_comparison_are_paired():
    labels, probabilities, *_ = users(1000)
    nearly = np.clip(probabilities + np.random.default_rng(5).normal(0, 0.01, 1000), 0, 1)
    paired = compare(labels, nearly, probabilities, {}, **DRAWN).auc
    alone = intervals(labels, probabilities, 0.5, **DRAWN)["auc"]
    assert paired.high - paired.low < (alone.high - alone.low) / 4


def test_a_comparison_leaves_out_segments_of_one_class():
    groups = {"group": np.array(["a", "a", "a", "b", "a"]), "other": np.array(["x", "y", "x", "y", "x"])}
    found = compare(LABELS, PROBABILITIES, PROBABILITIES[::-1], groups, **DRAWN)
    assert [segment.name for segment in found.segments] == ["group=a", "other=x", "other=y"]


# Single features


def test_a_feature_alone_by_hand():
    rows = pd.DataFrame(
        {
            "months_active": [5, 4, 3, 2, 3],
            "user_is_senior": [False, False, True, True, True],
            "contract_type": ["One year", "One year", "One year", "Two year", "Month-to-month"],
        }
    )
    columns = [column for column in CONTRACT.features if column.name in rows]
    found = univariate_auc(rows, LABELS, columns)
    assert found == pytest.approx({"months_active": 5.5 / 6, "user_is_senior": 5 / 6, "contract_type": 1})


# The sample of predictions


def test_prediction_sample_spans_the_users():
    _, probabilities, _, rows = users()
    sample = prediction_sample(rows, probabilities, 0.3)
    assert len(sample) == 20
    assert sample["user_id"].is_unique
    assert (sample["probability"].min(), sample["probability"].max()) == (probabilities.min(), probabilities.max())
    assert sample["probability"].is_monotonic_increasing
    of_user = dict(zip(rows["user_id"], probabilities, strict=True))
    assert sample["probability"].tolist() == [of_user[user] for user in sample["user_id"]]
    assert (sample["prediction"] == (sample["probability"] >= 0.3)).all()
    assert list(sample) == [*rows, "probability", "prediction"]


def test_prediction_sample_of_few_users_is_all_of_them():
    *_, rows = users(3)
    assert prediction_sample(rows, np.zeros(3), 0.5)["user_id"].tolist() == ["0000", "0001", "0002"]
