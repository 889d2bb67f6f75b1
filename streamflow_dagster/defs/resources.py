"""What assets are given: the platform, connected for the length of a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from dagster import ConfigurableResource, InitResourceContext
from pydantic import PrivateAttr

from streamflow.embedded import postgres
from streamflow.pipeline import Platform
from streamflow.settings import Settings


class PlatformResource(ConfigurableResource["PlatformResource"]):
    """The platform that the environment describes; the embedded PostgreSQL runs while a run needs it."""

    _platform: Platform = PrivateAttr()

    @contextmanager
    def yield_for_execution(self, context: InitResourceContext) -> Iterator["PlatformResource"]:
        """Connect for the length of one run."""
        settings = Settings.load()
        with postgres(settings) as database:
            self._platform = Platform(settings, database)
            yield self

    @property
    def platform(self) -> Platform:
        """The connected platform."""
        return self._platform

    def now(self) -> datetime:
        """The time that the run's records bear; the core never asks a clock."""
        return datetime.now(UTC)
