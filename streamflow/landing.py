"""Landing: a month's CSV files are read, validated, archived by SHA-256 and committed, or refused whole.

Here belong the strict CSV reader, the checks derived from the contract, the archive, the manifest of each month and
the quarantine. No database: the landing assets load what `LandingZone.read` returns into the warehouse.

Under the home of an installation::

    archive/sha256/<2 hex>/<sha256>         the bytes of each file ever landed, never changed
    landing/<YYYY-MM>/manifest.json         the revisions of each table; replacing it is the commit
    quarantine/<YYYY-MM>-<digest>/report.json   why a folder was refused
"""

import csv
import hashlib
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from filelock import FileLock

from streamflow.contract import CONTRACT, USER_ID, USER_ID_PATTERN, USERS, Column, Contract, Kind, Table
from streamflow.errors import StreamFlowError, UnknownMonth
from streamflow.files import write_file
from streamflow.months import Month

if TYPE_CHECKING:
    from pandera.errors import SchemaError
    from pandera.pandas import DataFrameSchema

SHOWN_PROBLEMS = 20
SHOWN_USERS = 5
SHOWN_CHARACTERS = 200
LONGEST_LINE = 65_536
LOCK_TIMEOUT_S = 600
HEADER_LINE = 1
_RESTORE = "restore it from a backup, or remove it and land the month again, which starts at revision 1"

Integers = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True)
class Problem:
    """One reason to refuse a folder. ``line`` counts from 1, the header's; ``value`` is the text in the file."""

    file: str
    line: int | None
    column: str | None
    value: str | None
    reason: str


class LandingFailed(StreamFlowError):
    """A folder or the landing zone that cannot be read or written."""


class ArchiveUnusable(StreamFlowError):
    """A manifest or archived file that is gone, altered or does not fit the contract any more."""


class LandingRefused(StreamFlowError):
    """A folder whose files break the contract.

    ``problems`` are the first 20 of ``count``, by file in the contract's order and by line; ``report`` is the
    quarantine report that holds them.
    """

    def __init__(self, folder: Path, month: Month, problems: tuple[Problem, ...], count: int, report: Path) -> None:
        self.problems = problems
        self.count = count
        self.report = report
        more = [f"  and {count - len(problems):,} more"] if count > len(problems) else []
        lines = [
            f"{folder} was refused as {month}: {count:,} problem{'s' if count != 1 else ''}; nothing was changed.",
            *_aligned(problems),
            *more,
            f"Correct the files and land the folder again. The report is {report}",
        ]
        super().__init__("\n".join(lines))


def _aligned(problems: tuple[Problem, ...]) -> list[str]:
    cells = [
        (problem.file, f"line {problem.line}" if problem.line else "", problem.column or "", _because(problem))
        for problem in problems
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)][:-1]
    return ["  " + "  ".join([*map(str.ljust, row, widths), row[-1]]) for row in cells]


def _because(problem: Problem) -> str:
    return problem.reason if problem.value is None else f"{problem.value!r} {problem.reason}"


class Revision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The bytes that a table had from one landing to the next; ``landed_at`` is ISO 8601, UTC.

    ``meanings`` is what the contract took each column to mean then, as `Column.meaning` has it.
    """

    revision: Annotated[int, msgspec.Meta(ge=1)]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    rows: Annotated[int, msgspec.Meta(ge=1)]
    size_bytes: Annotated[int, msgspec.Meta(ge=1)]
    landed_at: str
    meanings: dict[str, str] = {}


class LandingWarning(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Something odd in a month that was accepted: how many rows, users or files, and the first few of them.

    ``table`` is None when the folder itself is meant.
    """

    table: str | None
    column: str | None
    text: str
    count: int
    examples: tuple[str, ...]

    def __str__(self) -> str:
        where = " ".join(part for part in (self.table, self.column) if part) or "the folder"
        more = ", …" if self.count > len(self.examples) > 1 else ""
        return f"{where}: {self.text}: {self.count:,} ({', '.join(self.examples)}{more})"


class MonthManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What has landed for a month: for each table its revisions, the last of which is current."""

    month: str
    tables: dict[str, Annotated[tuple[Revision, ...], msgspec.Meta(min_length=1)]]
    warnings: tuple[LandingWarning, ...]

    def __post_init__(self) -> None:
        for name, revisions in self.tables.items():
            if [revision.revision for revision in revisions] != list(range(1, len(revisions) + 1)):
                raise ValueError(f"the revisions of {name} are not numbered from 1")

    @property
    def current(self) -> dict[str, Revision]:
        """The revision in force of each landed table."""
        return {name: revisions[-1] for name, revisions in self.tables.items()}


@dataclass(frozen=True)
class Landed:
    """What a landing did: the new revision of each table whose bytes changed, and the tables left as they were."""

    month: Month
    changed: dict[str, Revision]
    unchanged: tuple[str, ...]
    manifest: MonthManifest


# --- reading a file ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Finding:
    """One reason that holds on each of ``lines``; ``number`` is the figure, line by line, that completes it."""

    lines: Integers
    column: str | None
    reason: str
    number: Integers | None = None


@dataclass(frozen=True, eq=False)
class Parsed:
    """The rows of a file, in its order, and everything that is wrong with it.

    ``values`` has the contract's columns, typed; ``fields`` the same as text; ``lines`` each row's line. There are no
    rows when the file as a whole cannot be read. A field that is wrong is null in ``values``.
    """

    table: Table
    values: pa.Table
    fields: dict[str, pa.Array]
    lines: Integers
    text: bytes = b""
    general: tuple[Problem, ...] = ()
    findings: tuple[_Finding, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether each line gave a row."""
        return not self.general and all(finding.column for finding in self.findings if len(finding.lines))

    @property
    def count(self) -> int:
        """The number of problems; a field or line with several reasons counts once."""
        return len(self.general) + len(self._places()[0])

    def problems(self, limit: int = SHOWN_PROBLEMS) -> list[Problem]:
        """The first problems by line, then by the contract's order of columns."""
        _, first = self._places()
        starts = np.cumsum([0, *(len(finding.lines) for finding in self.findings)])
        found = []
        for at in first[:limit]:
            which = int(np.searchsorted(starts, at, side="right")) - 1
            found.append(self._problem(self.findings[which], int(at - starts[which])))
        return sorted([*self.general, *found], key=lambda problem: problem.line or 0)[:limit]

    def _places(self) -> tuple[Integers, Integers]:
        """The distinct (line, column) places in order, and the first finding of each among all findings' lines."""
        order = {None: 0} | {column.name: at for at, column in enumerate(self.table.columns, start=1)}
        places = [finding.lines * len(order) + order[finding.column] for finding in self.findings]
        return np.unique(np.concatenate([np.empty(0, np.int64), *places]), return_index=True)

    def _problem(self, finding: _Finding, at: int) -> Problem:
        line = int(finding.lines[at])
        if finding.column is None:
            value = self.text.split(b"\n", line)[line - 1].decode()
        else:
            value = self.fields[finding.column][int(np.searchsorted(self.lines, line))].as_py()
        reason = finding.reason if finding.number is None else f"{finding.reason} {finding.number[at]}"
        return Problem(self.table.file, line, finding.column, _shortened(value), reason)


def parse(data: bytes, table: Table, month: Month) -> Parsed:
    """Read and validate the bytes of one file by itself; nothing is raised for what they hold."""
    parsed = _read(data, table)
    return replace(parsed, findings=(*parsed.findings, *_check(parsed, month)))


def _read(data: bytes, table: Table) -> Parsed:
    text = data.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")
    header, _, body = text.partition(b"\n")
    problems = list(_text_problems(text, table.file)) or list(_header_problems(header, table))
    if not problems and not body:
        problems = [Problem(table.file, HEADER_LINE, None, None, "the file has a header and no rows")]
    if problems:
        return _typed(_Rows({column.name: _no_text() for column in table.columns}, _no_lines(), problems), table, text)
    names = next(csv.reader([header.decode()]))
    rows = _quoted_rows(body, names, table.file) if b'"' in body else _plain_rows(body, names)
    return _typed(rows, table, text)


