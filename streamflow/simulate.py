"""Deterministic months of the real shape and any size, with the true churn probability of each customer.

What belongs here: how a simulated customer looks, stays, leaves and changes. What doesn't: checking or landing files.
This is the one module beside the contract that may name columns, as the properties of ``_Customers``; a contract
column without such a property gets arbitrary values within its type, bounds and categories.

The model
---------
The world has ``users`` *places* and begins in 2024-01. Each place always has exactly one customer, so a month has
exactly ``users`` rows, and the rows of a smaller world are the first rows of a bigger one.

*Randomness* is a hash, not a sequence: ``u = mix(mix(who) + key(seed, name))`` is uniform, where ``who`` is a place,
the subscription in it, or that subscription in one month. A value depends on nothing but its own coordinates, hence not
on the size of a chunk, the other months asked for, or the machine's settings. Bell-shaped values ``z`` are sums of four
16-bit uniforms, exact on every machine; a probability is rounded to six decimals before it is used.

*Tenure.* A subscription of age ``t`` months ends with probability ``r(t)`` (``END_RATES``: high in the first month,
then low), whatever its other properties; ages start in the stationary distribution of that process, so the months look
alike for ever unless drift is asked for. With age the terms lengthen and plans are taken: a latent ``u`` of the
subscription stays, and the shares that it is compared with (``MONTHLY_TERM_SHARES``, ``PLAN_SHARES``...) move with
``t``.

*Fee and payments.* ``monthly_fee = base(net_service) + 5 extras + 0.6 z + 10 tv + 10 movies``. ``total_paid`` is its
sum over the months so far, with the noise ``0.19 base z sqrt(t - 1)``. Both are in steps of 0.05.

*Usage and support* follow latents ``z = 0.96 z(subscription) + 0.28 z(month)``: hours are ``20 + 0.148 fee + 4.97 z``,
counts are cut from ``z`` at the shares seen in the real sample. ``avg_session_mins_7d`` is constant, as it is there.

*Churn.* The established rule is a logistic regression of the real 2024-01 (term, log tenure, net service, plans,
billing, seniors, dependents), a little steeper to make up for ``r``; the changed rule resembles the real 2024-02, where
little watching, failed payments and tickets drive churn and high fees hold it back. With ``w`` the part of the
customers that follow the changed rule::

    p = max(r(t), (1 - w) expit(established - season) + w expit(changed - season))

One uniform ``u`` per subscription and month decides: the label is ``u < p``, and ``u < r(t)`` ends the subscription.

*Leaving.* Whoever's subscription ended is followed by someone new in every respect. Of the others who churned,
``leave_share`` is gone the next month too; someone of the same kind takes their place under a new user_id with a
signup_date in that month: think of a returning customer, who keeps months_active and total_paid of former times. So
tenures are as long as in the real sample although a quarter churns each month, and no rule of churn reshapes the
population.
"""

import filecmp
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import csv

from streamflow.contract import CONTRACT, USER_ID, Column, Contract, Table
from streamflow.errors import ConfigurationError
from streamflow.months import FIRST_MONTH, Month

Bits = NDArray[np.uint64]
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]
State = NDArray[np.int16]

EPOCH = Month.parse(FIRST_MONTH)
TRUTH_FOLDER = ".truth"
TRUTH = "churn_probability"
PLAIN = csv.WriteOptions(include_header=False, quoting_style="none")
CHUNK_ROWS = 65_536
OLDEST = 240
"""Months that the oldest subscription has lasted when the world begins."""
PLACE_BITS = 26
MAX_USERS = 2**PLACE_BITS
MAX_MONTHS = 1_200

NET_SERVICES = ("DSL", "Fiber optic", "No")
DSL, FIBER, OFFLINE = range(3)
TERMS = ("Month-to-month", "One year", "Two year")
GENDERS = ("Female", "Male")
SESSION_MINUTES = 29.14104464084511
NORMAL = NormalDist()

