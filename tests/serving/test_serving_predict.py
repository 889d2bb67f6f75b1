import asyncio
import re
from collections.abc import Callable
from datetime import UTC, date, datetime
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from serving_world import FEATURES, KNOWN, Platform, eventually, predict, problem, train

from serving.features import FeatureQuery, FeatureStore, OnlineFeatures, UnknownUser
from serving.metrics import Metrics
from serving.predictor import Freshness, Predictor, Scored
from serving.production import Production, ServedModel
from serving.schemas import MAX_BATCH
from streamflow.contract import CONTRACT
from streamflow.errors import WarehouseUnavailable
from streamflow.scoring import Scorer
from streamflow.settings import Settings

NOW = datetime(2024, 3, 1, tzinfo=UTC)
JANUARY = date(2024, 1, 31)
NAMES = [column.name for column in CONTRACT.service("churn_v1").columns]


def test_a_prediction_carries_everything_it_came_from(shared_api: httpx.Client, artifacts: tuple[bytes, bytes]) -> None:
    answer = predict(shared_api)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    (probability,) = Scorer.from_bytes(artifacts[0]).score([[FEATURES[name] for name in NAMES]]).tolist()
    assert answer.json() == {
        "request_id": answer.headers["x-request-id"],
        "user_id": KNOWN,
        "prediction": int(probability >= 0.5),
        "probability": probability,
        "threshold": 0.5,
        "model_version": 1,
        "run_id": "run-1",
        "features_as_of": "2024-01-31",
        "timestamp": "2024-03-01T12:30:00Z",
        "features_used": FEATURES,
        "features_stale": False,
        "features_outside_training": ["watch_hours_30d"],
    }


def test_numbers_keep_64_bits_and_their_types(shared_api: httpx.Client, shared_platform: Platform) -> None:
    text = predict(shared_api).text
    assert '"monthly_fee":29.85,' in text
    assert '"watch_hours_30d":0.30000000000000004,' in text
    assert '"months_active":1,' in text
    assert '"plan_stream_tv":false,' in text
    assert re.search(r'"ticket_avg_resolution_hrs_90d":16\.0[,}]', text)
    shared_platform.publish("big", months_active=2**53 + 1)
    assert shared_api.get("/features/big").json()["features"]["months_active"] == 2**53 + 1


def test_the_threshold_is_the_ledgers_and_belongs_to_churn(
    platform: Platform, api: httpx.Client, artifacts: tuple[bytes, bytes]
) -> None:
    probability = predict(api).json()["probability"]
    platform.promote(2, artifacts[0], threshold=probability)
    eventually(lambda: predict(api).json()["model_version"] == 2)
    answer = predict(api).json()
    assert (answer["prediction"], answer["threshold"]) == (1, probability)
    above = probability + 1e-15
    platform.promote(3, artifacts[0], threshold=above)
    eventually(lambda: predict(api).json()["model_version"] == 3)
    assert predict(api).json()["prediction"] == 0


def test_request_ids_differ(shared_api: httpx.Client) -> None:
    ids = {predict(shared_api).json()["request_id"] for _ in range(20)}
    assert len(ids) == 20


def test_an_unknown_user_is_404_with_all_features_missing(shared_api: httpx.Client) -> None:
    for answer in (predict(shared_api, "nobody"), shared_api.get("/features/nobody")):
        details = problem(answer, 404, "unknown-user")
        assert details["missing_features"] == NAMES
        assert "nobody" in details["detail"]


def test_incomplete_features_are_422_and_named(shared_api: httpx.Client, shared_platform: Platform) -> None:
    shared_platform.publish("half", watch_hours_30d=None, support_tickets_90d=None)
    for answer in (predict(shared_api, "half"), shared_api.get("/features/half")):
        details = problem(answer, 422, "incomplete-features")
        assert details["missing_features"] == ["watch_hours_30d", "support_tickets_90d"]


