"""Whether a month differs from the one that Production was trained on, per feature and in its scores: pure functions.

Significance and size are separate findings. Significance is a two-sample test, corrected for the number of features:
with many users it notices shifts that do not matter. Size is the population stability index (PSI): with few users it is
large by chance alone. What follows from both is `retraining.py`'s to decide; pictures are `plots.py`'s, the page for
people `drift_html.py`'s. No result depends on the order of rows, on the index, on a clock or on random numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from streamflow.contract import Column, Kind
from streamflow.errors import DriftRefused

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
Test = Literal["chi-squared", "Fisher", "Kolmogorov-Smirnov"]
Size = Literal["none", "small", "moderate", "large"]

ALPHA = 0.01
"""The chance that a month of unchanged distributions shows any significant drift: once in eight years of months."""
NEGLIGIBLE_PSI, MODERATE_PSI, LARGE_PSI = 0.001, 0.1, 0.25
"""From where on drift is small, moderate and large; the latter two are usual (Siddiqi 2006, Credit Risk Scorecards)."""
MOST_LEVELS = 30
"""Numbers with more distinct values than this, in both months together, are compared as continuous."""
LEAST_EXPECTED = 5
"""The users that a cell of a chi-squared test must be expected to have (Cochran 1954)."""
PSI_BINS = 10
PSI_PRIOR = 0.5
"""Users that each bin is given in addition, so that the PSI of an empty bin is finite."""
SCORE = Column("score", "float", "The probability of churn that the Production version gives.", low=0, high=1)

_SIZES: Mapping[Size, float] = {"none": 0.0, "small": NEGLIGIBLE_PSI, "moderate": MODERATE_PSI, "large": LARGE_PSI}


@dataclass(frozen=True)
class FeatureDrift:
    """How the values of one feature differ between the reference month and the current one.

    ``test`` is the one with the smaller p-value of up to two: of the values present, and of how many are ``missing``
    where any is; ``about`` says which it was. ``p_value`` covers both (Bonferroni), ``adjusted_p_value`` all features
    and the scores (Holm). ``effect`` is from 0 to 1: the largest distance between the two distribution functions of a
    Kolmogorov-Smirnov test, else Cramér's V. ``reference_missing`` and ``current_missing`` are shares of users,
    ``out_of_range`` is the share of current values outside the least and greatest value of the reference month, of a
    category of those that it does not have; of the reference month itself it is 0.
    """

    name: str
    kind: Kind
    test: Test
    about: Literal["values", "missing"]
    statistic: float
    p_value: float
    adjusted_p_value: float
    effect: float
    psi: float
    reference_missing: float
    current_missing: float
    out_of_range: float
    significant: bool
    size: Size


@dataclass(frozen=True)
class DriftReport:
    """What `compare` found: each feature, in the order of the model's, and the scores."""

    reference_users: int
    current_users: int
    features: tuple[FeatureDrift, ...]
    score: FeatureDrift

    def drifted(self, least: Size) -> tuple[str, ...]:
        """The features whose drift is significant and at least of that size, in the order of the model's."""
        wanted = _SIZES[least]
        return tuple(one.name for one in self.features if one.significant and _SIZES[one.size] >= wanted)

    @property
    def significant(self) -> tuple[str, ...]:
        """The features whose drift is significant, of whatever size."""
        return self.drifted("none")

    @property
    def large(self) -> tuple[str, ...]:
        """The features whose drift is significant and large; of few users, PSI alone is large by chance."""
        return self.drifted("large")

    @property
    def summary(self) -> str:
        """Both findings in one sentence."""
        found = [one for one in self.features if one.significant]
        if not found:
            return f"None of {len(self.features)} features drifts significantly, {self._of_scores('nor do', 'but')}."
        strongest = max(found, key=lambda one: one.psi)
        verb = "drifts" if len(found) == 1 else "drift"
        return (
            f"{len(found)} of {len(self.features)} features {verb} significantly ({', '.join(self.significant)}), "
            f"the most {strongest.name} with a PSI of {strongest.psi:.3f} ({strongest.size}), "
            f"{self._of_scores('but not', 'and so do')}."
        )

    def _of_scores(self, still: str, drifting: str) -> str:
        if not self.score.significant:
            return f"{still} the scores"
        does = "" if drifting == "and so do" else " do"
        return f"{drifting} the scores{does} (PSI {self.score.psi:.3f}, {self.score.size})"


