from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from streamflow import bootstrap
from streamflow.bootstrap import (
    METRICS,
    Tally,
    bins_of,
    captured,
    generator,
    measurable,
    measure,
    observed,
    resampled,
)

AWKWARD = [0.0, 5e-324, 1e-17, 0.1, 0.3, np.nextafter(0.3, 0), 0.5, 0.7, 0.9, 1 - 2**-53, 1.0]
PROBABILITY = st.sampled_from(AWKWARD) | st.floats(0, 1)
WEIGHTED = {
    "auc": lambda labels, p, said, weights: sk.roc_auc_score(labels, p, sample_weight=weights),
    "average_precision": lambda labels, p, said, weights: sk.average_precision_score(labels, p, sample_weight=weights),
    "logloss": lambda labels, p, said, weights: sk.log_loss(labels, p, sample_weight=weights),
    "brier": lambda labels, p, said, weights: sk.brier_score_loss(labels, p, sample_weight=weights),
    "ece": lambda labels, p, said, weights: ece_by_hand(labels, p, weights),
    "accuracy": lambda labels, p, said, weights: sk.accuracy_score(labels, said, sample_weight=weights),
    "precision": lambda labels, p, said, weights: sk.precision_score(
        labels, said, sample_weight=weights, zero_division=0
    ),
    "recall": lambda labels, p, said, weights: sk.recall_score(labels, said, sample_weight=weights),
    "f1": lambda labels, p, said, weights: sk.f1_score(labels, said, sample_weight=weights),
}


def ece_by_hand(labels, probabilities, weights):
    error = 0.0
    for index in range(10):
        upper = probabilities < (index + 1) / 10 if index < 9 else probabilities <= 1
        inside = (probabilities >= index / 10) & upper
        users = weights[inside].sum()
        if users:
            churned = np.average(labels[inside], weights=weights[inside])
            error += users * abs(churned - np.average(probabilities[inside], weights=weights[inside]))
    return error / weights.sum()


