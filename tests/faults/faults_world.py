"""A platform whose parts can be taken away, a load on the service, and what every answer to it must be."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import httpx
import msgspec
import psutil
from governed import evidence
from psycopg.types.json import Jsonb
from serving_world import FEATURES, FURTHER_FEATURES, JANUARY, Platform, eventually, metrics_of, problem

from streamflow import pipeline, predictions
from streamflow.database import Database
from streamflow.embedded import _Server
from streamflow.scoring import Scorer
from streamflow.settings import PROJECT_ROOT, Settings

CLIENTS = 6
PAUSE_S = 0.01
"""Between an answer and the next request of a client."""
PATIENCE_S = 10.0
"""How long a client waits for an answer; longer than anything may take."""
RETURN_S = 10.0
AWAY = "feature-store-unavailable"
"""How long the service may take to be good again."""
PROBLEMS = {
    "feature-store-unavailable": (503, "2"),
    "prediction-log-full": (503, "2"),
    "no-model": (503, "5"),
    "incomplete-features": (422, None),
}
"""The status of what may be answered for a known customer in place of features or a prediction, and its Retry-After."""
PREDICT, BATCH, FEATURES_OF = "/predict", "/predict/batch", "/features/"
TURNS = (BATCH, PREDICT, FEATURES_OF, PREDICT, PREDICT)
"""What a client asks for in turn; as many as have no divisor in common with the number of users."""
BATCH_USERS = 4
WORKERS_ASKED = 12
"""Connections that are tried for an answer of each of several workers."""


# --- PostgreSQL -------------------------------------------------------------------------------------------------------


class PostgresServer:
    """The embedded server of a folder, which comes back on the same port as your own does."""

    def __init__(self, home: Path, database: Database) -> None:
        self.database = database
        self._server = _Server(home.resolve())
        self._port = self._server._running()[3]

    @contextmanager
    def stopped(self) -> Iterator[None]:
        self._server._stop()
        try:
            yield
        finally:
            start = ["pg_ctl", "start", "--silent", "--wait", f"--pgdata={self._server.data}"]
            self._server._run_or_refuse(self._server.data, [*start, f"--options=-p {self._port}"])

    @contextmanager
    def frozen(self) -> Iterator[None]:
        postmaster = psutil.Process(int(self._server._running()[0]))
        postmaster.suspend()
        processes = [postmaster, *postmaster.children(recursive=True)]
        try:
            for process in processes[1:]:
                process.suspend()
            yield
        finally:
            for process in processes:
                process.resume()


# --- the load ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What came of one request; ``response`` is None and ``error`` says why where nothing came."""

    route: str
    user_ids: list[str]
    sent: float
    received: float
    response: httpx.Response | None
    error: str = ""

    @property
    def status(self) -> int | None:
        return None if self.response is None else self.response.status_code

    @cached_property
    def body(self) -> dict[str, Any]:
        assert self.response is not None
        content: dict[str, Any] = self.response.json()
        return content

    @cached_property
    def outcomes(self) -> list[dict[str, Any]]:
        """What it says of each user: a prediction, features or a problem."""
        return list(self.body["results"]) if self.route == BATCH and self.status == 200 else [self.body]

    @property
    def predictions(self) -> list[dict[str, Any]]:
        return [outcome for outcome in self.outcomes if "probability" in outcome] if self.response else []


class Load:
    """Clients that ask for predictions, batches and features of the users in turn while the context is open.

    Each asks ``pause_s`` after it is answered, on the same connection or, with ``reconnect``, on another one, which any
    worker may take. All of them send ``name`` as their request id, by which the prediction
    log tells what they caused.
    """

    def __init__(
        self, port: int, users: Mapping[str, object], pause_s: float = PAUSE_S, *, reconnect: bool = False
    ) -> None:
        self.name = f"load-{uuid4()}"
        self.answers: list[Answer] = []
        self._url = f"http://127.0.0.1:{port}"
        self._users = list(users)
        self._pause_s = pause_s
        self._headers = {"X-Request-ID": self.name, **({"Connection": "close"} if reconnect else {})}
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(2 * len(TURNS) * number,)) for number in range(CLIENTS)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        with httpx.Client(base_url=self._url, timeout=PATIENCE_S, headers=self._headers, trust_env=False) as client:
            while not self._stop.wait(self._pause_s):
                number += 1
                route, sent = TURNS[number % len(TURNS)], time.monotonic()
                asked = [self._users[(number + n) % len(self._users)] for n in range(BATCH_USERS)]
                asked = asked if route == BATCH else asked[:1]
                try:
                    response, error = _sent(client, route, asked), ""
                except httpx.TransportError as failure:
                    response, error = None, repr(failure)
                self.answers.append(Answer(route, asked, sent, time.monotonic(), response, error))

    def between(self, start: float, end: float = float("inf")) -> list[Answer]:
        """The answers to what was asked after the start and answered before the end."""
        return [one for one in self.answers if start < one.sent and one.received < end]

    def goes_on(self, status: int | None = 200, *, count: int = 30, within_s: float = RETURN_S) -> None:
        """Wait until that many requests that are sent from now on have come to this."""
        start = time.monotonic()
        eventually(lambda: sum(one.status == status for one in self.between(start)) >= count, within_s=within_s)

    @property
    def predictions(self) -> list[dict[str, Any]]:
        return [prediction for one in self.answers for prediction in one.predictions]


