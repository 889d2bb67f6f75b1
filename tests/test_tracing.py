"""Tracing a version of a small installation, and each link broken in turn."""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import msgspec
import pytest
from governed import evidence
from psycopg.types.json import Jsonb
from rich.console import Console

from streamflow import cli, dataset, pipeline, tracing
from streamflow.contract import CONTRACT, USAGE
from streamflow.database import Database
from streamflow.errors import LineageBroken, RegistryUnavailable, UnknownPrediction, UnknownVersion
from streamflow.months import Month
from streamflow.pipeline import Platform
from streamflow.predictions import LoggedPrediction, logged_predictions, replay
from streamflow.promotion import Version, gates_of
from streamflow.registry import MODEL, SCORER_PATH
from streamflow.settings import PROJECT_ROOT, Settings
from streamflow.simulate import simulate
from streamflow.tracing import (
    Trace,
    as_tree,
    prediction_as_tree,
    require_whole,
    trace_prediction,
    trace_version,
)
from streamflow.training_config import TrainingConfig

JANUARY = Month(2024, 1)
LANDED = datetime(2024, 2, 1, 9, 58, tzinfo=UTC)
TRAINED = datetime(2024, 2, 1, 10, 5, tzinfo=UTC)
CORRECTED = datetime(2024, 2, 9, 8, 0, tzinfo=UTC)
DECIDED = datetime(2024, 2, 3, 12, 30, tzinfo=UTC)
ANSWERED = UUID("6f1c1a52-7a35-4ad4-9f0e-8a3c3d0f5b11")
USERS = 400


@dataclass(frozen=True)
class World:
    """January as it landed first, on which version 1 was trained; usage has been corrected since."""

    platform: Platform
    first_files: dict[str, str]

    def archived(self, table: str) -> Path:
        sha256 = self.first_files[table]
        return self.platform.settings.home / "archive" / "sha256" / sha256[:2] / sha256

    @property
    def manifest(self) -> Path:
        return self.platform.settings.home / "landing" / str(JANUARY) / "manifest.json"


@pytest.fixture(scope="module")
def world(
    new_database: Callable[[], Database], tmp_path_factory: pytest.TempPathFactory, quick_training_file: Path
) -> World:
    home = tmp_path_factory.mktemp("traced")
    [folder] = simulate(home / "months", [JANUARY], users=USERS)
    training_file = home / "training.toml"
    training_file.write_text(re.sub(r'    "(?!logistic)\w+",\n', "", quick_training_file.read_text()))
    platform = Platform(Settings(home=home, actor="tester", training_file=training_file), new_database())
    pipeline.prepare(platform)
    platform.landing.land(folder, JANUARY, LANDED)
    first = {table.name: hashlib.sha256((folder / table.file).read_bytes()).hexdigest() for table in CONTRACT.tables}
    for table in CONTRACT.tables:
        pipeline.load_table(platform, table, JANUARY, TRAINED)
    for table in CONTRACT.snapshots:
        pipeline.build_snapshot(platform, table, JANUARY, TRAINED)
    pipeline.assemble_dataset(platform, JANUARY, TRAINED)
    pipeline.train(platform, JANUARY, TRAINED, estimator="logistic_regression", service="churn_v2")
    pipeline.register(platform, JANUARY, TRAINED)
    usage = folder / "usage_agg_30d.csv"
    header, one, *others = usage.read_text().splitlines(keepends=True)
    name = header.rstrip().split(",").index("skips_7d")
    cells = one.rstrip().split(",")
    cells[name] = str(int(cells[name]) + 1)
    usage.write_text("".join([header, ",".join(cells) + "\n", *others]))
    platform.landing.land(folder, JANUARY, CORRECTED)
    pipeline.load_table(platform, USAGE, JANUARY, CORRECTED)
    pipeline.build_snapshot(platform, USAGE, JANUARY, CORRECTED)
    return World(platform, first)


@contextmanager
def moved_away(path: Path) -> Iterator[Path]:
    """The file, somewhere else for the length of the block."""
    kept = path.with_name(f"{path.name}.kept")
    shutil.move(path, kept)
    try:
        yield kept
    finally:
        path.unlink(missing_ok=True)
        shutil.move(kept, path)


