"""The ops page: what it says of each state, that it says it safely, and how it looks as far as a test can tell."""

import re
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pytest
from governed import DECAY, POLICY, evidence
from serving_world import KNOWN, NOW, Platform, accept_connections, eventually, problem, running

from serving import ops_html, ops_page
from serving.months import NEWEST
from serving.ops_page import OpsPage, Served
from streamflow import decay, drift, loop, monitoring, promotion, relations, scoring, warehouse
from streamflow.api_keys import make_key
from streamflow.contract import CONTRACT, Column
from streamflow.database import Database
from streamflow.errors import TrainingRefused
from streamflow.gates import absolute_gates
from streamflow.months import Month
from streamflow.policy import Policy
from streamflow.promotion import Entry, Ledger, Version
from streamflow.relations import MonthWrite
from streamflow.retraining import RetrainingDecision
from streamflow.settings import Settings

JANUARY, FEBRUARY, MARCH = Month.parse_range("2024-01..2024-03")
HOSTILE = """<script>alert("1")</script><img src=x onerror='1'>&amp;"""
HOURS = Column("hours", "float", "Hours watched.")
STALLS = Column("stalls", "integer", "Playback stalls.")
SENIOR = Column("senior", "boolean", "65 years or older.")
INLINE = ("strong", "code", "time", "span", "a")
VOID = ("meta", "link", "input", "br", "img")
COMPLETE = ("✓ Nothing needs a person now.",)

Api = httpx.Client


# --- a platform with a history --------------------------------------------------------------------------------------


class Story:
    """What months leave in the database, written by the functions that write it in earnest."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self.database = platform.database
        self.at = datetime(2024, 2, 1, 9, tzinfo=UTC)

    def later(self) -> datetime:
        self.at += timedelta(hours=1)
        return self.at

    def register(self, number: int, artifact: bytes = b"", *, auc: float = 0.84, **lineage: Any) -> Version:
        version = Version(
            version=number,
            run_id=f"run-{number}",
            as_of=JANUARY.as_of,
            service="churn_v1",
            threshold=0.25,
            artifact_path="scorer.bin",
            artifact_sha256=scoring.sha256(artifact),
            dataset_digest=f"{number}d" * 32,
            predictions_digest="p",
            evidence=evidence(auc=auc),
            lineage={"estimator": "gradient_boosting", "calibrated": False, "window": ["2024-01"], **lineage},
            registered_at=self.later(),
        )
        self.platform.mlflow.files[version.run_id, "scorer.bin"] = artifact
        Ledger(self.database, None).register(version)  # type: ignore[arg-type]
        return version

    def decide(self, action: promotion.Action, version: Version, *, passed: bool = True, **changes: Any) -> Entry:
        gates = absolute_gates(version.evidence, (), POLICY)
        if not passed:
            gates = (replace(gates[0], passed=False, reason="it ranks too badly"), *gates[1:])
        entry = Entry(self.later(), action, version.version, None, "policy", "every gate passed", "auto", False, gates)
        entry = replace(entry, **changes)
        with self.database.connect() as connection:
            promotion._append(connection, entry)
        return entry

    def month(self, month: Month, *left_out: str, version: int = 1) -> None:
        """Everything that is made of a month, but for what is left out."""
        graph, written = relations.relations(), dict[str, MonthWrite]()
        for name, sources in graph.items():
            if name in (*left_out, *relations.TRAINED):
                continue
            made_from = {source: written[source].as_source for source in sources}
            facts = {"version": version, "contacts": 123, "expected_value": 4567.8} if name == "churn_scores" else {}
            written[name] = MonthWrite(name, month, 1, f"{name} {month}", 7043, made_from, self.at, facts)
        with self.database.connect() as connection:
            for write in written.values():
                warehouse.record(connection, write)

    def correct(self, month: Month, table: str) -> None:
        with self.database.connect() as connection:
            before = warehouse.month_write(connection, table, month)
            warehouse.record(connection, replace(before, revision=2, digest="corrected"))

    def hold_against(self, month: Month, reference: Month) -> None:
        """Let the month's drift report have been made in view of another month."""
        with self.database.connect() as connection:
            report = warehouse.month_write(connection, "drift_report", month)
            snapshots = [str(table.snapshot) for table in CONTRACT.snapshots]
            against = [warehouse.month_write(connection, name, reference) for name in snapshots]
            sources = {**report.sources, **relations.of_other_months(against)}
            warehouse.record(connection, replace(report, sources=sources))

    def performance(self, month: Month, version: Version, *, good: bool) -> decay.PerformanceReport:
        rng = np.random.default_rng(month.number)
        odds = rng.normal(-1, 1.8, 600)
        labels, held_out = rng.random(600) < 1 / (1 + np.exp(-odds)), np.arange(600) % 2 == 0
        probabilities = 1 / (1 + np.exp(-odds if good else odds))
        report = decay.performance_report(
            decay.Outcome(month, probabilities, 0.25, labels, held_out, {}),
            decay.Promise(version.version, (JANUARY,), version.evidence),
            (),
            DECAY,
            seed=1,
            draws=40,
        )
        self._keep("performance_report", month, version, report)
        return report

    def drift(self, month: Month, version: Version, shift: float) -> drift.DriftReport:
        rng = np.random.default_rng(3)
        users, scores = 2_000, np.linspace(0.1, 0.9, 2_000)
        hours, stalls, senior = rng.normal(25, 5, users), rng.poisson(1.5, users), rng.random(users) < 0.2
        frames = [pd.DataFrame({"hours": hours + by, "stalls": stalls, "senior": senior}) for by in (0.0, shift)]
        report = drift.compare(*frames, (HOURS, STALLS, SENIOR), reference_scores=scores, current_scores=scores)
        content = monitoring.DriftContent(str(month), version.version, str(JANUARY), report)
        self._keep("drift_report", month, version, content)
        return report

    def _keep(self, kind: monitoring.Kind, month: Month, version: Version, content: object) -> None:
        platform: Any = SimpleNamespace(database=self.database)
        source: dict[str, relations.Source] = {"churn_scores": {"revision": 1, "digest": f"churn_scores {month}"}}
        monitoring._keep(platform, kind, month, version, content, source, 7043, self.at)
        self.month(month, version=version.version)

    def retrain(self, month: Month, cause: str, reason: str, failure: str = "") -> None:
        platform: Any = SimpleNamespace(database=self.database)
        with (
            pytest.raises(TrainingRefused) if failure else nullcontext(),
            loop.retraining(platform, month, cause, reason, by="ada", now=self.later()),
        ):
            if failure:
                raise TrainingRefused(failure)


