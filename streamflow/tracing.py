"""Tracing: what a prediction or a version came from, link by link, down to the landed files, and whether each holds.

Following and showing the records that other modules keep belongs here; making anything anew is pipeline.py's.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from psycopg import sql

from streamflow import dataset, pipeline, scoring
from streamflow.contract import AS_OF, SCHEMA, USER_ID, Contract
from streamflow.errors import ConfigurationError, LineageBroken, StreamFlowError, TrainingRefused, UnknownVersion
from streamflow.landing import ArchiveUnusable
from streamflow.months import Month
from streamflow.pipeline import Platform
from streamflow.predictions import LoggedPrediction, logged_prediction
from streamflow.promotion import Entry, Gate, Version, gates_of, in_force
from streamflow.registry import MODEL
from streamflow.training_config import TrainingConfig
from streamflow.warehouse import Source, month_writes

if TYPE_CHECKING:
    from rich.text import Text
    from rich.tree import Tree

DELETED = "deleted"
SHORT = 12
UNKNOWN = "?"
NAMES = 15
"""Columns of the names in the printed form."""


class _Content(msgspec.Struct, frozen=True):
    revision: int
    digest: str


class _DatasetRecord(msgspec.Struct, frozen=True):
    digest: str
    rows: int


class _Origin(msgspec.Struct, frozen=True):
    """What the training recorded of a dataset; each field is a link, and none may be missing or empty."""

    month: str | None = None
    label_month: str | None = None
    dataset: _DatasetRecord | None = None
    sources: dict[str, _Content] = {}
    files: dict[str, _Content] = {}


class _Lineage(_Origin, frozen=True):
    """What the training recorded with a version and its newest dataset; none may be missing, ``earlier`` be empty."""

    as_of: str | None = None
    window: tuple[str, ...] = ()
    window_name: str | None = None
    window_reason: str | None = None
    earlier: tuple[_Origin, ...] | None = None
    estimator: str | None = None
    service: str | None = None
    calibrated: bool | None = None
    config: dict[str, Any] = {}
    config_digest: str | None = None
    services: tuple[str, ...] = ()
    seed: int | None = None
    code_version: str | None = None
    libraries: dict[str, str] = {}
    python: str | None = None


@dataclass(frozen=True)
class TracedRun:
    """The training run in MLflow; ``problems`` here and below say what is missing or altered, and what to do."""

    run_id: str
    link: str
    problems: tuple[str, ...]


@dataclass(frozen=True)
class TracedArtifact:
    """The compiled scorer in MLflow."""

    sha256: str
    problems: tuple[str, ...]


@dataclass(frozen=True)
class TracedTraining:
    """By which configuration and code the version was trained; what the record lacks is None or empty."""

    estimator: str | None
    calibrated: bool | None
    seed: int | None
    window: tuple[str, ...]
    window_name: str | None
    window_reason: str | None
    config_digest: str | None
    config: Mapping[str, Any]
    code_version: str | None
    python: str | None
    libraries: Mapping[str, str]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class TracedDataset:
    """The training dataset of a month and its file."""

    month: str
    digest: str | None
    rows: int | None
    path: Path | None
    problems: tuple[str, ...]


@dataclass(frozen=True)
class TracedRelation:
    """A snapshot, or the labels, as the dataset was made from it; ``files`` names the tables that it was made from.

    ``dataset`` is the month of the dataset. ``replaced_by`` is the revision that the warehouse holds now, where that is
    another content.
    """

    dataset: str
    relation: str
    month: str
    revision: int
    digest: str
    files: tuple[str, ...]
    replaced_by: int | None


@dataclass(frozen=True)
class TracedFile:
    """A landed file, its revision in the landing zone and its bytes in the archive; ``dataset`` as above."""

    dataset: str
    table: str
    file: str
    month: str
    revision: int
    sha256: str
    rows: int | None
    landed_at: str | None
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Trace:
    """Everything that a version came from. ``threshold`` is the one in force, ``decisions`` are the ledger's about it.

    ``dataset`` is of the version's month; ``earlier`` are the datasets, oldest first, that its window was chosen among.
    ``broken`` has what is missing or altered anywhere, and what to do; it is empty when every link holds.
    """

    version: int
    stage: str
    as_of: date
    service: str
    threshold: float
    registered_threshold: float
    registered_at: datetime
    predictions_digest: str
    gates: tuple[Gate, ...]
    artifact: TracedArtifact
    run: TracedRun
    training: TracedTraining
    dataset: TracedDataset
    earlier: tuple[TracedDataset, ...]
    relations: tuple[TracedRelation, ...]
    files: tuple[TracedFile, ...]
    decisions: tuple[Entry, ...]
    broken: tuple[str, ...]


def trace_version(platform: Platform, number: int) -> Trace:
    """Follow a version back to the landed files and look whether each link holds.

    Bytes are verified: those of the compiled scorer, of the dataset and of the archived files. Raises UnknownVersion
    for a version that was never registered, RegistryUnavailable when MLflow does not answer.
    """
    version = platform.ledger.version(number)
    lineage, gaps = _lineage(version, platform.contract)
    registered = platform.registry.versions().get(number)
    if registered is None:
        gaps.append(f"MLflow has no version {number} of {MODEL}: it was deleted there and cannot become Production")
    elif registered.run_id != version.run_id:
        gaps.append(f"MLflow's version {number} is of run {registered.run_id}; the record says {version.run_id}")
    run, artifact = _run(platform, version), _artifact(platform, version)
    training = _training(lineage)
    origins = (lineage, *(lineage.earlier or ()))
    data, *earlier = (_dataset(platform, version, origin) for origin in origins)
    files = tuple(file for origin in origins for file in _files(platform, version, origin))
    entries = platform.ledger.entries()
    problems = [*run.problems, *artifact.problems, *training.problems]
    problems += [problem for one in (data, *earlier) for problem in one.problems]
    problems += [problem for file in files for problem in file.problems]
    return Trace(
        number,
        registered.stage if registered else DELETED,
        version.as_of,
        version.service,
        in_force(entries, version).threshold,
        version.threshold,
        version.registered_at,
        version.predictions_digest,
        gates_of(entries, number),
        artifact,
        run,
        training,
        data,
        tuple(earlier),
        tuple(relation for origin in origins for relation in _relations(platform, version, origin)),
        files,
        tuple(entry for entry in entries if entry.version == number),
        tuple(dict.fromkeys([*gaps, *problems])),
    )


@dataclass(frozen=True)
class TracedSnapshot:
    """A snapshot that features of a prediction come from, as the warehouse holds it now; ``revision`` 0: not at all.

    ``files`` are the landed files that it was made from, by table. ``changed`` names the features that the customer has
    other values of there now than were scored; ``written_since`` tells whether it was written after the answer.
    """

    relation: str
    month: str
    revision: int
    files: Mapping[str, Source]
    written_since: bool
    changed: tuple[str, ...]


@dataclass(frozen=True)
class TracedPrediction:
    """A logged prediction, the snapshots of its features, and everything that the version it was answered by came from.

    ``broken`` has what is missing or altered anywhere; a month that was corrected since is not.
    """

    prediction: LoggedPrediction
    snapshots: tuple[TracedSnapshot, ...]
    lineage: Trace
    broken: tuple[str, ...]


def trace_prediction(platform: Platform, request_id: str) -> TracedPrediction:
    """Follow a logged prediction to its features and its version, and that back to the landed files.

    Raises UnknownPrediction, and what `trace_version` raises.
    """
    prediction = logged_prediction(platform.database, request_id)
    lineage = trace_version(platform, prediction.model_version)
    said = (
        ("scorer", prediction.artifact_sha256, lineage.artifact.sha256),
        ("run", prediction.run_id, lineage.run.run_id),
    )
    other = [
        f"request {request_id} was answered by {name} {logged}; version {lineage.version} has {registered}"
        for name, logged, registered in said
        if logged != registered
    ]
    snapshots = tuple(_snapshots(platform, prediction, lineage.service))
    return TracedPrediction(prediction, snapshots, lineage, (*other, *lineage.broken))


def _snapshots(platform: Platform, prediction: LoggedPrediction, service: str) -> Iterator[TracedSnapshot]:
    month = Month(prediction.features_as_of.year, prediction.features_as_of.month)
    writes = {write.relation: write for write in month_writes(platform.database) if write.month == month}
    logged = prediction.features
    sources: dict[str, list[str]] = {}
    for view in (view for one in platform.contract.services if one.name == service for view in one.views):
        named = sources.setdefault(view.snapshot, [])
        named += [column.name for column in view.columns if column.name in logged]
    for snapshot, names in sources.items():
        write = writes.get(snapshot)
        held = _held(platform, snapshot, names, prediction)
        yield TracedSnapshot(
            snapshot,
            str(month),
            write.revision if write else 0,
            write.sources if write else {},
            write is None or write.written_at > prediction.answered_at,
            tuple(name for name in names if held is None or held[name] != logged[name]),
        )


def _held(
    platform: Platform, snapshot: str, names: Sequence[str], prediction: LoggedPrediction
) -> Mapping[str, object] | None:
    query = sql.SQL("SELECT {} FROM {} WHERE {} = %s AND {} = %s").format(
        sql.SQL(", ").join(map(sql.Identifier, names)),
        sql.Identifier(SCHEMA, snapshot),
        sql.Identifier(AS_OF),
        sql.Identifier(USER_ID),
    )
    with platform.database.connect() as connection:
        row = connection.execute(query, (prediction.features_as_of, prediction.user_id)).fetchone()
    return None if row is None else dict(zip(names, row, strict=True))


def require_whole(trace: Trace | TracedPrediction) -> None:
    """Raise LineageBroken, which names every link that is missing or altered, unless all hold."""
    if trace.broken:
        version = trace.version if isinstance(trace, Trace) else trace.lineage.version
        places = "1 place" if len(trace.broken) == 1 else f"{len(trace.broken)} places"
        reasons = "".join(f"\n  {reason}" for reason in trace.broken)
        raise LineageBroken(f"the lineage of version {version} is broken in {places}:{reasons}")


def _month(version: Version) -> Month:
    return Month(version.as_of.year, version.as_of.month)


def _dataset_month(version: Version, origin: _Origin) -> Month:
    return _month(version) if isinstance(origin, _Lineage) or not origin.month else Month.parse(origin.month)


def _month_of(relation: str, version: Version, origin: _Origin, contract: Contract) -> Month:
    month = _dataset_month(version, origin)
    if relation != contract.label_table.name:
        return month
    return Month.parse(origin.label_month) if origin.label_month else month.shift(contract.label_horizon_months)


def _lineage(version: Version, contract: Contract) -> tuple[_Lineage, list[str]]:
    """The recorded lineage, and what it lacks or contradicts."""
    record = f"the record of version {version.version}"
    try:
        lineage = msgspec.convert(version.lineage, _Lineage)
    except msgspec.ValidationError as error:
        return _Lineage(), [f"{record} cannot be read: {error}; rebuild the version from the landed files"]
    may_be_empty = ("earlier",) if lineage.earlier == () else ()
    gaps = [
        f"{record} lacks {name}"
        for name in _Lineage.__struct_fields__
        if name not in may_be_empty and _is_absent(getattr(lineage, name))
    ]
    services = [service for service in contract.services if service.name == version.service]
    made_from = {contract.label_table.name, *(view.snapshot for service in services for view in service.views)}
    gaps += _gaps(record, "its dataset", lineage, made_from, contract)
    for origin in lineage.earlier or ():
        which = f"the dataset of {origin.month or 'an earlier month'}"
        absent = [name for name in _Origin.__struct_fields__ if _is_absent(getattr(origin, name))]
        gaps += [f"{record} lacks {name} of {which}" for name in absent]
        gaps += _gaps(record, which, origin, made_from, contract)
    said = (
        ("month", lineage.month, str(_month(version))),
        ("as_of", lineage.as_of, str(version.as_of)),
        ("service", lineage.service, version.service),
        ("dataset", lineage.dataset and lineage.dataset.digest, version.dataset_digest),
    )
    gaps += [
        f"{record} says two things of its {name}: {one} and {other}"
        for name, one, other in said
        if one not in (None, other)
    ]
    return lineage, gaps


def _gaps(record: str, which: str, origin: _Origin, made_from: set[str], contract: Contract) -> Iterator[str]:
    for name in sorted(made_from - origin.sources.keys()):
        yield f"{record} does not say from which {name} {which} was made"
    needed = {table for relation in origin.sources for table in _files_of(relation, contract)}
    for name in sorted(needed - origin.files.keys()):
        yield f"{record} does not say from which {name}.csv {which} was made"


def _is_absent(value: object) -> bool:
    return value is None or value in ("", (), {})


def _files_of(relation: str, contract: Contract) -> tuple[str, ...]:
    """The tables that a snapshot is made from, users first; the labels are their own, anything else is not known."""
    users = contract.tables[0].name
    for table in contract.tables:
        if relation == table.snapshot:
            return tuple(dict.fromkeys((users, table.name)))
    return (relation,) if relation == contract.label_table.name else ()


def _run(platform: Platform, version: Version) -> TracedRun:
    run_id = version.run_id
    problems = []
    if not platform.registry.has_run(run_id):
        problems.append(
            f"run {run_id} is gone from MLflow; if it was deleted there, `mlflow runs restore --run-id {run_id}` "
            "brings it back"
        )
    return TracedRun(run_id, pipeline.run_link(platform, run_id), tuple(problems))


def _artifact(platform: Platform, version: Version) -> TracedArtifact:
    state = ""
    try:
        found = scoring.sha256(platform.registry.scorer(version.run_id))
        if found != version.artifact_sha256:
            state = f"altered: it has SHA-256 {found}"
    except UnknownVersion:
        state = "gone"
    problem = f"the compiled scorer of version {version.version} in MLflow is {state}; {_remake(version)}"
    return TracedArtifact(version.artifact_sha256, (problem,) if state else ())


def _remake(version: Version) -> str:
    return f"`streamflow rebuild --version {version.version}` tells whether the archived files still give the same"


def _training(lineage: _Lineage) -> TracedTraining:
    problems = []
    if lineage.config and lineage.config_digest:
        try:
            found = TrainingConfig.of_document(lineage.config).digest
            if found != lineage.config_digest:
                problems.append(
                    f"the recorded configuration has digest {found}; the record says {lineage.config_digest}"
                )
        except ConfigurationError as error:
            problems.append(f"{error}; look at it with the code of then, {lineage.code_version}")
    return TracedTraining(
        **{field.name: getattr(lineage, field.name) for field in fields(TracedTraining) if field.name != "problems"},
        problems=tuple(problems),
    )


def _dataset(platform: Platform, version: Version, origin: _Origin) -> TracedDataset:
    month, record = str(_dataset_month(version, origin)), origin.dataset
    rows = record.rows if record else None
    if isinstance(origin, _Lineage):
        digest, which = version.dataset_digest, "the dataset"
    elif record:
        digest, which = record.digest, f"the dataset of {month}, one of those"
    else:
        return TracedDataset(month, None, None, None, ())
    path = platform.datasets / f"{digest}.parquet"
    problems = []
    try:
        found = len(dataset.load(path, platform.contract).frame)
        if rows not in (None, found):
            problems.append(f"{path} has {found} rows; the record says {rows}")
    except TrainingRefused:
        state = "damaged" if path.exists() else "gone"
        problems.append(f"{path}, {which} of version {version.version}, is {state}; {_remake(version)}")
    return TracedDataset(month, digest, rows, path, tuple(problems))


def _relations(platform: Platform, version: Version, origin: _Origin) -> Iterator[TracedRelation]:
    held = {(write.relation, write.month): write for write in month_writes(platform.database)}
    contract = platform.contract
    for relation in _in_order(origin.sources, [*(table.snapshot for table in contract.snapshots), *_tables(contract)]):
        source = origin.sources[relation]
        month = _month_of(relation, version, origin, contract)
        now = held.get((relation, month))
        yield TracedRelation(
            str(_dataset_month(version, origin)),
            relation,
            str(month),
            source.revision,
            source.digest,
            _files_of(relation, contract),
            now.revision if now and now.digest != source.digest else None,
        )


def _tables(contract: Contract) -> list[str]:
    return [table.name for table in contract.tables]


def _in_order(names: Iterable[str], known: Sequence[str | None]) -> list[str]:
    """The names in the contract's order, then those that it does not know; PostgreSQL keeps none."""
    return sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name))


