import dataclasses
import re
from html.parser import HTMLParser
from itertools import pairwise

import pandas as pd
import pytest

from streamflow import model_card
from streamflow.errors import ArtifactRefused
from streamflow.evaluation import METRICS, Capture, FairnessGap, Interval, Segment
from streamflow.gates import NOT_TAKEN, Gate, Invariance
from streamflow.model_card import PLOTS, Card, Data, render, with_decision, with_forward
from streamflow.months import Month
from streamflow.plots import value_plot
from streamflow.procedure import Forward
from streamflow.scoring import Parity
from streamflow.training_config import Value
from streamflow.value import ValueReport

JANUARY, FEBRUARY = Month.parse("2024-01"), Month.parse("2024-02")
VOID = {"meta", "img", "br", "link", "input", "hr"}
# The head of a PNG of 840 by 590 pixels.
PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x03\x48\x00\x00\x02\x4e\x08\x03\x00\x00\x00"
HOSTILE = '</style><script>alert(\'x\')</script>{{ 7 * 7 }}"><img src="http://evil" onerror="x"><!-- decision -->'


def around(value, spread=0.02):
    return Interval(value, value - spread, value + spread)


QUALITY = {name: around(0.5 + 0.01 * index) for index, name in enumerate(METRICS)} | {
    "auc": Interval(0.842, 0.821, 0.861),
    "ece": Interval(0.019, 0.013, 0.040),
    "recall": Interval(0.764, 0.725, 0.803),
}
SEGMENTS = (
    Segment("contract_type", "Month-to-month", 952, 409, {name: around(0.7) for name in METRICS}),
    Segment("contract_type", "Two year", 447, 18, {**QUALITY, "auc": Interval(0.629, 0.472, 0.778)}),
    Segment("user_is_senior", "True", 7, 0, {"brier": around(0.123)}),
)
CANDIDATES = pd.DataFrame(
    {
        "estimator": ["logistic_regression", "gradient_boosting"],
        "service": ["churn_v1", "churn_v2"],
        "calibrated": [False, True],
        "logloss": [0.4339, 0.4183],
        "auc": [0.829, 0.845],
        "difference": [0.0156, 0.0],
        "standard_error": [0.0029, 0.0],
        "chosen": [False, True],
        "seconds": [0.5, 1.9],
    }
)
WINDOWS = pd.DataFrame(
    {
        "name": ["month", "recent"],
        "months": ["2024-01", "2023-12 2024-01"],
        "half_life_months": [None, 3.0],
        "rows": [5_260, 10_520],
        "logloss": [0.524, 0.5555],
        "auc": [0.659, 0.581],
        "difference": [0.0, 0.0315],
        "standard_error": [0.0, 0.0035],
        "chosen": [True, False],
        "seconds": [0.6, 1.6],
    }
)
CARD = Card(
    month=JANUARY,
    as_of=JANUARY.as_of,
    estimator="gradient_boosting",
    service="churn_v2",
    calibrated=True,
    threshold=0.2849,
    threshold_reason="Contacting from there on brings the most.",
    params={"max_iter": 100, "learning_rate": 0.05},
    data=Data(rows=7_043, dropped=12, churn_rate=0.2654, trained_on=5_260, held_out=1_783, held_out_churned=466),
    windows=WINDOWS,
    window_reason="The month alone predicts best.",
    candidates=CANDIDATES,
    reason="It has the lowest logloss.",
    train=dict.fromkeys(METRICS, 0.9) | {"auc": 0.862},
    validation=QUALITY,
    perfect_ece=0.029,
    capture=Capture(0.1, 178, Interval(0.28, 0.25, 0.3), Interval(2.8, 2.5, 3.01)),
    segments=SEGMENTS,
    fairness=(FairnessGap("user_gender", "recall", Interval(0.041, -0.032, 0.122), {"Female": 0.744, "Male": 0.784}),),
    protected_used=(),
    value=ValueReport(
        revenue_at_risk=33_919.4,
        expected_value=18_702.0,
        realized_value=19_929.0,
        acted=672,
        customers=1_783,
        value_per_contact=29.656,
        everybody=-7_048.0,
    ),
    assumptions=Value(contact_cost=20.0, retained_share=0.2, months_retained=6.0),
    fee=64.89,
    importances=pd.DataFrame(
        {
            "feature": ["contract_type", "skips_7d"],
            "importance": [0.128, 0.0],
            "low": [0.115, -0.001],
            "high": [0.142, 0.001],
        }
    ),
    forward=None,
    parity=Parity(2.2e-16, 0, 7_043),
    golden_rows=32,
    invariances=(Invariance("user_gender", NOT_TAKEN, 0.0), Invariance("monthly_fee", "+0.01", 0.0125)),
    scoring_microseconds=18.6,
    possible_leaks={},
    lineage={
        "month": "2024-01",
        "window": ["2024-01"],
        "dataset": {"digest": "18f3b82f64a9" + "0" * 52, "rows": 7_043},
        "files": {"users": {"revision": 2, "digest": "7dfb4cf67742" + "0" * 52}},
        "earlier": [{"month": "2023-12", "files": {"users": {"revision": 1, "digest": "9a0b1c2d3e4f" + "0" * 52}}}],
        "config_digest": "7268b527a9a4" + "0" * 52,
        "code_version": "5a6f0d62b0c1",
        "seed": 42,
        "python": "3.11.9",
        "libraries": {"numpy": "2.4.0", "scikit-learn": "1.9.1"},
    },
    plots=dict.fromkeys(PLOTS, PNG),
)
GATES = (
    Gate("ranks_better_than_chance", True, 0.8154, 0.5, "the lower end must exceed 0.5"),
    Gate("fair", False, None, 0.25, "no group to compare"),
    Gate("signature_fits", True, 1, 1, "it fits"),
)


