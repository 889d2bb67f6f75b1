"""The contract itself, and that what is added to it shows up in everything that derives from it."""

import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from litestar.testing import TestClient

from serving.app import create_app
from streamflow import features, landing, registry, simulate, training, warehouse
from streamflow.contract import AS_OF, CONTRACT, MONTH, USER_ID, Column, Contract, Table
from streamflow.database import Database
from streamflow.months import Month
from streamflow.settings import PROJECT_ROOT, Settings

JANUARY = Month(2024, 1)
NOW = datetime(2024, 2, 3, 4, 5, tzinfo=UTC)
POSTGRES_TYPES = {
    "id": "text",
    "category": "text",
    "boolean": "boolean",
    "integer": "bigint",
    "float": "double precision",
    "date": "date",
}

LOYALTY = Column("loyalty_points", "float", "Points collected.", unit="points", low=0, high=500, view="subs_profile_fv")
SCREEN = Column(
    "main_screen", "category", "Where most is watched.", categories=("TV", "Phone"), view="usage_agg_30d_fv"
)


def with_columns(contract: Contract, **added: Column) -> Contract:
    """The contract with one more column at the end of each of these tables."""
    tables = [
        replace(table, columns=(*table.columns, added[table.name])) if table.name in added else table
        for table in contract.tables
    ]
    return replace(contract, tables=tuple(tables))


WIDER = with_columns(CONTRACT, subscriptions=LOYALTY, usage_agg_30d=SCREEN)
SERVICE = WIDER.service("churn_v1")


# --- the contract -----------------------------------------------------------------------------------------------


def test_the_names_that_others_depend_on() -> None:
    assert [table.name for table in CONTRACT.tables] == [
        "users",
        "subscriptions",
        "usage_agg_30d",
        "payments_agg_90d",
        "support_agg_90d",
        "labels",
    ]
    assert [table.snapshot for table in CONTRACT.snapshots] == [
        "users_snapshots",
        "subscriptions_profile_snapshots",
        "usage_agg_30d_snapshots",
        "payments_agg_90d_snapshots",
        "support_agg_90d_snapshots",
    ]
    assert {view.name: [column.name for column in view.columns] for view in CONTRACT.views} == {
        "subs_profile_fv": [
            "months_active",
            "monthly_fee",
            "paperless_billing",
            "plan_stream_tv",
            "plan_stream_movies",
            "net_service",
        ],
        "usage_agg_30d_fv": [
            "watch_hours_30d",
            "avg_session_mins_7d",
            "unique_devices_30d",
            "skips_7d",
            "rebuffer_events_7d",
        ],
        "payments_agg_90d_fv": ["failed_payments_90d"],
        "support_agg_90d_fv": ["support_tickets_90d", "ticket_avg_resolution_hrs_90d"],
        "contract_fv": ["contract_type", "total_paid"],
        "customer_fv": ["user_gender", "user_is_senior", "has_family", "has_dependents"],
    }
    assert [service.name for service in CONTRACT.services] == ["churn_v1", "churn_v2", "churn_v2_protected"]
    assert (CONTRACT.label_table.name, CONTRACT.label) == ("labels", "churn_label")
    assert CONTRACT.label_horizon_months == 0


def test_a_service_takes_its_views_in_order_and_protected_columns_only_where_it_says_so() -> None:
    features = [column.name for view in CONTRACT.views for column in view.columns]
    assert [column.name for column in CONTRACT.features] == features
    assert len(features) == 20
    first, second, protected = CONTRACT.services
    assert first.names == features[:14]
    assert second.names == [*features[:16], "has_family", "has_dependents"]
    assert protected.names == features
    assert [service.protected for service in CONTRACT.services] == [(), (), ("user_gender", "user_is_senior")]
    for service in CONTRACT.services:
        assert [column.name for column in service.columns] == service.names
        assert service.columns == tuple(column for view in service.views for column in service.columns_of(view))


def test_every_customer_has_a_snapshot_of_who_they_are() -> None:
    assert CONTRACT.snapshots[0] is CONTRACT.tables[0]
    assert CONTRACT.view("customer_fv").snapshot == "users_snapshots"


@pytest.mark.parametrize(
    ("changes", "shifts"),
    [
        ({"kind": "integer"}, True),
        ({"unit": "dozens"}, True),
        ({"description": "Points spent."}, True),
        ({"name": "loyalty"}, True),
        ({"kind": "category", "categories": ("few", "many")}, True),
        ({"kind": "boolean", "empty_means": True}, True),
        ({"low": -1, "high": 501}, False),
        ({"nullable": True}, False),
        ({"view": None}, False),
        ({"protected": True}, False),
    ],
)
def test_what_makes_a_column_mean_something_else(changes: dict[str, Any], shifts: bool) -> None:
    changed = replace(LOYALTY, **changes)
    assert (changed.meaning != LOYALTY.meaning) == shifts


