"""Explanations: what each feature of a customer contributes to the probability of churn.

Shapley values (Shapley 1953; Štrumbelj and Kononenko 2014) with the interventional value function: a feature that is
left out takes the values that it has among background customers, whatever the other features are (Janzing et al. 2020).
They are on the scale of the probability. Features are let in one after the other in sampled orders, each order also
reversed, which lowers the variance (Mitchell et al. 2022, JMLR 23:43). Along every order the contributions add up to
the probability less the background's mean, and so do their means.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streamflow.scoring import Scorer

METHOD = "Shapley values by permutation sampling, each order also reversed"
VALUE_FUNCTION = "interventional: features left out take the background customers' values"
SCALE = "probability"
PAIRS = 8
SEED = 0

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Explanation:
    """``contributions`` of the features, in the scorer's order, and ``base`` add up to the customer's probability.

    ``base`` is the mean probability of the ``background`` customers, who are stored with the scorer; ``orders`` is how
    many orders of the features were sampled.
    """

    base: float
    contributions: dict[str, float]
    background: int
    orders: int


def explain(scorer: Scorer, row: Sequence[object]) -> Explanation:
    """Explain the probability of a row of Python values in the order of the scorer's features.

    The same scorer and row give the same contributions. Raises UnscorableFeatures as `Scorer.score` does.
    """
    background = scorer.numbers(scorer.golden_rows)
    base, contributions = shapley_values(
        scorer.score_numbers, scorer.numbers([row])[0], background, pairs=PAIRS, rng=np.random.default_rng(SEED)
    )
    names = [feature.name for feature in scorer.features]
    return Explanation(base, dict(zip(names, contributions.tolist(), strict=True)), len(background), 2 * PAIRS)


def shapley_values(
    value: Callable[[Floats], Floats], point: Floats, background: Floats, *, pairs: int, rng: np.random.Generator
) -> tuple[float, Floats]:
    """The mean of ``value`` over the background, and what each column of ``point`` adds to it.

    ``value`` takes rows and gives a number for each; ``point`` is one row, ``background`` are rows of the same columns.
    ``pairs`` random orders are used, and the same reversed.
    """
    columns = len(point)
    half = [rng.permutation(columns) for _ in range(pairs)]
    orders = np.array([order for one in half for order in (one, one[::-1])])
    # For each order, the mixtures after none, one, ... all of its columns come from the point, for each background row.
    let_in = np.argsort(orders, axis=1)[:, None, :] < np.arange(columns + 1)[None, :, None]
    mixtures = np.where(let_in[:, :, None, :], point, background[None, None])
    means = value(mixtures.reshape(-1, columns)).reshape(len(orders), columns + 1, len(background)).mean(axis=2)
    steps = np.empty((len(orders), columns))
    np.put_along_axis(steps, orders, np.diff(means, axis=1), axis=1)
    return float(means[0, 0]), steps.mean(axis=0)
