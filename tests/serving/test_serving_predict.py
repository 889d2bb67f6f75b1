import re
from datetime import date

import httpx
import pytest
from serving_world import FEATURES, KNOWN, Platform, eventually, predict, problem

from serving.schemas import MAX_BATCH
from streamflow.contract import CONTRACT
from streamflow.scoring import Scorer

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
