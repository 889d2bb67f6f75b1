"""Backtest: simulated months replayed under fixed retraining policies, each judged on users that no model has seen.

Here belong the policies and the replay. How months come about is `simulate.py`'s, fitting is `training.py`'s. All of it
happens in memory and a temporary folder: no PostgreSQL, no feature store, no registry.
"""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from streamflow import landing, simulate, training
from streamflow.contract import CONTRACT, USER_ID, Contract, Table
from streamflow.dataset import EVENT_TIMESTAMP, TrainingDataset, assemble
from streamflow.errors import ConfigurationError
from streamflow.months import Month
from streamflow.training_config import TrainingConfig

Policy = Callable[[Sequence[Month]], Sequence[Month]]
"""Which months to train on, given those that are known, in order, when a new one arrives; a pure function."""

POLICIES: Mapping[str, Policy] = {
    "never retrain": lambda known: known[:1],
    "last month": lambda known: known[-1:],
    "all months": lambda known: known,
}
BEST_POSSIBLE = "best possible"
THRESHOLD = 0.5
"""Of the models; AUC does not depend on it."""


@dataclass(frozen=True)
class Backtest:
    """What each policy achieved: by month ``YYYY-MM``, from the second on, one AUC for each of ``policies``.

    The last of ``policies`` is ``BEST_POSSIBLE``: the AUC of the simulator's true probabilities.
    """

    policies: tuple[str, ...]
    auc: dict[str, tuple[float, ...]]


@dataclass(frozen=True, eq=False)
class _SimulatedMonth:
    """A month's dataset, and the true probability of churn of each of its held-out rows."""

    dataset: TrainingDataset
    truth: NDArray[np.float64]

    def auc(self, scores: NDArray[np.float64]) -> float:
        """The AUC of a score for each held-out row; raises ConfigurationError where all of them have one label."""
        from sklearn.metrics import roc_auc_score

        labels = self.dataset.labels[self.dataset.holdout]
        if len(np.unique(labels)) < 2:
            which = f"the {len(labels)} held-out users of {self.dataset.month}"
            raise ConfigurationError(f"{which} do not have both values of {self.dataset.label}; simulate more users")
        return float(roc_auc_score(labels, scores))


def backtest(
    months: Sequence[Month],
    *,
    users: int,
    seed: int,
    concept_drift_from: Month | None,
    config: TrainingConfig,
    contract: Contract = CONTRACT,
) -> Backtest:
    """Replay simulated months: each from the second on is scored by the model that each policy had when it arrived.

    The model is the simplest that ``config`` has. It learns from the users outside the hold-out and is judged on those
    inside it, the same ones in every month. Raises ConfigurationError for fewer than two months, months that do not
    ascend, and what cannot be simulated, TrainingRefused for too few users to learn from.
    """
    if len(months) < 2:
        raise ConfigurationError("a backtest needs at least 2 months: one to learn from and one to score")
    scenario = simulate.Scenario(concept_drift_from=concept_drift_from)
    with tempfile.TemporaryDirectory(prefix="streamflow-backtest-") as scratch:
        folder = Path(scratch)
        simulate.simulate(folder, months, users=users, seed=seed, scenario=scenario, contract=contract)
        return _replay({month: _read(folder, month, contract) for month in months}, config, contract)


def _replay(world: Mapping[Month, _SimulatedMonth], config: TrainingConfig, contract: Contract) -> Backtest:
    spec = training.ModelSpec(
        config.candidates[0], contract.service(config.services[0]), calibrated=False, threshold=THRESHOLD
    )

    @cache
    def model(window: tuple[Month, ...]) -> training.TrainedModel:
        rows = pd.concat([world[month].dataset.training_rows for month in window], ignore_index=True)
        return training.fit(rows, contract.label, spec, config, n_jobs=os.cpu_count() or 1)

    months = tuple(world)
    auc = {}
    for at, month in enumerate(months[1:], start=1):
        unseen = world[month].dataset.holdout_rows
        windows = [tuple(policy(months[:at])) for policy in POLICIES.values()]
        scores = [model(window).probabilities(unseen) for window in windows]
        auc[str(month)] = tuple(world[month].auc(score) for score in (*scores, world[month].truth))
    return Backtest((*POLICIES, BEST_POSSIBLE), auc)


def _read(folder: Path, month: Month, contract: Contract) -> _SimulatedMonth:
    def table(wanted: Table) -> pd.DataFrame:
        data = (folder / str(month) / wanted.file).read_bytes()
        rows: pd.DataFrame = landing.parse(data, wanted, month).values.to_pandas()
        return rows.set_index(USER_ID)

    views = [table(view.table)[[column.name for column in view.columns]] for view in contract.views]
    features = pd.concat(views, axis="columns").assign(**{EVENT_TIMESTAMP: month.event_time}).reset_index()
    labels = table(contract.label_table).reset_index()
    dataset = assemble(features, labels, month=month, label_month=month, contract=contract)
    truth = pd.read_csv(folder / simulate.TRUTH_FOLDER / f"{month}.csv", dtype={USER_ID: str}, index_col=USER_ID)
    return _SimulatedMonth(dataset, truth.loc[dataset.holdout_rows[USER_ID], simulate.TRUTH].to_numpy(np.float64))