def altered(path: Path, kept: Path) -> None:
    """Put the file there with one bit changed in its middle."""
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def printed(trace: Trace) -> list[str]:
    console = Console(width=400, highlight=False)
    with console.capture() as captured:
        console.print(as_tree(trace))
    return captured.get().splitlines()


def broken(world: World) -> tuple[str, ...]:
    """What is wrong, which must be in the error as well."""
    trace = trace_version(world.platform, 1)
    with pytest.raises(LineageBroken) as raised:
        require_whole(trace)
    count = len(trace.broken)
    heading = f"the lineage of version 1 is broken in {count} place{'s' if count > 1 else ''}:"
    assert str(raised.value).split("\n  ") == [heading, *trace.broken]
    return trace.broken


# --- a whole lineage ----------------------------------------------------------------------------------------------


def test_every_link_from_the_version_to_the_landed_bytes(world: World) -> None:
    platform = world.platform
    version = platform.ledger.version(1)
    trace = trace_version(platform, 1)
    require_whole(trace)

    assert trace.broken == ()
    assert (trace.version, trace.as_of, trace.service) == (1, JANUARY.as_of, "churn_v2")
    assert trace.stage == platform.registry.versions()[1].stage
    assert trace.registered_at == TRAINED
    assert trace.artifact.sha256 == hashlib.sha256(platform.registry.scorer(version.run_id)).hexdigest()
    assert trace.run.run_id == version.run_id
    assert trace.run.link == pipeline.run_link(platform, version.run_id)
    assert (trace.training.estimator, trace.training.calibrated) == ("logistic_regression", False)
    assert (trace.training.seed, trace.training.window) == (42, ("2024-01",))
    assert trace.training.config_digest == platform.training_config.digest
    assert TrainingConfig.of_document(trace.training.config) == platform.training_config
    assert trace.training.code_version == pipeline.code_version()
    assert trace.training.libraries == pipeline.libraries()
    assert (trace.dataset.digest, trace.dataset.rows) == (version.dataset_digest, USERS)
    assert trace.dataset.path == platform.datasets / f"{version.dataset_digest}.parquet"
    assert trace.gates == gates_of(platform.ledger.entries(), 1) != ()


def test_the_dataset_is_traced_to_snapshots_and_these_to_files(world: World) -> None:
    trace = trace_version(world.platform, 1)
    assert [one.relation for one in trace.relations] == [*(table.snapshot for table in CONTRACT.snapshots), "labels"]
    assert {one.relation: one.files for one in trace.relations} == {
        "users_snapshots": ("users",),
        "subscriptions_profile_snapshots": ("users", "subscriptions"),
        "usage_agg_30d_snapshots": ("users", "usage_agg_30d"),
        "payments_agg_90d_snapshots": ("users", "payments_agg_90d"),
        "support_agg_90d_snapshots": ("users", "support_agg_90d"),
        "labels": ("labels",),
    }
    assert {(one.revision, one.month) for one in trace.relations} == {(1, "2024-01")}
    assert [one.file for one in trace.files] == [table.file for table in CONTRACT.tables]
    assert {one.table: one.sha256 for one in trace.files} == world.first_files
    assert {(one.revision, one.rows, one.landed_at) for one in trace.files} == {(1, USERS, LANDED.isoformat())}


def test_a_correction_since_breaks_nothing_and_is_told(world: World) -> None:
    trace = trace_version(world.platform, 1)
    assert trace.broken == ()
    assert {one.relation: one.replaced_by for one in trace.relations if one.replaced_by} == {
        "usage_agg_30d_snapshots": 2
    }
    assert world.platform.landing.manifest(JANUARY).current["usage_agg_30d"].revision == 2


