"""What a person looks at of a model: each plot a function of arrays and of what was measured, to the bytes of a PNG.

Drawing belongs here, and nothing is measured here: curves and bars are what the labels and probabilities are, intervals
and errors come from `evaluation.py`, amounts from `value.py` and drift from `drift.py`. The same input gives the same
bytes.
"""

from collections.abc import Iterable, Sequence
from io import BytesIO
from itertools import groupby, pairwise
from textwrap import wrap
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from streamflow.decay import CHANCE, PerformanceReport
from streamflow.drift import ALPHA, LARGE_PSI, MODERATE_PSI, MOST_LEVELS, NEGLIGIBLE_PSI, DriftReport, FeatureDrift
from streamflow.evaluation import Bin, Capture, Interval, Segment, lift_curve
from streamflow.scores import contacts
from streamflow.scoring import decide

Labels = NDArray[np.bool_]
Floats = NDArray[np.float64]

_INK, _TEXT, _MUTED, _GRID = "#1f2933", "#52606d", "#9aa5b1", "#e4e7eb"
# Blue and vermilion of Okabe and Ito's palette, darkened for lines on white: told apart by every kind of eye.
_ACCENT, _CONTRAST = "#0b69a3", "#c2410c"
_DASHED = (0, (4, 3))

_WIDTH, _DPI = 5.6, 150
_LEFT, _RIGHT, _BOTTOM = 0.75, 0.3, 0.55
_TITLE_SIZE, _SUBTITLE_SIZE, _LABEL_SIZE, _SMALL = 12.5, 9.2, 9.5, 8.5
_TITLE_CHARACTERS, _SUBTITLE_CHARACTERS = 48, 76
_COLOURS = 64
_SCORE_BINS = 40
_SCORES_PANEL, _SCORES_GAP, _SCORES_RIGHT = 1.75, 0.75, 0.4
_DOTTED: Any = (0, (1, 1.5))
_FIXED_POLICIES = ((_INK, _DOTTED), ("#009e73", "-"), ("#d99a00", "-"), (_CONTRAST, "-"))
_BACKTEST_PANEL, _BACKTEST_GAP = 1.1, 0.42
_FEW_MONTHS, _MONTHS_NAMED = 6, 6
_GREATEST_PSI_SHOWN = 0.4
_MOST_PANELS, _PANEL_BINS, _PANEL_HEIGHT, _PANEL_GAP = 6, 30, 0.95, 0.77
_INTERVALS = "Intervals are of 95\N{NO-BREAK SPACE}%"
_BACKED = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}


def amount(value: float, digits: int = 0) -> str:
    """A number with thousands separators, a true minus sign, and no sign when it rounds to zero."""
    text = f"{value:,.{digits}f}"
    return text.lstrip("-") if not text.strip("-0.,") else text.replace("-", "\N{MINUS SIGN}")


def with_interval(interval: Interval, digits: int = 3) -> str:
    """A measure and its 95 % interval, which no line break tears: ``0.842 (0.821 to 0.861)``."""
    return f"{amount(interval.value, digits)} ({_kept(amount(interval.low, digits), amount(interval.high, digits))})"


def percent(share: float, digits: int = 1) -> str:
    """A share of 1 in per cent: ``26.5 %``."""
    return f"{amount(share * 100, digits)}\N{NO-BREAK SPACE}%"


def percent_with_interval(interval: Interval, digits: int = 0) -> str:
    """A share and its 95 % interval in per cent: ``74 % (70 to 78 %)``."""
    low, high = amount(interval.low * 100, digits), percent(interval.high, digits)
    return f"{percent(interval.value, digits)} ({_kept(low, high)})"


def _kept(low: str, high: str) -> str:
    return f"{low}\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}{high}"


def roc_plot(labels: Labels, probabilities: Floats, auc: Interval) -> bytes:
    """The ROC curve of labels of both values, with the diagonal of a model that knows nothing."""
    from sklearn.metrics import roc_curve

    false_positives, true_positives, _ = roc_curve(labels, probabilities)
    figure, top = _figure(5.9, f"ROC: AUC {with_interval(auc)}", f"{_users(labels)}. {_INTERVALS}.")
    axes = _axes(figure, top)
    _diagonal(axes, "knows nothing")
    axes.fill_between(false_positives, true_positives, color=_ACCENT, alpha=0.08, linewidth=0)
    axes.plot(false_positives, true_positives, color=_ACCENT, linewidth=2, clip_on=False)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.set_xlabel("False positive rate (share of those who stayed)")
    axes.set_ylabel("True positive rate (share of those who churned)")
    return _png(figure)