def test_meanings_differ_and_stay() -> None:
    boolean = replace(LOYALTY, kind="boolean")
    meanings = {replace(boolean, empty_means=empty).meaning for empty in (None, False, True)}
    meanings |= {replace(SCREEN, categories=of).meaning for of in (("TV", "Phone"), ("Phone", "TV"), ("TV",))}
    assert len(meanings) == 6
    assert CONTRACT.table("usage_agg_30d").values[0].meaning == "e37a7b4302d9"


def test_the_contract_states_the_columns_of_the_real_files(real_data: Path) -> None:
    for folder in ("month_000", "month_001"):
        for table in CONTRACT.tables:
            header = (real_data / folder / table.file).read_text().partition("\n")[0]
            assert sorted(header.split(",")) == sorted(column.name for column in table.columns)


def test_every_column_says_what_it_is() -> None:
    columns = [column for table in CONTRACT.tables for column in table.columns]
    assert [column.name for column in columns if not column.description.endswith(".")] == []
    numbers = [column for column in columns if column.kind in ("integer", "float")]
    assert [column.name for column in numbers if not column.unit or column.low is None or column.high is None] == []


@pytest.mark.parametrize("look_up", [CONTRACT.table, CONTRACT.view, CONTRACT.service])
def test_an_unknown_name_is_a_key_error(look_up: Callable[[str], object]) -> None:
    with pytest.raises(KeyError, match="nothing"):
        look_up("nothing")


def _changed(table_name: str, **changes: Any) -> tuple[Table, ...]:
    return tuple(replace(table, **changes) if table.name == table_name else table for table in CONTRACT.tables)