class Page(HTMLParser):
    """A page's elements with their attributes and text; refuses one whose tags do not pair."""

    def __init__(self, html):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        element = {"tag": tag, "attrs": dict(attrs), "text": "", "inside": [one["tag"] for one in self._open]}
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag):
        assert self._open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self._open:
            element["text"] += data

    def all(self, *tags):
        return [element for element in self.elements if element["tag"] in tags]

    @property
    def text(self):
        return plain(self.all("body")[0]["text"])

    def section(self, name):
        return plain(next(one["text"] for one in self.all("section") if one["attrs"]["id"] == name))

    def rows(self, caption):
        """The cells of the table whose caption begins so."""
        table, found = False, []
        for element in self.elements:
            if element["tag"] == "caption":
                table = element["text"].startswith(caption)
            elif table and element["tag"] == "tr":
                found.append([])
            elif table and element["tag"] in ("th", "td"):
                found[-1].append(plain(element["text"]))
        return found


def plain(text):
    return " ".join(text.split())


def page(**changes):
    return Page(render(dataclasses.replace(CARD, **changes)))


@pytest.fixture(scope="module")
def rendered():
    return render(CARD)


@pytest.fixture(scope="module")
def card(rendered):
    return Page(rendered)


def test_the_headline_says_what_it_is_and_how_good(card):
    header = plain(card.all("header")[0]["text"])
    assert "Churn model of 2024-01" in header
    assert "gradient_boosting on churn_v2, with sigmoid calibration. Features and labels as of 2024-01-31." in header
    assert "the higher probability in 84.2 % (82.1 to 86.1 %) of cases, measured on 1,783 customers" in header
    assert "can be taken at their word: they are off by 1.9 percentage points" in header
    assert "up to 2.9 in 95 % of draws" in header


def test_a_model_that_is_off_calibration_says_so():
    assert (
        "cannot be taken at their word: they are off by 5.0 percentage points"
        in page(validation={**QUALITY, "ece": around(0.05)}).text
    )


def test_each_metric_is_there_of_training_and_held_out_users(card):
    rows = card.rows("Metrics of training users and of 1,783 held-out users")
    assert rows[1][:3] == ["AUC", "0.862", "0.842 (0.821 to 0.861)"]
    assert len(rows) == 1 + len(METRICS)
    assert [name for name, *_ in model_card.METRICS] == list(METRICS)
    assert "AUC is 0.862, 0.020 more than on unseen ones" in card.section("quality")


def test_data_and_files(card):
    data = card.section("data")
    for fact in ("7,043", "5,260", "1,783, 466 churned", "26.5 %", "12 customers were left out", "18f3b82f64a9"):
        assert fact in data
    assert card.rows("The landed files")[1:] == [
        ["users of 2024-01", "2", "7dfb4cf67742"],
        ["users of 2023-12", "1", "9a0b1c2d3e4f"],
    ]
    assert ["Learned from", "5,260 in 2024-01"] in card.rows("The training dataset")
    assert "No customer was left out" in page(data=dataclasses.replace(CARD.data, dropped=0)).section("data")


