"""What is due next: months in order, models before newer months, failures that hold up nothing else."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamflow.loop import Step, newest_labelled, next_step
from streamflow.months import Month
from streamflow.retraining import RetrainingDecision
from streamflow.status import TRAINED, MonthStatus, State, relations

JANUARY, FEBRUARY, MARCH = Month.parse_range("2024-01..2024-03")
NOT_NOW = RetrainingDecision(False, None, "nothing calls for it", ())
EVERYTHING = tuple(relations())


def month(
    of: Month, state: State = "complete", missing: tuple[str, ...] = (), stale: tuple[str, ...] = ()
) -> MonthStatus:
    return MonthStatus(str(of), state, 1, 100, missing, stale)


def landed(of: Month) -> MonthStatus:
    return month(of, "landed", tuple(name for name in EVERYTHING if name not in TRAINED))


class Decides:
    """Says yes for the months that it has a cause for, and notes which it was asked about."""

    def __init__(self, causes: Mapping[Month, str] | None = None) -> None:
        self.causes = causes or {}
        self.asked: list[Month] = []

    def __call__(self, newest: Month) -> RetrainingDecision:
        self.asked.append(newest)
        cause = self.causes.get(newest)
        return RetrainingDecision(True, cause, f"because of {cause}", ()) if cause else NOT_NOW


def test_nothing_is_due_while_nothing_has_landed_or_all_is_done() -> None:
    decide = Decides()
    assert next_step([], decide) is None
    assert decide.asked == []
    assert next_step([month(JANUARY), month(FEBRUARY)], decide) is None
    assert decide.asked == [FEBRUARY]


def test_months_that_arrive_together_are_done_in_order() -> None:
    step = next_step([landed(JANUARY), landed(FEBRUARY)], Decides())
    assert step == Step(JANUARY, landed(JANUARY).missing, "2024-01 is landed")


def test_a_model_is_trained_before_a_newer_month_is_begun() -> None:
    decide = Decides({JANUARY: "no_model:2024-01"})
    step = next_step([month(JANUARY), landed(FEBRUARY)], decide)
    assert step == Step(JANUARY, TRAINED, "because of no_model:2024-01", "no_model:2024-01")
    assert decide.asked == [JANUARY]


def test_a_newer_month_is_begun_when_the_older_gave_no_reason_to_train() -> None:
    step = next_step([month(JANUARY), landed(FEBRUARY)], Decides())
    assert step is not None
    assert (step.month, step.cause) == (FEBRUARY, None)


def test_a_newer_month_that_is_scored_already_keeps_its_version_and_waits_for_no_model() -> None:
    decide = Decides({JANUARY: "corrected_data:2024-01"})
    stale = replace(month(FEBRUARY, "stale", stale=("drift_report",)), scored=True)
    step = next_step([month(JANUARY), stale], decide)
    assert step is not None
    assert (step.month, step.assets, step.cause) == (FEBRUARY, ("drift_report",), None)
    assert decide.asked == []


def test_what_is_due_for_another_month_says_for_which() -> None:
    because_of = {"drift_report": ("2024-01",), "churn_model": ("2023-12",)}
    stale = replace(month(MARCH, "stale", stale=("drift_report", "churn_model")), because_of=because_of)
    reason = "2024-03 is stale, held against 2024-01 as it was before its correction"
    assert next_step([stale], Decides()) == Step(MARCH, ("drift_report",), reason, because_of=(JANUARY,))


def test_an_older_month_that_arrives_late_comes_before_a_decision_about_the_newer() -> None:
    decide = Decides({FEBRUARY: "decay:2024-02:version 1"})
    step = next_step([landed(JANUARY), month(FEBRUARY)], decide)
    assert step is not None
    assert step.month == JANUARY
    assert decide.asked == []


def test_a_month_without_labels_is_not_decided_about() -> None:
    decide = Decides()
    assert next_step([month(JANUARY), month(FEBRUARY, "unlabelled")], decide) is None
    assert decide.asked == [JANUARY]


def test_labels_that_come_late_are_due() -> None:
    missing = ("labels", "training_dataset", "performance_report")
    step = next_step([month(JANUARY, "incomplete", missing), month(FEBRUARY, "unlabelled")], Decides())
    assert step == Step(JANUARY, missing, "2024-01 is incomplete")


def test_what_is_stale_is_due_upstream_first_but_for_models() -> None:
    stale = ("churn_model", "users_snapshots", "users", "registered_model_version")
    step = next_step([month(JANUARY, "stale", stale=stale)], Decides())
    assert step == Step(JANUARY, ("users", "users_snapshots"), "2024-01 is stale")


def test_a_stale_model_alone_is_left_to_the_decision() -> None:
    decide = Decides()
    assert next_step([month(JANUARY, "stale", stale=("churn_model",))], decide) is None
    assert decide.asked == [JANUARY]


def test_a_model_that_was_not_registered_is_completed() -> None:
    step = next_step([month(JANUARY, "incomplete", ("registered_model_version",))], Decides())
    assert step is not None
    assert step.assets == ("registered_model_version",)


def test_a_failed_month_holds_up_no_other_and_is_not_decided_about() -> None:
    decide = Decides()
    step = next_step([month(JANUARY), landed(FEBRUARY), landed(MARCH)], decide, left_out=[FEBRUARY])
    assert step is not None
    assert step.month == MARCH
    assert decide.asked == [JANUARY]


@pytest.mark.parametrize(
    ("months", "newest"),
    [
        ([], None),
        ([month(JANUARY, "unlabelled")], None),
        ([month(JANUARY), month(FEBRUARY, "unlabelled")], JANUARY),
        ([month(JANUARY), landed(FEBRUARY)], JANUARY),
        ([month(JANUARY), month(FEBRUARY, "stale", stale=("churn_model",))], FEBRUARY),
    ],
)
def test_the_newest_labelled_month(months: list[MonthStatus], newest: Month | None) -> None:
    assert newest_labelled(months) == newest


@given(
    st.permutations([JANUARY, FEBRUARY, MARCH]),
    st.lists(st.integers(0, 4), min_size=3, max_size=3),
    st.sets(st.sampled_from([JANUARY, FEBRUARY, MARCH])),
)
def test_whatever_the_order_of_arrival_each_month_is_done_once_and_no_cause_is_trained_for_twice(
    arrivals: list[Month], steps_between: list[int], causes: set[Month]
) -> None:
    state: dict[Month, MonthStatus] = {}
    trained: list[str] = []
    done: list[Month] = []

    def decide(newest: Month) -> RetrainingDecision:
        cause = f"cause:{newest}"
        return RetrainingDecision(newest in causes and cause not in trained, cause, "because", ())

    def work(most: int) -> None:
        for _ in range(most):
            step = next_step([state[one] for one in sorted(state)], decide)
            if step is None:
                return
            if step.cause:
                trained.append(step.cause)
            else:
                done.append(step.month)
                state[step.month] = month(step.month)

    for arrival, steps in zip(arrivals, steps_between, strict=True):
        state[arrival] = landed(arrival)
        work(steps)
    work(100)
    assert sorted(done) == [JANUARY, FEBRUARY, MARCH]
    assert len(set(trained)) == len(trained)
    assert (f"cause:{MARCH}" in trained) == (MARCH in causes)
    if sum(steps_between) == 0:
        assert done == [JANUARY, FEBRUARY, MARCH]
        assert trained == [f"cause:{one}" for one in sorted(causes)]
