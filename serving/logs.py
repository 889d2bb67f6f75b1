"""The service's log: one JSON object a line, an event with fields."""

import logging
from datetime import UTC, datetime
from typing import Any

import msgspec

LOGGER = logging.getLogger("streamflow.serving")


def log(level: int, event: str, *, failure: BaseException | None = None, **fields: Any) -> None:
    """Log an event with its fields, and the traceback of ``failure`` if there is one."""
    LOGGER.log(level, event, extra={"fields": fields}, exc_info=failure)


def with_cause(failure: BaseException) -> str:
    """What the log says of a failure: also its cause, which may name servers and statements and is not for callers."""
    cause = failure.__cause__
    return f"{failure}: {str(cause).strip() or type(cause).__name__}" if cause else str(failure)


class JsonLines(logging.Formatter):
    """Formats any record, ours or a library's, as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line = {
            "at": datetime.fromtimestamp(record.created, UTC),
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()


def configure() -> None:
    """Log to stderr from now on; what readiness tells in one line is left out of what the libraries tell."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