# Shares and rates below are those of the real 2024-01, smoothed.
AGE_BANDS = (1, 4, 12, 24, 72)
END_RATES = ((0.45, 0.13, 0.045, 0.035, 0.028, 0.07), (0.35, 0.05, 0.012, 0.006, 0.008, 0.07))
"""Monthly probability that a subscription ends, by age band, of customers without and with a family."""
FAMILY_SHARE = 0.483
SENIOR_SHARE = 0.162
DEPENDENT_SHARES = np.array([[0.115, 0.014], [0.589, 0.145]])
"""By family, senior."""
NET_SHARES = np.array([[[0.357, 0.428, 0.215], [0.384, 0.299, 0.317]], [[0.219, 0.735, 0.046], [0.319, 0.648, 0.033]]])
"""By senior, dependents: the shares of NET_SERVICES."""
PAPERLESS_SHARES = np.array([0.549, 0.774, 0.292])
AGES = np.array([0, 3, 6, 12, 24, 36, 48, 60, 72])
MONTHLY_TERM_SHARES = (
    np.array([0.98, 0.96, 0.88, 0.80, 0.62, 0.40, 0.27, 0.10, 0.00]),
    np.array([1.00, 0.995, 0.99, 0.97, 0.90, 0.72, 0.53, 0.30, 0.02]),
    np.array([0.92, 0.78, 0.65, 0.45, 0.28, 0.14, 0.04, 0.01, 0.00]),
)
"""By net service, at each of AGES."""
BELOW_TWO_YEARS_SHARES = (
    np.array([0.98, 0.98, 0.96, 0.95, 0.91, 0.85, 0.73, 0.45, 0.03]),
    np.array([1.00, 1.00, 1.00, 0.995, 0.985, 0.95, 0.88, 0.70, 0.15]),
    np.array([0.96, 0.92, 0.87, 0.80, 0.70, 0.50, 0.33, 0.17, 0.02]),
)
PLAN_SHARES = {
    DSL: np.array([0.10, 0.22, 0.26, 0.30, 0.35, 0.41, 0.50, 0.58, 0.78]),
    FIBER: np.array([0.26, 0.36, 0.41, 0.46, 0.52, 0.60, 0.69, 0.74, 0.85]),
}
"""Of a streaming plan, at each of AGES."""
SAME_TASTE = 0.35
"""The part of customers who take both plans at the same age, or neither."""
PLAN_FEE = 10.0
COINS = 20
"""Smallest coins in one unit of the currency."""
BASE_FEES = np.array([25.0, 70.0, 20.0])
EXTRAS_SHARES = (
    (0.054, 0.076, 0.073, 0.055, 0.117, 0.138, 0.165, 0.152, 0.105, 0.065),
    (0.143, 0.243, 0.254, 0.199, 0.107, 0.054),
    (0.776, 0.224),
)
"""Shares of subscriptions with 0, 1, 2... extras, by net service."""
SKIP_SHARES = (0.007, 0.032, 0.080, 0.135, 0.176, 0.175, 0.149, 0.113, 0.067, 0.032, 0.019, 0.010, 0.005)
STALL_SHARES = (0.144, 0.281, 0.273, 0.168, 0.084, 0.039, 0.008, 0.003)
FAILURE_SHARES = (0.847, 0.145, 0.008)
TICKET_SHARES = (0.739, 0.223, 0.035, 0.003)


