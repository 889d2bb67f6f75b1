import errno
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path

import msgspec
import pandera.errors
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamflow import landing
from streamflow.contract import CONTRACT, LABELS, SUBSCRIPTIONS, USAGE, USERS, Column, Table
from streamflow.errors import UnknownMonth
from streamflow.landing import (
    ArchiveUnusable,
    LandingFailed,
    LandingRefused,
    LandingZone,
    Problem,
    folders_in,
    frame,
    parse,
    schema,
)
from streamflow.months import Month

JANUARY = Month(2024, 1)
NOW = datetime(2024, 2, 3, 4, 5, tzinfo=UTC)
LATER = NOW + timedelta(days=1)
FILES = {
    "users.csv": """user_id,signup_date,user_gender,user_is_senior,has_family,has_dependents
a1,2022-01-05,Female,False,True,False
b2,2022-02-06,Male,True,False,True
c3,2024-01-31,Male,False,False,False
""",
    "subscriptions.csv": """\
user_id,months_active,plan_stream_tv,plan_stream_movies,contract_type,paperless_billing,monthly_fee,total_paid,net_service
a1,1,False,True,Month-to-month,True,29.85,29.85,DSL
b2,34,,,One year,False,56.95,1889.5,No
c3,0,True,False,Two year,true,1e1,0,Fiber optic
""",
    "usage_agg_30d.csv": """\
user_id,watch_hours_30d,avg_session_mins_7d,unique_devices_30d,skips_7d,rebuffer_events_7d
a1,24.483650766787413,29.14104464084511,3,4,1
b2,30.03622768754235,29.14104464084511,1,6,4
c3,0,29.14104464084511,2,0,0
""",
    "payments_agg_90d.csv": "user_id,failed_payments_90d\na1,1\nb2,0\nc3,2\n",
    "support_agg_90d.csv": """user_id,support_tickets_90d,ticket_avg_resolution_hrs_90d
a1,0,16.0
b2,1,8.6
c3,2,13.0
""",
    "labels.csv": "user_id,churn_label\na1,False\nb2,True\nc3,False\n",
}
WITHOUT_LABELS = {name: text for name, text in FILES.items() if name != LABELS.file}