def _text_problems(text: bytes, file: str) -> Iterator[Problem]:
    """Why the bytes are no complete text file; one reason at most."""
    if not text:
        yield Problem(file, None, None, None, "the file is empty")
    elif (bad := _not_utf8(text)) is not None:
        yield Problem(file, _line(text, bad), None, f"0x{text[bad]:02x}", "is not UTF-8; save the file as UTF-8")
    elif (nul := text.find(b"\0")) >= 0:
        yield Problem(file, _line(text, nul), None, "\0", "is a NUL character, which no text file holds")
    elif not text.endswith(b"\n"):
        last = text.rpartition(b"\n")[2].decode()
        reason = "the file is truncated: its last line does not end in a newline"
        yield Problem(file, _line(text, len(text)), None, _shortened(last), reason)
    elif (bare_return := text.find(b"\r")) >= 0:
        reason = "is a carriage return without a newline; end each line in LF or CRLF"
        yield Problem(file, _line(text, bare_return), None, "\r", reason)


def _not_utf8(text: bytes) -> int | None:
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return error.start
    return None


def _line(text: bytes, at: int) -> int:
    return text.count(b"\n", 0, at) + 1


def _shortened(value: str) -> str:
    return value if len(value) <= SHOWN_CHARACTERS else value[: SHOWN_CHARACTERS - 1] + "…"


def _header_problems(header: bytes, table: Table) -> Iterator[Problem]:
    try:
        names = next(csv.reader([header.decode()], strict=True), [])
    except csv.Error as error:
        yield Problem(table.file, HEADER_LINE, None, _shortened(header.decode()), f"is not a CSV header: {error}")
        return
    expected = [column.name for column in table.columns]
    for at, name in enumerate(names, start=1):
        if not name.strip():
            yield Problem(table.file, HEADER_LINE, None, name, f"column {at} of the header has no name")
    for name in dict.fromkeys(name for name in names if name.strip()):
        if name not in expected:
            yield Problem(table.file, HEADER_LINE, _shortened(name), None, "the contract has no such column")
        elif names.count(name) > 1:
            yield Problem(table.file, HEADER_LINE, name, None, f"the column is there {names.count(name)} times")
    for name in expected:
        if name not in names:
            yield Problem(table.file, HEADER_LINE, name, None, "the column is missing")


@dataclass(frozen=True, eq=False)
class _Rows:
    """The fields, as text, of the lines that have as many as the header."""

    fields: dict[str, pa.Array]
    lines: Integers
    problems: list[Problem] = field(default_factory=list)
    findings: tuple[_Finding, ...] = ()


def _no_lines() -> Integers:
    return np.empty(0, np.int64)


def _no_text() -> pa.Array:
    return pa.array([], pa.string())


def _plain_rows(body: bytes, names: list[str]) -> _Rows:
    """Split lines that hold no quote character, without a loop over them."""
    characters = np.frombuffer(body, np.uint8)
    ends = np.flatnonzero(characters == ord("\n"))
    commas = np.searchsorted(np.flatnonzero(characters == ord(",")), ends)
    counts = np.diff(commas, prepend=0) + 1
    sizes = np.diff(ends, prepend=-1)
    lines = np.arange(len(ends)) + HEADER_LINE + 1
    good = (counts == len(names)) & (sizes <= LONGEST_LINE)
    findings = (_miscounted(lines, counts, names), _overlong(lines, sizes))
    if not good.any():
        return _Rows(dict.fromkeys(names, _no_text()), _no_lines(), findings=findings)
    if not good.all():
        body = characters[np.repeat(good, sizes)].tobytes()
    columns = pyarrow.csv.read_csv(
        pa.BufferReader(body),
        pyarrow.csv.ReadOptions(column_names=names),
        pyarrow.csv.ParseOptions(quote_char=False, ignore_empty_lines=False),
        pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False),
    )
    return _Rows({name: columns[name].combine_chunks() for name in names}, lines[good], findings=findings)


def _quoted_rows(body: bytes, names: list[str], file: str) -> _Rows:
    """Split lines some of which hold quotes; a record that goes on over a line's end is refused."""
    reader = csv.reader(io.StringIO(body.decode(), newline=""), strict=True)
    line = HEADER_LINE + 1
    rows: list[list[str]] = []
    lines: list[int] = []
    problems: list[Problem] = []
    try:
        for row in reader:
            if reader.line_num + HEADER_LINE > line:
                problems.append(_broken_record(row, line, names, file))
            else:
                rows.append(row or [""])
                lines.append(line)
            line = reader.line_num + HEADER_LINE + 1
    except csv.Error as error:
        problems.append(Problem(file, line, None, None, f"the quotes on this line are not closed as in CSV: {error}"))
    counts = np.array([len(row) for row in rows], np.int64)
    numbers = np.array(lines, np.int64)
    columns = list(zip(*(row for row in rows if len(row) == len(names)), strict=True)) or [()] * len(names)
    fields = {name: pa.array(column, pa.string()) for name, column in zip(names, columns, strict=True)}
    return _Rows(fields, numbers[counts == len(names)], problems, (_miscounted(numbers, counts, names),))


