"""Whether to train again: what makes it necessary, what forbids it, and what a person must be told; a pure function.

Deciding belongs here. What is known then is read by `situation.py`. What is found out about a month is `decay.py`'s and
the drift report's, training and choosing among windows of months is done elsewhere, and who may be promoted is
`promotion.py`'s. Nothing heavy is imported: the service decides too, to show it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from streamflow.months import Month
from streamflow.policy import RetrainingPolicy

Kind = Literal["no_model", "corrected_data", "decay", "slide", "drift", "more_data"]
Size = Literal["none", "small", "moderate", "large"]
_SIZES: tuple[Size, ...] = ("none", "small", "moderate", "large")
Obstacle = Literal["no_newer_labels", "cooldown", "maximum_per_year", "give_up_after"]


@dataclass(frozen=True)
class Production:
    """What is in Production, and the months it learned from."""

    version: int
    trained_on: tuple[Month, ...]


@dataclass(frozen=True)
class Finding:
    """Whether something is so, and a sentence about it."""

    found: bool
    reason: str


@dataclass(frozen=True)
class Performance:
    """What the performance report of ``month`` found of the ``version`` that scored it."""

    month: str
    version: int
    worse_than_promised: Finding
    no_better_than_chance: Finding
    worse_calibrated: Finding
    sliding: Finding

    @property
    def decayed(self) -> bool:
        """Whether the version ranks worse than it promised, or no better than chance."""
        return self.worse_than_promised.found or self.no_better_than_chance.found


@dataclass(frozen=True)
class Drift:
    """What the drift report of ``month`` found against the months that ``version`` learned from.

    ``significant`` names the features whose distribution changed by more than noise, ``moderate`` those among them that
    changed that much or more, ``large`` those among these that changed that much. ``score`` is how far the version's
    probabilities moved, "none" if not significantly.
    """

    month: Month
    version: int
    significant: tuple[str, ...]
    moderate: tuple[str, ...]
    large: tuple[str, ...]
    score: Size


@dataclass(frozen=True)
class Correction:
    """A month that was learned from and has been corrected since; ``digest`` is that of its data now."""

    month: Month
    digest: str


@dataclass(frozen=True)
class Retraining:
    """An earlier retraining: the newest labelled month then, its cause, and what came of it.

    ``helped`` says whether its version was better than the one it was to replace, on held-out users; None as long as
    nobody knows. One that failed or still runs counts too.
    """

    month: Month
    cause: str
    promoted: bool
    helped: bool | None


@dataclass(frozen=True)
class Situation:
    """What is known when it is decided whether to train again.

    ``newest`` is the newest month with labels, None if there is none. ``performance`` and ``drift`` are the newest
    reports, None where there are none yet; those of another version than Production's do not count. ``corrected`` are
    months that Production learned from, ``past`` the earlier retrainings, oldest first.
    """

    newest: Month | None
    production: Production | None
    performance: Performance | None
    drift: Drift | None
    corrected: tuple[Correction, ...]
    past: tuple[Retraining, ...]


@dataclass(frozen=True)
class Alarm:
    """``what`` a person must look at, ``why`` it is so, and the ``remedy``.

    Something calls for another model, and an ``obstacle`` forbids to train it; or, with none, Production's
    probabilities are off, for which alone no model is trained.
    """

    about: Kind | Literal["worse_calibrated"]
    obstacle: Obstacle | None
    what: str
    why: str
    remedy: str

    @property
    def says(self) -> str:
        """All of it in one sentence."""
        return f"{self.what}: {self.why}; {self.remedy}"


@dataclass(frozen=True)
class RetrainingDecision:
    """Whether to train again on the labelled months up to the newest.

    ``cause`` names what for and never changes for the same thing, so that it serves as a key: ``decay:2024-02:version
    1``. It is None without a retraining. ``reason`` is a sentence.
    """

    retrain: bool
    cause: str | None
    reason: str
    alarms: tuple[Alarm, ...]


@dataclass(frozen=True)
class _Cause:
    kind: Kind
    key: str
    what: str
    why: str | None = None

    @property
    def reason(self) -> str:
        return f"{self.what}: {self.why}" if self.why else self.what


def should_retrain(situation: Situation, policy: RetrainingPolicy) -> RetrainingDecision:
    """Decide whether to train again; a pure function.

    Of several causes the first counts, in the order: no model, corrected data, decay, slide, drift, more data. The
    others then wait for what comes of it.
    """
    newest, production = situation.newest, situation.production
    if newest is None:
        return RetrainingDecision(False, None, "no month has labels yet", ())
    if production is None:
        return _first_model(newest, situation.past)
    causes, passed_over = _causes(situation, production, policy)
    alarms, held_back = list(_calibration(situation, production)), []
    for cause in causes:
        obstacle = _obstacle(cause, situation, newest, production, policy)
        if obstacle is None:
            return RetrainingDecision(True, cause.key, cause.reason, tuple(alarms))
        held_back.append(f"{cause.reason}; not trained again: {obstacle.reason}")
        if obstacle.alarms:
            what, why = f"{cause.what}, and no model is trained for that", obstacle.reason
            why = f"{why}; {cause.why}" if cause.why else why
            alarms.append(Alarm(cause.kind, obstacle.name, what, why, obstacle.remedy))
    reason = (
        "; ".join([*held_back, *passed_over]) or f"nothing calls for another model than version {production.version}"
    )
    return RetrainingDecision(False, None, reason, tuple(alarms))


def _first_model(newest: Month, past: Sequence[Retraining]) -> RetrainingDecision:
    key = f"no_model:{newest}"
    if key in {one.cause for one in past}:
        reason = f"nothing is in Production, and a model was trained for {newest}; it waits for approval or was refused"
        return RetrainingDecision(False, None, reason, ())
    return RetrainingDecision(True, key, f"nothing is in Production, and {newest} has labels", ())


def _judges(situation: Situation, production: Production) -> bool:
    """Whether the performance report is of what is in Production."""
    return situation.performance is not None and situation.performance.version == production.version


def _calibration(situation: Situation, production: Production) -> Iterator[Alarm]:
    report = situation.performance
    if report is None or not _judges(situation, production) or not report.worse_calibrated.found:
        return
    what = f"version {production.version} is worse calibrated than it promised in {report.month}"
    remedy = "no model is trained for that alone: `streamflow threshold` sets another threshold"
    yield Alarm("worse_calibrated", None, what, report.worse_calibrated.reason, remedy)


def _causes(situation: Situation, production: Production, policy: RetrainingPolicy) -> tuple[list[_Cause], list[str]]:
    """What calls for another model, the first first; and what was seen but does not, in words."""
    found: list[_Cause] = []
    passed_over: list[str] = []
    for cause, wanted in (
        *_correction(situation.corrected, production, policy),
        *_performance(situation, production, policy),
        *_drift(situation.drift, production, policy),
        *_more_data(situation.newest, production, policy),
    ):
        if wanted:
            found.append(cause)
        else:
            passed_over.append(f"{cause.reason}; the policy does not train again for that")
    return found, passed_over


def _correction(
    corrected: Sequence[Correction], production: Production, policy: RetrainingPolicy
) -> Iterator[tuple[_Cause, bool]]:
    of_window = sorted((one for one in corrected if one.month in production.trained_on), key=lambda one: one.month)
    if not of_window:
        return
    what = ",".join(f"{one.month}@{one.digest[:12]}" for one in of_window)
    months = ", ".join(str(one.month) for one in of_window)
    reason = f"version {production.version} learned from {months}, corrected since"
    yield (
        _Cause("corrected_data", f"corrected_data:{what}:version {production.version}", reason),
        policy.on_corrected_data,
    )


def _performance(
    situation: Situation, production: Production, policy: RetrainingPolicy
) -> Iterator[tuple[_Cause, bool]]:
    report = situation.performance
    if report is None or not _judges(situation, production):
        return
    of = f"{report.month}:version {report.version}"
    because = [one.reason for one in (report.worse_than_promised, report.no_better_than_chance) if one.found]
    if because:
        kind = "no better than chance" if report.no_better_than_chance.found else "worse than promised"
        what = f"version {report.version} was {kind} in {report.month}"
        yield _Cause("decay", f"decay:{of}", what, because[0]), policy.on_decay
    if report.sliding.found:
        what = f"version {report.version} slides, as of {report.month}"
        yield _Cause("slide", f"slide:{of}", what, report.sliding.reason), policy.on_slide


def _drift(drift: Drift | None, production: Production, policy: RetrainingPolicy) -> Iterator[tuple[_Cause, bool]]:
    if drift is None or drift.version != production.version:
        return
    if not drift.significant and drift.score == "none":
        return
    size: Size = "large" if drift.large else "moderate" if drift.moderate else "small"
    size = max(size, drift.score, key=_SIZES.index)
    names = drift.large or drift.moderate or drift.significant
    moved = [*names, *(["the scores"] if drift.score == size else [])]
    reason = f"{size} drift in {drift.month} of {', '.join(moved)}"
    wanted = policy.on_drift != "never" and _SIZES.index(size) >= _SIZES.index(policy.on_drift)
    yield _Cause("drift", f"drift:{drift.month}:version {drift.version}", reason), wanted


def _more_data(newest: Month | None, production: Production, policy: RetrainingPolicy) -> Iterator[tuple[_Cause, bool]]:
    """What was learned from little grows better with more, though nothing is wrong with it; each doubling counts."""
    if newest is None or not policy.on_more_data:
        return
    learned, since = len(production.trained_on), _between(max(production.trained_on), newest)
    enough = max(policy.on_more_data, learned)
    if since >= enough:
        months = f"{learned} month{'s' if learned > 1 else ''}"
        reason = f"version {production.version} learned from {months} of labels, and {since} have come since"
        yield _Cause("more_data", f"more_data:{since // enough}:version {production.version}", reason), True


@dataclass(frozen=True)
class _Obstacle:
    name: Obstacle | None
    reason: str
    remedy: str = ""
    alarms: bool = True


def _obstacle(
    cause: _Cause, situation: Situation, newest: Month, production: Production, policy: RetrainingPolicy
) -> _Obstacle | None:
    """What forbids to train again for this cause now."""
    by_hand = f"train by hand (`streamflow run {newest}`)"
    past = [one for one in situation.past if not one.cause.startswith("no_model:")]
    if cause.key in {one.cause for one in past}:
        return _Obstacle(None, "it was done for this already", alarms=False)
    if cause.kind != "more_data":
        past = [one for one in past if not one.cause.startswith("more_data:") or one.month == newest]
    decayed = cause.kind == "decay"
    if cause.kind != "corrected_data":
        if newest in production.trained_on:
            reason = f"no labels are newer than those of {newest}, which version {production.version} learned from"
            remedy = f"land the labels of {newest.shift(1)}"
            return _Obstacle("no_newer_labels", reason, remedy, alarms=decayed)
        if past and _between(past[-1].month, newest) <= policy.cooldown_months:
            reason = (
                f"the last retraining was for {past[-1].month}, and `retraining.cooldown_months` of the policy is "
                f"{policy.cooldown_months}"
            )
            remedy = f"land the labels of {past[-1].month.shift(policy.cooldown_months + 1)}, or {by_hand}"
            return _Obstacle("cooldown", reason, remedy, alarms=decayed and past[-1].month != newest)
    recent = [one for one in past if 0 <= _between(one.month, newest) < 12]
    if len(recent) >= policy.maximum_per_year:
        reason = (
            f"retrainings in twelve months: {len(recent)}, and `retraining.maximum_per_year` of the policy is "
            f"{policy.maximum_per_year}"
        )
        remedy = f"see whether they helped (`streamflow models`), then {by_hand}, or raise it"
        return _Obstacle("maximum_per_year", reason, remedy, alarms=cause.kind != "more_data")
    if cause.kind in ("corrected_data", "more_data"):
        return None
    known = [one for one in past if one.helped is not None][-policy.give_up_after :]
    if len(known) == policy.give_up_after and not any(one.helped for one in known):
        reason = f"what was trained for {', '.join(str(one.month) for one in known)} did not help"
        remedy = f"see whether the data still tells who churns, then {by_hand}"
        return _Obstacle("give_up_after", reason, remedy)
    return None


def _between(earlier: Month, later: Month) -> int:
    return (later.year - earlier.year) * 12 + later.number - earlier.number
