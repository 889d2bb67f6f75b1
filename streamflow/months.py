"""The month: the unit of partitions, landing, snapshots and training."""

import calendar
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time

from streamflow.errors import ConfigurationError

FIRST_MONTH = "2024-01"
KEY_FORMAT = "%Y-%m"


@dataclass(frozen=True, order=True)
class Month:
    """A calendar month, written ``YYYY-MM``.

    Examples:
        >>> Month.parse("2024-02").as_of
        datetime.date(2024, 2, 29)
        >>> str(Month.parse("2024-12").shift(1))
        '2025-01'
    """

    year: int
    number: int

    @classmethod
    def parse(cls, key: str) -> "Month":
        """Read a partition key; raises ConfigurationError for anything but ``YYYY-MM`` with a month of 01 to 12."""
        found = re.fullmatch(r"(\d{4})-(0[1-9]|1[0-2])", key, re.ASCII)
        if not found or found[1] == "0000":
            raise ConfigurationError(f"{key!r} is not a month; write it as YYYY-MM, for example {FIRST_MONTH}")
        return cls(int(found[1]), int(found[2]))

    @classmethod
    def parse_range(cls, text: str) -> list["Month"]:
        """Read ``YYYY-MM`` or ``YYYY-MM..YYYY-MM`` (both ends included); raises ConfigurationError."""
        first, dots, last = text.partition("..")
        start = cls.parse(first)
        end = cls.parse(last) if dots else start
        if end < start:
            raise ConfigurationError(f"the range {text} ends before it starts")
        return list(start.until(end))

    @property
    def as_of(self) -> date:
        """The last day of the month, the day that snapshots and labels speak of."""
        return date(self.year, self.number, calendar.monthrange(self.year, self.number)[1])

    @property
    def event_time(self) -> datetime:
        """Midnight UTC of ``as_of``: the feature store's event timestamp."""
        return datetime.combine(self.as_of, time(), UTC)

    def shift(self, months: int) -> "Month":
        """The month that many months later (earlier when negative)."""
        year, number = divmod(self.year * 12 + self.number - 1 + months, 12)
        return Month(year, number + 1)

    def until(self, last: "Month") -> Iterator["Month"]:
        """This month and every later one up to ``last``, included."""
        month = self
        while month <= last:
            yield month
            month = month.shift(1)

    def __str__(self) -> str:
        return f"{self.year:04d}-{self.number:02d}"