def precision_recall_plot(
    labels: Labels, probabilities: Floats, threshold: float, average_precision: Interval
) -> bytes:
    """Precision by recall of labels of both values, the base rate, and the point of ``threshold``."""
    from sklearn.metrics import precision_recall_curve

    precision, recall, _ = precision_recall_curve(labels, probabilities)
    base, predicted = labels.mean(), decide(probabilities, threshold)
    title = f"Average precision {with_interval(average_precision)}"
    figure, top = _figure(5.9, title, f"{_users(labels)}. {_INTERVALS}.")
    axes = _axes(figure, top)
    axes.axhline(base, color=_MUTED, linestyle=_DASHED, linewidth=1.2)
    axes.text(0.015, base - 0.015, f"base rate {percent(base)}: knows nothing", color=_TEXT, fontsize=_SMALL, va="top")
    axes.step(recall, precision, where="post", color=_ACCENT, linewidth=1.8)
    axes.set(xlim=(0, 1), ylim=(0, 1.01))
    if predicted.any():
        found, right = float(predicted[labels].mean()), float(labels[predicted].mean())
        axes.plot(found, right, "o", color=_CONTRAST, markersize=8, markeredgecolor="white", clip_on=False, zorder=5)
        note = f"threshold {threshold:.3g}\nrecall {found:.2f}, precision {right:.2f}"
        _note(axes, note, found, right, right_of_it=found < 0.55)
    else:
        axes.text(0.98, 0.95, f"nobody reaches the threshold {threshold:.3g}", color=_CONTRAST, ha="right")
    axes.set_xlabel("Recall (share of churners who are found)")
    axes.set_ylabel("Precision (share of those found who churn)")
    return _png(figure)


def reliability_plot(bins: Sequence[Bin], ece: Interval, perfect_ece: float) -> bytes:
    """What share churned at each predicted probability, with Wilson's 95 % intervals, and how many users that were.

    ``perfect_ece`` is what a perfectly calibrated model of that size stays below in 95 % of draws.
    """
    filled = [one for one in bins if one.users]
    users = np.array([one.users for one in filled])
    predicted = np.array([one.mean_probability for one in filled])
    churned = np.array([one.churn_rate for one in filled])
    low, high = _wilson(churned, users)
    verdict = "Calibrated" if ece.value <= perfect_ece else "Not calibrated"
    subtitle = (
        f"{users.sum():,} held-out users. A perfectly calibrated model of this size (dashed) shows an ECE of up to "
        f"{perfect_ece:.3f} in 95\N{NO-BREAK SPACE}% of draws."
    )
    figure, top = _figure(6.6, f"{verdict}: ECE {with_interval(ece)}", subtitle)
    axes, counts = _stacked(figure, top, 1.05)
    _diagonal(axes)
    axes.vlines(predicted, low, high, color=_ACCENT, linewidth=1.4, alpha=0.55)
    axes.plot(
        predicted, churned, "o-", color=_ACCENT, markersize=6.5, linewidth=1.2, markeredgecolor="white", clip_on=False
    )
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.set_ylabel("Share that churned")
    counts.bar([(one.low + one.high) / 2 for one in filled], users, width=0.092, color=_MUTED, alpha=0.7)
    for one in filled:
        counts.text((one.low + one.high) / 2, one.users, f"{one.users:,}", ha="center", va="bottom", fontsize=_SMALL)
    counts.set_ylim(0, users.max(initial=1) * 1.25)
    counts.set_yticks([])
    counts.grid(visible=False)
    counts.spines["left"].set_visible(False)
    counts.set_ylabel("Users")
    counts.set_xlabel("Predicted probability of churn (ten bins)")
    return _png(figure)


def confusion_plot(
    labels: Labels, probabilities: Floats, threshold: float, *, recall: Interval, precision: Interval
) -> bytes:
    """The confusion matrix at ``threshold``: users, and their share of those who truly stayed or churned."""
    predicted = decide(probabilities, threshold)
    counts = np.array([[np.sum((labels == actual) & (predicted == said)) for said in (0, 1)] for actual in (0, 1)])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    subtitle = (
        f"{_users(labels)}. Churn is predicted from {threshold:.3g} on; of those, "
        f"{percent_with_interval(precision)} do churn."
    )
    figure, top = _figure(5.9, f"Finds {percent_with_interval(recall)} of churners", subtitle)
    axes = _axes(figure, top)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.15, aspect="auto")
    meanings, classes = (("rightly left alone", "contacted in vain"), ("missed", "found")), ("stayers", "churners")
    for (row, column), share in np.ndenumerate(shares):
        colour = "white" if share > 0.6 else _INK
        axes.text(column, row - 0.04, f"{counts[row, column]:,}", ha="center", color=colour, fontsize=20)
        note = f"{percent(share)} of {classes[row]}\n{meanings[row][column]}"
        axes.text(column, row + 0.06, note, ha="center", va="top", color=colour, fontsize=_LABEL_SIZE, linespacing=1.5)
    axes.set_xticks([0, 1], ["stays", "churns"])
    axes.set_yticks([0, 1], ["stayed", "churned"], rotation=90, va="center")
    axes.axhline(0.5, color="white", linewidth=3)
    axes.axvline(0.5, color="white", linewidth=3)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("Predicted")
    axes.set_ylabel("Actual")
    return _png(figure)


