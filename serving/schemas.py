"""What goes over the wire: closed request bodies, and answers whose features are described by the contract."""

from datetime import date, datetime
from typing import Annotated, Literal

from litestar.params import Parameter
from msgspec import UNSET, Meta, Struct, UnsetType

from serving.features import FeatureValue
from serving.production import State
from streamflow.contract import USER_ID_PATTERN

MAX_BATCH = 1000
EXAMPLE_USER_ID = "7590-VHVEG"
EXAMPLE_REQUEST_ID = "0b8f2a6e-53d1-4c1e-9a61-7c0f5d3a8e42"
WHOLE_USER_ID = rf"^{USER_ID_PATTERN}$(?!\n)"

UserId = Annotated[str, Meta(pattern=WHOLE_USER_ID, description="The customer.", examples=[EXAMPLE_USER_ID])]
ListedUserId = Annotated[UserId, Parameter(pattern=WHOLE_USER_ID, description="A customer.")]
"""Litestar describes what is in a list by ``Parameter`` only."""
Probability = Annotated[float, Meta(ge=0, le=1, description="Probability of churn.", examples=[0.3125])]
Threshold = Annotated[
    float, Meta(ge=0, le=1, description="The probability from which on `prediction` is 1.", examples=[0.5])
]
RequestId = Annotated[str, Meta(description="Unique; also in the X-Request-ID header.", examples=[EXAMPLE_REQUEST_ID])]
RunId = Annotated[
    str, Meta(description="The MLflow run that trained the version.", examples=["5f1c0e7a94d24f0c8f6f0c5d2b7e3a19"])
]


class Features(dict[str, FeatureValue]):
    """Feature values by name; the OpenAPI schema lists them from the contract."""


class PredictRequest(Struct, forbid_unknown_fields=True):
    """Whom to score."""

    user_id: UserId
    explain: Annotated[
        Literal["shapley"] | UnsetType, Meta(description="Also say what each feature contributes; takes longer.")
    ] = UNSET


class BatchRequest(Struct, forbid_unknown_fields=True):
    """Whom to score, in the order of the answer."""

    user_ids: Annotated[
        list[ListedUserId],
        Meta(max_length=MAX_BATCH, description="Up to 1,000 customers.", examples=[[EXAMPLE_USER_ID, "5575-GNVDE"]]),
    ]


class Outcome(Struct):
    """What a batch has for each customer: a prediction or a problem."""


class Explanation(Struct):
    """What each feature contributes to the probability; `base` and the contributions add up to it."""

    method: str
    value_function: str
    background: str
    scale: str
    base: Annotated[float, Meta(description="The mean probability of the background customers.")]
    contributions: Annotated[dict[str, float], Meta(description="By feature; positive ones speak for churn.")]


class Prediction(Outcome):
    """A prediction and everything it came from."""

    request_id: RequestId
    user_id: UserId
    prediction: Annotated[Literal[0, 1], Meta(description="1: the customer is expected to churn.")]
    probability: Probability
    threshold: Threshold
    model_version: int
    run_id: RunId
    features_as_of: Annotated[date, Meta(description="The oldest day that the features speak of.")]
    timestamp: Annotated[datetime, Meta(description="When this was answered, UTC.")]
    features_used: Features
    features_stale: Annotated[bool, Meta(description="Whether `features_as_of` is older than it should be.")]
    features_outside_training: Annotated[
        list[str],
        Meta(description="Features whose values are outside of what the model was trained on.", examples=[[]]),
    ]
    explanation: Annotated[Explanation | UnsetType, Meta(description="If asked for by `explain`.")] = UNSET


class FeaturesOfUser(Struct):
    """What the feature store holds for a customer."""

    user_id: UserId
    as_of: Annotated[date, Meta(description="The oldest day that the features speak of.")]
    features: Features


class RefusedVersion(Struct):
    """A Production version that is not served."""

    version: int
    reason: str


class Model(Struct):
    """The version that is served and since when."""

    version: int
    run_id: RunId
    service: Annotated[str, Meta(description="The feature service that it was trained on.", examples=["churn_v1"])]
    as_of: Annotated[date, Meta(description="The last day of the month that it was trained on.")]
    threshold: Threshold
    promoted_at: datetime
    loaded_at: datetime
    artifact_sha256: Annotated[str, Meta(examples=["9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"])]
    refused: RefusedVersion | None


class Alive(Struct):
    """The process answers."""

    status: Literal["alive"]


class ReadinessCheck(Struct):
    """One part of the service and why it is in that state."""

    name: Annotated[str, Meta(examples=["model"])]
    state: State
    reason: Annotated[str, Meta(examples=["version 1 is served"])]


class Readiness(Struct):
    """Whether predictions can be answered; degraded: yes, but not everything is well."""

    status: State
    checks: list[ReadinessCheck]


class Problem(Outcome, omit_defaults=True):
    """What went wrong (RFC 9457)."""

    type: Annotated[
        str, Meta(description="Stable; what to switch on.", examples=["urn:streamflow:problem:unknown-user"])
    ]
    title: Annotated[str, Meta(examples=["Unknown user"])]
    status: Annotated[int, Meta(ge=400, le=599, examples=[404])]
    detail: Annotated[str, Meta(examples=[f"the feature store does not know user {EXAMPLE_USER_ID}"])]
    instance: Annotated[str, Meta(examples=[f"urn:uuid:{EXAMPLE_REQUEST_ID}"])]
    request_id: RequestId
    missing_features: list[str] | UnsetType = UNSET
    checks: list[ReadinessCheck] | UnsetType = UNSET


class BatchAnswer(Struct):
    """One prediction or problem for each customer, in the order asked for."""

    results: list[Outcome]
