import math
from dataclasses import asdict
from fractions import Fraction

import msgspec
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from streamflow.errors import ConfigurationError, TrainingRefused
from streamflow.scoring import decide
from streamflow.settings import PROJECT_ROOT
from streamflow.training_config import Threshold, TrainingConfig, Value
from streamflow.value import CostMatrix, choose_threshold, cost_matrix, expected, realized, report

VALUE = Value(contact_cost=20, retained_share=0.25, months_retained=4)
DECLARED = TrainingConfig.load(PROJECT_ROOT / "training.toml")

LABELS = np.array([True, False, True, False, False])
PROBABILITIES = np.array([0.9, 0.8, 0.5, 0.2, 0.1])
FEES = np.array([100.0, 80.0, 50.0, 30.0, 20.0])


def config(threshold, value=VALUE):
    return msgspec.structs.replace(DECLARED, value=value, threshold=threshold)


def chosen(rule="value", labels=LABELS, probabilities=PROBABILITIES, fees=FEES, value=VALUE, customers=5, **keys):
    return choose_threshold(labels, probabilities, fees, config(Threshold(rule, **keys), value), customers=customers)


JUST_BELOW_ONE = 1 - 2**-53
EXTREME = st.sampled_from([0.0, 5e-324, 1e-12, 0.25, 0.5, 0.75, JUST_BELOW_ONE, 1.0])
WHOLE = st.integers(0, 200).map(float)
MONEY = st.builds(
    Value,
    contact_cost=st.integers(0, 60).map(float),
    retained_share=st.sampled_from([0.125, 0.25, 0.5, 1.0]),
    months_retained=st.integers(1, 12).map(float),
)
CUSTOMERS = st.lists(st.tuples(st.booleans(), EXTREME | st.floats(0, 1), WHOLE), min_size=1, max_size=25)


def columns(customers):
    labels, probabilities, fees = zip(*customers, strict=True)
    return np.array(labels), np.array(probabilities), np.array(fees)


def brute_force(labels, probabilities, fees, value):
    """The most that any threshold inside (0, 1) brings, and the fewest contacts that bring it, exactly."""
    reach = [level for level in set(probabilities) if level > 0 and (level < 1 or JUST_BELOW_ONE not in probabilities)]
    per_retained = Fraction(value.retained_share) * Fraction(value.months_retained)
    outcomes = []
    for level in reach:
        acted = probabilities >= level
        brings = sum(Fraction(fee) * per_retained for fee in fees[acted & labels])
        outcomes.append((brings - int(acted.sum()) * Fraction(value.contact_cost), -int(acted.sum())))
    return max(outcomes, default=(Fraction(0), 0))


# Amounts


def test_cost_matrix_by_hand():
    assert cost_matrix(100, VALUE) == CostMatrix(80, -20, 0, 0)


def test_expected_is_the_cost_matrix_weighted_by_the_probability():
    assert expected(PROBABILITIES, FEES, VALUE).tolist() == pytest.approx([70, 44, 5, -14, -18])
    matrix = cost_matrix(80, VALUE)
    assert expected(np.array([0.8]), np.array([80.0]), VALUE) == pytest.approx(
        0.8 * matrix.true_positive + 0.2 * matrix.false_positive
    )


def test_realized_is_the_cost_matrix_of_those_acted_on():
    acted = np.array([True, True, False, False, True])
    assert realized(LABELS, FEES, acted, VALUE) == 80 - 20 - 20
    assert realized(LABELS, FEES, np.zeros(5, bool), VALUE) == 0


def test_report_by_hand():
    assert asdict(report(LABELS, PROBABILITIES, FEES, 0.5, VALUE)) == pytest.approx(
        {
            "revenue_at_risk": 90 + 64 + 25 + 6 + 2,
            "expected_value": 70 + 44 + 5,
            "realized_value": 80 - 20 + 30,
            "acted": 3,
            "customers": 5,
            "value_per_contact": 30,
            "everybody": 80 - 20 + 30 - 20 - 20,
            "nobody": 0,
        }
    )


def test_report_of_a_threshold_that_nobody_reaches():
    found = report(LABELS, PROBABILITIES, FEES, 0.95, VALUE)
    assert (found.acted, found.expected_value, found.realized_value, found.value_per_contact) == (0, 0, 0, None)