def lift_plot(labels: Labels, probabilities: Floats, capture: Capture) -> bytes:
    """How many churners are among the users with the highest probabilities, and how many times more than by chance."""
    curve = lift_curve(labels, probabilities)
    share, captured, lift = (curve[name].to_numpy() for name in ("share", "captured", "lift"))
    base, first = labels.mean(), percent(capture.share, 0)
    title = f"The top {first} hold {percent_with_interval(capture.captured)} of churners"
    subtitle = f"{_users(labels)}. Lift {with_interval(capture.lift, 1)}: times as many as among {first} at random."
    figure, top = _figure(6.6, title, subtitle)
    gains, lifts = _stacked(figure, top, 1.5)
    _diagonal(gains, "at random")
    gains.plot([0, base, 1], [0, 1, 1], color=_MUTED, linewidth=1)
    gains.text(base + 0.02, 0.985, "all churners first", color=_TEXT, fontsize=_SMALL, va="top")
    gains.plot(np.append(0, share), np.append(0, captured), color=_ACCENT, linewidth=2)
    lifts.axhline(1, color=_MUTED, linestyle=_DASHED, linewidth=1.2)
    few = share >= min(0.01, share[-1])
    lifts.plot(share[few], lift[few], color=_ACCENT, linewidth=2)
    for axes, value, note in (
        (gains, capture.captured, f"top {first}: {percent(capture.captured.value)}"),
        (lifts, capture.lift, f"lift {amount(capture.lift.value, 2)}"),
    ):
        axes.axvline(capture.share, color=_CONTRAST, linewidth=1, alpha=0.5)
        axes.vlines(capture.share, value.low, value.high, color=_CONTRAST, linewidth=2.4)
        axes.plot(capture.share, value.value, "o", color=_CONTRAST, markersize=7, markeredgecolor="white", zorder=5)
        axes.annotate(note, (capture.share, value.value), (9, 3), textcoords="offset points", color=_CONTRAST)
    gains.set(xlim=(0, 1), ylim=(0, 1.02))
    gains.set_ylabel("Share of churners found")
    lifts.set_ylim(0, max(float(lift[few].max()), capture.lift.high) * 1.12)
    lifts.set_ylabel("Lift")
    lifts.set_xlabel("Share of users, highest probability first")
    for axis in (gains.xaxis, gains.yaxis, lifts.xaxis):
        axis.set_major_formatter(lambda value, _: percent(value, 0))
    return _png(figure)


def importance_plot(importances: pd.DataFrame, users: int) -> bytes:
    """The columns feature, importance, low and high: by how much AUC falls when a feature's values are shuffled."""
    table = importances.sort_values("importance", ascending=False, kind="stable")
    values, low, high = (table[name].to_numpy(dtype=np.float64) for name in ("importance", "low", "high"))
    matters = low > 0
    best = Interval(values[0], low[0], high[0])
    title = f"{table['feature'].iloc[0]} matters most: {with_interval(best)}"
    subtitle = (
        f"{users:,} held-out users. By how much AUC falls when a feature is shuffled; grey: not told apart from 0."
    )
    rows = np.arange(len(table))
    figure, top = _figure(_height(len(table), 0.255), title, subtitle)
    axes = _axes(figure, top, left=_margin(table["feature"]))
    colours = np.where(matters, _ACCENT, _MUTED)
    axes.axvline(0, color=_MUTED, linewidth=1)
    axes.barh(rows, values, color=colours, height=0.62, alpha=0.35)
    axes.hlines(rows, low, high, color=colours, linewidth=1.6)
    axes.scatter(values, rows, color=colours, s=22, zorder=3)
    _rows(axes, table["feature"].tolist())
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel("Fall of AUC (95\N{NO-BREAK SPACE}% interval over shuffles)")
    return _png(figure)


def score_plot(labels: Labels, probabilities: Floats, threshold: float) -> bytes:
    """How the probabilities are distributed among those who churned and those who stayed, and the threshold."""
    classes = (("churned", probabilities[labels], _CONTRAST), ("stayed", probabilities[~labels], _ACCENT))
    medians = ", ".join(f"{name} {np.median(scores):.2f}" for name, scores, _ in classes if len(scores))
    subtitle = f"{_users(labels)}. Churn is predicted from {threshold:.3g} on."
    figure, top = _figure(6.6, f"Median score: {medians}", subtitle)
    gap = 0.16
    panels = _stacked(figure, top, (top - _BOTTOM - gap) / 2, gap)
    edges = np.linspace(0, 1, _SCORE_BINS + 1)
    shares = [np.histogram(scores, edges)[0] / max(len(scores), 1) for _, scores, _ in classes]
    highest = max(share.max() for share in shares) * 1.1 or 1.0
    for axes, (name, scores, colour), share in zip(panels, classes, shares, strict=True):
        beyond = float(decide(scores, threshold).mean()) if len(scores) else 0.0
        axes.stairs(share, edges, fill=True, color=colour, alpha=0.7)
        axes.axvline(threshold, color=_INK, linewidth=1.4)
        note = f"{len(scores):,} {name}\n{percent(beyond)} from {threshold:.3g} on"
        axes.text(0.99, 0.95, note, transform=axes.transAxes, ha="right", va="top", color=colour, bbox=_BACKED)
        axes.set(xlim=(0, 1), ylim=(0, highest))
        axes.locator_params(axis="y", nbins=5, steps=[1, 2, 5, 10])
        axes.yaxis.set_major_formatter(lambda value, _: percent(value, 0))
        axes.set_ylabel("Share of class")
    panels[1].set_xlabel("Predicted probability of churn")
    return _png(figure)