@pytest.fixture
def story(platform: Platform) -> Story:
    return Story(platform)


@pytest.fixture
def page_of(settings: Settings, serve: Callable[[Settings], Api]) -> Callable[..., "Page"]:
    """Starts the service and waits for it if something is in Production; then gives its page."""

    def opened(path: str = "/", *, ready: bool = True) -> Page:
        api = serve(settings)
        if ready:
            eventually(lambda: api.get("/ready").status_code == 200)
        answer = api.get(path)
        assert answer.status_code == 200, answer.text
        return Page(answer.text)

    return opened


class Page(HTMLParser):
    """A page's elements, their attributes and their text; refuses one that is no valid HTML as far as this can tell."""

    def __init__(self, html: str) -> None:
        super().__init__()
        assert html.startswith("<!doctype html>\n")
        self.html = html
        self.elements: list[SimpleNamespace] = []
        self._open: list[SimpleNamespace] = []
        self.feed(html)
        self.close()
        assert not self._open
        ids = [one.attrs["id"] for one in self.elements if "id" in one.attrs]
        assert len(ids) == len(set(ids))
        for one in self.elements:
            for name in one.attrs.get("aria-labelledby", "").split():
                assert name in ids
            assert one.tag != "a" or not one.attrs["href"].startswith("#") or one.attrs["href"][1:] in ids

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"{tag} repeats an attribute"
        inside = [one.tag for one in self._open]
        element = SimpleNamespace(tag=tag, attrs={name: value or "" for name, value in attrs}, text="", inside=inside)
        self.elements.append(element)
        if tag not in INLINE:
            self.handle_data(" ")
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert any(one.tag == "svg" for one in self._open), f"{tag} closes itself, which HTML does not know"
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag, f"{tag} is closed out of turn"

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.text += data

    def all(self, tag: str, **attrs: str) -> list[SimpleNamespace]:
        return [one for one in self.elements if one.tag == tag and attrs.items() <= one.attrs.items()]

    @property
    def title(self) -> str:
        return plain(self.all("h1")[0].text)

    @property
    def header(self) -> str:
        return plain(self.all("header")[0].text)

    @property
    def attention(self) -> list[str]:
        return [plain(one.text) for one in self.all("li") if "aside" in one.inside]

    def section(self, name: str) -> str:
        return plain(self.all("section", id=name)[0].text)

    def rows(self, section: str) -> list[list[str]]:
        """The cells of the section's table bodies."""
        inside, rows = False, list[list[str]]()
        for one in self.elements:
            if one.tag == "section":
                inside = one.attrs["id"] == section
            elif inside and one.tag == "tr":
                rows.append([])
            elif inside and one.tag in ("td", "th") and one.attrs.get("scope") not in ("col", "colgroup"):
                rows[-1].append(plain(one.text))
        return [row for row in rows if row]


def plain(text: str) -> str:
    return " ".join(text.split())


# --- what it tells --------------------------------------------------------------------------------------------------


def test_an_empty_platform_says_how_to_begin(page_of: Callable[..., Page]) -> None:
    page = page_of(ready=False)
    assert page.title == "Nothing is in Production"
    assert "streamflow land FOLDER --month YYYY-MM" in page.header
    assert page.attention == [
        "This service answers no prediction. No version is in Production; "
        "run streamflow promote VERSION --by NAME --reason TEXT."
    ]
    for section, says in {
        "waiting": "No version waits.",
        "quality": "Nothing to show yet",
        "drift": "No drift report yet",
        "months": "No month is in the warehouse.",
        "retraining": "No model was trained by itself yet.",
        "ledger": "Nothing was decided yet.",
    }.items():
        assert says in page.section(section)
    assert not page.all("section", id="why")


