"""A month's scores: who comes first, whom to contact, and what stays when they are made again."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamflow import scores, warehouse
from streamflow.contract import USER_ID
from streamflow.database import Database
from streamflow.errors import UnknownMonth
from streamflow.months import Month
from streamflow.training_config import Value

JANUARY = Month(2024, 1)
NOW = datetime(2024, 2, 3, tzinfo=UTC)
WORTH = Value(contact_cost=20.0, retained_share=0.2, months_retained=6.0)
"""Of a contact: 1.2 times probability times fee, minus 20."""


def ranked(users: str, probabilities: list[float], fees: list[float], threshold: float = 0.3) -> pd.DataFrame:
    names = pd.Series(users.split(), dtype=object)
    return scores.ranked(names, np.array(probabilities), np.array(fees), threshold, WORTH)


def test_customers_are_ranked_by_what_contacting_them_is_worth() -> None:
    frame = ranked("a b c", [0.9, 0.3, 0.5], [20.0, 100.0, 100.0])
    assert list(frame.columns) == ["rank", "user_id", "probability", "threshold", "decision", "expected_value"]
    assert frame[USER_ID].tolist() == ["c", "b", "a"]
    assert frame["rank"].tolist() == [1, 2, 3]
    assert frame["expected_value"].tolist() == pytest.approx([40.0, 16.0, 1.6])
    assert frame["decision"].tolist() == [True, True, True]
    assert frame["threshold"].tolist() == [0.3, 0.3, 0.3]


def test_equals_are_in_the_order_of_user_id() -> None:
    assert ranked("b a c", [0.5, 0.5, 0.5], [50.0, 50.0, 50.0])[USER_ID].tolist() == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("capacity", "chosen"),
    [(None, ["c", "b"]), (5, ["c", "b"]), (1, ["c"])],
)
def test_whom_to_contact_is_who_churns_and_is_worth_it_within_the_capacity(
    capacity: int | None, chosen: list[str]
) -> None:
    """The fourth is worth it and does not churn, the first churns and is not worth it."""
    frame = ranked("a b c d", [0.9, 0.4, 0.5, 0.29], [10.0, 100.0, 100.0, 200.0])
    assert frame.loc[frame[USER_ID] == "d", "expected_value"].item() > 0
    assert frame.loc[frame[USER_ID] == "a", "expected_value"].item() < 0
    assert scores.contacts(frame, capacity)[USER_ID].tolist() == chosen


@given(st.permutations(range(6)))
def test_the_order_of_the_customers_given_does_not_count(order: list[int]) -> None:
    users, probabilities = np.array(list("abcdef"), dtype=object), np.array([0.1, 0.9, 0.5, 0.5, 0.3, 0.7])
    fees = np.array([10.0, 20.0, 30.0, 30.0, 50.0, 5.0])
    one = scores.ranked(pd.Series(users), probabilities, fees, 0.3, WORTH)
    other = scores.ranked(pd.Series(users[order]), probabilities[order], fees[order], 0.3, WORTH)
    pd.testing.assert_frame_equal(one, other)
    assert scores.digest(one, 1) == scores.digest(other.sample(frac=1, random_state=0), 1)
    assert scores.digest(one, 1) != scores.digest(one, 2)


@pytest.fixture(scope="module")
def prepared(new_database: Callable[[], Database]) -> Database:
    database = new_database()
    warehouse.migrate(database)
    with database.connect(owner=True) as connection:
        for number in (1, 2):
            connection.execute(
                "INSERT INTO streamflow.model_versions (version, run_id, as_of, service, threshold, artifact_path, "
                "artifact_sha256, dataset_digest, predictions_digest, lineage, registered_at, evidence) VALUES "
                "(%s, %s, '2024-01-31', 'churn_v1', 0.3, 'scorer', 'a', 'b', 'c', '{}', now(), '{}')",
                (number, f"run-{number}"),
            )
    return database


def save(database: Database, folder: Path, frame: pd.DataFrame, version: int) -> warehouse.MonthWrite:
    return scores.save(
        *(database, folder, JANUARY, frame, version),
        capacity=1,
        revision=1,
        sources={},
        facts={"threshold": 0.3},
        now=NOW,
    )


def test_a_month_is_stored_exported_and_replaced_and_every_scoring_kept(prepared: Database, tmp_path: Path) -> None:
    with pytest.raises(UnknownMonth, match="churn_scores holds nothing for 2024-01"):
        scores.load(prepared, JANUARY)
    first = save(prepared, tmp_path, ranked("a b c", [0.9, 0.3, 0.1 + 0.2], [20.0, 100.0, 104.0]), 1)
    assert (first.rows, first.facts["acted"], first.facts["contacts"]) == (3, 3, 1)
    assert first.facts["expected_value"] == pytest.approx(17.44)
    held = scores.load(prepared, JANUARY)
    assert held.frame.to_dict("list") == {
        "user_id": ["a", "b", "c"],
        "probability": [0.9, 0.3, 0.1 + 0.2],
        "decision": [True, True, True],
    }
    assert (held.version, held.threshold, held.write.digest) == (1, 0.3, first.digest)
    folder = tmp_path / "2024-01"
    assert (folder / "contacts.csv").read_text() == (
        "rank,user_id,probability,threshold,decision,expected_value\n1,c,0.30000000000000004,0.3,True,17.440000000000012\n"
    )
    assert pd.read_parquet(folder / "churn_scores.parquet")[USER_ID].tolist() == ["c", "b", "a"]

    second = save(prepared, tmp_path, ranked("a b", [0.9, 0.2], [20.0, 100.0]), 2)
    assert scores.load(prepared, JANUARY).frame["probability"].tolist() == [0.9, 0.2]
    assert len(pd.read_csv(folder / "churn_scores.csv")) == 2
    assert {path.stem for path in tmp_path.glob("*.parquet")} == {first.digest, second.digest}
    assert pd.read_parquet(tmp_path / f"{first.digest}.parquet")["probability"].tolist() == [0.1 + 0.2, 0.3, 0.9]
    with prepared.connect() as connection:
        rows = connection.execute("SELECT rank, user_id, model_version FROM streamflow.churn_scores ORDER BY rank")
        assert rows.fetchall() == [(1, "b", 2), (2, "a", 2)]