def contacts_plot(frame: pd.DataFrame, capacity: int | None, version: int) -> bytes:
    """How a month's probabilities are distributed, and what contacting its customers adds up to, most valuable first.

    ``frame``, not empty, is of `scores.ranked`, scored by ``version``; ``capacity`` is how many can be contacted, None
    without a limit. Whom to contact comes first, then who is beyond the capacity, then who is not expected to churn or
    not worth it.
    """
    chosen, worth_it = contacts(frame, capacity), contacts(frame, None)
    churn, value = int(frame["decision"].sum()), float(chosen["expected_value"].sum())
    beyond = "; dashed: beyond the capacity" if len(chosen) < len(worth_it) else ""
    title = f"Contacting {len(chosen):,} customers is worth {amount(value)}" if len(chosen) else "Nobody to contact"
    subtitle = (
        f"{len(frame):,} customers, scored by version {version}. {churn:,} are expected to churn, {len(worth_it):,} of "
        f"them worth contacting (blue{beyond}). Grey: the others."
    )
    figure, top = _figure(6.6, title, subtitle)
    left = max(_LEFT, 0.42 + 0.07 * len(amount(frame["expected_value"].abs().sum())))
    above = _axes(figure, top, bottom=top - _SCORES_PANEL, left=left, right=_SCORES_RIGHT)
    below = _axes(figure, top - _SCORES_PANEL - _SCORES_GAP, left=left, right=_SCORES_RIGHT)
    _by_probability(above, frame)
    below.axhline(0, color=_MUTED, linewidth=1)
    at, total = 0, 0.0
    for part, look in (
        (chosen, {"color": _ACCENT, "linewidth": 2.4}),
        (worth_it.drop(chosen.index), {"color": _ACCENT, "linewidth": 1.6, "linestyle": _DASHED}),
        (frame.drop(worth_it.index), {"color": _MUTED, "linewidth": 1.6}),
    ):
        sums = total + np.append(0.0, part["expected_value"].to_numpy(dtype=np.float64).cumsum())
        below.plot(np.arange(at, at + len(sums)), sums, **look)
        at, total = at + len(part), float(sums[-1])
    reached = below.lines[1].get_xydata().T
    below.fill_between(*reached, color=_ACCENT, alpha=0.1, linewidth=0)
    if capacity is not None and capacity <= len(frame):
        below.axvline(capacity, color=_CONTRAST, linewidth=1, alpha=0.5)
        if not beyond:
            _beside(below, f"capacity {capacity:,}", capacity, 0, up=16, within=len(frame))
    below.plot(len(chosen), value, "o", color=_CONTRAST, markersize=8, markeredgecolor="white", zorder=5, clip_on=False)
    if len(chosen):
        note = f"{len(chosen):,} to contact{', the capacity' if beyond else ''}\nworth {amount(value)}"
        _beside(below, note, len(chosen), value, up=-18, within=len(frame))
    below.set_xlim(0, len(frame))
    for axis in (below.xaxis, below.yaxis):
        axis.set_major_formatter(lambda tick, _: amount(tick))
    below.set_xlabel("Customers contacted, most valuable first")
    below.set_ylabel("Expected value (currency of the fee)")
    return _png(figure)


def _beside(axes: Any, text: str, x: float, y: float, *, up: float, within: float) -> None:
    """Text beside a point whose x is at most ``within``, on the side where there is room, so many points higher."""
    right, align = (10, "left") if x < 0.6 * within else (-10, "right")
    place = {"textcoords": "offset points", "ha": align, "va": "top"}
    axes.annotate(text, (x, y), (right, up), color=_CONTRAST, fontsize=_SMALL, bbox=_BACKED, **place)


def _by_probability(axes: Any, frame: pd.DataFrame) -> None:
    """The shares of a month's customers by probability, those who are expected to churn in another colour."""
    decided, threshold = frame["decision"].to_numpy(dtype=bool), float(frame["threshold"].iloc[0])
    probabilities, edges = frame["probability"].to_numpy(dtype=np.float64), np.linspace(0, 1, _SCORE_BINS + 1)
    stay, churn = (np.histogram(probabilities[part], edges)[0] / len(frame) for part in (~decided, decided))
    axes.stairs(stay, edges, fill=True, color=_MUTED, alpha=0.7)
    axes.stairs(stay + churn, edges, baseline=stay, fill=True, color=_CONTRAST, alpha=0.7)
    axes.axvline(threshold, color=_INK, linewidth=1.4)
    note = f"{percent(float(decided.mean()))} from the\nthreshold {threshold:.3g} on"
    axes.text(0.99, 0.95, note, transform=axes.transAxes, ha="right", va="top", color=_CONTRAST, bbox=_BACKED)
    axes.set(xlim=(0, 1), ylim=(0, max((stay + churn).max(), 0.01) * 1.1))
    axes.locator_params(axis="y", nbins=5, steps=[1, 2, 5, 10])
    axes.yaxis.set_major_formatter(lambda value, _: percent(value, 0))
    axes.set_xlabel("Predicted probability of churn")
    axes.set_ylabel("Share of customers")


