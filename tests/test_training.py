import hashlib
import os
import pickle
import subprocess
import sys
from functools import cache, wraps

import joblib
import msgspec
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from test_dataset import contract_with_contract_type, handmade_dataset, real_dataset

from streamflow.contract import CONTRACT
from streamflow.dataset import folds
from streamflow.errors import ConfigurationError, TrainingRefused
from streamflow.settings import PROJECT_ROOT
from streamflow.training import (
    ESTIMATORS,
    ModelSpec,
    bare_classifier,
    encoded_columns,
    feature_schema,
    fit,
    make_pipeline,
    require_trainable,
)
from streamflow.training_config import TrainingConfig

LABEL = "churn_label"
BASELINE = "random_forest_baseline"
V1, V2, PROTECTED = (CONTRACT.service(name) for name in ("churn_v1", "churn_v2", "churn_v2_protected"))
AS_PUBLISHED = ModelSpec(BASELINE, V1, calibrated=False, threshold=0.5)
FORESTS = [name for name, estimator in ESTIMATORS.items() if estimator.parallel]
EACH_ESTIMATOR = pytest.mark.parametrize("estimator", ESTIMATORS)
CALIBRATED_OR_NOT = pytest.mark.parametrize("calibrated", [False, True], ids=["plain", "calibrated"])


@pytest.fixture(scope="module")
def rows():
    return handmade_dataset().training_rows


@pytest.fixture(scope="module")
def config(quick_training_file):
    return TrainingConfig.load(quick_training_file)


@pytest.fixture(scope="module")
def fitted(rows, config):
    """A model of the handmade rows, fitted once for all tests."""

    @cache
    def model(estimator, calibrated=False, service=V2):
        return fit(rows, LABEL, ModelSpec(estimator, service, calibrated, 0.5), config)

    return model


def changed(config, estimator, **params):
    estimators = {**config.estimators, estimator: {**config.estimators[estimator], **params}}
    return msgspec.structs.replace(config, estimators=estimators)


def bare(model):
    """The fitted classifier inside threshold and calibration."""
    inside = model.pipeline["classifier"].estimator_
    return inside.calibrated_classifiers_[0].estimator if model.calibrated else inside


# What is fitted


def test_the_baseline_is_the_forest_of_the_published_figures(rows):
    config = TrainingConfig.load(PROJECT_ROOT / "training.toml")
    model = fit(rows, LABEL, AS_PUBLISHED, config)
    assert type(bare(model)).__name__ == "RandomForestClassifier"
    assert len(bare(model).estimators_) == 300
    stated = {"n_estimators": 300, "class_weight": "balanced", "random_state": 42}
    assert {name: bare(model).get_params()[name] for name in stated} == stated
    assert model.params == stated
    assert (model.service, model.estimator, model.calibrated, model.threshold) == (V1, BASELINE, False, 0.5)
    assert model.train_rows == len(rows)


def test_the_baseline_has_the_published_auc_on_real_january(real_data):
    data = real_dataset(real_data)
    model = fit(
        data.training_rows, data.label, AS_PUBLISHED, TrainingConfig.load(PROJECT_ROOT / "training.toml"), n_jobs=2
    )
    unseen = data.holdout_rows
    assert roc_auc_score(unseen[data.label], model.probabilities(unseen)) == pytest.approx(0.8117, abs=1e-4)


def test_hyper_parameters_come_from_the_configuration(rows, config):
    config = changed(config, "random_forest_leaf_limited", n_estimators=3, max_samples=0.5)
    model = fit(rows, LABEL, ModelSpec("random_forest_leaf_limited", V1, False, 0.5), config)
    assert len(bare(model).estimators_) == 3
    assert bare(model).max_samples == 0.5
    assert model.params == {"n_estimators": 3, "max_samples": 0.5, "min_samples_leaf": 20, "random_state": 42}


def test_another_seed_grows_another_forest(fitted, rows, config):
    other = fit(rows, LABEL, ModelSpec(BASELINE, V2, False, 0.5), msgspec.structs.replace(config, seed=43))
    assert (other.probabilities(rows) != fitted(BASELINE).probabilities(rows)).any()


