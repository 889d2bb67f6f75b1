from dataclasses import replace
from typing import Any, get_args

import msgspec
import pytest
from governed import RETRAINING
from hypothesis import given
from hypothesis import strategies as st

from streamflow.months import Month
from streamflow.policy import RetrainingPolicy
from streamflow.retraining import (
    Alarm,
    Correction,
    Drift,
    Finding,
    Obstacle,
    Performance,
    Production,
    Retraining,
    RetrainingDecision,
    Situation,
    should_retrain,
)

JANUARY, FEBRUARY, MARCH, APRIL = Month.parse_range("2024-01..2024-04")
FOUR_MONTHS = (JANUARY, FEBRUARY, MARCH, APRIL)
KEPT = Finding(False, "as promised")
WORSE = Finding(True, "AUC is 0.35 below the promised")
CHANCE = Finding(True, "AUC may be 0.46")
MISCALIBRATED = Finding(True, "20 points off")
SLIDES = Finding(True, "AUC changed for the worse by 0.05")


def performance(month=FEBRUARY, version=1, **findings: Finding) -> Performance:
    parts = dict.fromkeys(("worse_than_promised", "no_better_than_chance", "worse_calibrated", "sliding"), KEPT)
    return Performance(str(month), version, **(parts | findings))


def drift(month=FEBRUARY, version=1, significant=(), moderate=(), large=(), score="none") -> Drift:
    return Drift(month, version, (*significant, *moderate, *large), (*moderate, *large), large, score)


CALM = Situation(FEBRUARY, Production(1, (JANUARY,)), performance(), drift(), (), ())
DECAYED = replace(CALM, performance=performance(worse_than_promised=WORSE, no_better_than_chance=CHANCE))
BY_DECAY = "decay:2024-02:version 1"
LARGE = drift(large=("watch_hours_30d",))
FIRST = Retraining(JANUARY, "no_model:2024-01", promoted=True, helped=None)


def past(*of: tuple[Month, bool | None], cause="decay:2023-01:version 0") -> tuple[Retraining, ...]:
    return tuple(
        Retraining(month, f"{cause}:{at}", promoted=bool(helped), helped=helped)
        for at, (month, helped) in enumerate(of)
    )


def decided(situation: Situation, **policy: Any) -> RetrainingDecision:
    return should_retrain(situation, msgspec.structs.replace(RETRAINING, **policy))