@dataclass(frozen=True)
class Scenario:
    """What changes in the world; by default nothing but a mild season.

    ``feature_drift_from`` moves watch_hours_30d down and rebuffer_events_7d, failed_payments_90d and
    support_tickets_90d up from that month on, by ``feature_drift`` (0 to 5) times their spread among like customers;
    about 0.1 is what the real 2024-02 did. ``concept_drift_from`` turns the part ``concept_drift`` (0 to 1) of the
    customers to the changed rule of churn from that month on. Both come in ``drift_months`` equal steps, the first in
    the named month: 1 is sudden, 12 gradual. ``season`` (0 to 2) is how much the log-odds of churn fall and the
    hours watched rise (in the same spread) in January; July is the opposite. ``concept_season`` (0 to 1) is the part of
    the customers who follow the changed rule in July, none of them in January, on top of ``concept_drift``.
    ``leave_share`` (0 to 1) is the part of the churned who are gone the next month.

    Raises ConfigurationError for a value out of its range.

    Examples:
        >>> stable = Scenario(season=0)
        >>> seasonal = Scenario(season=0.6, concept_season=0.5)
        >>> sudden = Scenario(season=0, concept_drift_from=Month(2025, 1))
        >>> gradual = Scenario(season=0, concept_drift_from=Month(2024, 7), drift_months=12)
    """

    feature_drift_from: Month | None = None
    feature_drift: float = 0.5
    concept_drift_from: Month | None = None
    concept_drift: float = 1.0
    drift_months: int = 1
    season: float = 0.1
    concept_season: float = 0.0
    leave_share: float = 0.95

    def __post_init__(self) -> None:
        bounds = {"feature_drift": 5, "concept_drift": 1, "season": 2, "concept_season": 1, "leave_share": 1}
        for name, highest in bounds.items():
            value = getattr(self, name)
            if not 0 <= value <= highest:
                raise ConfigurationError(f"{name} is {value}; it must be from 0 to {highest}")
        if self.drift_months < 1:
            raise ConfigurationError(f"drift_months is {self.drift_months}; drift takes at least 1 month")

    def feature_shift(self, month: Month) -> float:
        """How far the drifting features have moved in that month, in units of their spread."""
        return self.feature_drift * self._progress(self.feature_drift_from, month)

    def changed_part(self, month: Month) -> float:
        """The part of the customers that follow the changed rule of churn in that month, 0 to 1."""
        in_season = self.concept_season * (1 - _wave(month)) / 2
        return min(1.0, self.concept_drift * self._progress(self.concept_drift_from, month) + in_season)

    def seasonal_shift(self, month: Month) -> float:
        """The season's wave in that month: ``season`` in January, minus that in July."""
        return self.season * _wave(month)

    def _progress(self, start: Month | None, month: Month) -> float:
        if start is None or month < start:
            return 0.0
        return min(1.0, (_months_between(start, month) + 1) / self.drift_months)


def simulate(
    out: Path,
    months: Sequence[Month],
    *,
    users: int = 7_000,
    seed: int = 1,
    scenario: Scenario | None = None,
    contract: Contract = CONTRACT,
) -> list[Path]:
    """Write ``out/YYYY-MM/<table>.csv`` for each month and ``out/.truth/YYYY-MM.csv`` with the true probabilities.

    ``months`` ascend and none is before 2024-01; a month's bytes don't depend on which others are asked for, nor on
    what exists in ``out``. Memory is bounded: 4 bytes per user and some 100 MB. All months appear when
    all are written, each by one rename; a month that is there with the same bytes is left as it is. Returns the months'
    folders.

    Raises ConfigurationError, with nothing changed, for arguments that cannot be used and for a month that exists in
    ``out`` with other contents.
    """
    scenario = scenario or Scenario()
    _check(months, users)
    staging = _staging(out)
    try:
        for month, customers in _lived(months, users, seed, scenario):
            with _MonthFiles(staging, month, contract) as files:
                for part in customers:
                    files.write(part)
        return _publish(staging, out, months)
    finally:
        shutil.rmtree(staging)


def frames(
    months: Sequence[Month],
    *,
    users: int,
    seed: int,
    scenario: Scenario,
    contract: Contract = CONTRACT,
) -> Iterator[tuple[Month, pd.DataFrame]]:
    """Each month as one frame instead of files: user_id, the contract's features, its label and the truth.

    A row per customer in the order of the files, with the same values as `simulate` writes, in float64, int64, bool and
    str; what is empty there is what the contract says empty means. Raises ConfigurationError as `simulate` does, and
    for a feature that may be missing: nothing stands for that here.
    """
    if unfit := [column.name for column in contract.features if column.nullable]:
        raise ConfigurationError(f"{', '.join(unfit)} may be missing, which months in memory cannot be")
    _check(months, users)
    label = [column for column in contract.label_table.columns if column.name == contract.label]
    for month, customers in _lived(months, users, seed, scenario):
        parts = [_frame(part, (*contract.features, *label)) for part in customers]
        yield month, pd.concat(parts, ignore_index=True)


def _frame(customers: "_Customers", columns: Sequence[Column]) -> pd.DataFrame:
    def values(column: Column) -> Any:
        found = pa.array(customers.column(column))
        if isinstance(found, pa.DictionaryArray):
            return found.cast(pa.string()).to_pandas()
        return (found if column.empty_means is None else found.fill_null(column.empty_means)).to_pandas()

    known = {column.name: values(column) for column in columns}
    return pd.DataFrame({USER_ID: customers.user_id.to_pandas(), **known, TRUTH: customers.churn_probability})


