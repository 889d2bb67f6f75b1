"""The settings, read from the environment once and passed in everywhere else."""

import getpass
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

import msgspec
from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from streamflow.errors import ConfigurationError

PROJECT_ROOT = Path(__file__).resolve().parent.parent
PREFIX = "STREAMFLOW_"

_Document = TypeVar("_Document")

Port = Annotated[int, Field(ge=1, le=65535)]


class Settings(BaseSettings):
    """What one installation is told; each field is read from ``STREAMFLOW_`` and its name in capitals.

    ``home`` holds all state. ``database_url`` is the platform's role on your own PostgreSQL and
    ``owner_database_url`` the role that migrates and owns the ledger; without them the embedded server is used.
    ``mlflow_uri`` is an MLflow server's address; without it the registry is read from the database directly;
    ``mlflow_public_uri`` is where a browser finds it, if elsewhere.
    ``online_store`` says where the online features are: in PostgreSQL, or in the Redis at ``redis_url``
    (``redis[s]://[[user]:password@]host[:port][/database]``).
    Features that are older than ``max_feature_age_days`` are flagged in the service's answers or, as
    ``stale_features`` says, refused.
    ``host`` is where the services listen, ``code_host`` where Dagster's code server is found. ``policy`` overrides the
    mode of ``policy_file``; ``training_file`` says how models are chosen and fitted.
    ``automation`` says whether the sensors that bring in months and train again start by themselves.
    ``prediction_retention_months`` is how many whole months of the prediction log are kept besides the current one;
    all, if not given.
    ``api_keys_file`` is what `streamflow key` writes; with it the prediction service answers to those keys only, and
    ``api_key`` is the one that commands show it. ``workers`` is the service's number of processes; beyond
    ``max_in_flight`` requests in one of them it refuses more. ``access_log`` has it log answered requests too.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    home: Path = Path("var")
    database_url: str | None = None
    owner_database_url: str | None = None
    mlflow_uri: str | None = None
    mlflow_public_uri: str | None = None
    online_store: Literal["postgres", "redis"] = "postgres"
    redis_url: str = "redis://127.0.0.1:6379/0"
    host: str = "127.0.0.1"
    api_port: Port = 8000
    dagster_port: Port = 3000
    mlflow_port: Port = 5000
    code_host: str = "127.0.0.1"
    code_port: Port = 4000
    max_feature_age_days: Annotated[int, Field(ge=0)] = 45
    stale_features: Literal["flag", "refuse"] = "flag"
    policy: Literal["manual", "auto"] | None = None
    policy_file: Path = PROJECT_ROOT / "policy.toml"
    training_file: Path = PROJECT_ROOT / "training.toml"
    prediction_retention_months: Annotated[int, Field(ge=1)] | None = None
    api_keys_file: Path | None = None
    api_key: str | None = None
    workers: Annotated[int, Field(ge=1, le=64)] = 1
    max_in_flight: Annotated[int, Field(ge=1)] = 512
    access_log: bool = False
    automation: Literal["on", "off"] = "on"
    actor: str = Field(default_factory=getpass.getuser, min_length=1)

    @field_validator("home", "policy_file", "training_file", "api_keys_file", mode="before")
    @classmethod
    def _absolute(cls, path: str | Path | None) -> Path | None:
        if path is None:
            return None
        if path == "":
            raise ValueError("is empty; name a path, or unset the variable for the default")
        return Path(path).expanduser().absolute()

    @field_validator("redis_url")
    @classmethod
    def _redis_address(cls, url: str) -> str:
        parts = urlsplit(url)
        known = parts.scheme in ("redis", "rediss") and parts.hostname and parts.port != 0
        if not known or not re.fullmatch(r"/?\d*", parts.path) or parts.query or parts.fragment:
            raise ValueError("is no redis[s]://[[user]:password@]host[:port][/database] address")
        return url

    @property
    def online_redis_url(self) -> str | None:
        """Where the online features are, if that is Redis."""
        return self.redis_url if self.online_store == "redis" else None

    @property
    def mlflow_page(self) -> str:
        """Where a browser finds MLflow."""
        return self.mlflow_public_uri or self.mlflow_uri or f"http://{self.host}:{self.mlflow_port}"

    @classmethod
    def load(cls, **overrides: Any) -> "Settings":
        """Read the environment; raises ConfigurationError naming each variable that cannot be used."""
        try:
            return cls(**overrides)
        except ValidationError as refusal:
            lines = [f"{PREFIX}{str(e['loc'][0]).upper()}={e['input']!r}: {e['msg']}" for e in refusal.errors()]
            raise ConfigurationError("; ".join(lines)) from None

    def environment(self) -> dict[str, str]:
        """These settings as environment variables, for the processes that are started with them."""
        given = self.model_dump(mode="json", exclude_none=True)
        return {f"{PREFIX}{name.upper()}": str(value) for name, value in given.items()}


def read_toml(path: Path, kind: type[_Document], what: str) -> _Document:
    """What a TOML file says; raises ConfigurationError that names ``what`` it is, the file and the key that is bad."""
    try:
        return msgspec.toml.decode(path.read_bytes(), type=kind)
    except OSError as failure:
        raise ConfigurationError(f"{what} {path} cannot be read: {failure.strerror}") from failure
    except (msgspec.DecodeError, UnicodeDecodeError) as failure:
        raise ConfigurationError(f"{what} {path} cannot be used: {failure}; correct the file") from failure
