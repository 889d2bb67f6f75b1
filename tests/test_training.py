import pickle
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from test_dataset import SERVICE, contract_with_contract_type, handmade_dataset, real_dataset

from streamflow import evaluation
from streamflow.errors import ConfigurationError, TrainingRefused
from streamflow.training import encoded_columns, feature_schema, fit

BASELINE = "random_forest_baseline"


@cache
def fitted_on_real_january(real_data):
    """The dataset of real January and its baseline; fitted once for all tests."""
    dataset = real_dataset(real_data)
    return dataset, fit(dataset, BASELINE, n_jobs=2)


@pytest.fixture(scope="module")
def dataset():
    return handmade_dataset()


@pytest.fixture(scope="module")
def model(dataset):
    return fit(dataset, BASELINE)


def test_the_baseline_is_the_forest_of_the_published_figures(model, dataset):
    forest = model.pipeline["classifier"]
    assert type(forest).__name__ == "RandomForestClassifier"
    assert (forest.n_estimators, forest.class_weight, forest.random_state) == (300, "balanced", 42)
    assert model.params == {"n_estimators": 300, "class_weight": "balanced", "random_state": 42}
    assert model.train_rows == (~dataset.holdout).sum()
    assert model.threshold == 0.5


def test_real_january_ranks_unseen_users(real_data):
    dataset, model = fitted_on_real_january(real_data)
    held_out = dataset.holdout
    probabilities = model.probabilities(dataset.features[held_out])
    assert evaluation.metrics(dataset.labels[held_out], probabilities, model.threshold).auc >= 0.80


def test_cores_and_repetition_do_not_change_the_model(model, dataset):
    other = fit(dataset, BASELINE, n_jobs=2)
    assert (other.probabilities(dataset.features) == model.probabilities(dataset.features)).all()
    assert other.pipeline["classifier"].n_jobs == 1


def test_held_out_labels_do_not_reach_the_model(model, dataset):
    flipped = dataset.frame.assign(churn_label=dataset.labels ^ dataset.holdout)
    other = fit(replace(dataset, frame=flipped), BASELINE)
    assert (other.probabilities(dataset.features) == model.probabilities(dataset.features)).all()


def test_a_probability_does_not_depend_on_the_batch(model, dataset):
    together = model.probabilities(dataset.features)
    assert (model.probabilities(dataset.features[10:13]) == together[10:13]).all()
    assert (model.probabilities(dataset.features[::-1])[::-1] == together).all()


def test_the_order_of_a_frames_columns_does_not_matter(model, dataset):
    names = list(dataset.features)[::-1]
    assert (model.probabilities(dataset.frame[names]) == model.probabilities(dataset.features)).all()


def test_an_unknown_category_is_an_error(model, dataset):
    with pytest.raises(ValueError, match="Cable"):
        model.probabilities(dataset.features[:2].assign(net_service="Cable"))


def test_the_pipeline_loads_without_this_package(model):
    assert b"streamflow" not in pickle.dumps(model.pipeline)


def test_encoded_columns_are_those_of_the_pipeline(model, dataset):
    pipeline_names = model.pipeline["preprocessing"].get_feature_names_out()
    stated = [
        f"numeric__{name}" if category is None else f"categorical__{name}_{category}"
        for name, category in encoded_columns(SERVICE)
    ]
    assert list(pipeline_names) == stated
    first = dict(zip(stated, model.pipeline["preprocessing"].transform(dataset.features[:1])[0], strict=True))
    row = dataset.features.iloc[0]
    assert first["numeric__monthly_fee"] == row["monthly_fee"]
    assert first[f"categorical__net_service_{row['net_service']}"] == 1
    assert sum(first[name] for name in stated if name.startswith("categorical")) == 1


def test_a_column_added_to_the_contract_reaches_the_pipeline_and_the_schema():
    contract = contract_with_contract_type()
    service = contract.service("churn_v1")
    model = fit(handmade_dataset(120, contract=contract), BASELINE)
    assert "categorical__contract_type_One year" in model.pipeline["preprocessing"].get_feature_names_out()
    assert feature_schema(service)["categorical"] == ["net_service", "contract_type"]


def test_feature_schema_states_each_feature_in_order():
    schema = feature_schema(SERVICE)
    assert schema["service"] == "churn_v1"
    assert [feature["name"] for feature in schema["features"]] == [column.name for column in SERVICE.columns]
    assert schema["categorical"] == ["net_service"]
    assert sorted(schema["categorical"] + schema["numeric"]) == sorted(column.name for column in SERVICE.columns)
    assert schema["features"][1] == {
        "name": "monthly_fee",
        "view": "subs_profile_fv",
        "kind": "float",
        "unit": "currency/month",
        "categories": [],
        "description": "Fee charged for the month.",
    }
    assert schema["features"][5]["categories"] == ["DSL", "Fiber optic", "No"]


def test_an_unknown_estimator_is_refused(dataset):
    with pytest.raises(ConfigurationError, match="no estimator 'oracle'; known are random_forest_baseline"):
        fit(dataset, "oracle")


@pytest.mark.parametrize(("held_out", "who"), [(False, "users to learn from"), (True, "held-out users")])
def test_a_side_of_the_split_with_one_label_is_refused(dataset, held_out, who):
    labels = np.where(dataset.holdout == held_out, False, dataset.labels)
    constant = replace(dataset, frame=dataset.frame.assign(churn_label=labels))
    with pytest.raises(TrainingRefused, match=rf"the \d+ {who} of 2024-01 do not have both values of churn_label"):
        fit(constant, BASELINE)