def _check(months: Sequence[Month], users: int) -> None:
    if not 1 <= users <= MAX_USERS:
        raise ConfigurationError(f"{users} users cannot be simulated; ask for 1 to {MAX_USERS}")
    if not months:
        raise ConfigurationError("no month to simulate; name at least one")
    if any(later <= earlier for earlier, later in pairwise(months)):
        raise ConfigurationError(f"months must ascend without repetition, not {', '.join(map(str, months))}")
    if months[0] < EPOCH or _months_between(EPOCH, months[-1]) >= MAX_MONTHS:
        last = EPOCH.shift(MAX_MONTHS - 1)
        raise ConfigurationError(f"{months[0]}..{months[-1]} cannot be simulated; months are {EPOCH} to {last}")


def _staging(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=".simulate-", dir=out))
    except OSError as failure:
        reason = f"{out} cannot be written into ({failure.strerror}); name a folder for the months"
        raise ConfigurationError(reason) from failure


def _publish(staging: Path, out: Path, months: Sequence[Month]) -> list[Path]:
    existing = {month for month in months if (out / str(month)).exists()}
    for month in sorted(existing):
        if not _same_month(staging, out, str(month)):
            raise ConfigurationError(f"{out / str(month)} exists with other contents; remove it or write elsewhere")
    (out / TRUTH_FOLDER).mkdir(exist_ok=True)
    for month in months:
        if month not in existing:
            (staging / TRUTH_FOLDER / f"{month}.csv").replace(out / TRUTH_FOLDER / f"{month}.csv")
            (staging / str(month)).rename(out / str(month))
    return [out / str(month) for month in months]


def _same_month(left: Path, right: Path, month: str) -> bool:
    names = sorted(path.name for path in (left / month).iterdir())
    if not (right / month).is_dir() or names != sorted(path.name for path in (right / month).iterdir()):
        return False
    files = [f"{month}/{name}" for name in names] + [f"{TRUTH_FOLDER}/{month}.csv"]
    return filecmp.cmpfiles(left, right, files, shallow=False)[0] == files


class _World:
    """All places over time: in which month, counted from the epoch, each subscription began and its user joined."""

    def __init__(self, users: int, seed: int, scenario: Scenario) -> None:
        self._seed = seed
        self._scenario = scenario
        self._began = np.empty(users, np.int16)
        for part in _parts(users):
            self._began[part] = _first_months(seed, np.arange(part.start, part.stop))
        self._joined = self._began.copy()

    def live(self, month: Month) -> Iterator["_Customers"]:
        """The customers of the month, part by part, and on to the next month when all were seen."""
        for part in _parts(len(self._began)):
            customers = _Customers(
                np.arange(part.start, part.stop),
                self._began[part].copy(),
                self._joined[part].copy(),
                month,
                self._seed,
                self._scenario,
            )
            yield customers
            following = _months_between(EPOCH, month) + 1
            self._began[part][customers.ended] = following
            self._joined[part][customers.left] = following


def _lived(
    months: Sequence[Month], users: int, seed: int, scenario: Scenario
) -> Iterator[tuple[Month, Iterator["_Customers"]]]:
    """The customers of each of ``months``, the world living on from its beginning to the last of them."""
    world = _World(users, seed, scenario)
    for month in EPOCH.until(months[-1]):
        customers = world.live(month)
        if month in months:
            yield month, customers
        for _ in customers:
            pass


def _parts(rows: int) -> Iterator[slice]:
    for start in range(0, rows, CHUNK_ROWS):
        yield slice(start, min(rows, start + CHUNK_ROWS))


def _months_between(earlier: Month, later: Month) -> int:
    return (later.year - earlier.year) * 12 + later.number - earlier.number


def _wave(month: Month) -> float:
    """1 in January, -1 in July."""
    return round(math.cos(2 * math.pi * (month.number - 1) / 12), 6)


def _mix(bits: Bits) -> Bits:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64 bits that looks random."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


