"""The service's metrics, as Prometheus reads them; a few microseconds a request.

Labels are bounded: routes of ours, features of the contract, our own names. With several worker processes each keeps
its numbers in files of its own, and whichever is asked adds them all up (prometheus_client's multiprocess mode).
"""

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
    values,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from serving.features import IncompleteFeatures
from streamflow.contract import Contract
from streamflow.errors import StreamFlowError
from streamflow.settings import Settings

if TYPE_CHECKING:
    from serving.prediction_log import PredictionLog
    from serving.predictor import Scored
    from serving.production import ProductionModel

CONTENT_TYPE = "text/plain; version=0.0.4"
FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
REFRESH_S = 1.0

disable_created_metrics()  # type: ignore[no-untyped-call]  # one more series for each, which several workers would lack

STAGES = ("features", "score")
STATES = ("ready", "degraded", "unavailable")
UNROUTED = "unrouted"
OTHER = "other"
"""A feature that the contract lacks, of a version trained with another one."""

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
STAGE_SECONDS = (0.00005, 0.0001, *SECONDS)
SCORES = tuple(tenths / 10 for tenths in range(1, 11))
AGE_DAYS = (7, 14, 31, 45, 62, 92, 184, 366)

_Labelled = TypeVar("_Labelled", Counter, Gauge, Histogram)


