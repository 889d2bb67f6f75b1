"""Measures the service against an empty Litestar route on the same server, and says where a request's time goes.

    python -m benchmarks.serving [--repeats N] [--seconds S] [--users N | --redis] [--soak S]

The customers are those of the real 2024-01 if it lies beside the checkout, else of a simulated month; ``--users`` adds
so many more to the online store, ``--redis`` has it in a Redis that it starts. Each repeat measures every load in turn,
ours and the empty route's, so that a ratio compares what ran within the same seconds. Latencies are in milliseconds,
rates in requests per second, each as median, minimum and maximum over the repeats. JSON on standard output.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import psutil
import uvloop

from benchmarks.months import MONTH, REAL_MONTH, assembled, folder_of_a_month
from streamflow import pipeline, stack
from streamflow.contract import CONTRACT, USER_ID
from streamflow.embedded import postgres
from streamflow.scoring import Scorer
from streamflow.settings import PROJECT_ROOT, Settings

WARM_UP_S = 0.5
SLICE_S = 30.0
BATCH = 1000
MODEL_CALLS = 2_000
CLIENTS = (1, 8, 32, 128)
SERVICE = (sys.executable, "-m", "serving")


# --- the load -------------------------------------------------------------------------------------------------------


class Client(asyncio.Protocol):
    """One connection that sends its next request as soon as the answer to the last one is there."""

    HEAD = re.compile(rb"HTTP/1.1 (\d+).*?content-length: (\d+).*?\r\n\r\n", re.DOTALL | re.IGNORECASE)

    def __init__(self, next_request: Callable[[], bytes]) -> None:
        self._next_request = next_request
        self._transport: asyncio.Transport
        self._buffer = b""
        self._sent = 0.0
        self.stopped = False
        self.seconds: list[float] = []
        self.statuses: dict[int, int] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request."""
        self._transport = cast(asyncio.Transport, transport)
        self._send()

    def data_received(self, data: bytes) -> None:
        """Send the next request once the answer is whole."""
        self._buffer += data
        head = self.HEAD.match(self._buffer)
        if head is None or len(self._buffer) < head.end() + int(head[2]):
            return
        self.seconds.append(time.perf_counter() - self._sent)
        status = int(head[1])
        self.statuses[status] = self.statuses.get(status, 0) + 1
        self._buffer = b""
        if self.stopped:
            self._transport.close()
        else:
            self._send()

    def _send(self) -> None:
        self._sent = time.perf_counter()
        self._transport.write(self._next_request())


def load(
    port: int, clients: int, seconds: float, next_request: Callable[[], bytes], expected: Set[int] = frozenset({200})
) -> dict[str, float]:
    """Ask with so many clients at once for so long; raises RuntimeError for an answer of another status."""

    async def run() -> dict[str, float]:
        loop = asyncio.get_running_loop()
        made = [Client(next_request) for _ in range(clients)]
        for client in made:
            await loop.create_connection(lambda client=client: client, "127.0.0.1", port)
        await asyncio.sleep(WARM_UP_S)
        for client in made:
            client.seconds.clear()
        started = time.perf_counter()
        await asyncio.sleep(seconds)
        took = time.perf_counter() - started
        taken = [one for client in made for one in client.seconds]
        for client in made:
            client.stopped = True
        await asyncio.sleep(0.1)
        statuses = {status for client in made for status in client.statuses}
        if not statuses or statuses - expected:
            raise RuntimeError(f"answered with {statuses}")
        p50, p99 = np.quantile(taken, [0.5, 0.99]) * 1000
        return {"rate": len(taken) / took, "p50": float(p50), "p99": float(p99)}

    return uvloop.run(run())


def request(path: str, body: object) -> bytes:
    """The bytes of a POST."""
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    return head.encode() + b"\r\n\r\n" + content


# --- the two servers ------------------------------------------------------------------------------------------------


