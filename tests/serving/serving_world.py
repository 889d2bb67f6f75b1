"""The service under test, with all that it depends on: PostgreSQL, a small MLflow over HTTP, compiled models."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, date, datetime
from functools import cached_property
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit
from uuid import uuid4

import httpx
import numpy as np
import pandas as pd
import psycopg
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from psycopg import sql
from psycopg.types.json import Jsonb

from serving.app import create_app
from serving.protocol import Protocol
from streamflow import features, online_redis
from streamflow.contract import CONTRACT, USER_ID, Column, Contract
from streamflow.database import Database
from streamflow.dataset import TrainingDataset
from streamflow.months import Month
from streamflow.scoring import compile_pipeline, sha256
from streamflow.settings import PROJECT_ROOT, Settings
from streamflow.training import ModelSpec, fit
from streamflow.training_config import TrainingConfig
from streamflow.warehouse import migrate

JANUARY = Month.parse("2024-01")
FEATURES = {
    "months_active": 1,
    "monthly_fee": 29.85,
    "paperless_billing": True,
    "plan_stream_tv": False,
    "plan_stream_movies": False,
    "net_service": "DSL",
    "watch_hours_30d": 0.1 + 0.2,
    "avg_session_mins_7d": 29.142857142857142,
    "unique_devices_30d": 2,
    "skips_7d": 4,
    "rebuffer_events_7d": 1,
    "failed_payments_90d": 0,
    "support_tickets_90d": 3,
    "ticket_avg_resolution_hrs_90d": 16.0,
}
"""What every customer has unless a test says otherwise: the features of churn_v1, and after them the others."""
FURTHER_FEATURES = {
    "contract_type": "Month-to-month",
    "total_paid": 29.85,
    "user_gender": "Female",
    "user_is_senior": False,
    "has_family": True,
    "has_dependents": False,
}
KNOWN = "7590-VHVEG"
CONFIG = TrainingConfig.load(PROJECT_ROOT / "training.toml")
BASELINE = ModelSpec("random_forest_baseline", CONTRACT.service("churn_v1"), calibrated=False, threshold=0.5)


def eventually(check: Callable[[], bool], *, within_s: float = 10.0) -> None:
    """Wait until the check holds; fail if it doesn't in time."""
    deadline = time.monotonic() + within_s
    while not check():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.05)


def simulated_values(column: Column, users: int, random: np.random.Generator) -> Any:
    match column.kind:
        case "category":
            return random.choice(column.categories, users)
        case "boolean":
            return random.random(users) < 0.5
        case "integer":
            return random.integers(0, 30, users)
        case _:
            return random.random(users) * 100


def with_a_new_feature() -> Contract:
    """The contract with one more column in one of the views."""
    column = Column(
        "coupons_used", "integer", "Coupons used.", unit="coupons", low=0, high=9, view="payments_agg_90d_fv"
    )
    tables = [
        replace(table, columns=(*table.columns, column)) if table.name == "payments_agg_90d" else table
        for table in CONTRACT.tables
    ]
    return replace(CONTRACT, tables=tuple(tables))


def train(seed: int, spec: ModelSpec = BASELINE, contract: Contract = CONTRACT) -> bytes:
    """The compiled form of a model of some random customers, on the service of the contract that ``spec`` names."""
    random = np.random.default_rng(seed)
    users = 120
    frame = pd.DataFrame({column.name: simulated_values(column, users, random) for column in contract.features})
    frame.insert(0, USER_ID, [f"user-{number:04d}" for number in range(users)])
    frame[CONTRACT.label] = random.random(users) < 0.4
    dataset = TrainingDataset(frame, JANUARY, CONTRACT.label, 0)
    spec = replace(spec, service=contract.service(spec.service.name))
    return compile_pipeline(fit(frame, CONTRACT.label, spec, CONFIG), dataset)