def test_the_story_of_two_months(story: Story, artifacts: tuple[bytes, bytes], page_of: Callable[..., Page]) -> None:
    story.retrain(JANUARY, "no_model:2024-01", "nothing is in Production, and 2024-01 has labels")
    first = story.register(1, artifacts[0], cause="no_model:2024-01")
    story.decide("promote", first)
    story.drift(JANUARY, first, 0.0)
    kept = story.performance(JANUARY, first, good=True)
    moved = story.drift(FEBRUARY, first, 1.5)
    lost = story.performance(FEBRUARY, first, good=False)
    story.retrain(FEBRUARY, "decay:2024-02:version 1", "version 1 was no better than chance in 2024-02")
    second = story.register(
        2,
        artifacts[1],
        auc=0.66,
        cause="decay:2024-02:version 1",
        window=["2024-02"],
        window_reason="the month alone was best",
        code_version="90df11b36b6b",
    )
    promoted = story.decide("promote", second, previous=1)
    page = page_of()

    assert page.title == "Version 2 is in Production"
    assert "gradient_boosting on churn_v1, trained on 2024-02. In Production since 2024-02-01 15:00 UTC" in page.header
    assert "It promised to rank a customer who churns above one who stays in 66.0 % (64.0 to 68.0 %)" in page.header
    assert "No month has shown yet whether it keeps that." in page.header
    assert "AUC promised 0.660 0.640 to 0.680 AUC achieved \N{EN DASH} no month judged yet" in page.header
    assert "Threshold 0.250" in page.header
    assert "Whom to contact 123 of 7,043 in 2024-02, by version 1" in page.header
    assert COMPLETE[0] in page.header
    assert not page.attention

    why = page.section("why")
    assert "Trained because Version 1 was no better than chance in 2024-02." in why
    assert "On these months 2024-02: The month alone was best" in why
    assert "Promoted because Every gate passed. policy, 2024-02-01 15:00 UTC; version 1 was in Production before" in why
    assert f"dataset {second.dataset_digest[:12]}, scorer {second.artifact_sha256[:12]}, code 90df11b36b6b" in why
    assert "All 14 gates passed" in why
    gates = page.rows("why")
    assert [row[0] for row in gates] == [gate.name.replace("_", " ") for gate in promoted.gates]
    assert gates[0] == [
        "ranks better than chance", "✓ passed", "0.64", "0.5",
        "AUC of 1,783 held-out users is 0.6600 (95 % interval 0.6400 to 0.6800); the lower end must exceed 0.5",
    ]  # fmt: skip

    auc = {report.month: report.held_out.metrics["auc"] for report in (kept, lost)}
    description = page.all("desc", id="plot-text")[0].text
    for month, word in (("2024-01", ". "), ("2024-02", ", decayed. ")):
        one = auc[month]
        achieved = f"achieved {one.value:.3f} ({one.low:.3f} to {one.high:.3f}){word}"
        assert f"{month}, version 1: promised 0.840 (0.820 to 0.860), {achieved}" in description.replace("\xa0", " ")
    assert "Not judged yet, version 2: promised 0.660 (0.640 to 0.680). Chance is 0.5." in description.replace(
        "\xa0", " "
    )
    assert len(page.all("circle", **{"class": "decayed"})) == 2  # one is the legend's
    quality = page.section("quality")
    assert "2024-02, scored by version 1 No better than chance. AUC of 300 held-out users" in quality
    assert plain(lost.worse_than_promised.reason) in quality
    assert "Not sliding." in quality

    heat = page.rows("drift")
    shifted = moved.features[0]
    assert shifted.significant
    assert [row[0] for row in heat] == ["hours", "scores of the version"]
    assert heat[0][1:] == [f"{shifted.psi:.3f} significant", "0.000"]
    assert page.all("td", **{"class": f"number {shifted.size} significant"})
    assert "Nothing else moved: stalls, senior." in page.section("drift")

    months = {row[0].split()[0]: row for row in page.rows("months")}
    assert list(months) == ["2024-02", "2024-01"]
    assert months["2024-02"] == [
        "2024-02 complete", "7,043", "version 1", "123 worth 4,568",
        f"1 of 3 significant hours {shifted.psi:.3f}, {shifted.size}",
        f"{auc['2024-02'].value:.3f} decayed promised 0.840", "version 2 promoted",
    ]  # fmt: skip
    assert months["2024-01"][4:] == [
        "none significant", f"{auc['2024-01'].value:.3f} promised 0.840", "version 1 promoted"
    ]  # fmt: skip
    assert "Not due. Nothing calls for another model than version 2." in page.section("retraining")
    assert page.rows("retraining") == [
        ["2024-02-01 13:00 UTC", "2024-02", "Version 1 was no better than chance in 2024-02", "version 2 promoted"],
        ["2024-02-01 10:00 UTC", "2024-01", "Nothing is in Production, and 2024-01 has labels", "version 1 promoted"],
    ]
    assert page.rows("ledger") == [
        ["2024-02-01 15:00 UTC", "2 Production was 1", "promoted", "policy", "Every gate passed"],
        ["2024-02-01 12:00 UTC", "1", "promoted", "policy", "Every gate passed"],
    ]


