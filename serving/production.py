"""The model that is served: follows the promotion ledger, verifies what it names, swaps it in, says how things stand.

The ledger in PostgreSQL says which version is Production; MLflow is only where its artifact comes from.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date, datetime
from enum import StrEnum
from typing import Self

from serving.artifacts import Artifacts
from serving.features import FeatureQuery, FeatureStore
from serving.logs import log, with_cause
from serving.metrics import Metrics
from serving.polling import Polling
from serving.postgres import Postgres, QueryRefused
from streamflow.errors import ArtifactRefused, RegistryUnavailable, StreamFlowError, WarehouseUnavailable
from streamflow.scoring import Scorer, self_test

POLL_S = 1.0
REFUSED_RETRY_S = 30.0
FIRST_LOOK_S = 3.0
"""How long a start waits for the first look at the ledger, and the model that it names."""
NOT_CHECKED = "not checked yet: the service is starting"
NOTHING_PROMOTED = "no version is in Production; run `streamflow promote VERSION --by NAME --reason TEXT`"

NEWEST_DECISION = """
    SELECT decision.id, decision.at, version, run_id, service, as_of,
        coalesce(
            (SELECT later.threshold FROM streamflow.promotion_ledger AS later
             WHERE later.action = 'threshold' AND later.version = decision.version ORDER BY later.id DESC LIMIT 1),
            registered.threshold
        ),
        artifact_path, artifact_sha256
    FROM streamflow.promotion_ledger AS decision
    JOIN streamflow.model_versions AS registered USING (version)
    WHERE decision.action IN ('promote', 'rollback')
    ORDER BY decision.id DESC
    LIMIT 1
"""


class NoModel(StreamFlowError):
    """There is no model to score with; the message says why."""


@dataclass(frozen=True)
class Production:
    """The version that the ledger's newest promotion or rollback, row ``entry``, made Production.

    ``threshold`` is the one in force: the newest that was decided for the version, or the registered one.
    """

    entry: int
    promoted_at: datetime
    version: int
    run_id: str
    service: str
    as_of: date
    threshold: float
    artifact_path: str
    artifact_sha256: str


@dataclass(frozen=True)
class ServedModel:
    """A verified Production version in memory."""

    production: Production
    scorer: Scorer
    query: FeatureQuery
    loaded_at: datetime


@dataclass(frozen=True)
class Refusal:
    """A Production version that could not be taken, and the moment of the monotonic clock to try again."""

    production: Production
    reason: str
    retry_at: float


class State(StrEnum):
    """How well a part of the service does."""

    READY = "ready"
    DEGRADED = "degraded"
    UNAVAILABLE = "unavailable"


@dataclass(frozen=True)
class Check:
    """One part of the service's readiness and the reason for its state."""

    name: str
    state: State
    reason: str