class Mlflow:
    """The two endpoints of an MLflow server that the service uses, over real HTTP."""

    def __init__(self, port: int = 0) -> None:
        self.files: dict[tuple[str, str], bytes] = {}
        self.status = 200
        world = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                url = urlsplit(self.path)
                given = {name: values[0] for name, values in parse_qs(url.query).items()}
                if url.path == "/health":
                    body, status = b"OK", world.status
                else:
                    file = world.files.get((given["run_uuid"], given["path"]))
                    body, status = file or b"", world.status if file else 404
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.uri = f"http://127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Platform:
    """What the rest of the platform does to the database: publish features, register, promote."""

    def __init__(self, database: Database, mlflow: Mlflow, redis_url: str | None = None) -> None:
        self.database = database
        self.mlflow = mlflow
        self.redis_url = redis_url

    @cached_property
    def feast(self) -> Any:
        return features.feature_store(self.database, self.redis_url)

    def settings(self, home: Path) -> Settings:
        """What the service is told: the platform's role, and no other."""
        given = Settings(home=home, database_url=self.database.url, mlflow_uri=self.mlflow.uri)
        redis = {"online_store": "redis", "redis_url": self.redis_url} if self.redis_url else {}
        return given.model_copy(update=redis)

    def execute(self, query: Any, *parameters: object, owner: bool = False) -> None:
        with self.database.connect(owner=owner) as connection:
            connection.execute(query, parameters)

    def publish(self, user_id: str = KNOWN, *, as_of: date = JANUARY.as_of, views: Any = None, **changes: Any) -> None:
        values = {**FEATURES, **FURTHER_FEATURES, **changes}
        for view in CONTRACT.views:
            if views is not None and view.name not in views:
                continue
            moment = datetime(as_of.year, as_of.month, as_of.day, tzinfo=UTC)
            if self.redis_url:
                row = (user_id, moment, *(values[column.name] for column in view.columns))
                online_redis.write(self.feast, view.name, [row])
                online_redis.mark(self.feast, view.name)
                continue
            names = [USER_ID, "event_timestamp", *(column.name for column in view.columns)]
            row = (user_id, moment, *(values[column.name] for column in view.columns))
            table, columns = sql.Identifier("online", view.name), sql.SQL(", ").join(map(sql.Identifier, names))
            self.execute(sql.SQL("DELETE FROM {} WHERE user_id = %s").format(table), user_id)
            marks = sql.SQL(", ").join(sql.SQL("%s") for _ in names)
            self.execute(sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(table, columns, marks), *row)

    def register(self, version: int, artifact: bytes, **changes: Any) -> None:
        record = {
            "version": version,
            "run_id": f"run-{version}",
            "as_of": JANUARY.as_of,
            "service": "churn_v1",
            "threshold": 0.5,
            "artifact_path": "scorer.bin",
            "artifact_sha256": sha256(artifact),
            "dataset_digest": "d",
            "predictions_digest": "p",
            "evidence": Jsonb({}),
            "lineage": Jsonb({}),
            "registered_at": datetime(2024, 2, 1, tzinfo=UTC),
        } | changes
        self.mlflow.files[f"run-{version}", "scorer.bin"] = artifact
        names = sql.SQL(", ").join(map(sql.Identifier, record))
        marks = sql.SQL(", ").join(sql.SQL("%s") for _ in record)
        query = sql.SQL("INSERT INTO streamflow.model_versions ({}) VALUES ({})").format(names, marks)
        self.execute(query, *record.values())

    def decide(self, action: str, version: int, threshold: float | None = None) -> None:
        query = """
            INSERT INTO streamflow.promotion_ledger
                (at, action, version, previous, by, reason, policy, override, gates, threshold, evidence)
            VALUES (%s, %s, %s, NULL, 'ada', 'a test', 'manual', false, '[]', %s, %s)
        """
        evidence = None if threshold is None else Jsonb({})
        self.execute(query, datetime(2024, 2, 2, tzinfo=UTC), action, version, threshold, evidence)

    def promote(self, version: int, artifact: bytes, **changes: Any) -> None:
        self.register(version, artifact, **changes)
        self.decide("promote", version)


