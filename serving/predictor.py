"""Predictions: features fetched and scored together for whoever asks, by one model from beginning to end."""

import time
from collections.abc import Callable, Sequence
from datetime import date, datetime

import msgspec

from serving.features import FeatureStore, FeatureValue, MissingFeatures, OnlineFeatures
from serving.metrics import Metrics
from serving.production import ProductionModel, ServedModel
from serving.schemas import Features
from streamflow.errors import StreamFlowError
from streamflow.scoring import UnscorableFeatures, decide


class UnscorableUser(StreamFlowError):
    """The model cannot take a customer's features; the message names one of them."""

    def __init__(self, user_id: str, refusal: UnscorableFeatures) -> None:
        why = str(refusal).removeprefix(f"row {refusal.row}: ")
        super().__init__(f"the model cannot score user {user_id}: {why}")


class Scored(msgspec.Struct, frozen=True):
    """One customer's probability of churn and what it was computed from."""

    model: ServedModel
    user_id: str
    features_as_of: date
    features: Features
    probability: float
    scored_at: datetime

    @property
    def churns(self) -> bool:
        """Whether the customer is expected to churn, by the threshold that the ledger records."""
        return decide(self.probability, self.model.production.threshold)


class Predictor:
    """Reads features and scores them with the served model."""

    def __init__(
        self, production: ProductionModel, store: FeatureStore, clock: Callable[[], datetime], metrics: Metrics
    ) -> None:
        self._production = production
        self._store = store
        self._clock = clock
        self._metrics = metrics

    async def features(self, user_id: str) -> tuple[date, Features]:
        """A customer's features for the served model and the day they speak of; raises as `predict` does."""
        query = self._production.current().query
        (found,) = await self._store.read(query, [user_id])
        if isinstance(found, MissingFeatures):
            raise found
        return found.as_of, Features(zip(query.names, found.values, strict=True))

    async def predict(self, user_id: str) -> Scored:
        """Score one customer.

        Raises NoModel, WarehouseUnavailable, UnknownUser, IncompleteFeatures or UnscorableUser.
        """
        (outcome,) = await self.predict_all([user_id])
        if isinstance(outcome, StreamFlowError):
            raise outcome
        return outcome

    async def predict_all(self, user_ids: Sequence[str]) -> list[Scored | StreamFlowError]:
        """Score each customer, or say why not, in the order asked for; raises NoModel or WarehouseUnavailable."""
        model = self._production.current()
        asked = time.perf_counter()
        found = await self._store.read(model.query, user_ids)
        read = time.perf_counter()
        self._metrics.observe("features", read - asked)
        scores = iter(_score(model, [user.values for user in found if isinstance(user, OnlineFeatures)]))
        self._metrics.observe("score", time.perf_counter() - read)
        now = self._clock()
        outcomes: list[Scored | StreamFlowError] = [
            user if isinstance(user, MissingFeatures) else _scored(model, user, next(scores), now) for user in found
        ]
        self._metrics.answered(outcomes, now)
        return outcomes


def _score(model: ServedModel, rows: list[list[FeatureValue]]) -> list[float | UnscorableFeatures]:
    """Score the rows in one call; when one of them cannot be scored, each by itself."""
    if not rows:
        return []
    try:
        return model.scorer.score(rows).tolist()  # type: ignore[no-any-return]
    except UnscorableFeatures as refusal:
        return [refusal] if len(rows) == 1 else [score for row in rows for score in _score(model, [row])]


def _scored(
    model: ServedModel, user: OnlineFeatures, score: float | UnscorableFeatures, now: datetime
) -> Scored | UnscorableUser:
    if isinstance(score, UnscorableFeatures):
        return UnscorableUser(user.user_id, score)
    features = Features(zip(model.query.names, user.values, strict=True))
    return Scored(model, user.user_id, user.as_of, features, score, now)