def put(folder: Path, files: dict[str, str] | dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for name, text in files.items():
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


def state(home: Path) -> dict[Path, bytes]:
    """All files under home, except the quarantine and the lock."""
    files = (path for path in home.rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files if "quarantine" not in path.parts and path.name != ".lock"}


@pytest.fixture
def zone(tmp_path: Path) -> LandingZone:
    return LandingZone(tmp_path / "home")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return put(tmp_path / "month", FILES)


def refusal(zone: LandingZone, folder: Path) -> LandingRefused:
    before = state(zone.home)
    with pytest.raises(LandingRefused) as caught:
        zone.land(folder, JANUARY, NOW)
    assert state(zone.home) == before
    return caught.value


# --- a month that is fine ---------------------------------------------------------------------------------------


def test_a_month_lands_with_typed_values_in_file_order(zone: LandingZone, folder: Path) -> None:
    landed = zone.land(folder, JANUARY, NOW)

    assert list(landed.changed) == [table.name for table in CONTRACT.tables]
    assert landed.unchanged == ()
    assert zone.months() == [JANUARY]
    assert zone.manifest(JANUARY) == landed.manifest
    revision = landed.manifest.current["subscriptions"]
    data = FILES["subscriptions.csv"].encode()
    assert (revision.revision, revision.rows, revision.size_bytes) == (1, 3, len(data))
    assert revision.landed_at == "2024-02-03T04:05:00+00:00"
    path = zone.path(JANUARY, "subscriptions")
    assert path == zone.home / "archive" / "sha256" / revision.sha256[:2] / revision.sha256
    assert path.read_bytes() == data
    assert path.stat().st_mode & 0o777 == 0o444
    assert zone.read(JANUARY, "subscriptions").to_pydict() == {
        "user_id": ["a1", "b2", "c3"],
        "months_active": [1, 34, 0],
        "monthly_fee": [29.85, 56.95, 10.0],
        "paperless_billing": [True, False, True],
        "plan_stream_tv": [False, False, True],
        "plan_stream_movies": [True, False, False],
        "net_service": ["DSL", "No", "Fiber optic"],
        "contract_type": ["Month-to-month", "One year", "Two year"],
        "total_paid": [29.85, 1889.5, 0.0],
    }
    assert zone.read(JANUARY, "users")["signup_date"].to_pylist()[2] == date(2024, 1, 31)
    types = [field.type for field in zone.read(JANUARY, "users").schema]
    assert types == [pa.string(), pa.date32(), pa.string(), pa.bool_(), pa.bool_(), pa.bool_()]
    assert {path.name for path in folder.iterdir()} == set(FILES)


def test_a_landing_time_is_kept_in_utc(zone: LandingZone, folder: Path) -> None:
    zone.land(folder, JANUARY, NOW.astimezone(timezone(timedelta(hours=5))))
    assert zone.manifest(JANUARY).current["users"].landed_at == "2024-02-03T04:05:00+00:00"
    with pytest.raises(ValueError, match="time zone"):
        zone.land(folder, JANUARY, datetime(2024, 2, 3))  # noqa: DTZ001


def test_the_same_bytes_again_change_nothing(zone: LandingZone, folder: Path) -> None:
    first = zone.land(folder, JANUARY, NOW)
    before = state(zone.home)
    again = zone.land(folder, JANUARY, LATER)
    assert state(zone.home) == before
    assert (again.changed, again.unchanged) == ({}, tuple(first.changed))
    assert again.manifest == first.manifest


def test_only_a_changed_table_gets_a_revision_and_the_old_bytes_stay(zone: LandingZone, folder: Path) -> None:
    zone.land(folder, JANUARY, NOW)
    old = zone.path(JANUARY, "payments_agg_90d")
    corrected = {**FILES, "payments_agg_90d.csv": FILES["payments_agg_90d.csv"].replace("a1,1", "a1,7")}

    landed = zone.land(put(folder, corrected), JANUARY, LATER)

    assert {name: revision.revision for name, revision in landed.changed.items()} == {"payments_agg_90d": 2}
    assert len(landed.unchanged) == 5
    assert old.read_bytes() == FILES["payments_agg_90d.csv"].encode()
    assert zone.read(JANUARY, "payments_agg_90d")["failed_payments_90d"].to_pylist() == [7, 0, 2]
    assert zone.manifest(JANUARY).current["users"].landed_at == NOW.isoformat()

    back = zone.land(put(folder, FILES), JANUARY, LATER)
    assert [revision.revision for revision in back.manifest.tables["payments_agg_90d"]] == [1, 2, 3]
    assert zone.path(JANUARY, "payments_agg_90d") == old


def test_the_same_bytes_land_anew_where_the_contract_gives_a_column_another_meaning(
    zone: LandingZone, folder: Path
) -> None:
    first = zone.land(folder, JANUARY, NOW)
    subscriptions = CONTRACT.table("subscriptions")
    assert first.manifest.current["subscriptions"].meanings == subscriptions.meanings
    columns = tuple(
        replace(column, unit="cents/month") if column.name == "monthly_fee" else column
        for column in subscriptions.columns
    )
    changed = replace(subscriptions, columns=columns)
    tables = tuple(changed if table is subscriptions else table for table in CONTRACT.tables)
    since = LandingZone(zone.home, replace(CONTRACT, tables=tables))

    again = since.land(folder, JANUARY, LATER)
    assert {name: revision.revision for name, revision in again.changed.items()} == {"subscriptions": 2}
    assert again.changed["subscriptions"].sha256 == first.changed["subscriptions"].sha256
    assert again.changed["subscriptions"].meanings == changed.meanings != subscriptions.meanings
    assert since.land(folder, JANUARY, LATER).changed == {}


def test_months_are_independent_and_listed_in_order(zone: LandingZone, folder: Path) -> None:
    for month in (Month(2024, 2), JANUARY):
        zone.land(folder, month, NOW)
    assert zone.months() == [JANUARY, Month(2024, 2)]
    with pytest.raises(UnknownMonth, match="2024-03 has not landed"):
        zone.manifest(Month(2024, 3))


def test_bom_and_crlf_are_fine_and_keep_the_line_numbers(zone: LandingZone, folder: Path) -> None:
    windows = {name: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode() for name, text in FILES.items()}
    zone.land(put(folder, windows), JANUARY, NOW)
    assert zone.read(JANUARY, "users")["user_id"].to_pylist() == ["a1", "b2", "c3"]

    put(folder, {**windows, "users.csv": windows["users.csv"].replace(b"Male,True", b"Man,True")})
    assert refusal(zone, folder).problems == (
        Problem("users.csv", 3, "user_gender", "Man", "is none of: Female, Male"),
    )


def test_quoted_fields_are_read_as_csv(zone: LandingZone) -> None:
    lines = ['"user_id","churn_label"', '"a1","False"', "b2,True", ""]
    values = parse("\n".join(lines).encode(), LABELS, JANUARY)
    assert values.count == 0
    assert values.values.to_pydict() == {"user_id": ["a1", "b2"], "churn_label": [False, True]}

    city = Column("city", "category", "", categories=("Rome, Italy", 'The "Hague"'))
    table = Table("cities", "", (Column("user_id", "id", ""), city))
    values = parse(b'user_id,city\na1,"Rome, Italy"\nb2,"The ""Hague"""\n', table, JANUARY)
    assert values.count == 0
    assert values.values["city"].to_pylist() == ["Rome, Italy", 'The "Hague"']


# --- labels that come later -------------------------------------------------------------------------------------


def test_labels_may_come_later_and_be_corrected(zone: LandingZone, folder: Path) -> None:
    first = zone.land(put(folder, WITHOUT_LABELS), JANUARY, NOW)
    assert "labels" not in first.manifest.tables
    with pytest.raises(UnknownMonth, match=r"labels.csv of 2024-01 has not landed"):
        zone.read(JANUARY, "labels")

    second = zone.land(put(folder, {"labels.csv": FILES["labels.csv"]}), JANUARY, LATER)
    assert {name: revision.revision for name, revision in second.changed.items()} == {"labels": 1}
    assert second.manifest.warnings == first.manifest.warnings
    assert zone.land(folder, JANUARY, LATER).changed == {}

    put(folder, {"labels.csv": FILES["labels.csv"].replace("a1,False", "a1,True")})
    assert zone.land(folder, JANUARY, LATER).changed["labels"].revision == 2
    assert zone.read(JANUARY, "labels")["churn_label"].to_pylist() == [True, True, False]


def test_labels_alone_are_no_first_landing(zone: LandingZone, folder: Path) -> None:
    put(folder, {"labels.csv": FILES["labels.csv"]})
    refused = refusal(zone, folder)
    missing = [table.file for table in CONTRACT.tables if table is not LABELS]
    assert refused.problems == tuple(Problem(file, None, None, None, "the file is missing") for file in missing)


def test_labels_of_strangers_are_refused_when_they_come_later(zone: LandingZone, folder: Path) -> None:
    zone.land(put(folder, WITHOUT_LABELS), JANUARY, NOW)
    put(folder, {"labels.csv": "user_id,churn_label\na1,False\nzz,True\n"})
    assert refusal(zone, folder).problems == (Problem("labels.csv", 3, "user_id", "zz", "is not a user of users.csv"),)


def test_landed_labels_that_contradict_new_users_refuse_the_landing(zone: LandingZone, folder: Path) -> None:
    zone.land(folder, JANUARY, NOW)
    fewer = {name: "".join(text.splitlines(keepends=True)[:-1]) for name, text in WITHOUT_LABELS.items()}
    refused = refusal(zone, put(folder, fewer))
    assert [(p.file, p.line, p.column, p.value) for p in refused.problems] == [("labels.csv", 4, "user_id", "c3")]
    assert "landed at 2024-02-03T04:05:00+00:00" in refused.problems[0].reason

    fewer["labels.csv"] = FILES["labels.csv"].replace("c3,False\n", "")
    assert set(zone.land(put(folder, fewer), JANUARY, LATER).changed) == set(zone.manifest(JANUARY).tables)


# --- refusals ---------------------------------------------------------------------------------------------------


def edited(name: str, old: str, new: str) -> dict[str, str]:
    assert old in FILES[name]
    return {**FILES, name: FILES[name].replace(old, new, 1)}


IS_NO_INTEGER = "is not a whole number of at most 64 bits"
IS_NO_FLOAT = "is not a finite decimal number"
IS_NO_DATE = "is not a date written YYYY-MM-DD"
VALUES = [
    ("users.csv", "a1,2022", ",2022", 2, "user_id", "", "is empty"),
    ("users.csv", "c3,2024", "a1,2024", 4, "user_id", "a1", "is a duplicate user_id: it is already on line 2"),
    ("users.csv", "2022-01-05", "2022-02-30", 2, "signup_date", "2022-02-30", IS_NO_DATE),
    ("users.csv", "2022-01-05", "05.01.2022", 2, "signup_date", "05.01.2022", IS_NO_DATE),
    ("users.csv", "2022-01-05", "20220105", 2, "signup_date", "20220105", IS_NO_DATE),
    ("users.csv", "2022-01-05", "", 2, "signup_date", "", "is empty"),
    ("users.csv", "2022-01-05", "1999-12-31", 2, "signup_date", "1999-12-31", "is before 2000-01-01, the earliest"),
    ("users.csv", "2024-01-31", "2024-02-01", 4, "signup_date", "2024-02-01", "is after 2024-01-31, the as_of"),
    ("users.csv", "Female", "female", 2, "user_gender", "female", "is none of: Female, Male"),
    ("users.csv", "Female", "", 2, "user_gender", "", "is empty"),
    ("users.csv", "True,False,True", "1,False,True", 3, "user_is_senior", "1", "is neither True nor False"),
    ("users.csv", "True,False,True", "TRUE,False,True", 3, "user_is_senior", "TRUE", "is neither True nor False"),
    ("users.csv", "True,False,True", ",False,True", 3, "user_is_senior", "", "is empty"),
    ("subscriptions.csv", "b2,34", "b2,34.0", 3, "months_active", "34.0", IS_NO_INTEGER),
    ("subscriptions.csv", "b2,34", "b2, 34", 3, "months_active", " 34", IS_NO_INTEGER),
    ("subscriptions.csv", "b2,34", "b2,3_4", 3, "months_active", "3_4", IS_NO_INTEGER),
    ("subscriptions.csv", "b2,34", "b2,+34", 3, "months_active", "+34", IS_NO_INTEGER),
    ("subscriptions.csv", "b2,34", "b2,٣٤", 3, "months_active", "٣٤", IS_NO_INTEGER),
    ("subscriptions.csv", "b2,34", f"b2,{2**63}", 3, "months_active", str(2**63), IS_NO_INTEGER),
    ("subscriptions.csv", "b2,34", "b2,-1", 3, "months_active", "-1", "is below the least possible, 0 months"),
    ("subscriptions.csv", "b2,34", "b2,1201", 3, "months_active", "1201", "is above the most possible, 1,200 months"),
    ("subscriptions.csv", "b2,34", "b2,", 3, "months_active", "", "is empty"),
    ("subscriptions.csv", "56.95", "NaN", 3, "monthly_fee", "NaN", IS_NO_FLOAT),
    ("subscriptions.csv", "56.95", "inf", 3, "monthly_fee", "inf", IS_NO_FLOAT),
    ("subscriptions.csv", "56.95", "-Infinity", 3, "monthly_fee", "-Infinity", IS_NO_FLOAT),
    ("subscriptions.csv", "56.95", "1e999", 3, "monthly_fee", "1e999", IS_NO_FLOAT),
    ("subscriptions.csv", "56.95", "0x1p3", 3, "monthly_fee", "0x1p3", IS_NO_FLOAT),
    ("subscriptions.csv", "56.95", "56.95 ", 3, "monthly_fee", "56.95 ", IS_NO_FLOAT),
    ("subscriptions.csv", "56.95", "1_0.5", 3, "monthly_fee", "1_0.5", IS_NO_FLOAT),
    ("subscriptions.csv", "56.95", "NA", 3, "monthly_fee", "NA", IS_NO_FLOAT),
    ("subscriptions.csv", "56.95", "-0.01", 3, "monthly_fee", "-0.01", "is below the least possible, 0 currency"),
    ("subscriptions.csv", "No\n", "None\n", 3, "net_service", "None", "is none of: DSL, Fiber optic, No"),
    ("usage_agg_30d.csv", "c3,0", "c3,720.5", 4, "watch_hours_30d", "720.5", "is above the most possible, 720 h"),
    ("labels.csv", "c3,", "dd,", 4, "user_id", "dd", "is not a user of users.csv"),
    ("payments_agg_90d.csv", "c3,", "é,", 4, "user_id", "é", "is not of the form"),
    ("payments_agg_90d.csv", "c3,", "c3\u2028,", 4, "user_id", "c3\u2028", "is not of the form"),
    ("payments_agg_90d.csv", "c3,", f"{'c' * 65},", 4, "user_id", "c" * 65, "is not of the form"),
    ("payments_agg_90d.csv", "c3,", "b2,", 4, "user_id", "b2", "is a duplicate user_id: it is already on line 3"),
]


@pytest.mark.parametrize(("name", "old", "new", "line", "column", "value", "reason"), VALUES)
def test_a_wrong_value_is_refused(
    zone: LandingZone, folder: Path, name: str, old: str, new: str, line: int, column: str, value: str, reason: str
) -> None:
    zone.land(folder, JANUARY, NOW)
    refused = refusal(zone, put(folder, edited(name, old, new)))
    first = next(problem for problem in refused.problems if problem.file == name)
    assert (first.line, first.column, first.value) == (line, column, value)
    assert first.reason.startswith(reason)
    assert [problem for problem in refused.problems if problem.file == name] == [first]


def labels(old: str, new: str) -> bytes:
    return edited("labels.csv", old, new)["labels.csv"].encode()


WIDTH = "the header has 2 fields, this line has"
BROKEN = "a quoted field must not hold a newline"
UNCLOSED = "the quotes on this line are not closed"
SHAPES = [
    (b"", None, None, None, "the file is empty"),
    (b"\xef\xbb\xbf", None, None, None, "the file is empty"),
    (b"user_id,churn_label\n", 1, None, None, "the file has a header and no rows"),
    (b"user_id,churn_label", 1, None, "user_id,churn_label", "the file is truncated"),
    (labels("c3,False\n", "c3,False"), 4, None, "c3,False", "the file is truncated"),
    (FILES["labels.csv"].encode().replace(b"b2", b"b\xff"), 3, None, "0xff", "is not UTF-8"),
    (FILES["labels.csv"].encode("utf-16"), 1, None, "0xff", "is not UTF-8"),
    (labels("b2", "b\0"), 3, None, "\0", "is a NUL character"),
    (labels("b2,True\n", "b2,True\r"), 3, None, "\r", "is a carriage return"),
    (labels("b2,True", "b2"), 3, None, "b2", f"{WIDTH} 1"),
    (labels("b2,", "b2,,"), 3, None, "b2,,True", f"{WIDTH} 3"),
    (labels("c3,False\n", "c3,False\n\n"), 5, None, "", f"{WIDTH} 1"),
    (labels("b2,", '"b2",,'), 3, None, '"b2",,True', f"{WIDTH} 3"),
    (labels("b2,True", 'b2,"Tr\nue"'), 3, "churn_label", "Tr\nue", BROKEN),
    (labels("b2,True", 'b2,"Tr\r\nue"'), 3, "churn_label", "Tr\nue", BROKEN),
    (labels("b2,True", 'b2,"True'), 3, None, None, UNCLOSED),
    (labels("b2,True", 'b2,"True"x'), 3, None, None, UNCLOSED),
    (labels("churn_label", "churn"), 1, "churn", None, "the contract has no such column"),
    (labels("churn_label", "user_id"), 1, "user_id", None, "the column is there 2 times"),
    (labels("churn_label", " "), 1, None, " ", "column 2 of the header has no name"),
    (labels("churn_label", '"churn_label'), 1, None, 'user_id,"churn_label', "is not a CSV header"),
    (b"user_id\na1\nb2\nc3\n", 1, "churn_label", None, "the column is missing"),
]


@pytest.mark.parametrize(("data", "line", "column", "value", "reason"), SHAPES)
def test_a_file_of_the_wrong_shape_is_refused(
    zone: LandingZone,
    folder: Path,
    data: bytes,
    line: int | None,
    column: str | None,
    value: str | None,
    reason: str,
) -> None:
    zone.land(folder, JANUARY, NOW)
    (folder / "labels.csv").write_bytes(data)
    first = refusal(zone, folder).problems[0]
    assert (first.file, first.line, first.column, first.value) == ("labels.csv", line, column, value)
    assert first.reason.startswith(reason)


@pytest.mark.parametrize("name", list(WITHOUT_LABELS))
def test_a_missing_file_is_refused(zone: LandingZone, folder: Path, name: str) -> None:
    (folder / name).unlink()
    refused = refusal(zone, folder)
    assert refused.problems == (Problem(name, None, None, None, "the file is missing"),)
    assert zone.months() == []


def test_a_folder_that_is_refused_is_so_with_the_landed_bytes_too(zone: LandingZone, folder: Path) -> None:
    zone.land(folder, JANUARY, NOW)
    (folder / "users.csv").unlink()
    (folder / "user.csv").write_text("x\n")
    assert [problem.file for problem in refusal(zone, folder).problems] == ["users.csv", "user.csv"]


@pytest.mark.parametrize("name", ["labels (1).csv", "extra.CSV", "Users.csv"])
def test_an_unexpected_csv_is_refused_by_name(zone: LandingZone, folder: Path, name: str) -> None:
    (folder / name).write_text("x\n")
    problem = Problem(name, None, None, None, "is none of the contract's files; rename it or take it away")
    assert refusal(zone, folder).problems == (problem,)


def test_other_files_are_ignored_with_a_warning_and_hidden_ones_without(zone: LandingZone, folder: Path) -> None:
    (folder / "README.txt").write_text("x")
    (folder / "old").mkdir()
    (folder / "._users.csv").write_text("x")
    warnings = zone.land(folder, JANUARY, NOW).manifest.warnings
    ignored = [warning for warning in warnings if warning.table is None]
    assert [str(warning) for warning in ignored] == [
        "the folder: files that are no CSV files, ignored: 2 (README.txt, old)"
    ]


def test_all_files_are_checked_and_problems_come_in_order_with_an_exact_count(zone: LandingZone, folder: Path) -> None:
    rows = [f"u{number},x,-1" for number in range(30)]
    bad = {
        **edited("users.csv", "Female,False", "f,0"),
        "support_agg_90d.csv": "user_id,support_tickets_90d,ticket_avg_resolution_hrs_90d\n" + "\n".join(rows) + "\n",
        "labels.csv": "user_id,churn_label\na1,no\nb2,True,\nc3,maybe\n",
    }
    refused = refusal(zone, put(folder, bad))
    assert refused.count == 2 + 30 * 3 + 3
    assert [(p.file, p.line, p.column) for p in refused.problems[:5]] == [
        ("users.csv", 2, "user_gender"),
        ("users.csv", 2, "user_is_senior"),
        ("support_agg_90d.csv", 2, "user_id"),
        ("support_agg_90d.csv", 2, "support_tickets_90d"),
        ("support_agg_90d.csv", 2, "ticket_avg_resolution_hrs_90d"),
    ]
    assert len(refused.problems) == 20
    text = str(refused).splitlines()
    assert text[0] == f"{folder} was refused as 2024-01: 95 problems; nothing was changed."
    assert text[1] == ("  users.csv            line 2  user_gender                    'f' is none of: Female, Male")
    assert text[21] == "  and 75 more"
    assert text[22].endswith(str(refused.report))


def test_a_stray_line_hides_no_other_problem_and_moves_no_line_number(zone: LandingZone, folder: Path) -> None:
    labels = "user_id,churn_label\na1\nb2,yes\nc3,False,x,y\nd4,False\n"
    refused = refusal(zone, put(folder, {**FILES, "labels.csv": labels}))
    assert [(p.line, p.column, p.value) for p in refused.problems] == [
        (2, None, "a1"),
        (3, "churn_label", "yes"),
        (4, None, "c3,False,x,y"),
        (5, "user_id", "d4"),
    ]
    assert refused.count == 4


def test_users_that_cannot_be_told_are_not_missed_in_other_files(zone: LandingZone, folder: Path) -> None:
    refused = refusal(zone, put(folder, edited("users.csv", "b2,2022-02-06,", "b2,")))
    assert [(p.file, p.line) for p in refused.problems] == [("users.csv", 3)]


def test_the_quarantine_report_holds_month_folder_problems_and_digests(zone: LandingZone, folder: Path) -> None:
    put(folder, edited("subscriptions.csv", "29.85", "x"))
    first, again = refusal(zone, folder), refusal(zone, folder)
    assert first.report == again.report
    assert first.report.parent.parent == zone.home / "quarantine"
    assert first.report.parent.name.startswith("2024-01-")
    report = msgspec.json.decode(first.report.read_bytes())
    assert list(report) == ["month", "folder", "count", "problems", "sha256"]
    assert (report["month"], report["folder"], report["count"]) == ("2024-01", str(folder), 1)
    assert report["problems"] == [
        {"file": "subscriptions.csv", "line": 2, "column": "monthly_fee", "value": "x", "reason": IS_NO_FLOAT}
    ]
    assert set(report["sha256"]) == {table.name for table in CONTRACT.tables}


@pytest.mark.parametrize("quote", ["", '"'])
def test_a_very_long_line_is_refused_and_shortened(quote: str) -> None:
    long = "x" * 200_000
    found = parse(f"user_id,churn_label\n{quote}a1{quote},True\nb2,{long}\nc3,True\n".encode(), LABELS, JANUARY)
    problem = found.problems()[0]
    assert (found.count, problem.line) == (1, 3)
    assert len(problem.value or "") <= landing.SHOWN_CHARACTERS


# --- warnings ---------------------------------------------------------------------------------------------------


def test_a_user_without_a_row_and_a_constant_column_are_warned_of(zone: LandingZone, folder: Path) -> None:
    warnings = zone.land(put(folder, edited("support_agg_90d.csv", "b2,1,8.6\n", "")), JANUARY, NOW).manifest.warnings
    assert [str(warning) for warning in warnings] == [
        "usage_agg_30d avg_session_mins_7d: rows that all have the same value: 3 (29.14104464084511)",
        "support_agg_90d: users without a row, who train nothing and are answered 422: 1 (b2)",
    ]
    assert (warnings[1].table, warnings[1].count, warnings[1].examples) == ("support_agg_90d", 1, ("b2",))
    assert zone.manifest(JANUARY).warnings == warnings


def test_warnings_are_those_of_the_current_files(zone: LandingZone, folder: Path) -> None:
    zone.land(put(folder, edited("support_agg_90d.csv", "b2,1,8.6\n", "")), JANUARY, NOW)
    put(folder, {"labels.csv": FILES["labels.csv"].replace("a1,False\n", "")})
    tables = [warning.table for warning in zone.land(folder, JANUARY, LATER).manifest.warnings]
    assert tables == ["usage_agg_30d", "support_agg_90d", "labels"]
    tables = [warning.table for warning in zone.land(put(folder, FILES), JANUARY, LATER).manifest.warnings]
    assert tables == ["usage_agg_30d"]


# --- crashes, damage, concurrency -------------------------------------------------------------------------------


class Crash(BaseException):
    pass


@pytest.mark.parametrize("step", range(7))
def test_a_crash_at_any_replacement_leaves_the_old_month(
    zone: LandingZone, folder: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    zone.land(folder, JANUARY, NOW)
    old = zone.manifest(JANUARY)
    tables = {name: zone.read(JANUARY, name) for name in old.tables}
    renamed = {name: text.replace("a1,", "a9,") for name, text in FILES.items()}
    put(folder, renamed)
    calls = iter(range(100))
    really = os.replace

    def crashing(source: Path, target: Path) -> None:
        if next(calls) == step:
            raise Crash
        really(source, target)

    monkeypatch.setattr(os, "replace", crashing)
    with pytest.raises(Crash):
        zone.land(folder, JANUARY, LATER)
    assert zone.manifest(JANUARY) == old
    assert {name: zone.read(JANUARY, name) for name in old.tables} == tables
    monkeypatch.undo()

    assert len(zone.land(folder, JANUARY, LATER).changed) == 6
    assert zone.read(JANUARY, "labels")["user_id"].to_pylist() == ["a9", "b2", "c3"]
    assert not list(zone.home.rglob("*.unfinished"))


def test_each_file_is_on_disk_before_and_its_name_after_it_is_put_in_place(
    zone: LandingZone, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def logged(name: str, really: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: object) -> None:
            done.append(name)
            really(*arguments)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, logged(name, getattr(os, name)))
    zone.land(folder, JANUARY, NOW)
    zone.land(put(folder, edited("labels.csv", "a1,False", "a1,True")), JANUARY, NOW)
    places = [at for at, name in enumerate(done) if name == "replace"]
    assert len(places) == 7 + 2
    assert done[-1:] == ["fsync"]
    assert all(done[at - 1] == done[at + 1] == "fsync" for at in places)
    assert done[places[-1] - 2 :] == ["fsync", "fsync", "replace", "fsync"]


def test_a_file_that_a_killed_landing_left_behind_is_no_obstacle(zone: LandingZone, folder: Path) -> None:
    zone.land(folder, JANUARY, NOW)
    left = zone.home / "landing" / "2024-01" / ".manifest.json.unfinished"
    left.write_bytes(b"{")
    left.chmod(0o444)
    put(folder, edited("labels.csv", "a1,False", "a1,True"))
    assert set(zone.land(folder, JANUARY, LATER).changed) == {"labels"}
    assert not left.exists()


def test_a_full_disk_is_one_clear_error_and_changes_nothing(
    zone: LandingZone, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone.land(folder, JANUARY, NOW)
    before = state(zone.home)
    put(folder, edited("labels.csv", "a1,False", "a1,True"))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LandingFailed, match=r"did not land as 2024-01: No space left on device; nothing was changed"):
        zone.land(folder, JANUARY, LATER)
    assert state(zone.home) == before


def test_a_folder_that_cannot_be_read_is_one_clear_error(zone: LandingZone, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path, reason in ((file, "Not a directory"), (loop, "symbolic links"), (tmp_path / "none", "No such file")):
        with pytest.raises(LandingFailed, match=reason):
            zone.land(path, JANUARY, NOW)
    assert not zone.home.exists()


def test_a_file_that_cannot_be_read_is_one_clear_error(
    zone: LandingZone, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(LandingFailed, match=r"Permission denied \(.*users.csv\); nothing was changed"):
        zone.land(folder, JANUARY, NOW)


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop", "dangling"])
def test_a_file_that_is_no_file_is_refused(zone: LandingZone, folder: Path, kind: str) -> None:
    path = folder / "labels.csv"
    path.unlink()
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "loop":
            path.symlink_to(path)
        case "dangling":
            path.symlink_to(folder / "none")
    reason = "is not a readable file but a folder, a pipe or a broken link"
    assert refusal(zone, folder).problems == (Problem("labels.csv", None, None, None, reason),)


def test_damaged_bytes_are_noticed_and_healed_by_landing_again(zone: LandingZone, folder: Path) -> None:
    zone.land(folder, JANUARY, NOW)
    path = zone.path(JANUARY, "users")
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b"a1", b"a2"))
    with pytest.raises(ArchiveUnusable, match=r"users.csv of 2024-01, is damaged; land that file again"):
        zone.read(JANUARY, "users")
    assert zone.land(folder, JANUARY, LATER).changed == {}
    assert zone.read(JANUARY, "users")["user_id"].to_pylist() == ["a1", "b2", "c3"]
    path.unlink()
    with pytest.raises(ArchiveUnusable, match=r"is gone"):
        zone.read(JANUARY, "users")
    assert zone.land(folder, JANUARY, LATER).changed == {}
    assert zone.read(JANUARY, "users")["user_id"].to_pylist() == ["a1", "b2", "c3"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"revision": 1', '"revision": 2'),
        ('"month": "2024-01"', '"month": "2024-02"'),
        ('"sha256": "', '"sha256": "../'),
        ('"warnings"', '"warning"'),
        ("{", ""),
    ],
)
def test_a_damaged_manifest_is_a_clear_error(zone: LandingZone, folder: Path, old: str, new: str) -> None:
    zone.land(folder, JANUARY, NOW)
    path = zone.home / "landing" / "2024-01" / "manifest.json"
    path.write_text(path.read_text().replace(old, new, 1))
    for use in (lambda: zone.manifest(JANUARY), lambda: zone.land(folder, JANUARY, LATER)):
        with pytest.raises(ArchiveUnusable, match=r"manifest.json is .*restore it from a backup"):
            use()


def versions(tmp_path: Path, count: int) -> list[Path]:
    return [
        put(tmp_path / f"v{number}", edited("payments_agg_90d.csv", "a1,1", f"a1,{number + 10}"))
        for number in range(count)
    ]


def assert_one_history(zone: LandingZone, count: int) -> None:
    manifest = zone.manifest(JANUARY)
    lengths = {name: len(revisions) for name, revisions in manifest.tables.items()}
    assert lengths == {table.name: count if table.name == "payments_agg_90d" else 1 for table in CONTRACT.tables}
    assert len({revision.sha256 for revision in manifest.tables["payments_agg_90d"]}) == count
    assert all(len(zone.read(JANUARY, name)) == 3 for name in manifest.tables)


def test_parallel_landings_of_threads_end_in_one_history(zone: LandingZone, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda folder: zone.land(folder, JANUARY, NOW), versions(tmp_path, 6)))
    assert_one_history(zone, 6)