def test_boosting_learns_from_all_rows(fitted, config):
    boosting = bare(fitted("gradient_boosting"))
    assert boosting.n_iter_ == config.estimators["gradient_boosting"]["max_iter"]
    assert not boosting.do_early_stopping_


def test_a_linear_model_takes_numbers_in_standard_deviations_and_trees_take_them_as_they_are(fitted, rows):
    names = [category is None for _, category in encoded_columns(V2)]
    scaled = fitted("logistic_regression").pipeline["preprocessing"].transform(rows[V2.names])[:, names]
    assert scaled.mean(axis=0) == pytest.approx(0, abs=1e-12)
    assert scaled.std(axis=0) == pytest.approx(1)
    kept = fitted("gradient_boosting").pipeline["preprocessing"].transform(rows[V2.names])
    assert kept.dtype == np.float64
    first = next(index for index, (name, _) in enumerate(encoded_columns(V2)) if name == "monthly_fee")
    assert (kept[:, first] == rows["monthly_fee"]).all()


@EACH_ESTIMATOR
def test_calibration_is_a_sigmoid_over_the_classifier_of_all_rows(fitted, rows, estimator):
    plain, calibrated = fitted(estimator), fitted(estimator, calibrated=True)
    inside = calibrated.pipeline["classifier"].estimator_.calibrated_classifiers_
    assert len(inside) == 1
    encoded = plain.pipeline["preprocessing"].transform(rows[V2.names])
    assert (bare(calibrated).predict_proba(encoded) == bare(plain).predict_proba(encoded)).all()
    of_plain, of_calibrated = plain.probabilities(rows), calibrated.probabilities(rows)
    assert (of_plain != of_calibrated).any()
    assert (np.diff(of_calibrated[np.argsort(of_plain)]) >= -1e-12).all()


def test_the_sigmoid_is_fitted_in_the_folds_of_the_dataset(fitted, rows, config):
    cv = fitted(BASELINE, calibrated=True).pipeline["classifier"].estimator_.cv
    assert cv.test_fold.tolist() == folds(sorted(rows["user_id"]), config.folds, config.seed).tolist()
    other = msgspec.structs.replace(config, folds=config.folds + 1)
    cv = fit(rows, LABEL, ModelSpec(BASELINE, V1, True, 0.5), other).pipeline["classifier"].estimator_.cv
    assert set(cv.test_fold) == set(range(config.folds + 1))


@CALIBRATED_OR_NOT
def test_the_pipeline_decides_by_the_threshold_and_on_it_says_churn(rows, config, fitted, calibrated):
    threshold = float(np.sort(fitted("logistic_regression", calibrated).probabilities(rows))[200])
    spec = ModelSpec("logistic_regression", V2, calibrated, threshold)
    model = fit(rows, LABEL, spec, config)
    probabilities = model.probabilities(rows)
    assert (probabilities == threshold).any()
    assert (model.pipeline.predict(rows[V2.names]) == (probabilities >= threshold)).all()
    assert model.threshold == threshold


# Determinism


@EACH_ESTIMATOR
@CALIBRATED_OR_NOT
def test_neither_order_nor_cores_nor_repetition_change_a_bit(fitted, rows, config, estimator, calibrated):
    spec = ModelSpec(estimator, V2, calibrated, 0.5)
    here = fitted(estimator, calibrated).probabilities(rows)
    for seed, cores in ((1, 1), (2, 2)):
        shuffled = rows.sample(frac=1, random_state=seed)
        assert (fit(shuffled, LABEL, spec, config, n_jobs=cores).probabilities(rows) == here).all()


