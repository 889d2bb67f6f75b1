import struct
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgba
from test_decay import history_of

from streamflow import plots
from streamflow.contract import Column
from streamflow.decay import Finding
from streamflow.drift import compare
from streamflow.evaluation import Capture, Interval, Segment, lift_curve, reliability
from streamflow.plots import (
    amount,
    backtest_plot,
    confusion_plot,
    contacts_plot,
    drift_plot,
    drifted_features_plot,
    importance_plot,
    lift_plot,
    percent,
    percent_with_interval,
    performance_plot,
    precision_recall_plot,
    reliability_plot,
    roc_plot,
    score_plot,
    segments_plot,
    value_plot,
    with_interval,
)
from streamflow.scores import ranked
from streamflow.training_config import Value

USERS = 400
SEEDED = np.random.default_rng(0)
PROBABILITIES = SEEDED.random(USERS) ** 2
LABELS = SEEDED.random(USERS) < PROBABILITIES
AUC = Interval(0.842, 0.821, 0.861)
CAPTURE = Capture(0.1, 40, Interval(0.28, 0.25, 0.3), Interval(2.8, 2.5, 3.0))
SEGMENTS = (
    Segment("contract_type", "Month-to-month", 952, 409, {"auc": Interval(0.73, 0.70, 0.76)}),
    Segment("contract_type", "Two year", 447, 18, {"auc": Interval(0.63, 0.47, 0.78)}),
    Segment("user_is_senior", "False", 1504, 344, {"auc": Interval(0.85, 0.82, 0.87)}),
    Segment("user_is_senior", "True", 7, 0, {"brier": Interval(0.1, 0.05, 0.2)}),
)
IMPORTANCES = pd.DataFrame(
    {
        "feature": ["contract_type", "ticket_avg_resolution_hrs_90d", "monthly_fee"],
        "importance": [0.128, 0.03, -0.001],
        "low": [0.115, 0.02, -0.002],
        "high": [0.142, 0.04, 0.001],
    }
)
BACKTEST = pd.DataFrame(
    [
        {"scenario": scenario, "policy": policy, "month": month, "auc": float(auc)}
        for scenario, months in (("stable", ("2024-02", "2024-03")), ("label-delay", ("2024-03",)))
        for policy in ("never", "every month", "on drift", "on decay", "ours", "best possible")
        for month, auc in zip(months, SEEDED.uniform(0.5, 0.9, 2), strict=False)
    ]
)


HISTORY = history_of([0.84, 0.49, 0.66, 0.65], versions=[1, 1, 2, 2], promises=[0.84, 0.84, 0.67, 0.67])
HISTORY[1] = replace(HISTORY[1], worse_than_promised=Finding(True, 0.35, 0.04, "worse"))

DRIFT_COLUMNS = [
    Column("hours", "float", "Hours watched."),
    Column("plan", "category", "The plan.", categories=("basic", "a very long one", "$x^")),
    Column("stalls", "integer", "Playback stalls."),
]
REFERENCE = pd.DataFrame(
    {
        "hours": SEEDED.normal(25, 5, USERS),
        "plan": SEEDED.choice(["basic", "a very long one", "$x^"], USERS),
        "stalls": SEEDED.poisson(1.5, USERS),
    }
)
CURRENT = REFERENCE[:300].assign(hours=REFERENCE["hours"].mask(REFERENCE["hours"] > 30) - 1, plan="basic")


WORTH = Value(contact_cost=20.0, retained_share=0.2, months_retained=6.0)
"""Of a contact: 1.2 times probability times fee, minus 20."""


def scored(probabilities, fees, threshold=0.3):
    users = pd.Series([f"user {number}" for number in range(len(probabilities))])
    return ranked(users, np.array(probabilities), np.array(fees, dtype=float), threshold, WORTH)


