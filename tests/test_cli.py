import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from streamflow import cli
from streamflow.api_keys import ApiKeys
from streamflow.contract import CONTRACT
from streamflow.database import Database
from streamflow.embedded import wait_until_ready
from streamflow.landing import LandingZone
from streamflow.months import Month
from streamflow.registry import ARCHIVED, PRODUCTION, STAGING, Registry
from streamflow.settings import Settings
from streamflow.warehouse import migrate

USERS = 600
DECIDER = ("--by", "anna", "--reason", "why")
CLOSED = "http://127.0.0.1:9"


@dataclass(frozen=True)
class Done:
    """How a command ended and what it said."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class World:
    """An installation on the test database with three simulated months, and how each step of making it ended."""

    environment: dict[str, str]
    months: Path
    simulated: Done
    landed: Done
    migrated: Done
    ran: Done

    @property
    def home(self) -> Path:
        return Path(self.environment["STREAMFLOW_HOME"])


def in_a_process(environment: dict[str, str], *arguments: object) -> Done:
    command = [sys.executable, "-m", "streamflow", *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


def archived(home: Path, month: str, table: str) -> Path:
    manifest = json.loads((home / "landing" / month / "manifest.json").read_text())
    digest = manifest["tables"][table][-1]["sha256"]
    return home / "archive" / "sha256" / digest[:2] / digest


@pytest.fixture(scope="module")
def world(database: Database, tmp_path_factory: pytest.TempPathFactory) -> World:
    """January to March land and run; an archived file of February is gone when they run, and back afterwards."""
    folder = tmp_path_factory.mktemp("cli")
    environment = {
        "STREAMFLOW_HOME": str(folder / "home"),
        "STREAMFLOW_DATABASE_URL": database.url,
        "STREAMFLOW_OWNER_DATABASE_URL": database.owner_url,
        "STREAMFLOW_ACTOR": "tester",
        "STREAMFLOW_API_PORT": "9",
    }
    months = folder / "months"
    given = ("--months", "2024-01..2024-03", "--users", USERS, "--out", months)
    simulated = in_a_process(environment, "simulate", *given)
    landed = in_a_process(environment, "land", months)
    migrated = in_a_process(environment, "migrate")
    lost = archived(folder / "home", "2024-02", "usage_agg_30d")
    shutil.move(lost, folder / "kept")
    ran = in_a_process(environment, "run", "2024-01..2024-03", "2024-01", "--json")
    shutil.move(folder / "kept", lost)
    return World(environment, months, simulated, landed, migrated, ran)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs a command in this process, which imports what is heavy once; the environment stays as it was."""

    def run(*arguments: object) -> Done:
        before = dict(os.environ)
        monkeypatch.setattr(sys, "argv", ["streamflow", *map(str, arguments)])
        try:
            with pytest.raises(SystemExit) as ended:
                cli.main()
        finally:
            os.environ.clear()
            os.environ.update(before)
        said = capsys.readouterr()
        return Done(int(ended.value.code or 0), said.out, said.err)

    return run


@pytest.fixture
def streamflow(world: World, monkeypatch: pytest.MonkeyPatch, here: Callable[..., Done]) -> Callable[..., Done]:
    """The same on the world."""
    for name, value in world.environment.items():
        monkeypatch.setenv(name, value)
    return here


@pytest.fixture
def empty(
    streamflow: Callable[..., Done], new_database: Callable[[], Database], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Done]:
    """The same on an installation where nothing has run yet."""
    database = new_database()
    migrate(database)
    monkeypatch.setenv("STREAMFLOW_DATABASE_URL", database.url)
    return streamflow


Streamflow = Callable[..., Done]


def assert_refused(done: Done, *reasons: str) -> None:
    """One clear message on stderr, exit 1, nothing that looks like a crash."""
    assert done.code == 1
    assert "Traceback" not in done.err
    for reason in reasons:
        assert reason in done.err


# --- data ---------------------------------------------------------------------------------------------------------