def segments_plot(segments: Sequence[Segment], auc: Interval) -> bytes:
    """The AUC of each segment with its interval, by attribute, beside ``auc``, that of all users.

    A segment whose users all did the same has no AUC; it is shown without a point.
    """
    measured = [segment for segment in segments if "auc" in segment.metrics]
    rows: list[Segment | str] = []
    for attribute, group in groupby(segments, key=lambda segment: segment.attribute):
        rows += [attribute, *group]
    title = f"All users: AUC {with_interval(auc)}"
    if measured:
        worst = min(measured, key=lambda segment: segment.metrics["auc"].value)
        title = f"Lowest AUC: {worst.attribute} {worst.value}, {with_interval(worst.metrics['auc'])}"
    subtitle = (
        f"Line and band: all users, {with_interval(auc)}. Orange: interval wholly below the band. n: held-out users."
    )
    names = [row if isinstance(row, str) else row.value for row in rows]
    figure, top = _figure(_height(len(rows), 0.235), title, subtitle)
    axes = _axes(figure, top, left=_margin(names), right=0.75)
    lowest = min([auc.low, *(segment.metrics["auc"].low for segment in measured)])
    axes.set_xlim(max(0.0, np.floor(lowest * 20) / 20 - 0.02), 1.0)
    axes.axvspan(auc.low, auc.high, color=_ACCENT, alpha=0.1, linewidth=0)
    axes.axvline(auc.value, color=_ACCENT, linewidth=1.2)
    beside = {"transform": axes.get_yaxis_transform(), "color": _TEXT, "fontsize": _SMALL}
    axes.text(1.03, -0.75, "n", va="bottom", fontweight="bold", **beside)
    for position, row in enumerate(rows):
        if isinstance(row, str):
            continue
        axes.text(1.03, position, f"{row.users:,}", va="center", **beside)
        if "auc" not in row.metrics:
            where = auc.value, position
            axes.text(*where, "one class only", ha="center", va="center", color=_TEXT, fontsize=_SMALL, bbox=_BACKED)
    positions = [rows.index(segment) for segment in measured]
    values, low, high = np.array([_ends(segment.metrics["auc"]) for segment in measured]).reshape(-1, 3).T
    colours = np.where(high < auc.low, _CONTRAST, _INK)
    axes.hlines(positions, low, high, color=colours, linewidth=1.8)
    axes.scatter(values, positions, color=colours, s=26, zorder=3)
    _rows(axes, names)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set(fontweight="bold" if isinstance(row, str) else "normal", color=_INK)
    axes.set_xlabel("AUC")
    return _png(figure)


def backtest_plot(by_month: pd.DataFrame, worlds: str) -> bytes:
    """AUC by month under each policy of a backtest, scenario below scenario; ``worlds`` says what it is the mean of.

    ``by_month`` has scenario, policy, month (YYYY-MM) and auc; the simulator's truth and the product's own policy are
    among the policies.
    """
    from streamflow.backtest import BEST_POSSIBLE, OURS

    scenarios = list(dict.fromkeys(by_month["scenario"]))
    months = sorted(set(by_month["month"]))
    policies = list(dict.fromkeys(by_month["policy"]))
    lines: dict[str, dict[str, Any]] = {BEST_POSSIBLE: {"color": _MUTED, "linestyle": _DASHED, "linewidth": 1.2}}
    fixed = [name for name in policies if name not in (OURS, BEST_POSSIBLE)]
    for name, (colour, style) in zip(fixed, _FIXED_POLICIES, strict=True):
        lines[name] = {"color": colour, "linestyle": style, "linewidth": 1.4}
    lines[OURS] = {"color": _ACCENT, "linewidth": 2.2}
    panel = _BACKTEST_PANEL + _BACKTEST_GAP
    subtitle = f"Mean of {worlds}, of held-out customers."
    figure, top = _figure(0.95 + len(scenarios) * panel + 0.25, "AUC by month under each policy", subtitle)
    ticks = range(0, len(months), max(1, round(len(months) / 6)))
    for index, scenario in enumerate(scenarios):
        upper = top - 0.45 - index * panel
        axes = _axes(figure, upper, bottom=upper - _BACKTEST_PANEL, left=0.6, right=0.35)
        of_scenario = by_month[by_month["scenario"] == scenario]
        for name, look in lines.items():
            line = of_scenario[of_scenario["policy"] == name]
            axes.plot([months.index(month) for month in line["month"]], line["auc"], label=name, **look)
        axes.set_xlim(0, len(months) - 1)
        axes.set_xticks(ticks, [months[at] for at in ticks] if scenario == scenarios[-1] else [""] * len(ticks))
        axes.locator_params(axis="y", nbins=5)
        heading = {"loc": "left", "fontsize": _LABEL_SIZE, "color": _INK, "fontweight": "bold", "pad": 5}
        axes.set_title(scenario.replace("-", " "), **heading)
        if index == 0:
            place = {"loc": "lower left", "bbox_to_anchor": (-0.11, 1.2), "borderaxespad": 0}
            spaces = {"columnspacing": 1.1, "handlelength": 1.4, "handletextpad": 0.5}
            axes.legend(ncol=len(lines), frameon=False, fontsize=_SMALL, labelcolor=_INK, **place, **spaces)
    return _png(figure)


