import socket
from collections.abc import Iterator
from urllib.parse import quote

import psycopg
import pytest
import sqlalchemy
from hypothesis import given
from hypothesis import strategies as st
from psycopg.conninfo import conninfo_to_dict

from streamflow.database import Database
from streamflow.errors import WarehouseUnavailable

PASSWORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)


def with_password(password: str, query: str = "") -> Database:
    address = quote(password, safe="")
    return Database(
        f"postgresql://platform:{address}@db.example:5433/name{query}",
        f"postgresql://owner:{address}@db.example:5433/name{query}",
    )


@given(PASSWORDS)
def test_a_password_with_any_characters_reaches_every_driver(password: str) -> None:
    database = with_password(password)
    parts = conninfo_to_dict(database.libpq())
    url = sqlalchemy.make_url(database.sqlalchemy("mlflow"))
    assert (parts["user"], parts["password"], parts["host"], parts["port"]) == (
        "platform",
        password,
        "db.example",
        "5433",
    )
    assert (url.username, url.password, url.host, url.port) == ("platform", password, "db.example", 5433)
    assert parts["dbname"] == url.database == "name"


def test_the_owner_has_an_address_of_its_own() -> None:
    url = sqlalchemy.make_url(with_password("x").sqlalchemy("streamflow", owner=True))
    assert url.username == "owner"


def test_what_the_address_asks_for_is_kept() -> None:
    database = with_password("x", "?sslmode=require&application_name=night%20run&options=-cstatement_timeout%3D5s")
    parts = conninfo_to_dict(database.libpq(lock_timeout="1s"))
    assert (parts["sslmode"], parts["application_name"]) == ("require", "night run")
    assert parts["options"] == "-cstatement_timeout=5s -csearch_path=streamflow -ctimezone=UTC -clock_timeout=1s"


def test_sqlalchemy_speaks_psycopg2_with_the_same_options() -> None:
    url = sqlalchemy.make_url(with_password("x", "?sslmode=require").sqlalchemy("dagster", synchronous_commit="off"))
    assert url.drivername == "postgresql+psycopg2"
    assert url.query == {
        "sslmode": "require",
        "options": "-csearch_path=dagster -ctimezone=UTC -csynchronous_commit=off",
    }


def test_the_server_takes_the_options_from_either_driver(database: Database) -> None:
    ask = (
        "SELECT current_setting('search_path'), current_setting('TimeZone'), current_setting('statement_timeout'), "
        "current_user::text"
    )
    with psycopg.connect(database.libpq("dagster", statement_timeout="7s")) as connection:
        assert connection.execute(ask).fetchone() == ("dagster", "UTC", "7s", "streamflow")
    engine = sqlalchemy.create_engine(
        database.sqlalchemy("mlflow", owner=True, statement_timeout="8s"), poolclass=sqlalchemy.pool.NullPool
    )
    with engine.connect() as pooled:
        assert tuple(pooled.execute(sqlalchemy.text(ask)).one()) == ("mlflow", "UTC", "8s", "streamflow_owner")


@pytest.fixture
def notes(database: Database) -> Iterator[None]:
    with database.connect(owner=True) as connection:
        connection.execute("CREATE SCHEMA streamflow; CREATE TABLE streamflow.notes (text text)")
    yield
    with database.connect(owner=True) as connection:
        connection.execute("DROP SCHEMA streamflow CASCADE")


@pytest.mark.usefixtures("notes")
def test_a_block_is_one_transaction(database: Database) -> None:
    def held() -> list[tuple[str]]:
        with database.connect(owner=True) as connection:
            return connection.execute("SELECT text FROM notes ORDER BY 1").fetchall()

    with database.connect(owner=True) as connection:
        connection.execute("INSERT INTO notes VALUES ('kept')")
        assert held() == []
    assert held() == [("kept",)]

    with pytest.raises(psycopg.errors.DivisionByZero), database.connect(owner=True) as connection:
        connection.execute("INSERT INTO notes VALUES ('lost'); SELECT 1 / 0")
    assert held() == [("kept",)]
    assert connection.closed


def test_a_server_that_is_not_there_is_named_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url = f"postgresql://platform:s3cret@127.0.0.1:{port}/name"
    with (
        pytest.raises(WarehouseUnavailable, match=f"PostgreSQL does not answer: .*port {port}") as refusal,
        Database(url, url).connect(),
    ):
        pytest.fail("nothing listens there")
    assert "s3cret" not in str(refusal.value)


def test_a_wrong_password_is_not_repeated(database: Database) -> None:
    parts = conninfo_to_dict(database.url)
    wrong = f"postgresql://streamflow:s3cret@{parts['host']}:{parts['port']}/{parts['dbname']}"
    with (
        pytest.raises(WarehouseUnavailable, match="password authentication failed") as refusal,
        Database(wrong, wrong).connect(),
    ):
        pytest.fail("the password is wrong")
    assert "s3cret" not in str(refusal.value)


def test_an_error_of_the_block_is_no_missing_server(database: Database) -> None:
    with pytest.raises(psycopg.errors.UndefinedTable), database.connect() as connection:
        connection.execute("SELECT FROM nothing_of_that_name")
