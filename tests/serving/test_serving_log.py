"""The prediction log under faults: every answered prediction is a row, once, whatever becomes of PostgreSQL."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import msgspec
import pytest
from serving_world import FEATURES, KNOWN, Platform, accept_connections, eventually, predict, problem, running
from test_serving_database import Proxy

from serving import prediction_log, spill
from serving.prediction_log import PredictionLog, PredictionLogFull
from streamflow.database import Database
from streamflow.predictions import LoggedPrediction, logged_predictions
from streamflow.scoring import sha256
from streamflow.settings import PROJECT_ROOT, Settings

MARCH = datetime(2024, 3, 1, 12, 30, tzinfo=UTC)


def prediction(number: int = 0, **changes: Any) -> LoggedPrediction:
    facts = {
        "request_id": str(uuid4()),
        "answered_at": MARCH + timedelta(seconds=number),
        "caller_request_id": None,
        "user_id": f"user-{number}",
        "features_as_of": date(2024, 1, 31),
        "features": FEATURES,
        "probability": 0.1 + 0.2,
        "threshold": 0.5,
        "decision": False,
        "model_version": 1,
        "run_id": "run-1",
        "artifact_sha256": "a" * 64,
    }
    return LoggedPrediction(**{**facts, **changes})


def in_database(database: Database) -> list[LoggedPrediction]:
    return [one for chunk in logged_predictions(database) for one in chunk]


def ids(predictions: list[LoggedPrediction]) -> list[str]:
    return sorted(one.request_id for one in predictions)


async def until(check: Callable[[], bool]) -> None:
    await asyncio.to_thread(eventually, check)


@pytest.fixture
def database(platform: Platform) -> Database:
    return platform.database


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "spilled"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction_log, "RETRY_S", 0.1)
    monkeypatch.setattr(prediction_log, "WRITE_S", 1.0)
    monkeypatch.setattr(spill, "ADOPT_S", 0.1)


def events(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        f"{record.getMessage()} {record.fields.get('part', '')}".strip()  # type: ignore[attr-defined]
        for record in caplog.records
        if record.name == "streamflow.serving" and "predict" in record.getMessage()
    ]


# --- what is answered -------------------------------------------------------------------------------------------------


def test_an_answer_is_a_row(api: httpx.Client, database: Database, artifacts: tuple[bytes, bytes]) -> None:
    answer = api.post("/predict", json={"user_id": KNOWN}, headers={"X-Request-ID": "the-callers.1"}).json()
    eventually(lambda: len(in_database(database)) == 1)
    assert in_database(database) == [
        LoggedPrediction(
            request_id=answer["request_id"],
            answered_at=datetime.fromisoformat(answer["timestamp"]),
            caller_request_id="the-callers.1",
            user_id=KNOWN,
            features_as_of=date.fromisoformat(answer["features_as_of"]),
            features=FEATURES,
            probability=answer["probability"],
            threshold=answer["threshold"],
            decision=bool(answer["prediction"]),
            model_version=1,
            run_id="run-1",
            artifact_sha256=sha256(artifacts[0]),
        )
    ]


def test_only_what_is_answered_is_a_row(api: httpx.Client, database: Database, platform: Platform) -> None:
    platform.publish("other", skips_7d=None)
    asked = [KNOWN, "nobody", "other", KNOWN]
    results = api.post("/predict/batch", json={"user_ids": asked}, headers={"X-Request-ID": "bad id"}).json()["results"]
    assert predict(api, "nobody").status_code == 404
    answered = [one["request_id"] for one in results if "probability" in one]
    assert len(answered) == 2
    last = predict(api).json()["request_id"]
    eventually(lambda: len(in_database(database)) == 3)
    assert ids(in_database(database)) == sorted([*answered, last])
    assert {one.caller_request_id for one in in_database(database)} == {None}


def test_a_stop_writes_what_is_in_memory(
    platform: Platform,
    settings: Settings,
    artifacts: tuple[bytes, bytes],
    monkeypatch: pytest.MonkeyPatch,
    serve: Callable[[Settings], httpx.Client],
) -> None:
    monkeypatch.setattr(prediction_log, "FLUSH_S", 60.0)
    platform.promote(1, artifacts[0])
    with running(settings) as api:
        eventually(lambda: api.get("/ready").status_code == 200)
        answered = [predict(api).json()["request_id"] for _ in range(3)]
        assert in_database(platform.database) == []
    assert ids(in_database(platform.database)) == sorted(answered)


def test_a_log_that_is_full_answers_503_instead(
    api: httpx.Client,
    settings: Settings,
    platform: Platform,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PostgreSQL refuses to take rows and the spill folder cannot be made: four are taken, the fifth is refused."""
    monkeypatch.setattr(prediction_log, "QUEUE_ROWS", 4)
    platform.execute("REVOKE INSERT ON streamflow.predictions FROM streamflow", owner=True)
    (settings.home / "cache" / "predictions").write_text("in the way")
    answered = [predict(api).json()["request_id"] for _ in range(3)]
    two = api.post("/predict/batch", json={"user_ids": [KNOWN, KNOWN]})
    details = problem(two, 503, "prediction-log-full")
    assert two.headers["retry-after"] == "2"
    assert "none is answered unlogged" in details["detail"]
    answered.append(predict(api).json()["request_id"])
    problem(predict(api), 503, "prediction-log-full")
    assert api.get(f"/features/{KNOWN}").status_code == 200

    platform.execute("GRANT INSERT ON streamflow.predictions TO streamflow", owner=True)
    eventually(lambda: predict(api).status_code == 200)
    eventually(lambda: len(in_database(platform.database)) == 5)
    assert set(answered) < set(ids(in_database(platform.database)))