SCORED = scored(PROBABILITIES, SEEDED.uniform(20, 120, USERS))
MANY = scored(np.linspace(0, 1, 1_000_000), np.full(1_000_000, 90))
FEW = scored([0.9, 0.5, 0.4, 0.31, 0.29, 0.1], [100, 100, 100, 10, 100, 100])
"""Contacting the first three is worth 88, 40 and 28; the fourth churns and is not worth it, the fifth is and stays."""


def drift_between(reference, current):
    return compare(
        reference, current, DRIFT_COLUMNS, reference_scores=PROBABILITIES, current_scores=PROBABILITIES[::-1]
    )


def every_plot(labels=LABELS, probabilities=PROBABILITIES, threshold=0.3):
    thresholds = np.linspace(0, 1, 21)
    return {
        "roc": lambda: roc_plot(labels, probabilities, AUC),
        "precision_recall": lambda: precision_recall_plot(labels, probabilities, threshold, AUC),
        "reliability": lambda: reliability_plot(reliability(labels, probabilities), Interval(0.02, 0.01, 0.04), 0.03),
        "confusion": lambda: confusion_plot(labels, probabilities, threshold, recall=AUC, precision=AUC),
        "lift": lambda: lift_plot(labels, probabilities, CAPTURE),
        "importances": lambda: importance_plot(IMPORTANCES, len(labels)),
        "scores": lambda: score_plot(labels, probabilities, threshold),
        "contacts": lambda: contacts_plot(SCORED, None, 3),
        "contacts within capacity": lambda: contacts_plot(SCORED, 40, 3),
        "contacts of a million": lambda: contacts_plot(MANY, 50_000, 3),
        "segments": lambda: segments_plot(SEGMENTS, AUC),
        "backtest": lambda: backtest_plot(BACKTEST, "10 worlds"),
        "performance": lambda: performance_plot(HISTORY),
        "value": lambda: value_plot(thresholds, 1e4 - thresholds * 3e4, threshold=0.3, value=1e3, users=len(labels)),
        "drift": lambda: drift_plot(drift_between(REFERENCE, CURRENT)),
        "drifted features": lambda: drifted_features_plot(drift_between(REFERENCE, CURRENT), REFERENCE, CURRENT),
    }