def make_tables(database: Database) -> None:
    """All that is in a database before there are months: the migrations' tables and Feast's."""
    migrate(database)
    features.apply(features.feature_store(database))


def copied(template: Database, server: Database) -> Database:
    """A new database on the server with what the template has, and the same rights."""
    name = f"serving_{uuid4().hex[:12]}"
    statements = (
        "CREATE DATABASE {name} TEMPLATE {template}",
        "REVOKE ALL ON DATABASE {name} FROM PUBLIC",
        "GRANT CONNECT, CREATE, TEMPORARY ON DATABASE {name} TO {platform}",
    )
    names = {"name": name, "template": _part(template.url, "dbname"), "platform": _part(template.url, "user")}
    with psycopg.connect(server.owner_url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(sql.SQL(statement).format(**{key: sql.Identifier(of) for key, of in names.items()}))
    urls = (urlsplit(url)._replace(path=f"/{quote(name)}").geturl() for url in (template.url, template.owner_url))
    return Database(*urls)


def disconnect(database: Database, server: Database) -> None:
    """End every connection that the platform's role has to the database."""
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND usename = current_user",
            (_part(database.url, "dbname"),),
        )


def accept_connections(database: Database, server: Database, *, accept: bool) -> None:
    """Let the database come back, or go away, for everybody."""
    name = sql.Identifier(_part(database.url, "dbname"))
    with psycopg.connect(server.owner_url, autocommit=True) as connection:
        connection.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}").format(name, accept))
    if not accept:
        disconnect(database, server)


def _part(url: str, name: str) -> str:
    return str(psycopg.conninfo.conninfo_to_dict(url)[name])


NOW = datetime(2024, 3, 1, 12, 30, tzinfo=UTC)


@contextmanager
def running(settings: Settings, clock: Callable[[], datetime] = lambda: NOW) -> Iterator[httpx.Client]:
    """The service on a free port, in a thread."""
    app = create_app(settings, clock=clock)
    options: dict[str, Any] = {"http": Protocol, "ws": "none", "log_config": None, "access_log": False}
    server = uvicorn.Server(uvicorn.Config(app, port=0, server_header=False, **options))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        eventually(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(10)


class HalfRequest:
    """A prediction asked for whose body has not ended: in flight until it is finished."""

    def __init__(self, port: int, headers: Mapping[str, str] | None = None, user_id: str = KNOWN) -> None:
        body = json.dumps({"user_id": user_id}).encode()
        self._rest = body[5:]
        self.connection = HTTPConnection("127.0.0.1", port, timeout=30)
        self.connection.putrequest("POST", "/predict")
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **(headers or {})}.items():
            self.connection.putheader(name, str(value))
        self.connection.endheaders()
        self.connection.send(body[:5])

    def finish(self) -> int:
        """Send the rest; returns the status of the answer."""
        self.connection.send(self._rest)
        answer = self.connection.getresponse()
        answer.read()
        self.connection.close()
        return answer.status


Metrics = dict[tuple[str, frozenset[tuple[str, str]]], float]


def metrics_of(api: httpx.Client) -> Metrics:
    """The service's metrics: each value by its name and labels."""
    answer = api.get("/metrics")
    assert answer.status_code == 200, answer.text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def metric(metrics: Metrics, name: str, **labels: str) -> float:
    """One value; KeyError if there is none."""
    return metrics[f"streamflow_{name}", frozenset(labels.items())]


def predict(api: httpx.Client, user_id: str = KNOWN) -> httpx.Response:
    return api.post("/predict", json={"user_id": user_id})


def problem(answer: httpx.Response, status: int, name: str) -> dict[str, Any]:
    """The problem details of an answer, which must be complete."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    details: dict[str, Any] = answer.json()
    assert details["type"] == f"urn:streamflow:problem:{name}"
    assert details["status"] == status
    assert details["title"]
    assert details["detail"]
    assert details["request_id"] == answer.headers["x-request-id"]
    assert details["instance"] == f"urn:uuid:{details['request_id']}"
    return details
