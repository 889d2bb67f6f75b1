import os
import subprocess
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import roc_auc_score

from streamflow import simulate as module
from streamflow.contract import CONTRACT, Column, Contract
from streamflow.errors import ConfigurationError
from streamflow.months import Month
from streamflow.simulate import Scenario, simulate

JANUARY, FEBRUARY, MARCH = Month(2024, 1), Month(2024, 2), Month(2024, 3)
STABLE = Scenario(season=0)
DRIFTING = ["watch_hours_30d", "rebuffer_events_7d", "failed_payments_90d", "support_tickets_90d"]


def digest_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(out: Path, month: Month, contract: Contract = CONTRACT) -> pd.DataFrame:
    """The month as one frame by user_id, the truth included; booleans are read as such, empty is missing."""
    flags = {c.name: "boolean" for table in contract.tables for c in table.columns if c.kind == "boolean"}
    paths = [out / str(month) / table.file for table in contract.tables] + [out / ".truth" / f"{month}.csv"]
    frames = [pd.read_csv(path, dtype=flags, keep_default_na=False, na_values=[""]) for path in paths]
    assert all((frame.user_id == frames[0].user_id).all() for frame in frames)
    return pd.concat([frame.set_index("user_id") for frame in frames], axis=1)


@pytest.fixture(scope="module")
def stable(tmp_path_factory: pytest.TempPathFactory) -> list[pd.DataFrame]:
    out = tmp_path_factory.mktemp("stable")
    months = list(JANUARY.until(MARCH))
    simulate(out, months, users=20_000, scenario=STABLE)
    return [read(out, month) for month in months]


def one_month(out: Path, month: Month, scenario: Scenario, users: int = 20_000) -> pd.DataFrame:
    simulate(out, [month], users=users, scenario=scenario)
    return read(out, month)


def check_column(values: pd.Series, column: Column, as_of: date) -> None:
    assert values.notna().all() or column.nullable or column.empty_means is not None
    present = values.dropna()
    match column.kind:
        case "category":
            assert set(present) <= set(column.categories)
        case "date":
            assert all(date.fromisoformat(text) <= as_of for text in present)
            assert column.earliest is None or all(date.fromisoformat(text) >= column.earliest for text in present)
        case "integer":
            assert present.dtype == np.int64
    if column.low is not None and column.high is not None:
        assert present.between(column.low, column.high).all()


def test_files_are_those_of_the_contract_and_the_truth_lies_outside_the_months(tmp_path: Path) -> None:
    folders = simulate(tmp_path, [JANUARY, FEBRUARY], users=50)
    assert folders == [tmp_path / "2024-01", tmp_path / "2024-02"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".truth", "2024-01", "2024-02"]
    for table in CONTRACT.tables:
        data = (folders[0] / table.file).read_bytes()
        lines = data.decode().split("\n")
        assert lines[0] == ",".join(column.name for column in table.columns)
        assert len(lines) == 52
        assert lines[-1] == ""
        assert b"\r" not in data
        assert b'"' not in data
    assert (tmp_path / ".truth/2024-01.csv").read_text().startswith("user_id,churn_probability\n")


def test_same_arguments_same_bytes_in_any_environment_and_chunk_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(tmp_path / "here", [MARCH], users=700, seed=5)
    monkeypatch.setattr(module, "CHUNK_ROWS", 123)
    simulate(tmp_path / "chunks", [MARCH], users=700, seed=5)
    script = (
        "import sys; from pathlib import Path; from streamflow.months import Month; from streamflow.simulate import *;"
        "simulate(Path(sys.argv[1]), [Month(2024, 3)], users=700, seed=5)"
    )
    elsewhere = {**os.environ, "TZ": "Pacific/Kiritimati", "LC_ALL": "tr_TR.UTF-8", "PYTHONHASHSEED": "77"}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "elsewhere")], env=elsewhere, check=True)
    expected = digest_of(tmp_path / "here")
    assert len(expected) == 7
    assert digest_of(tmp_path / "chunks") == expected
    assert digest_of(tmp_path / "elsewhere") == expected