def _files(platform: Platform, version: Version, origin: _Origin) -> Iterator[TracedFile]:
    for table in _in_order(origin.files, _tables(platform.contract)):
        source = origin.files[table]
        month = _month_of(table, version, origin, platform.contract)
        revision, problems = None, []
        try:
            revisions = platform.landing.manifest(month).tables.get(table, ())
            revision = next(
                (one for one in revisions if (one.revision, one.sha256) == (source.revision, source.digest)), None
            )
            if revision is None:
                problems.append(
                    f"the manifest of {month} has no revision {source.revision} of {table}.csv with SHA-256 "
                    f"{source.digest}; restore it from a backup"
                )
        except StreamFlowError as error:
            problems.append(str(error))
        try:
            platform.landing.archived(month, table, source.digest)
        except ArchiveUnusable as error:
            problems.append(str(error))
        yield TracedFile(
            str(_dataset_month(version, origin)),
            table,
            f"{table}.csv",
            str(month),
            source.revision,
            source.digest,
            revision.rows if revision else None,
            revision.landed_at if revision else None,
            tuple(problems),
        )


# --- for people -----------------------------------------------------------------------------------------------------


def as_tree(trace: Trace) -> "Tree":
    """The trace for a terminal: digests shortened, each file under what was made from it, a mark at what is broken."""
    from rich.text import Text
    from rich.tree import Tree

    tree = Tree(Text(f"version {trace.version}  {trace.stage}, as of {trace.as_of}", style="bold"))
    for name, said, problems in _parts(trace):
        tree.add(_line(f"{name:<{NAMES}}{said}", problems))
    files = dict(zip(trace.files, _padded(map(_told_file, trace.files)), strict=True))
    relations = dict(zip(trace.relations, _padded(map(_told_relation, trace.relations)), strict=True))
    for data in (trace.dataset, *reversed(trace.earlier)):
        branch = tree.add(_line(f"{'dataset':<{NAMES}}{_told_dataset(data)}", data.problems))
        for relation in (one for one in trace.relations if one.dataset == data.month):
            made_from = branch.add(_line(relations[relation]))
            for file in trace.files:
                if (file.dataset, file.table) in {(data.month, table) for table in relation.files[-1:]}:
                    made_from.add(_line(files.pop(file), file.problems))
        for file in [one for one in files if one.dataset == data.month]:
            branch.add(_line(files.pop(file), file.problems))
    decisions = tree.add(_line(f"{'decisions':<{NAMES}}{len(trace.decisions) or 'none yet'}"))
    for said in _padded(map(_told_decision, trace.decisions)):
        decisions.add(_line(said))
    return tree


