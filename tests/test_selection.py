from dataclasses import replace
from itertools import product

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import log_loss, roc_auc_score
from test_dataset import handmade_dataset, real_dataset

from streamflow import selection
from streamflow.contract import CONTRACT
from streamflow.dataset import folds
from streamflow.errors import ConfigurationError, TrainingRefused
from streamflow.selection import CandidateScore, as_table, cross_calibrate, differences_from_best, losses, select
from streamflow.settings import PROJECT_ROOT
from streamflow.training import ESTIMATORS, bare_classifier, make_pipeline
from streamflow.training_config import TrainingConfig

LABEL = "churn_label"
SERVICES = V1, V2 = [CONTRACT.service(name) for name in ("churn_v1", "churn_v2")]


@pytest.fixture(scope="module")
def rows():
    return handmade_dataset().training_rows


@pytest.fixture(scope="module")
def labels(rows):
    return rows[LABEL].to_numpy()


@pytest.fixture(scope="module")
def config(quick_training_file):
    return TrainingConfig.load(quick_training_file)


@pytest.fixture(scope="module")
def selected(rows, config):
    return select(rows, LABEL, SERVICES, config, n_jobs=2)


def only(config, *estimators):
    return msgspec.structs.replace(config, candidates=estimators)


def without_seconds(selection):
    return [replace(candidate, seconds=0.0) for candidate in selection.candidates]


# The parts


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1)), min_size=1, max_size=20))
@example([(True, 0.0), (False, 1.0), (True, 1.0), (False, 0.0)])
def test_losses_are_those_of_scikit_learn(cases):
    labels, probabilities = np.array([case[0] for case in cases]), np.array([case[1] for case in cases])
    each = losses(labels, probabilities)
    assert each.mean() == pytest.approx(log_loss(labels, probabilities, labels=[False, True]))
    assert (each >= 0).all()


