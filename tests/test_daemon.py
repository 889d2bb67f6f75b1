"""Whose turn it is. With real daemons: integration/test_two_daemons.py."""

import threading
from collections.abc import Callable
from dataclasses import replace

import psycopg
import pytest

from streamflow.database import Database
from streamflow_dagster import daemon


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "LOOK_S", 0.02)


def test_the_next_has_its_turn_when_the_one_before_is_gone(
    database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    first = daemon.take_turn(database)
    turns: list[psycopg.Connection[tuple[bool]]] = []
    waiting = threading.Thread(target=lambda: turns.append(daemon.take_turn(database)))
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    first.close()
    waiting.join(10)
    assert not turns[0].closed
    turns[0].close()
    assert capsys.readouterr().err.splitlines() == [
        "streamflow daemon: this daemon is at work",
        "streamflow daemon: another daemon is at work on this database; this one waits until it is gone",
        "streamflow daemon: this daemon is at work",
    ]


def test_those_of_other_databases_do_not_wait(database: Database, new_database: Callable[[], Database]) -> None:
    for turn in [daemon.take_turn(one) for one in (database, new_database())]:
        turn.close()


def test_a_database_that_is_away_is_waited_for_and_said_once(
    database: Database, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    addresses = iter([replace(database, url="postgresql://nobody@127.0.0.1:9/none")] * 3 + [database])
    monkeypatch.setattr(Database, "libpq", lambda _, libpq=Database.libpq: libpq(next(addresses)))
    daemon.take_turn(database).close()
    away, at_work = capsys.readouterr().err.splitlines()
    assert away.startswith("streamflow daemon: PostgreSQL does not answer: connection failed")
    assert at_work == "streamflow daemon: this daemon is at work"
