"""The model card: one HTML page that tells what a model learned from, how good it is, for whom, and what was decided.

Saying things well belongs here, measuring and deciding elsewhere. The page needs no other file, no script and no
network. Its sections follow Mitchell et al. (2019), Model Cards for Model Reporting.
"""

import base64
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from streamflow.contract import CONTRACT
from streamflow.errors import ArtifactRefused
from streamflow.evaluation import Capture, FairnessGap, Interval, Segment
from streamflow.gates import NOT_TAKEN, Gate, Invariance
from streamflow.months import Month
from streamflow.plots import amount, percent, percent_with_interval, with_interval
from streamflow.scoring import Parity
from streamflow.training_config import Value
from streamflow.value import ValueReport, cost_matrix

if TYPE_CHECKING:
    from streamflow.procedure import Forward

PLOTS = (
    "roc.png",
    "precision_recall.png",
    "reliability.png",
    "scores.png",
    "value.png",
    "confusion_matrix.png",
    "lift.png",
    "segments.png",
    "importances.png",
)
METRICS = (
    ("auc", "AUC", "How often a churner gets a higher probability than a stayer; 0.5 knows nothing."),
    ("average_precision", "Average precision", "Precision over all thresholds; the churn rate knows nothing."),
    ("logloss", "Logloss", "How surprised it is by what happened; less is better."),
    ("brier", "Brier", "Mean squared error of the probabilities; less is better."),
    ("ece", "ECE", "How far probabilities are from churn rates, in ten bins; less is better."),
    ("accuracy", "Accuracy", "Decisions that are right, at the threshold."),
    ("precision", "Precision", "Of those predicted to churn, the share that does."),
    ("recall", "Recall", "Of those who churn, the share that is predicted to."),
    ("f1", "F1", "Harmonic mean of precision and recall."),
)
_DECISION, _FORWARD = "decision", "validation forward in time"
_UNDECIDED = "<p>Not registered yet, so nothing is decided: no gate was checked, and it serves nobody.</p>"
_NOT_VALIDATED = (
    "<p>Not known: no later month with labels is there yet to measure it on. How good it is on the customers of "
    "another month is an open question until then.</p>"
)
_IMPORTANCES = ["feature", "importance", "low", "high"]


@dataclass(frozen=True)
class Data:
    """How many customers a model was made of and measured on; ``churn_rate`` is of all ``rows``."""

    rows: int
    dropped: int
    churn_rate: float
    trained_on: int
    held_out: int
    held_out_churned: int


@dataclass(frozen=True, eq=False)
class Card:
    """What a model card tells.

    ``windows`` has the columns of `windows.as_table`, and no row where there was no choice of months; ``window_reason``
    says what was chosen of them, or why there was none.
    ``candidates`` has the columns of `selection.CandidateScore`, and no row for a model trained by name. ``train`` and
    ``validation`` have every metric of `evaluation.METRICS`. ``value`` is of the held-out users; the cost matrix is
    shown for a customer who pays ``fee`` (currency/month) under ``assumptions``. ``importances`` has the columns
    feature, importance, low and high, largest first. ``golden_rows`` counts the rows that the scorer tests itself by.
    ``plots`` are PNG by the names of `PLOTS`. ``lineage`` has month, dataset (digest), files (each with revision and
    digest), the same again in earlier for each other month that could be learned from, and window (the months that
    were), config_digest, code_version, seed, python and libraries.
    """

    month: Month
    as_of: date
    estimator: str
    service: str
    calibrated: bool
    threshold: float
    threshold_reason: str
    params: Mapping[str, Any]
    data: Data
    windows: pd.DataFrame
    window_reason: str
    candidates: pd.DataFrame
    reason: str
    train: Mapping[str, float]
    validation: Mapping[str, Interval]
    perfect_ece: float
    capture: Capture
    segments: tuple[Segment, ...]
    fairness: tuple[FairnessGap, ...]
    protected_used: tuple[str, ...]
    value: ValueReport
    assumptions: Value
    fee: float
    importances: pd.DataFrame
    forward: "Forward | None"
    parity: Parity
    golden_rows: int
    invariances: tuple[Invariance, ...]
    scoring_microseconds: float
    possible_leaks: Mapping[str, float]
    lineage: Mapping[str, Any]
    plots: Mapping[str, bytes]


@dataclass(frozen=True)
class _Image:
    uri: str
    width: int
    height: int

    @classmethod
    def of(cls, png: bytes) -> "_Image":
        width, height = struct.unpack(">II", png[16:24])
        return cls(f"data:image/png;base64,{base64.b64encode(png).decode()}", width, height)