@pytest.fixture
def figure_of(monkeypatch):
    """Draws a plot and gives its figure instead of its bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    monkeypatch.setattr(plots, "_png", lambda figure: (FigureCanvasAgg(figure).draw(), figure)[1])
    return lambda plot: plot()


def texts(figure):
    """All that the figure says, title and subtitle first, no-break spaces as spaces."""
    found = [*figure.texts, *(text for axes in figure.axes for text in axes.texts)]
    return [text.get_text().replace("\N{NO-BREAK SPACE}", " ") for text in found]


def said(figure):
    return " ".join(texts(figure))


def chunks(png):
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    position, names = 8, []
    while position < len(png):
        (length,) = struct.unpack(">I", png[position : position + 4])
        names.append(png[position + 4 : position + 8])
        position += length + 12
    return names


@pytest.mark.parametrize("name", every_plot())
def test_same_input_gives_the_same_bytes_and_nothing_but_the_picture(name):
    png = every_plot()[name]()
    assert png == every_plot()[name]()
    assert set(chunks(png)) == {b"IHDR", b"PLTE", b"pHYs", b"IDAT", b"IEND"}
    width, height = struct.unpack(">II", png[16:24])
    assert width == 840
    assert 300 <= height <= 1000
    assert 5_000 < len(png) < 60_000


@pytest.mark.parametrize("name", every_plot())
def test_no_text_runs_out_of_the_picture(name, figure_of):
    figure = figure_of(every_plot()[name])
    frame = figure.bbox
    shown = [*figure.texts]
    for axes in figure.axes:
        shown += [*axes.texts, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            shown += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    drawn = [text for text in shown if text.get_text() and text.get_visible()]
    assert len(drawn) > 10
    for text in drawn:
        box = text.get_window_extent()
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1, text.get_text()
        assert frame.y0 <= box.y0 < box.y1 <= frame.y1, text.get_text()


@pytest.mark.parametrize("name", ["roc", "precision_recall", "reliability", "confusion", "lift", "scores"])
@pytest.mark.parametrize(
    ("labels", "probabilities"),
    [
        ([True, False], [0.7, 0.2]),
        ([True, False, False], [0.5, 0.5, 0.5]),
        ([True, False, True, False], [1.0, 0.0, 1.0, 0.0]),
        ([True, False, True, False], [0.0, 1.0, 0.0, 1.0]),
        ([True] + [False] * 99, [0.001] * 100),
    ],
    ids=["two users", "constant", "certain and right", "certain and wrong", "nobody reaches the threshold"],
)
def test_odd_models_are_drawn_too(name, labels, probabilities, monkeypatch):
    monkeypatch.setattr(plots, "_DPI", 30)
    png = every_plot(np.array(labels), np.array(probabilities))[name]()
    assert struct.unpack(">I", png[16:20]) == (168,)


def test_roc_shows_the_curve_and_its_area(figure_of):
    figure = figure_of(lambda: roc_plot(np.array([False, True, False, True]), np.array([0.1, 0.4, 0.6, 0.9]), AUC))
    assert texts(figure)[0] == "ROC: AUC 0.842 (0.821 to 0.861)"
    assert texts(figure)[1] == "4 held-out users, 2 churned. Intervals are of 95 %."
    curve = figure.axes[0].lines[-1].get_xydata().tolist()
    assert curve == [[0, 0], [0, 0.5], [0.5, 0.5], [0.5, 1], [1, 1]]


def test_precision_recall_marks_the_threshold_and_the_base_rate(figure_of):
    labels, probabilities = np.array([True, False, True, False]), np.array([0.9, 0.8, 0.3, 0.1])
    figure = figure_of(lambda: precision_recall_plot(labels, probabilities, 0.3, AUC))
    base, _, point = figure.axes[0].lines
    assert base.get_ydata()[0] == 0.5
    assert point.get_xydata().tolist() == [[1.0, 2 / 3]]
    assert "Average precision 0.842 (0.821 to 0.861)" in said(figure)
    assert "threshold 0.3\nrecall 1.00, precision 0.67" in said(figure)
    assert "base rate 50.0 %" in said(figure)
    nobody = figure_of(lambda: precision_recall_plot(labels, probabilities, 0.95, AUC))
    assert "nobody reaches the threshold 0.95" in said(nobody)


def test_reliability_counts_each_bin_and_judges_by_a_perfect_model(figure_of):
    labels = np.array([False, False, True, True, True])
    bins = reliability(labels, np.array([0.05, 0.05, 0.05, 0.95, 0.95]))
    figure = figure_of(lambda: reliability_plot(bins, Interval(0.2, 0.1, 0.3), 0.1))
    assert "Not calibrated: ECE 0.200 (0.100 to 0.300)" in said(figure)
    assert "5 held-out users." in said(figure)
    assert "up to 0.100 in 95 % of draws" in said(figure)
    assert figure.axes[0].lines[-1].get_xydata() == pytest.approx(np.array([[0.05, 1 / 3], [0.95, 1]]))
    assert [patch.get_height() for patch in figure.axes[1].patches] == [3, 2]
    calibrated = figure_of(lambda: reliability_plot(bins, Interval(0.1, 0.1, 0.3), 0.1))
    assert said(calibrated).startswith("Calibrated: ECE 0.100")


def test_the_intervals_of_bins_are_wilsons():
    low, high = plots._wilson(np.array([0.5, 0.0]), np.array([10, 20]))
    assert low == pytest.approx([0.2366, 0], abs=1e-4)
    assert high == pytest.approx([0.7634, 0.1611], abs=1e-4)


def test_confusion_counts_the_decisions(figure_of):
    labels = np.array([True, True, True, True, False, False, False, False])
    probabilities = np.array([0.9, 0.3, 0.1, 0.2, 0.8, 0.2, 0.1, 0.1])
    figure = figure_of(lambda: confusion_plot(labels, probabilities, 0.3, recall=AUC, precision=AUC))
    cells = [text.replace("\N{NO-BREAK SPACE}", " ") for text in texts(figure)[3:]]
    assert cells == [
        "3",
        "75.0 % of stayers\nrightly left alone",
        "1",
        "25.0 % of stayers\ncontacted in vain",
        "2",
        "50.0 % of churners\nmissed",
        "2",
        "50.0 % of churners\nfound",
    ]
    assert said(figure).startswith("Finds 84 % (82 to 86 %) of churners 8 held-out users, 4 churned.")


def test_lift_marks_what_the_top_holds(figure_of):
    figure = figure_of(every_plot()["lift"])
    assert texts(figure)[0] == "The top 10 % hold 28 % (25 to 30 %) of churners"
    assert "Lift 2.8 (2.5 to 3.0)" in said(figure)
    assert {"top 10 %: 28.0 %", "lift 2.80"} <= set(texts(figure))
    assert figure.axes[0].lines[1].get_xydata().tolist() == [[0, 0], [LABELS.mean(), 1], [1, 1]]
    gains = figure.axes[0].lines[2].get_xydata()
    assert gains[0].tolist() == [0, 0]
    assert gains[1:] == pytest.approx(lift_curve(LABELS, PROBABILITIES)[["share", "captured"]].to_numpy())


def test_importances_are_in_order_and_grey_where_they_may_be_nothing(figure_of):
    figure = figure_of(lambda: importance_plot(IMPORTANCES.iloc[::-1], 400))
    assert texts(figure)[0] == "contract_type matters most: 0.128"
    assert texts(figure)[1] == "(0.115 to 0.142)"
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == IMPORTANCES["feature"].tolist()
    assert [bar.get_width() for bar in axes.patches] == [0.128, 0.03, -0.001]
    first, second, third = (bar.get_facecolor() for bar in axes.patches)
    assert first == second != third


def test_scores_are_split_by_class(figure_of):
    labels, probabilities = np.array([True, True, False, False, False]), np.array([0.6, 0.2, 0.3, 0.1, 0.1])
    figure = figure_of(lambda: score_plot(labels, probabilities, 0.3))
    assert texts(figure)[0] == "Median score: churned 0.40, stayed 0.10"
    assert {"2 churned\n50.0 % from 0.3 on", "3 stayed\n33.3 % from 0.3 on"} <= set(texts(figure))
    assert [axes.lines[0].get_xdata()[0] for axes in figure.axes] == [0.3, 0.3]


@pytest.mark.parametrize(
    ("capacity", "title", "blue", "note"),
    [
        (None, "Contacting 3 customers is worth 156", "(blue)", "3 to contact\nworth 156"),
        (3, "Contacting 3 customers is worth 156", "(blue)", "3 to contact\nworth 156"),
        (
            2,
            "Contacting 2 customers is worth 128",
            "(blue; dashed: beyond the capacity)",
            "2 to contact, the capacity\nworth 128",
        ),
    ],
)
def test_contacts_add_up_in_order_with_the_capacity_marked(capacity, title, blue, note, figure_of):
    figure = figure_of(lambda: contacts_plot(FEW, capacity, 7))
    assert texts(figure)[0] == title
    first = "6 customers, scored by version 7. 4 are expected to churn, 3 of them worth contacting"
    assert f"{first} {blue}. Grey: the others." in said(figure)
    assert note in texts(figure)
    contacted = 3 if capacity is None else capacity
    value = [0, 88, 128, 156, 170.8, 162.8, 146.52]
    below = figure.axes[1]
    zero, chosen, beyond, rest, *marks = below.lines
    assert zero.get_ydata() == [0, 0]
    assert chosen.get_xydata() == pytest.approx(np.column_stack([range(contacted + 1), value[: contacted + 1]]))
    assert beyond.get_xydata() == pytest.approx(np.column_stack([range(contacted, 4), value[contacted:4]]))
    assert rest.get_xydata() == pytest.approx(np.column_stack([range(3, 7), value[3:]]))
    assert marks[-1].get_xydata().tolist() == [[contacted, pytest.approx(value[contacted])]]
    assert [line.get_xdata() for line in marks[:-1]] == ([[capacity, capacity]] if capacity else [])
    assert below.get_xlim() == (0, 6)


def test_a_capacity_that_binds_nobody_is_named_apart(figure_of):
    assert "capacity 5" in texts(figure_of(lambda: contacts_plot(FEW, 5, 7)))
    assert not [text for text in texts(figure_of(lambda: contacts_plot(FEW, 7, 7))) if "capacity" in text]


@pytest.mark.parametrize("frame", [SCORED, MANY], ids=["hundreds", "a million"])
def test_amounts_of_contacts_have_room_beside_their_axis(frame, figure_of):
    for axes in figure_of(lambda: contacts_plot(frame, 40, 3)).axes:
        low, high = axes.get_ylim()
        shown = [tick.label1 for tick in axes.yaxis.get_major_ticks() if low <= tick.get_loc() <= high]
        assert min(label.get_window_extent().x0 for label in shown) > axes.yaxis.label.get_window_extent().x1


def test_contacts_show_who_reaches_the_threshold(figure_of):
    above = figure_of(lambda: contacts_plot(FEW, None, 7)).axes[0]
    stay, churn = (patch.get_data() for patch in above.patches)
    assert np.flatnonzero(stay.values).tolist() == [4, 11]
    assert stay.values[[4, 11]] == pytest.approx([1 / 6, 1 / 6])
    apart = churn.values - churn.baseline
    assert np.flatnonzero(apart).tolist() == [12, 16, 20, 36]
    assert apart.sum() == pytest.approx(4 / 6)
    assert above.lines[0].get_xdata()[0] == 0.3
    assert above.texts[0].get_text().replace("\N{NO-BREAK SPACE}", " ") == "66.7 % from the\nthreshold 0.3 on"


@pytest.mark.parametrize(
    ("frame", "title"),
    [
        (scored([0.1], [100]), "Nobody to contact"),
        (scored([0.9, 0.8], [1, 1]), "Nobody to contact"),
        (scored([1.0, 1.0], [100, 100]), "Contacting 2 customers is worth 200"),
    ],
    ids=["nobody reaches the threshold", "nobody is worth it", "everybody"],
)
def test_odd_months_are_drawn_too(frame, title, figure_of):
    assert texts(figure_of(lambda: contacts_plot(frame, 1_000, 1)))[0] == title


def test_segments_name_the_worst_and_say_where_there_is_no_auc(figure_of):
    figure = figure_of(every_plot()["segments"])
    assert "Lowest AUC: contract_type Two year, 0.630 (0.470 to 0.780)" in said(figure)
    assert texts(figure).count("one class only") == 1
    assert {"952", "447", "1,504", "7"} <= set(texts(figure))
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["contract_type", "Month-to-month", "Two year", "user_is_senior", "False", "True"]
    points = figure.axes[0].collections[-1]
    assert points.get_offsets().tolist() == [[0.73, 1], [0.63, 2], [0.85, 4]]
    worse, also_worse, not_worse = points.get_facecolors().tolist()
    assert worse == also_worse != not_worse


def test_segments_of_one_class_each_are_drawn(figure_of):
    segments = [Segment("net_service", "$x^", 3, 0, {}), Segment("net_service", "$\\frac{", 2, 2, {})]
    figure = figure_of(lambda: segments_plot(segments, AUC))
    assert texts(figure)[0] == "All users: AUC 0.842 (0.821 to 0.861)"
    assert texts(figure).count("one class only") == 2


def test_value_marks_the_choice_and_the_best(figure_of):
    thresholds, values = np.array([0.1, 0.2, 0.3]), np.array([-5_000.0, 20_826.4, 19_000.0])
    figure = figure_of(lambda: value_plot(thresholds, values, threshold=0.3, value=19_000.0, users=1_783))
    assert texts(figure)[0] == "Acting from 0.3 on brings 19,000"
    assert "1,783 held-out users" in said(figure)
    assert "the most is 20,826, from 0.2 on." in said(figure)
    assert figure.axes[0].lines[-1].get_xydata().tolist() == [[0.3, 19_000]]


def test_drift_shows_size_by_length_and_significance_by_colour(figure_of):
    report = drift_between(REFERENCE, CURRENT)
    figure = figure_of(lambda: drift_plot(report))
    assert texts(figure)[0] == "2 of 3 features drift: large at most"
    assert "300 users against 400" in said(figure)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["plan", "hours", "stalls", "score"]
    psi = {one.name: one.psi for one in report.features}
    assert [bar.get_width() for bar in axes.patches] == [psi["plan"], psi["hours"], psi["stalls"], 0]
    first, second, third, fourth = (bar.get_facecolor() for bar in axes.patches)
    assert first == second != third == fourth
    assert [line.get_xdata()[0] for line in axes.lines] == [0.1, 0.25]
    assert texts(figure).count("< 0.0001") == 2
    assert texts(figure).count("1.00") == 2
    assert {f"{psi['plan']:.3f}", f"{psi['stalls']:.3f}", "small", "moderate", "large"} <= set(texts(figure))


def test_what_drifts_is_drawn_in_both_months(figure_of):
    report = drift_between(REFERENCE, CURRENT)
    figure = figure_of(lambda: drifted_features_plot(report, REFERENCE, CURRENT))
    missing = round(100 * CURRENT["hours"].isna().mean())
    plan, hours, _ = sorted(report.features, key=lambda one: -one.psi)
    assert texts(figure)[3:] == [
        "plan",
        f"PSI {plan.psi:.3f} (large)",
        "hours",
        f"PSI {hours.psi:.3f} (large), missing 0 to {missing} %",
    ]
    before, after = figure.axes[0].patches
    shares = REFERENCE["plan"].value_counts(normalize=True)
    labels = [label.get_text().replace("\n", " ") for label in figure.axes[0].get_xticklabels()]
    assert labels == ["$x^", "a very long one", "basic"]
    assert before.get_data().values.tolist() == pytest.approx([shares[name] for name in labels])
    assert after.get_data().values.tolist() == [0, 0, 1]
    assert len(figure.axes[1].patches[0].get_data().values) == 30


def test_without_drift_the_nearest_to_it_is_drawn(figure_of):
    report = drift_between(REFERENCE, REFERENCE)
    figure = figure_of(lambda: drifted_features_plot(report, REFERENCE, REFERENCE))
    assert texts(figure)[0] == "None of 3 features drifts"
    assert "PSI 0.000 (none), not significant" in texts(figure)
    assert len(figure.axes) == 2


@pytest.mark.parametrize("values", [np.full(USERS, np.nan), np.r_[np.zeros(99_960), 1:41]], ids=["missing", "rare"])
def test_odd_features_are_drawn_too(values, figure_of):
    columns, frame = DRIFT_COLUMNS[:1], pd.DataFrame({"hours": values})
    report = compare(frame, frame, columns, reference_scores=PROBABILITIES, current_scores=PROBABILITIES)
    figure = figure_of(lambda: drifted_features_plot(report, frame, frame))
    before, after = (patch.get_data().values.tolist() for patch in figure.axes[0].patches)
    assert before == after
    assert sum(before) == pytest.approx(0 if np.isnan(values).all() else 1)


def test_at_most_six_features_are_drawn_and_entirely_missing_ones_too(monkeypatch, figure_of):
    columns = [Column(f"feature_{number}", "float", "One of many.") for number in range(8)]
    reference = pd.DataFrame({column.name: SEEDED.normal(0, 1, USERS) for column in columns})
    current = reference + 2
    current["feature_7"] = np.nan
    monkeypatch.setattr("test_plots.DRIFT_COLUMNS", columns)
    report = drift_between(reference, current)
    figure = figure_of(lambda: drifted_features_plot(report, reference, current))
    assert len(figure.axes) == 6
    assert "The 6 of greatest drift." in said(figure)
    assert texts(figure)[0] == "8 of 8 features drift: large at most"


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (1234567.8, 0, "1,234,568"),
        (-20, 2, "\N{MINUS SIGN}20.00"),
        (-0.0004, 3, "0.000"),
        (0.8425, 3, "0.843"),
        (-0.0, 0, "0"),
    ],
)
def test_amounts(value, digits, text):
    assert amount(value, digits) == text


@given(st.floats(-1e9, 1e9), st.integers(0, 4))
def test_an_amount_reads_back_as_what_it_rounds_to(value, digits):
    text = amount(value, digits).replace(",", "").replace("\N{MINUS SIGN}", "-")
    assert float(text) == pytest.approx(value, abs=0.5001 * 10**-digits)


def test_measures_with_their_intervals():
    kept = "\N{NO-BREAK SPACE}"
    assert with_interval(AUC) == f"0.842 (0.821{kept}to{kept}0.861)"
    assert percent(0.2654) == f"26.5{kept}%"
    assert percent_with_interval(AUC) == f"84{kept}% (82{kept}to{kept}86{kept}%)"


def test_performance_shows_what_was_promised_and_what_became_of_it(figure_of):
    figure = figure_of(lambda: performance_plot(HISTORY))
    assert texts(figure)[0] == "2024-04: AUC 0.650 (0.630 to 0.670)"
    assert "promised, by version 2 0.670 (0.650 to 0.690)." in said(figure)
    (axes,) = figure.axes
    bands = [collection.get_paths()[0].get_extents() for collection in axes.collections[:8:2]]
    assert [band.y0 for band in bands] == pytest.approx([0.82, 0.82, 0.65, 0.65])
    assert [band.y1 for band in bands] == pytest.approx([0.86, 0.86, 0.69, 0.69])
    achieved = axes.collections[-1]
    assert achieved.get_offsets().tolist() == [[0, 0.84], [1, 0.49], [2, 0.66], [3, 0.65]]
    contrast = [tuple(colour) == to_rgba(plots._CONTRAST) for colour in achieved.get_facecolors()]
    assert contrast == [False, True, False, False]
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "2024-01\nversion 1",
        "2024-02\nversion 1",
        "2024-03\nversion 2",
        "2024-04\nversion 2",
    ]
    assert axes.get_ylim()[0] < 0.47
    assert "chance" in said(figure)


def test_performance_of_one_month_and_of_many(figure_of):
    one = figure_of(lambda: performance_plot(HISTORY[:1])).axes[0]
    assert one.get_ylim()[0] < 0.5
    many = figure_of(lambda: performance_plot(history_of([0.8] * 24)))
    assert len(many.axes[0].get_xticks()) == 6
    assert "0.800" not in [text.get_text() for text in many.axes[0].texts]


def test_a_backtest_has_a_panel_for_each_scenario_with_its_months(figure_of):
    stable, late = figure_of(every_plot()["backtest"]).axes
    assert [axes.get_title("left") for axes in (stable, late)] == ["stable", "label delay"]
    lines = {line.get_label(): line.get_xydata().tolist() for line in late.lines}
    assert list(lines) == ["best possible", "never", "every month", "on drift", "on decay", "ours"]
    auc = BACKTEST[BACKTEST["scenario"] == "label-delay"].set_index("policy")["auc"]
    assert lines == {name: [[1, auc[name]]] for name in lines}
    assert stable.lines[-1].get_xdata().tolist() == [0, 1]
    assert [text.get_text() for text in stable.get_legend().get_texts()] == list(lines)
