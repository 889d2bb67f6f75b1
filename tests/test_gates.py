from dataclasses import replace
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from governed import (
    BOUNDS,
    GENDER,
    POLICY,
    around,
    comparison,
    comparisons,
    evidence,
    evidences,
    gap,
    policy,
    segment,
    unit,
)
from hypothesis import given
from hypothesis import strategies as st

from streamflow.evaluation import Comparison, Interval, SegmentComparison
from streamflow.gates import (
    NOT_TAKEN,
    Candidate,
    Evidence,
    Gate,
    Incomparable,
    Invariance,
    absolute_gates,
    relative_gates,
)
from streamflow.policy import Gates, InvarianceRule, Policy

NAMES = [
    "ranks_better_than_chance",
    "calibrated",
    "no_segment_collapses",
    "fair",
    "predicts_from_no_protected_attribute",
    "compiled_scorer_agrees",
    "no_decision_flips",
    "golden_rows_reproduce",
    "invariances_hold",
    "overfits_little",
    "does_not_slide",
    "features_are_online",
    "signature_fits",
    "scores_quickly",
]
NAN = float("nan")


def judged(found: Evidence, by: Policy = POLICY, history: tuple[Evidence, ...] = ()) -> dict[str, Gate]:
    return {gate.name: gate for gate in absolute_gates(found, history, by)}


def held_against(
    production: Comparison | Incomparable, *, bug_fix: bool = False, by: Policy = POLICY, **changes: Any
) -> dict[str, Gate]:
    candidate = Candidate(2, evidence(**changes), (), bug_fix)
    return {gate.name: gate for gate in relative_gates(candidate, production, by)}


# --- each gate, on both sides of its bound ------------------------------------------------------------------------


def test_a_good_version_passes_every_gate() -> None:
    gates = judged(evidence())
    assert list(gates) == NAMES
    assert [name for name, gate in gates.items() if not gate.passed] == []