@pytest.mark.parametrize(("good", "says"), [(True, "it did so in"), (False, "it managed in")])
def test_what_is_in_production_is_held_against_what_it_promised(
    story: Story, artifacts: tuple[bytes, bytes], page_of: Callable[..., Page], good: bool, says: str
) -> None:
    first = story.register(1, artifacts[0], auc=0.8)
    story.decide("promote", first)
    story.performance(FEBRUARY, first, good=not good)
    report = story.performance(FEBRUARY, first, good=good)  # the newest is the one in force
    auc = report.held_out.metrics["auc"]
    page = page_of()
    share = f"{100 * auc.value:.1f} % ({100 * auc.low:.1f} to {100 * auc.high:.1f} %)"
    outcome = ", as promised." if good else ": no better than chance."
    assert f"In 2024-02 {says.replace(' in', '')} in {share}{outcome}" in page.header
    assert f"AUC achieved {auc.value:.3f} {auc.low:.3f} to {auc.high:.3f} in 2024-02" in page.header
    decayed = "Version 1, which is in Production, was no better than chance and worse than promised in 2024-02"
    off = (
        "Version 1 is worse calibrated than it promised in 2024-02. "
        f"{sentence_of(report.worse_calibrated.reason)}. "
        "No model is trained for that alone: streamflow threshold sets another threshold."
    )
    assert page.attention == ([] if good else [f"{decayed}; another is trained by itself.", off])
    assert "to come" not in page.section("quality")
    due = "Due now. Version 1 was no better than chance in 2024-02"
    says = "Not due. Nothing calls for another model than version 1." if good else due
    assert says in page.section("retraining")


def test_what_holds_a_retraining_back_needs_a_look(
    story: Story, settings: Settings, artifacts: tuple[bytes, bytes], page_of: Callable[..., Page]
) -> None:
    first = story.register(1, artifacts[0], auc=0.8, window=["2024-01", "2024-02"])
    story.decide("promote", first)
    story.performance(FEBRUARY, first, good=False)
    story.month(MARCH, "labels", "training_dataset", "performance_report")
    page = page_of()
    off, held_back = loop_decision(story, settings, FEBRUARY).alarms
    assert (held_back.about, held_back.obstacle) == ("decay", "no_newer_labels")
    assert (off.about, off.obstacle) == ("worse_calibrated", None)
    assert page.attention == [
        " ".join(f"{sentence_of(part).replace('`', '')}." for part in (alarm.what, alarm.why, alarm.remedy))
        for alarm in (held_back, off)
    ]
    assert page.attention[0].startswith(
        "Version 1 was no better than chance in 2024-02, and no model is trained for that. No labels are newer than "
        "those of 2024-02, which version 1 learned from; AUC of 300 held-out users is "
    )
    assert page.attention[0].endswith(" Land the labels of 2024-03.")
    assert COMPLETE[0] not in page.header
    assert "Held back. Needs a look says why, and what to do." in page.section("retraining")


def loop_decision(story: Story, settings: Settings, newest: Month) -> RetrainingDecision:
    """What the sensor and `streamflow status` decide."""
    platform: Any = SimpleNamespace(database=story.database, policy=Policy.load(settings))
    return loop.decision(platform, newest)


def sentence_of(reason: str) -> str:
    return plain(reason[:1].upper() + reason[1:])


def test_a_policy_that_cannot_be_used_needs_a_look(
    story: Story, settings: Settings, artifacts: tuple[bytes, bytes], serve: Callable[[Settings], Api]
) -> None:
    story.decide("promote", story.register(1, artifacts[0]))
    story.month(JANUARY)
    file = settings.home / "policy.toml"
    file.write_text(settings.policy_file.read_text().replace("[decay]", "[decay]\nsurprise = 1"))
    api = serve(settings.model_copy(update={"policy_file": file}))
    eventually(lambda: api.get("/ready").status_code == 200)
    page = Page(api.get("/").text)
    assert page.attention == [
        f"Whether to train again cannot be decided. The policy file {file} cannot be used: "
        "Object contains unknown field surprise - at $.decay; correct the file."
    ]
    assert "Undecided. Needs a look says why." in page.section("retraining")
    assert page.title == "Version 1 is in Production"
    file.write_text(settings.policy_file.read_text())
    mended = Page(api.get("/").text)
    assert not mended.attention
    assert "Not due. Nothing calls for another model than version 1." in mended.section("retraining")