def prediction_as_tree(traced: TracedPrediction) -> "Tree":
    """The same for a prediction: what was answered and from which features, and below that its version's tree."""
    from rich.text import Text
    from rich.tree import Tree

    one = traced.prediction
    decision = "churns" if one.decision else "stays"
    tree = Tree(Text(f"request {one.request_id}  {one.user_id} {decision}", style="bold"))
    tree.add(_line(f"{'answered':<{NAMES}}{_second(one.answered_at)}, caller's id {one.caller_request_id or 'none'}"))
    tree.add(_line(f"{'probability':<{NAMES}}{one.probability!r}, threshold {one.threshold:g}"))
    features = tree.add(_line(f"{'features':<{NAMES}}as of {one.features_as_of}"))
    for snapshot, said in zip(traced.snapshots, _padded(map(_told_snapshot, traced.snapshots)), strict=True):
        branch = features.add(_line(said))
        for file in _padded((f"{name}.csv", _told_source(source)) for name, source in snapshot.files.items()):
            branch.add(_line(file))
    tree.add(as_tree(traced.lineage))
    return tree


def _told_snapshot(snapshot: TracedSnapshot) -> tuple[str, ...]:
    if not snapshot.revision:
        return (snapshot.relation, snapshot.month, "no longer in the warehouse", "")
    since = ", written since" if snapshot.written_since else ""
    now = f"other values now: {', '.join(snapshot.changed)}" if snapshot.changed else "the values that were scored"
    return (snapshot.relation, snapshot.month, f"revision {snapshot.revision}{since}", now)


