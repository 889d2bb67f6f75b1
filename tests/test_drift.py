import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from streamflow import drift_html, landing
from streamflow.contract import CONTRACT, USER_ID, Column
from streamflow.drift import ALPHA, DriftReport, FeatureDrift, compare, holm, psi, size_of
from streamflow.drift_html import evidently_report
from streamflow.errors import DriftRefused
from streamflow.months import Month

HOURS = Column("hours", "float", "Hours watched.")
STALLS = Column("stalls", "integer", "Playback stalls.")
SENIOR = Column("senior", "boolean", "65 years or older.")
PLAN = Column("plan", "category", "The plan.", categories=("basic", "plus", "family", "trial"))
COLUMNS = (HOURS, STALLS, SENIOR, PLAN)
SCORES = np.linspace(0.01, 0.99, 50)


def month(users: int, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "hours": rng.normal(25, 5, users),
            "stalls": rng.poisson(1.5, users),
            "senior": rng.random(users) < 0.16,
            "plan": rng.choice(PLAN.categories, users, p=[0.5, 0.3, 0.19, 0.01]),
        }
    )


def compared(reference: pd.DataFrame, current: pd.DataFrame, *columns: Column, **scores: np.ndarray) -> DriftReport:
    given = {"reference_scores": SCORES, "current_scores": SCORES} | scores
    return compare(reference, current, columns or COLUMNS, **given)


def drift_of(column: Column, reference: object, current: object) -> FeatureDrift:
    """What is found of one column, whose values are given."""
    frames = [pd.DataFrame({column.name: values}) for values in (reference, current)]
    return compared(*frames, column).features[0]


def real_month(folder: Path, which: Month) -> pd.DataFrame:
    frames = [
        landing.parse((folder / table.file).read_bytes(), table, which).values.to_pandas().set_index(USER_ID)
        for table in CONTRACT.snapshots
    ]
    return pd.concat(frames, axis=1)


# --- the real months ------------------------------------------------------------------------------------------------

MOVED = ("watch_hours_30d", "rebuffer_events_7d", "failed_payments_90d", "support_tickets_90d")


