"""How good a model is: metrics with their uncertainty, by segment and against another model, as pure functions.

Numbers made of labels and probabilities belong here. Drawing with replacement is `bootstrap.py`'s, money is
`value.py`'s, pictures are `plots.py`'s; nothing here fits, stores or decides. No result depends on the order of rows.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from streamflow import bootstrap
from streamflow.bootstrap import METRICS as METRICS
from streamflow.bootstrap import Interval as Interval
from streamflow.bootstrap import Labels as Labels
from streamflow.bootstrap import Probabilities as Probabilities
from streamflow.contract import CONTRACT, USER_ID, Column, Contract
from streamflow.errors import ConfigurationError, TrainingRefused
from streamflow.scoring import decide
from streamflow.training_config import Segments

Groups = Mapping[str, NDArray[np.str_]]

SAMPLE_ROWS = 20


@dataclass(frozen=True)
class Metrics:
    """Scores on one set of users, all between 0 and 1 but logloss (natural logarithm).

    Of logloss, brier and ece (the expected calibration error over ten bins) less is better.
    """

    auc: float
    average_precision: float
    logloss: float
    brier: float
    ece: float
    accuracy: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Bin:
    """The users whose probability is from ``low`` to below ``high`` (1 included), and how many of them churned.

    Without users, ``mean_probability`` and ``churn_rate`` are NaN.
    """

    low: float
    high: float
    users: int
    mean_probability: float
    churn_rate: float


@dataclass(frozen=True)
class Segment:
    """The metrics of the users of one group; see `segments`."""

    attribute: str
    value: str
    users: int
    churned: int
    metrics: dict[str, Interval]


@dataclass(frozen=True)
class FairnessGap:
    """How far ``measure`` differs between the groups of an attribute; see `fairness`."""

    attribute: str
    measure: str
    gap: Interval
    groups: dict[str, float]


@dataclass(frozen=True)
class Capture:
    """What is found among the ``users`` with the highest probabilities, a ``share`` of all; see `capture`."""

    share: float
    users: int
    captured: Interval
    lift: Interval


@dataclass(frozen=True)
class SegmentComparison:
    """Candidate minus production on the same users of one segment, named ``attribute=value``."""

    name: str
    users: int
    auc: Interval


@dataclass(frozen=True)
class Comparison:
    """Candidate minus production on the same users."""

    users: int
    auc: Interval
    logloss: Interval
    segments: tuple[SegmentComparison, ...]


def metrics(labels: Labels, probabilities: Probabilities, threshold: float) -> Metrics:
    """Score probabilities against labels; precision, recall and F1 are 0 when nobody is predicted to churn.

    Raises TrainingRefused when the labels are all the same.
    """
    require_both(labels)
    return Metrics(**_points(labels, probabilities, threshold))


def intervals(
    labels: Labels, probabilities: Probabilities, threshold: float, *, seed: int, draws: int
) -> dict[str, Interval]:
    """Each metric with its 95 % percentile interval over ``draws`` stratified bootstrap draws.

    Raises TrainingRefused when the labels are all the same.
    """
    require_both(labels)
    return _intervals(labels, probabilities, threshold, bootstrap.generator(seed), draws)


def _intervals(
    labels: Labels, probabilities: Probabilities, threshold: float, rng: np.random.Generator, draws: int
) -> dict[str, Interval]:
    points = _points(labels, probabilities, threshold)
    parts = [
        bootstrap.measure(tally, threshold, points)
        for tally in bootstrap.drawn(labels, probabilities, threshold, rng, draws)
    ]
    return {name: bootstrap.interval(value, (part[name] for part in parts)) for name, value in points.items()}


def _points(labels: Labels, probabilities: Probabilities, threshold: float) -> dict[str, float]:
    """The metrics that these users define, of the users themselves."""
    from sklearn import metrics as sk

    order = bootstrap.canonical_order(probabilities, labels)
    labels, probabilities = labels[order], probabilities[order]
    predicted = decide(probabilities, threshold)
    computed: dict[str, Callable[[], float]] = {
        "auc": lambda: sk.roc_auc_score(labels, probabilities),
        "average_precision": lambda: sk.average_precision_score(labels, probabilities),
        "logloss": lambda: sk.log_loss(labels, probabilities),
        "brier": lambda: sk.brier_score_loss(labels, probabilities, pos_label=True),
        "ece": lambda: bootstrap.ece(bootstrap.observed(labels, probabilities))[0],
        "accuracy": lambda: sk.accuracy_score(labels, predicted),
        "precision": lambda: sk.precision_score(labels, predicted, zero_division=0),
        "recall": lambda: sk.recall_score(labels, predicted, zero_division=0),
        "f1": lambda: sk.f1_score(labels, predicted, zero_division=0),
    }
    return {name: float(computed[name]()) for name in bootstrap.measurable(labels)}


def require_both(labels: Labels) -> None:
    """Raise TrainingRefused when the labels are all the same."""
    if labels.all() or not labels.any():
        raise TrainingRefused(
            f"of {len(labels)} users to measure a model on {int(labels.sum())} churned; "
            "both churned users and users who stayed are needed: land a month with more users"
        )


def perfect_ece(probabilities: Probabilities, *, seed: int, draws: int) -> float:
    """The ECE that a perfectly calibrated model with these probabilities stays below in 95 % of cases.

    The 95 % quantile over ``draws`` sets of labels, each label drawn to be true with its user's probability.
    """
    probabilities, rng = np.sort(probabilities), bootstrap.generator(seed)
    users = len(probabilities)
    errors = [
        bootstrap.calibration_error(probabilities, (rng.random((size, users)) < probabilities) - probabilities, users)
        for size in bootstrap.chunks(draws, users)
    ]
    return float(np.quantile(np.concatenate(errors), 0.95))


def reliability(labels: Labels, probabilities: Probabilities) -> tuple[Bin, ...]:
    """The ten equal-width bins of probability that ECE is made of, lowest first, empty ones too."""
    order = bootstrap.canonical_order(probabilities, labels)
    labels, probabilities = labels[order], probabilities[order]
    bin_of = bootstrap.bins_of(probabilities)
    return tuple(
        _bin(
            float(bootstrap.BIN_EDGES[index]),
            float(bootstrap.BIN_EDGES[index + 1]),
            labels[inside],
            probabilities[inside],
        )
        for index in range(bootstrap.BINS)
        for inside in [bin_of == index]
    )


def _bin(low: float, high: float, labels: Labels, probabilities: Probabilities) -> Bin:
    if not len(labels):
        return Bin(low, high, 0, math.nan, math.nan)
    return Bin(low, high, len(labels), float(probabilities.mean()), float(labels.mean()))


def segment_groups(
    frame: pd.DataFrame, segments: Segments, contract: Contract = CONTRACT
) -> dict[str, NDArray[np.str_]]:
    """The group of each row by each attribute: its value as text, or the band that its number is in.

    Bands go from one edge to below the next and are named by it: "0-5", "6-11", "12+" for integers, "0 to <6" for
    other numbers. Raises ConfigurationError for an attribute that is no feature or is named twice, or is a float
    without bands, and for bands of what is no number or with edges that do not ascend.
    """
    columns = {column.name: column for column in contract.features}
    named = [*segments.attributes, *sorted(segments.bands)]
    if unknown := [name for name in named if name not in columns]:
        raise ConfigurationError(
            f"segments of training.toml names {', '.join(unknown)}, which is no column of the training dataset; "
            f"it has {', '.join(columns)}"
        )
    if repeated := sorted({name for name in named if named.count(name) > 1}):
        raise ConfigurationError(f"segments of training.toml names {', '.join(repeated)} more than once")
    values = {name: _values(frame[name], columns[name]) for name in segments.attributes}
    return values | {name: _bands(frame[name], columns[name], edges) for name, edges in sorted(segments.bands.items())}


def _values(values: pd.Series, column: Column) -> NDArray[np.str_]:
    if column.kind == "float":
        raise ConfigurationError(
            f"segments.attributes of training.toml names {column.name}, whose values are too many to be groups; "
            "give it edges in segments.bands"
        )
    return values.to_numpy().astype(np.str_)


def _bands(values: pd.Series, column: Column, edges: Sequence[float]) -> NDArray[np.str_]:
    if column.kind not in ("integer", "float"):
        raise ConfigurationError(f"segments.bands of training.toml names {column.name}, which is no number")
    if not edges or list(edges) != sorted(set(edges)):
        raise ConfigurationError(f"the edges of segments.bands.{column.name} in training.toml must ascend: {edges}")
    label = _band_of_integers if column.kind == "integer" else _band_of_floats
    bounds = [column.low, *edges, None]
    labels = np.array([label(low, high) for low, high in pairwise(bounds)], dtype=np.str_)
    return labels[np.searchsorted(edges, values.to_numpy(), side="right")]


def _band_of_integers(low: float | None, below: float | None) -> str:
    if low is None:
        return f"<{math.ceil(below or 0)}"
    if below is None:
        return f"{math.ceil(low)}+"
    first, last = math.ceil(low), math.ceil(below) - 1
    return f"{first}-{last}" if first < last else f"{first}"


def _band_of_floats(low: float | None, below: float | None) -> str:
    if low is None:
        return f"<{below:g}"
    return f"{low:g}+" if below is None else f"{low:g} to <{below:g}"


def _members(groups: Groups) -> Iterator[tuple[str, str, NDArray[np.bool_]]]:
    """Each attribute, each of its groups and who is in it: attributes as given, groups by number, then by text."""
    for attribute, group_of in groups.items():
        for value in sorted(set(group_of.tolist()), key=_by_number_then_text):
            yield attribute, value, group_of == value


def _by_number_then_text(value: str) -> tuple[float, str]:
    number = re.match(r"-?\d+(\.\d+)?(e[+-]\d+)?", value)
    return float(number[0]) if number else -math.inf, value


def segments(
    labels: Labels, probabilities: Probabilities, threshold: float, groups: Groups, *, seed: int, draws: int
) -> tuple[Segment, ...]:
    """The metrics of each group of users, with 95 % percentile intervals over stratified draws among its users.

    ``groups`` is as `segment_groups` makes it. A group whose users all stayed or all churned has none of the metrics
    that need both (AUC, average precision, logloss), and without a churned user neither recall nor F1. The draws of a
    group do not depend on which other groups there are.
    """
    return tuple(
        Segment(
            attribute,
            value,
            int(members.sum()),
            int(labels[members].sum()),
            _intervals(
                labels[members], probabilities[members], threshold, bootstrap.generator(seed, attribute, value), draws
            ),
        )
        for attribute, value, members in _members(groups)
    )


def fairness(
    labels: Labels, probabilities: Probabilities, threshold: float, groups: Groups, *, seed: int, draws: int
) -> tuple[FairnessGap, ...]:
    """How far recall, false positive rate and selection rate differ between the groups of each attribute.

    An equal recall is equal opportunity, and equal false positive rates with it are equalized odds (Hardt, Price,
    Srebro 2016, NeurIPS); the selection rate is the share of users predicted to churn. The gap is the largest minus
    the smallest rate. Its 95 % percentile interval is of the difference between those two groups over stratified
    draws within each, so that one that is mere noise has an interval around 0. A group without users to take the rate
    of is left out, and so is a gap with fewer than two groups.
    """
    counted: dict[str, dict[str, _Decided]] = {attribute: {} for attribute in groups}
    acted = decide(probabilities, threshold)
    for attribute, value, members in _members(groups):
        counted[attribute][value] = _Decided.of(
            labels[members], acted[members], bootstrap.generator(seed, attribute, value), draws
        )
    gaps = (
        _gap(attribute, measure, {value: rate(decided) for value, decided in by_value.items()})
        for attribute, by_value in counted.items()
        for measure, rate in _FAIRNESS.items()
    )
    return tuple(gap for gap in gaps if gap)


@dataclass(frozen=True, eq=False)
class _Decided:
    """Of one group, how many churned users and how many who stayed were acted on: first really, then in each draw.

    Drawing n users of whom k were acted on with replacement gives a binomial number of them, of n and k / n.
    """

    churned: int
    stayed: int
    found: NDArray[np.int64]
    alarmed: NDArray[np.int64]

    @classmethod
    def of(cls, labels: Labels, acted: NDArray[np.bool_], rng: np.random.Generator, draws: int) -> "_Decided":
        def counts(among: NDArray[np.bool_]) -> NDArray[np.int64]:
            users, hits = int(among.sum()), int((acted & among).sum())
            return np.append(hits, rng.binomial(users, hits / max(users, 1), draws))

        return cls(int(labels.sum()), int((~labels).sum()), counts(labels), counts(~labels))


_FAIRNESS: Mapping[str, Callable[[_Decided], NDArray[np.float64] | None]] = {
    "recall": lambda decided: decided.found / decided.churned if decided.churned else None,
    "false positive rate": lambda decided: decided.alarmed / decided.stayed if decided.stayed else None,
    "selection rate": lambda decided: (decided.found + decided.alarmed) / (decided.churned + decided.stayed),
}


def _gap(attribute: str, measure: str, rates: Mapping[str, NDArray[np.float64] | None]) -> FairnessGap | None:
    known = {value: rate for value, rate in rates.items() if rate is not None}
    if len(known) < 2:
        return None
    smallest, *_, largest = sorted(known.values(), key=lambda rate: float(rate[0]))
    gaps = largest - smallest
    values = {value: float(rate[0]) for value, rate in known.items()}
    return FairnessGap(attribute, measure, bootstrap.interval(gaps[0], [gaps[1:]]), values)


def capture(labels: Labels, probabilities: Probabilities, *, share: float = 0.1, seed: int, draws: int) -> Capture:
    """The share of all churned users that is found among ``share`` of the users, those with the highest probabilities.

    ``lift`` is that over ``share``: how many times more churned users than contacting as many at random would find.
    Exactly ``share`` of the users count: one on the boundary in part, and those tied there in expectation; ``users`` is
    that number, rounded. Intervals as in `intervals`. Raises TrainingRefused when the labels are all the same.
    """
    require_both(labels)
    found = float(bootstrap.captured(bootstrap.observed(labels, probabilities), share)[0])
    parts = [
        bootstrap.captured(tally, share)
        for (tally,) in bootstrap.resampled(labels, [probabilities], bootstrap.generator(seed), draws)
    ]
    return Capture(
        share,
        round(share * len(labels)),
        bootstrap.interval(found, parts),
        bootstrap.interval(found / share, [part / share for part in parts]),
    )


def lift_curve(labels: Labels, probabilities: Probabilities) -> pd.DataFrame:
    """Cumulative gains: a row for each distinct probability, highest first, if users were contacted down to it.

    ``share`` of all users is contacted, which is ``captured`` of all churned users and ``lift`` times as many as at
    random. Raises TrainingRefused when the labels are all the same.
    """
    require_both(labels)
    tally = bootstrap.observed(labels, probabilities)
    churned, stayed = (counts[0, ::-1].cumsum() for counts in (tally.churned, tally.stayed))
    curve = pd.DataFrame({"share": (churned + stayed) / len(labels), "captured": churned / labels.sum()})
    return curve.assign(lift=curve["captured"] / curve["share"])


def permutation_importances(
    probabilities_of: Callable[[pd.DataFrame], Probabilities],
    rows: pd.DataFrame,
    labels: Labels,
    names: Sequence[str],
    *,
    seed: int,
    repeats: int,
    threads: int = 1,
) -> pd.DataFrame:
    """How much AUC is lost when a feature's values are shuffled among the users (Breiman 2001), largest loss first.

    ``rows`` are held-out users with user_id, ``names`` the features to shuffle, each ``repeats`` (at least 2) times;
    ``probabilities_of`` takes such rows, all shuffles of a feature at once: ``repeats`` times as many.
    it is called by ``threads`` threads at once. ``importance`` is the mean loss, ``low`` and ``high`` its 95 % interval
    by Student's t over the shuffles: how well the mean is known for these users, not how it would differ for others.
    Raises TrainingRefused when the labels are all the same.
    """
    from scipy.special import stdtrit
    from sklearn.metrics import roc_auc_score

    require_both(labels)
    order = np.argsort(rows[USER_ID].to_numpy())
    rows, labels = rows.iloc[order].reset_index(drop=True), labels[order]

    intact = roc_auc_score(labels, probabilities_of(rows))
    repeated = pd.concat([rows] * repeats, ignore_index=True)

    def importance(name: str) -> tuple[str, float, float, float]:
        rng, values = bootstrap.generator(seed, name), rows[name].to_numpy()
        shuffled = np.concatenate([rng.permutation(values) for _ in range(repeats)])
        probabilities = probabilities_of(repeated.assign(**{name: shuffled})).reshape(repeats, len(rows))
        losses = [intact - roc_auc_score(labels, of_shuffle) for of_shuffle in probabilities]
        mean = float(np.mean(losses))
        margin = stdtrit(repeats - 1, 0.975) * float(np.std(losses, ddof=1)) / math.sqrt(repeats)
        return name, mean, mean - margin, mean + margin

    with ThreadPoolExecutor(threads) as pool:
        table = list(pool.map(importance, names))
    ranked = pd.DataFrame(table, columns=["feature", "importance", "low", "high"])
    return ranked.sort_values(["importance", "feature"], ascending=[False, True], ignore_index=True)


def compare(
    labels: Labels, candidate: Probabilities, production: Probabilities, groups: Groups, *, seed: int, draws: int
) -> Comparison:
    """Candidate minus production, with 95 % percentile intervals over draws of the same users for both.

    A positive AUC difference and a negative logloss difference speak for the candidate. ``groups`` is as
    `segment_groups` makes it; groups whose users all stayed or all churned are left out. Raises TrainingRefused when
    all the labels are the same.
    """
    require_both(labels)
    auc, logloss = _differences(labels, candidate, production, bootstrap.generator(seed), draws)
    segments = []
    for attribute, value, members in _members(groups):
        if 0 < labels[members].sum() < members.sum():
            rng = bootstrap.generator(seed, attribute, value)
            loss, _ = _differences(labels[members], candidate[members], production[members], rng, draws)
            segments.append(SegmentComparison(f"{attribute}={value}", int(members.sum()), loss))
    return Comparison(len(labels), auc, logloss, tuple(segments))


def _differences(
    labels: Labels, candidate: Probabilities, production: Probabilities, rng: np.random.Generator, draws: int
) -> tuple[Interval, Interval]:
    """The differences of AUC and logloss."""

    def differ(ours: bootstrap.Tally, theirs: bootstrap.Tally) -> NDArray[np.float64]:
        return np.stack([measure(ours) - measure(theirs) for measure in (bootstrap.auc, bootstrap.logloss)])

    points = differ(bootstrap.observed(labels, candidate), bootstrap.observed(labels, production))[:, 0]
    parts = [differ(*tallies) for tallies in bootstrap.resampled(labels, [candidate, production], rng, draws)]
    auc, logloss = (bootstrap.interval(point, [part[row] for part in parts]) for row, point in enumerate(points))
    return auc, logloss


def univariate_auc(rows: pd.DataFrame, labels: Labels, columns: Sequence[Column]) -> dict[str, float]:
    """How well each feature alone separates the classes: its AUC or, where it falls with churn, 1 minus it.

    Categories are ranked by their churn rate among these very users. That flatters a column of many categories; the
    contract's have three at most. Raises TrainingRefused when the labels are all the same.
    """
    from sklearn.metrics import roc_auc_score

    require_both(labels)
    found = {}
    for column in columns:
        values = rows[column.name]
        if not column.is_numeric:
            values = pd.Series(labels, index=rows.index).groupby(values).transform("mean")
        auc = float(roc_auc_score(labels, values.to_numpy(dtype=np.float64)))
        found[column.name] = max(auc, 1 - auc)
    return found


def prediction_sample(rows: pd.DataFrame, probabilities: Probabilities, threshold: float) -> pd.DataFrame:
    """Some users from the lowest to the highest probability, evenly spread: their row and the prediction.

    ``rows`` are held-out users with user_id, ``probabilities`` theirs in order.
    """
    predicted = rows.assign(probability=probabilities, prediction=decide(probabilities, threshold))
    ranked = predicted.sort_values(["probability", USER_ID], ignore_index=True)
    return ranked.iloc[_evenly(len(ranked), SAMPLE_ROWS)].reset_index(drop=True)


def _evenly(rows: int, wanted: int) -> NDArray[np.intp]:
    return np.linspace(0, rows - 1, min(rows, wanted)).round().astype(np.intp)
