"""A month's customers scored with the Production version: ranked by what contacting them is worth, stored, exported.

The scorer is scoring.py's, what a contact is worth is value.py's. Which version scores a month is
monitoring.py's to say.
"""

import csv
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from psycopg import sql

from streamflow import dataset
from streamflow.contract import MONTH, SCHEMA, USER_ID
from streamflow.database import Database
from streamflow.errors import UnknownMonth
from streamflow.files import write_file
from streamflow.months import Month
from streamflow.relations import CHURN_SCORES as CHURN_SCORES
from streamflow.scoring import decide
from streamflow.training_config import Value
from streamflow.value import expected
from streamflow.warehouse import MonthWrite, Source, copy_in, lock, month_write, record

COLUMNS = ("rank", USER_ID, "probability", "threshold", "decision", "expected_value")
CONTACTS = "contacts"
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class MonthScores:
    """A month as it was scored last: ``frame`` has user_id, probability and decision, sorted by user_id."""

    frame: pd.DataFrame
    version: int
    threshold: float
    write: MonthWrite


def ranked(
    user_ids: "pd.Series[str]", probabilities: Floats, fees: Floats, threshold: float, worth: Value
) -> pd.DataFrame:
    """The customers in the order in which contacting them is worth most, with the columns of ``COLUMNS``.

    ``probabilities`` and ``fees`` (currency/month) are one for each of ``user_ids``. ``expected_value`` is what
    contacting the customer is expected to bring, in currency; equals are in the order of user_id. ``rank`` starts at 1.
    """
    frame = pd.DataFrame(
        {
            USER_ID: user_ids.to_numpy(dtype=object),
            "probability": probabilities,
            "threshold": threshold,
            "decision": decide(probabilities, threshold),
            "expected_value": expected(probabilities, fees, worth),
        }
    )
    frame = frame.sort_values(["expected_value", USER_ID], ascending=[False, True], ignore_index=True)
    frame["rank"] = np.arange(1, len(frame) + 1)
    return frame[list(COLUMNS)]


def contacts(frame: pd.DataFrame, capacity: int | None) -> pd.DataFrame:
    """Whom to contact, of `ranked`: at most ``capacity`` of those who are expected to churn and to be worth it."""
    worth_it = frame[frame["decision"] & (frame["expected_value"] > 0)]
    return worth_it.head(len(worth_it) if capacity is None else capacity)


def digest(frame: pd.DataFrame, version: int) -> str:
    """SHA-256 of which version gave whom which score, whatever the order of the rows."""
    return hashlib.sha256(f"version {version}\n{dataset.digest(frame)}".encode()).hexdigest()


def save(
    database: Database,
    folder: Path,
    month: Month,
    frame: pd.DataFrame,
    version: int,
    *,
    capacity: int | None,
    revision: int,
    sources: Mapping[str, Source],
    facts: Mapping[str, Any],
    now: datetime,
) -> MonthWrite:
    """Replace the month's scores by ``frame``, of `ranked`, in one transaction, and export them below ``folder``.

    ``<digest>.parquet`` stays for good; the month's own folder has the scores in force as ``churn_scores.parquet`` and
    ``churn_scores.csv``, and whom to contact as ``contacts.csv``.
    """
    chosen = contacts(frame, capacity)
    written = MonthWrite(
        CHURN_SCORES,
        month,
        revision,
        digest(frame, version),
        len(frame),
        sources,
        now,
        {
            **facts,
            "version": version,
            "acted": int(frame["decision"].sum()),
            CONTACTS: len(chosen),
            "expected_value": float(chosen["expected_value"].sum()),
        },
    )
    table = pa.Table.from_pandas(frame, preserve_index=False)
    parquet = io.BytesIO()
    pq.write_table(table, parquet)
    write_file(folder / f"{written.digest}.parquet", parquet.getvalue())
    rows = table.append_column(MONTH, pa.repeat(pa.scalar(str(month)), len(frame))).append_column(
        "model_version", pa.repeat(pa.scalar(version), len(frame))
    )
    with database.connect() as connection:
        lock(connection, CHURN_SCORES, month)
        target = sql.Identifier(SCHEMA, CHURN_SCORES)
        connection.execute(sql.SQL("DELETE FROM {} WHERE month = %s").format(target), (str(month),))
        copy_in(connection, target, rows)
        write_file(folder / str(month) / f"{CHURN_SCORES}.parquet", parquet.getvalue())
        write_file(folder / str(month) / f"{CHURN_SCORES}.csv", _csv(frame))
        write_file(folder / str(month) / f"{CONTACTS}.csv", _csv(chosen))
        record(connection, written)
    return written


def load(database: Database, month: Month) -> MonthScores:
    """A month's scores in force; raises UnknownMonth when it has none."""
    with database.connect() as connection:
        written = month_write(connection, CHURN_SCORES, month)
        rows = connection.execute(
            "SELECT user_id, probability, decision FROM streamflow.churn_scores WHERE month = %s ORDER BY user_id",
            (str(month),),
        ).fetchall()
    if not rows:
        raise UnknownMonth(f"{CHURN_SCORES} holds nothing for {month}; materialize {CHURN_SCORES} of {month}")
    frame = pd.DataFrame(rows, columns=[USER_ID, "probability", "decision"])
    return MonthScores(frame, written.facts["version"], written.facts["threshold"], written)


def _csv(frame: pd.DataFrame) -> bytes:
    """With floats in their shortest exact form and lines that end in a newline."""
    text: str = frame.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_MINIMAL)
    return text.encode()
