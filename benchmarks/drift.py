"""Measures drift detection: how often noise alarms, how often shifts of known size are missed, and what a report costs.

    python -m benchmarks.drift [--trials N]

Months are of 7,043 users by the simulator, without season; all is seeded. Noise comes as consecutive months of one
world (most users stay, as in real months), as independent months, as a month shuffled into two halves, and as a month
of a tenth of the users. The score is the simulator's true probability of churn. A trial alarms when anything at all in
its report is significant at `drift.ALPHA`. A miss rate is, by feature, the share of trials in which a feature that
moved is not significant; shifts are in units of the feature's spread among like customers (0.1 is what the real 2024-02
did).
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from streamflow import drift, landing
from streamflow.contract import CONTRACT, USER_ID
from streamflow.drift import DriftReport
from streamflow.months import FIRST_MONTH, Month
from streamflow.simulate import TRUTH, TRUTH_FOLDER, Scenario, simulate

FIRST = Month.parse(FIRST_MONTH)
USERS, POOL = 7_043, 200_000
COLUMNS = CONTRACT.service("churn_v2").columns
MOVED = ("watch_hours_30d", "rebuffer_events_7d", "failed_payments_90d", "support_tickets_90d")
SHIFTS = (0.05, 0.1, 0.15, 0.2, 0.5)
WORLD_MONTHS = 12
SIZES = (USERS, 1_000_000)


@dataclass(frozen=True, eq=False)
class Scored:
    """A month's features with the score of each user."""

    features: pd.DataFrame
    scores: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.scores)

    def take(self, rows: NDArray[np.int64]) -> "Scored":
        """Some of the users."""
        return Scored(self.features.iloc[rows], self.scores[rows])