@pytest.mark.parametrize(
    ("gate", "found", "by", "passed", "value", "bound"),
    [
        ("ranks_better_than_chance", {"metrics": {"auc": Interval(0.6, 0.51, 0.7)}}, {}, True, 0.51, 0.5),
        ("ranks_better_than_chance", {"metrics": {"auc": Interval(0.6, 0.5, 0.7)}}, {}, False, 0.5, 0.5),
        ("ranks_better_than_chance", {"metrics": {"auc": Interval(0.9, 0.49, 1.0)}}, {}, False, 0.49, 0.5),
        ("ranks_better_than_chance", {"auc": 0.84}, {"minimum_auc": 0.83}, False, 0.82, 0.83),
        ("ranks_better_than_chance", {"metrics": {"auc": Interval(NAN, NAN, NAN)}}, {}, False, NAN, 0.5),
        ("calibrated", {"ece": 0.05}, {}, True, 0.05, 0.05),
        ("calibrated", {"ece": 0.051}, {}, False, 0.051, 0.05),
        ("calibrated", {"ece": 0.11, "perfect_ece": 0.09}, {}, True, 0.11, 0.11),
        ("calibrated", {"ece": 0.111, "perfect_ece": 0.09}, {}, False, 0.111, 0.11),
        ("calibrated", {"ece": 0.03}, {"maximum_excess_ece": 0.0}, True, 0.03, 0.03),
        ("calibrated", {"ece": NAN}, {}, False, NAN, 0.05),
        ("no_segment_collapses", {"segments": (segment("a", "x", 50, Interval(0.4, 0.3, 0.5)),)}, {}, True, 0.5, 0.5),
        ("no_segment_collapses", {"segments": (segment("a", "x", 50, Interval(0.4, 0.3, 0.4)),)}, {}, False, 0.4, 0.5),
        (
            "no_segment_collapses",
            {"segments": (segment("a", "x", 50, around(0.3)), segment("a", "y", 900, around(0.9)))},
            {},
            False,
            0.32,
            0.5,
        ),
        (
            "no_segment_collapses",
            {"segments": (segment("a", "x", 49, around(0.3)), segment("a", "y", 900, around(0.9)))},
            {},
            True,
            0.92,
            0.5,
        ),
        ("no_segment_collapses", {"segments": (segment("a", "x", 49, around(0.9)),)}, {}, False, None, 0.5),
        ("no_segment_collapses", {"segments": (segment("a", "x", 900, None),)}, {}, False, None, 0.5),
        ("no_segment_collapses", {"segments": ()}, {}, False, None, 0.5),
        ("fair", {"fairness": (gap("s", "recall", Interval(0.4, 0.25, 0.5)),)}, {}, True, 0.25, 0.25),
        ("fair", {"fairness": (gap("s", "recall", Interval(0.4, 0.26, 0.5)),)}, {}, False, 0.26, 0.25),
        ("fair", {"fairness": (gap("s", "false positive rate", around(0.4)),)}, {}, False, 0.38, 0.25),
        ("fair", {"fairness": (gap("s", "recall", around(0)), gap("g", "recall", around(0.4)))}, {}, False, 0.38, 0.25),
        ("fair", {"fairness": (gap("s", "selection rate", around(0.1)),)}, {}, False, None, 0.25),
        ("fair", {"fairness": ()}, {}, False, None, 0.25),
        ("predicts_from_no_protected_attribute", {"protected": ("user_gender",)}, {}, False, 1, 0),
        (
            "predicts_from_no_protected_attribute",
            {"protected": ("user_gender", "user_is_senior")},
            {"protected_attributes": "predict"},
            True,
            2,
            None,
        ),
        ("compiled_scorer_agrees", {"parity_difference": 1e-9}, {}, True, 1e-9, 1e-9),
        ("compiled_scorer_agrees", {"parity_difference": 1.1e-9}, {}, False, 1.1e-9, 1e-9),
        ("compiled_scorer_agrees", {"parity_difference": NAN}, {}, False, NAN, 1e-9),
        ("compiled_scorer_agrees", {"parity_difference": 0.0, "parity_rows": 0}, {}, False, 0.0, 1e-9),
        ("no_decision_flips", {"flipped_decisions": 1}, {}, False, 1, 0),
        ("golden_rows_reproduce", {"golden_rows_reproduced": False}, {}, False, 0, 1),
        ("invariances_hold", {"invariances": (Invariance("user_gender", GENDER.change, 1e-12),)}, {}, False, 1e-12, 0),
        ("invariances_hold", {"invariances": (Invariance("user_gender", NOT_TAKEN, 0.0),)}, {}, True, 0.0, 0.0),
        ("invariances_hold", {"invariances": (Invariance("user_gender", "+1", 0.0),)}, {}, False, None, 0.0),
        ("invariances_hold", {"invariances": ()}, {}, False, None, 0.0),
        ("invariances_hold", {"invariances": ()}, {"invariances": ()}, True, None, None),
        ("overfits_little", {"auc": 0.75, "train_auc": 0.95}, {"maximum_train_validation_gap": 0.25}, True, 0.2, 0.25),
        ("overfits_little", {"auc": 0.75, "train_auc": 1.0}, {}, False, 0.25, 0.2),
        ("overfits_little", {"auc": 0.75, "train_auc": 1.0}, {"maximum_train_validation_gap": 0.25}, True, 0.25, 0.25),
        ("features_are_online", {"features_offline": ("coupons", "visits")}, {}, False, 2, 0),
        ("signature_fits", {"signature_fits": False}, {}, False, 0, 1),
        ("scores_quickly", {"scoring_microseconds": 2000.0}, {}, True, 2000, 2000),
        ("scores_quickly", {"scoring_microseconds": 2000.1}, {}, False, 2000.1, 2000),
    ],
)
def test_a_gate_holds_what_was_measured_against_its_bound(
    gate: str, found: dict[str, Any], by: dict[str, Any], passed: bool, value: float | None, bound: float | None
) -> None:
    given = found.get("metrics")
    if given:
        found = {**found, "metrics": {**evidence().metrics, **given}}
    outcome = judged(evidence(**found), policy(**by))[gate]

    assert outcome.passed is passed
    assert outcome.value == (pytest.approx(value, nan_ok=True) if value is not None else None)
    assert outcome.bound == (pytest.approx(bound) if bound is not None else None)


def test_invariances_are_judged_by_the_one_that_exceeds_its_bound_most() -> None:
    rules = (GENDER, InvarianceRule("months_active", 0.5, add=1.0), InvarianceRule("monthly_fee", 0.1, add=5.0))
    by = policy(invariances=rules)
    found = [Invariance("user_gender", "every other value", 0.0), Invariance("monthly_fee", "+5", 0.1)]

    held = judged(evidence(invariances=(*found, Invariance("months_active", "+1", 0.4))), by)["invariances_hold"]
    assert (held.passed, held.value, held.bound) == (True, 0.0, 0.0)
    broken = judged(evidence(invariances=(*found, Invariance("months_active", "+1", 0.6))), by)["invariances_hold"]
    assert (broken.passed, broken.value, broken.bound) == (False, 0.6, 0.5)
    assert broken.reason.startswith(
        "months_active (+1) changes a probability by 0.6 at most, 0.5 allowed; the worst of 3"
    )