# --- the database away ------------------------------------------------------------------------------------------------


def test_every_month_gets_its_partition(database: Database, folder: Path) -> None:
    rows = [prediction(answered_at=MARCH.replace(month=month)) for month in (1, 12, 2, 1)]

    async def log() -> None:
        async with PredictionLog(database.url, folder) as predictions:
            predictions.record(rows[0])
            await until(lambda: predictions.written == 1)
            predictions.record(*rows[1:])

    asyncio.run(log())
    assert ids(in_database(database)) == ids(rows)
    with database.connect() as connection:
        found = connection.execute("SELECT DISTINCT tableoid::regclass::text FROM predictions ORDER BY 1").fetchall()
    assert found == [("predictions_2024_01",), ("predictions_2024_02",), ("predictions_2024_12",)]


def test_a_database_that_goes_away_under_load_has_every_row_once(
    database: Database, server: Database, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "streamflow.serving")
    rows: list[LoggedPrediction] = []

    async def load(predictions: PredictionLog, stop: asyncio.Event) -> None:
        while not stop.is_set():
            some = [prediction(number) for number in range(50)]
            rows.extend(some)
            predictions.record(*some)
            await asyncio.sleep(0.01)

    async def log() -> None:
        stop = asyncio.Event()
        async with PredictionLog(database.url, folder) as predictions:
            loading = asyncio.create_task(load(predictions, stop))
            await until(lambda: predictions.written > 0)
            await asyncio.to_thread(accept_connections, database, server, accept=False)
            await until(lambda: predictions.spilled_rows > 200)
            assert predictions.spilled_bytes > 200 * 500
            assert predictions.last_error is not None
            assert predictions.last_error.startswith("database: ")
            await asyncio.to_thread(accept_connections, database, server, accept=True)
            await until(lambda: predictions.spilled_rows == 0)
            stop.set()
            await loading
            await until(lambda: predictions.written == len(rows))
            assert (predictions.backlog, predictions.spilled_bytes, predictions.last_error) == (0, 0, None)

    asyncio.run(log())
    assert ids(in_database(database)) == ids(rows)
    assert list(folder.iterdir()) == []
    assert events(caplog) == ["prediction_log_failing database", "prediction_log_recovered database"]