@st.composite
def counted_users(draw):
    """Labels and probabilities of some users, and how often each was drawn in each of three draws."""
    users = draw(st.integers(2, 12))
    labels = np.array([True, False, *draw(st.lists(st.booleans(), min_size=users - 2, max_size=users - 2))])
    probabilities = np.array(draw(st.lists(PROBABILITY, min_size=users, max_size=users)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    counts = np.zeros((3, users), dtype=np.int64)
    for label in (True, False):
        group = np.flatnonzero(labels == label)
        counts[:, group] = rng.multinomial(len(group), np.full(len(group), 1 / len(group)), size=3)
    return labels, probabilities, counts


def tally_of(labels, probabilities, counts):
    levels = sorted(set(probabilities))

    def at_levels(mask):
        return np.array([[draw[mask & (probabilities == level)].sum() for level in levels] for draw in counts])

    return Tally(np.array(levels), at_levels(labels), at_levels(~labels))


@settings(deadline=None)
@given(counted_users(), PROBABILITY)
def test_each_metric_of_counts_is_scikit_learns_with_weights(users, threshold):
    labels, probabilities, counts = users
    found = measure(tally_of(labels, probabilities, counts), threshold, METRICS)
    said = probabilities >= threshold
    for name in METRICS:
        weighted = [WEIGHTED[name](labels, probabilities, said, weights) for weights in counts]
        assert found[name] == pytest.approx(weighted, rel=1e-12, abs=1e-12), name


@settings(deadline=None)
@given(counted_users())
def test_users_themselves_are_a_draw_of_each_once(users):
    labels, probabilities, _ = users
    one, other = observed(labels, probabilities), tally_of(labels, probabilities, np.ones((1, len(labels)), int))
    assert (one.levels == other.levels).all()
    assert (one.churned == other.churned).all()
    assert (one.stayed == other.stayed).all()
    assert (one.all_churned, one.all_stayed, one.users) == (labels.sum(), (~labels).sum(), len(labels))


def test_metrics_are_named_in_the_order_of_the_report():
    assert tuple(WEIGHTED) == METRICS


def test_an_empty_class_leaves_out_what_needs_it():
    assert measurable(np.array([True, False])) == METRICS
    assert measurable(np.array([False, False])) == ("brier", "ece", "accuracy", "precision")
    assert measurable(np.array([True])) == ("brier", "ece", "accuracy", "precision", "recall", "f1")


@pytest.mark.parametrize(
    ("probability", "expected"),
    [
        *[(0, 0), (np.nextafter(0.1, 0), 0), (0.1, 1), (np.nextafter(0.3, 0), 2), (0.3, 3), (0.6, 6), (0.7, 7)],
        *[(np.nextafter(0.9, 0), 8), (0.9, 9), (0.95, 9), (1.0, 9)],
    ],
)
def test_a_bin_has_its_lower_edge_and_the_last_one_both(probability, expected):
    assert bins_of(np.array([probability])).tolist() == [expected]


# Drawing


def drawn(labels, models, draws, seed=1):
    """The tallies of all draws, a tally per model."""
    parts = list(resampled(labels, models, np.random.default_rng(seed), draws))
    return [
        Tally(
            tallies[0].levels,
            np.concatenate([tally.churned for tally in tallies]),
            np.concatenate([tally.stayed for tally in tallies]),
        )
        for tallies in zip(*parts, strict=True)
    ]


@settings(deadline=None)
@given(counted_users(), st.integers(1, 30))
def test_every_draw_has_as_many_churned_and_stayed_users_as_there_are(users, draws):
    labels, probabilities, _ = users
    (tally,) = drawn(labels, [probabilities], draws)
    assert tally.churned.shape == tally.stayed.shape == (draws, len(set(probabilities)))
    assert (tally.churned.sum(axis=1) == labels.sum()).all()
    assert (tally.stayed.sum(axis=1) == (~labels).sum()).all()
    assert set(tally.levels[tally.churned.any(axis=0)]) <= set(probabilities[labels])
    assert set(tally.levels[tally.stayed.any(axis=0)]) <= set(probabilities[~labels])


def test_each_user_is_drawn_as_often_as_another_and_left_out_as_often_as_chance_does():
    labels = np.arange(40) < 10
    (tally,) = drawn(labels, [np.arange(40) / 40], 20_000)
    for counts, users in ((tally.churned[:, :10], 10), (tally.stayed[:, 10:], 30)):
        assert counts.mean(axis=0) == pytest.approx(np.ones(users), abs=0.035)
        assert (counts == 0).mean() == pytest.approx((1 - 1 / users) ** users, abs=0.005)


def test_the_same_users_are_drawn_for_all_models():
    labels = np.arange(50) % 3 == 0
    probabilities = np.random.default_rng(0).random(50)
    same, reversed_ = drawn(labels, [probabilities, 1 - probabilities], 40)
    assert (same.churned == reversed_.churned[:, ::-1]).all()
    assert (same.stayed == reversed_.stayed[:, ::-1]).all()


def test_many_users_are_drawn_in_parts_of_bounded_size(monkeypatch):
    assert list(bootstrap.chunks(1000, 3 * 2**20)) == [1] * 1000
    assert sum(bootstrap.chunks(1000, 1783)) == 1000
    assert max(bootstrap.chunks(1000, 1783)) * 1783 <= 2**18
    monkeypatch.setattr(bootstrap, "_CELLS", 25)
    labels = np.arange(10) < 3
    parts = list(resampled(labels, [np.arange(10) / 10], np.random.default_rng(0), 5))
    assert [len(tally.churned) for (tally,) in parts] == [2, 2, 1]


def test_a_generator_depends_on_seed_and_purpose_only():
    first = generator(1, "attribute", "value").random()
    assert generator(1, "attribute", "value").random() == first
    others = [generator(1), generator(2, "attribute", "value"), generator(1, "value", "attribute"), generator(1, "x")]
    assert first not in [other.random() for other in others]
    assert generator(7).random() == np.random.default_rng(7).random()


def test_an_interval_covers_95_percent_of_the_draws():
    found = bootstrap.interval(7, [np.arange(0.0, 500), np.arange(500.0, 1001)])
    assert (found.value, found.low, found.high) == (7, 25, 975)


# Capture


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.sampled_from([0.2, 0.5, 0.9])), min_size=1, max_size=5),
    st.integers(1, 5),
)
def test_capture_is_the_expectation_over_the_order_of_ties(users, contacted):
    users = [(True, 0.5), *users]
    contacted = min(contacted, len(users))
    labels = np.array([label for label, _ in users])
    probabilities = np.array([probability for _, probability in users])
    shares = []
    for order in permutations(range(len(users))):
        ranked = sorted(order, key=lambda user: -probabilities[user])
        shares.append(labels[ranked[:contacted]].sum() / labels.sum())
    found = captured(observed(labels, probabilities), contacted / len(users))
    assert found == pytest.approx([np.mean(shares)])