def test_a_version_that_waits_is_shown_with_its_gates_and_the_command(
    story: Story, artifacts: tuple[bytes, bytes], page_of: Callable[..., Page]
) -> None:
    first = story.register(1, artifacts[0])
    story.decide("promote", first)
    refused, second = story.register(2), story.register(3, auc=0.86, cause="drift")
    story.decide("refuse", refused, passed=False, previous=1, reason="1 of 14 gates failed")
    story.decide("wait", second, previous=1, reason="policy manual: every gate passed; waits")
    page = page_of()
    waiting = page.section("waiting")
    assert "Version 3: AUC 0.860 (0.840 to 0.880)" in waiting
    assert "streamflow promote 3 --by NAME --reason TEXT" in waiting
    assert "Policy manual: every gate passed; waits." in waiting
    assert "Version 2" not in waiting
    assert len(page.rows("waiting")) == 14
    assert page.attention == ["1 version waits for approval."]
    assert "not against what is in Production now" not in waiting
    assert [row[2] for row in page.rows("ledger")] == ["waits", "refused", "promoted"]


def test_who_waited_before_production_changed_is_told_so_and_the_promoted_wait_no_more(
    story: Story, artifacts: tuple[bytes, bytes], page_of: Callable[..., Page]
) -> None:
    versions = [story.register(number, artifacts[number % 2]) for number in (1, 2, 3)]
    story.decide("promote", versions[0])
    for version in versions[1:]:
        story.decide("wait", version, previous=1)
    story.decide("promote", versions[1], previous=1, by="ada", reason="looked at it", override=True, passed=False)
    page = page_of()
    waiting = page.section("waiting")
    assert "It was held against version 1, not against what is in Production now" in waiting
    assert "anew" in waiting
    assert re.findall(r"promote \d", waiting) == ["promote 3"]
    why = page.section("why")
    assert "Looked at it. Gates were overridden. ada," in why
    assert "1 of 14 gates failed" in why
    assert page.rows("why")[0][1] == "✗ failed"
    assert page.rows("ledger")[0][2] == "promoted override"


def test_a_month_that_is_not_done_is_told_with_what_lacks(
    story: Story, artifacts: tuple[bytes, bytes], page_of: Callable[..., Page]
) -> None:
    story.decide("promote", story.register(1, artifacts[0]))
    story.month(JANUARY)
    story.correct(JANUARY, "labels")
    story.month(FEBRUARY, "drift_report")
    story.month(MARCH, "labels", "training_dataset", "performance_report")
    page = page_of()
    states = {row[0].split()[0]: row[0] for row in page.rows("months")}
    assert states == {
        "2024-03": "2024-03 unlabelled",
        "2024-02": "2024-02 incomplete missing: drift_report",
        "2024-01": "2024-01 stale stale: training_dataset, performance_report",
    }
    assert page.attention == [
        "2024-02 is incomplete: drift_report.",
        "2024-01 is stale: training_dataset and performance_report.",
    ]


def test_a_drift_report_is_stale_when_a_month_older_than_those_shown_was_corrected(
    story: Story, artifacts: tuple[bytes, bytes], page_of: Callable[..., Page]
) -> None:
    story.decide("promote", story.register(1, artifacts[0]))
    months = list(JANUARY.until(JANUARY.shift(NEWEST)))
    for month in months:
        story.month(month)
    story.hold_against(months[-1], JANUARY)
    assert page_of().attention == []
    story.correct(JANUARY, "usage_agg_30d_snapshots")
    page = page_of()
    assert page.rows("months")[0][0] == f"{months[-1]} stale stale: drift_report"
    assert page.attention == [f"{months[-1]} is stale: drift_report."]


def test_a_retraining_without_a_version_needs_a_look(
    story: Story, artifacts: tuple[bytes, bytes], page_of: Callable[..., Page]
) -> None:
    story.decide("promote", story.register(1, artifacts[0]))
    story.retrain(FEBRUARY, "decay:2024-02:version 1", "it decayed")
    story.retrain(FEBRUARY, "decay:2024-02:version 1", "it decayed")
    story.retrain(MARCH, "decay:2024-03:version 1", "it decayed again", failure="no <label> is there")
    page = page_of()
    assert page.attention == [
        "The retraining for 2024-03 failed. TrainingRefused: no <label> is there. "
        "Mend that, then streamflow run 2024-03.",
        "The retraining for 2024-02 has no version yet: it is under way, or its process was killed.",
    ]
    assert page.rows("retraining") == [
        ["2024-02-01 14:00 UTC", "2024-03", "It decayed again TrainingRefused: no <label> is there", "failed"],
        ["2024-02-01 12:00 UTC 2 attempts", "2024-02", "It decayed", "no version yet"],
    ]


def test_a_production_version_that_is_refused_needs_a_look(
    story: Story, artifacts: tuple[bytes, bytes], page_of: Callable[..., Page]
) -> None:
    story.decide("promote", story.register(1, artifacts[0]))
    story.platform.mlflow.files["run-1", "scorer.bin"] = b"something else"
    page = page_of(ready=False)
    assert page.title == "Version 1 is in Production"
    assert "This service answers no prediction" in page.attention[0]


def test_a_threshold_that_was_changed_is_the_one_shown(
    story: Story, artifacts: tuple[bytes, bytes], page_of: Callable[..., Page]
) -> None:
    first = story.register(1, artifacts[0])
    story.decide("promote", first)
    story.decide("threshold", first, threshold=0.375, evidence=first.evidence, by="ada", reason="fewer contacts")
    page = page_of()
    assert "Threshold 0.375" in page.header
    assert page.rows("ledger")[0][1:] == ["1", "threshold", "ada", "Fewer contacts threshold 0.375"]
    assert "Promoted because Every gate passed." in page.section("why")