@pytest.fixture(scope="module")
def real_months(real_data: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    return real_month(real_data / "month_000", Month(2024, 1)), real_month(real_data / "month_001", Month(2024, 2))


@pytest.mark.parametrize("service", ["churn_v1", "churn_v2", "churn_v2_protected"])
def test_in_the_real_february_four_features_drift_and_all_of_them_little(
    real_months: tuple[pd.DataFrame, pd.DataFrame], service: str
) -> None:
    report = compared(*real_months, *CONTRACT.service(service).columns)
    assert set(report.significant) == set(MOVED)
    found = {one.name: one for one in report.features}
    assert {name: round(found[name].psi, 3) for name in MOVED} == {
        "watch_hours_30d": 0.009,
        "rebuffer_events_7d": 0.036,
        "failed_payments_90d": 0.004,
        "support_tickets_90d": 0.007,
    }
    assert {found[name].size for name in MOVED} == {"small"}
    assert report.drifted("moderate") == report.large == ()
    assert {(one.p_value, one.psi, one.effect, one.size) for one in report.features if one.name not in MOVED} == {
        (1.0, 0.0, 0.0, "none")
    }


def test_failed_payments_of_the_real_february_are_found_as_counts(
    real_months: tuple[pd.DataFrame, pd.DataFrame],
) -> None:
    (column,) = (one for one in CONTRACT.features if one.name == "failed_payments_90d")
    january, february = (month[column.name] for month in real_months)
    found = drift_of(column, january, february)
    assert found.test == "chi-squared"
    assert found.p_value == pytest.approx(1e-4, rel=0.05)
    assert found.out_of_range == pytest.approx(4 / 7043)
    assert stats.ks_2samp(january, february, method="asymp").pvalue > ALPHA


# --- tests of values ------------------------------------------------------------------------------------------------


def test_continuous_values_are_tested_by_their_distribution_functions() -> None:
    reference, current = month(2_000)["hours"], month(1_500, seed=1)["hours"] + 1
    found = drift_of(HOURS, reference, current)
    expected = stats.ks_2samp(reference, current, method="asymp")
    assert found.test == "Kolmogorov-Smirnov"
    assert (found.statistic, found.p_value) == (expected.statistic, expected.pvalue)
    assert found.effect == found.statistic
    assert found.significant


@pytest.mark.parametrize(
    ("column", "values", "cells"),
    [
        (STALLS, [0, 1, 2], [[40, 40, 20], [20, 50, 30]]),
        (HOURS, [0.5, 1.5, 24.0], [[40, 40, 20], [20, 50, 30]]),
        (SENIOR, [False, True], [[80, 20], [60, 40]]),
        (PLAN, ["basic", "plus", "family"], [[40, 40, 20], [20, 50, 30]]),
    ],
    ids=["integer", "float of few values", "boolean", "category"],
)
def test_few_distinct_values_are_tested_as_counts(column: Column, values: list[object], cells: list[list[int]]) -> None:
    months = [np.repeat(np.array(values, dtype=object), counts) for counts in cells]
    found = drift_of(column, *months)
    expected = stats.chi2_contingency(cells, correction=False)
    assert (found.test, found.about) == ("chi-squared", "values")
    assert found.statistic == pytest.approx(expected.statistic)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.effect == pytest.approx((expected.statistic / 200) ** 0.5)


def test_many_distinct_integers_are_tested_as_continuous() -> None:
    assert drift_of(STALLS, range(31), range(31)).test == "Kolmogorov-Smirnov"
    assert drift_of(STALLS, range(30), range(30)).test == "chi-squared"


@pytest.mark.parametrize(
    ("column", "levels", "cells", "merged"),
    [
        # Levels 3 and above are too few each; numbers join the next greater ones, and the last the ones before.
        (STALLS, [0, 1, 2, 3, 4, 5], [[60, 30, 6, 2, 2, 0], [50, 30, 10, 4, 5, 1]], [[60, 30, 6, 4], [50, 30, 10, 10]]),
        (STALLS, [0, 1, 2, 3], [[60, 38, 1, 1], [60, 37, 2, 1]], [[60, 40], [60, 40]]),
        (STALLS, [0, 1, 2], [[2, 2, 96], [0, 1, 99]], [[4, 96], [1, 99]]),
        # Categories join the next more common one.
        (PLAN, ["plus", "family", "basic", "trial"], [[80, 14, 2, 4], [70, 24, 1, 5]], [[80, 14, 6], [70, 24, 6]]),
    ],
    ids=["rare numbers", "a rare end", "one common level", "rare categories"],
)
def test_rare_levels_are_merged(column: Column, levels: list[object], cells: list[list[int]], merged: object) -> None:
    found = drift_of(column, *(np.repeat(np.array(levels, dtype=object), counts) for counts in cells))
    assert found.statistic == pytest.approx(stats.chi2_contingency(merged, correction=False).statistic)


def test_two_cells_of_too_few_users_are_tested_exactly() -> None:
    cells = [[1_000, 0], [98, 2]]
    found = drift_of(SENIOR, *(np.repeat([False, True], counts) for counts in cells))
    assert found.test == "Fisher"
    assert found.p_value == pytest.approx(stats.fisher_exact(cells).pvalue)
    assert stats.chi2_contingency(cells, correction=False).pvalue < found.p_value / 100


# --- missing values and odd months ----------------------------------------------------------------------------------


def test_missing_values_that_become_more_are_drift() -> None:
    reference, current = month(1_000), month(1_000, seed=1)
    reference.loc[:9, "hours"] = np.nan
    current.loc[:99, "hours"] = np.nan
    found = compared(reference, current).features[0]
    expected = stats.chi2_contingency([[10, 990], [100, 900]], correction=False)
    assert (found.test, found.about) == ("chi-squared", "missing")
    assert found.p_value == pytest.approx(2 * expected.pvalue, abs=0)
    assert (found.reference_missing, found.current_missing) == (0.01, 0.1)
    assert found.significant
    assert found.psi == pytest.approx((0.1 - 0.01) * np.log(10), rel=0.2)


def test_as_many_missing_values_are_no_drift() -> None:
    reference = month(1_000)
    reference.loc[:99, "hours"] = np.nan
    found = compared(reference, reference.copy()).features[0]
    assert (found.p_value, found.psi, found.significant) == (1, 0, False)


@pytest.mark.parametrize(
    ("column", "missing"), [(HOURS, np.nan), (STALLS, pd.NA), (SENIOR, None), (PLAN, None), (PLAN, np.nan)]
)
def test_a_feature_that_is_entirely_missing_is_large_drift(column: Column, missing: object) -> None:
    values, none = month(1_000)[column.name], pd.Series([missing] * 1_000, dtype=object)
    lost, appeared, neither = (
        drift_of(column, *months) for months in ((values, none), (none, values), (none, none.copy()))
    )
    for found in (lost, appeared):
        assert (found.about, found.significant, found.size) == ("missing", True, "large")
        assert found.effect == pytest.approx(1)
    assert (lost.reference_missing, lost.current_missing, lost.out_of_range) == (0, 1, 0)
    assert (appeared.reference_missing, appeared.current_missing, appeared.out_of_range) == (1, 0, 1)
    assert (neither.p_value, neither.psi, neither.significant) == (1, 0, False)


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.kind)
def test_a_constant_stays_is_lost_or_changes(column: Column) -> None:
    values = month(1_000)[column.name]
    first, second = (pd.Series([value] * 1_000) for value in values.drop_duplicates().iloc[:2])
    same = drift_of(column, first, first.copy())
    assert (same.p_value, same.psi, same.effect, same.significant) == (1, 0, 0, False)
    for found in (drift_of(column, values, first), drift_of(column, first, second), drift_of(column, second, first)):
        assert (found.significant, found.size) == (True, "large")


