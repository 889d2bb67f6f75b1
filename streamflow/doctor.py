"""Doctor: what is wrong with this installation and what to do about it.

Each check looks at one thing, changes nothing, and says how it is or raises StreamFlowError with what to do about it.
"""

import platform
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import httpx
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from streamflow import embedded, online_redis
from streamflow.contract import SCHEMA
from streamflow.database import Database
from streamflow.errors import StreamFlowError
from streamflow.landing import LandingZone
from streamflow.policy import Policy
from streamflow.settings import PREFIX, PROJECT_ROOT, Settings
from streamflow.stack import Addresses
from streamflow.warehouse import INSERT_ONLY

LEAST_FREE_GIB = 2


@dataclass(frozen=True)
class Finding:
    """The outcome of one check: ``says`` is how it is when ``ok``, else what is wrong and what to do."""

    what: str
    ok: bool
    says: str


def examine(settings: Settings) -> list[Finding]:
    """Check the machine, the database, the archive and the services; never raises.

    An embedded PostgreSQL that does not run is started for it and stopped again.
    """
    return [
        _finding("Python", _python),
        _finding("packages", _packages),
        _finding("home", partial(_home, settings.home)),
        _finding("policy", lambda: f"mode {Policy.load(settings).mode}, {settings.policy_file}"),
        *_database(settings),
        *_redis(settings.online_redis_url),
        _finding("landing archive", partial(_archive, LandingZone(settings.home))),
        *_services(settings),
        _finding("leftovers", partial(_leftovers, settings.home)),
    ]