def test_of_a_long_history_the_newest_is_shown_and_how_much_there_is(
    story: Story, artifacts: tuple[bytes, bytes], page_of: Callable[..., Page]
) -> None:
    first = story.register(1, artifacts[0])
    for _ in range(24):
        story.decide("flag", first, reason="seen")
    story.decide("promote", first)
    months = [JANUARY.shift(ago) for ago in range(14)]
    for month in months:
        story.month(month)
    page = page_of()
    ledger = page.rows("ledger")
    assert len(ledger) == ops_page.SHOWN_ENTRIES
    assert ledger[0][2] == "promoted"
    assert "The newest 20 of 25 rows; streamflow ledger lists all." in page.section("ledger")
    shown = [row[0].split()[0] for row in page.rows("months")]
    assert shown == [str(month) for month in reversed(months[2:])]
    assert "The newest 12 of 14 months" in page.section("months")


# --- a trace --------------------------------------------------------------------------------------------------------


def test_a_prediction_is_traced_by_its_request_id(
    story: Story, settings: Settings, artifacts: tuple[bytes, bytes], serve: Callable[[Settings], Api]
) -> None:
    version = story.register(1, artifacts[0])
    promoted = story.decide("promote", version)
    api = serve(settings)
    eventually(lambda: api.get("/ready").status_code == 200)
    answer = api.post("/predict", json={"user_id": KNOWN}, headers={"X-Request-ID": "of-the-caller"}).json()
    traced = {"request_id": f" {answer['request_id']} "}
    eventually(lambda: "Not found" not in Page(api.get("/", params=traced).text).section("trace"))
    page = Page(api.get("/", params=traced).text)
    text = page.section("trace")
    churns = "churn" if answer["prediction"] else "stay"
    assert f"{KNOWN} was given a probability of {answer['probability']:.4f}: expected to {churns}" in text
    assert "at a threshold of 0.2500" in text
    assert "Answered 2024-03-01 12:30:00 UTC the caller\N{RIGHT SINGLE QUOTATION MARK}s own id: of-the-caller" in text
    assert "version 1, gradient_boosting on churn_v1, trained on 2024-01 in Production since" in text
    assert f"in Production since {promoted.at:%Y-%m-%d %H:%M} UTC, registered" in text
    assert f"scorer {version.artifact_sha256[:12]}, dataset {version.dataset_digest[:12]}, run run-1" in text
    assert f"streamflow trace {answer['request_id']}" in text
    assert dict(page.rows("trace")) == {name: str(value) for name, value in answer["features_used"].items()}
    assert page.all("input", name="request_id")[0].attrs["value"] == answer["request_id"]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("0b8f2a6e-53d1-4c1e-9a61-7c0f5d3a8e42", "Not found. The prediction log has no such request"),
        ("urn:uuid:0b8f2a6e-53d1-4c1e-9a61-7c0f5d3a8e42", "Not found. The prediction log has no such request"),
        ("7590-VHVEG", "Not found. That is no request id: one is a UUID"),
        ("\0'; DROP TABLE users --", "Not found. That is no request id"),
        (HOSTILE, "Not found. That is no request id"),
        ("é" * 3_000, "Not found. That is no request id"),
    ],
)
def test_a_request_id_that_finds_nothing_is_told_so(shared_api: Api, asked: str, says: str) -> None:
    answer = shared_api.get("/", params={"request_id": asked})
    assert answer.status_code == 200
    page = Page(answer.text)
    assert says in page.section("trace")
    assert not page.all("script")
    assert not page.all("img")


@pytest.mark.parametrize("query", ["", "?request_id=", "?request_id=%20", "?other=1"])
def test_nothing_is_traced_unless_asked(shared_api: Api, query: str) -> None:
    page = Page(shared_api.get(f"/{query}").text)
    assert "Not found" not in page.section("trace")
    assert page.all("form")[0].attrs == {"class": "trace", "method": "get", "action": "/#trace"}


# --- safe -----------------------------------------------------------------------------------------------------------


def test_whatever_a_reason_says_is_text(
    story: Story, artifacts: tuple[bytes, bytes], page_of: Callable[..., Page]
) -> None:
    first = story.register(1, artifacts[0], cause="c", estimator=HOSTILE, window=[HOSTILE], window_reason=HOSTILE)
    story.retrain(JANUARY, "c", HOSTILE)
    story.decide("promote", first, by=HOSTILE, reason=HOSTILE)
    story.decide("wait", story.register(2, estimator=HOSTILE, code_version=HOSTILE), reason=HOSTILE)
    page = page_of()
    assert not page.all("script")
    assert not page.all("img")
    assert not [one for one in page.elements if any(name.startswith("on") for name in one.attrs)]
    assert "<script" not in page.html
    for section in ("why", "waiting", "ledger", "retraining"):
        assert plain(HOSTILE) in page.section(section)