def test_simulate_says_what_it_wrote_and_where_the_truth_is(world: World) -> None:
    assert world.simulated == Done(
        0, f"3 months of 600 users in {world.months}; the truth is in {world.months / '.truth'}\n", ""
    )
    assert {path.name for path in (world.months / "2024-02").iterdir()} == {table.file for table in CONTRACT.tables}


def test_land_says_what_is_new(world: World) -> None:
    assert (world.landed.code, world.landed.err.count("Traceback")) == (0, 0)
    lines = world.landed.out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["2024-01 landed", "2024-02 landed", "2024-03 landed"]
    assert "users (revision 1)" in lines[0]
    assert "labels (revision 1)" in lines[0]


def test_landing_the_same_again_changes_nothing(world: World, streamflow: Streamflow) -> None:
    again = streamflow("land", world.months / "2024-01", "--month", "2024-01")
    assert (again.code, again.out) == (0, "2024-01 had landed already; nothing changed\n")


def test_a_refused_month_does_not_stop_the_others(
    world: World, streamflow: Streamflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAMFLOW_HOME", str(tmp_path / "home"))
    shutil.copytree(world.months, tmp_path / "months")
    (tmp_path / "months" / "2024-02" / "labels.csv").write_text("user_id,churn_label\n")

    done = streamflow("land", tmp_path / "months")
    assert done.code == 1
    assert [line.partition(":")[0] for line in done.out.splitlines()] == ["2024-01 landed", "2024-03 landed"]
    assert "labels.csv" in done.err
    assert LandingZone(tmp_path / "home").months() == [Month(2024, 1), Month(2024, 3)]


def test_land_prints_json(
    world: World, streamflow: Streamflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAMFLOW_HOME", str(tmp_path / "home"))
    labels = (world.months / "2024-01" / "labels.csv").read_bytes()
    shutil.copytree(world.months / "2024-01", tmp_path / "month")
    (tmp_path / "month" / "labels.csv").unlink()

    (first,) = json.loads(streamflow("land", tmp_path / "month", "--month", "2024-01", "--json").out)
    assert (first["month"], first["unchanged"]) == ("2024-01", [])
    assert set(first["changed"]) == {table.name for table in CONTRACT.tables} - {"labels"}
    assert {revision["revision"] for revision in first["changed"].values()} == {1}
    assert first["changed"]["users"]["rows"] == USERS

    (tmp_path / "month" / "labels.csv").write_bytes(labels)
    (second,) = json.loads(streamflow("land", tmp_path / "month", "--month", "2024-01", "--json").out)
    assert list(second["changed"]) == ["labels"]
    assert len(second["unchanged"]) == 5


def test_the_files_of_one_month_are_not_taken_for_a_month_that_nobody_named(
    world: World, streamflow: Streamflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAMFLOW_HOME", str(tmp_path / "home"))
    shutil.copytree(world.months / "2024-02", tmp_path / "month")
    done = streamflow("land", tmp_path / "month")
    assert done.code == 2
    assert "--month YYYY-MM" in done.err
    assert not (tmp_path / "home" / "landing").exists()


def test_a_bad_folder_is_refused_with_file_line_column_and_reason(
    world: World, streamflow: Streamflow, tmp_path: Path
) -> None:
    shutil.copytree(world.months / "2024-03", tmp_path / "bad")
    payments = tmp_path / "bad" / "payments_agg_90d.csv"
    lines = payments.read_text().splitlines()
    lines[4] = lines[4].partition(",")[0] + ",-7"
    payments.write_text("\n".join(lines) + "\n")
    before = (world.home / "landing" / "2024-03" / "manifest.json").read_bytes()

    refused = streamflow("land", tmp_path / "bad", "--month", "2024-03")

    assert_refused(refused, "1 problem", "payments_agg_90d.csv", "line 5", "failed_payments_90d", "'-7'", "quarantine")
    assert refused.out == ""
    assert (world.home / "landing" / "2024-03" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("land",),
        ("land", "somewhere", "--month", "2024-01", "--first-month", "2024-01"),
        ("land", "somewhere", "--month", "2024-13"),
        ("land", "somewhere", "--first-month", "January"),
        ("run", "2024-03..2024-01"),
        ("run", "2024-1"),
        ("run", "--estimator", "logistic_regression"),
        ("simulate", "--months", "2024-01"),
        ("simulate", "--months", "soon", "--out", "somewhere"),
        ("simulate", "--months", "2024-01", "--out", "somewhere", "--users", "many"),
        ("promote", "1", "--by", "anna"),
        ("promote", "first", "--by", "anna", "--reason", "why"),
        ("rollback", "--reason", "why"),
        ("threshold", "1", "high", "--by", "anna", "--reason", "why"),
        ("threshold", "1", "0.4"),
        ("ledger", "--at", "yesterday"),
        ("status", "--yaml"),
        ("frobnicate",),
    ],
)
def test_wrong_usage_exits_2(streamflow: Streamflow, arguments: tuple[str, ...]) -> None:
    done = streamflow(*arguments)

    assert (done.code, done.out) == (2, "")
    assert "Error: " in done.err or "Usage: " in done.err
    assert "Traceback" not in done.err


def test_a_folder_that_is_not_there_is_said(streamflow: Streamflow, tmp_path: Path) -> None:
    assert_refused(streamflow("land", tmp_path / "nowhere", "--month", "2024-01"), str(tmp_path / "nowhere"))


def test_migrate_says_what_it_changed(world: World) -> None:
    assert (world.migrated.code, world.migrated.err) == (0, "")
    assert world.migrated.out.startswith("migrated from an empty database to 0004\ncreated users\n")


# --- running months -----------------------------------------------------------------------------------------------


def test_a_bad_month_does_not_stop_the_others(world: World, streamflow: Streamflow) -> None:
    assert_refused(world.ran)
    first, *_, last = world.ran.err.splitlines()
    assert first.startswith("2024-02 usage_agg_30d: ")
    assert str(archived(world.home, "2024-02", "usage_agg_30d").name) in first
    assert last == "2024-02 failed; the others are done"
    runs = json.loads(world.ran.out)
    assert [(run["month"], sorted(run["failures"])) for run in runs] == [
        ("2024-01", []),
        ("2024-01", []),
        ("2024-02", ["usage_agg_30d"]),
        ("2024-03", []),
    ]
    assert runs[1]["assets"] == ["churn_scores", "drift_report", "performance_report"]
    assert all(run["seconds"] > 0 for run in runs)

    months = json.loads(streamflow("status", "--json").out)["months"]
    assert {month["month"]: month["state"] for month in months} == {
        "2024-01": "complete",
        "2024-02": "incomplete",
        "2024-03": "complete",
    }


def test_a_month_that_has_not_landed_is_refused_before_anything_runs(streamflow: Streamflow) -> None:
    before = streamflow("status", "--json").out
    assert_refused(streamflow("run", "2024-03..2024-04"), "2024-04")
    assert streamflow("status", "--json").out == before


# --- status and models --------------------------------------------------------------------------------------------


def test_status_json_has_the_contracts_shape(streamflow: Streamflow) -> None:
    done = streamflow("status", "--json")
    status = json.loads(done.out)

    assert (done.code, done.err) == (0, "")
    production = status["production"]
    assert {"version", "run_id", "as_of", "threshold", "promoted_at", "promoted_by"} <= set(production)
    assert (production["version"], production["as_of"]) == (1, "2024-01-31")
    assert 0 < production["threshold"] < 1
    assert production["promoted_by"] == "policy"
    assert datetime.fromisoformat(production["promoted_at"]).utcoffset() is not None
    for month in status["months"]:
        assert {"month", "state", "revision", "rows"} <= set(month)
    assert set(status["retraining"]) == {"retrain", "cause", "reason", "alarms"}
    assert (status["retraining"]["retrain"], status["retraining"]["cause"]) == (False, None)
    assert [(month["revision"], month["rows"]) for month in status["months"]] == [(1, USERS)] * 3


def test_status_is_told_to_people(streamflow: Streamflow) -> None:
    threshold = json.loads(streamflow("status", "--json").out)["production"]["threshold"]
    lines = streamflow("status").out.splitlines()
    assert lines[0].startswith(f"Production: version 1, trained as of 2024-01-31, threshold {threshold:g}, promoted ")
    assert lines[0].endswith(" UTC by policy")
    assert ["2024-01", "complete", "1", "600"] in [line.split() for line in lines]
    assert sum(line.startswith("Training again: not due: ") for line in lines) == 1
    (incomplete,) = [line for line in lines if line.lstrip().startswith("2024-02")]
    assert incomplete.split()[-1] == "usage_agg_30d,"


def test_models_json_has_the_contracts_shape(streamflow: Streamflow) -> None:
    done = streamflow("models", "--json")
    models = json.loads(done.out)

    assert (done.code, done.err) == (0, "")
    assert [(one["version"], one["stage"], one["as_of"]) for one in models] == [
        (1, PRODUCTION, "2024-01-31"),
        (2, STAGING, "2024-03-31"),
    ]
    assert [len(one["gates"]) for one in models] == [14, 16]
    for one in models:
        assert {"auc", "f1", "accuracy", "logloss", "ece", "brier"} <= set(one["metrics"])
        assert {"name", "passed", "value", "bound", "reason"} <= set(one["gates"][0])
        assert one["evidence"]["metrics"]["auc"]["value"] == one["metrics"]["auc"]
        assert {"segments", "fairness", "invariances", "parity_difference"} <= set(one["evidence"])
        assert 0 < one["threshold"] < 1


def test_models_are_told_to_people(streamflow: Streamflow) -> None:
    known, _ = json.loads(streamflow("models", "--json").out)
    header, first, second = streamflow("models").out.splitlines()
    columns = header.split("  ")
    assert [column.strip() for column in columns if column.strip()] == [
        *("version", "stage", "as of", "AUC (95 % interval)", "threshold", "service", "estimator", "gates")
    ]
    assert first.split()[:3] == ["1", PRODUCTION, "2024-01-31"]
    auc = known["evidence"]["metrics"]["auc"]
    assert f"{auc['value']:.3f} ({auc['low']:.3f} to {auc['high']:.3f})" in first
    assert first.split()[-4:] == [f"{known['threshold']:.4g}", known["service"], known["estimator"], "passed"]
    assert "failed: better_than_production" in second


def test_models_say_when_there_is_none(empty: Streamflow) -> None:
    assert empty("models").out == "No version is registered yet; `streamflow run MONTH` trains one.\n"
    assert json.loads(empty("models", "--json").out) == []


# --- promotion ----------------------------------------------------------------------------------------------------


def test_a_failed_gate_is_refused_with_value_and_bound_and_an_override_is_recorded(streamflow: Streamflow) -> None:
    refused = streamflow("promote", 2, "--by", "anna", "--reason", "fresher")
    assert_refused(refused, "--override promotes it all the same")
    first, *gates = refused.err.splitlines()
    failed = first.partition("gates failed: ")[2].partition(";")[0].split(", ")
    assert [line.partition(":")[0].strip() for line in gates] == failed
    assert "better_than_production: AUC minus Production's, of the same" in refused.err
    assert "the lower end must exceed 0" in refused.err

    entry = json.loads(streamflow("promote", 2, "--by", "anna", "--reason", "fresher", "--override", "--json").out)
    assert (entry["action"], entry["override"], entry["previous"], entry["threshold"]) == ("promote", True, 1, None)
    assert [gate["name"] for gate in entry["gates"] if not gate["passed"]] == failed
    assert streamflow("rollback", *DECIDER).out == "Version 1 is Production, by anna; before: version 2\n"


def test_promote_and_roll_back(streamflow: Streamflow) -> None:
    said = streamflow("promote", 2, "--by", "anna", "--reason", "fresher", "--override")
    assert (said.code, said.out) == (0, "Version 2 is Production, by anna; before: version 1\n")
    assert [one["stage"] for one in json.loads(streamflow("models", "--json").out)] == [ARCHIVED, PRODUCTION]
    assert json.loads(streamflow("status", "--json").out)["production"]["promoted_by"] == "anna"

    entry = json.loads(streamflow("rollback", "--by", "ben", "--reason", "worse", "--json").out)
    assert (entry["action"], entry["version"], entry["previous"], entry["by"]) == ("rollback", 1, 2, "ben")
    assert (entry["reason"], entry["override"], entry["policy"]) == ("worse", False, "manual")
    assert [one["stage"] for one in json.loads(streamflow("models", "--json").out)] == [PRODUCTION, ARCHIVED]


def test_a_threshold_is_changed_and_shown(streamflow: Streamflow) -> None:
    said = streamflow("threshold", 1, 0.31, "--by", "dora", "--reason", "500 calls")
    assert said == Done(0, "Version 1 says churn from probability 0.31 on, by dora\n", "")
    assert json.loads(streamflow("status", "--json").out)["production"]["threshold"] == 0.31
    assert [one["threshold"] == 0.31 for one in json.loads(streamflow("models", "--json").out)] == [True, False]

    entry = json.loads(streamflow("threshold", 1, 0.32, *DECIDER, "--json").out)
    assert (entry["action"], entry["version"], entry["previous"], entry["threshold"]) == ("threshold", 1, 1, 0.32)
    for value in (0, 1, 1.5, "nan"):
        assert_refused(streamflow("threshold", 1, value, *DECIDER), "between 0 and 1, both excluded")
    assert_refused(streamflow("threshold", 1, 0.32, *DECIDER), "the threshold of version 1 is 0.32 already")


def test_the_ledger_is_told_to_people_and_programs(streamflow: Streamflow) -> None:
    assert streamflow("threshold", 2, 0.77, *DECIDER).code == 0
    entries = json.loads(streamflow("ledger", "--json").out)
    assert [(one["action"], one["version"], one["previous"]) for one in entries[:2]] == [
        ("promote", 1, None),
        ("refuse", 2, 1),
    ]
    assert {one["by"] for one in entries[:2]} == {"policy"}
    header, *rows = streamflow("ledger").out.splitlines()
    assert [column.strip() for column in header.split("  ") if column.strip()] == [
        *("when (UTC)", "what", "version", "before", "by", "policy", "reason")
    ]
    assert len(rows) == len(entries)
    for entry, row in zip(entries, rows, strict=True):
        at = datetime.fromisoformat(entry["at"])
        assert row.startswith(f" {at:%Y-%m-%d %H:%M:%S}  {entry['action']}")
        assert row.rstrip().endswith(entry["reason"])
    assert [" promote, override " in row for row in rows] == [one["override"] for one in entries]
    assert " threshold 0.77 " in rows[-1]


def test_the_ledger_knows_what_was_production_when(streamflow: Streamflow) -> None:
    entries = json.loads(streamflow("ledger", "--json").out)
    made = [one for one in entries if one["action"] in ("promote", "rollback")]
    for entry in made:
        told = json.loads(streamflow("ledger", "--at", entry["at"], "--json").out)
        assert (told["production"], told["decision"]) == (entry["version"], entry)
    first = datetime.fromisoformat(made[0]["at"])
    before = (first - timedelta(seconds=1)).isoformat()
    assert json.loads(streamflow("ledger", "--at", before, "--json").out)["production"] is None
    assert streamflow("ledger", "--at", "2024-01-01").out == "Production at 2024-01-01 00:00:00 UTC: nothing\n"
    said = streamflow("ledger", "--at", "2999-01-01T02:00+02:00").out
    newest = f"{datetime.fromisoformat(made[-1]['at']):%Y-%m-%d %H:%M:%S} UTC by {made[-1]['by']}"
    how = f"rolled back to {newest}: {made[-1]['reason']}"
    assert said == f"Production at 2999-01-01 00:00:00 UTC: version 1, {how}\n"


def test_an_empty_ledger_is_said(empty: Streamflow) -> None:
    nothing = "Nothing has been decided yet; `streamflow run MONTH` registers a first version.\n"
    assert empty("ledger").out == nothing
    assert json.loads(empty("ledger", "--json").out) == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("promote", 1), "version 1 is in Production already"),
        (("promote", 77), "there is no version 77; registered are: 1, 2"),
        (("rollback", 77), "there is no version 77; registered are: 1, 2"),
        (("threshold", 77, 0.4), "there is no version 77; registered are: 1, 2"),
        (("rollback", 1), "version 1 is in Production already"),
        (("rollback",), "version 1 is the first in Production; it has no predecessor"),
        (("rebuild", "--version", 77), "there is no version 77; registered are: 1, 2"),
    ],
)
def test_what_cannot_be_done_to_a_version_is_refused_with_its_reason(
    streamflow: Streamflow, arguments: tuple[object, ...], reason: str
) -> None:
    done = streamflow(*arguments, *(() if arguments[0] == "rebuild" else DECIDER))
    assert_refused(done)
    assert (done.out, done.err) == ("", f"{reason}\n")


