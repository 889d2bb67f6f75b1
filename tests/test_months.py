from calendar import monthrange
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamflow.errors import ConfigurationError
from streamflow.months import FIRST_MONTH, Month

MONTHS = st.builds(Month, st.integers(1, 9999), st.integers(1, 12))


@given(MONTHS)
def test_a_month_is_read_as_it_is_written(month: Month) -> None:
    assert Month.parse(str(month)) == month


@pytest.mark.parametrize(
    "key",
    [
        *("", "2024", "2024-1", "2024-00", "2024-13", "0000-01", "24-01", "2024-01-01", "2024/01", "2024_01"),
        *(
            "2024-01 ",
            " 2024-01",
            "2024-01\n",
            "12024-01",
            "-024-01",
            "2024-0a",
            "\u0662\u0660\u0662\u0664-01",
            "january",
        ),
    ],
)
def test_anything_else_is_refused_with_the_form_to_use(key: str) -> None:
    with pytest.raises(
        ConfigurationError, match=r"is not a month; write it as YYYY-MM, for example 2024-01"
    ) as refusal:
        Month.parse(key)
    assert repr(key) in str(refusal.value)


@pytest.mark.parametrize(
    ("key", "last_day"),
    [
        ("2024-01", date(2024, 1, 31)),
        ("2024-02", date(2024, 2, 29)),
        ("2023-02", date(2023, 2, 28)),
        ("2000-02", date(2000, 2, 29)),
        ("2100-02", date(2100, 2, 28)),
        ("2024-04", date(2024, 4, 30)),
        ("2024-12", date(2024, 12, 31)),
    ],
)
def test_as_of_is_the_last_day(key: str, last_day: date) -> None:
    month = Month.parse(key)
    assert month.as_of == last_day
    assert month.event_time == datetime(last_day.year, last_day.month, last_day.day, tzinfo=UTC)


@given(MONTHS.filter(lambda month: month < Month(9999, 12)))
def test_the_day_after_as_of_opens_the_next_month(month: Month) -> None:
    following = month.as_of + timedelta(days=1)
    assert (following.year, following.month, following.day) == (month.shift(1).year, month.shift(1).number, 1)
    assert month.as_of.day == monthrange(month.year, month.number)[1]


@given(MONTHS, st.integers(-2000, 2000), st.integers(-2000, 2000))
def test_shifts_add_up_and_keep_order(month: Month, one: int, other: int) -> None:
    assert month.shift(one).shift(other) == month.shift(one + other)
    assert month.shift(0) == month
    assert 1 <= month.shift(one).number <= 12
    assert (month.shift(one) < month.shift(other)) == (one < other)


@given(MONTHS, st.integers(0, 60))
def test_until_counts_every_month_once(month: Month, months: int) -> None:
    covered = list(month.until(month.shift(months)))
    assert len(covered) == months + 1
    assert covered[0] == month
    assert all(later == earlier.shift(1) for earlier, later in pairwise(covered))


def test_until_an_earlier_month_is_nothing() -> None:
    assert list(Month(2024, 2).until(Month(2024, 1))) == []


@pytest.mark.parametrize(
    ("text", "months"),
    [
        ("2024-01", ["2024-01"]),
        ("2024-01..2024-01", ["2024-01"]),
        ("2023-11..2024-02", ["2023-11", "2023-12", "2024-01", "2024-02"]),
    ],
)
def test_a_range_includes_both_ends(text: str, months: list[str]) -> None:
    assert [str(month) for month in Month.parse_range(text)] == months


@pytest.mark.parametrize("text", ["", "..", "2024-01..", "..2024-01", "2024-01...2024-02", "2024-01..2024-02..2024-03"])
def test_a_half_range_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="is not a month"):
        Month.parse_range(text)


def test_a_range_that_runs_backwards_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"2024-02\.\.2024-01 ends before it starts"):
        Month.parse_range("2024-02..2024-01")


def test_months_begin_in_january_2024() -> None:
    assert Month.parse(FIRST_MONTH) == Month(2024, 1)