# --- causes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "policy", "cause"),
    [
        ({}, {}, None),
        ({"newest": None}, {}, None),
        ({"newest": None, "production": None}, {}, None),
        ({"production": None}, {}, "no_model:2024-02"),
        ({"production": None, "past": (FIRST,)}, {}, "no_model:2024-02"),
        ({"production": None, "newest": JANUARY, "past": (FIRST,)}, {}, None),
        # Labels are not there yet, or the reports are of another version.
        ({"performance": None, "drift": None}, {}, None),
        ({"performance": performance(version=2, worse_than_promised=WORSE)}, {}, None),
        ({"drift": drift(version=2, large=("monthly_fee",))}, {}, None),
        # Decay.
        ({"performance": performance(worse_than_promised=WORSE)}, {}, BY_DECAY),
        ({"performance": performance(no_better_than_chance=CHANCE)}, {}, BY_DECAY),
        ({"performance": performance(worse_than_promised=WORSE)}, {"on_decay": False}, None),
        ({"performance": performance(worse_calibrated=MISCALIBRATED)}, {}, None),
        # Slides.
        ({"performance": performance(sliding=SLIDES)}, {}, "slide:2024-02:version 1"),
        ({"performance": performance(sliding=SLIDES)}, {"on_slide": False}, None),
        ({"performance": performance(sliding=SLIDES, worse_than_promised=WORSE)}, {}, BY_DECAY),
        (
            {"performance": performance(sliding=SLIDES, worse_than_promised=WORSE)},
            {"on_decay": False},
            "slide:2024-02:version 1",
        ),
        # Drift: significant but small never counts by itself.
        ({"drift": drift(significant=("watch_hours_30d", "support_tickets_90d"), score="small")}, {}, None),
        ({"drift": drift(significant=("watch_hours_30d",))}, {"on_drift": "moderate"}, None),
        ({"drift": drift(moderate=("watch_hours_30d",))}, {}, None),
        ({"drift": drift(moderate=("watch_hours_30d",))}, {"on_drift": "moderate"}, "drift:2024-02:version 1"),
        ({"drift": LARGE}, {}, "drift:2024-02:version 1"),
        ({"drift": LARGE}, {"on_drift": "moderate"}, "drift:2024-02:version 1"),
        ({"drift": LARGE}, {"on_drift": "never"}, None),
        ({"drift": drift(score="large")}, {}, "drift:2024-02:version 1"),
        ({"drift": drift(score="moderate")}, {}, None),
        ({"drift": replace(LARGE, month=MARCH)}, {}, "drift:2024-03:version 1"),
        ({"drift": LARGE, "performance": performance(worse_than_promised=WORSE)}, {}, BY_DECAY),
        # More data: as many months again, and at least three.
        ({"newest": MARCH, "drift": None}, {}, None),
        ({"newest": APRIL, "drift": None}, {}, "more_data:1:version 1"),
        ({"newest": APRIL, "drift": None}, {"on_more_data": 4}, None),
        ({"newest": APRIL, "drift": None}, {"on_more_data": 0}, None),
        ({"newest": APRIL.shift(2)}, {}, "more_data:1:version 1"),
        ({"newest": APRIL.shift(3)}, {}, "more_data:2:version 1"),
        ({"newest": MARCH.shift(4), "production": Production(1, FOUR_MONTHS)}, {}, None),
        ({"newest": APRIL.shift(4), "production": Production(1, FOUR_MONTHS)}, {}, "more_data:1:version 1"),
        (
            {"newest": APRIL, "performance": performance(APRIL, worse_than_promised=WORSE)},
            {},
            "decay:2024-04:version 1",
        ),
        # Corrections: of months that were learned from, and before all else.
        (
            {"corrected": (Correction(JANUARY, "ab" * 32),)},
            {},
            "corrected_data:2024-01@abababababab:version 1",
        ),
        ({"corrected": (Correction(JANUARY, "ab" * 32),)}, {"on_corrected_data": False}, None),
        ({"corrected": (Correction(FEBRUARY, "ab" * 32),)}, {}, None),
        (
            {"corrected": (Correction(JANUARY, "ab" * 32),), "performance": performance(worse_than_promised=WORSE)},
            {},
            "corrected_data:2024-01@abababababab:version 1",
        ),
        (
            {
                "production": Production(1, (JANUARY, FEBRUARY)),
                "corrected": (Correction(FEBRUARY, "f" * 64), Correction(JANUARY, "a" * 64)),
            },
            {},
            "corrected_data:2024-01@aaaaaaaaaaaa,2024-02@ffffffffffff:version 1",
        ),
    ],
)
def test_what_makes_it_train_again(changes: dict[str, Any], policy: dict[str, Any], cause: str | None) -> None:
    decision = decided(replace(CALM, **changes), **policy)
    assert (decision.retrain, decision.cause) == (cause is not None, cause)
    assert decision.reason


# --- guards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "policy", "retrain", "alarm"),
    [
        # Never twice for one cause, and that is no alarm.
        ({"past": (Retraining(FEBRUARY, BY_DECAY, promoted=False, helped=None),)}, {}, False, None),
        # The first model starts no cooldown.
        ({"past": (FIRST,)}, {}, True, None),
        ({"past": past((JANUARY, True))}, {}, False, "the last retraining was for 2024-01"),
        ({"past": past((JANUARY, True))}, {"cooldown_months": 0}, True, None),
        ({"past": past((JANUARY.shift(-1), True))}, {}, True, None),
        (
            {"past": past((JANUARY.shift(-1), True))},
            {"cooldown_months": 2},
            False,
            "retraining was for 2023-12",
        ),
        # Never two for one month: the other of the same data.
        ({"past": past((FEBRUARY, True))}, {"cooldown_months": 0}, False, None),
        # There is nothing that Production has not learned from.
        ({"production": Production(1, (JANUARY, FEBRUARY))}, {}, False, "no labels are newer than those of 2024-02"),
        # The cap, over twelve months.
        (
            {"past": past((JANUARY.shift(-6), True))},
            {"maximum_per_year": 1},
            False,
            "in twelve months: 1, and",
        ),
        (
            {"past": past((FEBRUARY.shift(-11), True))},
            {"maximum_per_year": 1},
            False,
            "in twelve months: 1, and",
        ),
        ({"past": past((FEBRUARY.shift(-12), True))}, {"maximum_per_year": 1}, True, None),
        ({"past": (replace(FIRST, month=FEBRUARY.shift(-6)),)}, {"maximum_per_year": 1}, True, None),
        # Giving up.
        (
            {"past": past((FEBRUARY.shift(-8), False), (FEBRUARY.shift(-4), False))},
            {},
            False,
            "what was trained for 2023-06, 2023-10 did not help",
        ),
        ({"past": past((FEBRUARY.shift(-8), False), (FEBRUARY.shift(-4), True))}, {}, True, None),
        ({"past": past((FEBRUARY.shift(-8), True), (FEBRUARY.shift(-4), False))}, {}, True, None),
        ({"past": past((FEBRUARY.shift(-8), False), (FEBRUARY.shift(-4), None))}, {}, True, None),
        ({"past": past((FEBRUARY.shift(-4), False))}, {}, True, None),
        ({"past": past((FEBRUARY.shift(-4), False))}, {"give_up_after": 1}, False, "trained for 2023-10 did not help"),
    ],
)
def test_what_forbids_to_train_again_for_decay(
    changes: dict[str, Any], policy: dict[str, Any], retrain: bool, alarm: str | None
) -> None:
    decision = decided(replace(DECAYED, **changes), **policy)
    assert decision.retrain == retrain
    assert decision.cause == (BY_DECAY if retrain else None)
    assert len(decision.alarms) == (alarm is not None)
    assert (alarm or "") in "".join(one.says for one in decision.alarms)