def scored(users=400, seed=0):
    """Labels of users whose true log odds are 3 * score - 1, and their folds."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(0, 1, users)
    return scores, rng.random(users) < 1 / (1 + np.exp(1 - 3 * scores)), rng.integers(0, 4, users)


def test_a_sigmoid_is_found_again():
    scores, labels, fold = scored(20_000)
    assert cross_calibrate(scores, labels, fold) == pytest.approx(1 / (1 + np.exp(1 - 3 * scores)), abs=0.03)


@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 50), held_out=st.integers(0, 3))
def test_a_users_label_has_no_part_in_the_users_sigmoid(seed, held_out):
    scores, labels, fold = scored(seed=seed)
    inside = fold == held_out
    calibrated = cross_calibrate(scores, labels, fold)
    assert (cross_calibrate(scores, labels ^ inside, fold)[inside] == calibrated[inside]).all()
    assert (cross_calibrate(scores, labels ^ ~inside, fold)[inside] != calibrated[inside]).any()


@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 50))
def test_each_fold_has_one_increasing_sigmoid(seed):
    scores, labels, fold = scored(seed=seed)
    probabilities = cross_calibrate(scores, labels, fold)
    for held_out in range(4):
        inside = fold == held_out
        log_odds = np.log(probabilities[inside] / (1 - probabilities[inside]))
        slope, intercept = np.polyfit(scores[inside], log_odds, 1)
        assert log_odds == pytest.approx(slope * scores[inside] + intercept, abs=1e-6)
        assert slope > 0


FLAT = [0.4] * 4


@pytest.mark.parametrize(
    ("candidates", "means", "within"),
    [
        ([FLAT], [0], [True]),
        ([FLAT, FLAT], [0, 0], [True, True]),
        # The same difference for everybody is certain, however small.
        ([[0.41] * 4, FLAT], [0.01, 0], [False, True]),
        # A mean difference of 0.1 with a standard error of exactly 0.1 and with one of 0.0986.
        ([[0.4, 0.4, 0.4, 0.8], FLAT], [0.1, 0], [True, True]),
        ([[0.4, 0.4, 0.405, 0.795], FLAT], [0.1, 0], [False, True]),
        # Measured against the best, not against the neighbour.
        ([[0.5, 0.5, 0.5, 0.7], [0.4, 0.4, 0.4, 0.6], FLAT], [0.15, 0.05, 0], [False, True, True]),
    ],
)
def test_a_candidate_within_one_standard_error_may_stand_for_the_best(candidates, means, within):
    found = differences_from_best([np.array(one) for one in candidates])
    assert [one.mean for one in found] == pytest.approx(means, abs=1e-12)
    assert [one.within_one_standard_error for one in found] == within


@settings(deadline=None)
@given(arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(2, 9)), elements=st.floats(0, 3)))
def test_the_best_is_always_within_and_none_is_better(candidates):
    found = differences_from_best(list(candidates))
    assert min(one.mean for one in found) >= -1e-12
    best = candidates.mean(axis=1).argmin()
    assert found[best].mean == found[best].standard_error == 0
    for one, difference in zip(candidates, found, strict=True):
        paired = one - candidates[best]
        assert difference.standard_error == pytest.approx(np.std(paired, ddof=1) / np.sqrt(len(paired)))


# The choice


def test_candidates_are_all_estimators_on_all_services_in_the_order_of_simplicity(selected):
    found = [(candidate.estimator, candidate.service) for candidate in selected.candidates]
    assert found == list(product(ESTIMATORS, ["churn_v1", "churn_v2"]))


def test_the_chosen_is_the_simplest_that_may_stand_for_the_best(selected):
    first = next(candidate for candidate in selected.candidates if candidate.within_one_standard_error)
    assert [candidate for candidate in selected.candidates if candidate.chosen] == [first]
    assert (selected.estimator, selected.service.name, selected.calibrated) == (
        first.estimator,
        first.service,
        first.calibrated,
    )
    best = min(selected.candidates, key=lambda candidate: candidate.logloss)
    for candidate in selected.candidates:
        assert candidate.difference == pytest.approx(candidate.logloss - best.logloss)
        assert candidate.within_one_standard_error == (candidate.difference <= candidate.standard_error)


def test_estimators_and_services_are_as_simple_as_their_order_says(rows, config):
    config = only(config, "random_forest_leaf_limited", "logistic_regression")
    found = select(rows, LABEL, [V2, V1], config).candidates
    assert [(candidate.estimator, candidate.service) for candidate in found] == [
        ("random_forest_leaf_limited", "churn_v2"),
        ("random_forest_leaf_limited", "churn_v1"),
        ("logistic_regression", "churn_v2"),
        ("logistic_regression", "churn_v1"),
    ]


def test_a_simpler_candidate_is_chosen_before_the_best_where_it_may_stand_for_it(config):
    rows, config = handmade_dataset(seed=6).training_rows, only(config, "logistic_regression")
    for services in ([V1, V2], [V2, V1]):
        found = select(rows, LABEL, services, config)
        assert [candidate.within_one_standard_error for candidate in found.candidates] == [True, True]
        assert [candidate.chosen for candidate in found.candidates] == [True, False]
        assert found.service == services[0]


def test_the_probabilities_are_the_chosens_in_the_order_of_users(selected, rows, labels):
    assert selected.probabilities.shape == (len(rows),)
    (chosen,) = (candidate for candidate in selected.candidates if candidate.chosen)
    assert rows["user_id"].is_monotonic_increasing
    assert log_loss(labels, selected.probabilities) == pytest.approx(chosen.logloss)
    assert roc_auc_score(labels, selected.probabilities) == pytest.approx(chosen.auc)


@pytest.mark.parametrize("estimator", ["logistic_regression", "gradient_boosting", "random_forest_leaf_limited"])
def test_each_users_probability_is_of_a_model_of_the_other_folds(rows, labels, config, estimator):
    found = select(rows, LABEL, [V2], only(config, estimator))
    fold = folds(rows["user_id"].tolist(), config.folds, config.seed)
    expected = np.empty(len(rows))
    for held_out in range(config.folds):
        inside = fold == held_out
        pipeline = make_pipeline(estimator, V2, bare_classifier(estimator, config))
        pipeline.fit(rows.loc[~inside, V2.names], labels[~inside])
        expected[inside] = pipeline.predict_proba(rows.loc[inside, V2.names])[:, 1]
    assert found.candidates[0].logloss_uncalibrated == pytest.approx(log_loss(labels, expected), abs=1e-12)
    if not found.calibrated:
        assert found.probabilities == pytest.approx(expected, abs=1e-12)


def test_a_balanced_forest_is_calibrated_and_a_logistic_regression_is_not(rows, labels, config):
    balanced = {**config.estimators["random_forest_baseline"], "min_samples_leaf": 10}
    config = msgspec.structs.replace(config, estimators={**config.estimators, "random_forest_baseline": balanced})
    both = only(config, "logistic_regression", "random_forest_baseline")
    linear, forest = select(rows, LABEL, [V1], both).candidates
    assert not linear.calibrated
    assert linear.logloss == linear.logloss_uncalibrated
    assert forest.calibrated
    assert forest.logloss < forest.logloss_uncalibrated - 0.01
    found = select(rows, LABEL, [V1], only(config, "random_forest_baseline"))
    assert found.calibrated
    assert found.probabilities.mean() == pytest.approx(labels.mean(), abs=0.01)


@pytest.mark.parametrize("estimator", ["logistic_regression", "gradient_boosting", "random_forest_leaf_limited"])
def test_a_sigmoid_takes_what_that_of_the_fitted_model_takes(monkeypatch, rows, config, estimator):
    taken = []

    def recorded(scores, *others):
        taken.append(scores)
        return cross_calibrate(scores, *others)

    monkeypatch.setattr(selection, "cross_calibrate", recorded)
    found = select(rows, LABEL, [V2], only(config, estimator))
    if estimator == "random_forest_leaf_limited":
        expected = taken[0]
    else:
        expected = 1 / (1 + np.exp(-taken[0]))
        assert taken[0].min() < 0
    assert found.candidates[0].logloss_uncalibrated == pytest.approx(losses(rows[LABEL].to_numpy(), expected).mean())


def test_calibration_that_helps_by_less_than_its_standard_error_is_left_out(monkeypatch, rows, labels, config):
    config = only(config, "logistic_regression")
    plain = select(rows, LABEL, [V1], config)

    def calibrated_to(mean, spread):
        """Losses that are lower than the plain ones by ``mean``, give or take ``spread``."""
        reduction = mean + spread * np.where(np.arange(len(labels)) % 2, 1, -1)
        return lambda *_: (
            np.where(labels, 1, 0)
            + np.where(labels, -1, 1) * (1 - np.exp(-losses(labels, plain.probabilities) + reduction))
        )

    assert not plain.calibrated
    error = 0.01 / np.sqrt(len(labels) - 1)
    for times, expected in ((1.2, True), (0.8, False)):
        monkeypatch.setattr(selection, "cross_calibrate", calibrated_to(times * error, 0.01))
        assert select(rows, LABEL, [V1], config).calibrated == expected


def test_neither_order_nor_cores_nor_repetition_change_the_choice(selected, rows, config):
    other = select(rows.sample(frac=1, random_state=1), LABEL, SERVICES, config, n_jobs=1)
    assert without_seconds(other) == without_seconds(selected)
    assert (other.probabilities == selected.probabilities).all()
    assert other.reason == selected.reason


def test_the_fits_have_one_thread_of_blas_and_openmp_each(monkeypatch, rows, config):
    from threadpoolctl import threadpool_info

    learn, seen = selection.learn, []

    def recorded(*arguments):
        seen.append({pool["num_threads"] for pool in threadpool_info()})
        learn(*arguments)

    monkeypatch.setattr(selection, "learn", recorded)
    select(rows, LABEL, [V1], only(config, "gradient_boosting"), n_jobs=2)
    assert seen == [{1}] * config.folds


def test_the_table_has_a_row_for_each_candidate(selected):
    table = as_table(selected)
    assert list(table) == list(CandidateScore.__dataclass_fields__)
    assert table["estimator"].tolist() == [candidate.estimator for candidate in selected.candidates]
    assert table["chosen"].sum() == 1
    assert (table["seconds"] > 0).all()


def test_real_january_is_boosted_on_the_further_columns(real_data):
    data = real_dataset(real_data)
    config = only(TrainingConfig.load(PROJECT_ROOT / "training.toml"), "logistic_regression", "gradient_boosting")
    found = select(data.training_rows, data.label, SERVICES, config, n_jobs=2)
    assert (found.estimator, found.service.name) == ("gradient_boosting", "churn_v2")
    (chosen,) = (candidate for candidate in found.candidates if candidate.chosen)
    assert chosen.auc == pytest.approx(0.8445, abs=0.002)
    assert chosen.logloss == pytest.approx(0.4183, abs=0.002)
    assert found.reason.startswith("gradient_boosting on churn_v2 has the lowest logloss of 4, 0.418")


# The reason


def candidate(estimator, logloss, difference, standard_error, chosen):
    return CandidateScore(
        estimator,
        "v",
        False,
        logloss,
        logloss,
        0.8,
        difference,
        standard_error,
        difference <= standard_error,
        chosen,
        1.0,
    )


@pytest.mark.parametrize(
    ("candidates", "reason"),
    [
        (
            [candidate("linear", 0.41, 0, 0, True), candidate("trees", 0.43, 0.02, 0.01, False)],
            "linear on v has the lowest logloss of 2, 0.4100, and is the simplest.",
        ),
        (
            [candidate("linear", 0.42, 0.01, 0.02, True), candidate("trees", 0.41, 0, 0, False)],
            "trees on v has the lowest logloss of 2, 0.4100. linear on v is the simplest within one standard error of "
            "it: 0.4200, which is 0.0100 ± 0.0200 more.",
        ),
        (
            [
                candidate("constant", 0.6, 0.19, 0.02, False),
                candidate("linear", 0.45, 0.04, 0.01, False),
                candidate("trees", 0.41, 0, 0, True),
                candidate("more trees", 0.42, 0.01, 0.02, False),
            ],
            "trees on v has the lowest logloss of 4, 0.4100, and nothing simpler is within one standard error of it: "
            "the nearest, linear on v, is 0.0400 ± 0.0100 above.",
        ),
    ],
)
def test_the_reason_names_the_best_the_chosen_and_the_numbers(candidates, reason):
    chosen = next(index for index, one in enumerate(candidates) if one.chosen)
    names = [f"{one.estimator} on {one.service}" for one in candidates]
    assert selection.reason_for(chosen, names, candidates) == reason


# Refusals


def test_hyper_parameters_are_checked_before_anything_is_fitted(monkeypatch, rows, config):
    wrong = {**config.estimators, "random_forest_baseline": {"trees": 3}}
    monkeypatch.setattr(selection, "learn", None)
    with pytest.raises(ConfigurationError, match=r"random_forest_baseline\.trees"):
        select(rows, LABEL, SERVICES, msgspec.structs.replace(config, estimators=wrong))


def test_hyper_parameters_that_do_not_go_together_are_refused(rows, config):
    wrong = {**config.estimators, "random_forest_baseline": {"bootstrap": False, "max_samples": 0.5}}
    with pytest.raises(ConfigurationError, match=r"\[estimators.random_forest_baseline\] of training.toml"):
        select(rows, LABEL, SERVICES, msgspec.structs.replace(config, estimators=wrong))


def test_too_few_churned_users_are_refused(rows, config):
    few = rows.drop(rows.index[rows[LABEL]][5:])
    with pytest.raises(TrainingRefused, match="only 5 of the"):
        select(few, LABEL, SERVICES, config)