def _broken_record(row: list[str], line: int, names: list[str], file: str) -> Problem:
    column, value = next((name, value) for name, value in zip([*names, *row], row, strict=False) if "\n" in value)
    known = column if column in names else None
    return Problem(file, line, known, _shortened(value), "a quoted field must not hold a newline")


def _miscounted(lines: Integers, counts: Integers, names: list[str]) -> _Finding:
    wrong = counts != len(names)
    reason = f"the header has {len(names)} field{'s' if len(names) > 1 else ''}, this line has"
    return _Finding(lines[wrong], None, reason, counts[wrong])


def _overlong(lines: Integers, sizes: Integers) -> _Finding:
    wrong = sizes > LONGEST_LINE
    return _Finding(lines[wrong], None, f"a line has at most {LONGEST_LINE} bytes, this one has", sizes[wrong])


# --- text to values ---------------------------------------------------------------------------------------------


def _typed(rows: _Rows, table: Table, text: bytes) -> Parsed:
    arrays, findings = {}, list(rows.findings)
    for column in table.columns:
        raw = rows.fields[column.name]
        kind, convert, reason = _KINDS[column.kind]
        stated = pc.if_else(pc.equal(raw, ""), pa.scalar(None, pa.string()), raw)
        values = convert(stated)
        wrong = pc.and_(values.is_null(), stated.is_valid()).to_numpy(zero_copy_only=False)
        if wrong.any():
            findings.append(_Finding(rows.lines[wrong], column.name, reason))
        if column.empty_means is not None:
            values = pc.if_else(stated.is_null(), pa.scalar(column.empty_means, kind), values)
        arrays[column.name] = values
    return Parsed(table, pa.table(arrays), rows.fields, rows.lines, text, tuple(rows.problems), tuple(findings))


def _as_text(text: pa.Array) -> pa.Array:
    return text


def _as_booleans(text: pa.Array) -> pa.Array:
    return pc.greater_equal(pc.index_in(text, pa.array(["False", "false", "True", "true"])), 2)


def _as_integers(text: pa.Array) -> pa.Array:
    digits = _matching(text, "^-?[0-9]+$")
    try:
        return digits.cast(pa.int64())
    except pa.ArrowInvalid:
        return pa.array([_int64(value) for value in digits.to_pylist()], pa.int64())


def _int64(digits: str | None) -> int | None:
    magnitude = (digits or "").lstrip("-").lstrip("0") or "0"
    if digits is None or len(magnitude) > len(str(2**63)):
        return None
    value = -int(magnitude) if digits.startswith("-") else int(magnitude)
    return value if -(2**63) <= value < 2**63 else None


def _as_floats(text: pa.Array) -> pa.Array:
    """Arrow rounds correctly (fast_float): the double that Python's ``float`` gives, to the last bit."""
    values = _matching(text, r"^-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?$").cast(pa.float64())
    return pc.if_else(pc.is_finite(values), values, pa.scalar(None, pa.float64()))


def _as_dates(text: pa.Array) -> pa.Array:
    encoded = _matching(text, "^[0-9]{4}-[0-9]{2}-[0-9]{2}$").dictionary_encode()
    return pa.array([_iso_date(value) for value in encoded.dictionary.to_pylist()], pa.date32()).take(encoded.indices)


def _iso_date(value: str) -> date | None:
    try:
        return date.fromisoformat(value)
    except ValueError:
        return None


def _matching(text: pa.Array, pattern: str) -> pa.Array:
    return pc.if_else(pc.match_substring_regex(text, pattern), text, pa.scalar(None, pa.string()))


_KINDS: dict[Kind, tuple[pa.DataType, Callable[[pa.Array], pa.Array], str]] = {
    "id": (pa.string(), _as_text, ""),
    "category": (pa.string(), _as_text, ""),
    "boolean": (pa.bool_(), _as_booleans, "is neither True nor False"),
    "integer": (pa.int64(), _as_integers, "is not a whole number of at most 64 bits"),
    "float": (pa.float64(), _as_floats, "is not a finite decimal number"),
    "date": (pa.date32(), _as_dates, "is not a date written YYYY-MM-DD"),
}