def test_it_is_printed_as_an_aligned_tree(world: World) -> None:
    trace = trace_version(world.platform, 1)
    lines = printed(trace)
    assert lines[0] == f"version 1  {trace.stage}, as of 2024-01-31"
    assert lines[1] == "├── model          logistic_regression on churn_v2, threshold 0.5"
    assert lines[2] == "├── registered     2024-02-01 10:05 UTC"
    assert lines[5] == f"├── run            {trace.run.run_id}  {trace.run.link}"
    assert lines[6].endswith(f"{trace.training.config_digest[:12]}  seed 42, trained on 2024-01")  # type: ignore[index]
    assert lines[8] == f"├── dataset        {trace.dataset.digest[:12]}  2024-01  400 rows"  # type: ignore[index]
    usage = world.first_files["usage_agg_30d"]
    at = next(number for number, line in enumerate(lines) if "usage_agg_30d_snapshots" in line)
    digest = next(one.digest for one in trace.relations if one.relation == "usage_agg_30d_snapshots")
    assert lines[at] == (
        f"│   ├── usage_agg_30d_snapshots          2024-01  revision 1  {digest[:12]}  replaced since by revision 2"
    )
    assert lines[at + 1] == (
        f"│   │   └── usage_agg_30d.csv     2024-01  revision 1  {usage[:12]}  landed 2024-02-01 09:58 UTC  400 rows"
    )
    assert sum(".csv" in line for line in lines) == len(CONTRACT.tables)
    assert "BROKEN" not in "".join(lines)
    assert all(line == line.rstrip() for line in lines)


def test_decisions_and_the_threshold_in_force_are_told(world: World) -> None:
    platform = world.platform
    before = trace_version(platform, 1)
    assert [entry.action for entry in before.decisions] == [
        entry.action for entry in platform.ledger.entries() if entry.version == 1
    ]
    assert before.threshold == before.registered_threshold == 0.5
    with platform.database.connect() as connection:
        connection.execute(
            """
            INSERT INTO streamflow.promotion_ledger
                (at, action, version, by, reason, policy, override, gates, threshold, evidence)
            VALUES (%(at)s, 'threshold', 1, 'ada', 'we can call [fewer]', 'manual', false, '[]', 0.25, %(evidence)s),
                (%(at)s, 'flag', 9, 'mlflow', 'a stage of another version', 'manual', false, '[]', NULL, NULL)
            """,
            {"at": DECIDED, "evidence": Jsonb(msgspec.to_builtins(evidence()))},
        )
    after = trace_version(platform, 1)
    assert (after.threshold, after.registered_threshold) == (0.25, 0.5)
    assert len(after.decisions) == len(before.decisions) + 1
    lines = printed(after)
    assert "threshold 0.25 (registered with 0.5)" in lines[1]
    assert lines[-len(after.decisions) - 1] == f"└── decisions      {len(after.decisions)}"
    assert lines[-1].split(maxsplit=3) == [
        "└──",
        "2024-02-03",
        "12:30",
        "UTC  threshold  by ada     we can call [fewer]",
    ]


# --- broken links -------------------------------------------------------------------------------------------------


def test_a_version_that_was_never_registered(world: World) -> None:
    with pytest.raises(UnknownVersion, match="there is no version 7"):
        trace_version(world.platform, 7)


def test_the_dataset_is_gone_or_altered(world: World) -> None:
    path = trace_version(world.platform, 1).dataset.path
    with moved_away(path) as kept:
        [gone] = broken(world)
        altered(path, kept)
        [damaged] = broken(world)
        lines = printed(trace_version(world.platform, 1))
    remedy = "`streamflow rebuild --version 1` tells whether the archived files still give the same"
    assert gone == f"{path}, the dataset of version 1, is gone; {remedy}"
    assert damaged == f"{path}, the dataset of version 1, is damaged; {remedy}"
    assert [line for line in lines if line.endswith("  BROKEN")] == [line for line in lines if "dataset  " in line]
    assert trace_version(world.platform, 1).broken == ()


@pytest.mark.parametrize("table", [table.name for table in CONTRACT.tables])
def test_an_archived_file_is_gone_or_altered(world: World, table: str) -> None:
    path = world.archived(table)
    with moved_away(path) as kept:
        [gone] = broken(world)
        altered(path, kept)
        [damaged] = broken(world)
        marked = [line for line in printed(trace_version(world.platform, 1)) if "BROKEN" in line]
    assert gone == f"{path}, the archived {table}.csv of 2024-01, is gone; land that file again"
    assert damaged == f"{path}, the archived {table}.csv of 2024-01, is damaged; land that file again"
    assert len(marked) == 1
    assert f"── {table}.csv " in marked[0]