def main() -> None:
    """Measure and print; called with --users, cost only."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1_000)
    parser.add_argument("--users", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.users:
        print(json.dumps(_cost(arguments.users)))
        return
    started = time.perf_counter()
    report = {
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "load average": os.getloadavg()},
        "alpha": drift.ALPHA,
        "tests in a report": len(COLUMNS) + 1,
        "false alarms": _false_alarms(arguments.trials),
        "missed": _missed(max(1, arguments.trials // 5)),
        "cost": {f"{users} users": _in_a_process_of_its_own(users) for users in SIZES},
    }
    report["seconds"] = round(time.perf_counter() - started, 1)
    print(json.dumps(report, indent=2))


def _false_alarms(trials: int) -> dict[str, Any]:
    pool = _simulated(POOL, seed=1)[0]

    def independent(trial: int, current: int = USERS) -> DriftReport:
        rows = np.random.default_rng([1, trial]).choice(POOL, USERS + current, replace=False)
        return _compared(pool.take(rows[:USERS]), pool.take(rows[USERS:]))

    def shuffled(trial: int) -> DriftReport:
        rows = np.random.default_rng([2, trial]).permutation(USERS)
        return _compared(pool.take(rows[: USERS // 2]), pool.take(rows[USERS // 2 :]))

    worlds = -(-trials // WORLD_MONTHS)
    series = joblib.Parallel(n_jobs=-1)(joblib.delayed(_consecutive)(seed) for seed in range(worlds))
    return {
        "consecutive months of one world": _alarmed([report for reports in series for report in reports][:trials]),
        "independent months": _alarmed(_each(independent, trials)),
        "a month shuffled into two halves": _alarmed(_each(shuffled, trials)),
        "a month of a tenth of the users": _alarmed(_each(lambda trial: independent(trial, USERS // 10), trials)),
    }


def _consecutive(seed: int) -> list[DriftReport]:
    months = _simulated(USERS, seed=seed, months=WORLD_MONTHS + 1)
    return [_compared(before, after) for before, after in pairwise(months)]


def _missed(trials: int) -> dict[str, Any]:
    pool = _simulated(POOL, seed=1)[0]
    missed = {}
    for shift in SHIFTS:
        moved = _simulated(POOL, seed=2, scenario=Scenario(season=0, feature_drift_from=FIRST, feature_drift=shift))[0]

        def one(trial: int, moved: Scored = moved) -> DriftReport:
            rng = np.random.default_rng([3, trial])
            before, after = (month.take(rng.choice(POOL, USERS, replace=False)) for month in (pool, moved))
            return _compared(before, after)

        reports = _each(one, trials)
        missed[f"shift of {shift} spreads"] = {
            "trials": trials,
            "miss rate": {name: _share([name not in report.significant for report in reports]) for name in MOVED},
            "month without any alarm": _share([not report.significant for report in reports]),
            "median PSI": {name: _median_psi(reports, name) for name in MOVED},
        }
    return missed


def _each(trial: Callable[[int], DriftReport], trials: int) -> list[DriftReport]:
    """The reports of numbered trials, by one process for each core."""

    def part(numbers: NDArray[np.int64]) -> list[DriftReport]:
        return [trial(int(number)) for number in numbers]

    parts = np.array_split(np.arange(trials), os.cpu_count() or 1)
    found: list[list[DriftReport]] = joblib.Parallel(n_jobs=len(parts))(joblib.delayed(part)(one) for one in parts)
    return [report for reports in found for report in reports]


def _alarmed(reports: Sequence[DriftReport]) -> dict[str, Any]:
    alarms = [bool(report.significant) or report.score.significant for report in reports]
    interval = stats.binomtest(sum(alarms), len(alarms)).proportion_ci(method="wilson")
    features = [one for report in reports for one in (*report.features, report.score)]
    return {
        "trials": len(alarms),
        "alarms": sum(alarms),
        "rate": _share(alarms),
        "95 % interval": [round(interval.low, 4), round(interval.high, 4)],
        "alarms of at least moderate size": sum(bool(report.drifted("moderate")) for report in reports),
        "greatest PSI": round(max(one.psi for one in features), 4),
    }


def _share(found: Sequence[bool]) -> float:
    return round(float(np.mean(found)), 4)


def _median_psi(reports: Sequence[DriftReport], name: str) -> float:
    found = [one.psi for report in reports for one in report.features if one.name == name]
    return round(float(np.median(found)), 4)


def _compared(reference: Scored, current: Scored) -> DriftReport:
    return drift.compare(
        reference.features,
        current.features,
        COLUMNS,
        reference_scores=reference.scores,
        current_scores=current.scores,
    )


def _simulated(users: int, *, seed: int, months: int = 1, scenario: Scenario | None = None) -> list[Scored]:
    wanted = [FIRST.shift(number) for number in range(months)]
    with tempfile.TemporaryDirectory(prefix="streamflow-bench-") as scratch:
        out = Path(scratch)
        simulate(out, wanted, users=users, seed=seed, scenario=scenario or Scenario(season=0))
        return [_read(out, month) for month in wanted]


def _read(out: Path, month: Month) -> Scored:
    frames = []
    for table in CONTRACT.snapshots:
        data = (out / str(month) / table.file).read_bytes()
        frames.append(landing.parse(data, table, month).values.to_pandas().set_index(USER_ID))
    truth = pd.read_csv(out / TRUTH_FOLDER / f"{month}.csv", dtype={USER_ID: str}, index_col=USER_ID)
    features = pd.concat(frames, axis=1)[[column.name for column in COLUMNS]]
    return Scored(features, truth.loc[features.index, TRUTH].to_numpy(np.float64))


def _in_a_process_of_its_own(users: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.drift", "--users", str(users)]
    measured: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return measured


def _cost(users: int) -> dict[str, float]:
    pool = _simulated(min(users, POOL), seed=1)[0]
    before, after = (pool.take(np.random.default_rng(seed).integers(len(pool), size=users)) for seed in (1, 2))
    _compared(pool, pool)
    held = _peak()
    seconds, processor = [], []
    for _ in range(3):
        started, spent = time.perf_counter(), time.process_time()
        _compared(before, after)
        seconds.append(time.perf_counter() - started)
        processor.append(time.process_time() - spent)
    return {
        "seconds, median of 3": round(sorted(seconds)[1], 3),
        "processor seconds, median of 3": round(sorted(processor)[1], 3),
        "peak memory, MiB": round(_peak()),
        "of which before the report, MiB": round(held),
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
