from dataclasses import replace
from functools import reduce
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamflow.contract import CONTRACT, LABELS, SUBSCRIPTIONS, Contract
from streamflow.dataset import TrainingDataset, assemble, digest, load, save, split
from streamflow.errors import TrainingRefused
from streamflow.months import Month

JANUARY = Month.parse("2024-01")
SERVICE = CONTRACT.service("churn_v1")


def handmade_month(users=400, seed=0, contract=CONTRACT):
    """Features and labels of January as the feature store and the warehouse return them, in shuffled order."""
    rng = np.random.default_rng(seed)
    ids = [f"{number:04d}-USER" for number in rng.permutation(users)]
    features = {"user_id": ids, "event_timestamp": pd.Timestamp(JANUARY.event_time)}
    for column in contract.service("churn_v1").columns:
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
    service = contract.service("churn_v1")
    return assemble(features, labels, service, month=JANUARY, label_month=JANUARY, contract=contract)


def real_dataset(real_data: Path) -> TrainingDataset:
    """January of the real sample, straight from its files."""
    tables = [pd.read_csv(real_data / "month_000" / table.file) for table in CONTRACT.tables]
    month = reduce(lambda left, right: left.merge(right, on="user_id"), tables)
    for column in SERVICE.columns:
        if column.empty_means is not None:
            month[column.name] = month[column.name].astype("boolean").fillna(column.empty_means)
    month["event_timestamp"] = pd.Timestamp(JANUARY.event_time)
    return assemble(month, month[["user_id", "churn_label"]], SERVICE, month=JANUARY, label_month=JANUARY)


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
    return assemble(features, labels, SERVICE, **{"month": JANUARY, "label_month": JANUARY} | overrides)


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


# Assembling


def test_assembled_frame_has_the_contracts_types_and_order(dataset):
    assert list(dataset.frame) == ["user_id", *(column.name for column in SERVICE.columns), "churn_label"]
    wanted = {"float": "float64", "integer": "int64", "boolean": "bool", "category": "object"}
    for column in (*SERVICE.columns, LABELS.values[0]):
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


def test_features_of_another_day_are_refused(month):
    features, labels = month
    features.loc[7, "event_timestamp"] = pd.Timestamp(JANUARY.shift(1).event_time)
    assert "features of 2024-02-29 were given for 2024-01, whose day is 2024-01-31" in refusal(features, labels)


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
    assert "churn_label is False for every user of 2024-01" in refusal(features, labels.assign(churn_label=False))


def test_an_absent_column_is_refused(month):
    features, labels = month
    assert refusal(features.drop(columns="skips_7d"), labels) == "the features of 2024-01 lack the columns skips_7d"
    assert "lack the columns churn_label" in refusal(features, labels[["user_id"]])
    assert "lack the column event_timestamp" in refusal(features.drop(columns="event_timestamp"), labels)


def test_a_column_added_to_the_contract_is_in_the_dataset():
    wider = handmade_dataset(60, contract=contract_with_contract_type())
    assert "contract_type" in wider.features


def test_real_january(real_data):
    frame = real_dataset(real_data).frame
    assert len(frame) == 7043
    assert frame["plan_stream_tv"].sum() == 2707
    assert frame.set_index("user_id").loc["7590-VHVEG", "monthly_fee"] == 29.85
    assert frame["churn_label"].mean() == pytest.approx(0.265, abs=0.0005)


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
    assert (back.month, back.service, back.label, back.dropped) == (JANUARY, SERVICE, "churn_label", 7)
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
