"""API keys: made once, kept as hashes in a file of ``NAME:SHA-256`` lines, looked up in constant time.

SHA-256 without salt or stretching is enough: a key is 32 random bytes, so no list of likely keys can be tried against a
stolen file and no two keys are equal. Slow hashes protect what people choose; here they would slow every request.
"""

import hmac
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from streamflow.errors import ConfigurationError
from streamflow.settings import Settings

KEY_BYTES = 32
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
LINE = re.compile(rf"({NAME.pattern}):([0-9a-f]{{64}})")
OTHERS_MAY_WRITE = 0o022


@dataclass(frozen=True)
class ApiKeys:
    """The keys that are accepted: the SHA-256 of each in hexadecimal, by its owner's name."""

    digests: Mapping[str, str]

    @classmethod
    def load(cls, file: Path) -> "ApiKeys":
        """The keys of a file.

        Raises ConfigurationError for a file that cannot be read, that others may write to, or that has no keys, and,
        naming the line, for one that is malformed or gives a name or a key twice.
        """
        try:
            text = file.read_text(encoding="ascii")
            mode = file.stat().st_mode
        except (OSError, UnicodeDecodeError) as failure:
            why = failure.strerror if isinstance(failure, OSError) else "it is not ASCII text"
            raise ConfigurationError(f"the API keys {file} cannot be read: {why}; {_how_to_make(file)}") from failure
        if mode & OTHERS_MAY_WRITE:
            raise ConfigurationError(f"the API keys {file} can be changed by other users; chmod 600 it")
        digests = _digests(file, text)
        if not digests:
            raise ConfigurationError(f"there are no API keys in {file}; {_how_to_make(file)}")
        return cls(digests)

    def owner(self, key: str | bytes) -> str | None:
        """Whose key this is, None if nobody's; compares with every digest, to take the same time whichever matches."""
        given = _digest(key)
        found = None
        for name, digest in self.digests.items():
            if hmac.compare_digest(given, digest):
                found = name
        return found


def make_key(file: Path, name: str) -> str:
    """A new key, whose hash is appended to ``file`` under ``name``; it cannot be told again.

    Raises ConfigurationError for a name that is taken or malformed, and for a file that cannot be used.
    """
    if not NAME.fullmatch(name):
        raise ConfigurationError(f"{name!r} is no name for an API key; take up to 64 letters, digits and . _ -")
    key = secrets.token_urlsafe(KEY_BYTES)
    try:
        text = file.read_text(encoding="ascii") if file.exists() else ""
        if name in _digests(file, text):
            raise ConfigurationError(f"{name} has an API key in {file}; remove that line first to replace it")
        separator = "" if text.endswith("\n") or not text else "\n"
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as opened:
            opened.write(f"{separator}{name}:{_digest(key)}\n")
    except (OSError, UnicodeDecodeError) as failure:
        raise ConfigurationError(f"the API keys {file} cannot be added to: {failure}") from failure
    return key


def request_headers(settings: Settings) -> dict[str, str]:
    """What a command of ours adds to its requests: the key that it was given, if any."""
    return {"Authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}


def _digest(key: str | bytes) -> str:
    return sha256(key.encode() if isinstance(key, str) else key).hexdigest()


def _digests(file: Path, text: str) -> dict[str, str]:
    digests: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        match = LINE.fullmatch(line)
        if not match:
            raise ConfigurationError(f"line {number} of {file} is not NAME:SHA-256 of an API key")
        name, digest = match.groups()
        if name in digests:
            raise ConfigurationError(f"line {number} of {file} gives {name} a second API key")
        if digest in digests.values():
            raise ConfigurationError(f"line {number} of {file} has the same API key as an earlier line")
        digests[name] = digest
    return digests


def _how_to_make(file: Path) -> str:
    return f"`STREAMFLOW_API_KEYS_FILE={file} streamflow key NAME` makes one"