@dataclass(frozen=True)
class _Dice:
    """Random values by name, one per row of ``who``, the hashed coordinates of the rows."""

    seed: int
    who: Bits

    def bits(self, name: str) -> Bits:
        digest = blake2b(f"{self.seed}/{name}".encode(), digest_size=8).digest()
        return _mix(self.who + np.uint64(int.from_bytes(digest, "little")))

    def uniform(self, name: str) -> Floats:
        """In [0, 1)."""
        return np.asarray((self.bits(name) >> np.uint64(11)) * 2.0**-53, np.float64)

    def normal(self, name: str) -> Floats:
        """Mean 0, standard deviation 1, within 3.5 of 0: the sum of four 16-bit uniforms (Irwin and Hall)."""
        bits = self.bits(name)
        total = bits.view(np.uint16).reshape(-1, 4).sum(axis=1, dtype=np.int64)
        return np.asarray((total - 2 * 65_535) / 37_837.0, np.float64)

    def choice(self, name: str, shares: Floats) -> Integers:
        """An index into the last axis of ``shares``, of which there is one row for each row of ``who``."""
        below = np.cumsum(shares, axis=-1)[..., :-1]
        return np.asarray((self.uniform(name)[:, None] >= below).sum(axis=-1), np.int64)


def _end_rate(age: NDArray[np.integer], family: Flags) -> Floats:
    rates = np.array(END_RATES)
    return np.asarray(rates[family.astype(np.int64), np.searchsorted(AGE_BANDS, age, side="right")])


def _first_months(seed: int, places: Integers) -> State:
    """When the subscriptions of the first month began: ages follow the stationary distribution of the end rates."""
    dice = _Dice(seed, _mix(places.astype(np.uint64)))
    family = dice.uniform("has_family") < FAMILY_SHARE
    point = dice.uniform("first age")
    ages = np.zeros(len(places), np.int64)
    for kind in (False, True):
        rates = _end_rate(np.arange(OLDEST), np.full(OLDEST, kind))
        lasting = np.cumsum(np.cumprod(np.append(1.0, 1.0 - rates)))
        chosen = family == kind
        ages[chosen] = np.searchsorted(lasting / lasting[-1], point[chosen], side="right")
    return np.asarray(-ages, np.int16)


def _cut(latent: Floats, shares: Sequence[float]) -> Integers:
    """A count whose values 0, 1, 2... have these shares, rising with the latent."""
    below = np.cumsum(shares)[:-1] / sum(shares)
    return np.asarray(np.searchsorted([NORMAL.inv_cdf(share) for share in below], latent, side="right"), np.int64)


def _rounded(values: Floats, parts: int) -> Floats:
    """To the nearest multiple of one of so many parts of 1."""
    return np.asarray(np.round(values * parts) / parts, np.float64)


def _expit(log_odds: Floats) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-log_odds)))


def _user_ids(numbers: Bits, seed: int) -> Any:
    """Ids like ``7590-VHVEG``: four Feistel rounds over (digits, letters), so different numbers get different ids.

    ``numbers`` are below 10**4 * 26**5.
    """
    ten, letters = np.uint64(10**4), np.uint64(26**5)
    right, left = numbers // ten, numbers % ten
    for turn in range(4):
        if turn % 2:
            right = (right + _Dice(seed, _mix(left)).bits(f"id {turn}") % letters) % letters
        else:
            left = (left + _Dice(seed, _mix(right)).bits(f"id {turn}") % ten) % ten
    text = np.empty((len(numbers), 10), np.uint8)
    for column in range(3, -1, -1):
        left, digit = np.divmod(left, np.uint64(10))
        text[:, column] = digit + np.uint64(ord("0"))
    text[:, 4] = ord("-")
    for column in range(9, 4, -1):
        right, letter = np.divmod(right, np.uint64(26))
        text[:, column] = letter + np.uint64(ord("A"))
    offsets = np.arange(0, 10 * len(numbers) + 1, 10, dtype=np.int32)
    return pa.StringArray.from_buffers(len(numbers), pa.py_buffer(offsets), pa.py_buffer(text))


def _named(codes: Integers, names: Sequence[str]) -> Any:
    return pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(names))