def compare(
    reference: pd.DataFrame,
    current: pd.DataFrame,
    columns: Sequence[Column],
    *,
    reference_scores: Floats,
    current_scores: Floats,
) -> DriftReport:
    """Compare a month with the month that Production was trained on, feature by feature, and the scores it gives both.

    The frames have one row per user and at least ``columns``, values may be missing; the scores are probabilities.

    Categories, booleans and numbers of at most ``MOST_LEVELS`` distinct values are tested by chi-squared, which unlike
    Kolmogorov-Smirnov does not lose power where many users share a value. Cells of fewer than ``LEAST_EXPECTED``
    expected users are merged: of numbers with the next greater ones, of categories with the next more common ones.
    Where two cells are left and one is that small still, the p-value is that of Fisher's exact test. Other numbers are
    tested by Kolmogorov-Smirnov with its asymptotic p-value, which is too great rather than too small where users share
    values. Holm's correction (Holm 1979, Scandinavian Journal of Statistics 6) keeps the chance of any false alarm in a
    month at ``ALPHA``, however features depend on each other; Benjamini and Hochberg's bounds another rate.

    The PSI is the sum over bins of (p - q) ln(p / q), where p and q are shares of users. Numbers are in bins that start
    at the tenths of the reference month and end below the next; where all tenths are one value, bins are below it, at
    it and above it. Categories are in the cells of their chi-squared test. Missing values are a bin of their own.

    Raises DriftRefused that names month and column for no users, an absent column, and values that are infinite or no
    numbers where numbers are asked for.
    """
    for which, frame, scores in (("reference", reference, reference_scores), ("current", current, current_scores)):
        if frame.empty or not len(scores):
            raise DriftRefused(f"the {which} month has no users to compare; land it and score it first")
        if absent := [column.name for column in columns if column.name not in frame]:
            raise DriftRefused(f"the {which} month lacks the columns {', '.join(absent)}; run it again")
    compared = [_compared(column, reference[column.name], current[column.name]) for column in columns]
    compared.append(_compared(SCORE, pd.Series(reference_scores), pd.Series(current_scores)))
    adjusted = holm([one.p_value for one in compared])
    *features, score = (
        replace(one, adjusted_p_value=p, significant=p <= ALPHA) for one, p in zip(compared, adjusted, strict=True)
    )
    return DriftReport(len(reference), len(current), tuple(features), score)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number: each is at most alpha where Holm's procedure at alpha rejects."""
    given = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(given, kind="stable")
    adjusted = np.empty_like(given)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(given[order] * np.arange(len(given), 0, -1)))
    return [float(p) for p in adjusted]


def psi(reference: Counts, current: Counts) -> float:
    """The population stability index of users counted in the same bins, each bin given ``PSI_PRIOR`` users more."""
    p, q = ((counts + PSI_PRIOR) / (counts.sum() + PSI_PRIOR * len(counts)) for counts in (reference, current))
    return float(((p - q) * np.log(p / q)).sum())


def size_of(value: float) -> Size:
    """What a PSI is called."""
    return max((size for size in _SIZES if value >= _SIZES[size]), key=_SIZES.__getitem__)


@dataclass(frozen=True, eq=False)
class _Values:
    """The values of a column that are present, ascending, and how many are missing."""

    reference: Floats
    current: Floats
    missing: Counts


@dataclass(frozen=True)
class _Finding:
    test: Test
    about: Literal["values", "missing"]
    statistic: float
    p_value: float
    effect: float


def _compared(column: Column, reference: pd.Series, current: pd.Series) -> FeatureDrift:
    read = _categories if column.kind == "category" else _numbers
    values = read(column, reference, current)
    levels = np.union1d(_distinct(values.reference), _distinct(values.current))
    by_level = _merged(_by_level(values, levels)) if column.kind == "category" or len(levels) <= MOST_LEVELS else None
    found = [_kolmogorov_smirnov(values) if by_level is None else _contingency(by_level, "values")]
    bins = by_level if by_level is not None and column.kind == "category" else _tenths(values)
    users = np.array([len(reference), len(current)])
    if values.missing.any():
        bins = np.column_stack([bins, values.missing])
        found.append(_contingency(np.column_stack([values.missing, users - values.missing]), "missing"))
    strongest = min(found, key=lambda one: one.p_value)
    stability = psi(*bins)
    rates = values.missing / users
    return FeatureDrift(
        name=column.name,
        kind=column.kind,
        test=strongest.test,
        about=strongest.about,
        statistic=strongest.statistic,
        p_value=min(1.0, len(found) * strongest.p_value),
        adjusted_p_value=1.0,
        effect=strongest.effect,
        psi=stability,
        reference_missing=float(rates[0]),
        current_missing=float(rates[1]),
        out_of_range=_out_of_range(column, values),
        significant=False,
        size=size_of(stability),
    )


def _numbers(column: Column, reference: pd.Series, current: pd.Series) -> _Values:
    months = [_finite(column, which, month) for which, month in (("reference", reference), ("current", current))]
    present = [np.sort(month[~np.isnan(month)]) for month in months]
    missing = np.array([len(month) - len(kept) for month, kept in zip(months, present, strict=True)])
    return _Values(present[0], present[1], missing)