def test_one_month_alone_needs_no_naming():
    found = page(windows=pd.DataFrame(), lineage={**CARD.lineage, "earlier": []})
    assert found.rows("The landed files")[1:] == [["users", "2", "7dfb4cf67742"]]
    assert ["Learned from", "5,260"] in found.rows("The training dataset")
    assert not found.rows("Windows of months")


def test_windows_and_the_reason(card):
    rows = card.rows("Windows of months")
    assert rows[1] == ["month (chosen)", "2024-01", "–", "5,260", "0.5240", "0.0000", "0.0000", "0.659", "0.6"]  # noqa: RUF001
    assert rows[2] == ["recent", "2023-12 2024-01", "3", "10,520", "0.5555", "0.0315", "0.0035", "0.581", "1.6"]
    assert "The month alone predicts best." in card.section("choice")


def test_candidates_and_the_reason(card):
    rows = card.rows("Candidates by cross-validation")
    assert rows[1] == ["logistic_regression", "churn_v1", "no", "0.4339", "0.0156", "0.0029", "0.829", "0.5"]
    assert rows[2][:3] == ["gradient_boosting (chosen)", "churn_v2", "yes"]
    assert "It has the lowest logloss." in card.section("choice")
    assert ["learning_rate", "0.05"] in card.rows("Hyper-parameters")


def test_a_model_trained_by_name_has_no_candidates():
    found = page(candidates=pd.DataFrame(), params={})
    assert "trained by name" in found.section("choice")
    assert not found.rows("Candidates")


def test_money(card):
    assert card.rows("What it is worth") == [
        ["Revenue at risk, per month", "33,919"],
        ["Customers contacted", "672 of 1,783"],
        ["Expected value of contacting them", "18,702"],
        ["Realized value, given who churned", "19,929"],
        ["Realized value per contact", "29.66"],
        ["Had everybody been contacted", "\N{MINUS SIGN}7,048"],
    ]
    assert card.rows("What contacting a customer brings, at a fee of 64.89 a month")[1:] == [
        ["Contacted", "57.87", "\N{MINUS SIGN}20.00"],
        ["Left alone", "0.00", "0.00"],
    ]
    money = card.section("money")
    assert (
        "a contact costs 20.00, 20 % of the churners contacted stay, and each of them pays for 6 more months" in money
    )
    assert "The 178 customers with the highest probabilities, 10 % of all, hold 28 % (25 to 30 %)" in money
    assert "lift of 2.80 (2.50 to 3.01)" in money
    nobody = dataclasses.replace(CARD.value, value_per_contact=None)
    assert "nobody is contacted" in page(value=nobody).section("money")


def test_segments_and_the_worst_of_them(card):
    rows = card.rows("Every metric by segment")
    assert rows[1] == ["contract_type"]
    assert rows[2][:4] == ["Month-to-month", "952", "409", "0.7000.680–0.720"]  # noqa: RUF001
    assert rows[4] == ["user_is_senior"]
    assert rows[5] == ["True", "7", "0", "–", "–", "–", "0.1230.103–0.143", *["–"] * 5]  # noqa: RUF001
    section = card.section("segments")
    assert (
        "worst among customers with contract_type Two year (447 held out, 18 churned): AUC 0.629 (0.472 to 0.778)"
        in section
    )
    assert "smallest share of churners among those with contract_type Month-to-month: recall 0.700" in section


def test_fairness_and_what_is_predicted_from(card):
    rows = card.rows("Differences between groups")
    assert rows[1:] == [["user_gender"], ["recall", "Female 0.744, Male 0.784", "0.041\N{MINUS SIGN}0.032 to 0.122"]]
    assert "The model predicts from no protected attribute" in card.section("segments")
    used = page(protected_used=("user_gender", "user_is_senior"), fairness=(), segments=())
    assert "The model predicts from user_gender, user_is_senior." in used.section("segments")
    assert "No protected attribute has two groups" in used.section("segments")


def test_importances(card):
    assert card.rows("Fall of AUC")[1] == ["contract_type", "0.128 (0.115 to 0.142)"]


def test_forward_in_time(card):
    assert "Not known" in card.section("forward")
    worse = {**QUALITY, "auc": Interval(0.487, 0.456, 0.517)}
    found = page(forward=Forward(JANUARY, FEBRUARY, 1_780, worse))
    assert "On the 1,780 held-out users of 2024-02 it reaches an AUC of 0.487 (0.456 to 0.517)" in found.section(
        "forward"
    )
    assert "does not carry over" in found.section("forward")
    assert found.rows("Held-out users of the two months")[1] == [
        "AUC",
        "0.842 (0.821 to 0.861)",
        "0.487 (0.456 to 0.517)",
    ]
    kept = page(forward=Forward(JANUARY, FEBRUARY, 1_780, QUALITY))
    assert "does not carry over" not in kept.section("forward")


