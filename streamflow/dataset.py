"""The training dataset: features and labels of one month as one frame, its digest, its file and its hold-out.

Joining and checking what is trained on belongs here. Point-in-time retrieval of the features is `features.py`'s,
fitting is `training.py`'s.
"""

import functools
import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from streamflow.contract import CONTRACT, MONTH, USER_ID, Column, Contract
from streamflow.errors import ConfigurationError, TrainingRefused
from streamflow.months import Month
from streamflow.warehouse import MEANINGS, MonthWrite

EVENT_TIMESTAMP = "event_timestamp"
HOLDOUT_FRACTION = 0.25
WEIGHT = "sample_weight"
_SPLIT_SALT = b"streamflow-split"
_FACTS = b"streamflow"


def folds(user_ids: Sequence[str], count: int, seed: int) -> NDArray[np.intp]:
    """Which of ``count`` folds each user is in, for cross-validation among training users; the same in every month.

    The fold is a salted BLAKE2b of the user_id modulo ``count``; another ``seed``, of 64 bits, draws other folds.
    """
    name = f"folds {seed}".encode()
    salted = functools.partial(hashlib.blake2b, digest_size=8, salt=name[:16], person=name[16:])
    digests = b"".join(salted(user.encode()).digest() for user in user_ids)
    return (np.frombuffer(digests, ">u8") % count).astype(np.intp)


def split(user_ids: Sequence[str]) -> NDArray[np.bool_]:
    """Whether each user is held out of training: a quarter of all users, the same ones in every month.

    Membership is the first 8 bytes of a salted BLAKE2b of the user_id, read as a fraction of 2**64, being less than
    ``HOLDOUT_FRACTION``; it depends on nothing but the user_id.
    """
    digests = b"".join(hashlib.blake2b(user.encode(), digest_size=8, salt=_SPLIT_SALT).digest() for user in user_ids)
    held_out: NDArray[np.bool_] = np.frombuffer(digests, ">u8") < int(HOLDOUT_FRACTION * 2**64)
    return held_out


def on_both_sides(training: Sequence[str], holdout: Sequence[str]) -> list[str]:
    """The users, sorted, among both the users to learn from and the held-out ones; a sound split has none."""
    return sorted(set(training) & set(holdout))


