import functools
from dataclasses import replace
from itertools import pairwise

import msgspec
import numpy as np
import pandas as pd
import pytest
from governed import policy
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import _SigmoidCalibration
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from test_dataset import handmade_dataset, real_dataset

from streamflow import procedure, selection, windows
from streamflow.contract import CONTRACT
from streamflow.dataset import folds, in_order, of_newest_month, weights
from streamflow.errors import TrainingRefused
from streamflow.months import Month
from streamflow.procedure import Procedure
from streamflow.settings import PROJECT_ROOT
from streamflow.training import ModelSpec, bare_classifier, fit, make_pipeline
from streamflow.training_config import TrainingConfig, Windows
from streamflow.windows import Window, candidates, choose, earlier_months, pool

LABEL = "churn_label"
V2 = CONTRACT.service("churn_v2")
JANUARY, FEBRUARY, MARCH, APRIL = MONTHS = tuple(Month(2024, 1).until(Month(2024, 4)))
NAMES = ("month", "last 3", "recent", "all")
CLASSIFIERS = {
    "logistic_regression": LogisticRegression,
    "gradient_boosting": HistGradientBoostingClassifier,
    "random_forest_leaf_limited": RandomForestClassifier,
}


@pytest.fixture(scope="module")
def config(quick_training_file):
    return windowed(TrainingConfig.load(quick_training_file), names=NAMES)


@pytest.fixture(scope="module")
def world():
    """Three months of the same customers, in which the same makes them leave."""
    return {month: replace(handmade_dataset(600, seed), month=month) for seed, month in enumerate(MONTHS[:3])}


@pytest.fixture(scope="module")
def rows(world):
    return {month: data.training_rows for month, data in world.items()}


def of(names=NAMES, half_life=3.0):
    return Windows(tuple(names), half_life, "gradient_boosting")


def windowed(config, **changes):
    return msgspec.structs.replace(config, windows=msgspec.structs.replace(config.windows, **changes))


def without_seconds(choice):
    return [replace(score, seconds=0.0) for score in choice.scores]


def turned(data):
    """The dataset with what makes customers leave turned into its opposite."""
    return replace(data, frame=data.frame.assign(**{LABEL: ~data.labels}))


# --- which there are ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("month", "labelled", "names", "expected"),
    [
        (JANUARY, [], NAMES, {"month": (1,)}),
        (JANUARY, [JANUARY], NAMES, {"month": (1,)}),
        (FEBRUARY, [JANUARY], NAMES, {"month": (2,), "last 3": (1, 2), "recent": (1, 2)}),
        (FEBRUARY, [JANUARY], ("month", "all"), {"month": (2,), "all": (1, 2)}),
        (APRIL, MONTHS, NAMES, {"month": (4,), "last 3": (2, 3, 4), "recent": (1, 2, 3, 4), "all": (1, 2, 3, 4)}),
        # Two months of the calendar, and one of them without labels.
        (APRIL, [JANUARY, FEBRUARY], ("month", "last 2", "all"), {"month": (4,), "all": (1, 2, 4)}),
        (APRIL, [JANUARY, FEBRUARY], ("month", "last 3"), {"month": (4,), "last 3": (2, 4)}),
        # Later months are never learned from.
        (FEBRUARY, MONTHS, ("month", "all"), {"month": (2,), "all": (1, 2)}),
        # The order of names is that of simplicity, and stays.
        (FEBRUARY, [JANUARY], ("all", "month"), {"all": (1, 2), "month": (2,)}),
        (FEBRUARY, [JANUARY], ("all", "last 2", "last 3"), {"all": (1, 2)}),
        (MARCH, MONTHS, ("last 2",), {"last 2": (2, 3)}),
    ],
)
def test_the_windows_of_a_month(month, labelled, names, expected):
    found = candidates(month, labelled, of(names))
    assert {one.name: tuple(month.number for month in one.months) for one in found} == expected
    assert [one.name for one in found] == list(expected)
    assert all((one.half_life_months == 3.0) == (one.name == "recent" and len(one.months) > 1) for one in found)


@settings(deadline=None)
@given(
    st.sampled_from(MONTHS), st.permutations(MONTHS), st.integers(0, 4), st.permutations([*NAMES, "last 2", "last 12"])
)
def test_windows_are_distinct_end_with_the_month_and_reach_no_further_than_known(month, order, known, names):
    labelled = order[:known]
    found = candidates(month, labelled, of(names[:4]))
    assert len({(one.months, one.half_life_months) for one in found}) == len(found) > 0
    for one in found:
        assert set(one.months) <= {month, *labelled}
        assert all(earlier < later for earlier, later in pairwise(one.months))
        assert one.months[-1] == month
    assert candidates(month, sorted(labelled), of(names[:4])) == found
    reach = earlier_months(of(names[:4]))
    considered = {one for one in labelled if one < month and (reach is None or one >= month.shift(-reach))}
    assert {one for window in found for one in window.months} == considered | {month}