def test_a_database_that_falls_silent_costs_no_row(database: Database, folder: Path) -> None:
    rows = [prediction(number) for number in range(30)]

    async def log() -> None:
        with closing(Proxy(database.url)) as proxy:
            async with PredictionLog(proxy.url, folder) as predictions:
                predictions.record(*rows[:10])
                await until(lambda: predictions.written == 10)
                proxy.silence()
                predictions.record(*rows[10:20])
                await until(lambda: predictions.spilled_rows == 10)
                await until(lambda: predictions.last_error is not None)
                predictions.record(*rows[20:])
                await until(lambda: predictions.spilled_rows == 20)
                assert predictions.backlog == 0
                proxy.talk()
                await until(lambda: predictions.written == 30)

    asyncio.run(log())
    assert ids(in_database(database)) == ids(rows)


def test_a_slow_batch_is_on_the_disk_meanwhile_and_counts_once(database: Database, folder: Path) -> None:
    rows = [prediction(number) for number in range(5)]

    async def log() -> None:
        async with PredictionLog(database.url, folder) as predictions:
            with database.connect(owner=True) as busy:
                busy.execute("LOCK TABLE predictions IN ACCESS EXCLUSIVE MODE")
                predictions.record(*rows)
                await until(lambda: predictions.spilled_rows == 5)
                assert predictions.backlog == 0
            await until(lambda: predictions.spilled_rows == 0)
            assert predictions.written == 5

    asyncio.run(log())
    assert ids(in_database(database)) == ids(rows)


# --- stop and kill ----------------------------------------------------------------------------------------------------


def test_a_stop_without_a_database_leaves_all_in_the_spill_file_for_the_next(
    database: Database, server: Database, folder: Path
) -> None:
    rows = [prediction(number) for number in range(5_000)]
    accept_connections(database, server, accept=False)

    async def log(*given: LoggedPrediction) -> None:
        async with PredictionLog(database.url, folder) as predictions:
            predictions.record(*given)

    asyncio.run(log(*rows[:4_000]))
    asyncio.run(log(*rows[4_000:]))
    files = list(folder.iterdir())
    assert len(files) == 2
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    assert folder.stat().st_mode & 0o777 == 0o700
    accept_connections(database, server, accept=True)

    async def take_up() -> None:
        async with PredictionLog(database.url, folder) as predictions:
            await until(lambda: predictions.written == 5_000)

    asyncio.run(take_up())
    assert ids(in_database(database)) == ids(rows)
    assert list(folder.iterdir()) == []


LOG_UNTIL_KILLED = """
import asyncio, sys
from pathlib import Path
import msgspec
from serving.prediction_log import PredictionLog
from streamflow.predictions import LoggedPrediction

async def main(url, folder):
    async with PredictionLog(url, Path(folder)) as predictions:
        rows = msgspec.json.decode(sys.stdin.buffer.read(), type=list[LoggedPrediction])
        predictions.record(*rows)
        while predictions.backlog or not predictions.spilled_rows:
            await asyncio.sleep(0.01)
        print("spilled", flush=True)
        await asyncio.sleep(60)

asyncio.run(main(*sys.argv[1:]))
"""


def killed_while_spilling(database: Database, folder: Path, rows: list[LoggedPrediction]) -> None:
    command = [sys.executable, "-c", LOG_UNTIL_KILLED, database.url, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=PROJECT_ROOT) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(msgspec.json.encode(rows))
        process.stdin.close()
        assert process.stdout.readline() == b"spilled\n"
        with pytest.raises(BlockingIOError):
            spill._File(next(folder.iterdir()))
        process.send_signal(signal.SIGKILL)