class ProductionModel:
    """The one model in memory, at most a poll behind the ledger.

    A version that fails its digest or its self-test, or whose features are not online, is refused; what was served
    goes on.
    """

    def __init__(
        self,
        postgres: Postgres,
        store: FeatureStore,
        artifacts: Artifacts,
        clock: Callable[[], datetime],
        metrics: Metrics,
    ) -> None:
        self._postgres = postgres
        self._store = store
        self._artifacts = artifacts
        self._clock = clock
        self._metrics = metrics
        self._served: ServedModel | None = None
        self._why_none = NOT_CHECKED
        self._store_check = Check("feature_store", State.UNAVAILABLE, NOT_CHECKED)
        self._registry_check = Check("registry", State.DEGRADED, NOT_CHECKED)
        self.refusal: Refusal | None = None
        self._looked = asyncio.Event()
        self._polling = Polling(POLL_S, self._poll_database, self._poll_registry)

    def current(self) -> ServedModel:
        """The model to score with; raises NoModel."""
        if self._served is None:
            raise NoModel(self._why_none)
        return self._served

    def checks(self) -> tuple[Check, ...]:
        """How model, feature store and registry were doing at the last poll."""
        return (self._model_check(), self._store_check, self._registry_check)

    def _model_check(self) -> Check:
        if self._served is None:
            return Check("model", State.UNAVAILABLE, self._why_none)
        version = self._served.production.version
        if self.refusal:
            reason = f"version {version} is served, not Production's {self.refusal.production.version}"
            return Check("model", State.DEGRADED, f"{reason}: {self.refusal.reason}")
        return Check("model", State.READY, f"version {version} is served")

    async def __aenter__(self) -> Self:
        """Begin to poll ledger, feature store and registry.

        The first look is waited for: a worker that takes another's place is not to refuse what the others could answer.
        """
        await self._polling.__aenter__()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_LOOK_S):
                await self._looked.wait()
        return self

    async def __aexit__(self, *end: object) -> None:
        """Stop polling."""
        await self._polling.__aexit__(*end)

    async def _poll_registry(self) -> None:
        try:
            await self._artifacts.probe()
        except RegistryUnavailable as failure:
            check = Check("registry", State.DEGRADED, str(failure))
            self._registry_check = _announced(self._registry_check, check, failure)
        else:
            self._registry_check = _announced(self._registry_check, Check("registry", State.READY, "MLflow answers"))

    async def _poll_database(self) -> None:
        try:
            await self._follow_ledger()
            if self._served:
                await self._store.read(self._served.query, [])
        except WarehouseUnavailable as failure:
            check = Check("feature_store", State.UNAVAILABLE, str(failure))
            self._store_check = _announced(self._store_check, check, failure)
            self._why_none = f"which version is in Production cannot be read: {failure}"
        else:
            self._store_check = _announced(self._store_check, Check("feature_store", State.READY, self._store.answers))
        finally:
            self._looked.set()

    async def _follow_ledger(self) -> None:
        rows = await self._postgres.fetch(NEWEST_DECISION)
        if not rows:
            self._why_none = NOTHING_PROMOTED
            return
        production = Production(*rows[0])
        if self._served and self._served.production.version == production.version:
            self._served, self.refusal = replace(self._served, production=production), None
        elif self._is_due(production):
            await self._take(production)

    def _is_due(self, production: Production) -> bool:
        refusal = self.refusal
        return refusal is None or refusal.production != production or time.monotonic() >= refusal.retry_at

    async def _take(self, production: Production) -> None:
        try:
            self._served, self.refusal = await self._load(production), None
        except ArtifactRefused as failure:
            self._refuse(production, failure, retry_s=REFUSED_RETRY_S)
        except (RegistryUnavailable, QueryRefused) as failure:
            self._refuse(production, failure, retry_s=POLL_S)
        else:
            self._metrics.swap()
            log(logging.INFO, "model_served", version=production.version, artifact_sha256=production.artifact_sha256)

    async def _load(self, production: Production) -> ServedModel:
        """Everything that is to be verified before a model may answer."""
        data = await self._artifacts.load(production.run_id, production.artifact_path, production.artifact_sha256)
        scorer = await asyncio.to_thread(_verified_scorer, data, production.service)
        query = FeatureQuery.of(scorer.features)
        await self._store.read(query, [])
        return ServedModel(production, scorer, query, self._clock())

    def _refuse(self, production: Production, failure: StreamFlowError, *, retry_s: float) -> None:
        if self.refusal is None or (self.refusal.production, self.refusal.reason) != (production, str(failure)):
            log(logging.ERROR, "model_refused", version=production.version, reason=with_cause(failure))
        self._metrics.swap(failure)
        self.refusal = Refusal(production, str(failure), time.monotonic() + retry_s)
        self._why_none = f"version {production.version} is in Production but cannot be served: {failure}"


def _verified_scorer(data: bytes, service: str) -> Scorer:
    try:
        scorer = Scorer.from_bytes(data)
        self_test(scorer)
    except StreamFlowError:
        raise
    except Exception as failure:
        raise ArtifactRefused(f"the artifact cannot be loaded: {failure!r}") from failure
    if scorer.service != service:
        raise ArtifactRefused(f"the artifact takes the features of {scorer.service}; the ledger says {service}")
    return scorer


def _announced(before: Check, now: Check, failure: StreamFlowError | None = None) -> Check:
    if now != before:
        level = logging.INFO if now.state is State.READY else logging.WARNING
        reason = with_cause(failure) if failure else now.reason
        log(level, "readiness_changed", part=now.name, state=now.state, reason=reason)
    return now