def test_parallel_landings_of_processes_end_in_one_history(zone: LandingZone, tmp_path: Path) -> None:
    code = """if True:
        import sys
        from datetime import UTC, datetime
        from pathlib import Path
        from streamflow.landing import LandingZone
        from streamflow.months import Month
        LandingZone(Path(sys.argv[1])).land(Path(sys.argv[2]), Month(2024, 1), datetime(2024, 2, 3, tzinfo=UTC))
    """
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(zone.home), str(folder)]) for folder in versions(tmp_path, 2)
    ]
    assert [process.wait(60) for process in started] == [0, 0]
    assert_one_history(zone, 2)


# --- the contract -----------------------------------------------------------------------------------------------


def test_a_column_added_to_the_contract_is_demanded_and_read(zone: LandingZone, folder: Path) -> None:
    age = Column("age", "integer", "", low=18, nullable=True)
    users = replace(USERS, columns=(*USERS.columns, age))
    grown = LandingZone(zone.home, replace(CONTRACT, tables=(users, *CONTRACT.tables[1:])))
    missing = Problem("users.csv", 1, "age", None, "the column is missing")
    assert refusal(grown, folder).problems == (missing,)

    zone.land(folder, JANUARY, NOW)
    with pytest.raises(ArchiveUnusable, match="does not fit today's contract: age the column is missing"):
        grown.read(JANUARY, "users")
    lines = FILES["users.csv"].splitlines()
    wider = [f"{line},{value}" for line, value in zip(lines, ["age", "18", "", "99"], strict=True)]
    grown.land(put(folder, {**FILES, "users.csv": "\n".join(wider) + "\n"}), JANUARY, LATER)
    assert grown.read(JANUARY, "users")["age"].to_pylist() == [18, None, 99]
    put(folder, {**FILES, "users.csv": "\n".join(wider).replace("99", "17") + "\n"})
    assert [(p.line, p.column, p.value) for p in refusal(grown, folder).problems] == [(4, "age", "17")]