def test_a_user_known_to_some_views_only_is_422(shared_api: httpx.Client, shared_platform: Platform) -> None:
    shared_platform.publish("part", views=["subs_profile_fv", "payments_agg_90d_fv"])
    details = problem(predict(shared_api, "part"), 422, "incomplete-features")
    absent = [*CONTRACT.view("usage_agg_30d_fv").columns, *CONTRACT.view("support_agg_90d_fv").columns]
    assert details["missing_features"] == [column.name for column in absent]


def test_a_category_that_the_model_does_not_know_is_422(shared_api: httpx.Client, shared_platform: Platform) -> None:
    shared_platform.publish("odd", net_service="Carrier pigeon")
    details = problem(predict(shared_api, "odd"), 422, "unscorable-features")
    says = "the model cannot score user odd: net_service is 'Carrier pigeon', not one of DSL, Fiber optic, No"
    assert details["detail"] == says
    batch = shared_api.post("/predict/batch", json={"user_ids": [KNOWN, "odd"]}).json()["results"]
    assert batch[1]["detail"] == says


def test_features_as_of_is_the_oldest_views(shared_api: httpx.Client, shared_platform: Platform) -> None:
    shared_platform.publish("both", as_of=date(2024, 2, 29))
    assert predict(shared_api, "both").json()["features_as_of"] == "2024-02-29"
    shared_platform.publish("both", as_of=date(2024, 1, 31), views=["usage_agg_30d_fv"])
    assert predict(shared_api, "both").json()["features_as_of"] == "2024-01-31"
    assert shared_api.get("/features/both").json()["as_of"] == "2024-01-31"


def test_features_of_a_user(shared_api: httpx.Client) -> None:
    answer = shared_api.get(f"/features/{KNOWN}")
    assert answer.status_code == 200
    assert answer.json() == {"user_id": KNOWN, "as_of": "2024-01-31", "features": FEATURES}


def test_a_batch_answers_each_in_order(shared_api: httpx.Client, shared_platform: Platform) -> None:
    shared_platform.publish("odd", net_service="Carrier pigeon")
    shared_platform.publish("half", skips_7d=None)
    shared_platform.publish("other", monthly_fee=99.0)
    asked = ["other", "nobody", KNOWN, "odd", "half", KNOWN]
    answer = shared_api.post("/predict/batch", json={"user_ids": asked})
    assert answer.status_code == 200
    results = answer.json()["results"]
    assert [result.get("user_id", result.get("status")) for result in results] == ["other", 404, KNOWN, 422, 422, KNOWN]
    assert results[1]["missing_features"] == NAMES
    assert results[4]["missing_features"] == ["skips_7d"]
    assert len({result["request_id"] for result in results}) == len(asked)
    for result in (results[0], results[2]):
        alone = predict(shared_api, result["user_id"]).json()
        assert {**alone, "request_id": ""} == {**result, "request_id": ""}


@pytest.mark.parametrize(("size", "status"), [(0, 200), (MAX_BATCH, 200), (MAX_BATCH + 1, 400)])
def test_a_batch_is_bounded(shared_api: httpx.Client, size: int, status: int) -> None:
    longest = "u" * 64
    answer = shared_api.post("/predict/batch", json={"user_ids": [longest] * size})
    assert answer.status_code == status
    if status == 200:
        assert len(answer.json()["results"]) == size
    else:
        problem(answer, 400, "malformed-request")


# --- together, too old, never seen ------------------------------------------------------------------------------------


def _predictor(store: FeatureStore, artifact: bytes, *, limit_days: int = 45, refuse: bool = False) -> Predictor:
    scorer = Scorer.from_bytes(artifact)
    production = Production(1, NOW, 1, "run-1", "churn_v1", JANUARY, 0.5, "scorer.bin", "sha")
    model = ServedModel(production, scorer, FeatureQuery.of(scorer.features), NOW)
    served = SimpleNamespace(current=lambda: model)
    return Predictor(served, store, Freshness(limit_days, refuse), lambda: NOW, Metrics(CONTRACT, lambda: NOW))  # type: ignore[arg-type]