def test_a_gap_to_a_group_of_few_users_is_not_judged() -> None:
    unfair = (gap("user_is_senior", "recall", Interval(0.89, 0.82, 0.95)), gap("user_gender", "recall", around(0.05)))
    good = evidence()
    few, enough = (
        judged(evidence(fairness=unfair, segments=(*good.segments, segment("user_is_senior", "True", users, None))))
        for users in (BOUNDS.minimum_segment_users - 1, BOUNDS.minimum_segment_users)
    )
    assert (few["fair"].passed, enough["fair"].passed) == (True, False)
    assert few["fair"].reason.startswith("the largest gap between groups is in recall by user_gender")


@pytest.mark.parametrize(
    ("protected_attributes", "protected", "passed"),
    [("measure", ("user_gender",), False), ("predict", ("user_gender",), True), ("predict", (), False)],
)
def test_what_the_policy_lets_a_model_predict_from_may_move_its_scores(
    protected_attributes: str, protected: tuple[str, ...], passed: bool
) -> None:
    moved = evidence(protected=protected, invariances=(Invariance("user_gender", "every other value", 0.2),))
    gate = judged(moved, policy(protected_attributes=protected_attributes))["invariances_hold"]
    assert gate.passed is passed


def series(*gaps: float, eces: tuple[float, ...] | None = None) -> tuple[Evidence, ...]:
    eces = eces or (0.02,) * len(gaps)
    return tuple(evidence(auc=0.8, train_auc=0.8 + one, ece=ece) for one, ece in zip(gaps, eces, strict=True))


@pytest.mark.parametrize(
    ("versions", "passed", "value", "says"),
    [
        (series(0.01), True, None, "takes 3 versions to tell; with this one there are 1"),
        (series(0.01, 0.15), True, None, "with this one there are 2"),
        (series(0.01, 0.04, 0.06), True, 0.05, "the train-validation gap grew each time, by 0.0500 in all"),
        (series(0.01, 0.04, 0.0601), False, 0.0501, "the train-validation gap grew each time, by 0.0501 in all"),
        (series(0.01, 0.15, 0.14), True, 0, "neither the train-validation gap nor the calibration error grew"),
        (series(0.01, 0.15, 0.15), True, 0, "neither"),
        (series(0.01, 0.05, 0.08, 0.10), True, 0.05, "over the last 3 versions the train-validation gap"),
        (series(0.10, 0.01, 0.05, 0.08), False, 0.07, "by 0.0700 in all"),
        (series(0.1, 0.1, 0.1, eces=(0.01, 0.03, 0.07)), False, 0.06, "calibration error grew each time, by 0.0600"),
        (series(0.1, 0.1, 0.1, eces=(0.01, 0.03, 0.05)), True, 0.04, "the calibration error grew each time"),
    ],
)
def test_a_slide_takes_growth_at_every_step(
    versions: tuple[Evidence, ...], passed: bool, value: float | None, says: str
) -> None:
    by = policy(maximum_slide=0.05 + 1e-12)
    gate = judged(versions[-1], by, history=versions[:-1])["does_not_slide"]

    assert gate.passed is passed
    assert gate.value == (None if value is None else pytest.approx(value))
    assert says in gate.reason


def test_a_slide_may_reach_its_bound() -> None:
    sliding = series(0.1, 0.1, 0.1, eces=(0.25, 0.5, 0.75))
    for bound, passed in ((0.5, True), (0.4999, False)):
        assert judged(sliding[-1], policy(maximum_slide=bound), sliding[:-1])["does_not_slide"].passed is passed


@pytest.mark.parametrize(
    ("auc", "bug_fix", "by", "passed", "bound"),
    [
        (Interval(0.02, 0.001, 0.04), False, {}, True, 0.0),
        (Interval(0.02, 0.0, 0.04), False, {}, False, 0.0),
        (Interval(0.02, -0.001, 0.04), False, {}, False, 0.0),
        (Interval(0.02, 0.011, 0.04), False, {"better_by": 0.01}, True, 0.01),
        (Interval(0.02, 0.01, 0.04), False, {"better_by": 0.01}, False, 0.01),
        (Interval(0.0, 0.0, 0.0), True, {}, True, -0.01),
        (Interval(0.0, -0.01, 0.01), True, {}, True, -0.01),
        (Interval(0.0, -0.011, 0.01), True, {}, False, -0.01),
        (Interval(NAN, NAN, NAN), True, {}, False, -0.01),
    ],
)
def test_a_candidate_is_better_beyond_noise_or_for_a_bug_fix_not_worse(
    auc: Interval, bug_fix: bool, by: dict[str, float], passed: bool, bound: float
) -> None:
    gate = held_against(comparison(auc), bug_fix=bug_fix, by=policy(**by))["better_than_production"]

    assert (gate.passed, gate.bound) == (passed, bound)
    assert gate.value == pytest.approx(auc.low, nan_ok=True)