def _told_source(source: Source) -> str:
    return f"revision {source['revision']}  {_short(source['digest'])}"


def _parts(trace: Trace) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    """The links from the version to its datasets: what it is, what is said of it, its problems."""
    training = trace.training
    trained = f"seed {_known(training.seed)}, trained on {' '.join(training.window) or UNKNOWN}"
    if trace.earlier:
        trained += f", window “{_known(training.window_name)}”"
    libraries = "".join(f", {name} {version}" for name, version in sorted(training.libraries.items()))
    return (
        ("model", _told_model(trace), ()),
        ("registered", _minute(trace.registered_at), ()),
        ("gates", _told_gates(trace.gates), ()),
        ("artifact", _short(trace.artifact.sha256), trace.artifact.problems),
        ("run", f"{trace.run.run_id}  {trace.run.link}", trace.run.problems),
        ("configuration", f"{_short(training.config_digest)}  {trained}", training.problems),
        ("code", f"{_known(training.code_version)}  Python {_known(training.python)}{libraries}", ()),
    )


def _told_model(trace: Trace) -> str:
    calibrated = ", calibrated" if trace.training.calibrated else ""
    changed = trace.threshold != trace.registered_threshold
    registered = f" (registered with {trace.registered_threshold:g})" if changed else ""
    estimator = _known(trace.training.estimator)
    return f"{estimator} on {trace.service}{calibrated}, threshold {trace.threshold:g}{registered}"