def serve_empty(port: int) -> None:
    """An empty Litestar POST route, by the server and settings that the service runs with."""
    import uvicorn
    from litestar import Litestar, post

    @post("/empty", status_code=200)
    async def empty() -> None:
        pass

    app = Litestar([empty], logging_config=None, openapi_config=None)
    uvicorn.run(
        app,
        port=port,
        loop="uvloop",
        http="httptools",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
    )


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def process(command: Sequence[str], port: int, environment: dict[str, str]) -> Iterator[psutil.Process]:
    """A server process that answers on its port."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | environment
    server = subprocess.Popen(
        command, env=environment, cwd=PROJECT_ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{command} does not answer") from None
                time.sleep(0.01)
        yield psutil.Process(server.pid)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """The address of an empty Redis."""
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
    with process(command, port, {}):
        yield f"redis://127.0.0.1:{port}/0"


# --- what is served -------------------------------------------------------------------------------------------------


def prepared(installed: pipeline.Platform) -> list[str]:
    """Bring a month through the pipeline to a Production version in the service's cache; returns the users."""
    now = datetime.now(UTC)
    pipeline.prepare(installed)
    with tempfile.TemporaryDirectory() as scratch:
        assembled(installed, folder_of_a_month(REAL_MONTH, Path(scratch)), MONTH, now)
    pipeline.train(installed, MONTH, now)
    version = pipeline.register(installed, MONTH, now).version
    if installed.ledger.production() != version.version:
        installed.ledger.promote(
            version.version,
            by="benchmark",
            reason="to be measured",
            now=now,
            policy=installed.policy,
            compare=lambda *_: None,  # type: ignore[arg-type, return-value]
            override=True,
        )
    cache = installed.settings.home / "cache" / "models"
    cache.mkdir(parents=True, exist_ok=True)
    (cache / version.artifact_sha256).write_bytes(installed.registry.scorer(version.run_id))
    return installed.landing.read(MONTH, CONTRACT.tables[0].name)[USER_ID].to_pylist()


def add_users(installed: pipeline.Platform, count: int) -> list[str]:
    """Put customers with the real ones' features into the online store, by the statement of one INSERT per view."""
    with installed.database.connect() as connection:
        for view in CONTRACT.views:
            names = ", ".join(column.name for column in view.columns)
            connection.execute(
                f"""
                WITH held AS (SELECT *, row_number() OVER () - 1 AS number FROM online.{view.name})
                INSERT INTO online.{view.name} (user_id, event_timestamp, created_timestamp, {names})
                SELECT lpad(made::text, 8, '0') || '-MADE', event_timestamp, created_timestamp, {names}
                FROM generate_series(1, {count}) AS made
                JOIN held ON held.number = made % (SELECT count(*) FROM held)
                """  # noqa: S608
            )
    with installed.database.connect() as connection:
        connection.execute("ANALYZE")
    return [f"{number:08d}-MADE" for number in range(1, count + 1)]


# --- measuring ------------------------------------------------------------------------------------------------------


def measured(ports: dict[str, int], users: Sequence[str], seconds: float) -> dict[str, Any]:
    """One repeat: every load in turn, ours beside the empty route's."""
    drawn = random.Random(1)  # noqa: S311
    empty = request("/empty", {})
    asked = [request("/predict", {USER_ID: user}) for user in drawn.sample(users, min(len(users), 20_000))]
    batch = request("/predict/batch", {"user_ids": drawn.sample(users, BATCH)})
    figures: dict[str, Any] = {}
    for clients in CLIENTS:
        figures[f"empty, {clients} clients"] = load(ports["empty"], clients, seconds, lambda: empty)
        figures[f"predict, {clients} clients"] = load(ports["ours"], clients, seconds, lambda: drawn.choice(asked))
    figures["batch of 1,000, 1 client"] = load(ports["ours"], 1, seconds, lambda: batch)
    ours, other = (lambda n: figures[f"predict, {n} clients"]), (lambda n: figures[f"empty, {n} clients"])
    figures["ratios"] = {
        "rate at 8 clients to the empty route's (aim >= 0.5)": ours(8)["rate"] / other(8)["rate"],
        "p50 at 1 client to the empty route's (aim <= 3)": ours(1)["p50"] / other(1)["p50"],
        "p99 at 8 clients to the empty route's (aim <= 5)": ours(8)["p99"] / other(8)["p99"],
        "rate at 32 clients to that at 8 (aim >= 0.9)": ours(32)["rate"] / ours(8)["rate"],
        "rate at 128 clients to that at 8 (aim >= 0.9)": ours(128)["rate"] / ours(8)["rate"],
    }
    return figures


def soaked(port: int, users: Sequence[str], seconds: float, server: psutil.Process) -> list[dict[str, float]]:
    """Mixed load for so long: predictions, some of strangers, batches and explanations; a row for each SLICE_S."""
    drawn = random.Random(2)  # noqa: S311
    asked = [request("/predict", {USER_ID: user}) for user in drawn.sample(users, 5_000)]
    strange = [request("/predict", {USER_ID: f"nobody-{number}"}) for number in range(100)]
    batches = [request("/predict/batch", {"user_ids": drawn.sample(users, 100)}) for _ in range(20)]
    explained = [request("/predict", {USER_ID: user, "explain": "shapley"}) for user in users[:100]]
    kinds, weights = (asked, strange, batches, explained), (95, 3, 1.8, 0.2)

    def next_request() -> bytes:
        (kind,) = drawn.choices(kinds, weights)
        return drawn.choice(kind)

    rows = []
    for number in range(round(seconds / SLICE_S)):
        figures = load(port, 8, SLICE_S, next_request, {200, 404})
        rows.append({"until, s": (number + 1) * SLICE_S, **figures, "MiB": server.memory_info().rss / 2**20})
    return rows


