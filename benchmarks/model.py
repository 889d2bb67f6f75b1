"""Measures the model: how well the whole procedure predicts, how sure that is, what each step costs, and the rebuild.

    python -m benchmarks.model [--data DIR] [--repeats N]

``--data`` is a folder with the real months ``month_000`` and ``month_001`` (default: beside the checkout). For each
month: the baseline and the whole procedure (its choice included) under repeated 4-fold cross-validation by user; the
hold-out with 95 % intervals; the seconds of each step; the time to score one row; and whether a rebuild is identical.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from benchmarks.months import assembled
from streamflow import dataset, pipeline, procedure, selection, training
from streamflow.contract import CONTRACT, USER_ID
from streamflow.embedded import postgres
from streamflow.months import FIRST_MONTH, Month
from streamflow.settings import PROJECT_ROOT, Settings
from streamflow.training_config import TrainingConfig

REAL_DATA = PROJECT_ROOT.parent / "shared" / "data"
OUTER_FOLDS = 4
OUTER_SEED = 1_000
BASELINE = "random_forest_baseline"
REPLACED_SYSTEM_S = 39.0
"""Seconds that the system being replaced takes to fit, evaluate and register one estimator."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=REAL_DATA)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    load_before = os.getloadavg()
    first = Month.parse(FIRST_MONTH)
    with tempfile.TemporaryDirectory(prefix="streamflow-bench-") as scratch, _platform(Path(scratch)) as installed:
        months = {
            str(first.shift(index)): _month(installed, folder, first.shift(index), arguments.repeats)
            for index, folder in enumerate(sorted(arguments.data.glob("month_*")))
        }
    report = {
        "machine": {
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "load average before": load_before,
            "load average after": os.getloadavg(),
        },
        "config_digest": TrainingConfig.load(Settings().training_file).digest,
        "months": months,
    }
    print(json.dumps(report, indent=2))


@contextmanager
def _platform(home: Path) -> Iterator[pipeline.Platform]:
    settings = Settings(home=home)
    with postgres(settings) as database:
        installed = pipeline.Platform(settings, database)
        pipeline.prepare(installed)
        yield installed


def _month(installed: pipeline.Platform, folder: Path, month: Month, repeats: int) -> dict[str, Any]:
    written = assembled(installed, folder, month, datetime.now(UTC))
    data = dataset.load(installed.datasets / f"{written.digest}.parquet")
    _train_and_register(installed, month, BASELINE)  # loads every library once
    return {
        "cross-validated": _cross_validated(installed, data, repeats),
        "baseline by name": _train_and_register(installed, month, BASELINE),
        **{
            f"{name} by name": _train_and_register(installed, month, name)
            for name in installed.training_config.estimators
            if name != BASELINE
        },
        "chosen": _train_and_register(installed, month, None),
        "rebuild": _rebuild(installed),
    }


def _cross_validated(installed: pipeline.Platform, data: dataset.TrainingDataset, repeats: int) -> dict[str, Any]:
    """AUC on users that neither choosing nor fitting has seen; 4 folds by user, each repeat with other folds."""
    config, cores = installed.training_config, os.cpu_count() or 1
    how = procedure.Procedure.of(config, installed.policy)
    plain = training.ModelSpec(BASELINE, CONTRACT.service("churn_v1"), False, 0.5)
    baseline, whole, choices, seconds = [], [], [], []
    for repeat in range(repeats):
        fold = dataset.folds(data.frame[USER_ID].tolist(), OUTER_FOLDS, OUTER_SEED + repeat)
        for held_out in range(OUTER_FOLDS):
            rows, unseen = data.frame[fold != held_out], data.frame[fold == held_out]
            labels = unseen[data.label]
            model = training.fit(rows, data.label, plain, config, n_jobs=cores)
            baseline.append(roc_auc_score(labels, model.probabilities(unseen)))
            started = time.perf_counter()
            choice = selection.select(rows, data.label, how.services, config, n_jobs=cores)
            spec = training.ModelSpec(choice.estimator, choice.service, choice.calibrated, 0.5)
            model = training.fit(rows, data.label, spec, config, n_jobs=cores)
            seconds.append(time.perf_counter() - started)
            whole.append(roc_auc_score(labels, model.probabilities(unseen)))
            calibrated = ", calibrated" if choice.calibrated else ""
            choices.append(f"{choice.estimator} on {choice.service.name}{calibrated}")
    return {
        "folds": OUTER_FOLDS,
        "repeats": repeats,
        "baseline AUC": _spread(baseline),
        "whole procedure AUC": _spread(whole),
        "choices": {choice: choices.count(choice) for choice in dict.fromkeys(choices)},
        "seconds of choosing and fitting": _spread(seconds),
    }


def _train_and_register(installed: pipeline.Platform, month: Month, estimator: str | None) -> dict[str, Any]:
    started = time.perf_counter()
    trained = pipeline.train(installed, month, datetime.now(UTC), estimator=estimator)
    training_s = time.perf_counter() - started
    registered = pipeline.register(installed, month, datetime.now(UTC))
    total = time.perf_counter() - started
    evidence, model = trained.measured.evidence, trained.candidate.model
    steps = {**trained.candidate.seconds, **trained.measured.seconds}
    return {
        "estimator": model.estimator,
        "service": model.service.name,
        "calibrated": model.calibrated,
        "threshold": model.threshold,
        "hold-out users": evidence.users,
        "metrics": {name: [one.value, one.low, one.high] for name, one in evidence.metrics.items()},
        "train AUC": evidence.train_metrics["auc"],
        "ECE that a perfectly calibrated model stays below in 95 % of draws": evidence.perfect_ece,
        "gates that failed": [gate.name for gate in registered.decision.gates if not gate.passed],
        "microseconds of one row": evidence.scoring_microseconds,
        "artifact bytes": len(trained.candidate.artifact),
        "parity": [trained.candidate.parity.max_difference, trained.candidate.parity.flipped_decisions],
        "seconds": {
            **{name: round(took, 3) for name, took in steps.items()},
            "plots, card and logging": round(training_s - sum(steps.values()), 3),
            "register": round(total - training_s, 3),
            "total": round(total, 3),
        },
        "ratio to the replaced system": round(total / REPLACED_SYSTEM_S, 3),
    }


def _rebuild(installed: pipeline.Platform) -> dict[str, Any]:
    newest = installed.ledger.versions()[-1]
    started = time.perf_counter()
    rebuilt = pipeline.rebuild(installed, newest.version)
    return {
        "same dataset": rebuilt.same_dataset,
        "same predictions": rebuilt.same_predictions,
        "largest difference": rebuilt.largest_difference,
        "seconds": round(time.perf_counter() - started, 2),
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "mean": round(statistics.mean(values), 4),
        "standard deviation": round(float(np.std(values, ddof=1)), 4) if len(values) > 1 else 0.0,
        "minimum": round(min(values), 4),
        "maximum": round(max(values), 4),
    }


if __name__ == "__main__":
    main()
