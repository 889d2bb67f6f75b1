"""The stratified bootstrap: users drawn with replacement, as counts, and every metric of all draws at once.

Drawing, counting and the metrics of counts belong here. What they are asked of (segments, comparisons, fairness), and
the metrics of the users themselves by scikit-learn, are `evaluation.py`'s.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamflow.scoring import decide

Labels = NDArray[np.bool_]
Probabilities = NDArray[np.float64]
Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

BINS = 10
BIN_EDGES = np.arange(BINS + 1) / BINS
METRICS = ("auc", "average_precision", "logloss", "brier", "ece", "accuracy", "precision", "recall", "f1")
_NEED_BOTH = ("auc", "average_precision", "logloss")
_NEED_CHURNED = ("recall", "f1")
_COVERED = (2.5, 97.5)
_CELLS = 2**18
MANY = 2**16
"""More users than this are drawn in groups of like probability; see `drawn`."""
_GROUPS = 2**10


@dataclass(frozen=True)
class Interval:
    """A figure of the users themselves, and the 2.5 % and 97.5 % quantiles of it over draws.

    Nothing centres the quantiles on ``value``: a figure that noise increases, such as ECE, may be below ``low``.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Tally:
    """How many of the users drawn churned and stayed at each distinct probability.

    ``levels`` has the distinct probabilities in ascending order, ``churned`` and ``stayed`` are of shape (draws,
    levels). Every draw has as many churned and as many stayed in total.
    """

    levels: Probabilities
    churned: Counts
    stayed: Counts

    @property
    def all_churned(self) -> int:
        """The churned users of each draw."""
        return int(self.churned[0].sum())

    @property
    def all_stayed(self) -> int:
        """The users of each draw who stayed."""
        return int(self.stayed[0].sum())

    @property
    def users(self) -> int:
        """The users of each draw."""
        return self.all_churned + self.all_stayed


def generator(seed: int, *purpose: str) -> np.random.Generator:
    """The random numbers for one purpose, independent of those for any other, from ``seed`` on."""
    digests = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in purpose]
    return np.random.default_rng([seed, *(int.from_bytes(digest) for digest in digests)])


def canonical_order(*columns: NDArray[np.generic]) -> NDArray[np.intp]:
    """The order of users by the first column, then the second and so on.

    Users that it leaves in the order of their rows are equal in all columns, so nothing can depend on that order.
    """
    return np.lexsort(columns[::-1])


def bins_of(probabilities: Probabilities) -> NDArray[np.intp]:
    """Which of the ten bins [0, 0.1), ..., [0.9, 1] each probability is in, from 0."""
    return np.minimum(np.searchsorted(BIN_EDGES, probabilities, side="right") - 1, BINS - 1)


