"""What tests share: the real months where they are, and one embedded PostgreSQL for the session."""

import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

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
def database(new_database: Callable[[], Database]) -> Database:
    """The module's own empty database."""
    return new_database()