def test_the_schema_judges_any_frame_of_the_table() -> None:
    good = frame(parse(FILES["subscriptions.csv"].encode(), SUBSCRIPTIONS, JANUARY).values)
    schema(SUBSCRIPTIONS, JANUARY).validate(good)
    bad = good.assign(monthly_fee=good["monthly_fee"] - 100)
    with pytest.raises(pandera.errors.SchemaErrors) as caught:
        schema(SUBSCRIPTIONS, JANUARY).validate(bad, lazy=True)
    assert caught.value.failure_cases["index"].tolist() == [0, 1, 2]
    with pytest.raises(pandera.errors.SchemaError):
        schema(SUBSCRIPTIONS, JANUARY).validate(good.drop(columns="monthly_fee"))


# --- folders ----------------------------------------------------------------------------------------------------


def test_folders_in_takes_a_month_or_a_folder_of_months(tmp_path: Path) -> None:
    def months(*names: str, root: str) -> Path:
        for name in names:
            put(tmp_path / root / name, {"labels.csv": "x"})
        return tmp_path / root

    one = months("2024-02", root="one") / "2024-02"
    assert folders_in(one, Month(2024, 2)) == [(one, Month(2024, 2))]
    with pytest.raises(LandingFailed, match="named as another month than 2024-01"):
        folders_in(one, JANUARY)
    own = months("2024-03", "2023-12", ".hidden", root="own")
    (own / "notes").mkdir()
    assert folders_in(own, JANUARY) == [(own / "2023-12", Month(2023, 12)), (own / "2024-03", Month(2024, 3))]
    counted = months("month_10", "month_9", root="counted")
    (counted / "README.md").write_text("x")
    (counted / "truth.csv").write_text("x")
    expected = [(counted / "month_9", Month(2024, 12)), (counted / "month_10", Month(2025, 1))]
    assert folders_in(counted, Month(2024, 12)) == expected


