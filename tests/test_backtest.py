from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score
from test_dataset import contract_with_contract_type

from streamflow import backtest as module
from streamflow import training
from streamflow.backtest import BEST_POSSIBLE, POLICIES, Backtest, backtest
from streamflow.contract import CONTRACT
from streamflow.dataset import split
from streamflow.errors import ConfigurationError, TrainingRefused
from streamflow.months import Month
from streamflow.settings import PROJECT_ROOT
from streamflow.simulate import simulate
from streamflow.training_config import TrainingConfig

MONTHS = Month.parse_range("2024-01..2024-03")
JANUARY, FEBRUARY, MARCH = MONTHS


CONFIG = TrainingConfig.load(PROJECT_ROOT / "training.toml")
SIMPLEST = training.ModelSpec("logistic_regression", CONTRACT.service("churn_v1"), calibrated=False, threshold=0.5)


@pytest.fixture
def world(tmp_path: Path) -> dict[Month, module._SimulatedMonth]:
    simulate(tmp_path, MONTHS, users=400, seed=3)
    return {month: module._read(tmp_path, month, CONTRACT) for month in MONTHS}


@pytest.mark.parametrize(
    ("policy", "known", "expected"),
    [
        ("never retrain", [JANUARY], [JANUARY]),
        ("never retrain", MONTHS, [JANUARY]),
        ("last month", [JANUARY], [JANUARY]),
        ("last month", MONTHS, [MARCH]),
        ("all months", [JANUARY, FEBRUARY], [JANUARY, FEBRUARY]),
    ],
)
def test_what_each_policy_trains_on(policy: str, known: list[Month], expected: list[Month]) -> None:
    assert list(POLICIES[policy](known)) == expected


def test_the_models_of_each_policy_score_the_next_month(world: dict[Month, module._SimulatedMonth]) -> None:
    result = module._replay(world, CONFIG, CONTRACT)
    assert result.policies == ("never retrain", "last month", "all months", BEST_POSSIBLE)
    assert list(result.auc) == ["2024-02", "2024-03"]
    march = world[MARCH].dataset.frame
    unseen = march[split(march["user_id"].tolist())]

    def auc(*trained_on: Month) -> float:
        frame = pd.concat([world[month].dataset.frame for month in trained_on])
        learned = frame[~split(frame["user_id"].tolist())]
        model = training.fit(learned, "churn_label", SIMPLEST, CONFIG)
        return float(roc_auc_score(unseen["churn_label"], model.probabilities(unseen)))

    never, last, everything, _ = result.auc["2024-03"]
    assert never == auc(JANUARY)
    assert last == auc(FEBRUARY)
    assert everything == auc(JANUARY, FEBRUARY)
    assert len({never, last, everything}) == 3
    assert len(set(result.auc["2024-02"][:3])) == 1


def test_what_is_read_is_what_was_simulated(tmp_path: Path) -> None:
    folder, _ = simulate(tmp_path, [JANUARY, FEBRUARY], users=200, seed=5)
    read = module._read(tmp_path, JANUARY, CONTRACT)
    frame = read.dataset.frame
    assert list(frame) == ["user_id", *(column.name for column in CONTRACT.features), "churn_label"]
    assert len(frame) == 200
    assert read.dataset.dropped == 0
    fees = [line.split(",") for line in (folder / "subscriptions.csv").read_text().splitlines()]
    of = {row[0]: float(row[fees[0].index("monthly_fee")]) for row in fees[1:]}
    assert frame["monthly_fee"].tolist() == [of[user] for user in frame["user_id"]]
    truth = dict(line.split(",") for line in (tmp_path / ".truth" / "2024-01.csv").read_text().splitlines()[1:])
    unseen = frame["user_id"][split(frame["user_id"].tolist())]
    assert read.truth.tolist() == [float(truth[user]) for user in unseen]
    assert 20 < len(read.truth) < 80


def test_a_change_of_concept_breaks_the_old_model_and_a_new_one_recovers() -> None:
    result = backtest(MONTHS, users=2_000, seed=1, concept_drift_from=FEBRUARY, config=CONFIG)
    never, last, everything, best = result.auc["2024-03"]
    assert never < 0.55
    assert last > everything > never
    assert best > last > 0.58


def test_the_same_arguments_give_the_same_result_and_another_seed_another() -> None:
    def run(seed: int) -> Backtest:
        return backtest(MONTHS[:2], users=300, seed=seed, concept_drift_from=None, config=CONFIG)

    assert run(1) == run(1) != run(2)
    assert all(0 < value < 1 for value in run(1).auc["2024-02"])


def test_the_model_is_the_simplest_of_the_configuration_on_the_contract_given(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[training.ModelSpec] = []
    fit = training.fit

    def seen(rows: pd.DataFrame, label: str, spec: training.ModelSpec, *rest: Any, **options: Any) -> Any:
        fitted.append(spec)
        return fit(rows, label, spec, *rest, **options)

    monkeypatch.setattr(training, "fit", seen)
    candidates = ("gradient_boosting", "logistic_regression")
    config = msgspec.structs.replace(CONFIG, services=("churn_v2", "churn_v1"), candidates=candidates)
    wider = contract_with_contract_type()
    backtest(MONTHS[:2], users=300, seed=1, concept_drift_from=None, config=config, contract=wider)
    assert fitted == [training.ModelSpec("gradient_boosting", wider.service("churn_v2"), False, 0.5)]


def test_best_possible_is_the_truth_about_held_out_users(world: dict[Month, module._SimulatedMonth]) -> None:
    february = world[FEBRUARY]
    labels = february.dataset.labels[february.dataset.holdout]
    assert february.auc(np.where(labels, 1.0, 0.0)) == 1
    assert february.auc(february.truth) == roc_auc_score(labels, february.truth)


@pytest.mark.parametrize(
    ("months", "message"),
    [
        ([], "at least 2 months"),
        ([JANUARY], "at least 2 months"),
        ([FEBRUARY, JANUARY], "must ascend"),
        ([JANUARY, JANUARY], "must ascend"),
        ([JANUARY.shift(-1), JANUARY], "cannot be simulated"),
    ],
)
def test_months_that_cannot_be_replayed(months: list[Month], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        backtest(months, users=300, seed=1, concept_drift_from=None, config=CONFIG)


def test_too_few_users_to_learn_from() -> None:
    with pytest.raises(TrainingRefused, match="2024-01"):
        backtest(MONTHS[:2], users=4, seed=1, concept_drift_from=None, config=CONFIG)


def test_a_month_whose_held_out_users_are_all_alike(world: dict[Month, module._SimulatedMonth]) -> None:
    february = world[FEBRUARY]
    frame = february.dataset.frame.assign(churn_label=~february.dataset.holdout)
    alike = replace(february, dataset=replace(february.dataset, frame=frame))
    with pytest.raises(ConfigurationError, match="held-out users of 2024-02 do not have both values of churn_label"):
        alike.auc(february.truth)
