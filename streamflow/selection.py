"""Choosing the estimator and the feature service of a month's model, by cross-validation among its training users.

What an estimator is and how it is fitted belongs to `training.py`, how good the chosen model is on unseen users to
`evaluation.py`.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from streamflow.contract import USER_ID, FeatureService
from streamflow.dataset import folds, in_order, of_newest_month, weights
from streamflow.training import bare_classifier, learn, make_pipeline, require_trainable
from streamflow.training_config import TrainingConfig

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class CandidateScore:
    """How an estimator on a feature service predicts users that it did not learn from.

    ``logloss`` and ``auc`` are of the probabilities as the model would give them, calibrated or not as ``calibrated``
    says; ``logloss_uncalibrated`` without calibration in either case. ``difference`` is by how much the logloss is
    above that of the best candidate, and ``standard_error`` that of this difference, both over the same users.
    ``seconds`` is the time of one core that its fits took.
    """

    estimator: str
    service: str
    calibrated: bool
    logloss: float
    logloss_uncalibrated: float
    auc: float
    difference: float
    standard_error: float
    within_one_standard_error: bool
    chosen: bool
    seconds: float


@dataclass(frozen=True, eq=False)
class Selection:
    """The chosen estimator and service, why, and all ``candidates`` in the order of their simplicity.

    ``probabilities`` are the chosen candidate's for each training user of the newest month, in the order of user_id,
    each by a model (and a sigmoid, where ``calibrated``) fitted without that user.
    """

    candidates: tuple[CandidateScore, ...]
    estimator: str
    service: FeatureService
    calibrated: bool
    reason: str
    probabilities: Floats


class Prediction(NamedTuple):
    """Of users outside the fit: the probability of churn, and the score that a sigmoid is fitted on.

    ``seconds`` is the time of one core that the fits took.
    """

    probabilities: Floats
    scores: Floats
    seconds: float


class Difference(NamedTuple):
    """A paired difference of mean loss from the best candidate, and its standard error."""

    mean: float
    standard_error: float

    @property
    def within_one_standard_error(self) -> bool:
        """Whether the candidate may stand for the best one."""
        return self.mean <= self.standard_error


class Compared(Protocol):
    """A choice held against the others, by the logloss of the same users."""

    @property
    def logloss(self) -> float: ...  # noqa: D102
    @property
    def difference(self) -> float: ...  # noqa: D102
    @property
    def standard_error(self) -> float: ...  # noqa: D102


class _Trial(NamedTuple):
    """A candidate's out-of-fold probabilities of all training users, and each user's logloss."""

    estimator: str
    service: FeatureService
    calibrated: bool
    probabilities: Floats
    losses: Floats
    losses_uncalibrated: Floats
    seconds: float


def select(
    rows: pd.DataFrame, label: str, services: Sequence[FeatureService], config: TrainingConfig, *, n_jobs: int = 1
) -> Selection:
    """Choose among the candidates of training.toml on each of ``services``; both are in the order of simplicity.

    ``rows`` has user_id, the features and the label of the users to learn from, and what `dataset.in_order` says when
    they are of several months: all are learned from, and the users of the newest month predicted. The folds are those
    of `dataset.folds`, so that nobody is predicted by what the same user did in another month.

    Of all candidates whose logloss is at most one standard error above the lowest, the simplest is chosen: the rule of
    Breiman, Friedman, Olshen and Stone (1984), section 3.4.3, with the standard error of the difference on the same
    users. Simplicity goes by estimator first, then by service. A candidate is calibrated where that lowers its logloss
    by more than one standard error of the reduction.

    Neither ``n_jobs`` cores nor the order of ``rows`` change the result. Raises ConfigurationError and TrainingRefused
    as `training.fit` does.
    """
    rows = in_order(rows)
    require_trainable(rows[of_newest_month(rows)], label, config)
    pairs = [(estimator, service) for estimator in config.candidates for service in services]
    predictions = out_of_fold(rows, label, pairs, config, n_jobs)
    trials = [
        _trial(estimator, service, rows, label, prediction, config)
        for (estimator, service), prediction in zip(pairs, predictions, strict=True)
    ]
    candidates = _compare(trials, rows.loc[of_newest_month(rows), label].to_numpy(dtype=np.bool_))
    chosen = next(index for index, candidate in enumerate(candidates) if candidate.chosen)
    trial = trials[chosen]
    reason = reason_for(chosen, [f"{one.estimator} on {one.service}" for one in candidates], candidates)
    return Selection(tuple(candidates), trial.estimator, trial.service, trial.calibrated, reason, trial.probabilities)


def as_table(selection: Selection) -> pd.DataFrame:
    """A row for each candidate, simplest first, with the columns of `CandidateScore`."""
    return pd.DataFrame([asdict(candidate) for candidate in selection.candidates])


def out_of_fold(
    rows: pd.DataFrame, label: str, pairs: Sequence[tuple[str, FeatureService]], config: TrainingConfig, n_jobs: int = 1
) -> list[Prediction]:
    """What each pair of estimator and service predicts for each row when fitted on the users of the other folds.

    ``rows`` are in the order of `dataset.in_order`. Raises ConfigurationError as `training.fit` does.
    """
    from sklearn.base import clone
    from threadpoolctl import threadpool_limits

    labels, weight = rows[label].to_numpy(dtype=np.bool_), weights(rows)
    fold = folds(rows[USER_ID].tolist(), config.folds, config.seed)
    pipelines = [make_pipeline(estimator, service, bare_classifier(estimator, config)) for estimator, service in pairs]

    def predict(index: int, held_out: int) -> Prediction:
        started = time.thread_time()
        outside, features = fold == held_out, rows[pairs[index][1].names]
        # OpenMP counts its threads by the thread that asks.
        with threadpool_limits(limits=1, user_api="openmp"):
            pipeline = clone(pipelines[index])
            learned = None if weight is None else weight[~outside]
            learn(pipeline, pairs[index][0], features[~outside], labels[~outside], learned)
            probabilities, scores = _probabilities_and_scores(pipeline, features[outside])
        return Prediction(probabilities, scores, time.thread_time() - started)

    tasks = [(index, held_out) for index in range(len(pairs)) for held_out in range(config.folds)]
    with threadpool_limits(limits=1), ThreadPoolExecutor(n_jobs) as executor:
        done = dict(zip(tasks, executor.map(predict, *zip(*tasks, strict=True)), strict=True))
    return [_joined([done[index, held_out] for held_out in range(config.folds)], fold) for index in range(len(pairs))]


def _probabilities_and_scores(pipeline: Any, features: pd.DataFrame) -> tuple[Floats, Floats]:
    probabilities = pipeline.predict_proba(features)[:, 1]
    scores = pipeline.decision_function(features) if hasattr(pipeline, "decision_function") else probabilities
    return probabilities, scores


def _joined(parts: Sequence[Prediction], fold: NDArray[np.intp]) -> Prediction:
    """The predictions of all folds, each row's at the row's place."""
    probabilities, scores = np.empty(len(fold)), np.empty(len(fold))
    for held_out, part in enumerate(parts):
        probabilities[fold == held_out], scores[fold == held_out] = part.probabilities, part.scores
    return Prediction(probabilities, scores, sum(part.seconds for part in parts))


def _trial(
    estimator: str,
    service: FeatureService,
    rows: pd.DataFrame,
    label: str,
    prediction: Prediction,
    config: TrainingConfig,
) -> _Trial:
    """A candidate with its sigmoid, if that helps the users of the newest month."""
    labels, newest = rows[label].to_numpy(dtype=np.bool_), of_newest_month(rows)
    fold = folds(rows[USER_ID].tolist(), config.folds, config.seed)
    through_sigmoid = cross_calibrate(prediction.scores, labels, fold, weights(rows))[newest]
    probabilities = prediction.probabilities[newest]
    plain, calibrated = losses(labels[newest], probabilities), losses(labels[newest], through_sigmoid)
    helps = bool((plain - calibrated).mean() > standard_error(plain - calibrated))
    return _Trial(
        estimator,
        service,
        helps,
        through_sigmoid if helps else probabilities,
        calibrated if helps else plain,
        plain,
        prediction.seconds,
    )


def cross_calibrate(
    scores: Floats, labels: NDArray[np.bool_], fold: NDArray[np.intp], sample_weight: Floats | None = None
) -> Floats:
    """Probabilities from out-of-fold ``scores``, in each fold by the sigmoid that fits the other folds best."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    probabilities = np.empty(len(scores))
    column = scores.reshape(-1, 1)
    with threadpool_limits(limits=1):
        for held_out in np.unique(fold):
            outside = fold == held_out
            weight = None if sample_weight is None else sample_weight[~outside]
            sigmoid = LogisticRegression(C=np.inf, solver="newton-cholesky")
            sigmoid.fit(column[~outside], labels[~outside], weight)
            probabilities[outside] = sigmoid.predict_proba(column[outside])[:, 1]
    return probabilities