def test_folders_in_refuses_what_is_not_clear(tmp_path: Path) -> None:
    for name in ("2024-01", "february"):
        put(tmp_path / "mixed" / name, {"labels.csv": "x"})
    put(tmp_path / "gap" / "a", {"labels.csv": "x"})
    put(tmp_path / "gap" / "b", {"labels.txt": "x"})
    put(tmp_path / "nothing" / "a", {"labels.txt": "x"})
    for name, reason in (
        ("mixed", "some are not: february"),
        ("gap", "hold no CSV files: b"),
        ("nothing", "holds no CSV files and no folder with CSV files"),
        ("absent", "No such file"),
    ):
        with pytest.raises(LandingFailed, match=reason):
            folders_in(tmp_path / name, JANUARY)


# --- properties -------------------------------------------------------------------------------------------------

ids = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}\Z")


def values_of(column: Column) -> st.SearchStrategy[object]:
    match column.kind:
        case "category":
            return st.sampled_from(column.categories)
        case "boolean":
            return st.booleans()
        case "integer":
            return st.integers(int(column.low or 0), int(column.high or 0))
        case "float":
            return st.floats(column.low, column.high)
        case "date":
            return st.dates(column.earliest or date.min, JANUARY.as_of)
        case _:
            return ids


@st.composite
def tables(draw: st.DrawFn) -> dict[str, dict[str, list[object]]]:
    """A valid month: for each table its columns, users and columns in any order."""
    users = draw(st.lists(ids, min_size=1, max_size=6, unique=True))
    month: dict[str, dict[str, list[object]]] = {}
    for table in CONTRACT.tables:
        order = draw(st.permutations(users))
        columns = {column.name: [draw(values_of(column)) for _ in users] for column in table.values}
        names = draw(st.permutations([column.name for column in table.columns]))
        month[table.name] = {name: list(order) if name == "user_id" else columns[name] for name in names}
    return month