@settings(deadline=None)
@given(CUSTOMERS, st.floats(0.001, 0.999), st.randoms())
def test_report_does_not_depend_on_the_order_of_customers(customers, threshold, random):
    shuffled = random.sample(customers, len(customers))
    cents = Value(contact_cost=19.99, retained_share=0.17, months_retained=6.3)
    first, second = (report(*columns(rows), threshold, cents) for rows in (customers, shuffled))
    assert first == second


# By value


def test_the_threshold_by_value_is_midway_below_the_last_customer_worth_contacting():
    found = chosen()
    assert (found.threshold, found.rule, found.acted, found.value) == (0.35, "value", 3, 90)
    assert found.reason == (
        "Contacting from a probability of 0.35 on brings the most: 3 of the 5 customers of the training folds, "
        "worth 90.00 in the currency of monthly_fee."
    )


def test_of_equal_values_the_one_with_fewest_contacts_is_chosen():
    free = chosen(value=Value(contact_cost=0, retained_share=0.25, months_retained=4), labels=PROBABILITIES > 0.85)
    assert (free.acted, free.threshold) == (1, pytest.approx(0.85))


@pytest.mark.parametrize("currency", np.linspace(0.1, 3, 30))
def test_values_that_differ_by_rounding_only_are_equal(currency):
    labels = np.array([True, False, False, False, True])
    costs = Value(contact_cost=currency, retained_share=0.4, months_retained=2.5)
    assert chosen(labels=labels, fees=np.full(5, 4 * currency), value=costs).acted == 1


def test_contacting_everybody_leaves_the_threshold_above_zero():
    found = chosen(labels=np.ones(5, bool), value=Value(contact_cost=1, retained_share=1, months_retained=1))
    assert (found.acted, found.threshold) == (5, 0.05)


@settings(deadline=None)
@given(CUSTOMERS, MONEY)
def test_the_threshold_by_value_is_that_of_brute_force(customers, value):
    labels, probabilities, fees = columns(customers)
    assume(value.retained_share * value.months_retained * fees.max() > value.contact_cost)
    most, contacts = brute_force(labels, probabilities, fees, value)
    if most <= 0:
        with pytest.raises(TrainingRefused, match="at no threshold"):
            chosen(labels=labels, probabilities=probabilities, fees=fees, value=value)
    else:
        found = chosen(labels=labels, probabilities=probabilities, fees=fees, value=value)
        assert 0 < found.threshold < 1
        assert (found.acted, found.value) == (-contacts, most)
        assert (probabilities >= found.threshold).sum() == found.acted


@settings(deadline=None)
@given(CUSTOMERS, MONEY, st.floats(0.01, 1000), st.randoms())
def test_the_currency_and_the_order_of_customers_do_not_matter(customers, value, rate, random):
    labels, probabilities, fees = columns(customers)
    shuffled = columns(random.sample(customers, len(customers)))
    assume(value.retained_share * value.months_retained * fees.max() > value.contact_cost)
    assume(brute_force(labels, probabilities, fees, value)[0] > 0)
    elsewhere = msgspec.structs.replace(value, contact_cost=value.contact_cost * rate)
    found = chosen(labels=labels, probabilities=probabilities, fees=fees, value=value)
    converted = chosen(labels=labels, probabilities=probabilities, fees=fees * rate, value=elsewhere)
    assert (converted.threshold, converted.acted) == (found.threshold, found.acted)
    assert converted.value == pytest.approx(found.value * rate)
    labels, probabilities, fees = shuffled
    assert chosen(labels=labels, probabilities=probabilities, fees=fees, value=value) == found


def test_a_cost_matrix_that_never_pays_is_refused():
    never = Value(contact_cost=100, retained_share=0.25, months_retained=4)
    with pytest.raises(ConfigurationError) as refused:
        chosen(value=never)
    assert str(refused.value) == (
        "the cost matrix of training.toml never pays: value.retained_share 0.25 times value.months_retained 4 times "
        "the highest monthly_fee 100 is 100, not more than value.contact_cost 100; correct them, or state another "
        'threshold.rule than "value"'
    )