def _finding(what: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(what, True, check())
    except StreamFlowError as refusal:
        return Finding(what, False, str(refusal))
    except Exception as failure:
        return Finding(what, False, f"could not be checked: {type(failure).__name__}: {failure}")


def _project() -> dict[str, Any]:
    return dict(tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"])


def _python() -> str:
    running, wanted = platform.python_version(), _project()["requires-python"]
    if running not in SpecifierSet(wanted, prereleases=True):
        raise StreamFlowError(f"{running} runs, {wanted} is needed; make the virtual environment with that")
    return running


def _packages() -> str:
    """Hold the installed versions of the direct dependencies against the lines of the lock that apply here."""
    lines = (PROJECT_ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith(("#", " "))]
    locked = {pin.name: str(pin.specifier) for pin in pins if not pin.marker or pin.marker.evaluate()}
    installed = {canonicalize_name(found.name): f"=={found.version}" for found in distributions()}
    direct = [canonicalize_name(Requirement(line).name) for line in _project()["dependencies"]]
    pairs = {name: (installed.get(name, "missing"), locked.get(name, "nothing")) for name in direct}
    if wrong := [f"{name} is {here}, locked is {there}" for name, (here, there) in pairs.items() if here != there]:
        raise StreamFlowError(f"{'; '.join(wrong)}; install requirements.lock into the virtual environment again")
    return f"{len(direct)} direct dependencies as in requirements.lock"


def _home(home: Path) -> str:
    folder = next(path for path in (home, *home.parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as failure:
        raise StreamFlowError(f"{folder} cannot be written into ({failure.strerror}); set {PREFIX}HOME") from failure
    free = shutil.disk_usage(folder).free / 2**30
    if free < LEAST_FREE_GIB:
        advice = f"make room or set {PREFIX}HOME to another disk"
        raise StreamFlowError(f"{home} has {free:.1f} GiB free, less than {LEAST_FREE_GIB} GiB; {advice}")
    return f"{home}, {free:.1f} GiB free"


def _database(settings: Settings) -> list[Finding]:
    """PostgreSQL and, if it answers, what is in it."""
    inside: list[Finding] = []

    def server() -> str:
        with embedded.postgres(settings) as database, database.connect() as connection:
            inside.append(_finding("schema", partial(_schema, database)))
            inside.append(_finding("platform role", partial(_role, database)))
            info = connection.info
            return f"{info.parameter_status('server_version')} at {info.host}:{info.port}, database {info.dbname}"

    return [_finding("PostgreSQL", server), *inside]


def _redis(url: str | None) -> list[Finding]:
    return [_finding("Redis", partial(online_redis.require, url))] if url else []


def _schema(database: Database) -> str:
    from alembic.script import ScriptDirectory

    head = ScriptDirectory(str(PROJECT_ROOT / "streamflow" / "migrations")).get_current_head()
    with database.connect() as connection:
        table = connection.execute("SELECT to_regclass(%s)", (f"{SCHEMA}.alembic_version",)).fetchone()
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone() if table != (None,) else None
    if row != (head,):
        at = row[0] if row else "none"
        raise StreamFlowError(f"at migration {at}, this version needs {head}; run `streamflow migrate`")
    return f"at migration {head}"


def _role(database: Database) -> str:
    """The platform's role can neither change the append-only tables nor act as their owner or as superuser."""
    with database.connect() as connection:
        role = connection.info.user
        query = """
            SELECT relname, has_table_privilege(oid, 'UPDATE, DELETE, TRUNCATE') OR pg_has_role(relowner, 'MEMBER')
            FROM pg_class WHERE relnamespace = to_regnamespace(%s) AND relname = ANY (%s)
            """
        can_change = dict(connection.execute(query, (SCHEMA, list(INSERT_ONLY))).fetchall())
    if absent := [name for name in INSERT_ONLY if name not in can_change]:
        raise StreamFlowError(f"{role} finds no {' and no '.join(absent)}; run `streamflow migrate`")
    if any(can_change.values()):
        raise StreamFlowError(f"{role} can change the ledger; set {PREFIX}DATABASE_URL to a role without such rights")
    return f"{role} is no superuser and cannot change the ledger"


def _archive(zone: LandingZone) -> str:
    """The first thing wrong with each month's manifest and files, if any."""
    months, damages = zone.months(), []
    for month in months:
        try:
            for table in zone.manifest(month).tables:
                zone.read(month, table)
        except StreamFlowError as damage:
            damages.append(str(damage))
    if damages:
        raise StreamFlowError("; ".join(damages))
    return f"{len(months)} months, every file as it landed" if months else "no month has landed yet"


def _services(settings: Settings) -> Iterator[Finding]:
    ours, registry = Addresses.of(settings), settings.mlflow_uri
    mlflow = (registry, "MLFLOW_URI") if registry else (ours.mlflow, "MLFLOW_PORT")
    for what, address, variable, path, read in (
        ("API", ours.api, "API_PORT", "ready", _readiness),
        ("MLflow", *mlflow, "health", lambda answer: {"OK": "answers"}[answer.text]),
        ("Dagster", ours.dagster, "DAGSTER_PORT", "server_info", lambda answer: answer.json()["dagster_version"]),
    ):
        yield _finding(what, partial(_service, f"{address}/{path}", f"{PREFIX}{variable}", read))


def _service(url: str, variable: str, read: Callable[[httpx.Response], str]) -> str:
    """What ``read`` makes of the answer; it raises LookupError, TypeError or ValueError for that of something else."""
    try:
        return f"{read(httpx.get(url, trust_env=False))} at {url}"
    except httpx.ConnectError as failure:
        if variable.endswith("_URI"):
            raise StreamFlowError(f"nothing answers {url}; start it or correct {variable}") from failure
        return "not running"
    except (httpx.HTTPError, LookupError, TypeError, ValueError) as failure:
        raise StreamFlowError(f"something else is at {url}, or it hangs; stop it or set {variable}") from failure


def _readiness(answer: httpx.Response) -> str:
    checks = answer.json()["checks"]
    troubles = "; ".join(f"{check['name']}: {check['reason']}" for check in checks if check["state"] != "ready")
    if answer.is_error:
        raise StreamFlowError(f"runs and is not ready: {troubles}")
    return f"degraded ({troubles})" if troubles else "ready"


def _leftovers(home: Path) -> str:
    members = list(embedded._members(home))
    if left := sorted(f"{member.name} (process {member.process.pid})" for member in members if not member.supervised):
        raise StreamFlowError(f"{', '.join(left)} of a killed `streamflow up`; the next `streamflow up` stops them")
    return f"none; `streamflow up` runs as process {members[0].supervisor}" if members else "none"