def test_capture_of_draws_counts_a_user_as_often_as_drawn():
    tally = Tally(np.array([0.1, 0.5, 0.9]), np.array([[1, 1, 0], [0, 0, 2]]), np.array([[2, 0, 0], [1, 0, 1]]))
    assert captured(tally, 0.25).tolist() == pytest.approx([1 / 2, (2 / 3) / 2])
    assert captured(tally, 0.75).tolist() == pytest.approx([1 / 2 + (2 / 3) / 2, 1])
    assert captured(tally, 1.0).tolist() == [1, 1]


MANY = 70_000


def many_users(seed=0):
    """More users than are drawn one by one, with probabilities that are true, some of them at the threshold of 0.3."""
    rng = np.random.default_rng(seed)
    probabilities = np.where(rng.random(MANY) < 0.01, 0.3, rng.random(MANY) ** 2)
    return rng.random(MANY) < probabilities, probabilities


def test_many_users_are_drawn_in_groups_that_lose_nothing_that_counts():
    labels, probabilities = many_users()
    assert bootstrap.MANY < MANY
    whole, grouped = observed(labels, probabilities), bootstrap._grouped(observed(labels, probabilities), 0.3)
    assert 1_000 < len(grouped.levels) < 1_100
    assert (np.diff(grouped.levels) > 0).all()
    assert (grouped.all_churned, grouped.all_stayed) == (whole.all_churned, whole.all_stayed)
    before, after = (measure(tally, 0.3, METRICS) for tally in (whole, grouped))
    for name in ("ece", "accuracy", "precision", "recall", "f1"):
        assert after[name][0] == pytest.approx(before[name][0], abs=1e-12)
    for name in ("auc", "average_precision", "logloss", "brier"):
        assert after[name][0] == pytest.approx(before[name][0], abs=1e-3)


def test_many_users_have_the_spread_of_draws_one_by_one(monkeypatch):
    labels, probabilities = many_users()

    def spreads():
        parts = list(bootstrap.drawn(labels, probabilities, 0.3, np.random.default_rng(1), 300))
        return {
            name: np.concatenate([measure(tally, 0.3, [name])[name] for tally in parts])
            for name in ("auc", "logloss", "ece", "recall")
        }

    in_groups = spreads()
    monkeypatch.setattr(bootstrap, "MANY", MANY)
    for name, one_by_one in spreads().items():
        assert len(one_by_one) == len(in_groups[name]) == 300
        assert in_groups[name].std() == pytest.approx(one_by_one.std(), rel=0.2)
        assert in_groups[name].mean() == pytest.approx(one_by_one.mean(), abs=0.3 * one_by_one.std())


def test_many_users_are_drawn_alike_in_any_order():
    labels, probabilities = many_users()
    order = np.random.default_rng(2).permutation(MANY)
    first, second = (
        next(bootstrap.drawn(*users, 0.3, np.random.default_rng(1), 3))
        for users in ((labels, probabilities), (labels[order], probabilities[order]))
    )
    assert (first.churned == second.churned).all()
    assert (first.stayed == second.stayed).all()
    assert first.churned.sum(axis=1).tolist() == [labels.sum()] * 3


def test_many_users_who_all_stayed_are_drawn_too():
    _, probabilities = many_users()
    (tally,) = bootstrap.drawn(np.zeros(MANY, dtype=bool), probabilities, 0.3, np.random.default_rng(1), 2)
    assert (tally.all_churned, tally.all_stayed) == (0, MANY)


def test_rounding_carries_no_group_over_the_threshold():
    labels = np.arange(MANY) % 3 == 0
    some = np.random.default_rng(0).random(1_000)
    rounded_down = some[some * MANY / MANY < some]
    assert len(rounded_down)
    for threshold in rounded_down[:3].tolist():
        grouped = bootstrap._grouped(observed(labels, np.full(MANY, threshold)), threshold)
        assert grouped.levels.tolist() == [threshold]
