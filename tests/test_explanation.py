from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from test_dataset import handmade_dataset

from streamflow.contract import CONTRACT
from streamflow.explanation import explain, shapley_values
from streamflow.scoring import Scorer, UnscorableFeatures, compile_pipeline
from streamflow.settings import PROJECT_ROOT
from streamflow.training import ModelSpec, fit
from streamflow.training_config import TrainingConfig

CONFIG = TrainingConfig.load(PROJECT_ROOT / "training.toml")


def exact(value, point, background):
    """By definition: the mean over all orders of what each column adds when it is let in."""
    orders = list(permutations(range(len(point))))
    added = np.zeros(len(point))
    for order in orders:
        mixed = background.copy()
        before = value(mixed).mean()
        for column in order:
            mixed[:, column] = point[column]
            after = value(mixed).mean()
            added[column] += after - before
            before = after
    return added / len(orders)


def rng():
    return np.random.default_rng(1)


def test_an_additive_function_is_explained_exactly_by_any_orders():
    background = rng().normal(size=(7, 4))
    point = np.array([1.0, -2.0, 3.0, 0.5])
    base, found = shapley_values(
        lambda rows: rows[:, 0] + rows[:, 1] ** 2 - 2 * rows[:, 2], point, background, pairs=1, rng=rng()
    )
    means = background.mean(axis=0)
    by_hand = [1 - means[0], 4 - (background[:, 1] ** 2).mean(), -2 * (3 - means[2]), 0]
    assert found == pytest.approx(by_hand, abs=1e-12)
    assert base == pytest.approx((background[:, 0] + background[:, 1] ** 2 - 2 * background[:, 2]).mean())


def test_pairs_of_columns_that_act_together_are_explained_exactly():
    """Along an order and its reverse each of the two is let in before the other once."""

    def value(rows):
        return rows[:, 0] * rows[:, 1] + rows[:, 2] * rows[:, 3]

    background, point = rng().normal(size=(5, 4)), np.array([1.0, 2.0, -1.0, 0.5])
    _, found = shapley_values(value, point, background, pairs=1, rng=rng())
    assert found == pytest.approx(exact(value, point, background), abs=1e-12)


def test_many_orders_approach_what_all_orders_give():
    def value(rows):
        return 1 / (1 + np.exp(-rows[:, 0] * rows[:, 1] * rows[:, 2] - rows[:, 3]))

    background, point = rng().normal(size=(6, 4)), np.array([1.0, 2.0, -1.0, 0.5])
    _, found = shapley_values(value, point, background, pairs=400, rng=rng())
    assert found == pytest.approx(exact(value, point, background), abs=0.005)


@settings(max_examples=50, deadline=None)
@given(
    arrays(float, 5, elements=st.floats(-10, 10)),
    arrays(float, (4, 5), elements=st.floats(-10, 10)),
    st.integers(0, 100),
)
def test_contributions_add_up_to_the_value(point, background, seed):
    def value(rows):
        return np.tanh(rows.sum(axis=1) * rows[:, 0])

    base, found = shapley_values(value, point, background, pairs=2, rng=np.random.default_rng(seed))
    assert base == pytest.approx(value(background).mean(), abs=1e-12)
    assert base + found.sum() == pytest.approx(value(point[None])[0], abs=1e-12)


@pytest.fixture(scope="module", params=["gradient_boosting", "logistic_regression"])
def scorer(request):
    data = handmade_dataset(400)
    spec = ModelSpec(request.param, CONTRACT.service("churn_v2"), calibrated=False, threshold=0.5)
    return Scorer.from_bytes(compile_pipeline(fit(data.training_rows, data.label, spec, CONFIG), data))


def test_a_customers_probability_is_explained(scorer):
    for row in scorer.golden_rows[:5]:
        found = explain(scorer, row)
        assert list(found.contributions) == [feature.name for feature in scorer.features]
        assert found.base == pytest.approx(scorer.golden_probabilities.mean(), abs=1e-12)
        assert found.base + sum(found.contributions.values()) == pytest.approx(scorer.score([row])[0], abs=1e-12)
        assert found.contributions != dict.fromkeys(found.contributions, 0.0)
        assert explain(scorer, row) == found
    assert (found.background, found.orders) == (32, 16)


def test_a_feature_that_says_nothing_contributes_nothing(scorer):
    """With the background's one value of a feature, letting it in changes nothing."""
    rows = scorer.numbers(scorer.golden_rows)
    rows[:, 3] = rows[0, 3]
    _, found = shapley_values(scorer.score_numbers, rows[0], rows, pairs=2, rng=rng())
    assert found[3] == 0


def test_what_cannot_be_scored_cannot_be_explained(scorer):
    with pytest.raises(UnscorableFeatures):
        explain(scorer, [None] * len(scorer.features))
