import math
from dataclasses import asdict

import numpy as np
import pytest
from test_dataset import SERVICE, handmade_dataset

from streamflow.evaluation import confusion_plot, importance_plot, importances, metrics, prediction_sample, roc_plot
from streamflow.training import fit

LABELS = np.array([False, False, False, True, True])
PROBABILITIES = np.array([0.1, 0.5, 0.4, 0.45, 0.9])


@pytest.fixture(scope="module")
def dataset():
    return handmade_dataset(300)


@pytest.fixture(scope="module")
def model(dataset):
    return fit(dataset, "random_forest_baseline")


def test_metrics_by_hand():
    found = metrics(LABELS, PROBABILITIES, 0.5)
    assert found.auc == pytest.approx(5 / 6)
    assert (found.accuracy, found.precision, found.recall, found.f1) == (0.6, 0.5, 0.5, 0.5)
    surprise = -math.log(0.9) - math.log(0.5) - math.log(0.6) - math.log(0.45) - math.log(0.9)
    assert found.logloss == pytest.approx(surprise / 5)


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


def test_importances_are_the_contracts_features(model):
    table = importances(model)
    assert sorted(table["feature"]) == sorted(column.name for column in SERVICE.columns)
    assert table["importance"].sum() == pytest.approx(1)
    assert table["importance"].is_monotonic_decreasing
    assert table["feature"].iloc[0] == "months_active"
    one_hot = model.pipeline["classifier"].feature_importances_[:3]
    assert table.set_index("feature").loc["net_service", "importance"] == pytest.approx(one_hot.sum())


def test_prediction_sample_spans_the_held_out_users(model, dataset):
    probabilities = model.probabilities(dataset.features[dataset.holdout])
    sample = prediction_sample(dataset, probabilities, 0.5)
    assert len(sample) == 20
    assert sample["user_id"].is_unique
    assert set(sample["user_id"]) <= set(dataset.frame["user_id"][dataset.holdout])
    assert (sample["probability"].min(), sample["probability"].max()) == (probabilities.min(), probabilities.max())
    again = model.probabilities(sample)
    assert (again == sample["probability"]).all()
    assert ((again >= 0.5) == sample["prediction"]).all()


def test_prediction_sample_of_few_users_is_all_of_them():
    few = handmade_dataset(20)
    sample = prediction_sample(few, np.zeros(few.holdout.sum()), 0.5)
    assert sample["user_id"].tolist() == few.frame["user_id"][few.holdout].tolist()


def test_plots_are_pngs_and_repeatable(model, dataset):
    labels = dataset.labels[dataset.holdout]
    probabilities = model.probabilities(dataset.features[dataset.holdout])
    for plot in (
        lambda: roc_plot(labels, probabilities),
        lambda: confusion_plot(labels, probabilities, 0.5),
        lambda: importance_plot(importances(model)),
    ):
        image = plot()
        assert image.startswith(b"\x89PNG\r\n\x1a\n")
        assert len(image) > 10_000
        assert plot() == image
