"""THE data contract: each table, column, type, bound, unit, snapshot and feature view, once.

The warehouse's DDL, the CSV checks, the Feast fields, the preprocessing columns, the MLflow signature and the
API's features schema derive from here. Nothing here knows of a library; nothing elsewhere lists columns.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from typing import Literal

Kind = Literal["id", "category", "boolean", "integer", "float", "date"]

USER_ID = "user_id"
USER_ID_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}"
MONTH = "month"
AS_OF = "as_of"
SCHEMA = "streamflow"
LABEL_HORIZON_MONTHS = 0
"""A label lands with the month it speaks of; features of as_of are trained on the label this many months later."""


@dataclass(frozen=True)
class Column:
    """One column of one CSV file.

    ``low`` and ``high`` are inclusive bounds in ``unit``. ``empty_means`` is what an empty field stands for;
    without it an empty field is refused unless ``nullable``. ``view`` names the feature view that serves it.
    ``protected`` is an attribute that fairness is measured by; only a service that says so lets a model see it.

    Raises ValueError when the parts contradict each other.
    """

    name: str
    kind: Kind
    description: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    earliest: date | None = None
    not_after_as_of: bool = False
    categories: tuple[str, ...] = ()
    nullable: bool = False
    empty_means: bool | None = None
    view: str | None = None
    protected: bool = False

    def __post_init__(self) -> None:
        if (self.kind == "category") != bool(self.categories):
            raise ValueError(f"{self.name}: a category has categories, and nothing else does")
        if self.empty_means is not None and self.kind != "boolean":
            raise ValueError(f"{self.name}: only for a boolean can an empty field mean something")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"{self.name}: nothing is both at least {self.low} and at most {self.high}")
        if self.view and self.kind in ("id", "date"):
            raise ValueError(f"{self.name}: a model takes no {self.kind}, so no feature view serves one")

    @property
    def is_numeric(self) -> bool:
        """Whether a model takes the value as a number: booleans count as 0 and 1."""
        return self.kind in ("boolean", "integer", "float")

    @property
    def meaning(self) -> str:
        """Twelve hex digits that change when values of the column mean something else than before."""
        parts = (self.name, self.kind, self.unit, self.description, self.categories, self.empty_means)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Table:
    """One CSV file a month and the warehouse table of the same name, keyed by ``(month, user_id)``."""

    name: str
    description: str
    columns: tuple[Column, ...]
    snapshot: str | None = None
    may_come_later: bool = False

    @property
    def file(self) -> str:
        """The file's name in a month's folder."""
        return f"{self.name}.csv"

    @property
    def values(self) -> tuple[Column, ...]:
        """The columns other than the key."""
        return tuple(column for column in self.columns if column.name != USER_ID)

    @property
    def meanings(self) -> dict[str, str]:
        """What the values of each column mean, as `Column.meaning` has it."""
        return {column.name: column.meaning for column in self.values}


@dataclass(frozen=True)
class FeatureView:
    """A Feast view of some columns of one snapshot."""

    name: str
    table: Table
    columns: tuple[Column, ...]
    description: str

    @property
    def snapshot(self) -> str:
        """The snapshot table that the view reads."""
        return str(self.table.snapshot)


@dataclass(frozen=True)
class FeatureService:
    """The features, in order, that a model version is trained on and served with.

    ``takes_protected`` tells whether the protected columns of its views are among them.
    """

    name: str
    views: tuple[FeatureView, ...]
    description: str
    takes_protected: bool = False

    def columns_of(self, view: FeatureView) -> tuple[Column, ...]:
        """What the service takes from one of its views."""
        return tuple(column for column in view.columns if self.takes_protected or not column.protected)

    @property
    def columns(self) -> tuple[Column, ...]:
        """The features in the order that the model takes them."""
        return tuple(column for view in self.views for column in self.columns_of(view))

    @property
    def names(self) -> list[str]:
        """The features' names in the order that the model takes them."""
        return [column.name for column in self.columns]

    @property
    def protected(self) -> tuple[str, ...]:
        """The protected attributes that a model on this service predicts from."""
        return tuple(column.name for column in self.columns if column.protected)