def losses(labels: NDArray[np.bool_], probabilities: Floats) -> Floats:
    """Each user's logloss, with probabilities kept from 0 and 1 by the precision of float64, as scikit-learn does."""
    precision = np.finfo(np.float64).eps
    clipped = np.clip(probabilities, precision, 1 - precision)
    return -np.log(np.where(labels, clipped, 1 - clipped))


def standard_error(values: Floats) -> float:
    """The standard error of the mean of independent values."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def differences_from_best(candidates: Sequence[Floats]) -> list[Difference]:
    """By how much the mean loss of each candidate is above the lowest, on the same users."""
    best = min(candidates, key=lambda one: float(one.mean()))
    return [Difference(float((one - best).mean()), standard_error(one - best)) for one in candidates]


def simplest(differences: Sequence[Difference]) -> int:
    """Which of the candidates, simplest first, is chosen: the first that may stand for the best."""
    return next(index for index, difference in enumerate(differences) if difference.within_one_standard_error)


def _compare(trials: Sequence[_Trial], labels: NDArray[np.bool_]) -> list[CandidateScore]:
    from sklearn.metrics import roc_auc_score

    differences = differences_from_best([trial.losses for trial in trials])
    chosen = simplest(differences)
    return [
        CandidateScore(
            trial.estimator,
            trial.service.name,
            trial.calibrated,
            float(trial.losses.mean()),
            float(trial.losses_uncalibrated.mean()),
            float(roc_auc_score(labels, trial.probabilities)),
            difference.mean,
            difference.standard_error,
            difference.within_one_standard_error,
            index == chosen,
            trial.seconds,
        )
        for index, (trial, difference) in enumerate(zip(trials, differences, strict=True))
    ]


def reason_for(chosen: int, names: Sequence[str], scores: Sequence[Compared]) -> str:
    """Why the one at ``chosen`` among ``names``, simplest first and each with its score, was chosen."""
    best = min(range(len(scores)), key=lambda index: scores[index].logloss)
    lowest = f"{names[best]} has the lowest logloss of {len(names)}, {scores[best].logloss:.4f}"
    if chosen != best:
        score = scores[chosen]
        return (
            f"{lowest}. {names[chosen]} is the simplest within one standard error of it: "
            f"{score.logloss:.4f}, which is {score.difference:.4f} ± {score.standard_error:.4f} more."
        )
    if not best:
        return f"{lowest}, and is the simplest."
    nearest = min(range(best), key=lambda index: scores[index].difference)
    return (
        f"{lowest}, and nothing simpler is within one standard error of it: the nearest, {names[nearest]}, is "
        f"{scores[nearest].difference:.4f} ± {scores[nearest].standard_error:.4f} above."
    )