def test_the_threads_of_blas_and_openmp_change_nothing(fitted, rows, quick_training_file, tmp_path):
    rows.to_parquet(tmp_path / "rows.parquet")
    program = (
        "import hashlib, sys, pandas as pd\n"
        "from pathlib import Path\n"
        "from streamflow.contract import CONTRACT\n"
        "from streamflow.training import ESTIMATORS, ModelSpec, fit\n"
        "from streamflow.training_config import TrainingConfig\n"
        "rows, config = pd.read_parquet(sys.argv[1]), TrainingConfig.load(Path(sys.argv[2]))\n"
        "for estimator in ESTIMATORS:\n"
        "    for calibrated in (False, True):\n"
        "        spec = ModelSpec(estimator, CONTRACT.service('churn_v2'), calibrated, 0.5)\n"
        "        model = fit(rows, 'churn_label', spec, config, n_jobs=2)\n"
        "        print(hashlib.sha256(model.probabilities(rows).tobytes()).hexdigest())\n"
    )
    here = [
        hashlib.sha256(fitted(estimator, calibrated).probabilities(rows).tobytes()).hexdigest()
        for estimator in ESTIMATORS
        for calibrated in (False, True)
    ]
    there = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "rows.parquet", quick_training_file],
        env={**os.environ, "OMP_NUM_THREADS": "3", "OPENBLAS_NUM_THREADS": "3", "PYTHONHASHSEED": "7"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=120,
    )
    assert there.stdout.split() == here


@pytest.mark.parametrize("estimator", FORESTS)
@CALIBRATED_OR_NOT
def test_cores_grow_trees_but_never_add_them_up(rows, config, monkeypatch, estimator, calibrated):
    from sklearn.ensemble import RandomForestClassifier

    used = {"fit": [], "predict_proba": []}
    for name, seen in used.items():
        method = getattr(RandomForestClassifier, name)

        @wraps(method)
        def recorded(self, *arguments, method=method, seen=seen, **named):
            seen.append(joblib.effective_n_jobs(self.n_jobs))
            return method(self, *arguments, **named)

        monkeypatch.setattr(RandomForestClassifier, name, recorded)
    model = fit(rows, LABEL, ModelSpec(estimator, V1, calibrated, 0.5), config, n_jobs=2)
    model.probabilities(rows)
    assert used["fit"] == [*([1] * (config.folds * calibrated)), 2]
    assert used["predict_proba"] == [1] * (config.folds * calibrated + 1)


@EACH_ESTIMATOR
def test_blas_and_openmp_have_one_thread_in_fit_and_predict_and_theirs_again_after(
    rows, config, monkeypatch, estimator
):
    from threadpoolctl import threadpool_info

    def threads():
        return {pool["num_threads"] for pool in threadpool_info()}

    before, seen = threads(), []
    classifier = type(bare_classifier(estimator, config))
    for name in ("fit", "predict_proba"):
        method = getattr(classifier, name)

        @wraps(method)
        def recorded(self, *arguments, method=method, **named):
            seen.append(threads())
            return method(self, *arguments, **named)

        monkeypatch.setattr(classifier, name, recorded)
    fit(rows, LABEL, ModelSpec(estimator, V1, False, 0.5), config, n_jobs=2).probabilities(rows)
    assert seen == [{1}, {1}]
    assert threads() == before


@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name != "logistic_regression"])
def test_a_probability_by_trees_does_not_depend_on_the_batch(fitted, rows, estimator):
    model = fitted(estimator, calibrated=True)
    together = model.probabilities(rows)
    assert (model.probabilities(rows[10:13]) == together[10:13]).all()
    assert (model.probabilities(rows[::-1])[::-1] == together).all()


def test_a_linear_probability_depends_on_the_batch_in_the_last_bits_at_most(fitted, rows):
    model = fitted("logistic_regression")
    assert model.probabilities(rows[10:13]) == pytest.approx(model.probabilities(rows)[10:13], abs=1e-14)


# What goes in


def test_a_service_without_protected_attributes_never_sees_them(fitted, rows):
    protected = ["user_gender", "user_is_senior"]
    assert list(V2.names) == [name for name in PROTECTED.names if name not in protected]
    model = fitted("gradient_boosting")
    assert (model.probabilities(rows.drop(columns=protected)) == model.probabilities(rows)).all()
    assert list(fitted("gradient_boosting", service=PROTECTED).pipeline.feature_names_in_) == PROTECTED.names