@dataclass(frozen=True)
class Contract:
    """All tables, and what the feature store and the models make of them.

    Raises ValueError when the parts contradict each other.
    """

    tables: tuple[Table, ...]
    view_descriptions: dict[str, str]
    service_views: dict[str, tuple[str, ...]]
    service_descriptions: dict[str, str]
    label: str
    fee: str = "monthly_fee"
    services_with_protected: frozenset[str] = frozenset()
    label_horizon_months: int = LABEL_HORIZON_MONTHS
    views: tuple[FeatureView, ...] = field(init=False)
    services: tuple[FeatureService, ...] = field(init=False)

    def __post_init__(self) -> None:
        columns = [column for table in self.tables for column in table.values]
        names = [MONTH, AS_OF, *(column.name for column in columns)]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"columns stated twice in the contract: {', '.join(repeated)}")
        for role, name in (("label", self.label), ("fee", self.fee)):
            if name not in names:
                raise ValueError(f"no table of the contract has the {role} {name}")
        served = {column.view for column in columns if column.view}
        named = {view for views in self.service_views.values() for view in views}
        if unknown := sorted((served | named) - self.view_descriptions.keys()):
            raise ValueError(f"feature views that the contract does not describe: {', '.join(unknown)}")
        if self.service_views.keys() != self.service_descriptions.keys():
            raise ValueError("the contract must describe each feature service, and no other")
        if unknown := sorted(self.services_with_protected - self.service_views.keys()):
            raise ValueError(f"feature services that the contract does not describe: {', '.join(unknown)}")
        object.__setattr__(self, "views", tuple(self._build_views()))
        object.__setattr__(self, "services", tuple(self._build_services()))

    def _build_views(self) -> Iterator[FeatureView]:
        for name, description in self.view_descriptions.items():
            owners = [table for table in self.tables if any(column.view == name for column in table.columns)]
            if len(owners) != 1 or owners[0].snapshot is None:
                raise ValueError(f"feature view {name} must take its columns from one table that has a snapshot")
            columns = tuple(column for column in owners[0].columns if column.view == name)
            yield FeatureView(name, owners[0], columns, description)

    def _build_services(self) -> Iterator[FeatureService]:
        for name, views in self.service_views.items():
            yield FeatureService(
                name,
                tuple(self.view(view) for view in views),
                self.service_descriptions[name],
                takes_protected=name in self.services_with_protected,
            )

    def table(self, name: str) -> Table:
        """The table of that name; KeyError if there is none."""
        return {table.name: table for table in self.tables}[name]

    def view(self, name: str) -> FeatureView:
        """The feature view of that name; KeyError if there is none."""
        return {view.name: view for view in self.views}[name]

    def service(self, name: str) -> FeatureService:
        """The feature service of that name; KeyError if there is none."""
        return {service.name: service for service in self.services}[name]

    @property
    def features(self) -> tuple[Column, ...]:
        """The columns of all feature views: what a training dataset has, whatever a model takes of it."""
        return tuple(column for view in self.views for column in view.columns)

    @property
    def snapshots(self) -> tuple[Table, ...]:
        """The tables that have a snapshot."""
        return tuple(table for table in self.tables if table.snapshot)

    @property
    def label_table(self) -> Table:
        """The table that carries the label."""
        return next(table for table in self.tables if any(column.name == self.label for column in table.columns))


def _key() -> Column:
    return Column(USER_ID, "id", "The customer.")


USERS = Table(
    "users",
    "Who the customers of the month are.",
    (
        _key(),
        Column(
            "signup_date",
            "date",
            "The day the account was opened.",
            unit="day",
            earliest=date(2000, 1, 1),
            not_after_as_of=True,
        ),
        Column(
            "user_gender",
            "category",
            "Gender as stated by the customer.",
            categories=("Female", "Male"),
            view="customer_fv",
            protected=True,
        ),
        Column("user_is_senior", "boolean", "65 years or older.", view="customer_fv", protected=True),
        Column("has_family", "boolean", "Lives with a partner.", view="customer_fv"),
        Column("has_dependents", "boolean", "Has dependents.", view="customer_fv"),
    ),
    snapshot="users_snapshots",
)

SUBSCRIPTIONS = Table(
    "subscriptions",
    "What each customer has subscribed to and pays.",
    (
        _key(),
        Column(
            "months_active",
            "integer",
            "Completed months of the subscription.",
            unit="months",
            low=0,
            high=1200,
            view="subs_profile_fv",
        ),
        Column(
            "monthly_fee",
            "float",
            "Fee charged for the month.",
            unit="currency/month",
            low=0,
            high=10_000,
            view="subs_profile_fv",
        ),
        Column("paperless_billing", "boolean", "Bills are sent electronically.", view="subs_profile_fv"),
        Column(
            "plan_stream_tv",
            "boolean",
            "The plan includes television; empty for customers without internet, who have none.",
            empty_means=False,
            view="subs_profile_fv",
        ),
        Column(
            "plan_stream_movies",
            "boolean",
            "The plan includes movies; empty for customers without internet, who have none.",
            empty_means=False,
            view="subs_profile_fv",
        ),
        Column(
            "net_service",
            "category",
            "Internet service of the plan.",
            categories=("DSL", "Fiber optic", "No"),
            view="subs_profile_fv",
        ),
        Column(
            "contract_type",
            "category",
            "Term of the contract.",
            categories=("Month-to-month", "One year", "Two year"),
            view="contract_fv",
        ),
        Column(
            "total_paid",
            "float",
            "Paid since sign-up.",
            unit="currency",
            low=0,
            high=10_000_000,
            view="contract_fv",
        ),
    ),
    snapshot="subscriptions_profile_snapshots",
)