def value_plot(thresholds: Floats, values: Floats, *, threshold: float, value: float, users: int) -> bytes:
    """What acting from each of the ascending ``thresholds`` on brings, with ``value`` at the chosen ``threshold``.

    Amounts are in the currency of the fee, over the ``users`` that they were computed on.
    """
    best = int(np.argmax(values))
    subtitle = (
        f"{users:,} held-out users, in the currency of the fee. On them the most is {amount(values[best])}, "
        f"from {thresholds[best]:.3g} on."
    )
    figure, top = _figure(5.9, f"Acting from {threshold:.3g} on brings {amount(value)}", subtitle)
    axes = _axes(figure, top, left=0.85)
    axes.axhline(0, color=_MUTED, linewidth=1)
    axes.plot(thresholds, values, color=_ACCENT, linewidth=1.8)
    axes.axvline(threshold, color=_CONTRAST, linewidth=1, alpha=0.5)
    axes.plot(threshold, value, "o", color=_CONTRAST, markersize=8, markeredgecolor="white", zorder=5)
    axes.annotate(
        f"chosen: {threshold:.3g}", (threshold, value), (9, 7), textcoords="offset points", color=_CONTRAST, zorder=6
    )
    axes.set_xlim(0, 1)
    lowest, highest = min(0.0, float(values.min()), value), max(0.0, float(values.max()), value)
    margin = (highest - lowest or 1.0) * 0.1
    axes.set_ylim(lowest - margin, highest + margin)
    axes.yaxis.set_major_formatter(lambda tick, _: amount(tick))
    axes.set_xlabel("Threshold (probability from which on a customer is contacted)")
    axes.set_ylabel("Realized value (currency of the fee)")
    return _png(figure)


def drift_plot(report: DriftReport) -> bytes:
    """The PSI of each feature and of the scores, greatest first, with the bounds of its size, and corrected p."""
    rows = sorted((*report.features, report.score), key=lambda one: -one.psi)
    subtitle = (
        f"{report.current_users:,} users against {report.reference_users:,} of the month that Production learned from. "
        f"Orange: significant, a p of at most {ALPHA:g} after correction for all rows."
    )
    names = [one.name if one is not report.score else "score" for one in rows]
    figure, top = _figure(_height(len(rows), 0.225) + 0.15, _drift_title(report), subtitle)
    axes = _axes(figure, top - 0.2, left=_margin(names), right=0.95)
    axes.set_xscale("function", functions=(np.sqrt, np.square))
    axes.set_xlim(0, _GREATEST_PSI_SHOWN)
    colours = [_CONTRAST if one.significant else _MUTED for one in rows]
    axes.barh(np.arange(len(rows)), [one.psi for one in rows], color=colours, height=0.62)
    _rows(axes, names)
    beside = {"transform": axes.get_yaxis_transform(), "fontsize": _SMALL, "va": "center"}
    for position, (one, colour) in enumerate(zip(rows, colours, strict=True)):
        ink = colour if one.significant else _TEXT
        axes.text(1.06, position, _p(one), color=ink, **beside)
        if one.psi >= MODERATE_PSI:
            end = min(one.psi, _GREATEST_PSI_SHOWN), position
            style = {"color": "white", "fontsize": _SMALL, "ha": "right", "va": "center"}
            axes.annotate(f"{one.psi:.3f}", end, (-4, 0), textcoords="offset points", **style)
        elif one.psi:
            style = {"color": ink, "fontsize": _SMALL, "va": "center", "bbox": _BACKED}
            axes.annotate(f"{one.psi:.3f}", (one.psi, position), (4, 0), textcoords="offset points", **style)
    above = {"fontsize": _SMALL, "color": _TEXT, "va": "bottom"}
    axes.text(1.06, 1.01, "p", fontweight="bold", transform=axes.transAxes, **above)
    edges = (NEGLIGIBLE_PSI, MODERATE_PSI, LARGE_PSI, _GREATEST_PSI_SHOWN)
    for (low, high), size in zip(pairwise(edges), ("small", "moderate", "large"), strict=True):
        middle = (np.sqrt(low) + np.sqrt(high)) ** 2 / 4
        axes.text(middle, 1.01, size, ha="center", transform=axes.get_xaxis_transform(), **above)
        if size != "small":
            axes.axvline(low, color=_INK, linestyle=_DASHED, linewidth=1, alpha=0.6, zorder=0.5)
    axes.set_xticks(
        [0, 0.01, 0.05, MODERATE_PSI, LARGE_PSI], ["0", "0.01", "0.05", f"{MODERATE_PSI:g}", f"{LARGE_PSI:g}"]
    )
    axes.set_xlabel("Population stability index (root scale)")
    return _png(figure)


