"""What tests share: the real months where they are, and one embedded PostgreSQL for the session."""

import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from scratch_redis import redis_database

from streamflow.database import Database
from streamflow.embedded import create_database, postgres
from streamflow.settings import PROJECT_ROOT, Settings

# MLflow would otherwise report each call to its makers, and wait for that.
os.environ["DO_NOT_TRACK"] = "true"

REAL_DATA = PROJECT_ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def _clean_environment() -> None:
    for name in [name for name in os.environ if name.startswith(("STREAMFLOW_", "DAGSTER_", "MLFLOW_"))]:
        if not name.startswith("STREAMFLOW_TEST_"):
            del os.environ[name]


@pytest.fixture(scope="session")
def quick_training_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """training.toml with few trees; what is tested with it does not depend on how many."""
    text = (PROJECT_ROOT / "training.toml").read_text()
    for pattern, fewer in (
        (r"(n_estimators = )\d+", "20"),
        (r"(importance_repeats = )\d+", "2"),
        (r"(\[estimators\.gradient_boosting\][^\[]*?max_iter = )\d+", "20"),
    ):
        text, changed = re.subn(pattern, rf"\g<1>{fewer}", text)
        assert changed, pattern
    file = tmp_path_factory.mktemp("training") / "training.toml"
    file.write_text(text)
    return file


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of the two published months, ``month_000`` (2024-01) and ``month_001`` (2024-02)."""
    if not (REAL_DATA / "month_000").is_dir():
        pytest.skip("the real sample months are not beside this checkout; simulated months cover the same behaviour")
    return REAL_DATA


@pytest.fixture(scope="session")
def server() -> Iterator[Database]:
    """The session's embedded PostgreSQL."""
    with tempfile.TemporaryDirectory(prefix="streamflow-tests-") as home:
        Path(home).chmod(0o755)
        with postgres(Settings(home=Path(home))) as database:
            yield database


@pytest.fixture(scope="session")
def new_database(server: Database) -> Callable[[], Database]:
    """Makes an empty database with the platform's roles."""
    return lambda: create_database(server, f"test_{uuid.uuid4().hex[:12]}")


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    """The module's own empty Redis database."""
    with redis_database() as url:
        yield url


@pytest.fixture(scope="module")
def database(new_database: Callable[[], Database]) -> Database:
    """The module's own empty database."""
    return new_database()