USAGE = Table(
    "usage_agg_30d",
    "How the service was used in the days before as_of.",
    (
        _key(),
        Column(
            "watch_hours_30d",
            "float",
            "Hours watched in the last 30 days.",
            unit="h",
            low=0,
            high=720,
            view="usage_agg_30d_fv",
        ),
        Column(
            "avg_session_mins_7d",
            "float",
            "Mean length of a session in the last 7 days.",
            unit="min",
            low=0,
            high=10_080,
            view="usage_agg_30d_fv",
        ),
        Column(
            "unique_devices_30d",
            "integer",
            "Different devices used in the last 30 days.",
            unit="devices",
            low=0,
            high=1_000,
            view="usage_agg_30d_fv",
        ),
        Column(
            "skips_7d",
            "integer",
            "Titles skipped in the last 7 days.",
            unit="skips",
            low=0,
            high=100_000,
            view="usage_agg_30d_fv",
        ),
        Column(
            "rebuffer_events_7d",
            "integer",
            "Playback stalls in the last 7 days.",
            unit="stalls",
            low=0,
            high=100_000,
            view="usage_agg_30d_fv",
        ),
    ),
    snapshot="usage_agg_30d_snapshots",
)

PAYMENTS = Table(
    "payments_agg_90d",
    "How payments went in the 90 days before as_of.",
    (
        _key(),
        Column(
            "failed_payments_90d",
            "integer",
            "Payments that failed in the last 90 days.",
            unit="payments",
            low=0,
            high=1_000,
            view="payments_agg_90d_fv",
        ),
    ),
    snapshot="payments_agg_90d_snapshots",
)

SUPPORT = Table(
    "support_agg_90d",
    "What customers asked of support in the 90 days before as_of.",
    (
        _key(),
        Column(
            "support_tickets_90d",
            "integer",
            "Tickets opened in the last 90 days.",
            unit="tickets",
            low=0,
            high=1_000,
            view="support_agg_90d_fv",
        ),
        Column(
            "ticket_avg_resolution_hrs_90d",
            "float",
            "Mean time to resolve a ticket in the last 90 days.",
            unit="h",
            low=0,
            high=2_160,
            view="support_agg_90d_fv",
        ),
    ),
    snapshot="support_agg_90d_snapshots",
)

LABELS = Table(
    "labels",
    "Whether each customer churned in the month.",
    (_key(), Column("churn_label", "boolean", "The customer churned in the month.")),
    may_come_later=True,
)

_ALL_VIEWS = (
    "subs_profile_fv",
    "usage_agg_30d_fv",
    "payments_agg_90d_fv",
    "support_agg_90d_fv",
    "contract_fv",
    "customer_fv",
)

CONTRACT = Contract(
    tables=(USERS, SUBSCRIPTIONS, USAGE, PAYMENTS, SUPPORT, LABELS),
    view_descriptions={
        "subs_profile_fv": "The subscription as it stood at as_of.",
        "usage_agg_30d_fv": "Usage in the 7 and 30 days before as_of.",
        "payments_agg_90d_fv": "Payments in the 90 days before as_of.",
        "support_agg_90d_fv": "Support in the 90 days before as_of.",
        "contract_fv": "Term and total of the contract as it stood at as_of.",
        "customer_fv": "Who the customer is, as known at as_of.",
    },
    service_views={
        "churn_v1": ("subs_profile_fv", "usage_agg_30d_fv", "payments_agg_90d_fv", "support_agg_90d_fv"),
        "churn_v2": _ALL_VIEWS,
        "churn_v2_protected": _ALL_VIEWS,
    },
    service_descriptions={
        "churn_v1": "The features of the first churn models.",
        "churn_v2": "Those of churn_v1, the contract and the household, without protected attributes.",
        "churn_v2_protected": "Those of churn_v2 and the protected attributes, where the policy allows it.",
    },
    services_with_protected=frozenset({"churn_v2_protected"}),
    label="churn_label",
)