def chunks(draws: int, users: int) -> Iterator[int]:
    """The number of draws, in parts that are small enough to be worked on at once."""
    size = max(1, _CELLS // max(1, users))
    for start in range(0, draws, size):
        yield min(size, draws - start)


def observed(labels: Labels, probabilities: Probabilities) -> Tally:
    """The users themselves, as one draw."""
    levels, level_of = np.unique(probabilities, return_inverse=True)
    churned, stayed = (np.bincount(level_of[mask], minlength=len(levels))[np.newaxis] for mask in (labels, ~labels))
    return Tally(levels, churned, stayed)


def resampled(
    labels: Labels, models: Sequence[Probabilities], rng: np.random.Generator, draws: int
) -> Iterator[tuple[Tally, ...]]:
    """Draw as many churned and as many stayed users as there are, with replacement, ``draws`` times.

    Yields a part of the draws at a time, as one tally for the probabilities of each of ``models``: the same users are
    drawn for all of them.
    """
    order = canonical_order(*models, labels)
    churned, stayed = (order[labels[order] == label] for label in (True, False))
    ranked = [np.unique(probabilities, return_inverse=True) for probabilities in models]
    for size in chunks(draws, len(labels)):
        drawn = [group[_with_replacement(rng, size, len(group))] for group in (churned, stayed)]
        yield tuple(
            Tally(levels, *(_count(level_of[users], len(levels)) for users in drawn)) for levels, level_of in ranked
        )


def drawn(
    labels: Labels, probabilities: Probabilities, threshold: float, rng: np.random.Generator, draws: int
) -> Iterator[Tally]:
    """As `resampled` for one model; of more than ``MANY`` users, in the time that a thousand take.

    Those are put into some ``_GROUPS`` groups of neighbouring probabilities, on one side of the threshold and in one
    bin of ECE each, and stand at their group's mean. How many a draw has of each group is multinomial, which is what
    drawing with replacement means; only what tells users of a group apart is lost, a thousandth of the pairs of AUC.
    """
    if len(labels) <= MANY:
        yield from (tally for (tally,) in resampled(labels, [probabilities], rng, draws))
        return
    grouped = _grouped(observed(labels, probabilities), threshold)
    for size in chunks(draws, len(grouped.levels)):
        churned, stayed = (
            rng.multinomial(counts.sum(), counts / max(counts.sum(), 1), size)
            for counts in (grouped.churned[0], grouped.stayed[0])
        )
        yield Tally(grouped.levels, churned, stayed)


def _grouped(tally: Tally, threshold: float) -> Tally:
    """The users of one draw in groups, each at its mean probability."""
    users = tally.churned[0] + tally.stayed[0]
    place_of = (users.cumsum() - users) * _GROUPS // users.sum()
    parts = (place_of, bins_of(tally.levels), decide(tally.levels, threshold))
    starts = np.flatnonzero(np.any([np.diff(part.astype(np.int64), prepend=-1) for part in parts], axis=0))
    churned, stayed = (np.add.reduceat(counts[0], starts)[np.newaxis] for counts in (tally.churned, tally.stayed))
    means = np.add.reduceat(tally.levels * users, starts) / (churned + stayed)[0]
    # Rounding must not carry a group over the threshold or into another bin.
    means = np.clip(means, tally.levels[starts], tally.levels[np.append(starts[1:], len(users)) - 1])
    return Tally(means, churned, stayed)


def _with_replacement(rng: np.random.Generator, draws: int, users: int) -> NDArray[np.int64]:
    return rng.integers(users, size=(draws, users)) if users else np.empty((draws, 0), dtype=np.int64)


def _count(drawn: NDArray[np.intp], levels: int) -> Counts:
    cells = drawn + np.arange(len(drawn))[:, np.newaxis] * levels
    return np.bincount(cells.ravel(), minlength=len(drawn) * levels).reshape(len(drawn), levels)


def interval(value: float, samples: Iterable[Floats]) -> Interval:
    """The 95 % percentile interval of a figure from its values over draws, given in parts."""
    low, high = np.percentile(np.concatenate(list(samples)), _COVERED)
    return Interval(float(value), float(low), float(high))


def auc(tally: Tally) -> Floats:
    """The chance that a churned user is ranked above one who stayed, a tie counting half, of each draw."""
    twice_beaten = 2 * (tally.stayed.cumsum(axis=1) - tally.stayed) + tally.stayed
    return _sums(twice_beaten * tally.churned) / (2 * tally.all_churned * tally.all_stayed)


def average_precision(tally: Tally) -> Floats:
    """The precision at each distinct probability, weighted by the recall that it adds, of each draw."""
    churned, stayed = tally.churned[:, ::-1], tally.stayed[:, ::-1]
    found = churned.cumsum(axis=1)
    precision = found / np.maximum(found + stayed.cumsum(axis=1), 1)
    return _sums(churned * precision) / tally.all_churned


def logloss(tally: Tally) -> Floats:
    """The mean negative natural logarithm of the probability given to what happened, of each draw.

    Probabilities are kept a machine epsilon away from 0 and 1, as scikit-learn does.
    """
    epsilon = np.finfo(np.float64).eps
    churned, stayed = (-np.log(np.clip(p, epsilon, 1 - epsilon)) for p in (tally.levels, 1 - tally.levels))
    return _sums(tally.churned * churned + tally.stayed * stayed) / tally.users


def brier(tally: Tally) -> Floats:
    """The mean squared difference between probability and label, of each draw."""
    return _sums(tally.churned * (1 - tally.levels) ** 2 + tally.stayed * tally.levels**2) / tally.users


def ece(tally: Tally) -> Floats:
    """The expected calibration error over ten bins (Guo et al. 2017, ICML), of each draw."""
    excess = tally.churned * (1 - tally.levels) - tally.stayed * tally.levels
    return calibration_error(tally.levels, excess, tally.users)


def calibration_error(probabilities: Probabilities, excess: Floats, users: int) -> Floats:
    """ECE from labels minus probabilities, summed where the ascending ``probabilities`` are equal: (draws, levels)."""
    starts = np.flatnonzero(np.diff(bins_of(probabilities), prepend=-1))
    return _sums(np.abs(np.add.reduceat(excess, starts, axis=1))) / users


def captured(tally: Tally, share: float) -> Floats:
    """The share of churned users among the ``share`` of users with the highest probabilities, of each draw.

    Of users tied at the boundary as many count as there is room for, churned and stayed in proportion: the expectation
    of drawing among them.
    """
    churned = tally.churned[:, ::-1]
    users = churned + tally.stayed[:, ::-1]
    room = np.clip(share * tally.users - (users.cumsum(axis=1) - users), 0, users)
    return _sums(churned * (room / np.maximum(users, 1))) / tally.all_churned


def _sums(cells: NDArray[Any]) -> Floats:
    sums: Floats = cells.sum(axis=1).astype(np.float64)
    return sums


_OF_PROBABILITIES: Mapping[str, Callable[[Tally], Floats]] = {
    "auc": auc,
    "average_precision": average_precision,
    "logloss": logloss,
    "brier": brier,
    "ece": ece,
}


def measurable(labels: Labels) -> tuple[str, ...]:
    """The metrics that these users define: not all are when everybody stayed or everybody churned."""
    churned, stayed = bool(labels.any()), not labels.all()
    undefined = (() if churned and stayed else _NEED_BOTH) + (() if churned else _NEED_CHURNED)
    return tuple(name for name in METRICS if name not in undefined)


def measure(tally: Tally, threshold: float, names: Iterable[str]) -> dict[str, Floats]:
    """The named metrics of each draw; precision is 0 where nobody is predicted to churn."""
    decided = _of_decisions(tally, threshold)
    return {name: decided[name] if name in decided else _OF_PROBABILITIES[name](tally) for name in names}


def _of_decisions(tally: Tally, threshold: float) -> dict[str, Floats]:
    acted = decide(tally.levels, threshold)
    found, alarmed = tally.churned[:, acted].sum(axis=1), tally.stayed[:, acted].sum(axis=1)
    return {
        "accuracy": (found + tally.all_stayed - alarmed) / tally.users,
        "precision": found / np.maximum(found + alarmed, 1),
        "recall": found / max(tally.all_churned, 1),
        "f1": 2 * found / np.maximum(tally.all_churned + found + alarmed, 1),
    }