def test_a_month_does_not_depend_on_the_others_asked_for(tmp_path: Path) -> None:
    scenario = Scenario(concept_drift_from=FEBRUARY, feature_drift_from=FEBRUARY)
    simulate(tmp_path / "all", list(JANUARY.until(Month(2024, 6))), users=300, scenario=scenario)
    simulate(tmp_path / "last", [Month(2024, 6)], users=300, scenario=scenario)
    simulate(tmp_path / "last", [FEBRUARY], users=300, scenario=scenario)
    together = digest_of(tmp_path / "all")
    assert {name: together[name] for name in digest_of(tmp_path / "last")} == digest_of(tmp_path / "last")


def test_a_smaller_world_is_the_beginning_of_a_bigger_one_and_seeds_differ(tmp_path: Path) -> None:
    for name, users, seed in (("big", 200, 1), ("small", 100, 1), ("other", 100, 2)):
        simulate(tmp_path / name, [FEBRUARY], users=users, seed=seed)
    big, small, other = (read(tmp_path / name, FEBRUARY) for name in ("big", "small", "other"))
    pd.testing.assert_frame_equal(big.head(100), small)
    assert not set(other.index) & set(small.index)
    assert (other.watch_hours_30d.to_numpy() != small.watch_hours_30d.to_numpy()).all()


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(-(10**20), 10**20),
    month=st.integers(0, 30).map(JANUARY.shift),
    users=st.integers(1, 400),
    drift=st.floats(0, 5),
)
def test_every_value_is_within_the_contract(
    tmp_path_factory: pytest.TempPathFactory, seed: int, month: Month, users: int, drift: float
) -> None:
    out = tmp_path_factory.mktemp("bounds")
    scenario = Scenario(season=2, feature_drift_from=FEBRUARY, feature_drift=drift, concept_drift_from=FEBRUARY)
    simulate(out, [month], users=users, seed=seed, scenario=scenario)
    frame = read(out, month)
    assert len(frame) == users
    assert frame.churn_probability.between(0, 1).all()
    for table in CONTRACT.tables:
        for column in table.values:
            check_column(frame[column.name], column, month.as_of)
    offline = frame.net_service == "No"
    assert (frame.plan_stream_tv.isna() == offline).all()
    assert (frame.plan_stream_movies.isna() == offline).all()


def test_every_kind_of_column_that_joins_the_contract_appears(tmp_path: Path) -> None:
    extra = (
        Column("extra_float", "float", "", low=-3, high=2.5),
        Column("extra_integer", "integer", "", low=2, high=4),
        Column("extra_flag", "boolean", "", empty_means=False),
        Column("extra_text", "category", "", categories=("a", "b")),
        Column("extra_date", "date", "", earliest=date(2023, 12, 1), not_after_as_of=True),
        Column("extra_float_or_nothing", "float", "", nullable=True),
    )
    subscriptions = CONTRACT.table("subscriptions")
    wider = replace(subscriptions, columns=(*subscriptions.columns, *extra))
    contract = Contract(
        tuple(wider if table is subscriptions else table for table in CONTRACT.tables),
        CONTRACT.view_descriptions,
        CONTRACT.service_views,
        CONTRACT.service_descriptions,
        CONTRACT.label,
    )
    simulate(tmp_path / "wide", [JANUARY], users=400, contract=contract)
    frame = read(tmp_path / "wide", JANUARY, contract)
    assert list(frame)[13:19] == [column.name for column in extra]
    for column in extra:
        check_column(frame[column.name], column, JANUARY.as_of)
        assert frame[column.name].nunique() > 1
    assert set(frame.extra_integer) == {2, 3, 4}
    assert 0 < frame.extra_float_or_nothing.isna().mean() < 0.15
    simulate(tmp_path / "plain", [JANUARY], users=400)
    pd.testing.assert_frame_equal(read(tmp_path / "plain", JANUARY), frame.drop(columns=[c.name for c in extra]))


def test_ids_have_the_real_form_and_are_unique(tmp_path: Path) -> None:
    simulate(tmp_path, [JANUARY, FEBRUARY], users=200_000)
    ids = [pd.read_csv(tmp_path / str(month) / "users.csv").user_id for month in (JANUARY, FEBRUARY)]
    assert ids[0].str.fullmatch(r"[0-9]{4}-[A-Z]{5}").all()
    assert ids[0].is_unique
    stayed = ids[0] == ids[1]
    assert pd.concat([ids[0], ids[1][~stayed]]).is_unique