class SlowStore:
    """Holds every question until it may answer; knows everybody whose name does not begin with "no"."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.asked: list[list[str]] = []
        self.may_answer = asyncio.Event()
        self._failure = failure

    async def read(self, query: FeatureQuery, user_ids: list[str]) -> list[Any]:
        self.asked.append(list(user_ids))
        await self.may_answer.wait()
        if self._failure:
            raise self._failure
        values = [FEATURES[name] for name in query.names]
        return [
            UnknownUser("who?", query.names) if user.startswith("no") else OnlineFeatures(user, JANUARY, values)
            for user in user_ids
        ]


async def _turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_who_asks_while_others_are_scored_is_scored_together(artifacts: tuple[bytes, bytes]) -> None:
    async def scenario() -> None:
        store = SlowStore()
        predictor = _predictor(store, artifacts[0])  # type: ignore[arg-type]
        under_way = []
        for user in ("first", "second"):
            under_way.append(asyncio.create_task(predictor.predict(user)))
            await _turns()
        assert store.asked == [["first"], ["second"]]
        later = [asyncio.create_task(predictor.predict(user)) for user in ("a", "nobody", "b", "a")]
        await _turns()
        assert (store.asked, predictor.waiting) == ([["first"], ["second"]], 4)
        store.may_answer.set()
        answers = await asyncio.gather(*under_way, *later, return_exceptions=True)
        assert store.asked == [["first"], ["second"], ["a", "nobody", "b", "a"]]
        assert [answer.user_id for answer in answers if isinstance(answer, Scored)] == [
            "first",
            "second",
            "a",
            "b",
            "a",
        ]
        assert isinstance(answers[3], UnknownUser)
        assert predictor.waiting == 0
        for user in ("b", "a", "b"):
            assert await predictor.predict(user) == answers[4 if user == "b" else 2]
        assert store.asked[3:] == [["b"], ["a"], ["b"]]

    asyncio.run(scenario())


def test_no_more_than_a_bounded_number_are_scored_together(
    artifacts: tuple[bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.predictor.MOST_TOGETHER", 3)

    async def scenario() -> None:
        store = SlowStore()
        store.may_answer.set()
        predictor = _predictor(store, artifacts[0])  # type: ignore[arg-type]
        users = [f"user-{number}" for number in range(8)]
        answers = await asyncio.gather(*map(predictor.predict, users))
        assert [answer.user_id for answer in answers] == users
        assert [len(asked) for asked in store.asked] == [3, 3, 2]

    asyncio.run(scenario())


@pytest.mark.parametrize("failure", [WarehouseUnavailable("away"), ZeroDivisionError("a defect of ours")])
def test_who_waits_behind_a_failure_shares_it_and_the_next_one_is_asked_anew(
    artifacts: tuple[bytes, bytes], failure: Exception
) -> None:
    async def scenario() -> None:
        store = SlowStore(failure)
        predictor = _predictor(store, artifacts[0])  # type: ignore[arg-type]
        under_way = []
        for user in ("first", "second"):
            under_way.append(asyncio.create_task(predictor.predict(user)))
            await _turns()
        behind = asyncio.create_task(predictor.predict("behind"))
        given_up = asyncio.create_task(predictor.predict("given up"))
        await _turns()
        given_up.cancel()
        await _turns()
        store.may_answer.set()
        answers = await asyncio.gather(*under_way, behind, return_exceptions=True)
        assert [type(answer) for answer in answers] == [type(failure)] * 3
        assert store.asked == [["first"], ["second"]]
        for user in ("next", "one more", "the third"):
            with pytest.raises(type(failure)):
                await predictor.predict(user)
        assert store.asked[2:] == [["next"], ["one more"], ["the third"]]

    asyncio.run(scenario())


@pytest.mark.parametrize(("limit_days", "stale"), [(30, False), (29, True)])
def test_features_older_than_the_limit_are_flagged(
    shared_platform: Platform,
    shared_settings: Settings,
    serve: Callable[[Settings], httpx.Client],
    limit_days: int,
    stale: bool,
) -> None:
    """The service's clock stands at 2024-03-01, thirty days after the features."""
    api = serve(shared_settings.model_copy(update={"max_feature_age_days": limit_days}))
    eventually(lambda: predict(api).status_code == 200)
    assert predict(api).json()["features_stale"] is stale


