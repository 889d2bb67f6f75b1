"""The page on drift for people to browse, made by Evidently; no decision depends on it.

What is decided by is `drift.py`'s, with tests, bins and corrections of its own: figures here may differ from its.
"""

import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from streamflow.contract import Column
from streamflow.drift import MODERATE_PSI

MOST_USERS = 50_000
"""Of a greater month the page shows a sample: of a million users Evidently takes 40 s and more than a GB."""
_NUMBERS = ("integer", "float")


def evidently_report(reference: pd.DataFrame, current: pd.DataFrame, columns: Sequence[Column], path: Path) -> None:
    """Write ``path``, one HTML file of some 4.5 MB that needs no network, whole or not at all.

    The frames have one row per user and at least ``columns``; of more than ``MOST_USERS`` users as many are shown,
    drawn with a fixed seed. Columns that are missing for all users of a month are left out: there is nothing to show.
    Each has its PSI by Evidently's bins, called drift from ``MODERATE_PSI`` on. The ids of the page's parts are random,
    so the same frames give the same page in other bytes.
    """
    # What Evidently's makers and their library of telemetry ask for; read when Evidently is imported.
    os.environ["DO_NOT_TRACK"] = os.environ["ITERATIVE_DO_NOT_TRACK"] = "true"
    from evidently import DataDefinition, Dataset, Report
    from evidently.presets import DataDriftPreset

    shown = [one for one in columns if reference[one.name].notna().any() and current[one.name].notna().any()]
    definition = DataDefinition(
        numerical_columns=[one.name for one in shown if one.kind in _NUMBERS],
        categorical_columns=[one.name for one in shown if one.kind not in _NUMBERS],
    )
    months = [
        Dataset.from_pandas(_sample(month[[one.name for one in shown]]), data_definition=definition)
        for month in (current, reference)
    ]
    with warnings.catch_warnings():
        # Evidently correlates constant columns, too.
        warnings.simplefilter("ignore", RuntimeWarning)
        page = (
            Report([DataDriftPreset(method="psi", threshold=MODERATE_PSI)]).run(*months).get_html_str(as_iframe=False)
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(page)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _sample(month: pd.DataFrame) -> pd.DataFrame:
    users = month if len(month) <= MOST_USERS else month.sample(MOST_USERS, random_state=0)
    return users.reset_index(drop=True)
