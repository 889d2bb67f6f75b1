"""Dagster's daemon as a service: of those that are started on a database one is at work, and the others wait.

Dagster supports one daemon only and prevents no other: two of them ask for the same runs and overwrite each other's
cursors. A lock in the database, held as long as the process lives, says whose turn it is.
"""

import os
import sys
import threading
import time
from importlib.metadata import entry_points

import psycopg

from streamflow.database import CONNECT_TIMEOUT_S, Database
from streamflow.embedded import postgres
from streamflow.settings import Settings

LOOK_S = 2.0
TAKE = "SELECT pg_try_advisory_lock(hashtextextended('streamflow daemon', 0))"


def take_turn(database: Database) -> psycopg.Connection[tuple[bool]]:
    """Wait until no other daemon is at work on that database, and return the connection that then keeps others off."""
    said = ""
    while True:
        try:
            connection = psycopg.connect(database.libpq(), autocommit=True, connect_timeout=CONNECT_TIMEOUT_S)
            while connection.execute(TAKE).fetchone() != (True,):
                said = _say("another daemon is at work on this database; this one waits until it is gone", said)
                time.sleep(LOOK_S)
        except psycopg.OperationalError as failure:
            said = _say(f"PostgreSQL does not answer: {_first_line(failure)}", said)
            time.sleep(LOOK_S)
        else:
            _say("this daemon is at work", said)
            return connection


def begin_again_when_lost(turn: psycopg.Connection[tuple[bool]]) -> None:
    """Put this program, begun anew, in place of itself as soon as the connection is lost: another may be at work."""
    try:
        while True:
            turn.execute("SELECT 1")
            time.sleep(LOOK_S)
    except psycopg.Error as failure:
        _say(f"the connection that keeps other daemons off is lost: {_first_line(failure)}", "")
        os.execv(sys.executable, sys.orig_argv)  # noqa: S606


def _first_line(failure: Exception) -> str:
    return str(failure).strip().partition("\n")[0]


def _say(text: str, said: str) -> str:
    if text != said:
        print(f"streamflow daemon: {text}", file=sys.stderr, flush=True)  # noqa: T201
    return text


def main() -> None:
    """Run `dagster-daemon run` with the arguments of this program, when it is its turn."""
    (daemon,) = entry_points(group="console_scripts", name="dagster-daemon")
    with postgres(Settings.load()) as database:
        turn = take_turn(database)
        threading.Thread(target=begin_again_when_lost, args=(turn,), name="turn", daemon=True).start()
        sys.argv = ["dagster-daemon", "run", *sys.argv[1:]]
        daemon.load()()


if __name__ == "__main__":
    main()
