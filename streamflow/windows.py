"""Windows: which months a month's model learns from, chosen by how well the newest month's unseen users are predicted.

Which windows there are, their rows, and the choice among them belong here. The choice of the estimator within the
chosen window is `selection.py`'s, fitting is `training.py`'s.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from streamflow import selection
from streamflow.contract import MONTH, FeatureService
from streamflow.dataset import WEIGHT, in_order, of_newest_month
from streamflow.months import Month
from streamflow.training_config import TrainingConfig, Windows

MONTH_ALONE = "month"


@dataclass(frozen=True)
class Window:
    """Months to learn from, oldest first; each weighs half as much as one that is ``half_life_months`` newer."""

    name: str
    months: tuple[Month, ...]
    half_life_months: float | None = None

    def weight(self, month: Month) -> float:
        """The weight of a month, 1 for the newest: 2 ** (-age / half-life), with the age in months."""
        if self.half_life_months is None:
            return 1.0
        return float(2.0 ** (-_age(month, self.months[-1]) / self.half_life_months))


@dataclass(frozen=True)
class WindowScore:
    """How a window's rows predict users of the newest month that were not learned from; see `CandidateScore`.

    ``months`` are YYYY-MM, ``rows`` is how many of them there are to learn from.
    """

    name: str
    months: tuple[str, ...]
    half_life_months: float | None
    rows: int
    logloss: float
    auc: float
    difference: float
    standard_error: float
    within_one_standard_error: bool
    chosen: bool
    seconds: float

    @property
    def document(self) -> dict[str, Any]:
        """The score as plain data, without the time it took, for the record of a version."""
        return {name: value for name, value in asdict(self).items() if name != "seconds"}


@dataclass(frozen=True)
class Choice:
    """The chosen window, why, and the ``scores`` of all, simplest first; empty where there is but one."""

    window: Window
    reason: str
    scores: tuple[WindowScore, ...] = ()


def candidates(month: Month, labelled: Iterable[Month], windows: Windows) -> list[Window]:
    """The distinct windows of a model of ``month``, in the order of their names; of alike ones the first.

    A window ends with ``month`` and has the months among ``labelled``: "month" none but itself, "last k" those of that
    many calendar months, "all" and "recent" every one. Never is a later month in any.
    """
    known = sorted({month, *(one for one in labelled if one < month)})
    found: dict[tuple[tuple[Month, ...], float | None], Window] = {}
    for name in windows.names:
        months = tuple(one for one in known if _age(one, month) < _reach(name))
        half_life = windows.half_life_months if name == "recent" and len(months) > 1 else None
        found.setdefault((months, half_life), Window(name, months, half_life))
    return list(found.values())


def earlier_months(windows: Windows) -> int | None:
    """How many calendar months before the newest the windows reach back at most; None for every one."""
    reach = max(map(_reach, windows.names))
    return None if np.isinf(reach) else int(reach) - 1


def _reach(name: str) -> float:
    """How many calendar months a window may have."""
    if name.startswith("last "):
        return int(name.removeprefix("last "))
    return 1 if name == MONTH_ALONE else np.inf


def _age(month: Month, newest: Month) -> int:
    return (newest.year - month.year) * 12 + newest.number - month.number


def pool(window: Window, rows: Mapping[Month, pd.DataFrame]) -> pd.DataFrame:
    """The rows of the window's months as one frame for `training.fit` and `selection.select`; see `dataset.in_order`.

    Weights have a mean of 1. Rows of the newest month alone are as they were.
    """
    if len(window.months) == 1:
        return rows[window.months[0]]
    pooled = pd.concat([rows[month].assign(**{MONTH: str(month)}) for month in window.months], ignore_index=True)
    if window.half_life_months is None:
        return pooled
    weights = np.repeat([window.weight(month) for month in window.months], [len(rows[one]) for one in window.months])
    return pooled.assign(**{WEIGHT: weights / weights.mean()})


def _told(window: Window) -> str:
    first, last = window.months[0], window.months[-1]
    return f"“{window.name}” ({last if first == last else f'{first} to {last}'})"


def _reason_for_the_only(window: Window) -> str:
    if len(window.months) == 1:
        return f"{window.months[0]} is learned from alone: there was no other month to choose."
    return f"{_told(window)} was the only window to choose."


def as_table(choice: Choice) -> pd.DataFrame:
    """A row for each window that was compared, simplest first, with the columns of `WindowScore`, months as one."""
    return pd.DataFrame([{**asdict(score), "months": " ".join(score.months)} for score in choice.scores])


def choose(
    windows: Sequence[Window],
    rows: Mapping[Month, pd.DataFrame],
    label: str,
    service: FeatureService,
    config: TrainingConfig,
    *,
    n_jobs: int = 1,
) -> Choice:
    """Choose among ``windows``, simplest first, by cross-validation among the training users of the newest month.

    ``rows`` has the training rows of each month. In the folds of `dataset.folds`, each window's rows of users outside
    the fold are learned from, by the configuration's estimator for windows on ``service``, and the fold's users of the
    newest month are predicted. The rule is that of `selection.select`.

    Neither ``n_jobs`` cores nor the order of rows or months change the result. Raises ConfigurationError and
    TrainingRefused as `training.fit` does.
    """
    if len(windows) == 1:
        (only,) = windows
        return Choice(only, _reason_for_the_only(only))
    from sklearn.metrics import roc_auc_score

    estimator = config.windows.estimator
    pooled = [in_order(pool(window, rows)) for window in windows]
    newest = [of_newest_month(one) for one in pooled]
    predictions = [selection.out_of_fold(one, label, [(estimator, service)], config, n_jobs)[0] for one in pooled]
    labels = pooled[0].loc[newest[0], label].to_numpy(dtype=np.bool_)
    probabilities = [
        prediction.probabilities[of_newest] for prediction, of_newest in zip(predictions, newest, strict=True)
    ]
    losses = [selection.losses(labels, one) for one in probabilities]
    differences = selection.differences_from_best(losses)
    chosen = selection.simplest(differences)
    scores = tuple(
        WindowScore(
            window.name,
            tuple(map(str, window.months)),
            window.half_life_months,
            len(pooled[index]),
            float(losses[index].mean()),
            float(roc_auc_score(labels, probabilities[index])),
            differences[index].mean,
            differences[index].standard_error,
            differences[index].within_one_standard_error,
            index == chosen,
            predictions[index].seconds,
        )
        for index, window in enumerate(windows)
    )
    return Choice(windows[chosen], selection.reason_for(chosen, [_told(one) for one in windows], scores), scores)