def test_the_manifest_has_lost_a_revision_or_says_another(world: World) -> None:
    manifest = json.loads(world.manifest.read_text())
    with moved_away(world.manifest):
        lost = {**manifest, "tables": {name: of for name, of in manifest["tables"].items() if name != "labels"}}
        world.manifest.write_text(json.dumps(lost))
        assert broken(world) == (
            f"the manifest of 2024-01 has no revision 1 of labels.csv with SHA-256 {world.first_files['labels']}; "
            "restore it from a backup",
        )
        trace = trace_version(world.platform, 1)
        assert [(one.rows, one.landed_at) for one in trace.files if one.table == "labels"] == [(None, None)]
        assert any(re.search(r"labels\.csv .* landing unknown +\? rows +BROKEN$", line) for line in printed(trace))
        first, second = manifest["tables"]["usage_agg_30d"]
        swapped = [{**second, "revision": 1}, {**first, "revision": 2}]
        world.manifest.write_text(json.dumps({**manifest, "tables": {**manifest["tables"], "usage_agg_30d": swapped}}))
        assert [reason.split(" of ")[2] for reason in broken(world)] == [
            f"usage_agg_30d.csv with SHA-256 {world.first_files['usage_agg_30d']}; restore it from a backup"
        ]
        world.manifest.unlink()
        assert broken(world) == ("2024-01 has not landed; run: streamflow land FOLDER --month 2024-01",)


def test_the_run_is_deleted_in_mlflow(world: World) -> None:
    import mlflow

    client = mlflow.MlflowClient(world.platform.registry.uri)
    run_id = world.platform.ledger.version(1).run_id
    client.delete_run(run_id)
    try:
        [reason] = broken(world)
        lines = printed(trace_version(world.platform, 1))
    finally:
        client.restore_run(run_id)
    assert reason.startswith(f"run {run_id} is gone from MLflow; if it was deleted there, `mlflow runs restore")
    assert [line for line in lines if line.endswith("  BROKEN")] == [lines[5]]
    assert trace_version(world.platform, 1).broken == ()


def test_the_compiled_scorer_is_gone_or_altered(world: World) -> None:
    run_id = world.platform.ledger.version(1).run_id
    [path] = (world.platform.settings.home / "mlflow").rglob(f"{run_id}/artifacts/scorer/scorer.bin")
    with moved_away(path) as kept:
        [gone] = broken(world)
        altered(path, kept)
        [other] = broken(world)
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    assert gone.startswith("the compiled scorer of version 1 in MLflow is gone; `streamflow rebuild --version 1`")
    assert other.startswith(f"the compiled scorer of version 1 in MLflow is altered: it has SHA-256 {found}; ")


def test_everything_that_is_broken_is_named(world: World) -> None:
    data = trace_version(world.platform, 1).dataset.path
    with moved_away(data), moved_away(world.archived("users")), moved_away(world.archived("labels")):
        reasons = broken(world)
    assert [reason.partition(",")[0] for reason in reasons] == [
        str(path) for path in (data, world.archived("users"), world.archived("labels"))
    ]


class Records:
    """A ledger with another record of version 1."""

    def __init__(self, version: Version) -> None:
        self._version = version

    def version(self, _: int) -> Version:
        return self._version

    def entries(self) -> list[Any]:
        return []


@pytest.fixture
def recorded(world: World, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, ...]]:
    """What is broken when the lineage in the record of version 1 has these changes; None takes a part away."""
    version = world.platform.ledger.version(1)

    def reasons(lineage: dict[str, Any]) -> tuple[str, ...]:
        changed = {name: value for name, value in {**version.lineage, **lineage}.items() if value is not None}
        monkeypatch.setitem(vars(world.platform), "ledger", Records(replace(version, lineage=changed)))
        assert printed(trace_version(world.platform, 1))
        return broken(world)

    return reasons


@pytest.mark.parametrize(
    "name", [name for name in tracing._Lineage.__struct_fields__ if name not in ("sources", "files")]
)
def test_a_record_without_a_part_is_broken(recorded: Callable[..., tuple[str, ...]], name: str) -> None:
    assert recorded({name: None}) == (f"the record of version 1 lacks {name}",)