def test_what_a_killed_process_spilled_is_taken_up_by_the_next(
    database: Database, server: Database, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "streamflow.serving")
    rows = [prediction(number) for number in range(100)]
    accept_connections(database, server, accept=False)
    killed_while_spilling(database, folder, rows)
    (file,) = folder.iterdir()
    whole = msgspec.json.encode(prediction())
    half = whole[: len(whole) // 2]
    file.write_bytes(file.read_bytes() + b'{"not": "ours"}\n' + half)
    accept_connections(database, server, accept=True)

    async def take_up() -> None:
        async with PredictionLog(database.url, folder) as one, PredictionLog(database.url, folder) as other:
            await until(lambda: one.written + other.written == 100)
            await until(lambda: not file.exists())
            assert 0 in (one.written, other.written)

    asyncio.run(take_up())
    assert ids(in_database(database)) == ids(rows)
    (aside,) = folder.iterdir()
    assert aside.name == f"{file.name}.unreadable"
    assert aside.read_bytes() == b'{"not": "ours"}\n' + half + b"\n"
    assert events(caplog) == ["spilled_predictions_taken_up", "spilled_predictions_unreadable"]
    (told,) = [record.fields for record in caplog.records if record.getMessage() == "spilled_predictions_unreadable"]  # type: ignore[attr-defined]
    assert (told["lines"], told["kept_in"]) == (2, aside)


# --- the disk ---------------------------------------------------------------------------------------------------------


def test_with_neither_database_nor_disk_the_queue_is_the_limit(
    database: Database,
    server: Database,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "streamflow.serving")
    monkeypatch.setattr(prediction_log, "QUEUE_ROWS", 10)
    monkeypatch.setattr(prediction_log, "FLUSH_S", 0.02)
    folder.write_text("in the way")
    accept_connections(database, server, accept=False)
    rows = [prediction(number) for number in range(10)]

    async def log() -> None:
        async with PredictionLog(database.url, folder) as predictions:
            predictions.record(*rows[:9])
            await until(lambda: len(predictions.last_error or "") > 0 and "spill: " in str(predictions.last_error))
            with pytest.raises(PredictionLogFull):
                predictions.record(prediction(), prediction())
            assert predictions.backlog == 9
            predictions.record(rows[9])
            with pytest.raises(PredictionLogFull, match="the log says why"):
                predictions.record(prediction())
            await asyncio.sleep(0.2)
            accept_connections(database, server, accept=True)
            await until(lambda: predictions.written == 10)
            assert predictions.last_error is None

    asyncio.run(log())
    assert ids(in_database(database)) == ids(rows)
    assert events(caplog) == [
        "prediction_log_failing database",
        "prediction_log_failing spill",
        "prediction_log_recovered database",
    ]


def test_a_write_that_fails_half_way_leaves_no_half_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = spill.Spill(folder, lambda line: line.startswith(b"row"))
    waiting.append([b"row 1"])
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        write(descriptor, data[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        waiting.append([b"row 2"])
    assert (waiting.rows, waiting.size, waiting.read()) == (1, 6, [b"row 1"])
    monkeypatch.setattr(os, "write", write)
    waiting.append([b"row 2", b"row 3"])
    assert waiting.read() == [b"row 1", b"row 2", b"row 3"]
    assert (waiting.rows, waiting.size) == (3, 18)
    waiting.forget()
    assert (waiting.rows, waiting.size, list(folder.iterdir())) == (0, 0, [])


def test_a_large_spill_is_read_back_in_blocks_in_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "BLOCK", 40)
    waiting = spill.Spill(folder, lambda line: line.startswith(b"row"))
    rows = [f"row {number}".encode() for number in range(30)]
    waiting.append(rows[:25])
    back = waiting.read()
    assert 0 < len(back) < 25
    assert waiting.read() == back
    waiting.append(rows[25:])
    waiting.forget()
    while some := waiting.read():
        back += some
        waiting.forget()
        assert waiting.rows == 30 - len(back)
    assert back == rows
