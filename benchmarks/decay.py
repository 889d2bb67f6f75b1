"""Measures the decay report: time and memory by number of users, how often it alarms without cause, what it misses.

    python -m benchmarks.decay [--users N ...] [--series N] [--held-out N ...]

Users are simulated: a probability of churn for each, which the labels of every month are drawn with. In a stable series
of twelve months nothing changes; in the others the version ranks worse at once, or a little worse each month.
"""

import argparse
import json
import multiprocessing
import os
import resource
import time
from collections import Counter
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from streamflow import decay, evaluation
from streamflow.contract import CONTRACT, USER_ID
from streamflow.dataset import split
from streamflow.gates import Evidence
from streamflow.months import Month
from streamflow.policy import Policy
from streamflow.settings import PROJECT_ROOT, Settings
from streamflow.training_config import TrainingConfig

FIRST = Month(2024, 1)
SERIES_MONTHS = 12
SERIES_DRAWS = 200
FINDINGS = ("worse_than_promised", "no_better_than_chance", "worse_calibrated", "sliding")
SCENARIOS = {
    "stable": (0.0, 0.0),
    "AUC lower by 0.03 at once": (0.088, 0.0),
    "AUC lower by 0.06 at once": (0.178, 0.0),
    "AUC lower by another 0.005 each month": (0.0, 0.015),
}
"""The share of the log odds that has nothing to do with the user any more: from the first month on, and more each."""
Floats = NDArray[np.float64]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, nargs="*", default=[7_043, 1_000_000])
    parser.add_argument("--series", type=int, default=50)
    parser.add_argument("--held-out", type=int, nargs="*", default=[500, 1_783])
    arguments = parser.parse_args()
    # Each in a process of its own, whose peak memory is its own.
    context = multiprocessing.get_context("spawn")
    sizes = {}
    for users in arguments.users:
        with context.Pool(1) as pool:
            sizes[f"{users:,} users"] = pool.apply(measure, (users,))
    with context.Pool(os.cpu_count()) as pool:
        found = {
            f"{held_out:,} held-out users, {name}": _rates(
                pool.starmap(series, [(held_out, *worse, seed) for seed in range(arguments.series)])
            )
            for held_out in arguments.held_out
            for name, worse in SCENARIOS.items()
        }
    report = {"cores": os.cpu_count(), "load average": os.getloadavg(), "cost": sizes, "alarms": found}
    print(json.dumps(report, indent=2))


def measure(users: int) -> dict[str, float]:
    """Seconds of a report with all segments and of explaining a drop, and the peak memory of a process that does it."""
    config, policy = TrainingConfig.load(PROJECT_ROOT / "training.toml"), Policy.load(Settings())
    rng = np.random.default_rng(0)
    rows = _rows(users, rng)
    held_out = split(rows[USER_ID].tolist())
    chance = _sigmoid(rng.normal(-1.2, 1, users))
    labels = rng.random(users) < chance
    promise = _promise(labels[held_out], chance[held_out], config.bootstrap_draws)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    groups = evaluation.segment_groups(rows, config.segments)
    outcome = decay.Outcome(FIRST.shift(1), chance, 0.3, labels, held_out, groups)
    decay.performance_report(outcome, promise, [], policy.decay, seed=config.seed, draws=config.bootstrap_draws)
    reported = time.perf_counter()
    side = decay.Side(FIRST, rows[held_out].reset_index(drop=True), labels[held_out], chance[held_out])
    decay.explain_drop(side, side, CONTRACT.services[-1], seed=config.seed)
    return {
        "seconds of the report": round(reported - started, 2),
        "seconds of explaining a drop": round(time.perf_counter() - reported, 2),
        "megabytes before": round(before / 1024),
        "megabytes at most": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def series(held_out: int, at_once: float, each_month: float, seed: int) -> list[list[str]]:
    """What is found in each of twelve months of a version that ranks worse from the first on, or more each month."""
    policy = Policy.load(Settings())
    rng = np.random.default_rng([seed, held_out])
    log_odds = rng.normal(-1.5, 1.6, held_out)
    chance, everybody = _sigmoid(log_odds), np.ones(held_out, dtype=np.bool_)
    promise = _promise(rng.random(held_out) < chance, chance, SERIES_DRAWS)
    history: list[decay.PerformanceReport] = []
    for at in range(1, SERIES_MONTHS + 1):
        labels = rng.random(held_out) < _sigmoid(_faded(log_odds, at_once + each_month * at, rng))
        outcome = decay.Outcome(FIRST.shift(at), chance, 0.3, labels, everybody, {})
        history.append(decay.performance_report(outcome, promise, history, policy.decay, seed=seed, draws=SERIES_DRAWS))
    return [[name for name in FINDINGS if getattr(report, name).found] for report in history]


def _faded(log_odds: Floats, share: float, rng: np.random.Generator) -> Floats:
    """Log odds as often as high as before, but of which a share has nothing to do with the user."""
    middle, others = log_odds.mean(), rng.normal(0, 1.6, len(log_odds))
    return middle + (1 - share) * (log_odds - middle) + np.sqrt(1 - (1 - share) ** 2) * others


def _rates(found: list[list[list[str]]]) -> dict[str, Any]:
    months = Counter(name for one in found for month in one for name in month)
    first = Counter(name for one in found for name in set(one[0]))
    ever = Counter(name for one in found for name in {name for month in one for name in month})
    return {
        name: {
            "share of all months": round(months[name] / (len(found) * SERIES_MONTHS), 4),
            "share of first months": round(first[name] / len(found), 4),
            "share of series": round(ever[name] / len(found), 4),
        }
        for name in FINDINGS
    } | {"series": len(found), "months": len(found) * SERIES_MONTHS}


def _promise(labels: NDArray[np.bool_], chance: Floats, draws: int) -> decay.Promise:
    metrics = evaluation.intervals(labels, chance, 0.3, seed=1, draws=draws)
    evidence = Evidence(
        users=len(labels),
        churned=int(labels.sum()),
        metrics=metrics,
        train_metrics={name: one.value for name, one in metrics.items()},
        perfect_ece=evaluation.perfect_ece(chance, seed=1, draws=draws),
        segments=(),
        fairness=(),
        parity_difference=0.0,
        flipped_decisions=0,
        parity_rows=len(labels),
        golden_rows_reproduced=True,
        invariances=(),
        features_offline=(),
        signature_fits=True,
        protected=(),
        scoring_microseconds=1.0,
        possible_leaks={},
    )
    return decay.Promise(1, (FIRST,), evidence)


def _rows(users: int, rng: np.random.Generator) -> pd.DataFrame:
    columns: dict[str, Any] = {USER_ID: np.char.mod("%07d", np.arange(users)).astype(object)}
    for column in CONTRACT.features:
        if column.kind == "category":
            columns[column.name] = np.array(column.categories, dtype=object)[
                rng.integers(len(column.categories), size=users)
            ]
        elif column.kind == "boolean":
            columns[column.name] = rng.random(users) < 0.5
        else:
            drawn = rng.gamma(2, 12, users)
            columns[column.name] = drawn.astype(np.int64) if column.kind == "integer" else drawn
    return pd.DataFrame(columns)


def _sigmoid(log_odds: Floats) -> Floats:
    return 1 / (1 + np.exp(-log_odds))


if __name__ == "__main__":
    main()