def test_labels_follow_the_true_probabilities(stable: list[pd.DataFrame]) -> None:
    for month in stable:
        p, label = month.churn_probability, month.churn_label.astype(float)
        for group in [p < 0.1, (p >= 0.1) & (p < 0.4), p >= 0.4, p >= 0]:
            error = np.sqrt((p * (1 - p))[group].sum()) / group.sum()
            assert abs(label[group].mean() - p[group].mean()) < 4 * error
        assert 0.25 < label.mean() < 0.28
        assert 0.835 < roc_auc_score(label, p) < 0.86


def test_customers_stay_leave_and_join(stable: list[pd.DataFrame]) -> None:
    january, february, _ = stable
    assert len(january) == len(february) == 20_000
    churned = january.index[january.churn_label.astype(bool)]
    stays = january.index.isin(february.index)
    assert stays[~january.churn_label.astype(bool)].all()
    assert 0.01 < february.index.isin(churned).sum() / len(churned) < 0.06
    joined = february[~february.index.isin(january.index)]
    assert joined.signup_date.between("2024-02-01", "2024-02-29").all()
    assert not february.drop(joined.index).signup_date.between("2024-02-01", "2024-02-29").any()
    assert (joined.months_active == 0).mean() > 0.15

    both = january.join(february, rsuffix="_next", how="inner")
    assert (both.months_active_next == both.months_active + 1).all()
    paid = both.total_paid_next - both.total_paid
    assert (paid > 0).all()
    assert (paid / both.monthly_fee).mean() == pytest.approx(1, abs=0.01)
    fixed = ["signup_date", "user_gender", "user_is_senior", "has_family", "has_dependents", "net_service"]
    assert all((both[name] == both[f"{name}_next"]).all() for name in fixed)


def test_everybody_who_churned_leaves_or_only_ended_subscriptions_do(tmp_path: Path) -> None:
    for share in (0.0, 1.0):
        simulate(tmp_path / str(share), [JANUARY, FEBRUARY], users=3_000, scenario=Scenario(leave_share=share))
    all_leave, few_leave = (read(tmp_path / share, JANUARY) for share in ("1.0", "0.0"))
    churned = all_leave.churn_label.astype(bool)
    assert (all_leave.index.isin(read(tmp_path / "1.0", FEBRUARY).index) == ~churned).all()
    assert 0.8 < few_leave.index.isin(read(tmp_path / "0.0", FEBRUARY).index).mean() < 1


def test_the_stable_world_looks_alike_for_years(stable: list[pd.DataFrame], tmp_path: Path) -> None:
    early, late = stable[0], one_month(tmp_path, Month(2026, 1), STABLE)
    assert not late.index.isin(early.index).all()
    for name in (*DRIFTING, "months_active", "monthly_fee", "total_paid", "churn_label"):
        spread = early[name].astype(float).std() * np.sqrt(2 / len(early))
        assert abs(early[name].astype(float).mean() - late[name].astype(float).mean()) < 4 * spread, name
    pd.testing.assert_series_equal(
        early.contract_type.value_counts(normalize=True), late.contract_type.value_counts(normalize=True), atol=0.02
    )


def test_a_plain_forest_ranks_as_well_as_on_the_real_month(stable: list[pd.DataFrame]) -> None:
    month = stable[0]
    features = month[[column.name for column in CONTRACT.service("churn_v1").columns]]
    features = pd.get_dummies(features, columns=["net_service"]).fillna(False).astype(float)
    label = month.churn_label.astype(int)
    forest = RandomForestClassifier(300, class_weight="balanced", random_state=42, n_jobs=2)
    forest.fit(features[:5_000], label[:5_000])
    assert 0.80 < roc_auc_score(label[5_000:], forest.predict_proba(features[5_000:])[:, 1]) < 0.84