@pytest.mark.parametrize("up", [True, False])
def test_a_mass_that_moves_off_the_most_common_value_has_size(up: bool) -> None:
    reference = np.append(np.zeros(950), np.linspace(1, 2, 50))
    current = np.append(np.full(400, 0.5 if up else -0.5), reference[400:])
    found = drift_of(HOURS, reference, current)
    assert (found.test, found.significant, found.size) == ("Kolmogorov-Smirnov", True, "large")
    assert found.out_of_range == pytest.approx(0 if up else 0.4)


def test_values_that_the_reference_month_does_not_have_are_out_of_range() -> None:
    assert drift_of(STALLS, [1, 2, 5], [0, 1, 3, 6]).out_of_range == 0.5
    assert drift_of(PLAN, ["basic", "plus"], ["basic", "family", "trial", None]).out_of_range == pytest.approx(2 / 3)
    assert drift_of(SENIOR, [False, False], [False, True]).out_of_range == 0.5


def test_a_tenth_of_the_users_is_compared_as_it_is() -> None:
    reference, current = month(7_043), month(704, seed=1)
    report = compared(reference, current)
    assert (report.reference_users, report.current_users) == (7_043, 704)
    assert (report.significant, report.drifted("none")) == ((), ())
    shifted = compared(reference, current.assign(hours=current["hours"] + 2, plan="plus"))
    assert shifted.significant == ("hours", "plan")
    assert shifted.large == ("plan",)


def test_of_one_user_nothing_is_significant() -> None:
    report = compared(month(7_043), month(1, seed=1), current_scores=np.array([0.5]))
    assert report.significant == report.large == ()


@pytest.mark.parametrize(
    ("reference", "current", "message"),
    [
        (month(0), month(5), "the reference month has no users"),
        (month(5), month(0), "the current month has no users"),
        (month(5), month(5).drop(columns=["hours", "plan"]), "the current month lacks the columns hours, plan"),
        (month(5).assign(hours=np.inf), month(5), "hours of the reference month is infinite for 5 users"),
        (month(5), month(5).assign(hours=[1, 2, -np.inf, 3, np.nan]), "hours of the current month is infinite for 1"),
        (month(5), month(5).assign(stalls="many"), "stalls of the current month is not integer"),
    ],
)
def test_what_cannot_be_compared_is_refused(reference: pd.DataFrame, current: pd.DataFrame, message: str) -> None:
    with pytest.raises(DriftRefused, match=message):
        compared(reference, current)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (np.array([]), "the current month has no users"),
        (np.array([0.1, np.inf]), "score of the current month is infin"),
    ],
)
def test_scores_that_cannot_be_compared_are_refused(scores: np.ndarray, message: str) -> None:
    with pytest.raises(DriftRefused, match=message):
        compared(month(5), month(5), current_scores=scores)


# --- correction, size and what is said ------------------------------------------------------------------------------


def test_holm_corrects_as_published() -> None:
    # The example of Wright (1992), Adjusted P-Values for Simultaneous Inference, Biometrics 48.
    assert holm([0.01, 0.02, 0.022, 0.09]) == pytest.approx([0.04, 0.06, 0.06, 0.09])
    assert holm([0.9, 0.001, 0.5]) == pytest.approx([1.0, 0.003, 1.0])