def test_an_empty_record_lacks_everything_and_is_still_shown(
    world: World, recorded: Callable[..., tuple[str, ...]]
) -> None:
    everything = dict.fromkeys(world.platform.ledger.version(1).lineage)
    reasons = recorded(everything)
    fields = tracing._Lineage.__struct_fields__
    assert reasons[: len(fields)] == tuple(f"the record of version 1 lacks {name}" for name in fields)
    assert set(reasons[len(fields) :]) == {
        f"the record of version 1 does not say from which {name} its dataset was made"
        for name in ("labels", *(table.snapshot for table in CONTRACT.snapshots))
    }


def test_a_record_that_lacks_a_snapshot_or_a_file_is_broken(
    world: World, recorded: Callable[..., tuple[str, ...]]
) -> None:
    lineage = world.platform.ledger.version(1).lineage
    sources = {name: source for name, source in lineage["sources"].items() if name != "users_snapshots"}
    assert recorded({"sources": sources}) == (
        "the record of version 1 does not say from which users_snapshots its dataset was made",
    )
    files = {name: source for name, source in lineage["files"].items() if name not in ("users", "labels")}
    assert recorded({"files": files}) == (
        "the record of version 1 does not say from which labels.csv its dataset was made",
        "the record of version 1 does not say from which users.csv its dataset was made",
    )