def test_feature_drift_moves_the_chosen_features_from_the_month_on(stable: list[pd.DataFrame], tmp_path: Path) -> None:
    scenario = replace(STABLE, feature_drift_from=FEBRUARY, feature_drift=0.5, drift_months=2)
    simulate(tmp_path, [JANUARY, FEBRUARY, MARCH], users=20_000, scenario=scenario)
    january, february, march = (read(tmp_path, month) for month in (JANUARY, FEBRUARY, MARCH))
    pd.testing.assert_frame_equal(january, stable[0])
    untouched = [c.name for c in CONTRACT.service("churn_v1").columns if c.name not in DRIFTING]
    pd.testing.assert_frame_equal(february[untouched], stable[1][untouched])
    half = 0.25 * 4.97
    assert (stable[1].watch_hours_30d - february.watch_hours_30d).mean() == pytest.approx(half, abs=0.01)
    assert stable[2].watch_hours_30d.mean() - march.watch_hours_30d.mean() == pytest.approx(2 * half, abs=0.2)
    for name in DRIFTING[1:]:
        assert stable[0][name].mean() < february[name].mean() < march[name].mean()


def test_concept_drift_keeps_the_features_and_makes_the_earlier_truth_useless(
    stable: list[pd.DataFrame], tmp_path: Path
) -> None:
    changed = one_month(tmp_path, FEBRUARY, replace(STABLE, concept_drift_from=FEBRUARY))
    truth = ["churn_label", "churn_probability"]
    pd.testing.assert_frame_equal(changed.drop(columns=truth), stable[1].drop(columns=truth))
    assert 0.65 < roc_auc_score(changed.churn_label.astype(int), changed.churn_probability) < 0.70
    assert 0.44 < roc_auc_score(changed.churn_label.astype(int), stable[1].churn_probability) < 0.50
    assert 0.22 < changed.churn_label.astype(float).mean() < 0.26

    years_later = one_month(tmp_path, Month(2026, 1), replace(STABLE, concept_drift_from=FEBRUARY))
    assert abs(years_later.months_active.mean() - stable[0].months_active.mean()) < 1


def test_gradual_concept_drift_passes_through_the_middle(stable: list[pd.DataFrame], tmp_path: Path) -> None:
    gradual = replace(STABLE, concept_drift_from=FEBRUARY, drift_months=4)
    assert [gradual.changed_part(JANUARY.shift(n)) for n in range(7)] == [0, 0.25, 0.5, 0.75, 1, 1, 1]
    quarter = one_month(tmp_path, FEBRUARY, gradual)
    old = roc_auc_score(quarter.churn_label.astype(int), stable[1].churn_probability)
    assert 0.7 < old < 0.8


def test_the_season_moves_churn_and_watching(stable: list[pd.DataFrame], tmp_path: Path) -> None:
    scenario = Scenario(season=0.5)
    winter, summer = (one_month(tmp_path, month, scenario) for month in (JANUARY, Month(2024, 7)))
    assert winter.churn_probability.mean() < stable[0].churn_probability.mean() - 0.03
    assert summer.churn_probability.mean() > stable[0].churn_probability.mean() + 0.03
    assert (winter.watch_hours_30d - stable[0].watch_hours_30d).mean() == pytest.approx(0.5 * 4.97, abs=0.01)


def test_a_season_may_change_the_rule_of_churn_towards_july() -> None:
    seasonal = Scenario(concept_season=0.6, concept_drift=0.7, concept_drift_from=Month(2025, 1))
    parts = [seasonal.changed_part(month) for month in (JANUARY, Month(2024, 4), Month(2024, 7), Month(2025, 1))]
    assert parts == pytest.approx([0, 0.3, 0.6, 0.7])
    assert seasonal.changed_part(Month(2025, 7)) == 1


