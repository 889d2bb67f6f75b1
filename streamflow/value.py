"""Money: what acting on predictions costs and brings, and the threshold from which on acting is worth it.

Amounts are in the currency of the fee. A churner who is contacted stays with probability ``retained_share`` and
then pays the fee for ``months_retained`` months; every contact costs ``contact_cost``; not acting costs and brings
nothing. How good the probabilities are is `evaluation.py`'s. No result depends on the order of rows.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from streamflow.bootstrap import Floats, Labels, Probabilities, canonical_order
from streamflow.contract import CONTRACT
from streamflow.errors import ConfigurationError, TrainingRefused
from streamflow.scoring import decide
from streamflow.training_config import TrainingConfig, Value

JUST_ABOVE_ZERO = 1e-9
_ROUNDING = 1e-12


@dataclass(frozen=True)
class CostMatrix:
    """What acting (positive) or not (negative) on one customer brings, truly churning or not, in currency."""

    true_positive: float
    false_positive: float
    false_negative: float
    true_negative: float


@dataclass(frozen=True)
class ThresholdChoice:
    """The probability from which on customers are contacted, by which rule and why.

    ``acted`` counts the customers of the training folds at or above it, ``value`` is what contacting them would have
    brought, in currency.
    """

    threshold: float
    rule: Literal["value", "capacity", "fixed"]
    reason: str
    acted: int
    value: float


@dataclass(frozen=True)
class ValueReport:
    """A threshold in money, for customers whose labels are known.

    ``revenue_at_risk`` (currency/month) is the fees expected to be lost to churn. ``expected_value`` by the
    probabilities and ``realized_value`` by the labels are what contacting the ``acted`` of ``customers`` at or above
    the threshold brings, in currency; ``value_per_contact`` is the latter per customer contacted, None if none is.
    ``everybody`` and ``nobody`` are what contacting all customers, or none, would have brought.
    """

    revenue_at_risk: float
    expected_value: float
    realized_value: float
    acted: int
    customers: int
    value_per_contact: float | None
    everybody: float
    nobody: float = 0.0


def cost_matrix(fee: float, value: Value) -> CostMatrix:
    """What acting on a customer who pays ``fee`` (currency/month) brings."""
    return CostMatrix(_retained(value) * fee - value.contact_cost, -value.contact_cost, 0.0, 0.0)


def expected(probabilities: Probabilities, fees: Floats, value: Value) -> Floats:
    """What acting on each customer is expected to bring, in currency; ``fees`` are in currency/month."""
    return probabilities * _retained(value) * fees - value.contact_cost


def realized(labels: Labels, fees: Floats, acted: NDArray[np.bool_], value: Value) -> float:
    """What acting on the customers in ``acted`` brings, given who churns, in currency; ``fees`` are in currency/month.

    It is the expectation over whether each churner stays, not over who churns.
    """
    return math.fsum(_worth(labels, fees, value)[acted])


def _retained(value: Value) -> float:
    return value.retained_share * value.months_retained


def _worth(labels: Labels, fees: Floats, value: Value) -> Floats:
    return expected(labels.astype(np.float64), fees, value)


def choose_threshold(
    labels: Labels, probabilities: Probabilities, fees: Floats, config: TrainingConfig, *, customers: int
) -> ThresholdChoice:
    """The threshold that the rule of the configuration gives on the training folds, inside (0, 1).

    ``probabilities`` are of the training customers, each by a model that did not see them; ``fees`` (currency/month)
    and ``labels`` theirs; ``customers`` counts all of the month. A threshold between two probabilities lies midway: on
    one of them, the last bit of a customer's score would decide.

    Raises ConfigurationError for a cost matrix by which contacting certain churners cannot pay, a rule without its key,
    and a capacity of less than one training customer; TrainingRefused where no threshold brings more than it costs, or
    where too many customers share the highest probability for the capacity.
    """
    match config.threshold.rule:
        case "value":
            threshold, why = _most_valuable(labels, probabilities, fees, config.value), "brings the most"
        case "capacity":
            threshold, why = _within_capacity(probabilities, config.threshold.capacity, customers)
        case "fixed":
            threshold, why = _fixed(config.threshold.fixed), "is threshold.fixed of training.toml"
    acted = decide(probabilities, threshold)
    count, worth = int(acted.sum()), realized(labels, fees, acted, config.value)
    reason = (
        f"Contacting from a probability of {threshold:.4g} on {why}: {count:,} of the {len(labels):,} customers of the "
        f"training folds, worth {worth:,.2f} in the currency of {CONTRACT.fee}."
    )
    return ThresholdChoice(threshold, config.threshold.rule, reason, count, worth)


def _fixed(fixed: float | None) -> float:
    if fixed is None:
        raise ConfigurationError('threshold.rule = "fixed" in training.toml needs threshold.fixed, inside (0, 1)')
    return fixed


def _within_capacity(probabilities: Probabilities, capacity: int | None, customers: int) -> tuple[float, str]:
    if capacity is None:
        raise ConfigurationError('threshold.rule = "capacity" in training.toml needs threshold.capacity, in customers')
    if capacity >= customers:
        return JUST_ABOVE_ZERO, f"reaches everybody, as the capacity of {capacity:,} covers all {customers:,} customers"
    allowed = capacity * len(probabilities) // customers
    limit = f"threshold.capacity = {capacity} of training.toml, of {customers} customers,"
    if not allowed:
        raise ConfigurationError(f"{limit} is less than one of {len(probabilities)} training customers; raise it")
    thresholds, counts = _cuts(probabilities)
    within = np.flatnonzero(counts <= allowed)
    if not len(within):
        raise TrainingRefused(
            f"{limit} allows {allowed} of {len(probabilities)} training customers, "
            "but more than that share the highest probability; this model cannot tell whom to contact"
        )
    return float(thresholds[within[-1]]), f"keeps to the capacity of {capacity:,} of {customers:,} customers"


def _most_valuable(labels: Labels, probabilities: Probabilities, fees: Floats, value: Value) -> float:
    """The threshold with the highest realized value; the highest of those that differ by rounding only."""
    _require_that_it_can_pay(fees, value)
    worth = _worth(labels, fees, value)
    thresholds, counts = _cuts(probabilities)
    totals = worth[canonical_order(probabilities, worth)[::-1]].cumsum()[counts - 1]
    most, rounding = totals.max(initial=0.0), _ROUNDING * np.abs(worth).sum()
    if most <= rounding:
        raise TrainingRefused(
            "at no threshold does contacting customers bring more than it costs on the training folds; "
            f"lower value.contact_cost {value.contact_cost:g} or raise value.retained_share "
            f"{value.retained_share:g} or value.months_retained {value.months_retained:g} in training.toml if they are "
            'wrong, or state another threshold.rule than "value"'
        )
    return float(thresholds[np.argmax(totals >= most - rounding)])


def _require_that_it_can_pay(fees: Floats, value: Value) -> None:
    highest = float(fees.max())
    if _retained(value) * highest <= value.contact_cost:
        raise ConfigurationError(
            f"the cost matrix of training.toml never pays: value.retained_share {value.retained_share:g} times "
            f"value.months_retained {value.months_retained:g} times the highest {CONTRACT.fee} {highest:g} is "
            f"{_retained(value) * highest:g}, not more than value.contact_cost {value.contact_cost:g}; "
            'correct them, or state another threshold.rule than "value"'
        )


def _cuts(probabilities: Probabilities) -> tuple[Floats, NDArray[np.intp]]:
    """Every threshold inside (0, 1) that splits the customers, highest first, and how many are at or above each."""
    levels, counts = np.unique(probabilities, return_counts=True)
    above, below = levels[::-1], np.append(levels[::-1][1:], 0.0)
    midway = below + (above - below) / 2
    thresholds = np.where(midway > below, midway, above)
    inside = (thresholds > 0) & (thresholds < 1)
    return thresholds[inside], counts[::-1].cumsum()[inside]


def report(labels: Labels, probabilities: Probabilities, fees: Floats, threshold: float, value: Value) -> ValueReport:
    """What contacting the customers at or above ``threshold`` is worth; ``fees`` are in currency/month."""
    acted = decide(probabilities, threshold)
    count, worth = int(acted.sum()), realized(labels, fees, acted, value)
    return ValueReport(
        revenue_at_risk=math.fsum(probabilities * fees),
        expected_value=math.fsum(expected(probabilities, fees, value)[acted]),
        realized_value=worth,
        acted=count,
        customers=len(labels),
        value_per_contact=worth / count if count else None,
        everybody=realized(labels, fees, np.ones(len(labels), dtype=np.bool_), value),
    )