# --- the contract's checks --------------------------------------------------------------------------------------


def frame(values: pa.Table) -> pd.DataFrame:
    """The values as pandas columns on Arrow memory: 64-bit, null where null, nothing converted."""
    typed: pd.DataFrame = values.to_pandas(types_mapper=pd.ArrowDtype)
    return typed


def schema(table: Table, month: Month) -> "DataFrameSchema":
    """The pandera schema of a table's frame, as `frame` makes it: types, keys, bounds, categories, nulls, dates.

    Each check's ``error`` is the reason shown to a person.
    """
    import pandera.pandas as pandera

    return pandera.DataFrameSchema(
        {
            column.name: pandera.Column(
                pd.ArrowDtype(_KINDS[column.kind][0]),
                list(_checks(column, month)),
                nullable=column.nullable,
                unique=column.name == USER_ID,
                report_duplicates="exclude_first",
            )
            for column in table.columns
        },
        strict=True,
        ordered=True,
    )


def _checks(column: Column, month: Month) -> Iterator[Any]:
    from pandera.pandas import Check

    unit = f" {column.unit}".rstrip()
    if column.kind == "id":
        pattern = f"(?:{USER_ID_PATTERN})"
        yield Check(lambda ids: ids.str.fullmatch(pattern), error=f"is not of the form {USER_ID_PATTERN}")
    if column.categories:
        yield Check.isin(column.categories, error=f"is none of: {', '.join(column.categories)}")
    if column.low is not None:
        yield Check.ge(column.low, error=f"is below the least possible, {column.low:,}{unit}")
    if column.high is not None:
        yield Check.le(column.high, error=f"is above the most possible, {column.high:,}{unit}")
    if column.earliest is not None:
        yield Check.ge(column.earliest, error=f"is before {column.earliest}, the earliest possible")
    if column.not_after_as_of:
        yield Check.le(month.as_of, error=f"is after {month.as_of}, the as_of of the month")


def _check(parsed: Parsed, month: Month) -> list[_Finding]:
    from pandera.errors import SchemaErrors

    if not len(parsed.lines):
        return []
    try:
        schema(parsed.table, month).validate(frame(parsed.values), lazy=True, inplace=True)
    except SchemaErrors as refusal:
        return [_finding(error, parsed) for error in refusal.schema_errors]
    return []


def _finding(error: "SchemaError", parsed: Parsed) -> _Finding:
    from pandera.errors import SchemaErrorReason

    column = error.schema.name
    rows = error.failure_cases["index"].to_numpy(np.int64)
    lines = parsed.lines[rows]
    if error.reason_code == SchemaErrorReason.SERIES_CONTAINS_NULLS:
        return _Finding(lines, column, "is empty")
    if error.reason_code == SchemaErrorReason.SERIES_CONTAINS_DUPLICATES:
        ids = parsed.values[column].combine_chunks()
        first = parsed.lines[pc.index_in(ids.take(pa.array(rows)), ids).to_numpy()]
        return _Finding(lines, column, f"is a duplicate {column}: it is already on line", first)
    return _Finding(lines, column, error.check.error)


def _strangers(parsed: Parsed, users: Parsed, earlier: Revision | None) -> Parsed:
    """Add a finding for the rows whose user is not in users.csv."""
    known = pc.is_in(parsed.values[USER_ID], users.values[USER_ID].combine_chunks()).to_numpy()
    reason = f"is not a user of {users.table.file}"
    if earlier is not None:
        reason += f" (this file landed at {earlier.landed_at}; land a corrected one with the others)"
    return replace(parsed, findings=(*parsed.findings, _Finding(parsed.lines[~known], USER_ID, reason)))


