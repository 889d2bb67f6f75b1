from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import reduce
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamflow.contract import CONTRACT, LABELS, SUBSCRIPTIONS, USAGE, Column, Contract
from streamflow.dataset import (
    TrainingDataset,
    assemble,
    digest,
    folds,
    load,
    on_both_sides,
    require_meanings,
    save,
    split,
)
from streamflow.errors import TrainingRefused
from streamflow.months import Month
from streamflow.warehouse import MonthWrite

JANUARY = Month.parse("2024-01")
SERVICE = CONTRACT.service("churn_v1")


def handmade_month(users=400, seed=0, contract=CONTRACT):
    """Features and labels of January as the feature store and the warehouse return them, in shuffled order."""
    rng = np.random.default_rng(seed)
    ids = [f"{number:04d}-USER" for number in rng.permutation(users)]
    features = {"user_id": ids, "event_timestamp": pd.Timestamp(JANUARY.event_time)}
    for column in contract.features:
        if column.kind == "category":
            features[column.name] = rng.choice(column.categories, users).astype(object)
        elif column.kind == "boolean":
            features[column.name] = pd.Series(rng.random(users) < 0.5, dtype=object)
        elif column.kind == "integer":
            features[column.name] = pd.array(rng.integers(0, 60, users), dtype="Int64")
        else:
            features[column.name] = rng.uniform(0, 100, users)
    frame = pd.DataFrame(features)
    risk = 1 / (1 + np.exp(0.08 * (frame["months_active"].astype(float) - 15)))
    labels = pd.DataFrame({"user_id": ids, "churn_label": rng.random(users) < risk})
    return frame, labels.sample(frac=1, random_state=seed)


def handmade_dataset(users=400, seed=0, contract=CONTRACT):
    features, labels = handmade_month(users, seed, contract)
    return assemble(features, labels, month=JANUARY, label_month=JANUARY, contract=contract)


def real_dataset(real_data: Path, month: Month = JANUARY) -> TrainingDataset:
    """January or February of the real sample, straight from its files."""
    folder = real_data / f"month_{month.number - 1:03d}"
    tables = [pd.read_csv(folder / table.file) for table in CONTRACT.tables]
    rows = reduce(lambda left, right: left.merge(right, on="user_id"), tables)
    for column in CONTRACT.features:
        if column.empty_means is not None:
            rows[column.name] = rows[column.name].astype("boolean").fillna(column.empty_means)
    rows["event_timestamp"] = pd.Timestamp(month.event_time)
    return assemble(rows, rows[["user_id", "churn_label"]], month=month, label_month=month)


def contract_with_contract_type() -> Contract:
    columns = [
        replace(column, view="subs_profile_fv") if column.name == "contract_type" else column
        for column in SUBSCRIPTIONS.columns
    ]
    wider = replace(SUBSCRIPTIONS, columns=tuple(columns))
    return replace(CONTRACT, tables=tuple(wider if table is SUBSCRIPTIONS else table for table in CONTRACT.tables))


@pytest.fixture(scope="module")
def dataset():
    return handmade_dataset()


@pytest.fixture
def month():
    return handmade_month(60)


def assembled(features, labels, **overrides):
    return assemble(features, labels, **{"month": JANUARY, "label_month": JANUARY} | overrides)


def refusal(features, labels, **overrides):
    with pytest.raises(TrainingRefused) as refused:
        assembled(features, labels, **overrides)
    return str(refused.value)


# The hold-out


def test_split_is_the_one_that_was_published():
    users = ["7590-VHVEG", "6713-OKOMC", "7892-POOKP", "6388-TABGU", "9763-GRSKD", "7469-LKBCI"]
    assert split(users).tolist() == [False, True, False, True, True, False]


def test_split_holds_out_a_quarter():
    assert split([f"user-{number}" for number in range(40_000)]).mean() == pytest.approx(0.25, abs=0.01)


def test_split_of_nobody_is_empty():
    assert split([]).tolist() == []


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=20)), st.randoms())
def test_split_of_a_user_depends_on_nobody_else(users, random):
    together = split(users).tolist()
    assert together == [held_out for user in users for held_out in split([user]).tolist()]
    order = random.sample(range(len(users)), len(users))
    assert split([users[index] for index in order]).tolist() == [together[index] for index in order]


USERS = st.lists(st.text(st.characters(codec="utf-8"), max_size=20), max_size=30)
SEEDS = st.integers(0, 2**63 - 1)
COUNTS = st.integers(2, 10)
MANY = [f"user-{number}" for number in range(10_000)]