@pytest.mark.parametrize(
    ("contradiction", "message"),
    [
        (
            lambda: with_columns(CONTRACT, usage_agg_30d=CONTRACT.table("subscriptions").values[0]),
            "columns stated twice in the contract: months_active",
        ),
        (lambda: with_columns(CONTRACT, users=Column("month", "integer", "")), "stated twice in the contract: month"),
        (lambda: with_columns(CONTRACT, usage_agg_30d=Column("as_of", "date", "")), "stated twice .*: as_of"),
        (
            lambda: with_columns(CONTRACT, payments_agg_90d=replace(LOYALTY, view="subs_profile_fv")),
            "subs_profile_fv must take its columns from one table",
        ),
        (
            lambda: replace(CONTRACT, tables=_changed("subscriptions", snapshot=None)),
            "subs_profile_fv must take its columns from one table that has a snapshot",
        ),
        (
            lambda: replace(CONTRACT, view_descriptions={**CONTRACT.view_descriptions, "empty_fv": "Of no column."}),
            "empty_fv must take its columns from one table",
        ),
        (
            lambda: with_columns(CONTRACT, subscriptions=replace(LOYALTY, view="subs_profil_fv")),
            "feature views that the contract does not describe: subs_profil_fv",
        ),
        (
            lambda: replace(CONTRACT, service_views={"churn_v1": ("subs_profile_fv", "lost_fv")}),
            "feature views that the contract does not describe: lost_fv",
        ),
        (lambda: replace(CONTRACT, service_descriptions={}), "must describe each feature service"),
        (
            lambda: replace(CONTRACT, services_with_protected=frozenset({"churn_v3"})),
            "feature services that the contract does not describe: churn_v3",
        ),
        (lambda: replace(CONTRACT, label="churned"), "no table of the contract has the label churned"),
        (lambda: replace(SCREEN, categories=()), "main_screen: a category has categories"),
        (lambda: replace(LOYALTY, categories=("few", "many")), "loyalty_points: a category has categories"),
        (lambda: replace(LOYALTY, empty_means=False), "loyalty_points: only for a boolean"),
        (lambda: replace(LOYALTY, low=501), "loyalty_points: nothing is both at least 501 and at most 500"),
        (lambda: replace(LOYALTY, kind="date"), "loyalty_points: a model takes no date"),
    ],
)
def test_contradictions_are_refused(contradiction: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        contradiction()


# --- a column more ----------------------------------------------------------------------------------------------


def test_the_views_and_the_service_have_it_in_order() -> None:
    before = [column.name for column in CONTRACT.service("churn_v1").columns]
    assert [column.name for column in SERVICE.columns] == [
        *before[:6],
        "loyalty_points",
        *before[6:11],
        "main_screen",
        *before[11:],
    ]
    assert [column.name for column in WIDER.view("subs_profile_fv").columns][-1] == "loyalty_points"


Ddl = dict[str, dict[str, tuple[str, str]]]


def ddl(database: Database) -> Ddl:
    """Type and nullability of each column of each table in the schema streamflow."""
    with database.connect() as connection:
        rows = connection.execute(
            "SELECT table_name, column_name, data_type, is_nullable FROM information_schema.columns "
            "WHERE table_schema = 'streamflow' ORDER BY table_name, ordinal_position"
        ).fetchall()
    found: Ddl = {}
    for table, column, kind, nullable in rows:
        found.setdefault(table, {})[column] = (kind, nullable)
    return found


def stated(table: Table, *, snapshot: bool) -> dict[str, tuple[str, str]]:
    key = {AS_OF: ("date", "NO")} if snapshot else {MONTH: ("text", "NO")}
    return {
        **key,
        USER_ID: ("text", "NO"),
        **{
            column.name: (POSTGRES_TYPES[column.kind], "YES" if column.nullable or snapshot else "NO")
            for column in table.values
        },
    }


def test_a_new_warehouse_has_it(new_database: Callable[[], Database]) -> None:
    database = new_database()
    warehouse.migrate(database, WIDER)
    made = ddl(database)
    for table in WIDER.tables:
        assert made[table.name] == stated(table, snapshot=False)
    for table in WIDER.snapshots:
        assert made[str(table.snapshot)] == stated(table, snapshot=True)
    assert made["subscriptions"]["loyalty_points"] == ("double precision", "NO")


def landed(home: Path, folder: Path, contract: Contract) -> landing.LandingZone:
    zone = landing.LandingZone(home, contract)
    zone.land(folder, JANUARY, NOW)
    return zone


def test_an_existing_warehouse_gets_it(database: Database, tmp_path: Path) -> None:
    """And the months that it holds stay as they are, until they land again."""
    warehouse.migrate(database)
    table = CONTRACT.table("subscriptions")
    [folder] = simulate.simulate(tmp_path / "before", [JANUARY], users=20)
    old_rows = landed(tmp_path / "home", folder, CONTRACT).read(JANUARY, table.name)
    warehouse.write_month(
        database, table, JANUARY, old_rows, digest="0" * 64, revision=1, meanings=table.meanings, now=NOW
    )

    assert warehouse.migrate(database, WIDER) == [
        f"added {relation}; months landed before carry no value until landed again"
        for relation in (
            "subscriptions.loyalty_points",
            "subscriptions_profile_snapshots.loyalty_points",
            "usage_agg_30d.main_screen",
            "usage_agg_30d_snapshots.main_screen",
        )
    ]
    assert warehouse.migrate(database, WIDER) == []
    made = ddl(database)
    assert made["subscriptions"]["loyalty_points"] == ("double precision", "YES")
    assert made["usage_agg_30d_snapshots"]["main_screen"] == ("text", "YES")
    with database.connect() as connection:
        count = "SELECT count(*), count(monthly_fee), count(loyalty_points) FROM subscriptions"
        assert connection.execute(count).fetchone() == (20, 20, 0)

    [folder] = simulate.simulate(tmp_path / "after", [JANUARY], users=20, contract=WIDER)
    new_rows = landed(tmp_path / "new home", folder, WIDER).read(JANUARY, table.name)
    warehouse.write_month(
        database,
        WIDER.tables[1],
        JANUARY,
        new_rows,
        digest="1" * 64,
        revision=2,
        meanings=WIDER.tables[1].meanings,
        now=NOW,
    )
    with database.connect() as connection:
        assert connection.execute(count).fetchone() == (20, 20, 20)


def test_the_csv_check_demands_and_bounds_it() -> None:
    usage, subscriptions = WIDER.table("usage_agg_30d"), WIDER.table("subscriptions")
    assert list(landing.schema(usage, JANUARY).columns)[-1] == "main_screen"
    old_header = ",".join(column.name for column in CONTRACT.table("usage_agg_30d").columns)
    [missing] = landing.parse(f"{old_header}\na,1,1,1,1,1\n".encode(), usage, JANUARY).problems()
    assert (missing.column, missing.reason) == ("main_screen", "the column is missing")

    [unknown] = landing.parse(f"{old_header},main_screen\na,1,1,1,1,1,Watch\n".encode(), usage, JANUARY).problems()
    assert (unknown.line, unknown.column, unknown.value) == (2, "main_screen", "Watch")
    assert unknown.reason == "is none of: TV, Phone"

    header = ",".join(column.name for column in subscriptions.columns)
    row = "a,1,2.5,True,True,True,DSL,One year,10,500.5"
    [above] = landing.parse(f"{header}\n{row}\n".encode(), subscriptions, JANUARY).problems()
    assert (above.line, above.column, above.value) == (2, "loyalty_points", "500.5")
    assert above.reason == "is above the most possible, 500 points"


def test_the_simulators_files_hold_it_and_land(tmp_path: Path) -> None:
    [before] = simulate.simulate(tmp_path / "before", [JANUARY], users=50)
    [after] = simulate.simulate(tmp_path / "after", [JANUARY], users=50, contract=WIDER)
    for table in WIDER.tables:
        old, new = pd.read_csv(before / table.file), pd.read_csv(after / table.file)
        pd.testing.assert_frame_equal(old, new[old.columns])
        assert list(new.columns) == [column.name for column in table.columns]
    assert pd.read_csv(after / "subscriptions.csv")["loyalty_points"].between(0, 500).all()
    assert set(pd.read_csv(after / "usage_agg_30d.csv")["main_screen"]) == {"TV", "Phone"}
    assert landed(tmp_path / "home", after, WIDER).manifest(JANUARY).current["usage_agg_30d"].rows == 50


def test_feast_has_a_64_bit_field_of_it() -> None:
    views = {view.name: view for view in features.feature_views(WIDER)}
    from feast.types import Float64, String

    for view in WIDER.views:
        assert [field.name for field in views[view.name].features] == [column.name for column in view.columns]
    assert views["subs_profile_fv"].features[-1].dtype == Float64
    assert views["subs_profile_fv"].features[-1].tags == {"unit": "points"}
    assert views["usage_agg_30d_fv"].features[-1].dtype == String
    for service, made in zip(WIDER.services, features.feature_services(WIDER), strict=True):
        served = [field.name for projection in made.feature_view_projections for field in projection.features]
        assert served == service.names
        assert "loyalty_points" in served


def test_training_takes_it_as_number_or_category() -> None:
    schema = training.feature_schema(SERVICE)
    assert schema["categorical"] == ["net_service", "main_screen"]
    assert schema["numeric"] == [column.name for column in SERVICE.columns if column.kind != "category"]
    assert "loyalty_points" in schema["numeric"]
    assert {feature["name"]: feature["view"] for feature in schema["features"]}["main_screen"] == "usage_agg_30d_fv"
    encoded = training.encoded_columns(SERVICE)
    assert [pair for pair in encoded if pair[0] == "main_screen"] == [("main_screen", "TV"), ("main_screen", "Phone")]


def test_the_models_signature_has_it() -> None:
    inputs = registry.signature(SERVICE).inputs
    assert inputs.input_names() == [column.name for column in SERVICE.columns]
    types = dict(zip(inputs.input_names(), [kind.name for kind in inputs.input_types()], strict=True))
    assert (types["loyalty_points"], types["main_screen"]) == ("double", "string")


def test_the_api_describes_it(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, database_url="postgresql://nobody@127.0.0.1:1/none")
    client = TestClient(create_app(settings, contract=WIDER))
    schemas = client.app.openapi_schema.to_schema()["components"]["schemas"]
    services = schemas["Prediction"]["properties"]["features_used"]["anyOf"]
    assert [service["title"] for service in services] == [service.name for service in WIDER.services]
    for service, described in zip(WIDER.services, services, strict=True):
        assert list(described["properties"]) == described["required"] == service.names
    described = services[0]
    assert described["properties"]["loyalty_points"] == {
        "type": "number",
        "description": "Points collected. [points]",
        "minimum": 0,
        "maximum": 500,
    }
    assert list(described["properties"]["main_screen"]["enum"]) == ["TV", "Phone"]


# --- nowhere else -----------------------------------------------------------------------------------------------


def test_no_other_module_spells_a_columns_name() -> None:
    names = {column.name for table in CONTRACT.tables for column in table.values}
    spelled = re.compile(rf"\b({'|'.join(map(re.escape, sorted(names)))})\b")
    packages = ("streamflow", "streamflow_dagster", "serving", "feature_repo")
    sources = [
        path
        for package in packages
        for suffix in ("*.py", "*.yaml", "*.toml", "*.sql")
        for path in sorted((PROJECT_ROOT / package).rglob(suffix))
    ]
    found = {path.relative_to(PROJECT_ROOT).as_posix(): spelled.findall(path.read_text()) for path in sources}
    assert len(found) > 20
    assert set(found["streamflow/contract.py"]) == names
    assert [name for name, hits in found.items() if hits] == ["streamflow/contract.py", "streamflow/simulate.py"]