def drifted_features_plot(report: DriftReport, reference: pd.DataFrame, current: pd.DataFrame) -> bytes:
    """How the values of up to six features are distributed in both months, those of significant and great drift first.

    The frames are those that were compared. Where fewer than two features drift, the nearest to it are shown too.
    """
    ranked = sorted(report.features, key=lambda one: (not one.significant, -one.psi))
    shown = ranked[: max(2, min(len(report.significant), _MOST_PANELS))]
    lines = -(-len(shown) // 2)
    subtitle = (
        f"Share of users. Grey: {report.reference_users:,} of the month that Production learned from; blue line: "
        f"{report.current_users:,} now."
    )
    if len(report.significant) > len(shown):
        subtitle += f" The {len(shown)} of greatest drift."
    figure, top = _figure(0.95 + lines * (_PANEL_HEIGHT + _PANEL_GAP), _drift_title(report), subtitle)
    width = (_WIDTH - 0.55 - _RIGHT - 0.6) / 2
    for index, one in enumerate(shown):
        line, column = divmod(index, 2)
        upper = top - 0.3 - line * (_PANEL_HEIGHT + _PANEL_GAP)
        left = 0.55 + column * (width + 0.6)
        axes = _axes(figure, upper, bottom=upper - _PANEL_HEIGHT, left=left, right=_WIDTH - left - width)
        _distributions(axes, reference[one.name], current[one.name])
        over = {"xycoords": "axes fraction", "textcoords": "offset points", "parse_math": False}
        axes.annotate(one.name, (0, 1), (0, 18), color=_INK, fontsize=_LABEL_SIZE, fontweight="bold", **over)
        axes.annotate(_finding(one), (0, 1), (0, 6), color=_TEXT, fontsize=_SMALL, **over)
    return _png(figure)


def _drift_title(report: DriftReport) -> str:
    found = [one for one in report.features if one.significant]
    if not found:
        return f"None of {len(report.features)} features drifts"
    greatest = max(found, key=lambda one: one.psi)
    verb = "drifts" if len(found) == 1 else "drift"
    return f"{len(found)} of {len(report.features)} features {verb}: {greatest.size} at most"


def _p(one: FeatureDrift) -> str:
    p = one.adjusted_p_value
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}" if p < 0.01 else f"{p:.2f}"


def _finding(one: FeatureDrift) -> str:
    text = f"PSI {one.psi:.3f} ({one.size})"
    if not one.significant:
        return f"{text}, not significant"
    if one.reference_missing or one.current_missing:
        text += f", missing {_kept(amount(100 * one.reference_missing), percent(one.current_missing, 0))}"
    return text