def _told_dataset(data: TracedDataset) -> str:
    rows = UNKNOWN if data.rows is None else f"{data.rows:,}"
    return f"{_short(data.digest)}  {data.month}  {rows} rows"


def _told_gates(gates: tuple[Gate, ...]) -> str:
    failed = [gate.name for gate in gates if not gate.passed]
    if not gates:
        return "not judged yet"
    return f"{len(failed)} of {len(gates)} failed: {', '.join(failed)}" if failed else f"all {len(gates)} passed"


def _told_relation(relation: TracedRelation) -> tuple[str, ...]:
    replaced = f"replaced since by revision {relation.replaced_by}" if relation.replaced_by else ""
    return (relation.relation, relation.month, f"revision {relation.revision}", _short(relation.digest), replaced)


def _told_file(file: TracedFile) -> tuple[str, ...]:
    landed = f"landed {_minute(datetime.fromisoformat(file.landed_at))}" if file.landed_at else "landing unknown"
    rows = UNKNOWN if file.rows is None else f"{file.rows:,}"
    return (file.file, file.month, f"revision {file.revision}", _short(file.sha256), landed, f"{rows} rows")


def _told_decision(entry: Entry) -> tuple[str, ...]:
    override = " (override)" if entry.override else ""
    return (_minute(entry.at), entry.action, f"by {entry.by}", f"{entry.reason}{override}")


def _line(said: str, problems: tuple[str, ...] = ()) -> "Text":
    from rich.text import Text

    text = Text(said.rstrip())
    if problems:
        text.append("  BROKEN", style="bold red")
    return text


def _padded(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Each row as a line, its cells as wide as the widest of their column."""
    cells = list(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]


def _known(value: object) -> str:
    return UNKNOWN if value is None else str(value)


def _short(digest: str | None) -> str:
    return _known(digest)[:SHORT]


def _second(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def _minute(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