def _finite(column: Column, which: str, values: pd.Series) -> Floats:
    try:
        numbers = values.to_numpy(dtype=np.float64, na_value=np.nan)
    except (TypeError, ValueError) as error:
        raise DriftRefused(f"{column.name} of the {which} month is not {column.kind}: {error}") from None
    if infinite := int(np.isinf(numbers).sum()):
        raise DriftRefused(
            f"{column.name} of the {which} month is infinite for {infinite} users; correct the month and land it again"
        )
    return numbers


def _categories(_: Column, reference: pd.Series, current: pd.Series) -> _Values:
    """Categories as numbers: ranks by how common they are in both months, then by name."""
    codes, names = pd.factorize(pd.concat([reference, current], ignore_index=True).astype(object))
    common = np.bincount(codes[codes >= 0], minlength=len(names))
    rank = np.empty(len(names))
    rank[np.lexsort((names.astype(str), common))] = np.arange(len(names))
    months = np.split(codes, [len(reference)])
    present = [np.sort(rank[month[month >= 0]]) for month in months]
    return _Values(present[0], present[1], np.array([int((month < 0).sum()) for month in months]))


def _out_of_range(column: Column, values: _Values) -> float:
    if not len(values.current):
        return 0.0
    if not len(values.reference):
        return 1.0
    if column.kind == "category":
        return float((~np.isin(values.current, values.reference)).mean())
    return float(((values.current < values.reference[0]) | (values.current > values.reference[-1])).mean())


def _distinct(ascending: Floats) -> Floats:
    return ascending[np.append(True, ascending[1:] != ascending[:-1])] if len(ascending) else ascending


def _by_level(values: _Values, levels: Floats) -> Counts:
    """How many users of each month have each level, in the order of levels."""
    return np.array(
        [_counted(np.searchsorted(levels, month), len(levels)) for month in (values.reference, values.current)]
    )


def _counted(at: NDArray[np.intp], cells: int) -> Counts:
    return np.bincount(at, minlength=cells)


def _tenths(values: _Values) -> Counts:
    """How many users of each month are in the bins that start at the tenths of the reference month."""
    users = len(values.reference)
    if not users:
        return np.array([[0], [len(values.current)]])
    tenths = _distinct(values.reference[(np.arange(1, PSI_BINS) * users - 1) // PSI_BINS])
    if len(tenths) == 1:
        tenths = np.append(tenths, np.nextafter(tenths, np.inf))
    months = (values.reference, values.current)
    return np.array([_counted(np.searchsorted(tenths, month, side="right"), len(tenths) + 1) for month in months])


def _merged(table: Counts) -> Counts:
    """Counts by month and level with levels of too few users merged with what follows; the last, with what precedes.

    Where all would become one cell, the most common level is held against all others.
    """
    pooled, users = table.sum(axis=0), table.sum(axis=1)
    if len(pooled) < 3 or not users.all():
        return table
    least = LEAST_EXPECTED * users.sum() / users.min()
    starts, gathered = [0], 0
    for level, count in enumerate(pooled):
        gathered += count
        if gathered >= least and level + 1 < len(pooled):
            starts.append(level + 1)
            gathered = 0
    if gathered < least and len(starts) > 1:
        starts.pop()
    if len(starts) > 1:
        return np.add.reduceat(table, starts, axis=1)
    most = int(pooled.argmax())
    return np.column_stack([table[:, most], users - table[:, most]])


def _contingency(table: Counts, about: Literal["values", "missing"]) -> _Finding:
    """Pearson's chi-squared test of counts by month and cell, or Fisher's where two cells are too few users."""
    from scipy import stats

    table = table[:, table.any(axis=0)]
    if table.shape[1] < 2 or not table.any(axis=1).all():
        return _Finding("chi-squared", about, 0.0, 1.0, 0.0)
    result = stats.chi2_contingency(table, correction=False)
    effect = float(np.sqrt(result.statistic / table.sum()))
    if table.shape[1] == 2 and result.expected_freq.min() < LEAST_EXPECTED:
        exact = stats.fisher_exact(table)
        return _Finding("Fisher", about, float(result.statistic), float(exact.pvalue), effect)
    return _Finding("chi-squared", about, float(result.statistic), float(result.pvalue), effect)


def _kolmogorov_smirnov(values: _Values) -> _Finding:
    from scipy import stats

    if not len(values.reference) or not len(values.current):
        return _Finding("Kolmogorov-Smirnov", "values", 0.0, 1.0, 0.0)
    result = stats.ks_2samp(values.reference, values.current, method="asymp")
    distance = float(result.statistic)
    return _Finding("Kolmogorov-Smirnov", "values", distance, float(result.pvalue), distance)