def test_significance_is_of_all_features_and_the_scores_together() -> None:
    reference, current = month(2_000), month(2_000, seed=1)
    current["hours"] = reference["hours"] + 0.75
    report = compared(reference, current)
    alone = compared(reference, current, HOURS)
    assert report.features[0].p_value == alone.features[0].p_value
    assert report.features[0].adjusted_p_value == pytest.approx(5 * report.features[0].p_value)
    assert alone.features[0].adjusted_p_value == pytest.approx(2 * report.features[0].p_value)


def test_psi_is_its_formula_with_half_a_user_more_in_each_bin() -> None:
    p, q = np.array([60.5, 40.5]) / 101, np.array([30.5, 70.5]) / 101
    assert psi(np.array([60, 40]), np.array([30, 70])) == pytest.approx(((p - q) * np.log(p / q)).sum())
    assert np.isfinite(psi(np.array([100, 0]), np.array([0, 100])))


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (0, "none"),
        (0.00099, "none"),
        (0.001, "small"),
        (0.0999, "small"),
        (0.1, "moderate"),
        (0.2499, "moderate"),
        (0.25, "large"),
        (9, "large"),
    ],
)
def test_sizes(value: float, size: str) -> None:
    assert size_of(value) == size


def test_scores_drift_by_themselves() -> None:
    scores = np.random.default_rng(0).beta(2, 5, 2_000)
    report = compared(month(2_000), month(2_000), reference_scores=scores, current_scores=scores * 0.7)
    assert report.significant == ()
    assert (report.score.name, report.score.test, report.score.significant) == ("score", "Kolmogorov-Smirnov", True)
    assert report.score.size == "large"
    assert report.summary == (
        f"None of 4 features drifts significantly, but the scores do (PSI {report.score.psi:.3f}, large)."
    )


def test_the_summary_names_what_drifts_and_the_most() -> None:
    reference, current = month(5_000), month(5_000, seed=1)
    assert compared(reference, current).summary == "None of 4 features drifts significantly, nor do the scores."
    current["hours"] += 1
    one = compared(reference, current)
    assert one.summary == (
        f"1 of 4 features drifts significantly (hours), the most hours with a PSI of {one.features[0].psi:.3f} "
        "(small), but not the scores."
    )
    current["plan"] = "plus"
    two = compared(reference, current, current_scores=SCORES / 4)
    assert two.summary == (
        f"2 of 4 features drift significantly (hours, plan), the most plan with a PSI of {two.features[3].psi:.3f} "
        f"(large), and so do the scores (PSI {two.score.psi:.3f}, large)."
    )


def test_a_report_survives_json() -> None:
    current = month(300, seed=1).assign(hours=np.nan, plan="trial", stalls=0)
    report = compared(month(300), current)
    assert msgspec.json.decode(msgspec.json.encode(report), type=DriftReport) == report


# --- properties -----------------------------------------------------------------------------------------------------

seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, users=st.integers(1, 400), share=st.floats(0, 1))
def test_the_order_of_rows_and_the_index_mean_nothing(seed: int, users: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    reference, current = month(users, seed), month(users // 2 + 1, seed + 1)
    current = current.mask(rng.random(current.shape) < share)
    shuffled = [
        frame.sample(frac=1, random_state=seed).set_index(rng.integers(3, size=len(frame)))
        for frame in (reference, current)
    ]
    assert compared(reference, current) == compared(
        *shuffled, reference_scores=rng.permutation(SCORES), current_scores=rng.permutation(SCORES)
    )


@settings(max_examples=40, deadline=None)
@given(seed=seeds, users=st.integers(1, 400), share=st.floats(0, 1))
def test_a_month_has_not_drifted_from_itself(seed: int, users: int, share: float) -> None:
    frame = month(users, seed)
    frame = frame.mask(np.random.default_rng(seed).random(frame.shape) < share)
    report = compared(frame, frame.copy())
    for one in (*report.features, report.score):
        assert (one.p_value, one.adjusted_p_value, one.psi, one.effect) == (1, 1, 0, 0)
        assert (one.significant, one.size, one.out_of_range) == (False, "none", 0)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, steps=st.lists(st.floats(0.25, 1), min_size=2, max_size=4))
def test_the_further_values_shift_the_greater_are_effect_and_psi(seed: int, steps: list[float]) -> None:
    reference = pd.Series(np.random.default_rng(seed).normal(25, 5, 2_000))
    found = [drift_of(HOURS, reference, reference + shift) for shift in np.cumsum([0, *steps])]
    assert [one.psi for one in found] == sorted(one.psi for one in found)
    assert [one.effect for one in found] == sorted(one.effect for one in found)
    assert found[0].psi == 0 < found[1].psi


@settings(max_examples=40, deadline=None)
@given(seed=seeds, shift=st.floats(0, 5))
def test_tests_and_effects_are_the_same_in_both_directions(seed: int, shift: float) -> None:
    reference, current = month(300, seed), month(200, seed + 1)
    current["hours"] += shift
    there, back = compared(reference, current), compared(current, reference)
    for one, other in zip(there.features, back.features, strict=True):
        assert (one.name, one.kind, one.test) == (other.name, other.kind, other.test)
        assert (one.p_value, one.effect) == pytest.approx((other.p_value, other.effect))
    categories = there.features[3].psi, back.features[3].psi
    assert categories[0] == pytest.approx(categories[1])


@settings(max_examples=100, deadline=None)
@given(counts=st.lists(st.tuples(st.integers(0, 500), st.integers(0, 500)), min_size=1, max_size=12))
def test_psi_is_never_negative_and_the_same_in_both_directions(counts: list[tuple[int, int]]) -> None:
    reference, current = np.array(counts).T
    assert psi(reference, current) == pytest.approx(psi(current, reference))
    assert psi(reference, current) >= 0


def test_months_without_change_do_not_alarm() -> None:
    pool, scores = month(200_000), np.random.default_rng(9).beta(2, 5, 200_000)
    alarms = 0
    for trial in range(200):
        before, after = np.random.default_rng(trial).choice(len(pool), (2, 1_000), replace=False)
        report = compare(
            pool.iloc[before],
            pool.iloc[after],
            COLUMNS,
            reference_scores=scores[before],
            current_scores=scores[after],
        )
        alarms += bool(report.significant) or report.score.significant
    # Of 200 months at most one in a hundred is expected; more than 7 would happen once in a thousand times.
    assert alarms <= 7


# --- the page for people --------------------------------------------------------------------------------------------

_WITHOUT_NETWORK = """
import sys
def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        print(event, arguments, file=sys.stderr)
        raise OSError("the page must not need a network")
sys.addaudithook(refuse)
from pathlib import Path
from test_drift import COLUMNS, month
from streamflow.drift_html import evidently_report
evidently_report(month(300), month(200, seed=1), COLUMNS, Path(sys.argv[1]))
"""


def test_the_page_is_made_without_a_network_and_leaves_nothing_else(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": os.pathsep.join([*sys.path])}
    command = [sys.executable, "-c", _WITHOUT_NETWORK, str(tmp_path / "out" / "drift.html")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "socket" not in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["drift.html"]
    assert not [path for path in home.rglob("*") if "evidently" in str(path) or "telemetry" in str(path)]


def test_the_page_stands_alone_and_has_each_feature(tmp_path: Path) -> None:
    path = tmp_path / "drift.html"
    path.write_text("an older page")
    current = month(200, seed=1).assign(stalls=pd.NA, senior=None)
    evidently_report(month(300), current.set_index(pd.Index(["user"] * 200)), COLUMNS, path)
    page = path.read_text()
    assert 1_000_000 < path.stat().st_size < 10_000_000
    assert re.findall(r"<script[^>]+src=|<link|<img[^>]+src=.https?:|<iframe", page) == []
    assert '"hours"' in page
    assert '"plan"' in page
    assert '"stalls"' not in page
    assert list(tmp_path.iterdir()) == [path]


def test_a_page_that_cannot_be_made_leaves_the_older_one(tmp_path: Path) -> None:
    path = tmp_path / "drift.html"
    path.write_text("an older page")
    with pytest.raises(KeyError):
        evidently_report(month(30), month(30).drop(columns="hours"), COLUMNS, path)
    assert path.read_text() == "an older page"
    assert list(tmp_path.iterdir()) == [path]


def test_of_a_great_month_the_page_shows_the_same_sample_each_time() -> None:
    frame = pd.DataFrame({"hours": np.arange(drift_html.MOST_USERS + 1)})
    first, second = drift_html._sample(frame), drift_html._sample(frame)
    assert len(first) == drift_html.MOST_USERS
    assert first["hours"].is_unique
    assert first.equals(second)