@pytest.mark.parametrize(
    ("changes", "policy", "retrain"),
    [
        ({"past": past((FEBRUARY, True))}, {}, True),
        ({"production": Production(1, (JANUARY, FEBRUARY))}, {}, True),
        ({"past": past((FEBRUARY.shift(-8), False), (FEBRUARY.shift(-4), False))}, {}, True),
        ({"past": past((FEBRUARY, True))}, {"maximum_per_year": 1}, False),
    ],
)
def test_corrected_data_waits_for_nothing_but_the_cap(
    changes: dict[str, Any], policy: dict[str, Any], retrain: bool
) -> None:
    situation = replace(CALM, corrected=(Correction(JANUARY, "ab" * 32),), **changes)
    assert decided(situation, **policy).retrain == retrain


def test_drift_that_waits_for_labels_is_no_alarm() -> None:
    waiting = replace(CALM, production=Production(1, (JANUARY, FEBRUARY)), drift=replace(LARGE, month=MARCH))
    decision = decided(waiting)
    assert (decision.retrain, decision.alarms) == (False, ())
    assert "no labels are newer than those of 2024-02" in decision.reason
    assert decided(replace(waiting, newest=MARCH)).cause == "drift:2024-03:version 1"


def test_calibration_alone_is_an_alarm() -> None:
    decision = decided(replace(CALM, performance=performance(worse_calibrated=MISCALIBRATED)))
    assert not decision.retrain
    what = "version 1 is worse calibrated than it promised in 2024-02"
    remedy = "no model is trained for that alone: `streamflow threshold` sets another threshold"
    assert decision.alarms == (Alarm("worse_calibrated", None, what, "20 points off", remedy),)


def test_decisions_speak_to_people() -> None:
    assert decided(CALM).reason == "nothing calls for another model than version 1"
    assert decided(replace(CALM, newest=None)).reason == "no month has labels yet"
    assert decided(DECAYED).reason == ("version 1 was no better than chance in 2024-02: AUC is 0.35 below the promised")
    small = decided(replace(CALM, drift=drift(significant=("watch_hours_30d", "support_tickets_90d"))))
    assert small.reason == (
        "small drift in 2024-02 of watch_hours_30d, support_tickets_90d; the policy does not train again for that"
    )
    given_up = decided(replace(DECAYED, past=past((FEBRUARY.shift(-8), False), (FEBRUARY.shift(-4), False))))
    (alarm,) = given_up.alarms
    assert alarm.says == (
        "version 1 was no better than chance in 2024-02, and no model is trained for that: what was trained for "
        "2023-06, 2023-10 did not help; AUC is 0.35 below the promised; see whether the data still tells who churns, "
        "then train by hand (`streamflow run 2024-02`)"
    )
    assert given_up.reason == (
        "version 1 was no better than chance in 2024-02: AUC is 0.35 below the promised; not trained again: what was "
        "trained for 2023-06, 2023-10 did not help"
    )


@pytest.mark.parametrize(
    ("changes", "policy", "obstacle", "remedy"),
    [
        ({"production": Production(1, (JANUARY, FEBRUARY))}, {}, "no_newer_labels", "land the labels of 2024-03"),
        (
            {"past": past((JANUARY, True))},
            {"cooldown_months": 2},
            "cooldown",
            "land the labels of 2024-04, or train by hand (`streamflow run 2024-02`)",
        ),
        (
            {"past": past((JANUARY.shift(-6), True))},
            {"maximum_per_year": 1},
            "maximum_per_year",
            "see whether they helped (`streamflow models`), then train by hand (`streamflow run 2024-02`), or raise it",
        ),
        (
            {"past": past((FEBRUARY.shift(-4), False))},
            {"give_up_after": 1},
            "give_up_after",
            "see whether the data still tells who churns, then train by hand (`streamflow run 2024-02`)",
        ),
    ],
)
def test_an_alarm_names_what_holds_back_and_what_to_do(
    changes: dict[str, Any], policy: dict[str, Any], obstacle: str, remedy: str
) -> None:
    (alarm,) = decided(replace(DECAYED, **changes), **policy).alarms
    assert (alarm.about, alarm.obstacle) == ("decay", obstacle)
    assert alarm.remedy == remedy