def in_order(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows to learn from in the one order that results depend on: by user_id, then by month, if they are of several.

    Rows of several months have a column ``month``, YYYY-MM, and where months weigh differently ``sample_weight``; rows
    of one month have neither.
    """
    return rows.sort_values([USER_ID, MONTH] if MONTH in rows else USER_ID, ignore_index=True)


def of_newest_month(rows: pd.DataFrame) -> NDArray[np.bool_]:
    """Whether each of the rows is of the newest month among them."""
    if MONTH not in rows:
        return np.ones(len(rows), dtype=np.bool_)
    newest: NDArray[np.bool_] = (rows[MONTH] == rows[MONTH].max()).to_numpy(dtype=np.bool_)
    return newest


def weights(rows: pd.DataFrame) -> NDArray[np.float64] | None:
    """The weight of each row; None where all weigh the same."""
    return rows[WEIGHT].to_numpy(dtype=np.float64) if WEIGHT in rows else None


class _Facts(msgspec.Struct, frozen=True):
    """What a dataset is besides its frame; stored in the file and covered by the digest."""

    month: str
    dropped: int


@dataclass(frozen=True, eq=False)
class TrainingDataset:
    """What a model of one month learns from and is measured on.

    ``frame`` has user_id, the features of all views in the contract's order and ``label``, one row per user, sorted by
    user_id, in float64, int64, bool and str, nothing missing. A model takes the columns of its feature service; the
    others are there to choose the service and to measure by. ``dropped`` counts users left out for missing features.
    """

    frame: pd.DataFrame
    month: Month
    label: str
    dropped: int

    @property
    def labels(self) -> NDArray[np.bool_]:
        """The label of each row."""
        return self.frame[self.label].to_numpy(dtype=np.bool_)

    @property
    def training_rows(self) -> pd.DataFrame:
        """The rows of ``frame`` to learn from."""
        return self.frame[~self.holdout].reset_index(drop=True)

    @property
    def holdout_rows(self) -> pd.DataFrame:
        """The rows of ``frame`` that no model has seen."""
        return self.frame[self.holdout].reset_index(drop=True)

    @cached_property
    def holdout(self) -> NDArray[np.bool_]:
        """Whether each row is held out of training; see `split`."""
        return split(self.frame[USER_ID].tolist())

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the frame, its month and the number of dropped users."""
        return hashlib.sha256(msgspec.json.encode(self._facts) + digest(self.frame).encode()).hexdigest()

    @property
    def _facts(self) -> _Facts:
        return _Facts(str(self.month), self.dropped)


def assemble(
    features: pd.DataFrame,
    labels: pd.DataFrame,
    *,
    month: Month,
    label_month: Month,
    contract: Contract = CONTRACT,
) -> TrainingDataset:
    """Join the features of ``month`` with the labels of ``label_month`` and bring them into the contract's types.

    ``features`` has user_id, event_timestamp and the contract's features, ``labels`` has user_id and the label, in
    whatever types the stores return. Users with a missing feature are left out and counted.

    Raises TrainingRefused for labels of another period than the contract's horizon asks for, features of another day
    than as_of, an absent column, a user twice, a user without a label, a value that does not fit its column, no rows,
    or a label with one value only.
    """
    _require_months(features, month, label_month, contract)
    features = _one_row_per_user(features, [column.name for column in contract.features], f"the features of {month}")
    labels = _one_row_per_user(labels, [contract.label], f"the labels of {label_month}")
    joined = features.merge(labels, on=USER_ID, how="outer")
    if unlabelled := joined.loc[joined[contract.label].isna(), USER_ID].tolist():
        raise TrainingRefused(
            f"{len(unlabelled)} users of {month} have no label, such as {unlabelled[0]}; "
            f"land a {contract.label_table.file} that has every user"
        )
    columns = (*contract.features, *(column for column in contract.label_table.values if column.name == contract.label))
    frame = _complete_rows(joined, columns, month)
    if frame.empty:
        raise TrainingRefused(
            f"{month} has no user with a label and all features; see which snapshot lacks users, land its file"
        )
    if frame[contract.label].nunique() == 1:
        raise TrainingRefused(
            f"{contract.label} is {frame[contract.label].iloc[0]} for every user of {label_month}; "
            f"land a {contract.label_table.file} that tells who churned"
        )
    return TrainingDataset(frame, month, contract.label, len(joined) - len(frame))


def scorable(features: pd.DataFrame, month: Month, columns: Sequence[Column]) -> pd.DataFrame:
    """The customers of a month who lack none of these features: user_id and the features, typed, by user_id.

    ``features`` is as for `assemble`, which gives the same customers the same values and says what is refused.
    """
    _require_day(features, month)
    rows = _one_row_per_user(features, [column.name for column in columns], f"the features of {month}")
    return _complete_rows(rows, columns, month)


def _complete_rows(rows: pd.DataFrame, columns: Sequence[Column], month: Month) -> pd.DataFrame:
    """The rows that lack nothing, sorted by user_id, in the contract's types."""
    complete = rows.dropna().sort_values(USER_ID, ignore_index=True)
    return pd.DataFrame(
        {USER_ID: complete[USER_ID].astype(str).astype(object)}
        | {column.name: _cast(complete[column.name], column, month) for column in columns}
    )


def require_meanings(source: MonthWrite, contract: Contract = CONTRACT) -> None:
    """Refuse a month of a snapshot or of the labels whose file landed when a column meant something else.

    Only what is trained on counts: features and the label. Raises TrainingRefused that names month, relation and
    columns.
    """
    table = next(table for table in contract.tables if source.relation in (table.name, table.snapshot))
    trained_on = {contract.label, *(column.name for column in contract.features)}
    written = source.facts.get(MEANINGS, {})
    shifted = [
        f"{column.name} ({'means something else now' if column.name in written else 'no meaning was recorded'})"
        for column in table.values
        if column.name in trained_on and written.get(column.name) != column.meaning
    ]
    if shifted:
        raise TrainingRefused(
            f"{table.file} of {source.month} landed under another contract: {', '.join(shifted)}; see that it is right "
            "as the contract describes it now, correct it if it is not, land it again, "
            f"then run: streamflow run {source.month}"
        )


def _require_months(features: pd.DataFrame, month: Month, label_month: Month, contract: Contract) -> None:
    if label_month != month.shift(contract.label_horizon_months):
        raise TrainingRefused(
            f"labels of {label_month} cannot train on features of {month}: "
            f"with a label horizon of {contract.label_horizon_months} months they must be of "
            f"{month.shift(contract.label_horizon_months)}"
        )
    _require_day(features, month)


def _require_day(features: pd.DataFrame, month: Month) -> None:
    if EVENT_TIMESTAMP not in features:
        raise TrainingRefused(f"the features of {month} lack the column {EVENT_TIMESTAMP}")
    times = pd.to_datetime(features[EVENT_TIMESTAMP], utc=True)
    if (times != pd.Timestamp(month.event_time)).any():
        raise TrainingRefused(f"features of {times.max():%Y-%m-%d} were given for {month}, whose day is {month.as_of}")


def _one_row_per_user(frame: pd.DataFrame, columns: list[str], what: str) -> pd.DataFrame:
    if absent := [name for name in (USER_ID, *columns) if name not in frame]:
        raise TrainingRefused(f"{what} lack the columns {', '.join(absent)}")
    if repeated := frame.loc[frame[USER_ID].duplicated(), USER_ID].tolist():
        raise TrainingRefused(f"{what} have {len(repeated)} users more than once, such as {repeated[0]}")
    return frame[[USER_ID, *columns]]


def _cast(values: pd.Series, column: Column, month: Month) -> pd.Series:
    """The values, none of which is missing, in the contract's type; one that would change by it is refused."""
    if values.dtype == np.float32:
        raise TrainingRefused(f"{column.name} of {month} comes in 32 bits, which has changed it; features have 64")
    try:
        cast = _CASTS[column.kind](values)
    except (TypeError, ValueError, OverflowError) as error:
        raise TrainingRefused(f"{column.name} of {month} is not {column.kind}: {error}") from None
    fits = cast == values
    if column.kind == "category":
        fits = cast.isin(column.categories)
    elif column.kind == "float":
        fits &= np.isfinite(cast)
    if unfit := values[~fits].tolist():
        raise TrainingRefused(f"{column.name} of {month} has {len(unfit)} values that do not fit, such as {unfit[0]!r}")
    return cast


_CASTS: dict[str, Callable[[pd.Series], pd.Series]] = {
    "float": lambda values: values.astype("float64"),
    "integer": lambda values: values.astype("int64"),
    "boolean": lambda values: values.astype("bool"),
    "category": lambda values: values.astype(object),
}


def digest(frame: pd.DataFrame) -> str:
    """SHA-256 of what a frame says: column names, kinds and values, with the rows sorted by user_id.

    It does not depend on the order of rows, the index, or the libraries that hold the frame: numbers count by their
    little-endian bits, strings by their UTF-8 bytes and lengths. Raises ValueError for another type of column and for
    missing values.
    """
    ordered = frame.sort_values(USER_ID)
    sha = hashlib.sha256(f"{len(ordered)} rows\n".encode())
    for name in ordered:
        kind, content = _canonical(ordered[name])
        sha.update(f"{len(str(name).encode())} {name} {kind} {len(content)}\n".encode())
        sha.update(content)
    return sha.hexdigest()


def _canonical(values: pd.Series) -> tuple[str, bytes]:
    if values.isna().any():
        raise ValueError(f"{values.name} has missing values, which have no canonical form")
    match values.dtype.kind:
        case "f":
            return "float", values.to_numpy(dtype="<f8").tobytes()
        case "i":
            return "integer", values.to_numpy(dtype="<i8").tobytes()
        case "b":
            return "boolean", values.to_numpy(dtype="|u1").tobytes()
        case "O":
            texts = [value.encode() for value in values]
            return "text", np.array([len(text) for text in texts], dtype="<u8").tobytes() + b"".join(texts)
        case _:
            raise ValueError(f"{values.name} is {values.dtype}, which has no canonical form")


def save(dataset: TrainingDataset, folder: Path) -> Path:
    """Write the dataset to ``<digest>.parquet`` in ``folder``, whole or not at all, and return the file's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{dataset.digest}.parquet"
    table = pa.Table.from_pandas(dataset.frame, preserve_index=False)
    table = table.replace_schema_metadata({_FACTS: msgspec.json.encode(dataset._facts)})
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{dataset.digest}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            pq.write_table(table, file)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def load(path: Path, contract: Contract = CONTRACT) -> TrainingDataset:
    """Read a file of `save`; raises TrainingRefused if its content is not the one whose digest names it."""
    try:
        table = pq.read_table(path)
        facts = msgspec.json.decode(table.schema.metadata[_FACTS], type=_Facts)
        dataset = TrainingDataset(table.to_pandas(), Month.parse(facts.month), contract.label, facts.dropped)
        found = dataset.digest
    except FileNotFoundError:
        raise TrainingRefused(f"{path} does not exist; materialize training_dataset again") from None
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, ConfigurationError) as error:
        raise TrainingRefused(f"{path} is no training dataset ({error}); materialize training_dataset again") from None
    if found != path.stem:
        raise TrainingRefused(f"{path} holds a dataset of digest {found}; materialize training_dataset again")
    return dataset
