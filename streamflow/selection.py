"""Choosing the estimator and the feature service of a month's model, by cross-validation among its training users.

What an estimator is and how it is fitted belongs to `training.py`, how good the chosen model is on unseen users to
`evaluation.py`.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from streamflow.contract import USER_ID, FeatureService
from streamflow.dataset import folds
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

    ``probabilities`` are the chosen candidate's for each training user, in the order of user_id, each by a model (and
    a sigmoid, where ``calibrated``) fitted without that user.
    """

    candidates: tuple[CandidateScore, ...]
    estimator: str
    service: FeatureService
    calibrated: bool
    reason: str
    probabilities: Floats


class _Prediction(NamedTuple):
    """Of users outside the fit: the probability of churn, and the score that a sigmoid is fitted on."""

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

    ``rows`` has user_id, the features and the label of the users to learn from; the folds are those of
    `dataset.folds`. Of all candidates whose logloss is at most one standard error above the lowest, the simplest is
    chosen: the rule of Breiman, Friedman, Olshen and Stone (1984), section 3.4.3, with the standard error of the
    difference on the same users. Simplicity goes by estimator first, then by service. A candidate is calibrated where
    that lowers its logloss by more than one standard error of the reduction.

    Neither ``n_jobs`` cores nor the order of ``rows`` change the result. Raises ConfigurationError and TrainingRefused
    as `training.fit` does.
    """
    require_trainable(rows, label, config)
    rows = rows.sort_values(USER_ID, ignore_index=True)
    labels = rows[label].to_numpy(dtype=np.bool_)
    fold = folds(rows[USER_ID].tolist(), config.folds, config.seed)
    pairs = [(estimator, service) for estimator in config.candidates for service in services]
    predictions = _cross_predict(rows, labels, fold, pairs, config, n_jobs)
    trials = [
        _trial(estimator, service, labels, fold, prediction)
        for (estimator, service), prediction in zip(pairs, predictions, strict=True)
    ]
    candidates = _compare(trials, labels)
    chosen = next(index for index, candidate in enumerate(candidates) if candidate.chosen)
    trial = trials[chosen]
    return Selection(
        tuple(candidates), trial.estimator, trial.service, trial.calibrated, _reason(candidates), trial.probabilities
    )


def as_table(selection: Selection) -> pd.DataFrame:
    """A row for each candidate, simplest first, with the columns of `CandidateScore`."""
    return pd.DataFrame([asdict(candidate) for candidate in selection.candidates])


def _cross_predict(
    rows: pd.DataFrame,
    labels: NDArray[np.bool_],
    fold: NDArray[np.intp],
    pairs: Sequence[tuple[str, FeatureService]],
    config: TrainingConfig,
    n_jobs: int,
) -> list[_Prediction]:
    """What each pair of estimator and service predicts for each user when fitted on the other folds."""
    from sklearn.base import clone
    from threadpoolctl import threadpool_limits

    pipelines = [make_pipeline(estimator, service, bare_classifier(estimator, config)) for estimator, service in pairs]

    def predict(index: int, held_out: int) -> _Prediction:
        started = time.thread_time()
        outside, features = fold == held_out, rows[pairs[index][1].names]
        # OpenMP counts its threads by the thread that asks.
        with threadpool_limits(limits=1, user_api="openmp"):
            pipeline = clone(pipelines[index])
            learn(pipeline, pairs[index][0], features[~outside], labels[~outside])
            probabilities, scores = _probabilities_and_scores(pipeline, features[outside])
        return _Prediction(probabilities, scores, time.thread_time() - started)

    tasks = [(index, held_out) for index in range(len(pairs)) for held_out in range(config.folds)]
    with threadpool_limits(limits=1), ThreadPoolExecutor(n_jobs) as executor:
        done = dict(zip(tasks, executor.map(predict, *zip(*tasks, strict=True)), strict=True))
    return [_joined([done[index, held_out] for held_out in range(config.folds)], fold) for index in range(len(pairs))]


def _probabilities_and_scores(pipeline: Any, features: pd.DataFrame) -> tuple[Floats, Floats]:
    probabilities = pipeline.predict_proba(features)[:, 1]
    scores = pipeline.decision_function(features) if hasattr(pipeline, "decision_function") else probabilities
    return probabilities, scores


def _joined(parts: Sequence[_Prediction], fold: NDArray[np.intp]) -> _Prediction:
    """The predictions of all folds, each user's at the user's place."""
    probabilities, scores = np.empty(len(fold)), np.empty(len(fold))
    for held_out, part in enumerate(parts):
        probabilities[fold == held_out], scores[fold == held_out] = part.probabilities, part.scores
    return _Prediction(probabilities, scores, sum(part.seconds for part in parts))


def _trial(
    estimator: str,
    service: FeatureService,
    labels: NDArray[np.bool_],
    fold: NDArray[np.intp],
    prediction: _Prediction,
) -> _Trial:
    """A candidate with its sigmoid, if that helps."""
    through_sigmoid = cross_calibrate(prediction.scores, labels, fold)
    plain, calibrated = losses(labels, prediction.probabilities), losses(labels, through_sigmoid)
    helps = bool((plain - calibrated).mean() > standard_error(plain - calibrated))
    return _Trial(
        estimator,
        service,
        helps,
        through_sigmoid if helps else prediction.probabilities,
        calibrated if helps else plain,
        plain,
        prediction.seconds,
    )


def cross_calibrate(scores: Floats, labels: NDArray[np.bool_], fold: NDArray[np.intp]) -> Floats:
    """Probabilities from out-of-fold ``scores``, in each fold by the sigmoid that fits the other folds best."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    probabilities = np.empty(len(scores))
    column = scores.reshape(-1, 1)
    with threadpool_limits(limits=1):
        for held_out in np.unique(fold):
            outside = fold == held_out
            sigmoid = LogisticRegression(C=np.inf, solver="newton-cholesky").fit(column[~outside], labels[~outside])
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


def _compare(trials: Sequence[_Trial], labels: NDArray[np.bool_]) -> list[CandidateScore]:
    from sklearn.metrics import roc_auc_score

    differences = differences_from_best([trial.losses for trial in trials])
    chosen = next(index for index, difference in enumerate(differences) if difference.within_one_standard_error)
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


def _reason(candidates: Sequence[CandidateScore]) -> str:
    chosen = next(candidate for candidate in candidates if candidate.chosen)
    best = min(candidates, key=lambda candidate: candidate.logloss)
    lowest = f"{best.estimator} on {best.service} has the lowest logloss of {len(candidates)}, {best.logloss:.4f}"
    if chosen is not best:
        return (
            f"{lowest}. {chosen.estimator} on {chosen.service} is the simplest within one standard error of it: "
            f"{chosen.logloss:.4f}, which is {chosen.difference:.4f} ± {chosen.standard_error:.4f} more."
        )
    simpler = candidates[: candidates.index(best)]
    if not simpler:
        return f"{lowest}, and is the simplest."
    nearest = min(simpler, key=lambda candidate: candidate.difference)
    return (
        f"{lowest}, and nothing simpler is within one standard error of it: the nearest, {nearest.estimator} on "
        f"{nearest.service}, is {nearest.difference:.4f} ± {nearest.standard_error:.4f} above."
    )
