"""Estimators, and fitting one on a training dataset: preprocessing and classifier as one scikit-learn pipeline.

How good the fitted model is belongs to `evaluation.py`, the form that serves it to `scoring.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from streamflow.contract import Column, FeatureService
from streamflow.dataset import TrainingDataset
from streamflow.errors import ConfigurationError, TrainingRefused

THRESHOLD = 0.5
PREPROCESSING = "preprocessing"
CLASSIFIER = "classifier"


@dataclass(frozen=True)
class Estimator:
    """A classifier by name: how scikit-learn's object is built, and with which hyper-parameters."""

    build: Callable[..., Any]
    params: Mapping[str, Any]


def _random_forest(**params: Any) -> Any:
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(**params)


ESTIMATORS: Mapping[str, Estimator] = {
    "random_forest_baseline": Estimator(
        _random_forest, {"n_estimators": 300, "class_weight": "balanced", "random_state": 42}
    ),
}


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A fitted pipeline and what it was fitted with.

    ``pipeline`` takes a frame with the features of ``service``. ``threshold`` is the probability from which on a user
    counts as churning. ``train_rows`` is the number of rows it learned from.
    """

    pipeline: Any
    service: FeatureService
    estimator: str
    params: Mapping[str, Any]
    threshold: float
    train_rows: int

    def probabilities(self, features: pd.DataFrame) -> NDArray[np.float64]:
        """The probability of churn of each row; a row's does not depend on the other rows or on threads."""
        names = [column.name for column in self.service.columns]
        probabilities: NDArray[np.float64] = self.pipeline.predict_proba(features[names])[:, 1]
        return probabilities


def fit(dataset: TrainingDataset, estimator: str, *, n_jobs: int = 1) -> TrainedModel:
    """Fit the named estimator on the users outside the hold-out, on ``n_jobs`` cores; cores do not change the result.

    Raises ConfigurationError for an unknown estimator, and TrainingRefused when the users to learn from, or the
    held-out ones to be measured on, all have the same label.
    """
    if estimator not in ESTIMATORS:
        raise ConfigurationError(f"there is no estimator {estimator!r}; known are {', '.join(ESTIMATORS)}")
    training = ~dataset.holdout
    for users, mask in (("users to learn from", training), ("held-out users", dataset.holdout)):
        if len(np.unique(dataset.labels[mask])) < 2:
            raise TrainingRefused(
                f"the {mask.sum()} {users} of {dataset.month} do not have both values of {dataset.label}; "
                "more users are needed"
            )
    chosen = ESTIMATORS[estimator]
    pipeline = _pipeline(dataset.service, chosen.build(**chosen.params, n_jobs=n_jobs))
    pipeline.fit(dataset.features[training], dataset.labels[training])
    # Threads would add up the trees in the order in which they finish.
    pipeline.set_params(**{f"{CLASSIFIER}__n_jobs": 1})
    return TrainedModel(pipeline, dataset.service, estimator, chosen.params, THRESHOLD, int(training.sum()))


def _pipeline(service: FeatureService, classifier: Any) -> Any:
    """Categories one-hot in the contract's categories, then numbers and booleans as float64, then the classifier.

    An unknown category raises ValueError. Only objects of scikit-learn and numpy are used, so that the pipeline loads
    where this package is not installed.
    """
    from sklearn.compose import ColumnTransformer
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import FunctionTransformer, OneHotEncoder

    categorical, numeric = _categorical(service), _numeric(service)
    one_hot = OneHotEncoder(
        categories=[list(column.categories) for column in categorical], handle_unknown="error", sparse_output=False
    )
    as_float = FunctionTransformer(np.asarray, kw_args={"dtype": np.float64}, feature_names_out="one-to-one")
    preprocessing = ColumnTransformer(
        [
            ("categorical", one_hot, [column.name for column in categorical]),
            ("numeric", as_float, [column.name for column in numeric]),
        ]
    )
    return Pipeline([(PREPROCESSING, preprocessing), (CLASSIFIER, classifier)])


def _categorical(service: FeatureService) -> list[Column]:
    return [column for column in service.columns if not column.is_numeric]


def _numeric(service: FeatureService) -> list[Column]:
    return [column for column in service.columns if column.is_numeric]


def encoded_columns(service: FeatureService) -> list[tuple[str, str | None]]:
    """The feature, and for a one-hot column the category, behind each column that the classifier sees, in order."""
    one_hot = [(column.name, category) for column in _categorical(service) for category in column.categories]
    return [*one_hot, *((column.name, None) for column in _numeric(service))]


def feature_schema(service: FeatureService) -> dict[str, Any]:
    """What the model takes, for ``feature_schema.json``: the features in order and which of them are categorical."""
    views = {column.name: view.name for view in service.views for column in view.columns}
    return {
        "service": service.name,
        "categorical": [column.name for column in _categorical(service)],
        "numeric": [column.name for column in _numeric(service)],
        "features": [
            {
                "name": column.name,
                "view": views[column.name],
                "kind": column.kind,
                "unit": column.unit,
                "categories": list(column.categories),
                "description": column.description,
            }
            for column in service.columns
        ],
    }
