"""Append-only files of JSON lines, for what the database cannot take now: one for each process, locked while it lives.

Blocks on the disk, and is for one thread at a time.
"""

import fcntl
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from uuid import uuid4

from serving.logs import log

SUFFIX = ".jsonl"
UNREADABLE = ".unreadable"
BLOCK = 1024 * 1024
"""Bytes that are read back at once; no line is nearly as long."""
ADOPT_S = 5.0
"""How often to look for the files of processes that died."""


class _File:
    """One file of lines; ``size`` is how far it is known to be good, ``offset`` how far it has been read back."""

    def __init__(self, path: Path, flags: int = 0) -> None:
        """Open and lock it; raises OSError, BlockingIOError when another process has it."""
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | flags, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._descriptor)
            raise
        self.size = os.fstat(self._descriptor).st_size
        self.offset = 0

    def append(self, data: bytes) -> None:
        os.ftruncate(self._descriptor, self.size)  # what is left of a write that failed
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        os.fsync(self._descriptor)
        self.size += len(data)

    def block(self) -> bytes:
        return os.pread(self._descriptor, min(BLOCK, self.size - self.offset), self.offset)

    def lines(self) -> int:
        return sum(os.pread(self._descriptor, BLOCK, at).count(b"\n") for at in range(0, self.size, BLOCK))

    def close(self) -> None:
        os.close(self._descriptor)


class Spill:
    """What waits for the database, oldest first: the files that dead processes left, then this process's own.

    ``rows`` are how many. Lines that ``is_good`` refuses, such as the last one of a process that was
    killed while it wrote, are put aside in a file of the same name with `UNREADABLE` at its end, and logged.
    """

    def __init__(self, folder: Path, is_good: Callable[[bytes], bool]) -> None:
        self._folder = folder
        self._is_good = is_good
        self._own: _File | None = None
        self._left: list[_File] = []
        self._adopted_at = float("-inf")
        self._unusable: set[Path] = set()
        self._read: tuple[int, int, list[bytes]] = (0, 0, [])
        self.rows = 0

    @property
    def size(self) -> int:
        """How many bytes wait."""
        return sum(file.size - file.offset for file in self._files())

    def append(self, lines: Sequence[bytes]) -> None:
        """Write lines and have them on the disk; raises OSError, and then none of them counts as written."""
        if self._own is None:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._own = _File(self._folder / f"{uuid4()}{SUFFIX}", os.O_CREAT | os.O_EXCL)
        self._own.append(b"\n".join(lines) + b"\n")
        self.rows += len(lines)

    def read(self) -> list[bytes]:
        """The oldest lines that wait; the same again until `forget`. Raises OSError."""
        self._adopt()
        self._read = (0, 0, [])
        file = next(iter(self._files()), None)
        if file is None:
            return []
        data = file.block()
        whole = data.rfind(b"\n") + 1
        if whole == 0 or file.offset + len(data) == file.size:
            whole = len(data)
        lines = data[:whole].splitlines()
        good = [line for line in lines if self._is_good(line)]
        bad = [] if len(good) == len(lines) else [line for line in lines if not self._is_good(line)]
        self._read = (whole, data.count(b"\n", 0, whole), bad)
        return good

    def forget(self) -> None:
        """What `read` gave last is in the database. Raises OSError."""
        file = next(iter(self._files()), None)
        if file is None:
            return
        size, rows, bad = self._read
        if bad:
            self._put_aside(file, bad)
        file.offset += size
        self.rows -= rows
        self._read = (0, 0, [])
        if file.offset == file.size:
            file.path.unlink(missing_ok=True)
            file.close()
            if file is self._own:
                self._own = None
            else:
                self._left.remove(file)

    def close(self) -> None:
        """Unlock the files; what still waits in them is for the next process."""
        for file in self._files():
            file.close()
        self._own, self._left, self.rows = None, [], 0

    def _files(self) -> list[_File]:
        return self._left + ([self._own] if self._own else [])

    def _adopt(self) -> None:
        if time.monotonic() < self._adopted_at + ADOPT_S:
            return
        self._adopted_at = time.monotonic()
        ours = {file.path for file in self._files()}
        for path in sorted(set(self._folder.glob(f"*{SUFFIX}")) - ours, key=_modified):
            try:
                file = _File(path)
            except (BlockingIOError, FileNotFoundError):
                continue  # its process lives, or another has taken it up and is done
            except OSError as failure:
                if path not in self._unusable:
                    log(logging.ERROR, "spilled_predictions_unusable", file=path, reason=failure.strerror)
                self._unusable.add(path)
                continue
            rows = file.lines()
            self._left.append(file)
            self.rows += rows
            log(logging.INFO, "spilled_predictions_taken_up", file=path.name, rows=rows)

    def _put_aside(self, file: _File, lines: list[bytes]) -> None:
        aside = file.path.with_name(file.path.name + UNREADABLE)
        descriptor = os.open(aside, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with open(descriptor, "wb") as kept:  # noqa: PTH123  # a path's open() cannot say who may read it
            kept.write(b"\n".join(lines) + b"\n")
        log(logging.ERROR, "spilled_predictions_unreadable", lines=len(lines), kept_in=aside)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