def test_folds_are_the_ones_that_were_published():
    users = ["7590-VHVEG", "6713-OKOMC", "7892-POOKP", "6388-TABGU", "9763-GRSKD", "7469-LKBCI"]
    assert folds(users, 4, 42).tolist() == [0, 1, 1, 0, 3, 2]


@given(USERS, COUNTS, SEEDS, st.randoms())
def test_the_fold_of_a_user_depends_on_nobody_else(users, count, seed, random):
    together = folds(users, count, seed).tolist()
    assert all(0 <= fold < count for fold in together)
    assert together == [fold for user in users for fold in folds([user], count, seed).tolist()]
    order = random.sample(range(len(users)), len(users))
    assert folds([users[index] for index in order], count, seed).tolist() == [together[index] for index in order]


@settings(max_examples=20)
@given(COUNTS, SEEDS)
def test_folds_are_about_as_large_as_each_other_on_both_sides_of_the_split(count, seed):
    """Also among the held-out users: a fold tells nothing about the hold-out."""
    held_out, fold = split(MANY), folds(MANY, count, seed)
    for users in (held_out, ~held_out):
        sizes = np.bincount(fold[users], minlength=count)
        expected = users.sum() / count
        assert len(sizes) == count
        assert np.abs(sizes - expected).max() < 5 * np.sqrt(expected)


@settings(max_examples=20)
@given(COUNTS, SEEDS, SEEDS)
@example(4, 10_000_000_000, 10_000_000_001)
@example(4, 2**63 - 1, 2**63 - 2)
def test_another_seed_draws_folds_that_have_nothing_to_do_with_these(count, seed, other):
    agreement = (folds(MANY[:2_000], count, seed) == folds(MANY[:2_000], count, other)).mean()
    assert agreement == 1 if seed == other else abs(agreement - 1 / count) < 0.07


@given(st.sets(st.text()), st.sets(st.text()))
def test_users_on_both_sides_of_a_broken_split_are_found(training, held_out):
    assert on_both_sides(list(training), [*held_out, *held_out]) == sorted(training & held_out)


def test_no_user_is_on_both_sides_of_the_split(dataset):
    assert on_both_sides(dataset.training_rows["user_id"].tolist(), dataset.holdout_rows["user_id"].tolist()) == []


# Assembling


def test_assembled_frame_has_the_contracts_types_and_order(dataset):
    assert list(dataset.frame) == ["user_id", *(column.name for column in CONTRACT.features), "churn_label"]
    assert len(CONTRACT.features) == 20
    wanted = {"float": "float64", "integer": "int64", "boolean": "bool", "category": "object"}
    for column in (*CONTRACT.features, LABELS.values[0]):
        assert dataset.frame[column.name].dtype == wanted[column.kind]
    assert dataset.frame["user_id"].tolist() == sorted(dataset.frame["user_id"])
    assert len(dataset.frame) == 400
    assert dataset.dropped == 0


def test_values_stay_with_their_user(month):
    features, labels = month
    frame = assembled(features, labels).frame.set_index("user_id")
    for user, fee, online in zip(features["user_id"], features["monthly_fee"], features["net_service"], strict=True):
        assert frame.loc[user, "monthly_fee"] == fee
        assert frame.loc[user, "net_service"] == online
    for user, label in zip(labels["user_id"], labels["churn_label"], strict=True):
        assert frame.loc[user, "churn_label"] == label


def test_order_of_the_rows_does_not_matter(month):
    features, labels = month
    shuffled = assembled(features.sample(frac=1, random_state=1), labels.sample(frac=1, random_state=2))
    assert shuffled.digest == assembled(features, labels).digest


def test_users_with_a_missing_feature_are_left_out_and_counted(month):
    features, labels = month
    gone = features["user_id"].tolist()[:3]
    features.loc[0, "paperless_billing"] = None
    features.loc[1, "months_active"] = pd.NA
    dataset = assembled(features[features["user_id"] != gone[2]], labels)
    assert dataset.dropped == 3
    assert not set(gone) & set(dataset.frame["user_id"])
    assert dataset.frame["months_active"].dtype == "int64"