def test_the_order_of_a_frames_columns_does_not_matter(fitted, rows):
    model = fitted(BASELINE)
    assert (model.probabilities(rows[rows.columns[::-1]]) == model.probabilities(rows)).all()


@EACH_ESTIMATOR
def test_an_unknown_category_is_an_error(fitted, rows, estimator):
    with pytest.raises(ValueError, match="Cable"):
        fitted(estimator).probabilities(rows[:2].assign(net_service="Cable"))


@EACH_ESTIMATOR
@CALIBRATED_OR_NOT
def test_the_pipeline_loads_without_this_package(fitted, estimator, calibrated):
    assert b"streamflow" not in pickle.dumps(fitted(estimator, calibrated).pipeline)


@pytest.mark.parametrize("service", CONTRACT.services, ids=lambda service: service.name)
@pytest.mark.parametrize("estimator", ["logistic_regression", BASELINE])
def test_encoded_columns_are_those_of_the_pipeline(fitted, rows, estimator, service):
    preprocessing = fitted(estimator, service=service).pipeline["preprocessing"]
    stated = [
        f"numeric__{name}" if category is None else f"categorical__{name}_{category}"
        for name, category in encoded_columns(service)
    ]
    assert list(preprocessing.get_feature_names_out()) == stated
    row = rows.iloc[0]
    first = dict(zip(stated, preprocessing.transform(rows[:1][service.names])[0], strict=True))
    for column in service.columns:
        if column.categories:
            assert first[f"categorical__{column.name}_{row[column.name]}"] == 1
            assert sum(first[f"categorical__{column.name}_{category}"] for category in column.categories) == 1


def test_a_column_added_to_the_contract_reaches_the_pipeline_and_the_schema(config):
    contract = contract_with_contract_type()
    service = contract.service("churn_v1")
    added = handmade_dataset(200, contract=contract).training_rows
    model = fit(added, LABEL, ModelSpec(BASELINE, service, False, 0.5), config)
    assert "categorical__contract_type_One year" in model.pipeline["preprocessing"].get_feature_names_out()
    assert feature_schema(service)["categorical"] == ["net_service", "contract_type"]


@pytest.mark.parametrize("service", CONTRACT.services, ids=lambda service: service.name)
def test_feature_schema_states_each_feature_in_order(service):
    schema = feature_schema(service)
    assert schema["service"] == service.name
    assert [feature["name"] for feature in schema["features"]] == service.names
    assert sorted(schema["categorical"] + schema["numeric"]) == sorted(service.names)
    assert schema["features"][1] == {
        "name": "monthly_fee",
        "view": "subs_profile_fv",
        "kind": "float",
        "unit": "currency/month",
        "categories": [],
        "description": "Fee charged for the month.",
    }
    assert schema["features"][5]["categories"] == ["DSL", "Fiber optic", "No"]


# Refusals


def test_an_unknown_estimator_is_refused(rows, config):
    with pytest.raises(ConfigurationError, match=r"no estimator 'oracle'; known are logistic_regression, gradient_"):
        fit(rows, LABEL, ModelSpec("oracle", V1, False, 0.5), config)


def test_an_estimator_that_the_file_does_not_have_is_refused(rows, config):
    config = msgspec.structs.replace(config, estimators={"logistic_regression": {}})
    with pytest.raises(ConfigurationError, match=r"training.toml has no \[estimators.random_forest_baseline\]"):
        fit(rows, LABEL, AS_PUBLISHED, config)