def test_frames_are_what_the_files_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    months, scenario = [FEBRUARY, MARCH], Scenario(concept_drift_from=MARCH)
    simulate(tmp_path, months, users=700, seed=5, scenario=scenario)
    found = dict(module.frames(months, users=700, seed=5, scenario=scenario))
    assert list(found) == months
    kinds = {"category": object, "float": np.float64, "integer": np.int64, "boolean": np.bool_}
    for month, frame in found.items():
        written = read(tmp_path, month).reset_index()
        columns = [*CONTRACT.features, *(c for c in CONTRACT.label_table.columns if c.name == CONTRACT.label)]
        assert list(frame) == ["user_id", *(column.name for column in columns), "churn_probability"]
        assert {column.name: frame[column.name].dtype for column in columns} == {c.name: kinds[c.kind] for c in columns}
        assert (written["plan_stream_tv"].isna() & ~frame["plan_stream_tv"]).sum() == (
            frame["net_service"] == "No"
        ).sum()
        filled = written.assign(
            **{name: written[name].fillna(False) for name in ("plan_stream_tv", "plan_stream_movies")}
        )
        pd.testing.assert_frame_equal(frame, filled[list(frame)], check_dtype=False)
    monkeypatch.setattr(module, "CHUNK_ROWS", 123)
    pd.testing.assert_frame_equal(
        dict(module.frames([MARCH], users=700, seed=5, scenario=scenario))[MARCH], found[MARCH]
    )


@pytest.mark.parametrize(
    ("months", "users", "text"), [([], 10, "no month"), ([MARCH, FEBRUARY], 10, "ascend"), ([MARCH], 0, "0 users")]
)
def test_frames_that_cannot_be_made(months: list[Month], users: int, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        next(module.frames(months, users=users, seed=1, scenario=STABLE))


def test_a_frame_has_no_value_for_a_feature_that_may_be_missing() -> None:
    usage = CONTRACT.table("usage_agg_30d")
    columns = tuple(replace(column, nullable=column.name == "skips_7d") for column in usage.columns)
    tables = tuple(replace(usage, columns=columns) if table is usage else table for table in CONTRACT.tables)
    with pytest.raises(ConfigurationError, match="skips_7d may be missing"):
        next(module.frames([MARCH], users=10, seed=1, scenario=STABLE, contract=replace(CONTRACT, tables=tables)))


def test_drift_outside_of_the_months_changes_nothing(tmp_path: Path) -> None:
    simulate(tmp_path / "plain", [JANUARY], users=100)
    simulate(tmp_path / "later", [JANUARY], users=100, scenario=Scenario(concept_drift_from=Month(2030, 1)))
    assert digest_of(tmp_path / "plain") == digest_of(tmp_path / "later")
    early = Scenario(feature_drift_from=Month(2020, 1), feature_drift=1)
    assert one_month(tmp_path / "early", JANUARY, early, users=100).watch_hours_30d.mean() < 28


def test_repeating_a_month_leaves_it_and_another_one_is_refused(tmp_path: Path) -> None:
    simulate(tmp_path, [FEBRUARY], users=100)
    stamp = (tmp_path / "2024-02/users.csv").stat().st_mtime_ns
    simulate(tmp_path, [JANUARY, FEBRUARY], users=100)
    assert (tmp_path / "2024-02/users.csv").stat().st_mtime_ns == stamp
    before = digest_of(tmp_path)
    with pytest.raises(ConfigurationError, match="2024-02 exists with other contents"):
        simulate(tmp_path, [FEBRUARY, MARCH], users=100, seed=2)
    assert digest_of(tmp_path) == before


@pytest.mark.parametrize(
    ("months", "users", "text"),
    [
        ([JANUARY], 0, "0 users cannot be simulated"),
        ([JANUARY], 2**26 + 1, "67108865 users"),
        ([], 10, "no month"),
        ([FEBRUARY, JANUARY], 10, "months must ascend without repetition, not 2024-02, 2024-01"),
        ([JANUARY, JANUARY], 10, "months must ascend"),
        ([Month(2023, 12), JANUARY], 10, "2023-12..2024-01 cannot be simulated; months are 2024-01 to"),
        ([Month(2124, 1)], 10, "2124-01 cannot be simulated"),
    ],
)
def test_arguments_that_cannot_be_used(tmp_path: Path, months: list[Month], users: int, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        simulate(tmp_path / "out", months, users=users)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("leave_share", -0.1),
        ("leave_share", 1.1),
        ("feature_drift", -1),
        ("concept_drift", float("nan")),
        ("season", 3),
        ("concept_season", 1.1),
        ("drift_months", 0),
    ],
)
def test_scenarios_that_cannot_be(name: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} is"):
        Scenario(**{name: value})


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigurationError, match="out cannot be written into"):
        simulate(tmp_path / "out", [JANUARY], users=10)
    assert (tmp_path / "out").read_text() == "mine"
