"""Evidence, comparisons and a policy for tests: a version that passes every gate, to be spoilt one part at a time."""

from typing import Any

import msgspec
from hypothesis import strategies as st

from streamflow.evaluation import Comparison, FairnessGap, Interval, Segment, SegmentComparison
from streamflow.gates import Evidence, Invariance
from streamflow.policy import DecayPolicy, Gates, InvarianceRule, Policy, RetrainingPolicy

BOUNDS = Gates(
    minimum_auc=0.5,
    maximum_excess_ece=0.02,
    minimum_segment_users=50,
    minimum_segment_auc=0.5,
    maximum_fairness_gap=0.25,
    maximum_parity_difference=1e-9,
    maximum_train_validation_gap=0.2,
    slide_versions=3,
    maximum_slide=0.05,
    maximum_scoring_microseconds=2000,
    better_by=0.0,
    not_worse_by=0.01,
    maximum_segment_loss=0.05,
)
DECAY = DecayPolicy(maximum_false_alarms=0.01, minimum_auc_loss=0.02, minimum_ece_growth=0.03, slide_months=6)
RETRAINING = RetrainingPolicy(
    on_decay=True,
    on_slide=True,
    on_drift="large",
    on_corrected_data=True,
    on_more_data=3,
    cooldown_months=1,
    maximum_per_year=4,
    give_up_after=2,
)
GENDER = InvarianceRule("user_gender", 0.0)
POLICY = Policy("manual", "promote", "measure", "accept", BOUNDS, DECAY, RETRAINING, (GENDER,))


def policy(**changes: Any) -> Policy:
    """The policy above with other parts; those of the gates by their own names."""
    bounds = {name: value for name, value in changes.items() if name in Gates.__struct_fields__}
    others = {name: value for name, value in changes.items() if name not in bounds}
    return msgspec.structs.replace(POLICY, gates=msgspec.structs.replace(BOUNDS, **bounds), **others)


def around(value: float, spread: float = 0.02) -> Interval:
    return Interval(value, value - spread, value + spread)


def segment(attribute: str, value: str, users: int, auc: Interval | None) -> Segment:
    return Segment(attribute, value, users, users // 4, {"auc": auc} if auc else {"ece": around(0.01)})


def gap(attribute: str, measure: str, interval: Interval) -> FairnessGap:
    return FairnessGap(attribute, measure, interval, {"False": 0.5, "True": 0.5 + interval.value})


def evidence(*, auc: float = 0.84, train_auc: float = 0.86, ece: float = 0.02, **changes: Any) -> Evidence:
    """What was measured of a good version, and ``changes`` to it."""
    good = Evidence(
        users=1_783,
        churned=470,
        metrics={"auc": around(auc), "logloss": around(0.42), "ece": around(ece, 0.01), "f1": around(0.6)},
        train_metrics={"auc": train_auc, "logloss": 0.4},
        perfect_ece=0.03,
        segments=(
            segment("net_service", "DSL", 600, around(0.8)),
            segment("net_service", "No", 400, around(0.7)),
            segment("months_active", "0-5", 30, Interval(0.3, 0.2, 0.4)),
            segment("months_active", "6+", 80, None),
        ),
        fairness=(
            gap("user_gender", "recall", around(0.02, 0.05)),
            gap("user_is_senior", "false positive rate", around(0.18, 0.06)),
            gap("user_is_senior", "selection rate", around(0.6, 0.06)),
        ),
        parity_difference=2.2e-16,
        flipped_decisions=0,
        parity_rows=7_043,
        golden_rows_reproduced=True,
        invariances=(Invariance("user_gender", "every other value", 0.0),),
        features_offline=(),
        signature_fits=True,
        protected=(),
        scoring_microseconds=28.0,
        possible_leaks={},
    )
    return msgspec.structs.replace(good, **changes)


SIZES = {"net_service=DSL": 600, "net_service=No": 400, "months_active=0-5": 30}


def comparison(auc: Interval | None = None, **segments: Interval) -> Comparison:
    """A candidate, better by 0.02 to 0.06 unless said otherwise; segments but those of `SIZES` have 100 users."""
    worst = {"net_service=DSL": around(0.03), "net_service=No": around(0.01), "months_active=0-5": around(-0.3)}
    compared = tuple(SegmentComparison(name, SIZES.get(name, 100), one) for name, one in (segments or worst).items())
    return Comparison(1_783, auc or Interval(0.04, 0.02, 0.06), around(0.0, 0.005), compared)


unit = st.floats(0, 1)
intervals = st.lists(unit, min_size=3, max_size=3).map(sorted).map(lambda ends: Interval(ends[1], ends[0], ends[2]))
differences = st.lists(st.floats(-1, 1), min_size=3, max_size=3).map(sorted).map(lambda e: Interval(e[1], e[0], e[2]))


@st.composite
def evidences(draw: st.DrawFn) -> Evidence:
    return evidence(
        auc=draw(unit),
        train_auc=draw(unit),
        ece=draw(unit),
        perfect_ece=draw(unit),
        segments=tuple(
            segment("net_service", str(number), draw(st.integers(0, 200)), draw(intervals))
            for number in range(draw(st.integers(0, 3)))
        ),
        fairness=tuple(gap("user_gender", measure, draw(differences)) for measure in ("recall", "false positive rate")),
        parity_difference=draw(st.floats(0, 1e-8)),
        flipped_decisions=draw(st.integers(0, 1)),
        golden_rows_reproduced=draw(st.booleans()),
        invariances=(Invariance("user_gender", "every other value", draw(unit)),),
        features_offline=draw(st.sampled_from([(), ("coupons",)])),
        signature_fits=draw(st.booleans()),
        protected=draw(st.sampled_from([(), ("user_gender",)])),
        scoring_microseconds=draw(st.floats(1, 4000)),
    )


comparisons = st.builds(
    lambda auc, one, other: comparison(auc, **{"net_service=0": one, "net_service=1": other}),
    differences,
    differences,
    differences,
)
