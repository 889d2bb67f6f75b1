"""Predictions: features fetched and scored together for whoever asks, by one model from beginning to end."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import cast

import msgspec

from serving.features import FeatureStore, FeatureValue, MissingFeatures, OnlineFeatures
from serving.metrics import Metrics
from serving.production import ProductionModel, ServedModel
from serving.schemas import Features
from streamflow.errors import StreamFlowError
from streamflow.explanation import Explanation, explain
from streamflow.scoring import UnscorableFeatures, decide

MOST_TOGETHER = 256
"""Single customers that share a query and a model call."""
QUESTIONS = 2
"""How many shared queries are under way at most: PostgreSQL answers one while the other's customers are scored."""
IN_PLACE = 64
"""More rows than these are scored in a thread, so that other requests need not wait for them."""


class UnscorableUser(StreamFlowError):
    """The model cannot take a customer's features; the message names one of them."""

    def __init__(self, user_id: str, refusal: UnscorableFeatures) -> None:
        why = str(refusal).removeprefix(f"row {refusal.row}: ")
        super().__init__(f"the model cannot score user {user_id}: {why}")


class StaleFeatures(StreamFlowError):
    """A customer's features are older than the service may answer with."""

    def __init__(self, user_id: str, as_of: date, limit_days: int) -> None:
        super().__init__(
            f"the features of user {user_id} are as of {as_of}, and may be {limit_days} days old; run the newest month"
        )


@dataclass(frozen=True)
class Freshness:
    """How old features may be, in days, and whether older ones are refused rather than flagged."""

    limit_days: int
    refuse: bool


class Scored(msgspec.Struct, frozen=True):
    """One customer's probability of churn and what it was computed from.

    ``stale`` says that the features are older than they should be, ``outside`` names those whose values are outside of
    what the model was trained on.
    """

    model: ServedModel
    user_id: str
    features_as_of: date
    features: Features
    probability: float
    scored_at: datetime
    stale: bool
    outside: tuple[str, ...]

    @property
    def churns(self) -> bool:
        """Whether the customer is expected to churn, by the threshold that the ledger records."""
        return decide(self.probability, self.model.production.threshold)


Outcome = Scored | StreamFlowError
Examined = tuple[float, tuple[str, ...]] | UnscorableFeatures
"""A row's probability and the features outside of what the model was trained on, or why it cannot be scored."""


class Predictor:
    """Reads features and scores them with the served model.

    Customers who are asked for one by one while others are being scored are then scored together: one query and one
    model call for all of them. Who asks while fewer than ``QUESTIONS`` queries are under way waits for nobody.
    """

    def __init__(
        self,
        production: ProductionModel,
        store: FeatureStore,
        freshness: Freshness,
        clock: Callable[[], datetime],
        metrics: Metrics,
    ) -> None:
        self._production = production
        self._store = store
        self._freshness = freshness
        self._clock = clock
        self._metrics = metrics
        self._waiting: list[tuple[str, asyncio.Future[Outcome]]] = []
        self._answering: set[asyncio.Task[None]] = set()
        self._explaining = asyncio.Lock()

    @property
    def waiting(self) -> int:
        """How many customers wait for those under way."""
        return len(self._waiting)

    async def features(self, user_id: str) -> tuple[date, Features]:
        """A customer's features for the served model and the day they speak of; raises as `predict` does."""
        query = self._production.current().query
        (found,) = await self._store.read(query, [user_id])
        if isinstance(found, MissingFeatures):
            raise found
        return found.as_of, Features(zip(query.names, found.values, strict=True))

    async def predict(self, user_id: str) -> Scored:
        """Score one customer.

        Raises NoModel, WarehouseUnavailable, UnknownUser, IncompleteFeatures, UnscorableUser or StaleFeatures.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Outcome] = loop.create_future()
        self._waiting.append((user_id, future))
        if len(self._answering) < QUESTIONS:
            self._answering.add(loop.create_task(self._answer()))
        outcome = await future
        if isinstance(outcome, StreamFlowError):
            raise outcome
        return outcome

    async def explain(self, scored: Scored) -> Explanation:
        """What each feature contributes to a prediction, computed in a thread, one at a time."""
        scorer = scored.model.scorer
        async with self._explaining:
            return await asyncio.to_thread(explain, scorer, [scored.features[one.name] for one in scorer.features])

    async def _answer(self) -> None:
        """Score whoever waits, again and again until nobody does."""
        while self._waiting:
            asked, self._waiting = self._waiting[:MOST_TOGETHER], self._waiting[MOST_TOGETHER:]
            try:
                outcomes = await self.predict_all([user_id for user_id, _ in asked])
            except Exception as failure:
                # Whoever waited behind a store that does not answer would only meet the same after as long again.
                failed, self._waiting = [*asked, *self._waiting], []
                for _, future in failed:
                    if not future.done():
                        future.set_exception(failure)
            else:
                for (_, future), outcome in zip(asked, outcomes, strict=True):
                    if not future.done():
                        future.set_result(outcome)
        self._answering.remove(cast("asyncio.Task[None]", asyncio.current_task()))

    async def predict_all(self, user_ids: Sequence[str]) -> list[Outcome]:
        """Score each customer, or say why not, in the order asked for; raises NoModel or WarehouseUnavailable."""
        model = self._production.current()
        started = time.perf_counter()
        found = await self._store.read(model.query, user_ids)
        read = time.perf_counter()
        rows = [user.values for user in found if isinstance(user, OnlineFeatures)]
        scores = iter(_score(model, rows) if len(rows) <= IN_PLACE else await asyncio.to_thread(_score, model, rows))
        self._metrics.observe("features", read - started)
        self._metrics.observe("score", time.perf_counter() - read)
        now = self._clock()
        outcomes = [
            user if isinstance(user, MissingFeatures) else self._outcome(model, user, next(scores), now)
            for user in found
        ]
        self._metrics.answered(outcomes, now)
        return outcomes

    def _outcome(self, model: ServedModel, user: OnlineFeatures, examined: Examined, now: datetime) -> Outcome:
        if isinstance(examined, UnscorableFeatures):
            return UnscorableUser(user.user_id, examined)
        stale = (now.date() - user.as_of).days > self._freshness.limit_days
        if stale and self._freshness.refuse:
            return StaleFeatures(user.user_id, user.as_of, self._freshness.limit_days)
        features = Features(zip(model.query.names, user.values, strict=True))
        return Scored(model, user.user_id, user.as_of, features, examined[0], now, stale, examined[1])


def _score(model: ServedModel, rows: list[list[FeatureValue]]) -> list[Examined]:
    """Score the rows in one call; when one of them cannot be scored, each by itself."""
    if not rows:
        return []
    try:
        probabilities, outside = model.scorer.examine(rows)
    except UnscorableFeatures as refusal:
        return [refusal] if len(rows) == 1 else [score for row in rows for score in _score(model, [row])]
    return [(probability, outside.get(row, ())) for row, probability in enumerate(probabilities.tolist())]
