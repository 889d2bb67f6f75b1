"""The online features: what the served model's feature views hold for a list of customers, in one round trip.

Reads the wide tables of PostgreSQL; feast_features.py reads Redis, through Feast. Computes and replaces nothing: a
feature that is not there is an error.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Protocol

import msgspec
from psycopg import sql

from serving.postgres import Postgres
from streamflow.contract import USER_ID
from streamflow.errors import StreamFlowError
from streamflow.scoring import ScorerFeature

ONLINE = "online"

FeatureValue = bool | int | float | str


class MissingFeatures(StreamFlowError):
    """A customer cannot be scored: ``missing`` names the features that the feature store does not hold."""

    def __init__(self, message: str, missing: Sequence[str]) -> None:
        super().__init__(message)
        self.missing = tuple(missing)


class UnknownUser(MissingFeatures):
    """No feature view knows the customer."""


class IncompleteFeatures(MissingFeatures):
    """Some features of a known customer are missing."""


@dataclass(frozen=True)
class FeatureQuery:
    """The features of one model in its order, the statement that reads them for an array of user ids, Feast's names."""

    names: tuple[str, ...]
    statement: str
    references: tuple[str, ...]

    @classmethod
    def of(cls, features: Sequence[ScorerFeature]) -> "FeatureQuery":
        """The query for these features of whichever views."""
        views = list(dict.fromkeys(feature.view for feature in features))
        statement = sql.SQL(
            """
            SELECT (least({event_timestamps}) AT TIME ZONE 'UTC')::date, {features}
            FROM unnest($1::text[]) WITH ORDINALITY AS asked ({user_id}, position)
            {joins}
            ORDER BY asked.position
            """
        ).format(
            event_timestamps=sql.SQL(", ").join(sql.Identifier(view, "event_timestamp") for view in views),
            features=sql.SQL(", ").join(sql.Identifier(feature.view, feature.name) for feature in features),
            user_id=sql.Identifier(USER_ID),
            joins=sql.SQL(" ").join(
                sql.SQL("LEFT JOIN {} USING ({})").format(sql.Identifier(ONLINE, view), sql.Identifier(USER_ID))
                for view in views
            ),
        )
        return cls(
            tuple(feature.name for feature in features),
            statement.as_string(None),
            tuple(f"{feature.view}:{feature.name}" for feature in features),
        )


class OnlineFeatures(msgspec.Struct, frozen=True):
    """One customer's features in the order of the query; ``as_of`` is the oldest of their views' dates."""

    user_id: str
    as_of: date
    values: list[FeatureValue]


class FeatureStore(Protocol):
    """The online store, as the service reads it; ``answers`` says that it does."""

    answers: str

    async def read(self, query: FeatureQuery, user_ids: Sequence[str]) -> list[OnlineFeatures | MissingFeatures]:
        """The features of each customer, or why there are none, in the order asked for.

        Raises WarehouseUnavailable, or its QueryRefused when the store lacks what the query names; also for no
        customer.
        """


class PostgresFeatureStore(FeatureStore):
    """The wide tables."""

    answers = "PostgreSQL answers"

    def __init__(self, postgres: Postgres) -> None:
        self._postgres = postgres

    async def read(self, query: FeatureQuery, user_ids: Sequence[str]) -> list[OnlineFeatures | MissingFeatures]:
        """As `FeatureStore.read`."""
        rows = await self._postgres.fetch(query.statement, list(user_ids))
        return [
            online_features(query.names, user_id, as_of, values)
            for user_id, (as_of, *values) in zip(user_ids, rows, strict=True)
        ]


def online_features(
    names: tuple[str, ...], user_id: str, as_of: date | None, values: list[FeatureValue]
) -> OnlineFeatures | MissingFeatures:
    """What was read of one customer, or what is missing; without ``as_of`` no view knows them."""
    if as_of is None:
        return UnknownUser(f"the feature store does not know user {user_id}", names)
    if None in values:
        missing = [name for name, value in zip(names, values, strict=True) if value is None]
        return IncompleteFeatures(f"the feature store lacks features of user {user_id}: {', '.join(missing)}", missing)
    return OnlineFeatures(user_id, as_of, values)
