"""The policy: who may promote, what a model may predict from, the gates before it, and when to train another.

What policy.toml says belongs here, checked. Nothing is decided, and nothing heavy imported: the service reads it too.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from streamflow.contract import CONTRACT
from streamflow.settings import Settings, read_toml

Share = Annotated[float, Meta(ge=0, le=1)]
Difference = Annotated[float, Meta(ge=0, lt=1)]


class Gates(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The bounds that a version must keep; policy.toml says what each is for."""

    minimum_auc: Annotated[float, Meta(ge=0.5, le=1)]
    maximum_excess_ece: Share
    minimum_segment_users: Annotated[int, Meta(ge=1)]
    minimum_segment_auc: Share
    maximum_fairness_gap: Share
    maximum_parity_difference: Share
    maximum_train_validation_gap: Share
    slide_versions: Annotated[int, Meta(ge=2)]
    maximum_slide: Share
    maximum_scoring_microseconds: Annotated[float, Meta(gt=0, le=1_000_000)]
    better_by: Difference
    not_worse_by: Difference
    maximum_segment_loss: Share


class InvarianceRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A feature that a score may hardly depend on: ``add`` is added to a number, all else is set to other values."""

    feature: str
    largest_change: Share
    add: Annotated[float, Meta(ge=-1e9, le=1e9)] | None = None

    @property
    def change(self) -> str:
        """How the feature is changed, as `Invariance.change` records it."""
        return "every other value" if self.add is None else f"{self.add:+g}"


class DecayPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When a month's labels say that a version got worse; policy.toml says what each is for."""

    maximum_false_alarms: Annotated[float, Meta(gt=0, lt=0.5)]
    minimum_auc_loss: Difference
    minimum_ece_growth: Share
    slide_months: Annotated[int, Meta(ge=4)]


class RetrainingPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What makes the platform train again, and how often it may; see policy.toml."""

    on_decay: bool
    on_slide: bool
    on_drift: Literal["never", "moderate", "large"]
    on_corrected_data: bool
    on_more_data: Annotated[int, Meta(ge=0, le=1_000)]
    cooldown_months: Annotated[int, Meta(ge=0)]
    maximum_per_year: Annotated[int, Meta(ge=1)]
    give_up_after: Annotated[int, Meta(ge=1)]


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who may promote, what a model may predict from, the gates before it, and when to train another."""

    mode: Literal["manual", "auto"]
    first_model: Literal["promote", "wait"]
    protected_attributes: Literal["measure", "predict"]
    stage_set_by_hand: Literal["accept", "flag"]
    gates: Gates
    decay: DecayPolicy
    retraining: RetrainingPolicy
    invariances: tuple[InvarianceRule, ...]

    def __post_init__(self) -> None:
        kinds = {column.name: column.kind for column in CONTRACT.features}
        for rule in self.invariances:
            if rule.feature not in kinds:
                raise ValueError(f"`invariances` names {rule.feature}, which is no feature of the contract")
            is_number = kinds[rule.feature] in ("integer", "float")
            if is_number and not rule.add:
                raise ValueError(f"`invariances` of {rule.feature} needs `add`: what to add to the number")
            if not is_number and rule.add is not None:
                raise ValueError(f"`invariances` of {rule.feature} has `add`, but it is no number")

    @classmethod
    def load(cls, settings: Settings) -> "Policy":
        """Read the policy file; raises ConfigurationError that names the key that cannot be used."""
        policy = read_toml(settings.policy_file, cls, "the policy file")
        return msgspec.structs.replace(policy, mode=settings.policy) if settings.policy else policy