def _sent(client: httpx.Client, route: str, user_ids: list[str]) -> httpx.Response:
    (first, *_) = user_ids
    match route:
        case "/predict":
            return client.post(route, json={"user_id": first})
        case "/predict/batch":
            return client.post(route, json={"user_ids": user_ids})
        case _:
            return client.get(f"{route}{first}")


# --- the platform -----------------------------------------------------------------------------------------------------


@dataclass
class World:
    """A platform, its customers' features, and the models that were registered with their thresholds."""

    platform: Platform
    users: dict[str, dict[str, Any]] = field(default_factory=dict)
    models: dict[int, tuple[Scorer, float]] = field(default_factory=dict)

    @property
    def database(self) -> Database:
        return self.platform.database

    def add_user(self, user_id: str, **changes: Any) -> None:
        self.users[user_id] = {**FEATURES, **FURTHER_FEATURES, **changes}
        self.platform.publish(user_id, **changes)

    def register(self, version: int, artifact: bytes, threshold: float) -> None:
        self.models[version] = (Scorer.from_bytes(artifact), threshold)
        about = Jsonb(msgspec.to_builtins(evidence()))
        self.platform.register(version, artifact, threshold=threshold, evidence=about)

    def expected(self, user_id: str, version: int) -> dict[str, Any]:
        """What a prediction must say."""
        scorer, threshold = self.models[version]
        features = {feature.name: self.users[user_id][feature.name] for feature in scorer.features}
        (probability,) = scorer.score([list(features.values())]).tolist()
        return {
            "user_id": user_id,
            "prediction": int(probability >= threshold),
            "probability": probability,
            "threshold": threshold,
            "model_version": version,
            "run_id": f"run-{version}",
            "features_used": features,
        }

    def logged(self, load: Load) -> dict[str, tuple[object, ...]]:
        """What the prediction log has of a load by request id; fails if it has anything twice."""
        query = """
            SELECT request_id::text, user_id, probability, threshold, model_version, answered_at
            FROM streamflow.predictions WHERE caller_request_id = %s
        """
        with self.database.connect() as connection:
            rows = connection.execute(query, (load.name,)).fetchall()
        found = {request_id: tuple(rest) for request_id, *rest in rows}
        assert len(found) == len(rows), "a prediction is logged twice"
        return found

    def check_answers(self, load: Load, *problems: str) -> None:
        """Every answer is right, or one of these problems; all routes were asked with success."""
        assert {one.route for one in load.answers if one.status == 200} == set(TURNS)
        self.check(load.answers, *problems)

    def check(self, answers: list[Answer], *problems: str) -> None:
        for one in answers:
            assert one.response is not None, one.error
            if one.status != 200:
                name = one.body["type"].rpartition(":")[2]
                assert name in problems, name
                status, retry_after = PROBLEMS[name]
                problem(one.response, status, name)
                assert one.response.headers.get("retry-after") == retry_after
            elif one.route == FEATURES_OF:
                features = self.expected(*one.user_ids, 1)["features_used"]
                found = {"user_id": one.user_ids[0], "as_of": str(JANUARY.as_of), "features": features}
                assert one.body == found
            else:
                self._check_outcomes(one, problems)

    def _check_outcomes(self, answer: Answer, problems: tuple[str, ...]) -> None:
        for user_id, outcome in zip(answer.user_ids, answer.outcomes, strict=True):
            if "probability" not in outcome:
                assert outcome["type"].rpartition(":")[2] in problems, outcome
                continue
            expected = self.expected(user_id, outcome["model_version"])
            assert {name: outcome[name] for name in expected} == expected, (outcome, expected)
        assert len({one["model_version"] for one in answer.predictions}) <= 1, "versions are mixed"
        if answer.route == PREDICT:
            assert answer.response
            assert answer.body["request_id"] == answer.response.headers["x-request-id"]

    def check_log(self, load: Load) -> None:
        """Every prediction that was answered gets into the log, once and as answered, and nothing else does."""
        answers = load.predictions
        eventually(lambda: len(self.logged(load)) >= len(answers))
        logged = {request_id: row[:-1] for request_id, row in self.logged(load).items()}
        columns = ("user_id", "probability", "threshold", "model_version")
        answered = {body["request_id"]: tuple(body[name] for name in columns) for body in answers}
        assert len(answered) == len(answers), "a request id was given twice"
        assert logged == answered, f"not logged, or not answered: {logged.items() ^ answered.items()}"

    def check_replay(self) -> None:
        """All that is logged, also before, comes out the same to the last bit, as for `streamflow replay --all`."""
        installed = pipeline.Platform(self.platform.settings(Path("nowhere")), self.database)
        vars(installed)["registry"] = self
        summary = predictions.summarize(predictions.replay_all(installed))
        assert summary.count > 0
        assert summary.identical == summary.count, summary.named

    def scorer(self, run_id: str) -> bytes:
        """As `Registry.scorer`."""
        return self.platform.mlflow.files[run_id, "scorer.bin"]


