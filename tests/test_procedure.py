from dataclasses import replace

import msgspec
import numpy as np
import pandas as pd
import pytest
from governed import policy
from test_dataset import handmade_dataset

from streamflow import procedure, value
from streamflow.contract import CONTRACT
from streamflow.dataset import TrainingDataset
from streamflow.errors import ConfigurationError, TrainingRefused
from streamflow.evaluation import intervals
from streamflow.gates import NOT_TAKEN
from streamflow.months import Month
from streamflow.policy import InvarianceRule, Policy
from streamflow.procedure import Procedure
from streamflow.training_config import TrainingConfig

JANUARY, FEBRUARY = Month(2024, 1), Month(2024, 2)


@pytest.fixture(scope="module")
def config(quick_training_file) -> TrainingConfig:
    return TrainingConfig.load(quick_training_file)


@pytest.fixture(scope="module")
def data() -> TrainingDataset:
    return handmade_dataset(600)


@pytest.fixture(scope="module")
def chosen(data, config):
    return procedure.run(data, Procedure.of(config, policy()))


@pytest.fixture(scope="module")
def baseline(data, config):
    return procedure.run(data, Procedure.of(config, policy(), estimator="random_forest_baseline"))


def with_protected(**changes) -> Policy:
    return policy(protected_attributes="predict", **changes)


# --- what is done ---------------------------------------------------------------------------------------------------


def test_one_line_of_policy_decides_whether_protected_attributes_may_be_predicted_from(config):
    measured, predicted = Procedure.of(config, policy()), Procedure.of(config, with_protected())
    assert [service.name for service in measured.services] == ["churn_v1", "churn_v2"]
    assert [service.name for service in predicted.services] == ["churn_v1", "churn_v2", "churn_v2_protected"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"estimator": "oracle"}, "there is no estimator 'oracle'; training.toml has logistic_regression, gradient_"),
        ({"service": "churn_v9"}, "there is no feature service 'churn_v9' to train on; training.toml has churn_v1, "),
        ({"service": "churn_v2_protected"}, 'set protected_attributes = "predict" in policy.toml'),
    ],
)
def test_what_cannot_be_done_is_said(config, asked, message):
    with pytest.raises(ConfigurationError) as refused:
        Procedure.of(config, policy(), **asked)
    assert message in str(refused.value)


def test_a_procedure_can_be_written_down_and_followed_again(config):
    for how in (
        Procedure.of(config, policy()),
        Procedure.of(config, with_protected(), estimator="gradient_boosting", service="churn_v2_protected"),
    ):
        document = msgspec.json.decode(msgspec.json.encode(how.document))
        assert Procedure.of_document(document) == how
        assert (document["seed"], document["config_digest"]) == (config.seed, config.digest)


# --- running it -----------------------------------------------------------------------------------------------------


def test_the_chosen_candidate_is_fitted_with_the_threshold_of_its_folds(chosen, data, config):
    selected = chosen.selection
    model = chosen.model
    assert (model.estimator, model.service, model.calibrated) == (
        selected.estimator,
        selected.service,
        selected.calibrated,
    )
    rows = data.training_rows
    threshold = value.choose_threshold(
        rows["churn_label"].to_numpy(), selected.probabilities, rows["monthly_fee"].to_numpy(), config, customers=600
    )
    assert (model.threshold, chosen.threshold_reason) == (threshold.threshold, threshold.reason)
    assert chosen.scorer.threshold == threshold.threshold
    assert chosen.parity.holds
    assert chosen.parity.rows == 600
    assert (procedure.score(chosen.scorer, data.frame) == chosen.probabilities).all()


def test_by_name_nothing_is_chosen(baseline):
    model = baseline.model
    assert baseline.selection is None
    assert (model.estimator, model.service.name) == ("random_forest_baseline", "churn_v1")
    assert (model.calibrated, model.threshold) == (False, 0.5)


def test_held_out_labels_reach_neither_choice_nor_model(chosen, data, config):
    flipped = data.frame.assign(churn_label=data.labels ^ data.holdout)
    again = procedure.run(replace(data, frame=flipped), Procedure.of(config, policy()))
    assert again.selection.candidates[0].logloss == chosen.selection.candidates[0].logloss
    assert again.artifact_sha256 == chosen.artifact_sha256
    assert again.predictions_digest == chosen.predictions_digest


def test_the_order_of_rows_changes_nothing(chosen, data, config):
    shuffled = data.frame.sample(frac=1, random_state=3)
    again = procedure.run(replace(data, frame=shuffled), Procedure.of(config, policy()))
    assert again.predictions_digest == chosen.predictions_digest


def test_a_user_on_both_sides_is_refused(data, config):
    frame = pd.concat([data.frame, data.frame[:1]], ignore_index=True)
    twice = replace(data, frame=frame)
    sides = data.holdout.copy()
    twice.__dict__["holdout"] = np.append(sides, not sides[0])
    user = data.frame["user_id"][0]
    with pytest.raises(
        TrainingRefused, match=f"1 users to learn from in 2024-01 are in the hold-out of 2024-01, such as {user}"
    ):
        procedure.run(twice, Procedure.of(config, policy()))


# --- measuring it ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(chosen):
    return procedure.measure(chosen, policy())


