"""The same files, configuration, code and seed give the same dataset, choice and predictions, wherever they run.

Each run is a process of its own on a fresh home and an empty database.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamflow.database import Database
from streamflow.months import Month
from streamflow.simulate import simulate

JANUARY = Month(2024, 1)
USERS = 600
ONE_MONTH = """
import json, locale, sys, time
from datetime import UTC, datetime
from pathlib import Path
from streamflow import dataset, pipeline, procedure
from streamflow.contract import CONTRACT
from streamflow.database import Database
from streamflow.months import Month
from streamflow.settings import Settings

locale.setlocale(locale.LC_ALL, "")
home, folder, url, owner_url, training_file = sys.argv[1:]
platform = pipeline.Platform(Settings(home=home, training_file=training_file), Database(url, owner_url))
month, now = Month(2024, 1), datetime(2024, 2, 1, tzinfo=UTC)
pipeline.prepare(platform)
platform.landing.land(Path(folder), month, now)
for table in CONTRACT.tables:
    pipeline.load_table(platform, table, month, now)
for table in CONTRACT.snapshots:
    pipeline.build_snapshot(platform, table, month, now)
for view in CONTRACT.views:
    pipeline.publish_view(platform, view, month, now)
written = pipeline.assemble_dataset(platform, month, now)
data = dataset.load(platform.datasets / f"{written.digest}.parquet")
made = procedure.run(data, procedure.Procedure.of(platform.training_config, platform.policy))
print(json.dumps({
    "dataset": written.digest,
    "candidates": [
        [one.estimator, one.service, one.calibrated, one.logloss, one.auc] for one in made.selection.candidates
    ],
    "chosen": [made.model.estimator, made.model.service.name, made.model.calibrated, made.model.threshold],
    "config": platform.training_config.digest,
    "artifact": made.artifact_sha256,
    "predictions": made.predictions_digest,
    "surroundings": [time.strftime("%z"), locale.getpreferredencoding()],
}))
"""

ELSEWHERE = {
    "another time zone": {"TZ": "Pacific/Kiritimati"},
    "another locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "another number of threads": {"OMP_NUM_THREADS": "3", "OPENBLAS_NUM_THREADS": "3", "PYTHONHASHSEED": "7"},
    "shuffled rows": {},
}
HERE = {"TZ": "UTC", "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}


@pytest.fixture(scope="module")
def outcomes(
    tmp_path_factory: pytest.TempPathFactory, new_database: Callable[[], Database], quick_training_file: Path
) -> dict[str, dict[str, Any]]:
    """What comes out here and elsewhere, two at a time."""
    folder = tmp_path_factory.mktemp("months")
    simulate(folder, [JANUARY], users=USERS)
    (given,) = (path for path in folder.iterdir() if path.name == str(JANUARY))
    shuffled = _shuffled(given, tmp_path_factory.mktemp("shuffled"))

    def come_out(name: str, home: Path, database: Database) -> dict[str, Any]:
        files = shuffled if name == "shuffled rows" else given
        arguments = (home, files, database.url, database.owner_url, quick_training_file)
        done = subprocess.run(
            [sys.executable, "-c", ONE_MONTH, *map(str, arguments)],
            env={**os.environ, **HERE, **ELSEWHERE.get(name, {})},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{name}: {done.stderr}"
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    names = ["here", *ELSEWHERE]
    homes, databases = [tmp_path_factory.mktemp("home") for _ in names], [new_database() for _ in names]
    with ThreadPoolExecutor(2) as executor:
        return dict(zip(names, executor.map(come_out, names, homes, databases), strict=True))


def _shuffled(given: Path, folder: Path) -> Path:
    order = np.random.default_rng(5)
    for file in given.iterdir():
        header, *lines = file.read_text().splitlines(keepends=True)
        (folder / file.name).write_text("".join([header, *order.permutation(lines)]))
        assert file.read_bytes() != (folder / file.name).read_bytes()
    return Path(shutil.copytree(folder, folder.parent / f"{folder.name}-month"))


@pytest.mark.parametrize("elsewhere", ELSEWHERE)
def test_the_same_comes_out(outcomes: dict[str, dict[str, Any]], elsewhere: str) -> None:
    here, there = dict(outcomes["here"]), dict(outcomes[elsewhere])
    surroundings = here.pop("surroundings"), there.pop("surroundings")
    assert there == here
    if elsewhere == "another time zone":
        assert surroundings[0][0] != surroundings[1][0]
    if elsewhere == "another locale":
        assert surroundings[0][1] != surroundings[1][1]