def started(settings: Settings, environment: dict[str, str]) -> dict[str, float]:
    """Seconds from the start of the process to its first good prediction, and its memory then in MiB."""
    begun = time.perf_counter()
    with process(SERVICE, settings.api_port, environment) as server:
        with httpx.Client(base_url=f"http://127.0.0.1:{settings.api_port}") as client:
            while client.post("/predict", json={USER_ID: environment["BENCHMARK_USER"]}).status_code != 200:
                time.sleep(0.01)
        return {"seconds": time.perf_counter() - begun, "MiB": server.memory_info().rss / 2**20}


def model_call(installed: pipeline.Platform, repeats: int) -> list[float]:
    """Microseconds that the model takes for one row, as the service calls it."""
    (artifact,) = (installed.settings.home / "cache" / "models").iterdir()
    scorer = Scorer.from_bytes(artifact.read_bytes())
    row = [list(scorer.golden_rows[0])]
    return [timeit.timeit(lambda: scorer.examine(row), number=MODEL_CALLS) / MODEL_CALLS * 1e6 for _ in range(repeats)]


def stage_means(metrics: str) -> dict[str, float]:
    """The mean milliseconds of each stage (one for all customers that were scored together) and of a whole request."""
    found: dict[str, float] = {}
    for name, label in (("stage_seconds", r'stage="(\w+)"'), ("request_seconds", r'route="(/predict)"')):
        totals, counts = (
            dict(re.findall(rf"^streamflow_{name}_{what}\{{{label}\}} (\S+)$", metrics, re.MULTILINE))
            for what in ("sum", "count")
        )
        found |= {key: round(1000 * float(totals[key]) / float(counts[key]), 4) for key in totals}
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {
        "median": round(statistics.median(values), 4),
        "minimum": round(min(values), 4),
        "maximum": round(max(values), 4),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    profile = parser.add_mutually_exclusive_group()
    profile.add_argument("--users", type=int, default=0)
    profile.add_argument("--redis", action="store_true")
    parser.add_argument("--soak", type=float, default=0.0, help="seconds of mixed load, in place of all else")
    parser.add_argument("--empty", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.empty:
        serve_empty(arguments.empty)
        return
    load_before = os.getloadavg()
    with ExitStack() as opened:
        home = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="streamflow-bench-")))
        settings = Settings(home=home, api_port=free_port())
        if arguments.redis:
            url = opened.enter_context(redis_server(home))
            settings = settings.model_copy(update={"online_store": "redis", "redis_url": url})
        database = opened.enter_context(postgres(settings))
        installed = pipeline.Platform(settings, database)
        users = prepared(installed)
        if arguments.users:
            users = add_users(installed, arguments.users)
        environment = {**stack.command("api", settings, database).environment, "BENCHMARK_USER": users[0]}
        starts = [started(settings, environment) for _ in range(arguments.repeats)]
        ports = {"empty": free_port(), "ours": settings.api_port}
        command = [sys.executable, "-m", "benchmarks.serving", "--empty", str(ports["empty"])]
        opened.enter_context(process(command, ports["empty"], {}))
        server = opened.enter_context(process(SERVICE, ports["ours"], environment))
        with httpx.Client(base_url=f"http://127.0.0.1:{ports['ours']}") as client:
            while client.get("/ready").status_code != 200:
                time.sleep(0.05)
        if arguments.soak:
            print(json.dumps(soaked(ports["ours"], users, arguments.soak, server), indent=2))
            return
        passes = [measured(ports, users, arguments.seconds) for _ in range(arguments.repeats)]
        with httpx.Client(base_url=f"http://127.0.0.1:{ports['ours']}") as client:
            stages = stage_means(client.get("/metrics").text)
        report = {
            "users": len(users),
            "online store": settings.online_store,
            "repeats": arguments.repeats,
            "seconds of each load": arguments.seconds,
            "machine": {
                "cores": os.cpu_count(),
                "python": platform.python_version(),
                "load average before": load_before,
                "load average after": os.getloadavg(),
            },
            "start to first prediction": {key: spread([one[key] for one in starts]) for key in starts[0]},
            "mean milliseconds of a stage, over all loads": stages,
            "MiB after all loads": round(server.memory_info().rss / 2**20, 1),
            "microseconds of the model call for one row": spread(model_call(installed, arguments.repeats)),
            **{
                part: {key: spread([one[part][key] for one in passes]) for key in passes[0][part]} for part in passes[0]
            },
        }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