@pytest.mark.parametrize(
    ("names", "expected"), [(["month"], 0), (["month", "last 3"], 2), (["last 2", "all"], None), (["recent"], None)]
)
def test_how_far_windows_reach_back(names, expected):
    assert earlier_months(of(names)) == expected


# --- their rows -----------------------------------------------------------------------------------------------------


def test_the_month_alone_is_as_it_is(rows):
    assert pool(Window("month", (MARCH,)), rows) is rows[MARCH]


def test_rows_are_pooled_and_recent_ones_weigh_more(rows):
    months = (JANUARY, MARCH)
    alike, recent = pool(Window("all", months), rows), pool(Window("recent", months, 2.0), rows)
    assert weights(alike) is None
    assert len(alike) == len(recent) == len(rows[JANUARY]) + len(rows[MARCH])
    found = recent.groupby("month")["sample_weight"].agg(["min", "max"])
    assert (found["min"] == found["max"]).all()
    assert found["min"]["2024-03"] / found["min"]["2024-01"] == pytest.approx(2.0)
    assert weights(recent).mean() == pytest.approx(1.0)
    assert of_newest_month(alike).sum() == len(rows[MARCH])
    again = alike[of_newest_month(alike)].drop(columns="month").reset_index(drop=True)
    pd.testing.assert_frame_equal(again, rows[MARCH])


def test_rows_have_one_order(rows):
    pooled = pool(Window("recent", (JANUARY, FEBRUARY), 3.0), rows)
    ordered = in_order(pooled)
    pd.testing.assert_frame_equal(in_order(pooled.sample(frac=1, random_state=2)), ordered)
    assert list(zip(ordered["user_id"], ordered["month"], strict=True))[:2] == [
        (ordered["user_id"][0], "2024-01"),
        (ordered["user_id"][0], "2024-02"),
    ]


# --- the choice -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def choice(rows, config):
    return choose(candidates(MARCH, MONTHS, config.windows), rows, LABEL, V2, config, n_jobs=2)


def test_the_simplest_within_one_standard_error_of_the_best_is_chosen(choice):
    assert [score.name for score in choice.scores] == ["month", "last 3", "recent"]
    best = min(choice.scores, key=lambda score: score.logloss)
    for score in choice.scores:
        assert score.difference == pytest.approx(score.logloss - best.logloss)
        assert score.within_one_standard_error == (score.difference <= score.standard_error)
    first = next(score for score in choice.scores if score.within_one_standard_error)
    assert [score for score in choice.scores if score.chosen] == [first]
    assert choice.window.name == first.name
    assert f"“{first.name}”" in choice.reason


def test_a_simpler_window_is_chosen_before_the_best_where_it_may_stand_for_it(rows, config):
    simplest_first = [Window("recent", MONTHS[:3], 6.0), Window("all", MONTHS[:3])]
    found = choose(simplest_first, rows, LABEL, V2, config)
    assert [score.within_one_standard_error for score in found.scores] == [True, True]
    assert found.scores[0].logloss > found.scores[1].logloss
    assert found.window == simplest_first[0]
    assert "“recent” (2024-01 to 2024-03) is the simplest within one standard error of it" in found.reason


def test_in_a_stable_world_more_months_predict_better(choice):
    month, *more = choice.scores
    assert all(score.logloss < month.logloss for score in more)


def test_each_window_is_measured_on_the_newest_months_users_by_models_that_never_saw_them(choice, rows, config):
    newest = rows[MARCH]
    labels = newest[LABEL].to_numpy()
    inside = {month: folds(one["user_id"].tolist(), config.folds, config.seed) for month, one in rows.items()}
    for score, months in ((choice.scores[0], [MARCH]), (choice.scores[1], [JANUARY, FEBRUARY, MARCH])):
        expected = np.empty(len(newest))
        for fold in range(config.folds):
            learned = pd.concat([rows[month][inside[month] != fold].assign(month=str(month)) for month in months])
            learned = learned.sort_values(["user_id", "month"])
            model = make_pipeline("gradient_boosting", V2, bare_classifier("gradient_boosting", config))
            model.fit(learned[V2.names], learned[LABEL].to_numpy())
            predicted = inside[MARCH] == fold
            expected[predicted] = model.predict_proba(newest.loc[predicted, V2.names])[:, 1]
        assert score.logloss == pytest.approx(log_loss(labels, expected), abs=1e-12)
        assert score.auc == pytest.approx(roc_auc_score(labels, expected), abs=1e-12)
        assert score.rows == sum(len(rows[month]) for month in months)


