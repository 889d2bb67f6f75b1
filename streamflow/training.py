"""Estimators, and fitting one on training rows: preprocessing, classifier, calibration and threshold as one pipeline.

Which one is fitted belongs to `selection.py`, how good it is to `evaluation.py`, the form that serves it to
`scoring.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from streamflow.contract import USER_ID, Column, FeatureService
from streamflow.dataset import folds, in_order, weights
from streamflow.errors import ConfigurationError, TrainingRefused

if TYPE_CHECKING:
    from streamflow.training_config import TrainingConfig

PREPROCESSING = "preprocessing"
CLASSIFIER = "classifier"
_CORES = "n_jobs"
_SEED = "random_state"


@dataclass(frozen=True)
class Estimator:
    """A classifier by name: ``build`` makes scikit-learn's from the hyper-parameters in ``fixed`` and training.toml.

    ``scaled`` says that it takes numbers in units of their standard deviation; ``parallel`` that it can use cores.
    """

    build: Callable[..., Any]
    scaled: bool = False
    parallel: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)


def _logistic_regression(**params: Any) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(**params)


def _gradient_boosting(**params: Any) -> Any:
    from sklearn.ensemble import HistGradientBoostingClassifier

    return HistGradientBoostingClassifier(**params)


def _random_forest(**params: Any) -> Any:
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(**params)


ESTIMATORS: Mapping[str, Estimator] = {
    "logistic_regression": Estimator(_logistic_regression, scaled=True, fixed={"solver": "lbfgs"}),
    "gradient_boosting": Estimator(_gradient_boosting, fixed={"early_stopping": False}),
    "random_forest_leaf_limited": Estimator(_random_forest, parallel=True),
    "random_forest_baseline": Estimator(_random_forest, parallel=True),
}


@dataclass(frozen=True)
class ModelSpec:
    """What to fit: an estimator on the features of a service, with sigmoid calibration or without.

    ``threshold``, between 0 and 1, is the probability from which on a user counts as churning.
    """

    estimator: str
    service: FeatureService
    calibrated: bool
    threshold: float


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A fitted pipeline and what it was fitted with.

    ``pipeline`` takes a frame with the features of ``service``, and its ``predict`` applies ``threshold``. ``params``
    are the classifier's hyper-parameters. ``train_rows`` is the number of rows it learned from.
    """

    pipeline: Any
    service: FeatureService
    estimator: str
    params: Mapping[str, Any]
    calibrated: bool
    threshold: float
    train_rows: int

    def probabilities(self, frame: pd.DataFrame) -> NDArray[np.float64]:
        """The probability of churn of each row; threads never change it.

        Neither do other rows, if the classifier is of trees. A linear one's last bit may depend on them, because
        scikit-learn multiplies matrices with BLAS.
        """
        from threadpoolctl import threadpool_limits

        with threadpool_limits(limits=1):
            probabilities: NDArray[np.float64] = self.pipeline.predict_proba(frame[self.service.names])[:, 1]
        return probabilities


def fit(rows: pd.DataFrame, label: str, spec: ModelSpec, config: "TrainingConfig", *, n_jobs: int = 1) -> TrainedModel:
    """Fit what ``spec`` says on ``rows``, on ``n_jobs`` cores; neither cores nor the order of rows change the result.

    ``rows`` has user_id, the features and the label of the users to learn from, and what `dataset.in_order` says when
    they are of several months. The sigmoid is Platt's (1999), fitted on out-of-fold scores in the folds of
    `dataset.folds`; the classifier under it is then fitted on all rows. Weights count in all of it.

    Raises ConfigurationError for what training.toml cannot mean, and TrainingRefused as `require_trainable` does.
    """
    import joblib
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.model_selection import FixedThresholdClassifier, PredefinedSplit
    from threadpoolctl import threadpool_limits

    require_trainable(rows, label, config)
    rows = in_order(rows)
    classifier = bare_classifier(spec.estimator, config)
    params = {**config.estimators[spec.estimator], **ESTIMATORS[spec.estimator].fixed, _SEED: config.seed}
    if spec.calibrated:
        cv = PredefinedSplit(folds(rows[USER_ID].tolist(), config.folds, config.seed))
        classifier = CalibratedClassifierCV(classifier, method="sigmoid", cv=cv, ensemble=False)
    thresholded = FixedThresholdClassifier(classifier, threshold=spec.threshold, response_method="predict_proba")
    pipeline = make_pipeline(spec.estimator, spec.service, thresholded)
    # Joblib gives the cores to the outermost loop: to the folds while they last, then to the trees. A forest's trees
    # are never added up by several threads, whose order would show in the last bit.
    cores = n_jobs if ESTIMATORS[spec.estimator].parallel else 1
    with threadpool_limits(limits=1), joblib.parallel_config(backend="threading", n_jobs=cores):
        learned = rows[label].to_numpy(dtype=np.bool_)
        learn(pipeline, spec.estimator, rows[spec.service.names], learned, weights(rows))
    return TrainedModel(
        pipeline, spec.service, spec.estimator, params, spec.calibrated, spec.threshold, train_rows=len(rows)
    )