def test_what_a_later_month_shows_takes_its_place(rendered):
    decided = with_decision(rendered, GATES, "waits for a person", 3)
    worse = Forward(JANUARY, FEBRUARY, 1_780, {**QUALITY, "auc": Interval(0.487, 0.456, 0.517)})
    later = with_forward(with_forward(decided, Forward(JANUARY, FEBRUARY, 9, QUALITY), QUALITY), worse, QUALITY)
    assert Page(later).section("forward") == page(forward=worse).section("forward")
    assert Page(later).section("decision") == Page(decided).section("decision")
    with pytest.raises(ArtifactRefused, match="2024-01 does not have exactly one place for its validation forward"):
        with_forward(later + "<!-- validation forward in time -->", worse, QUALITY)


def test_possible_leaks(card):
    assert "None flagged" in card.section("leaks")
    found = page(possible_leaks={"total_paid": 0.987})
    assert found.rows("Features that alone")[1] == ["total_paid", "0.987"]
    assert "None flagged" not in found.section("leaks")


def test_checks_and_reproduction(card):
    assert card.rows("What was checked")[1:] == [
        ["Agrees with the pipeline", "largest difference 2.2e\N{MINUS SIGN}16 in 7,043 rows"],
        ["Decides as the pipeline does", "0 of 7,043 rows decided otherwise"],
        ["Golden rows", "32 rows stored with the scorer score as stored, to the last bit"],
        ["Invariant to user_gender", "not a feature of this model"],
        ["Invariant to monthly_fee", "+0.01: the probability moves by 0.0125 at most"],
        ["Time to score a customer", "19 µs"],
    ]
    made_with = card.section("reproduction")
    for fact in ("7268b527a9a4", "5a6f0d62b0c1", "Seed42", "3.11.9", "numpy2.4.0", "streamflow rebuild --version N"):
        assert fact in made_with


def test_before_registration_nothing_is_decided(card):
    assert card.section("decision") == (
        "Decision Not registered yet, so nothing is decided: no gate was checked, and it serves nobody."
    )


def test_a_decision_takes_its_place_and_can_be_put_anew(rendered):
    decided = with_decision(rendered, GATES, "waits for a person", 3)
    found = Page(decided)
    section = found.section("decision")
    assert section.startswith("Decision Version 3. waits for a person 2 of 3 gates passed.")
    assert "Not registered yet" not in found.text
    assert found.rows("What was measured")[1:] == [
        ["ranks better than chance", "✓ passed", "0.8154", "0.5", "the lower end must exceed 0.5"],
        ["fair", "✗ failed", "–", "0.25", "no group to compare"],  # noqa: RUF001
        ["signature fits", "✓ passed", "1", "1", "it fits"],
    ]
    assert "streamflow rebuild --version 3" in section
    assert with_decision(decided, GATES[:1], "promoted", 3) == with_decision(rendered, GATES[:1], "promoted", 3)
    start, end = decided.index("<!-- decision -->"), decided.index("<!-- end of decision -->")
    assert rendered.startswith(decided[:start])
    assert rendered.endswith(decided[end:])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda html: html.replace("<!-- decision -->", ""),
        lambda html: html.replace("<!-- end of decision -->", ""),
        lambda html: html + "<!-- decision -->",
        lambda html: html.replace("<main>", "<main><!-- end of decision -->"),
        lambda html: html + "<!-- end of decision -->",
        lambda _: "",
    ],
)
def test_a_page_without_exactly_one_place_for_a_decision_is_refused(rendered, spoil):
    with pytest.raises(ArtifactRefused, match="version 3 does not have exactly one place"):
        with_decision(spoil(rendered), GATES, "promoted", 3)


@pytest.mark.parametrize("lacking", PLOTS)
def test_every_plot_is_needed(lacking):
    with pytest.raises(ValueError, match=re.escape(lacking)):
        page(plots={name: PNG for name in PLOTS if name != lacking})


def test_a_plot_that_the_card_does_not_know_is_refused():
    with pytest.raises(ValueError, match=r"radar\.png"):
        page(plots={**CARD.plots, "radar.png": PNG})