@dataclass(frozen=True, eq=False)
class _Customers:
    """The customers in a range of places in one month; a property named like a contract column generates it."""

    places: Integers
    began: State
    joined: State
    month: Month
    seed: int
    scenario: Scenario

    def column(self, column: Column) -> Any:
        """The values of a contract column, one for each place."""
        if isinstance(getattr(type(self), column.name, None), cached_property):
            return getattr(self, column.name)
        return _arbitrary(column, self._user_month, self.month)

    @cached_property
    def _now(self) -> int:
        return _months_between(EPOCH, self.month)

    @cached_property
    def _place(self) -> _Dice:
        return _Dice(self.seed, _mix(self.places.astype(np.uint64)))

    @cached_property
    def _subscription(self) -> _Dice:
        return _Dice(self.seed, _mix(self._numbered(self.began)))

    @cached_property
    def _subscription_month(self) -> _Dice:
        return _Dice(self.seed, _mix(self._subscription.who + np.uint64(self._now + 1)))

    @cached_property
    def _user(self) -> _Dice:
        return _Dice(self.seed, _mix(self._numbered(self.joined)))

    @cached_property
    def _user_month(self) -> _Dice:
        return _Dice(self.seed, _mix(self._user.who + np.uint64(self._now + 1)))

    def _numbered(self, months: State) -> Bits:
        """A different number for each place and month of a beginning."""
        return self.places.astype(np.uint64) + ((months.astype(np.int64) + OLDEST) << PLACE_BITS).astype(np.uint64)

    def _latent(self, name: str) -> Floats:
        return 0.96 * self._subscription.normal(name) + 0.28 * self._subscription_month.normal(name)

    def _drifting(self, name: str) -> Floats:
        return self._latent(name) + self.scenario.feature_shift(self.month)

    @cached_property
    def user_id(self) -> Any:
        return _user_ids(self._numbered(self.joined), self.seed)

    @cached_property
    def signup_date(self) -> NDArray[np.datetime64]:
        months = np.datetime64(str(EPOCH), "M") + self.joined.astype(np.int64)
        first, following = months.astype("M8[D]"), (months + 1).astype("M8[D]")
        days = (following - first).astype(np.int64)
        return np.asarray(first + np.floor(self._user.uniform("signup_date") * days).astype(np.int64))

    @cached_property
    def user_gender(self) -> Any:
        return _named((self._user.uniform("user_gender") < 0.505).astype(np.int64), GENDERS)

    @cached_property
    def user_is_senior(self) -> Flags:
        return self._subscription.uniform("user_is_senior") < SENIOR_SHARE

    @cached_property
    def has_family(self) -> Flags:
        return self._place.uniform("has_family") < FAMILY_SHARE

    @cached_property
    def has_dependents(self) -> Flags:
        shares = DEPENDENT_SHARES[self.has_family.astype(np.int64), self.user_is_senior.astype(np.int64)]
        return self._subscription.uniform("has_dependents") < shares

    @cached_property
    def months_active(self) -> Integers:
        return self._now - self.began.astype(np.int64)

    @cached_property
    def _net(self) -> Integers:
        shares = NET_SHARES[self.user_is_senior.astype(np.int64), self.has_dependents.astype(np.int64)]
        return self._subscription.choice("net_service", shares)

    @cached_property
    def net_service(self) -> Any:
        return _named(self._net, NET_SERVICES)

    @cached_property
    def paperless_billing(self) -> Flags:
        return self._subscription.uniform("paperless_billing") < PAPERLESS_SHARES[self._net]

    @cached_property
    def _tv_age(self) -> Floats:
        return self._plan_age(self._subscription.uniform("plan_stream_tv"))

    @cached_property
    def _movies_age(self) -> Floats:
        same = self._subscription.uniform("same taste") < SAME_TASTE
        own = self._plan_age(self._subscription.uniform("plan_stream_movies"))
        return np.where(same, self._tv_age, own)

    def _plan_age(self, reluctance: Floats) -> Floats:
        """The age in months at which a subscription takes a plan; infinite for never."""
        ages = np.full(len(reluctance), np.inf)
        for net, shares in PLAN_SHARES.items():
            taken = np.ceil(np.interp(reluctance, shares, AGES, right=np.inf))
            ages = np.where(self._net == net, taken, ages)
        return ages

    @cached_property
    def _tv(self) -> Flags:
        return self.months_active >= self._tv_age

    @cached_property
    def _movies(self) -> Flags:
        return self.months_active >= self._movies_age

    @cached_property
    def plan_stream_tv(self) -> Any:
        return pa.array(self._tv, mask=self._net == OFFLINE)

    @cached_property
    def plan_stream_movies(self) -> Any:
        return pa.array(self._movies, mask=self._net == OFFLINE)

    @cached_property
    def _term(self) -> Integers:
        commitment = self._subscription.uniform("contract_type")
        monthly, below_two = (
            np.choose(self._net, [np.interp(self.months_active, AGES, shares) for shares in table])
            for table in (MONTHLY_TERM_SHARES, BELOW_TWO_YEARS_SHARES)
        )
        return (commitment >= monthly).astype(np.int64) + (commitment >= below_two)

    @cached_property
    def contract_type(self) -> Any:
        return _named(self._term, TERMS)

    @cached_property
    def _fee_without_plans(self) -> Floats:
        latent = self._subscription.normal("extras")
        extras = np.choose(self._net, [_cut(latent, shares) for shares in EXTRAS_SHARES])
        return BASE_FEES[self._net] + 5.0 * extras + 0.6 * self._subscription.normal("monthly_fee")

    @cached_property
    def monthly_fee(self) -> Floats:
        return _rounded(self._fee_without_plans + PLAN_FEE * self._tv + PLAN_FEE * self._movies, COINS)

    @cached_property
    def total_paid(self) -> Floats:
        age = self.months_active
        plan_months = np.maximum(age - self._tv_age, 0.0) + np.maximum(age - self._movies_age, 0.0)
        noise = 0.19 * self._subscription.normal("total_paid") * np.sqrt(np.maximum(age - 1, 0))
        return _rounded(self._fee_without_plans * (age + noise) + PLAN_FEE * plan_months, COINS)

    @cached_property
    def watch_hours_30d(self) -> Floats:
        shift = self.scenario.seasonal_shift(self.month) - self.scenario.feature_shift(self.month)
        hours = 20 + 0.148 * self.monthly_fee + 4.97 * (self._latent("watch_hours_30d") + shift)
        return np.maximum(hours, 0.0)

    @cached_property
    def avg_session_mins_7d(self) -> Floats:
        return np.full(len(self.places), SESSION_MINUTES)

    @cached_property
    def unique_devices_30d(self) -> Integers:
        return 1 + _cut(self._latent("unique_devices_30d"), (1 / 3, 1 / 3, 1 / 3))

    @cached_property
    def skips_7d(self) -> Integers:
        return _cut(self._latent("skips_7d"), SKIP_SHARES)

    @cached_property
    def rebuffer_events_7d(self) -> Integers:
        on_dsl = np.asarray(self._net == DSL, np.int64)
        return _cut(self._drifting("rebuffer_events_7d"), STALL_SHARES) + on_dsl

    @cached_property
    def failed_payments_90d(self) -> Integers:
        return _cut(self._drifting("failed_payments_90d"), FAILURE_SHARES)

    @cached_property
    def support_tickets_90d(self) -> Integers:
        return _cut(self._drifting("support_tickets_90d"), TICKET_SHARES)

    @cached_property
    def ticket_avg_resolution_hrs_90d(self) -> Floats:
        hours = 10 + 3.9 * self._latent("ticket_avg_resolution_hrs_90d")
        return np.maximum(_rounded(hours, 10), 1.0)

    @cached_property
    def _established(self) -> Floats:
        """Log-odds of churn by a logistic regression of the real 2024-01."""
        log_odds = 0.13 - 0.70 * np.log1p(self.months_active)
        log_odds += np.array([0.0, -0.95, -2.2])[self._term]
        log_odds += np.array([0.0, 1.1, -1.0])[self._net]
        log_odds += 0.35 * self._tv + 0.35 * self._movies
        log_odds += 0.45 * self.paperless_billing + 0.35 * self.user_is_senior - 0.15 * self.has_dependents
        return np.asarray(log_odds, np.float64)

    @cached_property
    def _changed(self) -> Floats:
        """Log-odds of churn that resemble the real 2024-02."""
        log_odds = -2.0 - 0.006 * (self.monthly_fee - 65) + 0.65 * (self.watch_hours_30d < 30)
        log_odds += 0.65 * (self.failed_payments_90d > 0) + 0.85 * (self.support_tickets_90d > 0)
        return np.asarray(log_odds, np.float64)

    @cached_property
    def _floor(self) -> Floats:
        return _end_rate(self.months_active, self.has_family)

    @cached_property
    def churn_probability(self) -> Floats:
        """The true probability of the label."""
        season, part = self.scenario.seasonal_shift(self.month), self.scenario.changed_part(self.month)
        blend = (1 - part) * _expit(self._established - season) + part * _expit(self._changed - season)
        return _rounded(np.maximum(blend, self._floor), 10**6)

    @cached_property
    def _fate(self) -> Floats:
        return self._subscription_month.uniform("churn_label")

    @cached_property
    def churn_label(self) -> Flags:
        return self._fate < self.churn_probability

    @cached_property
    def ended(self) -> Flags:
        """Whose subscription ends with the month: someone else's, new in every respect, takes the place."""
        return self._fate < self._floor

    @cached_property
    def left(self) -> Flags:
        """Who is gone the next month."""
        return self.ended | (self.churn_label & (self._user_month.uniform("leave") < self.scenario.leave_share))