def require_trainable(rows: pd.DataFrame, label: str, config: "TrainingConfig") -> None:
    """Raise TrainingRefused for too few users who churned or stayed, overall or in a fold of the cross-validation."""
    churned = rows[label].to_numpy(dtype=np.bool_)
    fold = folds(rows[USER_ID].tolist(), config.folds, config.seed)
    for who, users in (("churned", churned), ("stayed", ~churned)):
        if users.sum() < config.guards.minimum_positives:
            raise TrainingRefused(
                f"only {users.sum()} of the {len(rows)} users to learn from {who}; "
                f"guards.minimum_positives of training.toml asks for {config.guards.minimum_positives}; "
                "train on a month with more users, or lower it"
            )
        counts = np.bincount(fold[users], minlength=config.folds)
        if not counts.all():
            raise TrainingRefused(
                f"none of the {(fold == counts.argmin()).sum()} users in fold {counts.argmin() + 1} of {config.folds} "
                f"{who}; state fewer folds in training.toml, or give more users"
            )


def bare_classifier(estimator: str, config: "TrainingConfig") -> Any:
    """The unfitted classifier of that name, with the hyper-parameters of training.toml.

    Raises ConfigurationError for an unknown name, and for a hyper-parameter that it does not have or cannot take.
    """
    if estimator not in ESTIMATORS:
        raise ConfigurationError(f"there is no estimator {estimator!r}; known are {', '.join(ESTIMATORS)}")
    if estimator not in config.estimators:
        raise ConfigurationError(f"training.toml has no [estimators.{estimator}]; state its hyper-parameters there")
    fixed = {**ESTIMATORS[estimator].fixed, _SEED: config.seed}
    classifier = ESTIMATORS[estimator].build(**fixed)
    known = sorted(classifier.get_params().keys() - fixed.keys() - {_CORES})
    for name, value in config.estimators[estimator].items():
        key = f"estimators.{estimator}.{name} of training.toml"
        if name not in known:
            raise ConfigurationError(f"{key}: {type(classifier).__name__} takes {', '.join(known)}")
        try:
            classifier.set_params(**{name: value})._validate_params()
        except ValueError as error:
            raise ConfigurationError(f"{key}: {error}") from None
    return classifier


def learn(
    pipeline: Any,
    estimator: str,
    features: pd.DataFrame,
    labels: NDArray[np.bool_],
    sample_weight: NDArray[np.float64] | None = None,
) -> None:
    """Fit a pipeline of `make_pipeline`; raises ConfigurationError for hyper-parameters that do not go together.

    A weight for each row counts in the classifier and in its sigmoid, not in standardizing, which is but a unit.
    """
    from sklearn import config_context

    try:
        if sample_weight is None:
            pipeline.fit(features, labels)
            return
        with config_context(enable_metadata_routing=True):
            _ask_for_weights(pipeline)
            pipeline.fit(features, labels, sample_weight=sample_weight)
    except ValueError as error:
        raise ConfigurationError(f"[estimators.{estimator}] of training.toml cannot be fitted: {error}") from error


def _ask_for_weights(pipeline: Any) -> None:
    def within(part: Any) -> list[Any]:
        return [part, *(inner for inner in part.get_params().values() if hasattr(inner, "get_params"))]

    transformers = [transformer for _, transformer, _ in pipeline.named_steps[PREPROCESSING].transformers]
    for part in (*transformers, *within(pipeline.named_steps[CLASSIFIER])):
        if hasattr(part, "set_fit_request"):
            part.set_fit_request(sample_weight=part not in transformers)


def make_pipeline(estimator: str, service: FeatureService, classifier: Any) -> Any:
    """Categories one-hot in the contract's categories, then numbers and booleans as float64, then the classifier.

    Numbers are standardized where the estimator takes them so. An unknown category raises ValueError. Only objects of
    scikit-learn and numpy are used, so that the pipeline loads where this package is not installed.
    """
    from sklearn.compose import ColumnTransformer
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler

    categorical, numeric = _categorical(service), _numeric(service)
    one_hot = OneHotEncoder(
        categories=[list(column.categories) for column in categorical], handle_unknown="error", sparse_output=False
    )
    as_float = FunctionTransformer(np.asarray, kw_args={"dtype": np.float64}, feature_names_out="one-to-one")
    preprocessing = ColumnTransformer(
        [
            ("categorical", one_hot, [column.name for column in categorical]),
            (
                "numeric",
                StandardScaler() if ESTIMATORS[estimator].scaled else as_float,
                [column.name for column in numeric],
            ),
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
    views = {column.name: view.name for view in service.views for column in service.columns_of(view)}
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