# --- the service ------------------------------------------------------------------------------------------------------


class Service:
    """The service as its own process; ``events`` are what it has logged."""

    def __init__(self, process: subprocess.Popen[bytes], settings: Settings, log: Path) -> None:
        self.process = process
        self.port = settings.api_port
        self._workers = settings.workers
        self._asked = WORKERS_ASKED if settings.workers > 1 else 1
        self._log = log
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=PATIENCE_S, trust_env=False)

    def readiness(self) -> tuple[int, str]:
        """The status of ``/ready`` and what the answer says; 0 where nobody answers."""
        try:
            answer = self.client.get("/ready", headers={"Connection": "close"})  # the next may be another worker's
        except httpx.TransportError as failure:
            return 0, repr(failure)
        if answer.status_code == 503:
            assert answer.headers["retry-after"] == "2"
            problem(answer, 503, "not-ready")
        return answer.status_code, answer.text

    def becomes(self, status: int, says: str = "", within_s: float = RETURN_S) -> None:
        """Wait until ``/ready`` answers with this status and, if given, state; by each worker as far as one can see."""
        eventually(lambda: all(self._is(status, says) for _ in range(self._asked)), within_s=within_s)

    def _is(self, status: int, says: str) -> bool:
        found, answer = self.readiness()
        return found == status and (not says or json.loads(answer)["status"] == says)

    def by_worker(self, path: str) -> dict[int, httpx.Response]:
        """What each worker answers, by its pid: connections are opened, and kept, until each has taken one."""
        answers: dict[int, httpx.Response] = {}
        with ExitStack() as connections:

            def each_has_answered() -> bool:
                url = f"http://127.0.0.1:{self.port}"
                client = connections.enter_context(httpx.Client(base_url=url, timeout=PATIENCE_S, trust_env=False))
                answer = client.get(path)
                _, port = answer.extensions["network_stream"].get_extra_info("client_addr")
                answers[self._worker_of(port)] = answer
                return len(answers) == self._workers

            eventually(each_has_answered)
        return answers

    def _worker_of(self, client_port: int) -> int:
        """The pid of the worker at the other end of a connection."""
        (pid,) = (
            worker.pid
            for worker in psutil.Process(self.process.pid).children(recursive=True)
            for connection in worker.net_connections("tcp")
            if connection.raddr and connection.raddr.port == client_port and connection.laddr.port == self.port
        )
        return pid

    def total(self, name: str) -> float:
        """A metric, of all workers together."""
        return sum(value for (full, _), value in metrics_of(self.client).items() if full == f"streamflow_{name}")

    def kill(self) -> None:
        """SIGKILL, for all of its processes at once."""
        processes = [*psutil.Process(self.process.pid).children(recursive=True), self.process]
        for process in processes:
            process.kill()
        self.process.wait()

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._log.read_text().splitlines()]

    @property
    def defects(self) -> list[dict[str, Any]]:
        """What it logged as errors, but for versions that it refuses."""
        errors = [event for event in self.events if event["level"] in ("error", "critical")]
        return [event for event in errors if event["event"] != "model_refused"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def started(settings: Settings, patch: str | None = None) -> Iterator[Service]:
    """``python -m serving``, ready; with a patch the same after that statement.

    Unless the test has ended it, it must stop on SIGTERM with 0. It must log no error.
    """
    command = ["-m", "serving"]
    if patch is not None:
        command = ["-c", f"{patch}\nfrom serving.__main__ import main\nraise SystemExit(main())"]
    environment = {**os.environ, **settings.environment()}
    log = settings.home / f"serving-{uuid4()}.log"
    with (
        log.open("wb") as stderr,
        subprocess.Popen([sys.executable, *command], env=environment, cwd=PROJECT_ROOT, stderr=stderr) as process,
    ):
        service = Service(process, settings, log)
        try:
            service.becomes(200, within_s=60)
            yield service
            if process.poll() is None:
                process.terminate()
                assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()
            service.client.close()
    assert service.defects == [], service.defects


def check_outage(world: World, service: Service, outage: AbstractContextManager[Any]) -> None:
    """With a load running, the feature store is away for the length of ``outage``: 503, then good again in time."""
    with Load(service.port, world.users) as load:
        load.goes_on()
        with outage:
            away = time.monotonic()
            service.becomes(503)
            assert '"feature_store"' in service.readiness()[1]
            load.goes_on(503, count=12)
            returns = time.monotonic()
        returned = time.monotonic()
        service.becomes(200)
        load.goes_on()
    assert {one.status for one in load.between(away, returns)} == {503}
    assert min(one.received for one in load.between(returned) if one.status == 200) < returned + RETURN_S
    world.check_answers(load, AWAY)
    world.check_log(load)