@settings(deadline=None, max_examples=6)
@given(held_out=st.integers(0, 3), turned_months=st.sets(st.sampled_from(MONTHS[:3]), min_size=1))
def test_what_a_folds_users_did_in_any_month_has_no_part_in_their_predictions(rows, config, held_out, turned_months):
    def predicted(of_months):
        pooled = in_order(pool(Window("recent", MONTHS[:3], 3.0), of_months))
        (found,) = selection.out_of_fold(pooled, LABEL, [("logistic_regression", V2)], config)
        return found.probabilities, folds(pooled["user_id"].tolist(), config.folds, config.seed) == held_out

    def turned_inside(one):
        inside = folds(one["user_id"].tolist(), config.folds, config.seed) == held_out
        return one.assign(**{LABEL: one[LABEL].to_numpy() ^ inside})

    before, inside = predicted(rows)
    after, _ = predicted({month: turned_inside(one) if month in turned_months else one for month, one in rows.items()})
    assert (after[inside] == before[inside]).all()
    assert (after[~inside] != before[~inside]).any()


def test_neither_order_nor_cores_change_the_choice(choice, rows, config):
    shuffled = {month: rows[month].sample(frac=1, random_state=month.number) for month in reversed(rows)}
    again = choose(candidates(MARCH, MONTHS[::-1], config.windows), shuffled, LABEL, V2, config, n_jobs=1)
    assert without_seconds(again) == without_seconds(choice)
    assert again.reason == choice.reason


def test_one_window_needs_no_comparison(rows, config, monkeypatch):
    monkeypatch.setattr(selection, "out_of_fold", None)
    found = choose([Window("month", (JANUARY,))], rows, LABEL, V2, config)
    assert (found.window.months, found.scores) == ((JANUARY,), ())
    assert found.reason == "2024-01 is learned from alone: there was no other month to choose."
    both = choose([Window("all", (JANUARY, FEBRUARY))], rows, LABEL, V2, config)
    assert both.reason == "“all” (2024-01 to 2024-02) was the only window to choose."


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("estimator", CLASSIFIERS)
def test_weights_reach_the_classifier_and_its_sigmoid(rows, config, monkeypatch, estimator, calibrated):
    taken = {CLASSIFIERS[estimator]: [], _SigmoidCalibration: []}
    for part, seen in taken.items():

        def recorded(self, features, labels, sample_weight=None, *, learn=part.fit, seen=seen):
            seen.append(sample_weight)
            return learn(self, features, labels, sample_weight)

        monkeypatch.setattr(part, "fit", functools.wraps(part.fit)(recorded))
    window = Window("recent", MONTHS[:3], 1.0)
    pooled = pool(window, rows)
    spec = ModelSpec(estimator, V2, calibrated, 0.5)
    recent = fit(pooled, LABEL, spec, config)
    wanted = weights(in_order(pooled))
    fold = folds(in_order(pooled)["user_id"].tolist(), config.folds, config.seed)
    expected = [wanted[fold != one] for one in range(config.folds)] if calibrated else []
    for found, one in zip(taken[CLASSIFIERS[estimator]], [*expected, wanted], strict=True):
        assert found == pytest.approx(one)
    assert [list(one) for one in taken[_SigmoidCalibration]] == ([list(wanted)] if calibrated else [])

    alike = fit(pool(replace(window, half_life_months=None), rows), LABEL, spec, config)
    assert (recent.probabilities(rows[MARCH]) != alike.probabilities(rows[MARCH])).any()
    again = fit(pooled.sample(frac=1, random_state=1), LABEL, spec, config, n_jobs=2)
    assert (again.probabilities(rows[MARCH]) == recent.probabilities(rows[MARCH])).all()
    assert recent.train_rows == len(pooled)


def test_the_sigmoid_of_the_choice_is_weighted_as_well():
    rng = np.random.default_rng(3)
    scores, labels, fold = rng.normal(size=300), rng.random(300) < 0.4, rng.integers(0, 3, 300)
    twice = rng.random(300) < 0.5
    weighted = selection.cross_calibrate(scores, labels, fold, np.where(twice, 2.0, 1.0))
    repeated = np.concatenate([np.arange(300), np.flatnonzero(twice)])
    expected = selection.cross_calibrate(scores[repeated], labels[repeated], fold[repeated])[:300]
    assert weighted == pytest.approx(expected, abs=1e-9)