def _distributions(axes: Any, reference: pd.Series, current: pd.Series) -> None:
    """The shares of users by value, or by bin where there are many, of the values that are present."""
    months = [month.dropna() for month in (reference, current)]
    levels = sorted({value for month in months for value in month.unique().tolist()})
    axes.yaxis.set_major_formatter(lambda value, _: percent(value, 0))
    axes.locator_params(axis="y", nbins=4)
    if len(levels) > MOST_LEVELS and not isinstance(levels[0], str):
        numbers = [month.to_numpy(dtype=np.float64) for month in months]
        both = np.concatenate(numbers)
        low, high = np.quantile(both, 0.001), np.quantile(both, 0.999)
        if low == high:
            low, high = both.min(), both.max()
        edges = np.linspace(low, high, _PANEL_BINS + 1)
    else:
        numbers = [np.searchsorted(levels, month.tolist()) if len(month) else np.zeros(0) for month in months]
        edges = np.arange(max(1, len(levels)) + 1) - 0.5
        every = max(1, len(levels) // 8)
        labels = ["\n".join(wrap(str(level), 9)) for level in levels]
        axes.set_xticks(np.arange(len(levels))[::every], labels[::every], parse_math=False)
        axes.grid(visible=False, axis="x")
    shares = [np.histogram(month, edges)[0] / max(len(month), 1) for month in numbers]
    axes.stairs(shares[0], edges, fill=True, color=_MUTED, alpha=0.6)
    axes.stairs(shares[1], edges, color=_ACCENT, linewidth=1.6)
    axes.set_xlim(edges[0], edges[-1])


def performance_plot(history: Sequence[PerformanceReport]) -> bytes:
    """The AUC that each month's predictions achieved, against what their version promised and against chance.

    ``history`` has at least one report, oldest first.
    """
    newest, many = history[-1], len(history) > _FEW_MONTHS
    auc, promised = newest.held_out.metrics["auc"], newest.promised["auc"]
    subtitle = (
        f"{newest.held_out.users:,} held-out users. Band: promised, by version {newest.version} "
        f"{with_interval(promised)}. Orange: worse than that, or no better than chance."
    )
    figure, top = _figure(5.2, f"{newest.month}: AUC {with_interval(auc)}", subtitle)
    axes = _axes(figure, top, bottom=0.85)
    at = np.arange(len(history))
    promises = np.array([_ends(one.promised["auc"]) for one in history])
    for position, (value, low, high) in enumerate(promises):
        ends = position - 0.5, position + 0.5
        axes.fill_between(ends, low, high, color=_ACCENT, alpha=0.12, linewidth=0)
        axes.hlines(value, *ends, color=_ACCENT, linewidth=1.2)
    axes.axhline(CHANCE, color=_MUTED, linestyle=_DASHED, linewidth=1.2)
    beside = {"transform": axes.get_yaxis_transform(), "color": _TEXT, "fontsize": _SMALL}
    axes.text(0.01, CHANCE - 0.006, "chance", va="top", **beside)
    values, low, high = np.array([_ends(one.held_out.metrics["auc"]) for one in history]).T
    colours = np.where([one.decayed for one in history], _CONTRAST, _INK)
    axes.plot(at, values, color=_MUTED, linewidth=1, zorder=2)
    axes.vlines(at, low, high, color=colours, linewidth=1.8, zorder=3)
    axes.scatter(at, values, color=colours, s=38, edgecolor="white", zorder=4)
    if not many:
        for x, y, colour in zip(at, values, colours, strict=True):
            place = {"textcoords": "offset points", "va": "center", "fontsize": _LABEL_SIZE, "bbox": _BACKED}
            axes.annotate(f"{y:.3f}", (x, y), (8, 0), color=colour, zorder=5, **place)
    lowest, highest = min(low.min(), promises[:, 1].min(), CHANCE), max(high.max(), promises[:, 2].max())
    axes.set_ylim(max(0.0, np.floor(lowest * 20) / 20 - 0.03), min(1.0, np.ceil(highest * 20) / 20 + 0.01))
    axes.set_xlim(-0.5, len(history) - 0.5)
    shown = at[:: -(-len(history) // _MONTHS_NAMED)]
    axes.set_xticks(shown, [f"{history[one].month}\nversion {history[one].version}" for one in shown])
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("Month, and the version that made its predictions")
    axes.set_ylabel("AUC")
    return _png(figure)


def _users(labels: Labels) -> str:
    return f"{len(labels):,} held-out users, {int(labels.sum()):,} churned"


def _wilson(shares: Floats, counts: NDArray[np.int_]) -> tuple[Floats, Floats]:
    """Wilson's 95 % interval of a share; Brown, Cai and DasGupta (2001), Interval Estimation for a Binomial."""
    z = 1.959963984540054
    middle = (shares + z * z / (2 * counts)) / (1 + z * z / counts)
    half = z / (1 + z * z / counts) * np.sqrt(shares * (1 - shares) / counts + z * z / (4 * counts * counts))
    return middle - half, middle + half


def _height(rows: int, of_row: float) -> float:
    return 1.75 + of_row * rows


def _figure(height: float, title: str, subtitle: str) -> tuple[Any, float]:
    """An empty figure under its heading, and where the heading ends, in inches from the bottom."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, facecolor="white")
    y = height - 0.17
    for text, characters, size, colour, weight in (
        (title, _TITLE_CHARACTERS, _TITLE_SIZE, _INK, "bold"),
        (subtitle, _SUBTITLE_CHARACTERS, _SUBTITLE_SIZE, _TEXT, "normal"),
    ):
        for line in wrap(text, characters, break_on_hyphens=False):
            place = 0.17 / _WIDTH, y / height
            figure.text(*place, line, fontsize=size, color=colour, fontweight=weight, va="top", parse_math=False)
            y -= size * 1.36 / 72
        y -= 0.04
    return figure, y - 0.16


def _axes(figure: Any, top: float, *, bottom: float = _BOTTOM, left: float = _LEFT, right: float = _RIGHT) -> Any:
    """Axes with margins in inches (``top`` from the bottom): a layout engine takes longer than the drawing."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (top - bottom) / height), axisbelow=True
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_MUTED)
    axes.tick_params(colors=_TEXT, labelsize=_SMALL, length=0, pad=5)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.xaxis.label.set(color=_INK, fontsize=_LABEL_SIZE)
    axes.yaxis.label.set(color=_INK, fontsize=_LABEL_SIZE)
    axes.yaxis.set_label_coords((0.32 - left) / (width - left - right), 0.5)
    return axes


def _stacked(figure: Any, top: float, lower: float, gap: float = 0.2) -> tuple[Any, Any]:
    """Two pairs of axes over the same x, the lower one ``lower`` inches high."""
    above = _axes(figure, top, bottom=_BOTTOM + lower + gap)
    above.tick_params(labelbottom=False)
    below = _axes(figure, _BOTTOM + lower)
    below.sharex(above)
    return above, below


def _rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(np.arange(len(names)), names, parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def _ends(interval: Interval) -> tuple[float, float, float]:
    return interval.value, interval.low, interval.high


def _margin(names: Iterable[str]) -> float:
    """Inches that the longest of these row labels takes, within reason."""
    return min(0.35 + 0.076 * max(map(len, names)), 2.9)


def _diagonal(axes: Any, label: str = "") -> None:
    """The diagonal of axes from 0 to 1, labelled along it."""
    axes.plot([0, 1], [0, 1], color=_MUTED, linestyle=_DASHED, linewidth=1.2)
    box = axes.get_window_extent()
    axes.annotate(
        label,
        (0.7, 0.7),
        (3, -3),
        textcoords="offset points",
        rotation=np.degrees(np.arctan2(box.height, box.width)),
        rotation_mode="anchor",
        ha="center",
        va="top",
        color=_TEXT,
        fontsize=_SMALL,
    )


def _note(axes: Any, text: str, x: float, y: float, *, right_of_it: bool) -> None:
    """Text at a point of a falling curve: above and right of it, or below and left of it."""
    axes.annotate(
        text,
        (x, y),
        (10, 8) if right_of_it else (-10, -8),
        textcoords="offset points",
        ha="left" if right_of_it else "right",
        va="bottom" if right_of_it else "top",
        color=_CONTRAST,
        fontsize=_LABEL_SIZE,
        bbox=_BACKED,
    )


def _png(figure: Any) -> bytes:
    """The drawing in few colours, a third of the size that it has in all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    content = BytesIO()
    image.quantize(_COLOURS, dither=Image.Dither.NONE).save(content, format="png", dpi=(_DPI, _DPI))
    return content.getvalue()