def test_the_page_loads_nothing_and_is_kept_nowhere(shared_api: Api) -> None:
    answer = shared_api.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["x-content-type-options"] == "nosniff"
    page = Page(answer.text)
    (style,) = page.all("style")
    allowed = b64encode(sha256(style.text.encode()).digest()).decode()
    assert answer.headers["content-security-policy"] == (
        f"default-src 'none'; style-src 'sha256-{allowed}'; img-src data:; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    )
    assert "url(" not in style.text
    assert "@import" not in style.text
    assert not [one for one in page.elements if {"src", "srcset", "style", "xlink:href"} & one.attrs.keys()]
    assert all(one.attrs["href"].startswith("data:") for one in page.all("link"))
    assert not {one.tag for one in page.elements} & {"script", "iframe", "object", "embed", "img", "use", "image"}


def test_the_page_is_no_part_of_the_api_that_is_described(shared_api: Api) -> None:
    assert "/" not in shared_api.get("/schema/openapi.json").json()["paths"]
    problem(shared_api.post("/"), 405, "method-not-allowed")


# --- when something is away -----------------------------------------------------------------------------------------


def test_without_postgresql_the_page_says_so_and_comes_back(api: Api, platform: Platform, server: Database) -> None:
    accept_connections(platform.database, server, accept=False)
    answer = api.get("/")
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "2"
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    page = Page(answer.text)
    assert page.title == "The database cannot be read"
    assert "made from PostgreSQL, and: PostgreSQL does not answer; the log says why." in page.header
    accept_connections(platform.database, server, accept=True)
    eventually(lambda: api.get("/").status_code == 200)


def test_a_database_without_tables_is_told_how_to_get_them(
    new_database: Callable[[], Database], settings: Settings
) -> None:
    with running(settings.model_copy(update={"database_url": new_database().url})) as api:
        answer = api.get("/")
    assert answer.status_code == 503
    assert "PostgreSQL refuses a query" in Page(answer.text).header
    assert "streamflow migrate" in answer.text


# --- keys -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(shared_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Api, str]]:
    keys = tmp_path_factory.mktemp("keys") / "api_keys"
    key = make_key(keys, "ada")
    with running(shared_settings.model_copy(update={"api_keys_file": keys})) as api:
        yield api, key


def basic(name: str, password: str) -> dict[str, str]:
    return {"Authorization": f"Basic {b64encode(f'{name}:{password}'.encode()).decode()}"}


def test_where_keys_are_on_a_browser_asks_for_one(guarded: tuple[Api, str]) -> None:
    api, key = guarded
    answer = api.get("/")
    assert "in a browser as the password" in problem(answer, 401, "unauthorized")["detail"]
    assert answer.headers["www-authenticate"] == 'Basic realm="streamflow", charset="UTF-8"'
    for headers in (basic("anybody", key), basic("", key), {"Authorization": f"Bearer {key}"}, {"X-API-Key": key}):
        assert api.get("/", headers=headers).status_code == 200


@pytest.mark.parametrize("spoil", ["wrong", "as the name", "not base64", "no colon", "not ASCII"])
def test_nothing_but_a_key_opens_the_page(guarded: tuple[Api, str], spoil: str) -> None:
    api, key = guarded
    headers: dict[str, str] = {
        "wrong": basic("ada", key[:-1]),
        "as the name": basic(key, ""),
        "not base64": {"Authorization": f"Basic ada:{key}"},
        "no colon": {"Authorization": f"Basic {b64encode(key.encode()).decode()}"},
        "not ASCII": {"Authorization": "Basic \xff\xfe"},
    }[spoil]
    raw = {name: value.encode("latin-1") for name, value in headers.items()}
    problem(api.get("/", headers=raw), 401, "unauthorized")  # type: ignore[arg-type]


def test_a_password_opens_the_page_only(guarded: tuple[Api, str]) -> None:
    api, key = guarded
    for path in ("/model", "/metrics", "/nowhere", "/schema"):
        answer = api.get(path, headers=basic("ada", key))
        problem(answer, 401, "unauthorized")
        assert answer.headers["www-authenticate"] == 'Bearer realm="streamflow"'


# --- looks ----------------------------------------------------------------------------------------------------------

PAIRS = [
    *(("ink", on) for on in ("page", "panel", "tint", "bad-tint", "warn-tint", "calm", "strong")),
    *(("soft", on) for on in ("page", "panel", "tint", "bad-tint", "warn-tint")),
    ("faint", "page"), ("faint", "panel"), ("accent", "page"), ("page", "accent"),
    ("good", "page"), ("good", "good-tint"), ("bad", "page"), ("bad", "panel"), ("bad", "bad-tint"),
    ("warn", "warn-tint"),
]  # fmt: skip


def _themes() -> Iterator[tuple[str, dict[str, str]]]:
    screen = ops_html.STYLE.partition("@media print")[0]
    colours: dict[str, dict[str, str]] = {"light": {}, "dark": {}}
    for media, body in re.findall(r"(@media \(prefers-color-scheme: dark\) \{\s*)?:root \{(.*?)\}", screen, re.DOTALL):
        colours["dark" if media else "light"].update(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", body))
    yield from colours.items()


def _luminance(colour: str) -> float:
    """Relative luminance by WCAG 2.2."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in channels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(("text", "background"), PAIRS)
def test_text_stands_out_in_both_themes(theme: str, text: str, background: str) -> None:
    colours = dict(_themes())[theme]
    darker, lighter = sorted(_luminance(colours[name]) for name in (text, background))
    assert (lighter + 0.05) / (darker + 0.05) >= 4.5


def test_the_legend_names_the_bounds_that_sizes_are_told_by() -> None:
    template = (Path(ops_html.__file__).parent / "templates" / "ops.html.jinja").read_text()
    assert f"small: PSI below {drift.MODERATE_PSI:g}" in template
    assert f"moderate: {drift.MODERATE_PSI:g} to {drift.LARGE_PSI:g}" in template
    assert f"large: {drift.LARGE_PSI:g} and more" in template
    assert ops_html.CHANCE == decay.CHANCE


def _performance(month: str, achieved: float, **changes: Any) -> ops_page.Performance:
    quiet = ops_page.Finding(False, "fine")
    interval = ops_page.Interval(achieved, achieved - 0.02, achieved + 0.02)
    promised = ops_page.Interval(0.8, 0.78, 0.82)
    return ops_page.Performance(month, 1, ("2024-01",), 100, interval, promised, quiet, quiet, quiet, quiet, None)


def _page(*months: ops_page.MonthView, **changes: Any) -> OpsPage:
    empty: dict[str, Any] = {
        "at": NOW, "production": None, "served": Served(1, None), "waiting": (), "waiting_in_all": 0,
        "months": months, "months_in_all": len(months),
        "decision": None, "undecided": None, "retrainings": (), "ledger": (), "entries_in_all": 0,
        "trace": None,
    }  # fmt: skip
    return OpsPage(**(empty | changes))


def _month(performance: ops_page.Performance) -> ops_page.MonthView:
    done = relations.Standing("complete", (), (), {})
    return ops_page.MonthView(performance.month, done, 100, 1, 10, 5.0, None, performance, None)


@pytest.mark.parametrize("achieved", [[0.81], [0.81, 0.45], [0.05, 0.95], [0.7] * 12])
def test_the_plot_holds_every_interval_and_keeps_the_order_of_months(achieved: list[float]) -> None:
    months = [f"2024-{number:02d}" for number in range(1, len(achieved) + 1)]
    reports = [_performance(month, auc) for month, auc in zip(months, achieved, strict=True)]
    plot = ops_html.quality_plot(_page(*(_month(one) for one in reversed(reports))))
    assert plot is not None
    assert [column.month for column in plot.columns] == months
    places = [column.x for column in plot.columns]
    assert places == sorted(places)
    top = plot.ticks[-1][1]
    for column in plot.columns:
        assert column.achieved
        for mark in (column.promised, column.achieved):
            assert top <= mark.high < mark.y < mark.low <= plot.bottom
            assert plot.left < mark.x < plot.right
    values, pixels = zip(*plot.ticks, strict=True)
    assert plot.chance == dict(plot.ticks)[0.5]
    assert np.allclose(
        np.interp(achieved, values, pixels), [c.achieved.y for c in plot.columns if c.achieved], atol=0.1
    )


def test_without_anything_judged_or_promised_there_is_no_plot_and_no_heat_map() -> None:
    assert ops_html.quality_plot(_page()) is None
    assert ops_html.heat_map([]) is None


def test_the_heat_map_keeps_what_moved_and_names_the_rest() -> None:
    def feature(name: str, psi: float, size: ops_page.Size = "none", *, significant: bool = False) -> Any:
        return ops_page.FeatureDrift(name, psi, significant, size)

    score = feature("score", 0.0)
    before = ops_page.Drift("2024-01", 1, "2024-01", (feature("a", 0.0), feature("b", 0.2, "moderate")), score)
    after = ops_page.Drift(
        "2024-02",
        2,
        "2024-01",
        (feature("a", 0.0), feature("c", 0.3, "large", significant=True), feature("d", 0)),
        score,
    )
    heat = ops_html.heat_map([before, after])
    assert heat
    assert [row.name for row in heat.rows] == ["c", "b"]
    assert [cell and cell.psi for cell in heat.rows[0].cells] == [0.3, None]
    assert [cell and cell.psi for cell in heat.rows[1].cells] == [None, 0.2]
    assert list(heat.still) == ["a", "d"]
    assert [month.month for month in heat.months] == ["2024-02", "2024-01"]


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("every gate passed", "Every gate passed"),
        ("say `streamflow promote 3` now", "Say <code>streamflow promote 3</code> now"),
        ("`a` and `b`", "<code>a</code> and <code>b</code>"),
        ("an odd ` one", "An odd ` one"),
        ("a 95 % interval", "A 95\N{NO-BREAK SPACE}% interval"),
        ("`<b>` & <i>", "<code>&lt;b&gt;</code> &amp; &lt;i&gt;"),
        ("<script>`", "&lt;script&gt;`"),
        ("", ""),
    ],
)
def test_a_reason_is_set_as_a_sentence_and_never_as_html(text: str, html: str) -> None:
    assert ops_html.sentence(text) == html