@pytest.mark.parametrize(
    ("auc", "logloss", "by", "passed"),
    [
        (Interval(0.02, -0.01, 0.05), Interval(-0.1, -0.2, -0.001), {}, True),
        (Interval(0.0, -0.03, 0.03), Interval(-0.1, -0.2, -0.001), {}, True),
        (Interval(-0.001, -0.03, 0.03), Interval(-0.1, -0.2, -0.001), {}, False),
        (Interval(0.02, -0.01, 0.05), Interval(-0.1, -0.2, 0.0), {}, False),
        (Interval(0.02, -0.01, 0.05), Interval(-0.1, -0.2, -0.001), {"better_by": 0.03}, False),
        (Interval(0.03, -0.01, 0.05), Interval(-0.1, -0.2, -0.001), {"better_by": 0.03}, True),
        (Interval(NAN, NAN, NAN), Interval(-0.1, -0.2, -0.001), {}, False),
        (Interval(0.02, -0.01, 0.05), Interval(NAN, NAN, NAN), {}, False),
    ],
)
def test_a_candidate_with_surely_lower_log_loss_is_better_unless_it_ranks_worse(
    auc: Interval, logloss: Interval, by: dict[str, float], passed: bool
) -> None:
    gate = held_against(replace(comparison(auc), logloss=logloss), by=policy(**by))["better_than_production"]
    assert gate.passed is passed
    assert gate.bound == by.get("better_by", 0.0)
    assert ("log loss minus Production's is surely lower: -0.1000" in gate.reason) is passed
    assert gate.value == pytest.approx(auc.value if passed else auc.low, nan_ok=True)


@pytest.mark.parametrize(
    ("segments", "passed", "value"),
    [
        ({"net_service=DSL": Interval(-0.2, -0.3, -0.05)}, True, -0.05),
        ({"net_service=DSL": Interval(-0.2, -0.3, -0.051)}, False, -0.051),
        ({"net_service=DSL": around(0.1), "net_service=No": around(-0.1)}, False, -0.08),
        ({"net_service=DSL": around(0.1), "months_active=0-5": around(-0.5)}, True, 0.12),
        ({"months_active=0-5": around(0.5)}, False, None),
    ],
)
def test_no_large_segment_may_get_worse(segments: dict[str, Interval], passed: bool, value: float | None) -> None:
    gate = held_against(comparison(**segments))["no_segment_gets_worse"]

    assert (gate.passed, gate.bound) == (passed, -0.05)
    assert gate.value == (None if value is None else pytest.approx(value))


def test_a_segment_of_the_least_users_counts() -> None:
    for users, value in ((50, -0.48), (49, None)):
        compared = replace(comparison(), segments=(SegmentComparison("a=x", users, around(-0.5)),))
        gate = held_against(compared)["no_segment_gets_worse"]
        assert (gate.passed, gate.value) == (False, value if value is None else pytest.approx(value))


@pytest.mark.parametrize("bug_fix", [False, True])
def test_what_cannot_be_compared_is_not_better(bug_fix: bool) -> None:
    gates = held_against(Incomparable("the scorer of version 1 is gone"), bug_fix=bug_fix)

    assert {name: gate.bound for name, gate in gates.items()} == {
        "better_than_production": -0.01 if bug_fix else 0.0,
        "no_segment_gets_worse": -0.05,
    }
    for gate in gates.values():
        assert (gate.passed, gate.value) == (False, None)
        assert gate.reason == "cannot be held against Production: the scorer of version 1 is gone"