def test_the_ledger_wants_a_name(streamflow: Streamflow) -> None:
    assert_refused(streamflow("promote", 2, "--by", "", "--reason", "why"), "--by NAME --reason TEXT")


def test_a_policy_that_cannot_be_used_is_refused(
    streamflow: Streamflow, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STREAMFLOW_POLICY_FILE", str(tmp_path / "none.toml"))
    assert_refused(streamflow("promote", 2, *DECIDER), "none.toml cannot be read")


def test_rebuild_compares_dataset_and_predictions(streamflow: Streamflow) -> None:
    assert streamflow("rebuild", "--version", 1) == Done(0, "dataset: identical\npredictions: identical\n", "")


@pytest.fixture
def without_dagster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dagster's tables are not this test's concern, and opening them quietens this process's loggers for good."""
    monkeypatch.setattr(cli, "_dagster_runner", lambda: SimpleNamespace(instance=nullcontext))


def interrupted(database: Database) -> None:
    """As if nobody had noted that MLflow's stages follow the ledger."""
    with database.connect() as connection:
        connection.execute("DELETE FROM streamflow.stages_followed")


def test_migrate_lets_mlflow_follow_the_ledger(
    streamflow: Streamflow, database: Database, without_dagster: None
) -> None:
    registry = Registry(Settings(), database)
    registry.set_stage(1, ARCHIVED)
    assert streamflow("migrate") == Done(0, "", "")
    assert registry.versions()[1].stage == ARCHIVED  # by hand, which is not for migrate to judge

    interrupted(database)
    assert streamflow("migrate") == Done(0, "", "")
    assert registry.versions()[1].stage == PRODUCTION


def test_migrate_drops_predictions_of_months_that_are_not_kept(
    streamflow: Streamflow, database: Database, without_dagster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with database.connect() as connection:
        for month in ("2020-01-01", "2020-02-01", "2999-01-01"):
            connection.execute("SELECT streamflow.make_predictions_partition(%s)", (month,))
    assert streamflow("migrate") == Done(0, "", "")
    monkeypatch.setenv("STREAMFLOW_PREDICTION_RETENTION_MONTHS", "1")
    said = "dropped the predictions of 2020-01\ndropped the predictions of 2020-02\n"
    assert streamflow("migrate") == Done(0, said, "")
    monkeypatch.setenv("STREAMFLOW_PREDICTION_RETENTION_MONTHS", "0")
    assert_refused(streamflow("migrate"), "STREAMFLOW_PREDICTION_RETENTION_MONTHS='0'")


def test_migrate_goes_on_without_mlflow(
    streamflow: Streamflow, database: Database, without_dagster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAMFLOW_MLFLOW_URI", CLOSED)
    assert streamflow("migrate") == Done(0, "", "")
    interrupted(database)
    done = streamflow("migrate")
    assert done.code == 0
    assert done.err.startswith("MLflow's stages could not follow the ledger: MLflow does not answer")


# --- the service --------------------------------------------------------------------------------------------------


AUTHORIZATIONS: list[str | None] = []
"""What `answering` was shown, in order."""


@contextmanager
def answering(code: int, content_type: str, body: str) -> Iterator[int]:
    """A server on a port of this machine that gives one answer to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            AUTHORIZATIONS.append(self.headers["authorization"])
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(code)
            self.send_header("content-type", content_type)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


ANSWER = {
    "request_id": "r1",
    "user_id": "a1",
    "prediction": 1,
    "probability": 0.75,
    "threshold": 0.5,
    "model_version": 3,
    "features_as_of": "2024-01-31",
    "features_used": {"monthly_fee": 29.85, "net_service": "DSL"},
}


def test_predict_prints_the_services_answer(here: Streamflow, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(200, "application/json", json.dumps(ANSWER)) as port:
        monkeypatch.setenv("STREAMFLOW_API_PORT", str(port))
        done, as_json = here("predict", "a1"), here("predict", "a1", "--json")
    assert (as_json.code, json.loads(as_json.out), as_json.err) == (0, ANSWER, "")
    first, _, fee, net = done.out.splitlines()
    assert first == (
        "a1 churns: probability 0.7500, threshold 0.5, by version 3, features as of 2024-01-31, request r1"
    )
    assert (fee.split(), net.split()) == (["monthly_fee", "29.85"], ["net_service", "DSL"])


def test_predict_tells_a_refusal(here: Streamflow, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = {"title": "Unknown user", "detail": "there is no user nobody", "missing_features": []}
    with answering(404, "application/problem+json", json.dumps(problem)) as port:
        monkeypatch.setenv("STREAMFLOW_API_PORT", str(port))
        done, as_json = here("predict", "nobody"), here("predict", "nobody", "--json")
    assert_refused(done, "there is no user nobody (404)")
    assert done.out == ""
    assert_refused(as_json, "there is no user nobody (404)")
    assert json.loads(as_json.out) == problem


def test_predict_knows_a_stranger(here: Streamflow, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(200, "text/html", "<html>router</html>") as port:
        monkeypatch.setenv("STREAMFLOW_API_PORT", str(port))
        assert_refused(here("predict", "a1"), f"127.0.0.1:{port} is not StreamFlow; set STREAMFLOW_API_PORT")


def test_predict_without_a_service_says_what_to_start(here: Streamflow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMFLOW_API_PORT", "9")
    done = here("predict", "a1")
    assert_refused(done, "no service answers at http://127.0.0.1:9", "start `streamflow up`")
    assert done.err.count("\n") == 1


def test_an_unknown_service_is_refused_with_the_known_ones(here: Streamflow) -> None:
    assert_refused(here("service", "redis"), "no service 'redis'; there are mlflow, code, webserver, daemon, api")


def test_a_service_ends_with_the_command_that_runs_it(world: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, **world.environment, "STREAMFLOW_API_PORT": str(port)}
    with subprocess.Popen(
        [sys.executable, "-m", "streamflow", "serve", "--workers", "2"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            wait_until_ready(f"http://127.0.0.1:{port}/health", "the API", 30)
            (service,) = psutil.Process(process.pid).children()
            assert service.environ().get("STREAMFLOW_OWNER_DATABASE_URL") == ""
            assert service.environ().get("STREAMFLOW_WORKERS") == "2"
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert not service.is_running()


def test_a_key_is_printed_once_and_kept_as_its_hash(
    here: Streamflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_refused(here("key", "ada"), "set STREAMFLOW_API_KEYS_FILE")
    file = tmp_path / "api_keys"
    monkeypatch.setenv("STREAMFLOW_API_KEYS_FILE", str(file))
    done, as_json = here("key", "ada"), here("key", "ben", "--json")
    assert done.code == 0
    assert done.err.startswith("The API key of ada, which is not shown again")
    keys = ApiKeys.load(file)
    assert keys.owner(done.out.removesuffix("\n")) == "ada"
    answer = json.loads(as_json.out)
    assert keys.owner(answer.pop("key")) == "ben"
    assert answer == {"name": "ben", "file": str(file)}
    assert_refused(here("key", "ada"), "remove that line first")


def test_predict_shows_its_key(here: Streamflow, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(200, "application/json", json.dumps(ANSWER)) as port:
        monkeypatch.setenv("STREAMFLOW_API_PORT", str(port))
        here("predict", "a1")
        monkeypatch.setenv("STREAMFLOW_API_KEY", "secret")
        here("predict", "a1")
    assert AUTHORIZATIONS[-2:] == [None, "Bearer secret"]


# --- the environment ----------------------------------------------------------------------------------------------


def test_env_survives_a_shell(streamflow: Streamflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / 'it\'s $HOME `date`; "x"'
    monkeypatch.setenv("STREAMFLOW_HOME", str(home))
    monkeypatch.setenv("STREAMFLOW_ACTOR", "Anna & Ben")
    done = streamflow("env")
    assert (done.code, done.err) == (0, "")

    shell = subprocess.run(
        ["sh", "-c", f"eval {shlex.quote(done.out)}; env -0"], env={}, capture_output=True, text=True, check=True
    )
    told = dict(line.split("=", 1) for line in shell.stdout.split("\0") if line)
    assert told["STREAMFLOW_HOME"] == str(home)
    assert told["STREAMFLOW_ACTOR"] == "Anna & Ben"
    assert told["DAGSTER_HOME"] == str(home / "dagster")
    assert "STREAMFLOW_OWNER_DATABASE_URL" not in told


@pytest.mark.parametrize(
    "arguments",
    [("status",), ("models",), ("run", "2024-01"), ("rebuild", "--version", 1), ("promote", 1, *DECIDER)],
)
def test_a_database_that_is_not_prepared_is_said(
    streamflow: Streamflow,
    new_database: Callable[[], Database],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[object, ...],
) -> None:
    monkeypatch.setenv("STREAMFLOW_DATABASE_URL", new_database().url)
    done = streamflow(*arguments)
    assert_refused(done)
    assert (done.out, done.err) == ("", "the database has not been prepared; run `streamflow migrate`\n")


def test_migrating_needs_the_owner(
    streamflow: Streamflow,
    new_database: Callable[[], Database],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    database = new_database()
    migrate(database)
    with database.connect(owner=True) as connection:
        connection.execute("ALTER TABLE streamflow.users DROP COLUMN has_family")
    monkeypatch.setenv("STREAMFLOW_DATABASE_URL", database.url)
    monkeypatch.setenv("STREAMFLOW_OWNER_DATABASE_URL", database.url)

    assert_refused(streamflow("migrate"), "must be owner of table users", "set STREAMFLOW_OWNER_DATABASE_URL")


def test_a_database_that_is_away_is_said(streamflow: Streamflow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMFLOW_DATABASE_URL", "postgresql://streamflow:x@127.0.0.1:9/streamflow")
    for arguments in (("status",), ("migrate",), ("run", "2024-01"), ("promote", 1, *DECIDER)):
        assert_refused(streamflow(*arguments), "PostgreSQL does not answer")


@pytest.mark.parametrize(
    ("variable", "value"),
    [("STREAMFLOW_API_PORT", "abc"), ("STREAMFLOW_POLICY", "sometimes"), ("STREAMFLOW_DATABASE_URL", "mysql://x")],
)
def test_a_setting_that_cannot_be_used_is_named(
    streamflow: Streamflow, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert_refused(streamflow("status"), variable)