def test_a_model_by_which_acting_never_pays_is_refused():
    with pytest.raises(TrainingRefused, match=r"at no threshold .* value.contact_cost 99 .* value.retained_share 0.25"):
        chosen(
            value=Value(contact_cost=99, retained_share=0.25, months_retained=4),
            labels=np.array([False, False, True, True, False]),
        )
    with pytest.raises(TrainingRefused, match="at no threshold"):
        chosen(probabilities=np.zeros(5))


# By capacity


@pytest.mark.parametrize(
    ("capacity", "customers", "acted", "threshold"),
    [(1, 5, 1, 0.85), (4, 10, 2, 0.65), (5, 10, 2, 0.65), (6, 10, 3, 0.35), (4, 5, 4, 0.15), (2, 10, 1, 0.85)],
)
def test_the_threshold_by_capacity_contacts_its_share_of_the_training_customers(capacity, customers, acted, threshold):
    found = chosen("capacity", capacity=capacity, customers=customers)
    assert (found.rule, found.acted, found.threshold) == ("capacity", acted, pytest.approx(threshold))
    assert f"keeps to the capacity of {capacity} of {customers} customers: {acted} of the 5 customers" in found.reason
    assert found.value == realized(LABELS, FEES, decide(PROBABILITIES, found.threshold), VALUE)


def test_tied_customers_do_not_exceed_the_capacity():
    tied = np.array([0.9, 0.5, 0.5, 0.5, 0.1])
    assert chosen("capacity", probabilities=tied, capacity=3).acted == 1
    assert chosen("capacity", probabilities=tied, capacity=4).acted == 4
    with pytest.raises(TrainingRefused, match="allows 3 of 5 training customers, but more than that share the highest"):
        chosen("capacity", probabilities=np.full(5, 0.4), capacity=3)


@settings(deadline=None)
@given(CUSTOMERS, st.integers(1, 60), st.integers(1, 60))
def test_capacity_is_never_exceeded_and_used_as_far_as_ties_allow(customers, capacity, month):
    labels, probabilities, fees = columns(customers)
    users = len(labels)
    assume(capacity < month)
    allowed = math.floor(Fraction(capacity * users, month))
    possible = [
        count
        for level in {*probabilities} - {0.0}
        for count in [(probabilities >= level).sum()]
        if count <= allowed and not (level == 1 and JUST_BELOW_ONE in probabilities)
    ]
    values = {"labels": labels, "probabilities": probabilities, "fees": fees, "capacity": capacity, "customers": month}
    if possible:
        found = chosen("capacity", **values)
        assert found.acted == max(possible)
        assert 0 < found.threshold < 1
    else:
        with pytest.raises((ConfigurationError, TrainingRefused), match=f"threshold.capacity = {capacity} of"):
            chosen("capacity", **values)


@pytest.mark.parametrize("capacity", [5, 6])
def test_a_capacity_for_all_customers_contacts_everybody(capacity):
    found = chosen("capacity", capacity=capacity)
    assert (found.acted, found.threshold) == (5, 1e-9)
    assert f"reaches everybody, as the capacity of {capacity} covers all 5 customers" in found.reason


def test_a_capacity_of_less_than_one_training_customer_is_refused():
    with pytest.raises(ConfigurationError, match=r"capacity = 1 of .*, of 6 customers, is less than one of 5 training"):
        chosen("capacity", capacity=1, customers=6)


# As stated


def test_a_fixed_threshold_is_taken_as_stated():
    found = chosen("fixed", fixed=0.8)
    assert (found.threshold, found.rule, found.acted, found.value) == (0.8, "fixed", 2, 60)
    assert "is threshold.fixed of training.toml" in found.reason


@pytest.mark.parametrize("rule", ["capacity", "fixed"])
def test_a_rule_without_its_key_is_refused(rule):
    with pytest.raises(ConfigurationError, match=f"needs threshold.{rule}"):
        chosen(rule)


@pytest.mark.parametrize(("rule", "keys"), [("capacity", {"capacity": 2}), ("fixed", {"fixed": 0.3})])
def test_rules_that_do_not_go_by_value_take_any_cost_matrix(rule, keys):
    assert chosen(rule, value=Value(contact_cost=1000, retained_share=0.1, months_retained=1), **keys).value < 0