def test_features_older_than_the_limit_can_be_refused(
    shared_platform: Platform, shared_settings: Settings, serve: Callable[[Settings], httpx.Client]
) -> None:
    shared_platform.publish("fresh", as_of=date(2024, 2, 29))
    api = serve(shared_settings.model_copy(update={"max_feature_age_days": 29, "stale_features": "refuse"}))
    eventually(lambda: predict(api, "fresh").status_code == 200)
    answer = predict(api)
    details = problem(answer, 503, "stale-features")
    assert answer.headers["retry-after"] == "3600"
    assert details["detail"] == (
        f"the features of user {KNOWN} are as of 2024-01-31, and may be 29 days old; run the newest month"
    )
    results = api.post("/predict/batch", json={"user_ids": [KNOWN, "fresh"]}).json()["results"]
    assert [result.get("status", 200) for result in results] == [503, 200]


def test_values_outside_of_training_are_answered_flagged_and_counted(
    shared_api: httpx.Client, shared_platform: Platform
) -> None:
    seen = Scorer.from_bytes(train(1)).features
    within = {one.name: one.trained_on[0] for one in seen}
    highest = {one.name: one.trained_on[-1] for one in seen}
    shared_platform.publish("within", **within)
    shared_platform.publish("highest", **highest)
    shared_platform.publish("beyond", **{**within, "monthly_fee": highest["monthly_fee"] + 0.01, "skips_7d": -1})
    assert predict(shared_api, "within").json()["features_outside_training"] == []
    assert predict(shared_api, "highest").json()["features_outside_training"] == []
    counted = [f'streamflow_out_of_range_features_total{{feature="{name}"}}' for name in ("monthly_fee", "skips_7d")]
    before = [_counter(shared_api, name) for name in counted]
    assert predict(shared_api, "beyond").json()["features_outside_training"] == ["monthly_fee", "skips_7d"]
    assert [_counter(shared_api, name) for name in counted] == [value + 1 for value in before]


def _counter(api: httpx.Client, name: str) -> float:
    (line,) = [line for line in api.get("/metrics").text.splitlines() if line.startswith(name)]
    return float(line.rpartition(" ")[2])


def test_an_explanation_adds_up_to_the_probability_and_names_its_method(shared_api: httpx.Client) -> None:
    answer = shared_api.post("/predict", json={"user_id": KNOWN, "explain": "shapley"}).json()
    explanation = answer.pop("explanation")
    plain = predict(shared_api).json()
    assert "explanation" not in plain
    assert {**answer, "request_id": ""} == {**plain, "request_id": ""}
    assert list(explanation["contributions"]) == NAMES
    total = explanation["base"] + sum(explanation["contributions"].values())
    assert total == pytest.approx(answer["probability"], abs=1e-12)
    assert explanation["scale"] == "probability"
    assert explanation["method"] == "Shapley values by permutation sampling, each order also reversed; 16 orders"
    assert explanation["value_function"].startswith("interventional: ")
    assert explanation["background"] == "32 customers of the training dataset, stored with the version"
    for other in ("lime", True, 1, None, ["shapley"]):
        refused = shared_api.post("/predict", json={"user_id": KNOWN, "explain": other})
        assert "explain" in problem(refused, 400, "malformed-request")["detail"]