def _arbitrary(column: Column, dice: _Dice, month: Month) -> Any:
    """Values of no meaning that the contract allows; a twentieth is empty where it allows that too."""
    values = _arbitrary_values(column, dice, month)
    if not column.nullable and column.empty_means is None:
        return values
    return pa.array(values, mask=dice.uniform(f"{column.name} empty") < 0.05)


def _arbitrary_values(column: Column, dice: _Dice, month: Month) -> NDArray[Any]:
    point = dice.uniform(column.name)
    low = 0.0 if column.low is None else column.low
    high = min(low + 100, math.inf if column.high is None else column.high)
    match column.kind:
        case "id":
            return np.char.mod("%d", dice.bits(column.name))
        case "category":
            return np.array(column.categories)[np.floor(point * len(column.categories)).astype(np.int64)]
        case "boolean":
            return point < 0.5
        case "integer":
            first = math.ceil(low)
            return first + np.floor(point * (math.floor(high) - first + 1)).astype(np.int64)
        case "float":
            return low + point * (high - low)
        case "date":
            days = np.datetime64(month.as_of) - np.floor(point * 365).astype(np.int64)
            return days if column.earliest is None else np.maximum(days, np.datetime64(column.earliest))


class _MonthFiles:
    """The CSV files of one month and the truth beside them, written chunk by chunk."""

    def __init__(self, folder: Path, month: Month, contract: Contract) -> None:
        self._open = ExitStack()
        truth = Table(TRUTH, "", (Column(USER_ID, "id", ""), Column(TRUTH, "float", "")))
        self._files = [
            self._start(folder / TRUTH_FOLDER / f"{month}.csv", truth),
            *(self._start(folder / str(month) / table.file, table) for table in contract.tables),
        ]

    def _start(self, path: Path, table: Table) -> tuple[Table, Any]:
        path.parent.mkdir(exist_ok=True)
        file = self._open.enter_context(pa.OSFile(str(path), "wb"))
        file.write((",".join(column.name for column in table.columns) + "\n").encode())
        return table, file

    def __enter__(self) -> "_MonthFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def write(self, customers: _Customers) -> None:
        """Append these customers to each file."""
        texts: dict[str, Any] = {}
        for table, file in self._files:
            for column in table.columns:
                if column.name not in texts:
                    texts[column.name] = _text(column, customers.column(column))
            rows = pa.table({column.name: texts[column.name] for column in table.columns})
            csv.write_csv(rows, file, PLAIN)


def _text(column: Column, values: Any) -> Any:
    """The values in a form that Arrow writes as Python does: True and False, 16.0 and not 16."""
    array = pa.array(values)
    match column.kind:
        case "boolean":
            return _named(array.cast(pa.int8()), ("False", "True")).cast(pa.string())
        case "category":
            return array.cast(pa.string())
        case "float":
            text = array.cast(pa.string())
            whole = pc.equal(array, pc.floor(array))
            return pc.if_else(whole, pc.binary_join_element_wise(text, ".0", ""), text)
        case _:
            return array