def csv_of(table: dict[str, list[object]], newline: str, quote: str) -> str:
    rows = [list(table), *([str(value) for value in row] for row in zip(*table.values(), strict=True))]
    return "".join(",".join(f"{quote}{field}{quote}" for field in row) + newline for row in rows)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(month=tables(), newline=st.sampled_from(["\n", "\r\n"]), quote=st.sampled_from(["", '"']))
def test_a_valid_month_comes_back_value_for_value(
    tmp_path_factory: pytest.TempPathFactory, month: dict[str, dict[str, list[object]]], newline: str, quote: str
) -> None:
    root = tmp_path_factory.mktemp("month")
    zone = LandingZone(root / "home")
    folder = put(root / "in", {f"{name}.csv": csv_of(table, newline, quote) for name, table in month.items()})
    zone.land(folder, JANUARY, NOW)
    for name, table in month.items():
        read = zone.read(JANUARY, name)
        assert read.column_names == [column.name for column in CONTRACT.table(name).columns]
        for column, values in table.items():
            back = read[column].to_pylist()
            assert [repr(value) for value in back] == [repr(value) for value in values]


@settings(deadline=None)
@given(st.integers(1, 60), st.sampled_from(["\n", "\r\n"]))
def test_a_file_cut_anywhere_but_at_the_end_of_a_line_is_refused(cut: int, newline: str) -> None:
    data = FILES["usage_agg_30d.csv"].replace("\n", newline).encode()
    kept = data[:-cut]
    assert (parse(kept, USAGE, JANUARY).count == 0) == kept.endswith(b"\n")