def test_figures_carry_their_picture_size_and_words(card):
    images = card.all("img")
    assert len(images) == len(PLOTS) == len(card.all("figure")) == len(card.all("figcaption"))
    assert len({image["attrs"]["alt"] for image in images}) == len(PLOTS)
    for image in images:
        assert image["attrs"]["src"].startswith("data:image/png;base64,iVBORw0KGgo")
        assert (image["attrs"]["width"], image["attrs"]["height"]) == ("840", "590")
        assert len(image["attrs"]["alt"]) > 40
    assert any("AUC 0.842 (0.821 to 0.861)" in plain(image["attrs"]["alt"]) for image in images)


def test_a_real_plot_fits_in():
    png = value_plot(
        pd.Series([0.1, 0.9]).to_numpy(), pd.Series([1.0, 2.0]).to_numpy(), threshold=0.1, value=1.0, users=2
    )
    found = page(plots={**CARD.plots, "value.png": png})
    assert ("840", "885") in {(image["attrs"]["width"], image["attrs"]["height"]) for image in found.all("img")}


@pytest.mark.parametrize("decide", [False, True])
def test_the_page_is_well_formed_and_readable_by_machines(rendered, decide):
    found = Page(with_decision(rendered, GATES, "promoted", 3) if decide else rendered)
    levels = [int(heading["tag"][1]) for heading in found.all("h1", "h2", "h3", "h4")]
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = [element["attrs"]["id"] for element in found.elements if "id" in element["attrs"]]
    assert len(ids) == len(set(ids))
    assert {link["attrs"]["href"].removeprefix("#") for link in found.all("a")} <= set(ids)
    assert {section["attrs"]["id"] for section in found.all("section")} <= {
        link["attrs"]["href"].removeprefix("#") for link in found.all("nav", "a") if "href" in link["attrs"]
    }
    assert len(found.all("caption")) == len(found.all("table"))
    assert all(th["attrs"].get("scope") in ("col", "row", "rowgroup") for th in found.all("th"))
    assert found.all("html")[0]["attrs"]["lang"] == "en"
    assert all(
        len(row) == len(rows[0]) for rows in [found.rows("Metrics of"), found.rows("Candidates")] for row in rows
    )


def test_the_page_loads_nothing_and_runs_nothing(rendered):
    found = Page(rendered)
    assert not found.all("script", "link", "iframe", "object", "form")
    assert not re.findall(r"https?:|//\w|url\(|@import", re.sub(r"data:image/png;base64,[\w+/=]+", "", rendered))
    assert not [name for element in found.elements for name in element["attrs"] if name.startswith("on")]
    assert "default-src 'none'" in rendered
    assert "prefers-color-scheme: dark" in rendered
    assert "@media print" in rendered


def test_the_same_card_gives_the_same_page(rendered):
    assert render(dataclasses.replace(CARD)) == rendered


def test_hostile_text_stays_text():
    hostile_row = CANDIDATES.assign(estimator=HOSTILE, service=HOSTILE)
    html = render(
        dataclasses.replace(
            CARD,
            estimator=HOSTILE,
            service=HOSTILE,
            threshold_reason=HOSTILE,
            params={HOSTILE: HOSTILE},
            candidates=hostile_row,
            reason=HOSTILE,
            segments=(Segment(HOSTILE, HOSTILE, 9, 3, QUALITY),),
            fairness=(FairnessGap(HOSTILE, HOSTILE, around(0.1), {HOSTILE: 0.1}),),
            protected_used=(HOSTILE,),
            importances=CARD.importances.assign(feature=HOSTILE),
            invariances=(Invariance(HOSTILE, HOSTILE, 0.0),),
            possible_leaks={HOSTILE: 0.99},
            lineage={
                **CARD.lineage,
                "dataset": {"digest": HOSTILE},
                "files": {HOSTILE: {"revision": HOSTILE, "digest": HOSTILE}},
                "config_digest": HOSTILE,
                "code_version": HOSTILE,
                "seed": HOSTILE,
                "python": HOSTILE,
                "libraries": {HOSTILE: HOSTILE},
            },
        )
    )
    decided = with_decision(html, (Gate(HOSTILE, False, 0.0, 1.0, HOSTILE),), HOSTILE, 3)
    for text in (html, decided, with_decision(decided, GATES, "promoted", 3)):
        found = Page(text)
        assert not found.all("script")
        assert len(found.all("img")) == len(PLOTS)
        assert text.count("<!-- decision -->") == 1
        assert "{{ 7 * 7 }}" in text
        assert not any("onerror" in element["attrs"] for element in found.elements)
    assert HOSTILE in Page(decided).section("decision")