class Metrics:
    """The metrics of one process, or of one of several workers, who share ``folder``.

    As a context it keeps the gauges fresh for the other workers to read.
    """

    def __init__(self, contract: Contract, clock: Callable[[], datetime], folder: Path | None = None) -> None:
        _keep_values_in(folder)
        self._clock = clock
        self._folder = folder
        self._registry = CollectorRegistry()
        self._followed: list[Callable[[], None]] = []
        self._by_request: dict[tuple[str, int], tuple[Counter, Histogram]] = {}
        self._versions: dict[int, Gauge] = {}
        self._collectors: list[Collector] = []
        if self._folder is None:
            ProcessCollector(registry=self._registry)
        features = [*(column.name for column in contract.features), OTHER]

        self._requests = self._counter("requests", "Requests answered.", "route", "status")
        self._seconds = self._histogram("request_seconds", "Time until the answer began.", SECONDS, "route")
        stages = self._histogram("stage_seconds", "Time of one stage of answering.", STAGE_SECONDS, "stage")
        self._stages = _children(stages, STAGES)
        self.in_flight = self._gauge("requests_in_flight", "Requests being answered.", "liveall")
        self.queue_depth = self._gauge("queue_depth", "Customers that wait to be scored.")
        self._shed = self._counter("requests_shed", "Requests refused because too many were in flight.")
        self._by_key = self._counter("key_requests", "Requests with an API key, by its owner.", "owner")
        self._model = self._gauge("model_info", "1: the version served; 0: one served before.", "livemax", "version")
        self._loaded = self._gauge("model_loaded_age_seconds", "Since the version was loaded; 0: no model.", "livemax")
        self._promoted = self._gauge("model_promoted_age_seconds", "Since its promotion; 0: no model.", "livemax")
        self._swaps = self._counter("model_swaps", "Attempts to take a Production version.", "result")
        about = "1: the part is in this state, with several workers in one of them at least."
        self._readiness = self._gauge("readiness", about, "livemax", "part", "state")
        self._scores = self._histogram("score", "Probabilities that were answered.", SCORES)
        self._ages = self._histogram("feature_age_days", "Age of the features behind an answer.", AGE_DAYS)
        self._missing = _children(self._counter("missing_features", "Features missing.", "feature"), features)
        unusual = self._counter("out_of_range_features", "Values outside what the model was trained on.", "feature")
        self._out_of_range = _children(unusual, features)
        self._backlog = self._gauge("prediction_log_backlog", "Predictions that wait to be written.")
        self._spilled = self._gauge("prediction_log_spilled_rows", "Predictions in the spill file.")
        self._written = self._counter("prediction_log_written", "Predictions written.")

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"streamflow_{name}", about, labels, registry=self._registry)

    def _histogram(self, name: str, about: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"streamflow_{name}", about, labels, registry=self._registry, buckets=buckets)

    def _gauge(self, name: str, about: str, of_workers: Any = "livesum", *labels: str) -> Gauge:
        return Gauge(f"streamflow_{name}", about, labels, registry=self._registry, multiprocess_mode=of_workers)

    # --- what happens -----------------------------------------------------------------------------------------------

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count a request that is answered with this status; ``route`` is one of ours or UNROUTED."""
        counted = self._by_request.get((route, status))
        if counted is None:
            counted = (self._requests.labels(route, status), self._seconds.labels(route))
            self._by_request[route, status] = counted
        requests, latency = counted
        requests.inc()
        latency.observe(seconds)

    def shed(self) -> None:
        """Count a request that was refused because of too many."""
        self._shed.inc()

    def key_used(self, owner: str) -> None:
        """Count a request with the API key of ``owner``, who is in the file of keys."""
        self._by_key.labels(owner).inc()

    def observe(self, stage: str, seconds: float) -> None:
        """Record how long a stage took: one of STAGES, else KeyError."""
        self._stages[stage].observe(seconds)

    def answered(self, outcomes: Iterable["Scored | StreamFlowError"], now: datetime) -> None:
        """Record the scores and the features' ages of predictions, and what was missing for others."""
        today = now.date()
        for outcome in outcomes:
            if isinstance(outcome, IncompleteFeatures):
                for name in outcome.missing:
                    self._missing.get(name, self._missing[OTHER]).inc()
            elif not isinstance(outcome, StreamFlowError):
                self._scores.observe(outcome.probability)
                self._ages.observe((today - outcome.features_as_of).days)
                for name in outcome.outside:
                    self._out_of_range.get(name, self._out_of_range[OTHER]).inc()

    def swap(self, refusal: StreamFlowError | None = None) -> None:
        """Count an attempt to take a Production version: taken, or refused for a reason of some class."""
        self._swaps.labels(type(refusal).__name__ if refusal else "taken").inc()

    # --- how things stand -------------------------------------------------------------------------------------------

    def follow(self, gauge: Gauge, value: Callable[[], float]) -> None:
        """Have a gauge say what ``value`` returns whenever the metrics are read."""
        self._followed.append(lambda: gauge.set(value()))

    def follow_model(self, production: "ProductionModel") -> None:
        """Say which version is served and for how long, and how the parts of the service do."""
        self._followed.append(lambda: self._say_model(production))
        self._followed.append(lambda: self._say_readiness(production))

    def follow_log(self, log: "PredictionLog") -> None:
        """Say what the prediction log has written and has yet to write."""
        counted = 0

        def say() -> None:
            nonlocal counted
            written = log.written
            self._written.inc(written - counted)
            counted = written
            self._backlog.set(log.backlog)
            self._spilled.set(log.spilled_rows)

        self._followed.append(say)

    def _say_model(self, production: "ProductionModel") -> None:
        try:
            served = production.current()
        except StreamFlowError:
            return
        version, now = served.production.version, self._clock()
        if version not in self._versions:
            self._versions[version] = self._model.labels(version)
        for known, gauge in self._versions.items():
            gauge.set(known == version)
        self._loaded.set((now - served.loaded_at).total_seconds())
        self._promoted.set((now - served.production.promoted_at).total_seconds())

    def _say_readiness(self, production: "ProductionModel") -> None:
        for check in production.checks():
            for state in STATES:
                self._readiness.labels(check.name, state).set(check.state == state)

    def add(self, collector: Collector) -> None:
        """Have the page also say what ``collector`` knows, which must be the same for every worker."""
        self._collectors.append(collector)
        self._registry.register(collector)

    def page(self) -> bytes:
        """All metrics of all workers in Prometheus' text format."""
        self._refresh()
        if self._folder is None:
            return generate_latest(self._registry)
        _forget_the_dead(self._folder)
        every_worker = CollectorRegistry()
        MultiProcessCollector(every_worker, str(self._folder))  # type: ignore[no-untyped-call]
        for collector in self._collectors:
            every_worker.register(collector)
        return generate_latest(every_worker)

    def _refresh(self) -> None:
        for say in self._followed:
            say()

    async def __aenter__(self) -> Self:
        self._refreshing = asyncio.create_task(self._keep_fresh()) if self._folder else None
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._refreshing:
            self._refreshing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._refreshing
            self._refresh()
            mark_process_dead(os.getpid(), str(self._folder))  # type: ignore[no-untyped-call]

    async def _keep_fresh(self) -> None:
        while True:
            self._refresh()
            await asyncio.sleep(REFRESH_S)


def workers_folder(settings: Settings) -> Path | None:
    """Where several workers keep their numbers; None if there is one."""
    return settings.home / "cache" / f"metrics-{settings.api_port}" if settings.workers > 1 else None


def empty_folder(folder: Path) -> None:
    """Make the folder of the workers' numbers, without those of earlier workers."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("*.db"):
        file.unlink()


def _keep_values_in(folder: Path | None) -> None:
    """Say to prometheus_client what it would else guess from a variable that any other program may have set."""
    if folder:
        os.environ[FOLDER_VARIABLE] = str(folder)
        values.ValueClass = values.MultiProcessValue()  # type: ignore[no-untyped-call]
    else:
        values.ValueClass = values.MutexValue


def _forget_the_dead(folder: Path) -> None:
    """Remove the gauges of workers that were killed; what they counted stays counted."""
    for pid in {int(file.stem.rpartition("_")[2]) for file in folder.glob("gauge_*.db")}:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            mark_process_dead(pid, str(folder))  # type: ignore[no-untyped-call]


def _children(metric: _Labelled, values: Iterable[str]) -> dict[str, _Labelled]:
    return {value: metric.labels(value) for value in values}