@settings(max_examples=300, deadline=None)
@given(st.from_regex(r"\A-?[0-9]{1,25}(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,3})?\Z") | st.floats().map(repr))
def test_floats_are_read_as_python_reads_them_to_the_last_bit(text: str) -> None:
    column = Column("x", "float", "")
    table = Table("t", "", (Column("user_id", "id", ""), column))
    found = parse(f"user_id,x\na,{text}\n".encode(), table, JANUARY)
    value = float(text)
    if value in (float("inf"), -float("inf")) or value != value:
        assert [problem.value for problem in found.problems()] == [text]
    else:
        assert found.values["x"][0].as_py().hex() == value.hex()


@settings(max_examples=200, deadline=None)
@given(st.integers(-(2**65), 2**65), st.integers(0, 30))
def test_integers_are_exact_or_refused(value: int, zeros: int) -> None:
    table = Table("t", "", (Column("user_id", "id", ""), Column("x", "integer", "")))
    text = f"{'-' if value < 0 else ''}{'0' * zeros}{abs(value)}"
    found = parse(f"user_id,x\na,{text}\nb,1\n".encode(), table, JANUARY)
    expected = value if -(2**63) <= value < 2**63 else None
    assert found.values["x"].to_pylist() == [expected, 1]
    assert found.count == (expected is None)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.text(st.sampled_from('user_id,churnlabe\n\r"Trueé\0\ufeff ')).map(str.encode))