def test_whole_floats_are_integers(month):
    features, labels = month
    features["skips_7d"] = features["skips_7d"].astype("float64")
    assert assembled(features, labels).frame["skips_7d"].dtype == "int64"


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("plan_stream_tv", "False", "plan_stream_tv of 2024-01 has 60 values that do not fit, such as 'False'"),
        ("skips_7d", 1.5, "skips_7d of 2024-01 has 60 values that do not fit, such as 1.5"),
        ("skips_7d", "many", "skips_7d of 2024-01 is not integer"),
        ("monthly_fee", np.inf, "monthly_fee of 2024-01 has 60 values that do not fit, such as inf"),
        ("monthly_fee", "29.85", "monthly_fee of 2024-01 has 60 values that do not fit, such as '29.85'"),
        ("monthly_fee", np.float32(29.85), "monthly_fee of 2024-01 comes in 32 bits"),
        ("net_service", "Cable", "net_service of 2024-01 has 60 values that do not fit, such as 'Cable'"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(month, column, values, message):
    features, labels = month
    assert message in refusal(features.assign(**{column: values}), labels)


@pytest.mark.parametrize("label_month", ["2023-12", "2024-02", "2025-01"])
def test_labels_of_another_month_are_refused(month, label_month):
    message = refusal(*month, label_month=Month.parse(label_month))
    assert f"labels of {label_month} cannot train on features of 2024-01" in message
    assert message.endswith("must be of 2024-01")


def test_the_contracts_horizon_decides_which_labels_are_right(month):
    ahead = replace(CONTRACT, label_horizon_months=1)
    assert "must be of 2024-02" in refusal(*month, contract=ahead)
    assert len(assembled(*month, label_month=JANUARY.shift(1), contract=ahead).frame) == 60


@pytest.mark.parametrize(
    ("computed_at", "said"),
    [
        (JANUARY.shift(1).event_time, "2024-02-29"),
        (JANUARY.event_time + timedelta(microseconds=1), "2024-01-31"),
        (JANUARY.event_time + timedelta(days=1), "2024-02-01"),
        (JANUARY.shift(-1).event_time, "2024-01-31"),
    ],
)
def test_features_of_another_time_are_refused_even_of_one_user(month, computed_at, said):
    """Data built to leak: one user's features were computed after the label was known."""
    features, labels = month
    features["event_timestamp"] = features["event_timestamp"].astype("datetime64[us, UTC]")
    features.loc[7, "event_timestamp"] = pd.Timestamp(computed_at)
    assert f"features of {said} were given for 2024-01, whose day is 2024-01-31" in refusal(features, labels)


def test_features_that_know_next_months_label_are_refused(month):
    """All features are February's, and one of them is the label itself."""
    features, labels = month
    telling = features.merge(labels, on="user_id").rename(columns={"churn_label": "knows"})
    leaking = features.assign(
        failed_payments_90d=1000 * telling["knows"], event_timestamp=pd.Timestamp(JANUARY.shift(1).event_time)
    )
    assert "features of 2024-02-29 were given for 2024-01" in refusal(leaking, labels)


def test_a_time_zone_does_not_make_features_late(month):
    features, labels = month
    elsewhere = features.assign(event_timestamp=features["event_timestamp"].dt.tz_convert("Asia/Tokyo"))
    assert assembled(elsewhere, labels).digest == assembled(features, labels).digest


@pytest.mark.parametrize(("label_only", "said"), [(True, "True"), (False, "False")])
def test_a_constant_label_is_refused(month, label_only, said):
    features, labels = month
    message = refusal(features, labels.assign(churn_label=label_only))
    assert message == f"churn_label is {said} for every user of 2024-01; land a labels.csv that tells who churned"


def test_repeated_users_are_refused(month):
    features, labels = month
    assert "the features of 2024-01 have 1 users more than once" in refusal(pd.concat([features, features[:1]]), labels)
    assert "the labels of 2024-01 have 2 users more than once" in refusal(features, pd.concat([labels, labels[:2]]))


def test_a_user_without_label_is_refused(month):
    features, labels = month
    assert "1 users of 2024-01 have no label" in refusal(features, labels[1:])
    labels["churn_label"] = labels["churn_label"].astype(object).where(labels["user_id"] != "0007-USER", None)
    assert "1 users of 2024-01 have no label, such as 0007-USER" in refusal(features, labels)


def test_nothing_to_learn_from_is_refused(month):
    features, labels = month
    assert "2024-01 has no user with a label and all features" in refusal(features[:0], labels[:0])
    assert "2024-01 has no user" in refusal(features.assign(monthly_fee=np.nan), labels)


def test_an_absent_column_is_refused(month):
    features, labels = month
    assert refusal(features.drop(columns="skips_7d"), labels) == "the features of 2024-01 lack the columns skips_7d"
    assert "lack the columns churn_label" in refusal(features, labels[["user_id"]])
    assert "lack the column event_timestamp" in refusal(features.drop(columns="event_timestamp"), labels)


def test_a_column_added_to_the_contract_is_in_the_dataset():
    added = Column("coupons_used", "integer", "Coupons used.", unit="coupons", low=0, high=9, view="contract_fv")
    wider = replace(SUBSCRIPTIONS, columns=(*SUBSCRIPTIONS.columns, added))
    tables = tuple(wider if table is SUBSCRIPTIONS else table for table in CONTRACT.tables)
    frame = handmade_dataset(60, contract=replace(CONTRACT, tables=tables)).frame
    assert frame["coupons_used"].dtype == "int64"
    assert list(frame).index("coupons_used") == list(frame).index("total_paid") + 1


def test_a_model_takes_the_columns_of_its_service(dataset):
    for service in CONTRACT.services:
        assert list(dataset.frame[service.names]) == [column.name for column in service.columns]


def test_the_rows_are_those_to_learn_from_and_those_held_out(dataset):
    training, held_out = dataset.training_rows, dataset.holdout_rows
    assert (len(training), len(held_out)) == ((~dataset.holdout).sum(), dataset.holdout.sum())
    assert set(held_out["user_id"]) == {user for user in dataset.frame["user_id"] if split([user])[0]}
    together = pd.concat([training, held_out]).sort_values("user_id", ignore_index=True)
    pd.testing.assert_frame_equal(together, dataset.frame)
    assert training.index.tolist() == list(range(len(training)))
    assert held_out.index.tolist() == list(range(len(held_out)))


def test_real_january(real_data):
    frame = real_dataset(real_data).frame
    assert len(frame) == 7043
    assert frame["plan_stream_tv"].sum() == 2707
    assert frame.set_index("user_id").loc["7590-VHVEG", "monthly_fee"] == 29.85
    assert frame["churn_label"].mean() == pytest.approx(0.265, abs=0.0005)


# The meaning of columns


NOW = datetime(2024, 2, 3, tzinfo=UTC)


def written(table, relation=None, **meanings):
    """January of a relation as the warehouse records it; a meaning of None was not recorded."""
    recorded = {column.name: column.meaning for column in table.values} | meanings
    facts = {"meanings": {name: meaning for name, meaning in recorded.items() if meaning}, "missing": 0}
    return MonthWrite(relation or str(table.snapshot), JANUARY, 1, "d", 9, {}, NOW, facts)


@pytest.mark.parametrize("table", CONTRACT.snapshots)
def test_columns_that_mean_what_they_meant_are_trained_on(table):
    require_meanings(written(table))
    require_meanings(written(LABELS, "labels"))


def contract_where(column, **changes):
    """The contract with another statement about one column."""
    tables = []
    for table in CONTRACT.tables:
        columns = tuple(replace(one, **changes) if one.name == column else one for one in table.columns)
        tables.append(replace(table, columns=columns))
    return replace(CONTRACT, tables=tuple(tables))


@pytest.mark.parametrize(
    ("table", "relation", "column", "changes"),
    [
        (USAGE, "usage_agg_30d_snapshots", "watch_hours_30d", {"unit": "min"}),
        (SUBSCRIPTIONS, "subscriptions_profile_snapshots", "net_service", {"categories": ("DSL", "Fiber", "No")}),
        (CONTRACT.tables[0], "users_snapshots", "user_is_senior", {"description": "60 years or older."}),
        (LABELS, "labels", "churn_label", {"description": "The customer churns within three months."}),
    ],
)
def test_a_column_whose_meaning_shifted_is_not_trained_on(table, relation, column, changes):
    with pytest.raises(TrainingRefused) as refused:
        require_meanings(written(table, relation), contract_where(column, **changes))
    assert str(refused.value) == (
        f"{table.file} of 2024-01 landed under another contract: {column} (means something else now); see that it is "
        "right as the contract describes it now, correct it if it is not, land it again, "
        "then run: streamflow run 2024-01"
    )


def test_a_month_without_recorded_meanings_is_not_trained_on():
    unrecorded = replace(written(USAGE), facts={"missing": 0})
    with pytest.raises(TrainingRefused, match=r"skips_7d \(no meaning was recorded\), rebuffer_events_7d"):
        require_meanings(unrecorded)
    with pytest.raises(TrainingRefused, match=r"contract: skips_7d \(no meaning was recorded\); see"):
        require_meanings(written(USAGE, skips_7d=None))


def test_what_is_not_trained_on_may_mean_something_else():
    require_meanings(written(CONTRACT.tables[0], signup_date="another"))
    require_meanings(written(USAGE), contract_where("watch_hours_30d", high=744))


# The digest

FRAME = pd.DataFrame(
    {
        "user_id": ["b", "a", "ç"],
        "fee": [29.85, 0.1, -0.0],
        "months": [1, 2, 2**53 + 1],
        "paperless": [True, False, True],
        "plan": ["DSL", "", "No"],
    }
)


def test_digest_is_the_one_that_was_published():
    assert digest(FRAME) == "1cd73192875a083597407cd1c29c91a3da09f07e725152469483a9e930d59213"


@given(st.permutations(range(len(FRAME))))
def test_digest_ignores_the_order_of_rows(order):
    assert digest(FRAME.iloc[list(order)]) == digest(FRAME)


def test_digest_ignores_how_texts_are_held():
    assert digest(FRAME.astype({"plan": "string", "user_id": "string"})) == digest(FRAME)


@given(st.integers(0, len(FRAME) - 1), st.sampled_from(["user_id", "fee", "months", "paperless", "plan"]))
def test_digest_sees_the_smallest_change(row, column):
    changed = FRAME.copy()
    value = FRAME[column].iloc[row]
    smallest = {
        "fee": lambda: np.nextafter(value, np.inf),
        "months": lambda: value + 1,
        "paperless": lambda: not value,
        "plan": lambda: value + "\0",
        "user_id": lambda: value + "\0",
    }
    changed.loc[row, column] = smallest[column]()
    assert digest(changed) != digest(FRAME)


def test_digest_tells_apart_what_looks_alike():
    alike = [
        FRAME,
        FRAME.assign(plan=["DS", "L", "No"]),
        FRAME.assign(fee=[29.85, 0.1, 0.0]),
        FRAME.assign(paperless=[1, 0, 1]),
        FRAME.astype({"months": "float64"}),
        FRAME.rename(columns={"fee": "fees"}),
        FRAME[["user_id", "months", "fee", "paperless", "plan"]],
        FRAME[:2],
    ]
    assert len({digest(frame) for frame in alike}) == len(alike)


def test_digest_of_another_type_is_refused():
    with pytest.raises(ValueError, match="fee is complex128, which has no canonical form"):
        digest(FRAME.astype({"fee": "complex128"}))


@pytest.mark.parametrize(("column", "missing"), [("fee", np.nan), ("plan", None)])
def test_digest_of_a_missing_value_is_refused(column, missing):
    with pytest.raises(ValueError, match=f"{column} has missing values"):
        digest(FRAME.assign(**{column: missing}))


def test_digest_covers_what_the_dataset_is_besides_its_frame(dataset):
    others = [replace(dataset, month=JANUARY.shift(1)), replace(dataset, dropped=1), dataset]
    assert len({other.digest for other in others}) == 3


# The file


def test_saved_dataset_comes_back_whole(dataset, tmp_path):
    path = save(replace(dataset, dropped=7), tmp_path / "datasets")
    back = load(path)
    assert path.name == f"{back.digest}.parquet"
    assert (back.month, back.label, back.dropped) == (JANUARY, "churn_label", 7)
    pd.testing.assert_frame_equal(back.frame, dataset.frame)
    assert (back.holdout == dataset.holdout).all()


def test_saving_again_gives_the_same_file(dataset, tmp_path):
    first = save(dataset, tmp_path).read_bytes()
    assert save(dataset, tmp_path).read_bytes() == first
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failed_save_leaves_nothing(dataset, tmp_path, monkeypatch):
    def full(_table, file):
        file.write(b"PAR1")
        raise OSError("No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match="No space"):
        save(dataset, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_content_than_the_name_states_is_refused(dataset, tmp_path):
    path = save(dataset, tmp_path)
    other = handmade_dataset(seed=1)
    save(other, tmp_path).replace(path)
    with pytest.raises(TrainingRefused, match=f"holds a dataset of digest {other.digest}"):
        load(path)


def test_a_damaged_file_is_refused(dataset, tmp_path):
    path = save(dataset, tmp_path)
    content = path.read_bytes()
    edges = [*range(0, len(content), len(content) // 8), len(content)]
    for start, end in pairwise(edges):
        path.write_bytes(content[:start] + bytes(end - start) + content[end:])
        with pytest.raises(TrainingRefused, match="materialize training_dataset again"):
            load(path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(TrainingRefused, match="is no training dataset"):
        load(path)
    path.unlink()
    with pytest.raises(TrainingRefused, match="does not exist"):
        load(path)


def test_a_parquet_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.parquet"
    FRAME.to_parquet(path)
    with pytest.raises(TrainingRefused, match="is no training dataset"):
        load(path)