@pytest.mark.parametrize("obstacle", get_args(Obstacle))
def test_what_is_named_after_the_policy_is_in_it(obstacle: str) -> None:
    assert obstacle in ("no_newer_labels", "cooldown") or obstacle in RetrainingPolicy.__struct_fields__


# --- over months ----------------------------------------------------------------------------------------------------


def test_the_two_real_months_and_one_without_a_change() -> None:
    nothing = Situation(JANUARY, None, None, None, (), ())
    first = decided(nothing)
    assert first.cause == "no_model:2024-01"
    begun = (Retraining(JANUARY, "no_model:2024-01", promoted=True, helped=None),)
    second = decided(replace(DECAYED, past=begun))
    assert second.cause == BY_DECAY
    done = (*begun, Retraining(FEBRUARY, BY_DECAY, promoted=True, helped=True))
    renewed = Production(2, (FEBRUARY,))
    assert decided(replace(DECAYED, production=renewed, past=done)).reason.startswith("nothing calls for another model")
    third = Situation(MARCH, renewed, performance(MARCH, 2), drift(MARCH, 2), (), done)
    assert decided(third) == RetrainingDecision(False, None, "nothing calls for another model than version 2", ())


findings = st.sampled_from([KEPT, WORSE])
months = st.sampled_from([JANUARY, FEBRUARY, MARCH, APRIL])
situations = st.builds(
    Situation,
    newest=st.none() | months,
    production=st.none() | st.builds(Production, st.integers(1, 2), st.lists(months, min_size=1).map(tuple)),
    performance=st.none()
    | st.builds(
        lambda month, version, worse, slides: performance(month, version, worse_than_promised=worse, sliding=slides),
        *(months, st.integers(1, 2), findings, findings),
    ),
    drift=st.none()
    | st.builds(
        lambda month, large: drift(month, 1, large=("monthly_fee",) if large else ()), *(months, st.booleans())
    ),
    corrected=st.lists(st.builds(Correction, months, st.just("a" * 64)), max_size=2).map(tuple),
    past=st.just(()),
)


@given(situations, st.lists(st.booleans() | st.none(), min_size=1, max_size=20))
def test_one_situation_is_never_answered_twice_for_a_cause_nor_for_ever(
    situation: Situation, outcomes: list[bool | None]
) -> None:
    causes = []
    for helped in outcomes:
        decision = decided(situation, cooldown_months=0)
        if not decision.retrain:
            break
        assert decision.cause is not None
        assert situation.newest is not None
        causes.append(decision.cause)
        done = Retraining(situation.newest, decision.cause, promoted=False, helped=helped)
        situation = replace(situation, past=(*situation.past, done))
    assert len(causes) == len(set(causes))
    assert sum(not cause.startswith(("no_model", "corrected_data")) for cause in causes) <= 1


@given(situations)
def test_a_cause_comes_with_a_retraining_and_only_then(situation: Situation) -> None:
    decision = decided(situation)
    assert decision.retrain == (decision.cause is not None)
    assert decision.reason
    assert decided(situation) == decision


@pytest.mark.parametrize(
    ("past", "policy", "retrain"),
    [
        (past((FEBRUARY, False)), {}, True),
        (past((MARCH, False)), {}, False),
        (past((MARCH, True), cause="more_data:0"), {}, False),
        ((Retraining(MARCH, "more_data:1:version 1", promoted=False, helped=False),), {"cooldown_months": 0}, False),
        (past((FEBRUARY, False), (FEBRUARY, False)), {}, True),
        (past((FEBRUARY, True)), {"maximum_per_year": 1}, False),
    ],
)
def test_more_data_waits_its_turn_and_alarms_nobody(
    past: tuple[Retraining, ...], policy: dict[str, Any], retrain: bool
) -> None:
    decision = decided(replace(CALM, newest=APRIL, past=past), **policy)
    assert (decision.retrain, decision.alarms) == (retrain, ())


@pytest.mark.parametrize(
    ("of", "retrain"),
    [
        (past((JANUARY, False), cause="more_data:1"), True),
        (past((JANUARY.shift(-3), False), (JANUARY.shift(-2), False), cause="more_data:1"), True),
        # Never two for one month.
        (past((FEBRUARY, False), cause="more_data:1"), False),
    ],
)
def test_nothing_waits_because_of_what_was_trained_for_more_data(of: tuple[Retraining, ...], retrain: bool) -> None:
    assert decided(replace(DECAYED, past=of), maximum_per_year=1).retrain is retrain