def test_no_bytes_make_the_reader_fail(data: bytes) -> None:
    for prefix in (b"", b"user_id,churn_label\n"):
        found = parse(prefix + data, LABELS, JANUARY)
        assert found.count == 0 or found.problems()
        assert len(found.problems()) == min(found.count, 20)
        assert found.count or len(found.lines) == (prefix + data).count(b"\n") - 1


# --- the real months --------------------------------------------------------------------------------------------


def test_the_real_january_lands(zone: LandingZone, real_data: Path) -> None:
    landed = zone.land(real_data / "month_000", JANUARY, NOW)
    assert {revision.rows for revision in landed.changed.values()} == {7043}
    subscriptions = zone.read(JANUARY, "subscriptions")
    assert subscriptions["plan_stream_tv"].to_pylist().count(True) == 2707
    assert subscriptions["plan_stream_tv"].null_count == 0
    first = subscriptions.slice(0, 1).to_pylist()[0]
    assert (first["user_id"], first["monthly_fee"]) == ("7590-VHVEG", 29.85)
    assert [(warning.table, warning.column) for warning in landed.manifest.warnings] == [
        ("usage_agg_30d", "avg_session_mins_7d")
    ]


def test_the_real_floats_are_exact(zone: LandingZone, real_data: Path) -> None:
    for table in CONTRACT.tables:
        lines = (real_data / "month_001" / table.file).read_text().splitlines()
        names = lines[0].split(",")
        values = parse((real_data / "month_001" / table.file).read_bytes(), table, Month(2024, 2)).values
        for column in table.columns:
            if column.kind == "float":
                at = names.index(column.name)
                assert values[column.name].to_pylist() == [float(line.split(",")[at]) for line in lines[1:]]


def test_the_real_february_lands_after_january(zone: LandingZone, real_data: Path) -> None:
    months = folders_in(real_data, JANUARY)
    assert months == [(real_data / "month_000", JANUARY), (real_data / "month_001", Month(2024, 2))]
    for folder, month in months:
        zone.land(folder, month, NOW)
    january, february = (zone.manifest(month).current for month in zone.months())
    same = [name for name in january if january[name].sha256 == february[name].sha256]
    assert same == ["users", "subscriptions"]