def _warnings(parsed: Parsed, users: Parsed) -> Iterator[LandingWarning]:
    """What is odd about a file without problems: each of its users is in users.csv, once."""
    name = parsed.table.name
    if len(parsed.lines) < len(users.lines):
        ids = users.values[USER_ID]
        missing = ids.filter(pc.invert(pc.is_in(ids, parsed.values[USER_ID].combine_chunks()))).to_pylist()
        text = "users without a row, who train nothing" + (" and are answered 422" if parsed.table.snapshot else "")
        yield LandingWarning(name, None, text, len(missing), tuple(sorted(missing)[:SHOWN_USERS]))
    for column in parsed.table.values:
        values = parsed.values[column.name]
        same = pc.all(pc.equal(values, values[0]), skip_nulls=False).as_py() or values.null_count == len(values)
        if same and len(values) > 1:
            text = "rows that all have the same value"
            yield LandingWarning(name, column.name, text, len(values), (str(values[0].as_py()),))


# --- the landing zone -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """A folder's files as read: the bytes of the contract's files by table, and what else is there."""

    folder: Path
    tables: dict[str, bytes]
    irregular: tuple[str, ...]
    unexpected: tuple[str, ...]
    ignored: tuple[str, ...]


class LandingZone:
    """The months that have landed under ``home``."""

    def __init__(self, home: Path, contract: Contract = CONTRACT) -> None:
        self.home = home
        self.contract = contract

    def land(self, folder: Path, month: Month, now: datetime) -> Landed:
        """Validate a month's folder and commit it; ``now`` (with a time zone) becomes ``landed_at`` of what changed.

        The same bytes again change nothing. A table that may come later may be missing, or be alone in the folder
        once the others have landed. Raises LandingRefused for what the files hold, LandingFailed when the folder or
        the landing zone cannot be read or written, ArchiveUnusable; each leaves the month as it was.
        """
        if now.tzinfo is None:
            raise ValueError("now has no time zone")
        try:
            source = self._source(folder)
            lock = self.home / "landing" / ".lock"
            lock.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(lock, timeout=LOCK_TIMEOUT_S):
                return self._land(source, month, now.astimezone(UTC).isoformat())
        except OSError as failure:
            where = f" ({failure.filename})" if failure.filename else ""
            reason = failure.strerror or failure
            raise LandingFailed(f"{folder} did not land as {month}: {reason}{where}; nothing was changed") from failure

    def months(self) -> list[Month]:
        """The months that have landed, in order."""
        return sorted(Month.parse(path.parent.name) for path in self.home.glob("landing/*/manifest.json"))

    def manifest(self, month: Month) -> MonthManifest:
        """What has landed for the month; raises UnknownMonth and ArchiveUnusable."""
        path = self._manifest_path(month)
        try:
            manifest = msgspec.json.decode(path.read_bytes(), type=MonthManifest)
        except FileNotFoundError:
            raise UnknownMonth(f"{month} has not landed; run: streamflow land FOLDER --month {month}") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ArchiveUnusable(f"{path} is damaged: {error}; {_RESTORE}") from error
        if manifest.month != str(month):
            raise ArchiveUnusable(f"{path} is the manifest of {manifest.month}; {_RESTORE}")
        return manifest

    def path(self, month: Month, table_name: str) -> Path:
        """Where the archive keeps the current bytes of a table; raises UnknownMonth if it has not landed."""
        return self._archived(self._current(month, table_name).sha256)

    def read(self, month: Month, table_name: str) -> pa.Table:
        """The current rows of a table, in the file's order, with the contract's columns and 64-bit values.

        Raises UnknownMonth if the table has not landed, ArchiveUnusable if its bytes are not those that landed.
        """
        table = self.contract.table(table_name)
        return self._reread(month, table, self._current(month, table_name).sha256).values

    def read_archived(self, month: Month, table_name: str, sha256: str) -> pa.Table:
        """As `read`, of whatever revision had these bytes, also when another one is current by now."""
        return self._reread(month, self.contract.table(table_name), sha256).values

    def archived(self, month: Month, table_name: str, sha256: str) -> bytes:
        """The bytes that landed as a table of the month; raises ArchiveUnusable if they are gone or others by now."""
        path = self._archived(sha256)
        data = _bytes_if_any(path)
        if data is None or _sha256(data) != sha256:
            state = "gone" if data is None else "damaged"
            raise ArchiveUnusable(f"{path}, the archived {table_name}.csv of {month}, is {state}; land that file again")
        return data

    def _current(self, month: Month, table_name: str) -> Revision:
        current = self.manifest(month).current
        if table_name not in current:
            file = self.contract.table(table_name).file
            raise UnknownMonth(f"{file} of {month} has not landed; run: streamflow land FOLDER --month {month}")
        return current[table_name]

    def _reread(self, month: Month, table: Table, sha256: str) -> Parsed:
        parsed = _read(self.archived(month, table.name, sha256), table)
        if problems := parsed.problems(1):
            reason = f"{problems[0].column or ''} {_because(problems[0])}".strip()
            raise ArchiveUnusable(f"{table.file} of {month} does not fit today's contract: {reason}; land it again")
        return parsed

    def _manifest_path(self, month: Month) -> Path:
        return self.home / "landing" / str(month) / "manifest.json"

    def _archived(self, sha256: str) -> Path:
        return self.home / "archive" / "sha256" / sha256[:2] / sha256

    def _source(self, folder: Path) -> _Source:
        entries = {entry.name: entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")}
        files = {table.file: table.name for table in self.contract.tables}
        regular = [name for name in files if name in entries and entries[name].is_file()]
        others = [name for name in entries if name not in files]
        unexpected = [name for name in others if name.lower().endswith(".csv")]
        return _Source(
            folder,
            {files[name]: entries[name].read_bytes() for name in regular},
            tuple(name for name in files if name in entries and name not in regular),
            tuple(unexpected),
            tuple(name for name in others if name not in unexpected),
        )

    def _land(self, source: _Source, month: Month, landed_at: str) -> Landed:
        old = self._manifest_if_any(month)
        folder_problems = list(self._folder_problems(source, old))
        digests = {name: _sha256(data) for name, data in source.tables.items()}
        meanings = {name: self.contract.table(name).meanings for name in digests}
        same = [
            name
            for name in digests
            if name in old.tables
            and (old.current[name].sha256, old.current[name].meanings) == (digests[name], meanings[name])
        ]
        if not folder_problems and len(same) == len(digests):
            self._archive(source.tables)
            return Landed(month, {}, tuple(old.tables), old)
        files = self._validated(source, month, old)
        self._refuse(source, month, folder_problems, files)
        self._archive(source.tables)
        tables, changed = dict(old.tables), {}
        for name, sha256 in digests.items():
            if name not in same:
                earlier = old.tables.get(name, ())
                size = len(source.tables[name])
                lines = len(files[name].lines)
                changed[name] = Revision(len(earlier) + 1, sha256, lines, size, landed_at, meanings[name])
                tables[name] = (*earlier, changed[name])
        manifest = MonthManifest(str(month), tables, self._all_warnings(source, old, files))
        write_file(self._manifest_path(month), _json(manifest))
        return Landed(month, changed, tuple(name for name in tables if name not in changed), manifest)

    def _manifest_if_any(self, month: Month) -> MonthManifest:
        try:
            return self.manifest(month)
        except UnknownMonth:
            return MonthManifest(str(month), {}, ())

    def _folder_problems(self, source: _Source, old: MonthManifest) -> Iterator[Problem]:
        """Files that are missing, no files, or none of the contract's."""
        for name in source.irregular:
            yield Problem(name, None, None, None, "is not a readable file but a folder, a pipe or a broken link")
        required = {table.name for table in self.contract.tables if not table.may_come_later}
        only_later = bool(source.tables) and not required & source.tables.keys()
        if not (only_later and required <= old.tables.keys()):
            for table in self.contract.tables:
                if table.name in required - source.tables.keys() and table.file not in source.irregular:
                    yield Problem(table.file, None, None, None, "the file is missing")
        for name in source.unexpected:
            yield Problem(name, None, None, None, "is none of the contract's files; rename it or take it away")

    def _validated(self, source: _Source, month: Month, old: MonthManifest) -> dict[str, Parsed]:
        """The folder's files, and those landed before that they must agree with, each with all its findings."""
        files: dict[str, Parsed] = {}
        users_given = USERS.name in source.tables
        for table in self.contract.tables:
            if table.name in source.tables:
                files[table.name] = parse(source.tables[table.name], table, month)
            elif table.name in old.tables and (table.may_come_later if users_given else table.name == USERS.name):
                files[table.name] = self._reread(month, table, old.current[table.name].sha256)
        users = files.get(USERS.name)
        if users is None or not users.complete:
            return files
        return {
            name: file
            if name == USERS.name
            else _strangers(file, users, None if name in source.tables else old.current[name])
            for name, file in files.items()
        }

    def _refuse(self, source: _Source, month: Month, general: list[Problem], files: dict[str, Parsed]) -> None:
        count = len(general) + sum(file.count for file in files.values())
        if not count:
            return
        order = {table.file: at for at, table in enumerate(self.contract.tables)}
        found = [*general, *(problem for file in files.values() if file.count for problem in file.problems())]
        found.sort(key=lambda problem: order.get(problem.file, len(order)))
        problems = tuple(found[:SHOWN_PROBLEMS])
        report = _json(
            {
                "month": str(month),
                "folder": str(source.folder.absolute()),
                "count": count,
                "problems": problems,
                "sha256": {name: _sha256(data) for name, data in source.tables.items()},
            }
        )
        path = self.home / "quarantine" / f"{month}-{_sha256(report)[:12]}" / "report.json"
        write_file(path, report)
        raise LandingRefused(source.folder, month, problems, count, path)

    def _all_warnings(
        self, source: _Source, old: MonthManifest, files: dict[str, Parsed]
    ) -> tuple[LandingWarning, ...]:
        kept = [warning for warning in old.warnings if warning.table not in (None, *files)]
        new = [warning for file in files.values() for warning in _warnings(file, files[USERS.name])]
        if source.ignored:
            text = "files that are no CSV files, ignored"
            new.append(LandingWarning(None, None, text, len(source.ignored), source.ignored[:SHOWN_USERS]))
        return (*kept, *new)

    def _archive(self, tables: dict[str, bytes]) -> None:
        """Keep the bytes of each table; what is there already is compared, and written again if it was damaged."""
        for data in tables.values():
            path = self._archived(_sha256(data))
            if _bytes_if_any(path) != data:
                write_file(path, data, mode=0o444)


# --- files ------------------------------------------------------------------------------------------------------


def folders_in(path: Path, first_month: Month, contract: Contract = CONTRACT) -> list[tuple[Path, Month]]:
    """The months' folders at ``path``, in order: itself if it holds the contract's files, or else its sub-folders.

    Sub-folders named ``YYYY-MM`` are those months; others are taken from ``first_month`` on in the order of their
    names, the numbers in them by value. Hidden folders are left out. Raises LandingFailed when that gives no clear
    answer, also for a single folder that is named as another month than ``first_month``.
    """
    try:
        folders = [entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
        filled = [folder for folder in folders if _has_csv(folder)]
        if any((path / table.file).exists() for table in contract.tables) or (_has_csv(path) and not filled):
            return [(path, _own_month(path, first_month))]
    except OSError as failure:
        raise LandingFailed(f"{path} cannot be read: {failure.strerror}") from failure
    if not filled:
        raise LandingFailed(f"{path} holds no CSV files and no folder with CSV files")
    named = [folder for folder in folders if _names_month(folder)]
    if named:
        if other := _names(set(filled) - set(named)):
            raise LandingFailed(f"some folders of {path} are named YYYY-MM and some are not: {other}; name all or none")
        return sorted(((folder, Month.parse(folder.name)) for folder in named), key=lambda pair: pair[1])
    if empty := _names(set(folders) - set(filled)):
        raise LandingFailed(f"these folders of {path} hold no CSV files: {empty}; fill or remove them")
    ordered = sorted(folders, key=lambda folder: (_natural(folder.name), folder.name))
    return [(folder, first_month.shift(at)) for at, folder in enumerate(ordered)]


def _own_month(folder: Path, month: Month) -> Month:
    if _names_month(folder) and folder.name != str(month):
        raise LandingFailed(f"{folder} is named as another month than {month}; pass the month that it holds")
    return month


def _names(folders: set[Path]) -> str:
    return ", ".join(sorted(folder.name for folder in folders))


def _has_csv(folder: Path) -> bool:
    return any(entry.name.lower().endswith(".csv") and not entry.name.startswith(".") for entry in folder.iterdir())


def _names_month(folder: Path) -> bool:
    return re.fullmatch(r"\d{4}-\d{2}", folder.name, re.ASCII) is not None


def _natural(name: str) -> list[tuple[str, int]]:
    return [(text, int(digits or -1)) for text, digits in re.findall(r"([^0-9]*)([0-9]*)", name)]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _json(content: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(content)) + b"\n"


def _bytes_if_any(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