def test_a_version_that_mlflow_has_of_another_run_is_broken(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = world.platform.registry
    versions = {1: replace(registry.versions()[1], run_id="another")}
    monkeypatch.setattr(registry, "versions", lambda: versions)
    run_id = world.platform.ledger.version(1).run_id
    assert broken(world) == (f"MLflow's version 1 is of run another; the record says {run_id}",)


@pytest.mark.parametrize(
    ("lineage", "reason"),
    [
        ({"as_of": "2024-02-29"}, "says two things of its as_of: 2024-02-29 and 2024-01-31"),
        ({"month": "2024-02"}, "says two things of its month: 2024-02 and 2024-01"),
        ({"service": "churn_v1"}, "says two things of its service: churn_v1 and churn_v2"),
        ({"seed": "forty-two"}, "cannot be read: Expected `int | null`, got `str` - at `$.seed`"),
    ],
)
def test_a_record_that_contradicts_itself_is_broken(
    recorded: Callable[..., tuple[str, ...]], lineage: dict[str, Any], reason: str
) -> None:
    assert recorded(lineage)[0].startswith(f"the record of version 1 {reason}")


def test_a_configuration_that_is_not_the_one_of_its_digest_is_broken(
    world: World, recorded: Callable[..., tuple[str, ...]]
) -> None:
    other = msgspec.structs.replace(world.platform.training_config, seed=7)
    assert recorded({"config": other.document}) == (
        f"the recorded configuration has digest {other.digest}; "
        f"the record says {world.platform.training_config.digest}",
    )
    [reason] = recorded({"config": {**other.document, "folds": "many"}})
    assert reason.endswith(f"; look at it with the code of then, {pipeline.code_version()}")


def test_the_record_keeps_the_configuration_as_it_was(world: World) -> None:
    """Also its digest, although PostgreSQL keeps no order of keys."""
    config = TrainingConfig.load(PROJECT_ROOT / "training.toml")
    with world.platform.database.connect() as connection:
        [document] = connection.execute("SELECT %s", (Jsonb(config.document),)).fetchone() or ()
    assert TrainingConfig.of_document(document) == config
    assert TrainingConfig.of_document(document).digest == config.digest


def test_a_dataset_of_another_size_than_recorded_is_broken(
    world: World, recorded: Callable[..., tuple[str, ...]]
) -> None:
    digest = world.platform.ledger.version(1).dataset_digest
    [reason] = recorded({"dataset": {"digest": digest, "rows": 399}})
    assert reason.endswith(f"{digest}.parquet has 400 rows; the record says 399")


def test_labels_are_looked_for_in_the_month_that_was_recorded_whatever_the_contract_says_now(
    world: World, recorded: Callable[..., tuple[str, ...]]
) -> None:
    ahead = replace(CONTRACT, label_horizon_months=1)
    trace = trace_version(Platform(world.platform.settings, world.platform.database, ahead), 1)
    assert {one.month for one in trace.files} == {"2024-01"}
    assert trace.broken == ()
    missing = "2024-02 has not landed; run: streamflow land FOLDER --month 2024-02"
    assert recorded({"label_month": "2024-02"}) == (missing,)


def test_mlflow_away_is_said(world: World) -> None:
    away = Settings(home=world.platform.settings.home, mlflow_uri="http://127.0.0.1:9", actor="tester")
    with pytest.raises(RegistryUnavailable, match="MLflow does not answer"):
        trace_version(Platform(away, world.platform.database), 1)


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def streamflow(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs a command on the world in this process; gives exit code, stdout and stderr."""
    database = world.platform.database
    monkeypatch.setenv("STREAMFLOW_HOME", str(world.platform.settings.home))
    monkeypatch.setenv("STREAMFLOW_DATABASE_URL", database.url)
    monkeypatch.setenv("STREAMFLOW_OWNER_DATABASE_URL", database.owner_url)

    def run(*arguments: str) -> tuple[int, str, str]:
        before = dict(os.environ)
        monkeypatch.setattr(sys, "argv", ["streamflow", *arguments])
        try:
            with pytest.raises(SystemExit) as ended:
                cli.main()
        finally:
            os.environ.clear()
            os.environ.update(before)
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def test_the_command_prints_the_tree_unwrapped(world: World, streamflow: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = streamflow("trace", "--version", "1")
    assert (code, err) == (0, "")
    assert out.splitlines() == printed(trace_version(world.platform, 1))
    assert max(map(len, out.splitlines())) > 150


def test_the_command_gives_full_digests_as_json(world: World, streamflow: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = streamflow("trace", "--version", "1", "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    version = world.platform.ledger.version(1)
    assert {file["table"]: file["sha256"] for file in told["files"]} == world.first_files
    assert {file["landed_at"] for file in told["files"]} == {LANDED.isoformat()}
    assert told["dataset"]["digest"] == version.dataset_digest
    assert told["artifact"]["sha256"] == version.artifact_sha256
    assert TrainingConfig.of_document(told["training"]["config"]) == world.platform.training_config
    assert {one["relation"]: one["digest"] for one in told["relations"]} == {
        name: source["digest"] for name, source in version.lineage["sources"].items()
    }
    assert [gate["name"] for gate in told["gates"]] == [gate.name for gate in trace_version(world.platform, 1).gates]
    assert told["broken"] == []


def test_the_command_shows_what_there_is_and_fails_when_a_link_is_broken(
    world: World, streamflow: Callable[..., tuple[int, str, str]]
) -> None:
    with moved_away(world.archived("labels")):
        code, out, err = streamflow("trace", "--version", "1")
        json_code, json_out, json_err = streamflow("trace", "--version", "1", "--json")
        [reason] = broken(world)
    assert (code, json_code) == (1, 1)
    assert err == json_err == f"the lineage of version 1 is broken in 1 place:\n  {reason}\n"
    assert out.count("BROKEN") == 1
    assert json.loads(json_out)["broken"] == [reason]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--version", "9"), 1, "there is no version 9; registered are: 1"),
        ((), 2, "give the REQUEST_ID of a prediction or --version N"),
        ((str(ANSWERED), "--version", "1"), 2, "give the REQUEST_ID of a prediction or --version N"),
        (("first",), 2, "Invalid value for 'REQUEST_ID'"),
        ((str(UUID(int=0)),), 1, f"the prediction log has no request {UUID(int=0)}"),
        (("--version", "first"), 2, "Invalid value for '--version'"),
    ],
)
def test_the_command_refuses_what_it_cannot_trace(
    streamflow: Callable[..., tuple[int, str, str]], arguments: tuple[str, ...], code: int, says: str
) -> None:
    ended, out, err = streamflow("trace", *arguments)
    assert (ended, out) == (code, "")
    assert says in err


# --- a prediction -------------------------------------------------------------------------------------------------


def answer(world: World, request_id: UUID, **changes: Any) -> LoggedPrediction:
    """Log what the service would have for the customer whose usage was corrected, before that was."""
    platform = world.platform
    version = platform.ledger.version(1)
    frame = dataset.load(platform.datasets / f"{version.dataset_digest}.parquet", CONTRACT).frame
    user_id = (platform.settings.home / "months" / "2024-01" / USAGE.file).read_text().splitlines()[1].partition(",")[0]
    (features,) = frame[frame["user_id"] == user_id].to_dict("records")
    scorer = pipeline.scorer_of(platform, version)
    names = [feature.name for feature in scorer.features]
    probability = float(scorer.score([[features[name] for name in names]])[0])
    facts = {
        "request_id": str(request_id),
        "answered_at": DECIDED,
        "caller_request_id": "the-callers",
        "user_id": user_id,
        "features_as_of": JANUARY.as_of,
        "features": {name: features[name] for name in names},
        "probability": probability,
        "threshold": 0.5,
        "decision": probability >= 0.5,
        "model_version": 1,
        "run_id": version.run_id,
        "artifact_sha256": version.artifact_sha256,
    }
    answered = LoggedPrediction(**{**facts, **changes})
    with platform.database.connect() as connection:
        connection.execute("SELECT streamflow.make_predictions_partition(%s)", (answered.answered_at.date(),))
        connection.execute(
            "INSERT INTO streamflow.predictions SELECT * "
            "FROM json_populate_record(NULL::streamflow.predictions, %s::json) ON CONFLICT DO NOTHING",
            (msgspec.json.encode(answered).decode(),),
        )
    return answered


@pytest.fixture(scope="module")
def answered(world: World) -> LoggedPrediction:
    return answer(world, ANSWERED)


def test_a_prediction_is_traced_to_its_features_and_its_version(world: World, answered: LoggedPrediction) -> None:
    traced = trace_prediction(world.platform, str(ANSWERED))
    assert (traced.prediction, traced.broken) == (answered, ())
    assert traced.lineage == trace_version(world.platform, 1)
    names = ["users_snapshots", "subscriptions_profile_snapshots", "usage_agg_30d_snapshots"]
    names += ["payments_agg_90d_snapshots", "support_agg_90d_snapshots"]
    found = {one.relation: one for one in traced.snapshots}
    assert sorted(found) == sorted(names)
    usage = found.pop("usage_agg_30d_snapshots")
    assert (usage.month, usage.revision, usage.written_since, usage.changed) == ("2024-01", 2, True, ("skips_7d",))
    assert usage.files["usage_agg_30d"]["digest"] != world.first_files["usage_agg_30d"]
    for one in found.values():
        assert (one.month, one.revision, one.written_since, one.changed) == ("2024-01", 1, False, ())
        assert {name: file["digest"] for name, file in one.files.items()}.items() <= world.first_files.items()
        assert one.files


def test_a_traced_prediction_is_printed(world: World, answered: LoggedPrediction) -> None:
    console = Console(width=400, highlight=False)
    with console.capture() as captured:
        console.print(prediction_as_tree(trace_prediction(world.platform, str(ANSWERED))))
    lines = captured.get().splitlines()
    decision = "churns" if answered.decision else "stays"
    assert lines[0] == f"request {ANSWERED}  {answered.user_id} {decision}"
    assert lines[1] == "├── answered       2024-02-03 12:30:00 UTC, caller's id the-callers"
    assert lines[2] == f"├── probability    {answered.probability!r}, threshold 0.5"
    assert lines[3] == "├── features       as of 2024-01-31"
    (usage,) = [line for line in lines if "usage_agg_30d_snapshots" in line and "other values" in line]
    assert usage.split("2024-01  ")[1] == "revision 2, written since  other values now: skips_7d"
    assert sum(line.endswith("the values that were scored") for line in lines) == 4
    version = printed(trace_version(world.platform, 1))
    assert lines[-len(version) :] == [f"└── {version[0]}", *(f"    {line}" for line in version[1:])]


def test_a_prediction_of_a_month_that_is_gone_or_by_another_scorer(world: World) -> None:
    gone = answer(world, uuid4(), features_as_of=JANUARY.shift(-1).as_of)
    for one in trace_prediction(world.platform, gone.request_id).snapshots:
        assert (one.month, one.revision, one.files, one.written_since) == ("2023-12", 0, {}, True)
        assert set(one.changed) <= set(gone.features)
        assert one.changed

    other = answer(world, uuid4(), artifact_sha256="0" * 64)
    registered = world.platform.ledger.version(1).artifact_sha256
    assert trace_prediction(world.platform, other.request_id).broken == (
        f"request {other.request_id} was answered by scorer {'0' * 64}; version 1 has {registered}",
    )
    with pytest.raises(UnknownPrediction):
        trace_prediction(world.platform, str(UUID(int=0)))


def test_the_command_traces_a_prediction(
    world: World, answered: LoggedPrediction, streamflow: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = streamflow("trace", str(ANSWERED))
    assert (code, err) == (0, "")
    assert out.startswith(f"request {ANSWERED}  {answered.user_id} ")
    code, out, err = streamflow("trace", str(ANSWERED), "--json")
    told = json.loads(out)
    assert (code, err, told["broken"]) == (0, "", [])
    assert told["prediction"]["features"] == answered.features
    assert told["prediction"]["answered_at"] == DECIDED.isoformat()
    assert told["lineage"]["version"] == 1
    assert told["snapshots"][0]["files"]["users"]["digest"] == world.first_files["users"]


def test_the_command_replays(
    world: World, answered: LoggedPrediction, streamflow: Callable[..., tuple[int, str, str]]
) -> None:
    answer(world, uuid4(), answered_at=CORRECTED)
    code, out, err = streamflow("replay", str(ANSWERED))
    assert (code, out, err) == (0, "1 replayed: 1 identical, 0 different, 0 not replayable\n", "")
    code, out, err = streamflow("replay", str(ANSWERED), "--json")
    same = {"probability": answered.probability, "decision": answered.decision}
    told = {"request_id": str(ANSWERED), "identical": True, "logged": same, "replayed": same, "problem": None}
    assert (code, json.loads(out), err) == (0, told, "")
    code, out, err = streamflow("replay", "--all", "--since", CORRECTED.isoformat())
    assert (code, out, err) == (0, "1 replayed: 1 identical, 0 different, 0 not replayable\n", "")

    off = answer(world, uuid4(), probability=answered.probability / 2, answered_at=CORRECTED)
    code, out, err = streamflow("replay", "--all", "--since", CORRECTED.isoformat())
    assert (code, err) == (1, "1 of 2 predictions were not replayed identically\n")
    assert out.splitlines() == [
        "2 replayed: 1 identical, 1 different, 0 not replayable",
        f"  {off.request_id}  logged {off.probability!r}, now {answered.probability!r}",
    ]
    code, out, err = streamflow("replay", "--all", "--json")
    told = json.loads(out)
    logged = sum(map(len, logged_predictions(world.platform.database)))
    assert (code, told["count"], told["different"]) == (1, logged, 1)
    assert off.request_id in [one["request_id"] for one in told["named"]]
    code, out, err = streamflow("replay", "--all", "--since", "2999-01-01")
    assert (code, err) == (1, "nothing was replayed: no prediction is logged since then\n")


@pytest.mark.parametrize(
    "arguments",
    [(), (str(ANSWERED), "--all"), (str(ANSWERED), "--since", "2024-01-01"), ("--since", "2024-01-01"), ("first",)],
)
def test_the_command_refuses_what_it_cannot_replay(
    streamflow: Callable[..., tuple[int, str, str]], arguments: tuple[str, ...]
) -> None:
    code, out, err = streamflow("replay", *arguments)
    assert (code, out) == (2, "")
    assert "REQUEST_ID" in err


def test_a_purged_scorer_is_named(world: World, answered: LoggedPrediction) -> None:
    run_id = world.platform.ledger.version(1).run_id
    (scorer,) = (world.platform.settings.home / "mlflow" / "artifacts").rglob(f"{run_id}/**/{Path(SCORER_PATH).name}")
    with moved_away(scorer), pytest.raises(UnknownVersion, match="what version 1 answered cannot be replayed: "):
        replay(world.platform, str(ANSWERED))


# --- the last ------------------------------------------------------------------------------------------------------


def test_a_version_that_was_deleted_in_mlflow_is_shown_and_broken(world: World) -> None:
    """The last test, as nothing brings it back."""
    import mlflow

    client = mlflow.MlflowClient(world.platform.registry.uri)
    client.delete_model_version(MODEL, "1")
    assert broken(world) == (
        "MLflow has no version 1 of streamflow_churn: it was deleted there and cannot become Production",
    )
    assert printed(trace_version(world.platform, 1))[0] == "version 1  deleted, as of 2024-01-31"