# --- the whole procedure --------------------------------------------------------------------------------------------


def test_where_the_world_has_turned_the_model_is_that_of_the_month_alone(world, config):
    how = Procedure.of(config, policy())
    alone = procedure.run(world[MARCH], how)
    found = procedure.run(world[MARCH], how, earlier=[turned(world[JANUARY]), turned(world[FEBRUARY])])
    assert [score.name for score in found.window.scores] == ["month", "last 3", "recent"]
    assert found.window.window == alone.window.window == Window("month", (MARCH,))
    assert found.artifact_sha256 == alone.artifact_sha256
    assert found.predictions_digest == alone.predictions_digest
    assert found.model.threshold == alone.model.threshold


@pytest.mark.parametrize("name", ["all", "recent"])
def test_a_model_of_several_months_is_measured_on_the_newest_and_sees_no_held_out_user(world, config, name):
    how = Procedure.of(windowed(config, names=(name,)), policy(), service="churn_v2")
    found = procedure.run(world[MARCH], how, earlier=[world[JANUARY], world[FEBRUARY]])
    assert found.window.window.months == MONTHS[:3]
    assert found.model.train_rows == 3 * len(world[MARCH].training_rows)
    assert len(found.selection.probabilities) == len(world[MARCH].training_rows)
    assert len(found.probabilities) == len(world[MARCH].frame)
    assert found.parity.holds

    def held_out_turned(data):
        return replace(data, frame=data.frame.assign(**{LABEL: data.labels ^ data.holdout}))

    again = procedure.run(
        held_out_turned(world[MARCH]),
        how,
        earlier=[held_out_turned(world[FEBRUARY]), held_out_turned(world[JANUARY])],
    )
    assert again.artifact_sha256 == found.artifact_sha256
    alone = procedure.run(world[MARCH], how)
    assert alone.artifact_sha256 != found.artifact_sha256


def test_an_earlier_months_user_of_the_hold_out_is_refused(world, config):
    january = replace(world[JANUARY])
    january.__dict__["holdout"] = ~world[JANUARY].holdout
    with pytest.raises(TrainingRefused, match="users to learn from in 2024-01 are in the hold-out of 2024-03"):
        procedure.run(world[MARCH], Procedure.of(config, policy()), earlier=[january])


def test_later_months_and_those_out_of_reach_are_not_learned_from(world, config):
    near = Procedure.of(windowed(config, names=("month", "last 2")), policy())
    found = procedure.run(world[FEBRUARY], near, earlier=[world[JANUARY], world[MARCH]])
    assert [score.months for score in found.window.scores] == [("2024-02",), ("2024-01", "2024-02")]
    assert [one.month for one in found.earlier] == [JANUARY]


def test_by_name_the_month_alone_is_learned_from(world, config):
    how = Procedure.of(config, policy(), estimator="gradient_boosting")
    found = procedure.run(world[MARCH], how, earlier=[world[JANUARY]])
    assert (how.earlier_months, found.window.scores, found.earlier) == (0, (), ())
    assert found.model.train_rows == len(world[MARCH].training_rows)


def test_the_real_february_is_learned_from_alone(real_data):
    config = TrainingConfig.load(PROJECT_ROOT / "training.toml")
    quick = msgspec.structs.replace(config, candidates=("gradient_boosting",))
    how = Procedure.of(quick, policy())
    january, february = (real_dataset(real_data, month) for month in (JANUARY, FEBRUARY))
    found = procedure.run(february, how, earlier=[january])
    everything, recent, month = found.window.scores
    assert found.window.window == Window("month", (FEBRUARY,))
    assert (month.auc, everything.auc, recent.auc) == (
        pytest.approx(0.659, abs=0.003),
        pytest.approx(0.564, abs=0.003),
        pytest.approx(0.581, abs=0.003),
    )
    assert min(everything.difference / everything.standard_error, recent.difference / recent.standard_error) > 8
    alone = procedure.run(february, how)
    assert alone.window.scores == ()
    assert found.artifact_sha256 == alone.artifact_sha256
    assert found.predictions_digest == alone.predictions_digest


def test_the_table_has_a_row_for_each_window(choice):
    table = windows.as_table(choice)
    assert list(table) == list(windows.WindowScore.__dataclass_fields__)
    assert table["months"].tolist() == ["2024-03", *["2024-01 2024-02 2024-03"] * 2]
    assert table["chosen"].sum() == 1
    assert windows.as_table(windows.Choice(choice.window, "alone")).empty