def test_metrics_are_of_the_held_out_users_by_the_compiled_scorer(measured, chosen, data, config):
    evidence = measured.evidence
    assert (evidence.users, evidence.churned) == (data.holdout.sum(), data.labels[data.holdout].sum())
    assert evidence.metrics == intervals(
        data.labels[data.holdout],
        procedure.score(chosen.scorer, data.holdout_rows),
        chosen.model.threshold,
        seed=config.seed,
        draws=config.bootstrap_draws,
    )
    assert evidence.train_metrics["auc"] > evidence.metrics["auc"].low
    assert {one.attribute for one in evidence.fairness} == {"user_gender", "user_is_senior"}
    assert {one.attribute for one in evidence.segments} == {*config.segments.attributes, *config.segments.bands}
    assert evidence.protected == ()
    assert sorted(measured.importances["feature"]) == sorted(chosen.model.service.names)
    assert 0 < evidence.scoring_microseconds < 1e6


def test_what_only_registry_and_online_store_can_tell_counts_as_not_shown(measured):
    assert (measured.evidence.golden_rows_reproduced, measured.evidence.signature_fits) == (False, False)


def test_a_feature_that_knows_the_label_is_flagged(data, config):
    knowing = data.frame.assign(support_tickets_90d=data.labels.astype("int64") * 3)
    leaking = replace(data, frame=knowing)
    made = procedure.run(leaking, Procedure.of(config, policy(), estimator="logistic_regression"))
    assert procedure.measure(made, policy()).evidence.possible_leaks == {"support_tickets_90d": 1.0}


def test_no_honest_feature_is_flagged(measured):
    assert measured.evidence.possible_leaks == {}


def test_an_invariance_is_the_largest_move_of_any_score(baseline, data):
    rules = (
        InvarianceRule("user_gender", 0.0),
        InvarianceRule("paperless_billing", 1.0),
        InvarianceRule("net_service", 1.0),
        InvarianceRule("months_active", 1.0, add=7.0),
    )
    gender, billing, service, months = procedure.measure(baseline, policy(invariances=rules)).evidence.invariances
    assert (gender.change, gender.largest_difference) == (NOT_TAKEN, 0.0)

    rows = data.holdout_rows
    before = procedure.score(baseline.scorer, rows)

    def move(**changed) -> float:
        return float(np.abs(procedure.score(baseline.scorer, rows.assign(**changed)) - before).max())

    assert billing.largest_difference == move(paperless_billing=~rows["paperless_billing"]) > 0
    categories = ("DSL", "Fiber optic", "No")
    assert service.largest_difference == max(move(net_service=category) for category in categories) > 0
    assert months.largest_difference == move(months_active=rows["months_active"] + 7) > 0
    assert (billing.change, months.change) == ("every other value", "+7")


# --- two models, two months -----------------------------------------------------------------------------------------


def test_forward_in_time_is_on_the_held_out_users_of_the_later_month(chosen, config):
    later = replace(handmade_dataset(500, seed=9), month=FEBRUARY)
    found = procedure.forward(chosen.scorer, later, JANUARY, 0.4, config)
    assert (found.trained_on, found.month, found.users) == (JANUARY, FEBRUARY, later.holdout.sum())
    expected = intervals(
        later.labels[later.holdout],
        chosen.model.probabilities(later.holdout_rows),
        0.4,
        seed=config.seed,
        draws=config.bootstrap_draws,
    )
    assert found.metrics["auc"] == expected["auc"]


def test_two_models_are_compared_on_the_same_held_out_users(chosen, baseline, data, config):
    found = procedure.compare(data, chosen.scorer, baseline.scorer, config)
    back = procedure.compare(data, baseline.scorer, chosen.scorer, config)
    same = procedure.compare(data, chosen.scorer, chosen.scorer, config)
    assert found.users == data.holdout.sum()
    assert found.auc.value == pytest.approx(-back.auc.value)
    assert (same.auc.low, same.auc.value, same.auc.high) == (0, 0, 0)


def test_the_digest_of_predictions_is_of_users_and_bits():
    users, probabilities = ["b", "a", "c"], np.array([0.1, 0.2, 0.3])
    one = procedure.predictions_digest(users, probabilities)
    assert procedure.predictions_digest(["a", "b", "c"], np.array([0.2, 0.1, 0.3])) == one
    assert procedure.predictions_digest(users, np.nextafter(probabilities, 1)) != one
    assert procedure.predictions_digest(["b", "a", "d"], probabilities) != one


def test_every_feature_of_the_contract_is_in_a_dataset(data):
    assert list(data.frame) == ["user_id", *(column.name for column in CONTRACT.features), "churn_label"]


# --- another threshold ------------------------------------------------------------------------------------------------


def test_another_threshold_is_measured_as_if_the_model_had_been_made_with_it(chosen, data, config):
    measured = procedure.measure(chosen, policy())
    model = replace(chosen.model, threshold=0.6)
    anew = procedure.measure(replace(chosen, model=model), policy())

    found = procedure.at_threshold(measured.evidence, chosen.scorer, data, 0.6, config)
    took = found.scoring_microseconds
    assert found == msgspec.structs.replace(anew.evidence, scoring_microseconds=took)
    assert found.metrics["recall"] != measured.evidence.metrics["recall"]
    again = procedure.at_threshold(found, chosen.scorer, data, chosen.model.threshold, config)
    assert again == measured.evidence


def test_a_decision_may_flip_where_the_scorers_difference_reaches_across_the_threshold(chosen, data, config):
    evidence = procedure.measure(chosen, policy()).evidence
    score = float(chosen.probabilities[7])
    apart = msgspec.structs.replace(evidence, parity_difference=1e-12)
    exact = msgspec.structs.replace(evidence, parity_difference=0.0)

    assert procedure.at_threshold(apart, chosen.scorer, data, score + 5e-13, config).flipped_decisions >= 1
    assert procedure.at_threshold(apart, chosen.scorer, data, score + 5e-12, config).flipped_decisions == 0
    assert procedure.at_threshold(exact, chosen.scorer, data, score, config).flipped_decisions == 0