@pytest.mark.parametrize(
    ("estimator", "params", "message"),
    [
        (
            "logistic_regression",
            {"trees": 3},
            r"logistic_regression.trees of training.toml: .* takes C, class_",
        ),
        ("gradient_boosting", {"n_estimators": 3}, r"gradient_boosting.n_estimators of training.toml: Hist.* max_iter"),
        ("gradient_boosting", {"early_stopping": True}, r"gradient_boosting.early_stopping of training.toml: Hist"),
        (BASELINE, {"random_state": 3}, r"random_forest_baseline.random_state of training.toml: RandomForest"),
        (BASELINE, {"n_jobs": 2}, r"random_forest_baseline.n_jobs of training.toml: RandomForestClassifier takes boot"),
        (BASELINE, {"n_estimators": 0}, r"baseline.n_estimators of training.toml: The 'n_estimators' .* Got 0 instead"),
        ("logistic_regression", {"C": "much"}, r"logistic_regression.C of training.toml: .* Got 'much' instead"),
        (
            BASELINE,
            {"bootstrap": False, "max_samples": 0.5},
            r"\[estimators.random_forest_baseline\] of training.toml cannot be fitted: .*max_sample",
        ),
    ],
)
def test_hyper_parameters_that_scikit_learn_does_not_take_are_refused(rows, config, estimator, params, message):
    config = changed(config, estimator, **params)
    with pytest.raises(ConfigurationError, match=message):
        fit(rows, LABEL, ModelSpec(estimator, V1, False, 0.5), config)


def test_what_the_file_in_the_repository_states_is_taken():
    config = TrainingConfig.load(PROJECT_ROOT / "training.toml")
    assert list(config.estimators) == list(ESTIMATORS)
    for estimator in config.estimators:
        pipeline = make_pipeline(estimator, V1, bare_classifier(estimator, config))
        assert pipeline["classifier"].get_params().items() >= config.estimators[estimator].items()


def users(*fold_counts):
    """Users with so many (churned, stayed) in each fold, by seed 42."""
    wanted = {
        (fold, churned): count
        for fold, counts in enumerate(fold_counts)
        for churned, count in zip((True, False), counts, strict=True)
    }
    names, labels = [], []
    for number in range(1000):
        (fold,) = folds([str(number)], len(fold_counts), 42)
        for churned in (True, False):
            if wanted[fold, churned]:
                wanted[fold, churned] -= 1
                names.append(str(number))
                labels.append(churned)
                break
    return pd.DataFrame({"user_id": names, LABEL: labels})


@pytest.mark.parametrize(
    ("fold_counts", "message"),
    [
        (((3, 9), (3, 9)), None),
        (((2, 9), (3, 9)), "only 5 of the 23 users to learn from churned; guards.minimum_positives .* asks for 6"),
        (((9, 2), (9, 3)), "only 5 of the 23 users to learn from stayed; guards.minimum_positives .* asks for 6"),
        (((0, 9), (6, 9)), "none of the 9 users in fold 1 of 2 churned; state fewer folds in training.toml"),
        (((9, 6), (9, 0)), "none of the 9 users in fold 2 of 2 stayed"),
        (((0, 0), (6, 6)), "none of the 0 users in fold 1 of 2 churned"),
    ],
)
def test_too_little_to_learn_from_is_refused(config, fold_counts, message):
    guards = msgspec.structs.replace(config.guards, minimum_positives=6)
    config = msgspec.structs.replace(config, guards=guards, folds=2, seed=42)
    rows = users(*fold_counts)
    if message is None:
        require_trainable(rows, LABEL, config)
    else:
        with pytest.raises(TrainingRefused, match=message):
            require_trainable(rows, LABEL, config)
        with pytest.raises(TrainingRefused, match=message):
            fit(rows, LABEL, AS_PUBLISHED, config)


@settings(deadline=None)
@given(
    churned=st.lists(st.booleans(), max_size=40),
    least=st.integers(2, 8),
    count=st.integers(2, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_is_trained_on_has_enough_of_both_overall_and_some_in_each_fold(config, churned, least, count, seed):
    guards = msgspec.structs.replace(config.guards, minimum_positives=least)
    config = msgspec.structs.replace(config, guards=guards, folds=count, seed=seed)
    rows = pd.DataFrame({"user_id": [str(number) for number in range(len(churned))], LABEL: churned})
    fold = folds(rows["user_id"].tolist(), count, seed).tolist()
    both = {(where, label) for where, label in zip(fold, churned, strict=True)}
    enough = min(churned.count(True), churned.count(False)) >= least and len(both) == 2 * count
    try:
        require_trainable(rows, LABEL, config)
    except TrainingRefused:
        assert not enough
    else:
        assert enough