def test_gates_speak_to_people() -> None:
    gates = judged(evidence(protected=("user_gender",)), history=series(0.01, 0.02))
    assert {name: gate.reason for name, gate in (gates | held_against(comparison())).items()} == {
        "ranks_better_than_chance": "AUC of 1,783 held-out users is 0.8400 (95 % interval 0.8200 to 0.8600); "
        "the lower end must exceed 0.5",
        "calibrated": "the expected calibration error is 2.00 percentage points, at most 5.00 allowed: "
        "2 above what a perfectly calibrated model of this size shows",
        "no_segment_collapses": "the worst of 2 segments of at least 50 users is net_service=No (400 users): "
        "AUC 0.7000 (95 % interval 0.6800 to 0.7200); the upper end must reach 0.5",
        "fair": "the largest gap between groups is in false positive rate by user_is_senior (False 0.500, True 0.680): "
        "0.1800 (95 % interval 0.1200 to 0.2400); the lower end may be at most 0.25",
        "predicts_from_no_protected_attribute": "predicts from user_gender; "
        "the policy allows to measure by protected attributes only",
        "compiled_scorer_agrees": "the largest difference to the pipeline in 7,043 rows is 2.2e-16, "
        "at most 1e-09 allowed",
        "no_decision_flips": "0 of 7,043 rows are decided otherwise by the compiled scorer, none allowed",
        "golden_rows_reproduce": "the rows stored with the scorer score as stored",
        "invariances_hold": "user_gender (every other value) changes a probability by 0 at most, 0 allowed; "
        "the worst of 1 declared",
        "overfits_little": "AUC is 0.8600 of training users and 0.8400 of held-out ones: a gap of 0.0200, "
        "at most 0.2 allowed",
        "does_not_slide": "over the last 3 versions neither the train-validation gap nor the calibration error "
        "grew each time",
        "features_are_online": "the online store has every feature",
        "signature_fits": "the model's inputs are the features of its feature service, in their order",
        "scores_quickly": "one customer takes 28 microseconds to score, at most 2,000 allowed",
        "better_than_production": "AUC minus Production's, of the same 1,783 held-out users, is "
        "0.0400 (95 % interval 0.0200 to 0.0600); the lower end must exceed 0",
        "no_segment_gets_worse": "the worst of 2 segments is net_service=No: AUC minus Production's is "
        "0.0100 (95 % interval -0.0100 to 0.0300); the upper end must reach -0.05",
    }


# --- properties ---------------------------------------------------------------------------------------------------

LOOSER = {
    "minimum_auc": -1,
    "maximum_excess_ece": 1,
    "minimum_segment_auc": -1,
    "maximum_fairness_gap": 1,
    "maximum_parity_difference": 1,
    "maximum_train_validation_gap": 1,
    "maximum_slide": 1,
    "maximum_scoring_microseconds": 1,
    "better_by": -1,
    "not_worse_by": 1,
    "maximum_segment_loss": 1,
}


def test_every_bound_is_covered_by_the_properties() -> None:
    assert {*LOOSER, "minimum_segment_users", "slide_versions"} == set(Gates.__struct_fields__)


@given(
    found=evidences(),
    history=st.lists(evidences(), max_size=3).map(tuple),
    production=comparisons,
    bug_fix=st.booleans(),
    bound=st.sampled_from(sorted(LOOSER)),
    values=st.tuples(unit, unit).map(sorted),
)
def test_a_looser_bound_fails_nothing_that_a_stricter_one_passes(
    found: Evidence,
    history: tuple[Evidence, ...],
    production: Comparison,
    bug_fix: bool,
    bound: str,
    values: list[float],
) -> None:
    scale = {"maximum_parity_difference": 1e-8, "maximum_scoring_microseconds": 4000}.get(bound, 1)
    strict, loose = (value * scale for value in values[:: LOOSER[bound]])

    def passed(value: float) -> set[str]:
        by = policy(**{bound: value})
        candidate = Candidate(2, found, history, bug_fix)
        gates = absolute_gates(found, history, by) + relative_gates(candidate, production, by)
        return {gate.name for gate in gates if gate.passed}

    assert passed(strict) <= passed(loose)


@given(evidences())
def test_evidence_survives_json(found: Evidence) -> None:
    assert msgspec.json.decode(msgspec.json.encode(found), type=Evidence) == found
    assert msgspec.convert(msgspec.to_builtins(found), Evidence) == found


@given(st.lists(evidences(), min_size=3, max_size=5))
def test_a_slide_is_growth_at_every_step_of_the_last_versions(found: list[Evidence]) -> None:
    gate = judged(found[-1], history=tuple(found[:-1]))["does_not_slide"]
    grown = []
    for measured in (lambda one: one.train_validation_gap, lambda one: one.metrics["ece"].value):
        values = [measured(one) for one in found[-3:]]
        if all(after > before for before, after in pairwise(values)):
            grown.append(values[-1] - values[0])

    assert gate.value == max(grown, default=0.0)
    assert gate.passed == all(growth <= BOUNDS.maximum_slide for growth in grown)