def render(card: Card) -> str:
    """The card as one HTML page, nothing decided yet; the same card gives the same text.

    Raises ValueError unless ``plots`` are those of `PLOTS`.
    """
    if unlike := set(card.plots) ^ set(PLOTS):
        raise ValueError(f"a model card shows the plots {', '.join(PLOTS)}; lacking or unknown: {', '.join(unlike)}")
    forward = _forward(card.forward, card.validation) if card.forward else _NOT_VALIDATED
    return (
        _environment()
        .get_template("model_card.html.jinja")
        .render(
            card=card,
            undecided=_placed(_DECISION, _UNDECIDED),
            forward=_placed(_FORWARD, forward),
            images={name: _Image.of(png) for name, png in card.plots.items()},
            metrics=METRICS,
            not_taken=NOT_TAKEN,
            windows=_records(card.windows),
            candidates=card.candidates.to_dict("records"),
            costs=cost_matrix(card.fee, card.assumptions),
            importances=[(feature, Interval(*fall)) for feature, *fall in card.importances[_IMPORTANCES].to_numpy()],
            ranked_worst=_lowest(card.segments, "auc"),
            found_least=_lowest(card.segments, "recall"),
            calibration=_calibration(card),
            overfitting=_overfitting(card),
            horizon=_horizon(CONTRACT.label_horizon_months),
        )
    )


def with_decision(html: str, gates: Sequence[Gate], decision: str, version: int) -> str:
    """The rendered card with what was decided about it as ``version``, in place of what it said of that before.

    Raises ArtifactRefused when the page does not have one place for a decision.
    """
    template = _environment().get_template("decision.html.jinja")
    content = template.render(gates=gates, decision=decision, version=version)
    return _with(html, _DECISION, content, f"version {version}")


def with_forward(html: str, forward: "Forward", validation: Mapping[str, Interval]) -> str:
    """The rendered card with how its model did a month later, beside its ``validation`` on its own month.

    Raises ArtifactRefused when the page does not have one place for it.
    """
    return _with(html, _FORWARD, _forward(forward, validation), str(forward.trained_on))


def _forward(forward: "Forward", validation: Mapping[str, Interval]) -> str:
    template = _environment().get_template("forward.html.jinja")
    return template.render(forward=forward, quality=validation, metrics=METRICS)


def _ends(place: str) -> tuple[str, str]:
    return f"<!-- {place} -->", f"<!-- end of {place} -->"


def _placed(place: str, content: str) -> str:
    begin, end = _ends(place)
    return begin + content + end


def _with(html: str, place: str, content: str, whose: str) -> str:
    """The page with other content in one of its places."""
    begin, end = _ends(place)
    before, found, rest = html.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed or begin in rest or end in before + after:
        raise ArtifactRefused(
            f"the model card of {whose} does not have exactly one place for its {place}, so it is not as it was "
            "rendered; train the month again"
        )
    return before + _placed(place, content) + after


def _lowest(segments: Iterable[Segment], metric: str) -> Segment | None:
    measured = [segment for segment in segments if metric in segment.metrics]
    return min(measured, key=lambda segment: segment.metrics[metric].value, default=None)


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table, with None for what is missing in a column of numbers."""
    return [
        {str(name): None if pd.isna(value) else value for name, value in row.items()}
        for row in table.to_dict("records")
    ]


def _calibration(card: Card) -> str:
    ece, perfect = card.validation["ece"].value, card.perfect_ece
    verdict = "can" if ece <= perfect else "cannot"
    return (
        f"Its probabilities {verdict} be taken at their word: they are off by {amount(100 * ece, 1)} percentage points "
        f"on average, where a perfectly calibrated model of this size is off by up to {amount(100 * perfect, 1)} "
        "in 95\N{NO-BREAK SPACE}% of draws."
    )


def _overfitting(card: Card) -> str:
    train, held_out = card.train["auc"], card.validation["auc"].value
    return (
        f"On the users it learned from, AUC is {amount(train, 3)}, {amount(abs(train - held_out), 3)} "
        f"{'more' if train >= held_out else 'less'} than on unseen ones."
    )


def _horizon(months: int) -> str:
    if not months:
        return "in the month of its features"
    return "in the month after its features" if months == 1 else f"{months} months after its features"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "amount": amount,
        "count": amount,
        "percent": percent,
        "interval": with_interval,
        "percent_interval": percent_with_interval,
        "ends": lambda interval, digits: f"{amount(interval.low, digits)} to {amount(interval.high, digits)}",
        "range": lambda interval, digits: f"{amount(interval.low, digits)}–{amount(interval.high, digits)}",  # noqa: RUF001
        "percent_ends": lambda interval: f"{amount(interval.low * 100)} to {percent(interval.high, 0)}",
        "short": _short,
        "words": lambda name: name.replace("_", " "),
        "groupby_in_order": _groups,
    }
    return environment


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}".replace("-", "\N{MINUS SIGN}")  # noqa: RUF001


def _groups(items: Iterable[Any], attribute: str) -> list[tuple[Any, list[Any]]]:
    """Unlike Jinja's groupby, in the order of the items, which lie together."""
    return [(key, list(group)) for key, group in groupby(items, key=attrgetter(attribute))]
